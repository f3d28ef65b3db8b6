"""The exchanges of an unmodified `ollama push` and `ollama pull` with a real hub process, request by request.

One test per row of what the client sends and accepts; `flows.stock_ollama` is the client. Where a real `ollama` program is at
hand (`CORRAL_TEST_OLLAMA`, or on the PATH), the last tests run the same scenarios with it.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from nacl.signing import SigningKey

from flows.stack import Running, Stack, answers, call, free_port, wait_until
from flows.stock_ollama import (
    MANIFEST_TYPE,
    USER_AGENT,
    DeviceKey,
    Refused,
    Reply,
    StockOllama,
    is_absolute,
    model_of,
    parts_of,
    send,
)

ALICE, BOB, NOBODY = (DeviceKey(SigningKey(bytes([number]) * 32)) for number in (1, 2, 3))
#: Two parts for the client: 100 MB and one byte.
BIG = os.urandom(1 << 20) * 95 + os.urandom(100_000_001 - 95 * (1 << 20))
#: Many blocks and a byte, where the client's own parts are not what matters.
MIDDLE = os.urandom(1 << 20) * 19 + os.urandom(20_000_001 - 19 * (1 << 20))


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Hub:
    """A hub process that can be killed and started again on the same data."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.running: Running

    def start(self) -> None:
        self.running = self.stack.begin("hub", "serve")
        wait_until(lambda: answers(f"{self.stack.hub_url}/readyz"), "the hub to answer", watch=self.running)

    def kill(self) -> None:
        self.running.end(signal.SIGKILL)

    @property
    def base(self) -> str:
        return self.stack.hub_url

    def as_(self, key: DeviceKey, *, host: str = "") -> StockOllama:
        port = urlsplit(self.base).port
        return StockOllama(base=f"http://{host}:{port}" if host else self.base, key=key)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Stack(tmp_path_factory.mktemp("hub")) as stack:
        hub = Hub(stack)
        hub.start()
        for name, key in (("alice", ALICE), ("bob", BOB)):
            stack.add_account(name, admin=name == "alice")
            scopes = [word for scope in ("models:pull", "models:push") for word in ("--scope", scope)]
            stack.corral("hub", "device", "add", name, "--name", "laptop", "--key", key.authorized, *scopes)
        yield hub


@pytest.fixture
def alice(hub: Hub) -> StockOllama:
    return hub.as_(ALICE)


def pushed(client: StockOllama, repository: str, *layers: bytes, tag: str = "latest") -> tuple[list[bytes], bytes]:
    blobs, manifest = model_of(*layers)
    client.push(repository, tag, blobs, manifest)
    return blobs, manifest


# ── 401 and the token ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_challenge_is_one_header_whose_realm_is_on_the_very_host_that_was_asked(hub: Hub, host: str) -> None:
    client = hub.as_(ALICE, host=host)
    reply = client.once("HEAD", f"{client.base}/v2/alice/none/blobs/{digest_of(b'x')}")
    assert reply.status == 401
    client.authorize(reply, client.base)
    assert client.token
    assert client.once("HEAD", f"{client.base}/v2/alice/none/blobs/{digest_of(b'x')}").status == 404


def test_token_is_fetched_once_for_a_whole_push(alice: StockOllama) -> None:
    pushed(alice, "alice/once", b"weights")
    assert [method for method, target, _ in alice.log if target.startswith("/v2/token")] == ["GET"]
    assert alice.log[-1] == ("PUT", "/v2/alice/once/manifests/latest", 201)


def test_client_that_may_not_push_is_told_so_and_never_again_asked_for_a_token(hub: Hub) -> None:
    bob = hub.as_(BOB)
    with pytest.raises(Refused, match=r"^403: .*DENIED") as refusal:
        pushed(bob, "alice/once", b"of bob")
    # Either of these words in an error makes the real client print another sentence instead.
    assert not any(word in str(refusal.value).lower() for word in ("unauthorized", "access denied"))
    assert sum(target.startswith("/v2/token") for _, target, _ in bob.log) == 1


