"""Cases of the registry on a hub as a process has it: its own database and disk, and all of its routes, without a socket."""

import asyncio
import json
import os
import shutil
import socket
import sqlite3
import tempfile
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from asgi_client import Answer, Caller
from corral.core.policy import ALL_SCOPES
from corral.hub import registry as registry_module
from corral.main.hub import build_hub
from corral.main.services import open_hub_services
from corral.settings import Settings
from corral.storage.revocations import RevocationLog
from corral.storage.sql.engine import Database
from corral.wire.manifest import CONFIG_TYPE, MANIFEST_TYPE
from corral.wire.registry import ImageManifest, parse_image_manifest
from fakes_registry import digest_of
from identity_hub import error_of
from registry_hub import CONFIG, TINY, RegistryHub, a_manifest

HUB, HOST = "http://localhost:11435", "localhost:11435"
WEIGHTS = bytes(range(256)) * 8
OLLAMA = {"user-agent": "ollama/0.34.0 (amd64 linux) Go/go1.26"}
MANIFESTS, UPLOADS = "/v2/alice/tiny/manifests", "/v2/alice/tiny/blobs/uploads/"
BLOB = f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}"


class RealHub:
    """A hub's application on a home of its own, and the API keys of its people."""

    def __init__(self, home: Path, caller: Caller, keys: dict[str, str]) -> None:
        self.home, self._caller, self._keys = home, caller, keys

    async def __call__(
        self, method: str, target: str, body: bytes = b"", *, by: str = "alice", headers: dict[str, str] | None = None
    ) -> Answer:
        """A request of somebody, or of a stranger for the empty name."""
        proof = {"authorization": "Basic " + b64encode(f"{by}:{self._keys[by]}".encode()).decode()} if by else {}
        return await self._caller.request(method, target, headers={**proof, **(headers or {})}, body=body)

    async def blob(self, content: bytes, *, name: str = "alice/tiny", by: str = "alice") -> Answer:
        return await self("POST", f"/v2/{name}/blobs/uploads/?digest={digest_of(content)}", content, by=by)

    async def put(self, reference: str, body: bytes, *, name: str = "alice/tiny", **headers: str) -> Answer:
        sent = {"content-type": MANIFEST_TYPE, **{key.replace("_", "-"): value for key, value in headers.items()}}
        return await self("PUT", f"/v2/{name}/manifests/{reference}", body, headers=sent)

    async def model(self, *, name: str = "alice/tiny", **headers: str) -> None:
        for content in (WEIGHTS, CONFIG):
            assert (await self.blob(content, name=name)).status == 201
        assert (await self.put("latest", a_manifest(WEIGHTS), name=name, **headers)).status == 201

    def files(self) -> set[str]:
        """Every file below the home, but for what the database has beside itself and notes of uploads that are done."""
        found = (str(path.relative_to(self.home)) for path in self.home.rglob("*") if path.is_file())
        return {path for path in found if not path.endswith(("-wal", "-shm", ".placed"))}


@pytest.fixture
def databases(monkeypatch: pytest.MonkeyPatch) -> list[Database]:
    """Every database that is opened while the test runs; the last one is the hub's."""
    opened: list[Database] = []
    start = Database.__init__

    def noted(self: Database, path: Path, log: RevocationLog) -> None:
        start(self, path, log)
        opened.append(self)

    monkeypatch.setattr(Database, "__init__", noted)
    return opened