def test_unconnected_device_is_told_its_fingerprint_and_pulls_what_is_public(hub: Hub) -> None:
    with pytest.raises(Refused, match=r"403: .*SHA256:"):
        pushed(hub.as_(NOBODY), "alice/once", b"of nobody")


# ── Push ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_push_uploads_what_is_absent_and_passes_over_what_is_there(alice: StockOllama) -> None:
    blobs, manifest = pushed(alice, "alice/twice", b"first", b"second")
    alice.log.clear()
    alice.push("alice/twice", "v2", blobs, manifest)
    assert [method for method, _, _ in alice.log] == ["HEAD", "HEAD", "HEAD", "PUT"]
    assert {status for method, _, status in alice.log if method == "HEAD"} == {200}


def test_upload_begins_with_an_absolute_location_in_both_headers(alice: StockOllama) -> None:
    alice.has("alice/begin", digest_of(b"x"))
    reply = alice.control("POST", f"{alice.base}/v2/alice/begin/blobs/uploads/", {"Content-Length": "0"})
    assert reply.status == 202
    assert is_absolute(reply.headers["location"])
    assert reply.headers["docker-upload-location"] == reply.headers["location"]
    assert reply.headers["range"] == "0-0"


def test_empty_blob_needs_no_part(alice: StockOllama) -> None:
    alice.upload("alice/empty", b"")
    assert [method for method, _, _ in alice.log if method in ("PATCH", "PUT")] == ["PUT"]
    assert alice.has("alice/empty", digest_of(b""))


def test_blob_of_several_parts_goes_up_in_order(alice: StockOllama) -> None:
    assert [length for _, length in parts_of(len(BIG))] == [100_000_000, 1]
    alice.upload("alice/parts", BIG)
    assert [(method, status) for method, _, status in alice.log if method == "PATCH"] == [("PATCH", 202)] * 2
    assert alice.has("alice/parts", digest_of(BIG))


def test_part_names_the_next_url_and_how_far_it_got(alice: StockOllama) -> None:
    alice.has("alice/next", digest_of(b"x"))
    url = alice.begin("alice/next", digest_of(b"x"))
    reply = patch(alice, url, b"abc", 0)
    assert reply.status == 202
    assert is_absolute(reply.headers["location"])
    assert reply.headers["range"] == "0-2"


def patch(client: StockOllama, url: str, piece: bytes, offset: int, *, redirects: bool = True) -> Reply:
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(piece))}
    headers["Content-Range"] = f"{offset}-{offset + len(piece) - 1}"
    return client.once("PATCH", url, {**headers, **({"X-Redirect-Uploads": "1"} if redirects else {})}, piece)


def test_f03_part_whose_202_was_lost_is_taken_again_from_the_stock_client_and_refused_from_others(alice: StockOllama) -> None:
    alice.has("alice/lost", digest_of(b"x"))
    url = alice.begin("alice/lost", digest_of(b"abcdef"))
    assert patch(alice, url, b"abc", 0).status == 202
    # The answer never arrived: same URL, same range.
    again = patch(alice, url, b"abc", 0)
    assert (again.status, again.headers["range"]) == (202, "0-2")
    refused = patch(alice, again.headers["location"], b"abc", 0, redirects=False)
    assert refused.status == 416
    after = patch(alice, again.headers["location"], b"def", 3)
    assert after.headers["range"] == "0-5"
    assert alice.commit(after.headers["location"], digest_of(b"abcdef"), "e-2").status == 201


def test_f02_part_that_was_cut_off_is_rolled_back_and_taken_whole(alice: StockOllama) -> None:
    alice.has("alice/cut", digest_of(b"x"))
    url = alice.begin("alice/cut", digest_of(MIDDLE))
    piece = MIDDLE[:20_000_000]
    headers = {"User-Agent": USER_AGENT, "Authorization": f"Bearer {alice.token}", "Content-Range": "0-19999999"}
    headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(len(piece)), "X-Redirect-Uploads": "1"}
    with pytest.raises(ConnectionAbortedError):
        send("PATCH", url, headers, piece, cut_after=6_000_000)
    url = alice.part(url, piece, 0)
    url = alice.part(url, MIDDLE[20_000_000:], 20_000_000)
    assert alice.commit(url, digest_of(MIDDLE), "e-2").status == 201
    assert alice.has("alice/cut", digest_of(MIDDLE))


def test_f03_commit_whose_201_was_lost_is_answered_again(alice: StockOllama) -> None:
    alice.has("alice/again", digest_of(b"x"))
    url = alice.part(alice.begin("alice/again", digest_of(b"abc")), b"abc", 0)
    assert [alice.commit(url, digest_of(b"abc"), "e-1").status for _ in range(2)] == [201, 201]


def test_f01_commit_with_another_digest_is_refused_each_time_and_links_nothing(alice: StockOllama) -> None:
    alice.has("alice/wrong", digest_of(b"x"))
    url = alice.part(alice.begin("alice/wrong", digest_of(b"abc")), b"abc", 0)
    target = f"{url}{'&' if '?' in url else '?'}digest={digest_of(b'other')}"
    for _ in range(2):
        reply = alice.once("PUT", target, {"Content-Length": "0"})
        assert (reply.status, reply.errors[0]["code"]) == (400, "DIGEST_INVALID")
    assert not alice.has("alice/wrong", digest_of(b"other"))
    assert not alice.has("alice/wrong", digest_of(b"abc"))


def test_token_that_is_refused_in_the_middle_of_a_push_is_fetched_anew_and_the_same_part_taken(alice: StockOllama) -> None:
    alice.has("alice/expiry", digest_of(b"x"))
    url = alice.begin("alice/expiry", digest_of(BIG))
    url = alice.part(url, BIG[:100_000_000], 0)
    alice.token = alice.token[:-6] + "AAAAAA"
    alice.log.clear()
    # 100 MB are on their way while the 401 is given: it must arrive, not a reset.
    url = alice.part(url, BIG[:100_000_000], 0)
    assert [(method, status) for method, target, status in alice.log] == [("PATCH", 401), ("GET", 200), ("PATCH", 202)]
    url = alice.part(url, BIG[100_000_000:], 100_000_000)
    assert alice.commit(url, digest_of(BIG), "e-2").status == 201


def test_push_goes_on_after_the_hub_was_killed(hub: Hub) -> None:
    alice = hub.as_(ALICE)
    alice.has("alice/killed", digest_of(b"x"))
    url = alice.part(alice.begin("alice/killed", digest_of(MIDDLE)), MIDDLE[:20_000_000], 0)
    hub.kill()
    hub.start()
    url = alice.part(url, MIDDLE[20_000_000:], 20_000_000)
    assert alice.commit(url, digest_of(MIDDLE), "e-2").status == 201
    assert alice.fetch("alice/killed", digest_of(MIDDLE)) == MIDDLE


def published(client: StockOllama, repository: str, *layers: bytes) -> tuple[list[bytes], bytes]:
    """A model that everybody may pull."""
    blobs, manifest = pushed(client, repository, *layers)
    headers = {"Content-Type": MANIFEST_TYPE, "X-Corral-Visibility": "public"}
    assert client.once("PUT", f"{client.base}/v2/{repository}/manifests/latest", headers, manifest).status == 201
    return blobs, manifest


def test_mount_from_a_public_repository_is_done_without_sending_anything(hub: Hub) -> None:
    published(hub.as_(BOB), "bob/source", b"to be mounted")
    alice = hub.as_(ALICE)
    alice.upload("alice/target", b"to be mounted", source="bob/source")
    shown = [(method, status) for method, target, status in alice.log if not target.startswith("/v2/token")]
    assert shown == [("HEAD", 401), ("HEAD", 404), ("POST", 201)]
    assert alice.has("alice/target", digest_of(b"to be mounted"))