def settings_of(home: Path) -> Settings:
    return Settings.from_env({"HOME": str(home), "CORRAL_HOME": str(home / "hub")})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A home with two people to copy, and their API keys: passwords and migrations take half a second."""
    home, keys = tmp_path_factory.mktemp("template"), {}

    async def make() -> None:
        async with open_hub_services(settings_of(home)) as services:
            for name in ("alice", "bob"):
                account = await services.accounts.add(
                    name, email=f"{name}@example.org", password="nine green bottles on a wall", is_admin=False
                )
                _, secret = await services.credentials.create_key(account, name="ci", scopes=ALL_SCOPES, expires_at=None)
                keys[name] = secret.reveal()

    asyncio.run(make())
    return home, keys


@pytest.fixture
async def real(template: tuple[Path, dict[str, str]], databases: list[Database]) -> AsyncIterator[RealHub]:
    home, keys = template
    # In memory where there is such a directory: what is tested here is not how long a disk takes.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        shutil.copytree(home, directory, dirs_exist_ok=True)
        async with build_hub(settings_of(Path(directory))) as built:
            yield RealHub(Path(directory), Caller(built.app, host=HOST), keys)


# ── R3, R5: the database ─────────────────────────────────────────────────────────────────────────────────────────────


class _Away:
    """A connection to nothing."""

    def execute(self, *arguments: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")


@contextmanager
def away(database: Database) -> Iterator[None]:
    """The database cannot be read or written, as when its disk is gone."""
    engines, hot = (database._durable, database._relaxed, database._readers), database._hot

    def fails(*arguments: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    for engine in engines:
        sa.event.listen(engine, "do_execute", fails)
    database._hot = _Away()  # type: ignore[assignment]
    try:
        yield
    finally:
        database._hot = hot
        for engine in engines:
            sa.event.remove(engine, "do_execute", fails)


async def test_r005_without_a_database_nobody_is_let_in_and_everything_comes_back_with_it(
    real: RealHub, databases: list[Database]
) -> None:
    await real.model(x_corral_visibility="public")
    ticket = (await real("GET", BLOB, headers=OLLAMA)).headers["location"].removeprefix(HUB)
    token = (await real("GET", "/v2/token?scope=repository:alice/tiny:pull,push")).json()["token"]
    bearer = {"authorization": f"Bearer {token}"}
    session = (await real("POST", UPLOADS)).headers["location"].removeprefix(HUB)
    requests = [
        ("GET", "/v2/"),
        ("GET", f"{MANIFESTS}/latest"),
        ("HEAD", BLOB),
        ("GET", BLOB),
        ("GET", "/v2/alice/tiny/tags/list"),
        ("GET", f"/v2/alice/tiny/referrers/{digest_of(WEIGHTS)}"),
        ("POST", UPLOADS),
        ("PATCH", session),
        ("PUT", f"{session}?digest={digest_of(WEIGHTS)}"),
        ("PUT", f"{MANIFESTS}/v2"),
        ("DELETE", f"{MANIFESTS}/latest"),
        ("GET", "/v2/token?scope=repository:alice/tiny:pull"),
    ]
    # Whatever the process remembers of good credentials: they were all used just now.
    for method, target in requests[:4]:
        assert (await real(method, target, by="", headers=bearer)).status == 200
    with away(databases[-1]):
        for method, target in requests:
            body = a_manifest(WEIGHTS) if method in ("PUT", "PATCH") else b""
            for by, headers in (("alice", {}), ("", bearer)):
                if "token" in target and not by:
                    continue
                started = perf_counter()
                answer = await real(method, target, body, by=by, headers={"content-type": MANIFEST_TYPE, **headers})
                assert perf_counter() - started < 2
                assert answer.status == 503, (method, target, by, answer.body)
                assert "www-authenticate" not in answer.headers
        by_ticket = await real("GET", ticket, by="", headers={"range": "bytes=0-9"})
        assert (by_ticket.status, by_ticket.body) == (503, b"")
        assert (await real("GET", f"{MANIFESTS}/latest", by="")).status == 503
        assert (await real("GET", "/readyz", by="")).status == 503
    for method, target in requests[:6]:
        assert (await real(method, target)).status == 200
    assert (await real("PATCH", session, WEIGHTS)).headers["range"] == "0-2047"
    assert (await real("GET", ticket, by="", headers={"range": "bytes=0-9"})).body == WEIGHTS[:10]


async def test_r003_full_database_refuses_pushes_and_serves_pulls(real: RealHub, databases: list[Database]) -> None:
    await real.model()
    pages = await databases[-1].write(lambda connection: connection.exec_driver_sql("PRAGMA page_count").scalar())
    for way in (databases[-1].write, databases[-1].write_relaxed):
        await way(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={pages}"))
    large = a_manifest(WEIGHTS, annotations={"x": "y" * 500_000})
    refused = await real.put("large", large)
    assert (refused.status, "sqlite" in refused.body.decode().lower()) == (503, False)
    assert (await real("GET", f"{MANIFESTS}/large")).status == 404
    assert (await real("GET", f"{MANIFESTS}/latest")).body == a_manifest(WEIGHTS)
    assert (await real("GET", BLOB, headers={"range": "bytes=5-9"})).body == WEIGHTS[5:10]
    for way in (databases[-1].write, databases[-1].write_relaxed):
        await way(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count=1000000"))
    assert (await real.put("large", large)).status == 201


# ── F05, F13, F24, T41: many at once, and lost files ─────────────────────────────────────────────────────────────────


async def test_f05_blob_pushed_by_many_at_once_is_one_file_with_a_link_each(real: RealHub) -> None:
    names = ["alice/a", "alice/b", "alice/a", "bob/a", "bob/a", "bob/b"]
    answers = await asyncio.gather(*(real.blob(WEIGHTS, name=name, by=name[: name.index("/")]) for name in names))
    assert [answer.status for answer in answers] == [201] * 6
    assert [path for path in real.files() if digest_of(WEIGHTS).hex in path] == [f"hub/blobs/{digest_of(WEIGHTS).file_name}"]
    assert not [path for path in real.files() if "uploads" in path]
    for name in set(names):
        by = name[: name.index("/")]
        assert (await real("GET", f"/v2/{name}/blobs/{digest_of(WEIGHTS)}", by=by)).body == WEIGHTS


async def test_t041_f13_reader_sees_one_manifest_or_the_other_while_a_tag_is_raced_for(real: RealHub) -> None:
    await real.model()
    bodies = [a_manifest(WEIGHTS, annotations={"n": str(number), "filler": "x" * 20_000 * number}) for number in range(4)]
    whole = {str(digest_of(body)): body for body in (*bodies, a_manifest(WEIGHTS))}
    seen: set[str] = set()

    async def read() -> None:
        answer = await real("GET", f"{MANIFESTS}/latest")
        assert answer.status == 200
        assert whole[answer.headers["docker-content-digest"]] == answer.body
        assert answer.headers["content-length"] == str(len(answer.body))
        seen.add(answer.headers["docker-content-digest"])

    await read()
    pushes = [asyncio.create_task(real.put("latest", body)) for body in bodies for _ in range(2)]
    while not all(push.done() for push in pushes):
        await asyncio.gather(read(), read())
    assert {(await push).status for push in pushes} == {201}
    await read()
    assert len(seen) > 1
    for digest, body in whole.items():
        assert (await real("GET", f"{MANIFESTS}/{digest}")).body == body


async def test_f24_blob_whose_file_is_lost_is_pushed_again_and_heals(real: RealHub) -> None:
    await real.model()
    path = real.home / "hub/blobs" / digest_of(WEIGHTS).file_name
    ticket = (await real("GET", BLOB, headers=OLLAMA)).headers["location"].removeprefix(HUB)
    for spoil in (path.unlink, lambda: (path.chmod(0o600), path.write_bytes(WEIGHTS[:-1]))):
        spoil()
        for method in ("HEAD", "GET"):
            assert (await real(method, BLOB)).status == 404
        by_ticket = await real("GET", ticket, by="", headers={"range": "bytes=0-9"})
        assert (by_ticket.status, by_ticket.body) == (404, b"")
        start = {"x-redirect-uploads": "2", "x-content-length": str(len(WEIGHTS))}
        assert (await real("POST", f"{UPLOADS}?digest={digest_of(WEIGHTS)}", headers=start)).status == 202
        assert (await real.blob(WEIGHTS)).status == 201
        assert (await real("GET", BLOB)).body == WEIGHTS


# ── F01, F09, F25, T33, T34: what never happens ──────────────────────────────────────────────────────────────────────


async def test_f09_t034_names_never_reach_the_disk(real: RealHub) -> None:
    names = ["alice/con", "alice/x.", "alice/a--b", "alice/nul/aux", "alice/blobs/uploads", "alice/UPPER", "alice/" + "y" * 80]
    for name in names:
        await real.model(name=name)
        assert (await real("GET", f"/v2/{name}/manifests/latest")).body == a_manifest(WEIGHTS)
    assert {path for path in real.files() if "blobs" in path} == {
        f"hub/blobs/{digest_of(content).file_name}" for content in (WEIGHTS, CONFIG)
    }


async def test_f08_t033_digest_that_is_a_path_leaves_every_file_as_it_is(real: RealHub) -> None:
    await real.model()
    before = real.files()
    session = (await real("POST", UPLOADS)).headers["location"].removeprefix(HUB)
    await real("PATCH", session, WEIGHTS[:7])
    for text in ("../../../x", "/etc/passwd", "..%2f..%2fx", "sha256:../../x", "sha256-" + "0" * 64, "a" * 64):
        quoted = quote(text, safe="")
        for method, target in (
            ("POST", f"{UPLOADS}?digest={quoted}"),
            ("PUT", f"{session}?digest={quoted}"),
            ("PATCH", f"{UPLOADS}{quoted}"),
            ("PUT", f"{UPLOADS}{quoted}?digest={digest_of(WEIGHTS)}"),
            ("DELETE", f"{UPLOADS}{quoted}"),
            ("GET", f"/v2/alice/tiny/blobs/{quoted}"),
            ("DELETE", f"/v2/alice/tiny/blobs/{quoted}"),
        ):
            answer = await real(method, target, WEIGHTS if method in ("POST", "PUT", "PATCH") else b"")
            assert answer.status in (400, 404, 405), target
    assert (await real("DELETE", session)).status == 204
    assert real.files() == before


async def test_f01_t035_content_of_another_digest_leaves_no_file(real: RealHub) -> None:
    await real.model()
    before = real.files()
    for _ in range(3):
        answer = await real("POST", f"{UPLOADS}?digest={digest_of(b'else')}", WEIGHTS + b"x")
        assert (answer.status, answer.json()["errors"][0]["code"]) == (400, "DIGEST_INVALID")
    assert real.files() == before
    assert (await real("HEAD", f"/v2/alice/tiny/blobs/{digest_of(b'else')}")).status == 404


#: Alone layers of this kind may be absent.
ELSEWHERE = "application/vnd.oci.image.layer.nondistributable.v1.tar"


async def test_f25_whatever_a_push_names_nothing_is_fetched(real: RealHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(self: socket.socket, address: object) -> None:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: refuse(None, arguments))  # type: ignore[arg-type]
    inside = "http://169.254.169.254/latest"
    config = json.dumps({"model_format": "", "remote_host": inside, "remote_model": "x"}).encode()
    assert (await real.blob(config)).status == 201
    manifest = a_manifest(
        layers=[{"mediaType": ELSEWHERE, "digest": str(digest_of(b"elsewhere")), "size": 9, "urls": [inside], "from": inside}],
        config={"mediaType": CONFIG_TYPE, "digest": str(digest_of(config)), "size": len(config), "urls": [inside]},
        subject={"mediaType": MANIFEST_TYPE, "digest": str(digest_of(b"s")), "size": 1, "urls": [inside]},
    )
    assert (await real.put("stub", manifest)).status == 201
    for target in (f"{MANIFESTS}/stub", "/alice/tiny", "/v2/alice/tiny/tags/list"):
        await real("GET", target, headers={"accept": "text/html"})
    assert (await real("GET", f"/v2/alice/tiny/blobs/{digest_of(b'elsewhere')}")).status == 404
    mounted = await real("POST", f"{UPLOADS}?mount={digest_of(b'm')}&from={quote('169.254.169.254/a/b', safe='')}")
    assert mounted.status == 202
    assert asked == []


async def test_f07_t040_manifest_needs_room_like_everything_else() -> None:
    hub = RegistryHub(quota_bytes=len(WEIGHTS) + len(CONFIG) + 5000)
    alice = await hub.add("alice")
    await hub.push(TINY, alice, WEIGHTS)
    large = a_manifest(WEIGHTS, annotations={"x": "y" * 10_000})
    assert (await error_of(hub.registry.put_manifest(TINY, "large", alice, large, MANIFEST_TYPE))).code == "forbidden"
    hub.files.free = 256 << 20
    small = a_manifest(WEIGHTS, annotations={"x": "y"})
    assert (await error_of(hub.registry.put_manifest(TINY, "small", alice, small, MANIFEST_TYPE))).code == "storage_full"
    # One that is there already takes none.
    await hub.registry.put_manifest(TINY, "again", alice, a_manifest(WEIGHTS), MANIFEST_TYPE)
    assert (await hub.registry.tags(TINY, alice)).names == ("again", "latest")


async def test_f15_large_manifest_is_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, threads = RegistryHub(), []
    alice = await hub.add("alice")
    await hub.push(TINY, alice, WEIGHTS)

    def noted(body: bytes, content_type: str) -> ImageManifest:
        threads.append(threading.current_thread() is threading.main_thread())
        return parse_image_manifest(body, content_type)

    monkeypatch.setattr(registry_module, "parse_image_manifest", noted)
    for size in (10, 200_000):
        body = a_manifest(WEIGHTS, annotations={"x": "y" * size})
        await hub.registry.put_manifest(TINY, "x", alice, body, MANIFEST_TYPE)
    assert threads == [True, False]