def test_t032_mount_from_a_private_repository_that_the_token_was_not_asked_for_begins_an_upload(hub: Hub) -> None:
    hub.as_(ALICE).upload("alice/source", b"alice's own")
    alice = hub.as_(ALICE)
    alice.upload("alice/target", b"alice's own", source="alice/source")
    assert [(method, status) for method, _, status in alice.log][-3:] == [("POST", 202), ("PATCH", 202), ("PUT", 201)]


@pytest.mark.parametrize("source", ["bob/secret", "nobody/nothing", "library/x.gguf"])
def test_f23_mount_from_what_may_not_be_seen_begins_an_upload(hub: Hub, source: str) -> None:
    hub.as_(BOB).upload("bob/secret", b"bob's own")
    alice = hub.as_(ALICE)
    digest = digest_of(b"bob's own")
    alice.has("alice/mounts", digest)
    assert alice.begin("alice/mounts", digest, source=source)
    assert not alice.has("alice/mounts", digest)


def test_manifest_links_a_blob_that_was_not_sent_because_it_had_been_mounted_before(hub: Hub) -> None:
    """After a mount the real client forgets to upload the same blob to a third repository."""
    blobs, manifest = published(hub.as_(BOB), "bob/shared", b"shared weights")
    alice = hub.as_(ALICE)
    alice.has("alice/third", digest_of(b"x"))
    assert alice.put_manifest("alice/third", "latest", manifest).status == 201
    assert alice.pull("alice/third", "latest") == (manifest, {digest_of(blob): blob for blob in blobs})


def test_t031_manifest_that_names_a_blob_of_somebody_else_is_refused(hub: Hub) -> None:
    _, manifest = pushed(hub.as_(BOB), "bob/model", b"weights of bob")
    alice = hub.as_(ALICE)
    with pytest.raises(Refused, match=r"^400: .*MANIFEST_BLOB_UNKNOWN"):
        alice.put_manifest("alice/copy", "latest", manifest)


def test_stub_whose_layers_are_null_is_kept_as_it_is(alice: StockOllama) -> None:
    config = b'{"model_format":"","remote_host":"https://ollama.com:443","remote_model":"gpt-oss:120b"}\n'
    alice.upload("alice/stub", config)
    entry = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest_of(config), "size": len(config)}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": entry, "layers": None}).encode()
    assert alice.put_manifest("alice/stub", "latest", manifest).status == 201
    assert alice.pull("alice/stub", "latest") == (manifest, {digest_of(config): config})


# ── Pull ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_pull_gives_back_every_byte(hub: Hub, host: str) -> None:
    blobs, manifest = pushed(hub.as_(ALICE), "alice/bytes", BIG, b"", b"small")
    client = hub.as_(ALICE, host=host)
    assert client.pull("alice/bytes", "latest") == (manifest, {digest_of(blob): blob for blob in blobs})


def test_pull_of_what_is_not_there_or_not_to_be_seen_says_the_same(hub: Hub) -> None:
    pushed(hub.as_(BOB), "bob/private", b"private")
    told = []
    for repository in ("bob/private", "bob/absent"):
        alice = hub.as_(ALICE)
        with pytest.raises(Refused, match="file does not exist"):
            alice.pull(repository, "latest")
        reply = alice.once("GET", f"{alice.base}/v2/{repository}/manifests/latest")
        told.append((reply.status, reply.body, set(reply.headers)))
    assert told[0] == told[1]


def test_head_of_a_blob_tells_its_length_without_a_redirect(alice: StockOllama) -> None:
    for content in (b"", b"x" * 1000):
        alice.upload("alice/lengths", content)
        reply = alice.once("HEAD", f"{alice.base}/v2/alice/lengths/blobs/{digest_of(content)}")
        assert (reply.status, reply.headers["content-length"]) == (200, str(len(content)))


def test_sixteen_ranges_come_at_once_without_authorization(alice: StockOllama) -> None:
    alice.upload("alice/ranges", MIDDLE)
    direct = alice.direct_url(f"{alice.base}/v2/alice/ranges/blobs/{digest_of(MIDDLE)}")
    length = len(MIDDLE) // 16 + 1
    with ThreadPoolExecutor(16) as threads:
        pieces = list(threads.map(lambda offset: alice.ranged(direct, offset, length), range(0, len(MIDDLE), length)))
    assert b"".join(pieces) == MIDDLE


def test_f20_error_at_a_direct_url_has_no_body_that_could_be_taken_for_data(alice: StockOllama) -> None:
    alice.upload("alice/errors", b"content")
    direct = alice.direct_url(f"{alice.base}/v2/alice/errors/blobs/{digest_of(b'content')}")
    assert alice.ranged(direct, 0, 7) == b"content"
    broken = send("GET", direct[:-4] + "AAAA", {"User-Agent": "Go-http-client/1.1", "Range": "bytes=0-6"})
    assert (broken.status in (403, 404), broken.body) == (True, b"")


def test_direct_url_dies_with_the_right_to_pull(hub: Hub) -> None:
    alice = hub.as_(ALICE)
    key = DeviceKey(SigningKey(bytes([9]) * 32))
    flags = ["--name", "lent", "--key", key.authorized, "--scope", "models:pull"]
    hub.stack.corral("hub", "device", "add", "alice", *flags)
    alice.upload("alice/revoked", b"content")
    lent = hub.as_(key)
    direct = lent.direct_url(f"{lent.base}/v2/alice/revoked/blobs/{digest_of(b'content')}")
    assert lent.ranged(direct, 0, 7) == b"content"
    listed = json.loads(hub.stack.corral("hub", "device", "list", "alice", "--json").stdout)
    device = next(row["id"] for row in listed if row["name"] == "lent")
    hub.stack.corral("hub", "device", "revoke", "alice", device)
    reply = send("GET", direct, {"User-Agent": "Go-http-client/1.1", "Range": "bytes=0-6"})
    assert (reply.status in (403, 404), reply.body) == (True, b"")


# ── x/transfer: models made of tensors ───────────────────────────────────────────────────────────────────────────────


def begin_direct(client: StockOllama, repository: str, content: bytes) -> Reply:
    url = f"{client.base}/v2/{repository}/blobs/uploads/?digest={digest_of(content).replace(':', '%3A')}"
    headers = {"Content-Length": "0", "X-Redirect-Uploads": "2", "X-Content-Length": str(len(content))}
    return client.once("POST", url, headers)


def test_tensor_model_is_pushed_by_direct_uploads(alice: StockOllama) -> None:
    tensors = [os.urandom(100 + number) for number in range(5)]
    # Of its own too: a blob that this account could pull from a public repository need not be sent.
    blobs, _ = model_of(*tensors, model_family=os.urandom(8).hex())
    entries = [
        {"mediaType": "application/vnd.ollama.image.tensor", "digest": digest_of(blob), "size": len(blob), "name": f"t.{number}"}
        for number, blob in enumerate(blobs[:-1])
    ]
    config = {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "digest": digest_of(blobs[-1]),
        "size": len(blobs[-1]),
    }
    # The file's own bytes, with the newline at its end.
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": entries}).encode() + b"\n"
    for blob in blobs:
        assert not alice.has("alice/tensors", digest_of(blob))
        begun = begin_direct(alice, "alice/tensors", blob)
        assert begun.status == 202
        signed = {
            name.removeprefix("x-signed-header-"): value
            for name, value in begun.headers.items()
            if name.startswith("x-signed-header-")
        }
        assert is_absolute(begun.headers["x-direct-upload-url"])
        sent = send("PUT", begun.headers["x-direct-upload-url"], {"Content-Type": "application/octet-stream", **signed}, blob)
        assert sent.status in (200, 201), sent
        session = begun.headers["location"]
        separator = "&" if "?" in session else "?"
        done = alice.once("PUT", f"{session}{separator}digest={digest_of(blob)}", {"Content-Length": "0"})
        assert done.status in (200, 201), done
        assert begin_direct(alice, "alice/tensors", blob).status == 201
    assert alice.put_manifest("alice/tensors", "latest", manifest).status == 201
    assert alice.pull("alice/tensors", "latest")[0] == manifest


def test_tensor_push_in_parts_works_without_the_direct_url(alice: StockOllama) -> None:
    alice.has("alice/chunked", digest_of(b"x"))
    begun = begin_direct(alice, "alice/chunked", b"some content")
    url = alice.part(begun.headers["location"], b"some content", 0)
    assert alice.commit(url, digest_of(b"some content"), "e-1").status in (200, 201)


def test_tensor_pull_goes_on_where_it_broke_off(alice: StockOllama) -> None:
    content = os.urandom(1000)
    alice.upload("alice/resumed", content)
    url = f"{alice.base}/v2/alice/resumed/blobs/{digest_of(content)}"
    headers = {"User-Agent": "ollama-transfer/1.0", "Authorization": f"Bearer {alice.token}", "Range": "bytes=600-"}
    reply = send("GET", url, headers)
    assert (reply.status, reply.body) == (206, content[600:])
    assert reply.headers["content-range"] == "bytes 600-999/1000"


def test_tensor_head_is_200_or_absent_and_a_token_that_may_not_is_no_reason_for_another(hub: Hub) -> None:
    """That client asks for tokens without end as long as it is answered 401."""
    bob = hub.as_(BOB)
    bob.has("bob/x", digest_of(b"x"))
    reply = bob.once("HEAD", f"{bob.base}/v2/alice/anything/blobs/{digest_of(b'x')}")
    if reply.status == 401:
        bob.authorize(reply, bob.base)
        reply = bob.once("HEAD", f"{bob.base}/v2/alice/anything/blobs/{digest_of(b'x')}")
    assert reply.status == 404


# ── The real program ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def ollama() -> str:
    """Skips by name: this program is in no package registry, so continuous integration does without it."""
    found = os.environ.get("CORRAL_TEST_OLLAMA") or shutil.which("ollama")
    if not found:
        pytest.skip("no ollama program: put it on the PATH or name it in CORRAL_TEST_OLLAMA")
    return found


class RealOllama:
    """`ollama serve` with a home of its own."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.home, self.port = program, folder, free_port()
        folder.mkdir(parents=True)
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), "OLLAMA_HOST": f"127.0.0.1:{self.port}"}
        self.server = Running([program, "serve"], self.env, folder)
        wait_until(lambda: answers(f"http://127.0.0.1:{self.port}/api/version"), "ollama to answer", watch=self.server)

    @property
    def key(self) -> str:
        return (self.home / ".ollama/id_ed25519.pub").read_text().strip()

    @property
    def store(self) -> Path:
        return self.home / ".ollama/models"

    def manifest(self, name: str) -> Path:
        return self.store / "manifests" / "/".join(name.rsplit(":", 1))

    def place(self, name: str, blobs: list[bytes], manifest: bytes) -> None:
        """Have a model as if it had been created."""
        for blob in blobs:
            path = self.store / "blobs" / digest_of(blob).replace(":", "-")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(blob)
        self.manifest(name).parent.mkdir(parents=True, exist_ok=True)
        self.manifest(name).write_bytes(manifest)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, *arguments], env=self.env, capture_output=True, text=True, timeout=120, check=False, cwd=self.home
        )


@pytest.fixture(scope="module")
def real(ollama: str, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealOllama]:
    program = RealOllama(ollama, tmp_path_factory.mktemp("real") / "home")
    scopes = [word for scope in ("models:pull", "models:push") for word in ("--scope", scope)]
    hub.stack.corral("hub", "device", "add", "alice", "--name", "real", "--key", program.key, *scopes)
    yield program
    program.server.end(signal.SIGTERM)


def test_real_ollama_pushes_and_another_one_pulls(real: RealOllama, ollama: str, hub: Hub, tmp_path: Path) -> None:
    name = f"{urlsplit(hub.base).netloc}/alice/real"
    # More than one part, an empty layer and a small one; `create` would need the tools that a release brings along.
    blobs, manifest = model_of(BIG, b"", b"small")
    real.place(f"{name}:latest", blobs, manifest)
    done = real.run("push", "--insecure", name)
    assert done.returncode == 0, done.stderr
    stranger = RealOllama(ollama, tmp_path / "home")
    try:
        refused = stranger.run("pull", "--insecure", name)
        assert refused.returncode == 1
        assert "file does not exist" in refused.stderr
        hub.stack.corral("hub", "device", "add", "alice", "--name", "second", "--key", stranger.key)
        done = stranger.run("pull", "--insecure", name)
        assert done.returncode == 0, done.stderr
        assert stranger.manifest(f"{name}:latest").read_bytes() == manifest
        for blob in blobs:
            assert (stranger.store / "blobs" / digest_of(blob).replace(":", "-")).read_bytes() == blob
    finally:
        stranger.server.end(signal.SIGTERM)


def test_real_ollama_mounts_what_it_pushed_before_under_another_name(real: RealOllama, hub: Hub) -> None:
    host = urlsplit(hub.base).netloc
    blobs, manifest = model_of(os.urandom(1000))
    document = json.loads(manifest)
    real.place(f"{host}/alice/origin:latest", blobs, manifest)
    assert real.run("push", "--insecure", f"{host}/alice/origin").returncode == 0
    document["layers"][0]["from"] = f"{host}/alice/origin:latest"
    for name in ("second", "third"):
        real.place(f"{host}/alice/{name}:latest", blobs, json.dumps(document, separators=(",", ":")).encode())
        done = real.run("push", "--insecure", f"{host}/alice/{name}")
        assert done.returncode == 0, done.stderr
        assert hub.as_(ALICE).pull(f"alice/{name}", "latest")[1][digest_of(blobs[0])] == blobs[0]


def test_real_ollama_pushes_a_tensor_model(real: RealOllama, hub: Hub) -> None:
    """A hand-made manifest with a tensor layer sends the real program down its other way of transferring."""
    tensor, config = os.urandom(300_000), b'{"model_format":"safetensors","architecture":"","os":""}\n'
    layer = {"mediaType": "application/vnd.ollama.image.tensor", "digest": digest_of(tensor), "size": len(tensor), "name": "a.b"}
    described = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest_of(config), "size": len(config)}
    document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": described, "layers": [layer]}
    manifest = json.dumps(document).encode() + b"\n"
    real.place(f"{urlsplit(hub.base).netloc}/alice/tensors2:latest", [tensor, config], manifest)
    done = real.run("push", "--insecure", f"{urlsplit(hub.base).netloc}/alice/tensors2")
    assert done.returncode == 0, done.stderr
    body, _ = hub.as_(ALICE).pull("alice/tensors2", "latest")
    assert body == manifest


def test_real_ollama_is_told_why_it_may_not_push(real: RealOllama, hub: Hub) -> None:
    name = f"{urlsplit(hub.base).netloc}/bob/theirs"
    real.place(f"{name}:latest", *model_of(b"anything"))
    done = real.run("push", "--insecure", name)
    assert done.returncode == 1
    assert "DENIED" in done.stderr


def test_socket_that_says_nothing_does_not_keep_the_hub_from_others(hub: Hub) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(hub.base).port or 0)):
        assert call("GET", f"{hub.base}/v2/").status == 401
