"""The registry's routes, in process: every endpoint rule of distribution-spec 1.1, and what stock clients need besides.

`test_endNN_…` are the endpoints of the specification by its numbers; `test_fNN_…` the fault cases and `test_tNNN_…` the attacks.
"""

import re
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from asgi_client import Answer, Caller
from corral.core.records import Account, Principal
from corral.core.registry import Right, Visibility
from corral.edges.asgi import App, AppOptions, Dialect
from corral.edges.registry_api import RegistryApi
from corral.edges.registry_door import registry_challenge, registry_guard
from corral.edges.token_api import token_endpoints
from corral.hub.tickets import Tickets
from corral.wire.manifest import MANIFEST_TYPE
from corral.wire.names import Digest
from corral.wire.registry import OCI_INDEX_TYPE, OCI_MANIFEST_TYPE, parse_challenge
from fakes import MemorySessions
from fakes_inference import a_hosted, a_hosting
from fakes_models import MemoryHosting
from fakes_registry import digest_of
from identity_hub import TOKEN_KEYS, IdentityHub
from identity_stores import Stores
from registry_hub import CONFIG, TINY, RegistryHub, a_manifest, with_key

HUB, HOST = "https://hub.example", "hub.example"
WEIGHTS = bytes(range(256)) * 8
OLLAMA, TRANSFER = {"user-agent": "ollama/0.34.0 (amd64 linux) Go/go1.26"}, {"user-agent": "ollama-transfer/1.0"}


class Served:
    """A registry's application over fakes, and its people with their API keys. public_url: as configured. pulled: the names of
    the manifests that counted as pulls."""

    def __init__(self, folder: Path, *, public_url: str = HUB, hosted: MemoryHosting | None = None) -> None:
        self.hub = RegistryHub(hosted=hosted)
        self.pulled: list[str] = []
        sessions = MemorySessions(self.hub.accounts)
        stores = Stores(
            accounts=self.hub.accounts, sessions=sessions, credentials=self.hub.credentials, usage=None, audit=self.hub.audit
        )
        self.identity = IdentityHub(public_url=public_url, stores=stores, clock=self.hub.clock)
        self.folder = folder
        # The fake keeps its blobs in memory; what is sent comes from a disk.
        self.hub.files.path_of = self._placed  # type: ignore[method-assign]
        tickets = Tickets(TOKEN_KEYS.ticket_secret, credentials=self.hub.credentials, clock=self.hub.clock)
        self.api = RegistryApi(
            registry=self.hub.registry,
            repositories=self.hub.repositories,
            tickets=tickets,
            public_url=public_url,
            on_pull=lambda name: self.pulled.append(str(name)),
        )
        tokens = token_endpoints(
            tokens=self.identity.tokens,
            credentials=self.identity.credentials,
            grantable=self.hub.repositories.grantable,
        )
        options = AppOptions(
            authenticate=self.identity.credentials.authenticate,
            confirm=self.identity.credentials.confirm,
            guard=registry_guard(public_url),
            challenge=registry_challenge(public_url, self.identity.tokens.service),
            fallback=lambda path: Dialect.REGISTRY,
        )
        host = urlsplit(public_url).netloc
        self.caller = Caller(App([*tokens, *self.api.endpoints()], options), host=host, scheme="https")
        self.keys: dict[str, str] = {}

    def _placed(self, digest: Digest) -> str:
        path = self.folder / digest.file_name
        if digest in self.hub.files.blobs:
            path.write_bytes(self.hub.files.blobs[digest])
        return str(path)

    async def add(self, name: str) -> Account:
        account = await self.identity.add(name)
        _, self.keys[name] = await self.identity.key(account)
        return account

    async def __call__(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        by: str = "alice",
        headers: dict[str, str] | None = None,
        host: str | None = None,
    ) -> Answer:
        """A request with the API key of somebody, or without any for the empty name."""
        proof = {}
        if by:
            proof["authorization"] = "Basic " + b64encode(f"{by}:{self.keys[by]}".encode()).decode()
        return await self.caller.request(method, target, headers={**proof, **(headers or {})}, body=body, host=host)

    async def blob(self, content: bytes = WEIGHTS, *, name: str = "alice/tiny", by: str = "alice") -> Digest:
        digest = digest_of(content)
        answer = await self("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", content, by=by)
        assert answer.status == 201, answer.body
        return digest

    async def model(self, tag: str = "latest", *, name: str = "alice/tiny", public: bool = False) -> Digest:
        """A pushed model of `WEIGHTS`."""
        for content in (WEIGHTS, CONFIG):
            await self.blob(content, name=name)
        visibility = {"x-corral-visibility": "public"} if public else {}
        manifest = a_manifest(WEIGHTS)
        headers = {"content-type": MANIFEST_TYPE, **visibility}
        answer = await self("PUT", f"/v2/{name}/manifests/{tag}", manifest, headers=headers)
        assert answer.status == 201, answer.body
        return digest_of(manifest)

    async def session(self, name: str = "alice/tiny") -> str:
        """The path of a new upload."""
        answer = await self("POST", f"/v2/{name}/blobs/uploads/")
        assert answer.status == 202
        return path_of(answer.headers["location"])


def path_of(url: str) -> str:
    """Path and query of one of our absolute addresses."""
    assert url.startswith(HUB + "/"), url
    return url.removeprefix(HUB)


def code_of(answer: Answer) -> str:
    """The code of the first error, in an object as the specification wants it."""
    assert answer.headers["content-type"] == "application/json"
    [error] = answer.json()["errors"]
    assert set(error) == {"code", "message", "detail"}
    return str(error["code"])


@pytest.fixture
async def served(tmp_path: Path) -> Served:
    served = Served(tmp_path)
    await served.add("alice")
    await served.add("bob")
    return served


# ── end-1: what it is ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_end01_ping_with_a_credential_says_the_version(served: Served) -> None:
    answer = await served("GET", "/v2/")
    assert (answer.status, answer.headers["docker-distribution-api-version"]) == (200, "registry/2.0")


async def test_end01_ping_without_a_credential_is_challenged(served: Served) -> None:
    answer = await served("GET", "/v2/", by="")
    assert (answer.status, code_of(answer)) == (401, "UNAUTHORIZED")
    assert answer.headers["www-authenticate"] == 'Bearer realm="https://hub.example/v2/token",service="corral"'
    assert answer.headers["docker-distribution-api-version"] == "registry/2.0"


# ── end-2: blobs ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_end02_get_gives_the_blob_with_its_length_and_digest(served: Served) -> None:
    digest = await served.blob()
    answer = await served("GET", f"/v2/alice/tiny/blobs/{digest}")
    assert (answer.status, answer.body) == (200, WEIGHTS)
    assert answer.headers["content-length"] == str(len(WEIGHTS))
    assert answer.headers["docker-content-digest"] == str(digest)
    assert answer.headers["accept-ranges"] == "bytes"
    assert "content-encoding" not in answer.headers


async def test_end02_head_gives_the_exact_length_and_no_redirect(served: Served) -> None:
    digest = await served.blob()
    answer = await served("HEAD", f"/v2/alice/tiny/blobs/{digest}", headers=OLLAMA)
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", str(len(WEIGHTS)))
    assert "location" not in answer.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_end02_empty_blob_has_length_zero(served: Served, method: str) -> None:
    digest = await served.blob(b"")
    answer = await served(method, f"/v2/alice/tiny/blobs/{digest}")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "0", b"")


async def test_end02_missing_blob_is_unknown(served: Served) -> None:
    await served.blob()
    answer = await served("GET", f"/v2/alice/tiny/blobs/{digest_of(b'other')}")
    assert (answer.status, code_of(answer)) == (404, "BLOB_UNKNOWN")


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=500-1499", 500, 1499),
        ("bytes=500-", 500, 2047),
        ("bytes=-500", 1548, 2047),
        ("bytes=0-0", 0, 0),
        ("bytes=2000-999999", 2000, 2047),
    ],
)
async def test_end02_range_gives_exactly_that_part(served: Served, wanted: str, first: int, last: int) -> None:
    digest = await served.blob()
    answer = await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers={"range": wanted})
    assert (answer.status, answer.body) == (206, WEIGHTS[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/2048"
    assert answer.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("wanted", ["bytes=500-0", "bytes=2048-", "bytes=-0", "bytes=x-y"])
async def test_f21_range_that_cannot_be_is_416_with_the_size(served: Served, wanted: str) -> None:
    digest = await served.blob()
    answer = await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers={"range": wanted})
    assert (answer.status, answer.headers["content-range"]) == (416, "bytes */2048")


async def test_f21_a_thousand_ranges_give_the_whole(served: Served) -> None:
    digest = await served.blob()
    ranges = "bytes=" + ",".join(f"{n}-{n}" for n in range(1000))
    answer = await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers={"range": ranges})
    assert (answer.status, len(answer.body)) == (200, len(WEIGHTS))


@pytest.mark.parametrize(("tag", "status"), [("", 206), ("x", 200)])
async def test_end02_if_range_decides_whether_the_range_counts(served: Served, tag: str, status: int) -> None:
    digest = await served.blob()
    headers = {"range": "bytes=0-9", "if-range": f'"{digest}{tag}"'}
    assert (await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=headers)).status == status


async def test_f24_blob_whose_file_is_lost_is_unknown_for_head_and_get(served: Served) -> None:
    digest = await served.blob()
    del served.hub.files.blobs[digest]
    for method in ("GET", "HEAD"):
        assert (await served(method, f"/v2/alice/tiny/blobs/{digest}")).status == 404


async def test_f24_blob_whose_file_shrank_since_is_not_sent_short(served: Served) -> None:
    digest = await served.blob()
    path = Path(served.hub.files.path_of(digest))
    path.write_bytes(WEIGHTS[:100])
    served.hub.files.path_of = lambda digest: str(path)  # type: ignore[method-assign]
    for method in ("GET", "HEAD"):
        assert (await served(method, f"/v2/alice/tiny/blobs/{digest}")).status == 404


async def test_t030_blob_through_a_repository_that_does_not_link_it_is_unknown(served: Served) -> None:
    digest = await served.blob()
    await served.blob(b"else", name="bob/other", by="bob")
    answer = await served("GET", f"/v2/bob/other/blobs/{digest}", by="bob")
    assert (answer.status, code_of(answer)) == (404, "BLOB_UNKNOWN")


# ── Addresses of blobs for stock clients ─────────────────────────────────────────────────────────────────────────────


async def test_ollama_blob_get_names_an_address_and_spares_the_body(served: Served) -> None:
    digest = await served.blob()
    answer = await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=OLLAMA)
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "0", b"")
    assert answer.headers["location"].startswith(f"{HUB}/v2/alice/tiny/blobs/{digest}?t=")
    assert (answer.headers["cache-control"], answer.headers["vary"]) == ("no-store", "User-Agent")


async def test_other_client_blob_get_has_the_address_and_the_body(served: Served) -> None:
    digest = await served.blob()
    answer = await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers={"user-agent": "Go-http-client/1.1"})
    assert (answer.status, answer.body) == (200, WEIGHTS)
    assert "?t=" in answer.headers["location"]


async def test_transfer_client_blob_get_is_sent_to_the_same_place_by_another_name(served: Served) -> None:
    digest = await served.blob()
    answer = await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=TRANSFER)
    assert answer.status == 307
    location = urlsplit(answer.headers["location"])
    assert location.netloc == "Hub.example"
    arrived = await served("GET", f"{location.path}?{location.query}", by="", headers=TRANSFER, host=location.netloc)
    assert (arrived.status, arrived.body) == (200, WEIGHTS)


async def test_t039_address_works_without_authorization_for_parts(served: Served) -> None:
    digest = await served.blob()
    located = await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=OLLAMA)
    target = path_of(located.headers["location"])
    answer = await served("GET", target, by="", headers={"range": "bytes=10-19"})
    assert (answer.status, answer.body, answer.headers["content-range"]) == (206, WEIGHTS[10:20], "bytes 10-19/2048")
    head = await served("HEAD", target, by="")
    assert (head.status, head.headers["content-length"]) == (200, "2048")


async def test_t039_altered_address_is_refused_without_a_body(served: Served) -> None:
    digest, other = await served.blob(), await served.blob(b"other")
    await served.blob(name="alice/second")
    target = path_of((await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=OLLAMA)).headers["location"])
    altered = [
        target[:-2] + ("AA" if target[-2:] != "AA" else "BB"),
        target.replace("alice/tiny", "alice/second"),
        target.replace(str(digest), str(other)),
        target.partition("?")[0] + "?t=",
    ]
    for spoiled in altered:
        answer = await served("GET", spoiled, by="", headers={"range": "bytes=0-9"})
        assert (answer.status, answer.body) == (403, b""), spoiled


async def test_t039_address_ends_with_its_time_and_with_the_right(served: Served) -> None:
    digest = await served.blob()
    target = path_of((await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=OLLAMA)).headers["location"])
    alice = await served.hub.accounts.by_name("alice")
    assert alice is not None
    await served.hub.accounts.set_disabled(alice.id, served.hub.clock.now())
    assert (await served("GET", target, by="")).status == 403
    await served.hub.accounts.set_disabled(alice.id, None)
    assert (await served("GET", target, by="")).status == 200
    served.hub.clock.advance(3600 * 25)
    assert (await served("GET", target, by="")).status == 403


async def test_t039_address_of_an_unlinked_blob_is_unknown_without_a_body(served: Served) -> None:
    digest = await served.blob()
    target = path_of((await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=OLLAMA)).headers["location"])
    await served("DELETE", f"/v2/alice/tiny/blobs/{digest}")
    answer = await served("GET", target, by="")
    assert (answer.status, answer.body) == (404, b"")


async def test_t039_unsatisfiable_range_at_an_address_tells_the_size_only(served: Served) -> None:
    digest = await served.blob()
    target = path_of((await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=OLLAMA)).headers["location"])
    answer = await served("GET", target, by="", headers={"range": "bytes=9999-"})
    assert (answer.status, answer.body, answer.headers["content-range"]) == (416, b"", "bytes */2048")


# ── end-3, end-7: manifests ──────────────────────────────────────────────────────────────────────────────────────────


async def test_end07_put_by_tag_tells_where_it_is_and_its_digest(served: Served) -> None:
    digest = await served.model("v1")
    again = await served("PUT", "/v2/alice/tiny/manifests/v1", a_manifest(WEIGHTS), headers={"content-type": MANIFEST_TYPE})
    assert (again.status, again.headers["docker-content-digest"]) == (201, str(digest))
    assert again.headers["location"] == f"{HUB}/v2/alice/tiny/manifests/v1"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_end03_manifest_is_served_as_it_was_pushed(served: Served, method: str) -> None:
    digest = await served.model()
    for reference in ("latest", "LATEST", str(digest)):
        answer = await served(method, f"/v2/alice/tiny/manifests/{reference}", headers={"accept": "application/json"})
        assert answer.status == 200
        assert answer.headers["content-type"] == MANIFEST_TYPE
        assert answer.headers["docker-content-digest"] == str(digest)
        assert answer.headers["content-length"] == str(len(a_manifest(WEIGHTS)))
        assert answer.body == (a_manifest(WEIGHTS) if method == "GET" else b"")


@pytest.mark.parametrize(
    ("reference", "status", "code"),
    [
        ("none", 404, "MANIFEST_UNKNOWN"),
        (".INVALID_MANIFEST_NAME", 404, "MANIFEST_UNKNOWN"),
        (f"sha256:{'0' * 64}", 404, "MANIFEST_UNKNOWN"),
        ("sha256:totallywrong", 400, "DIGEST_INVALID"),
    ],
)
async def test_end03_manifest_that_is_not_there(served: Served, reference: str, status: int, code: str) -> None:
    await served.model()
    answer = await served("GET", f"/v2/alice/tiny/manifests/{reference}")
    assert (answer.status, code_of(answer)) == (status, code)


async def test_manifest_that_was_pushed_counts_as_pulled_and_the_stub_of_a_hosted_model_does_not(tmp_path: Path) -> None:
    served = Served(tmp_path, hosted=await a_hosting(a_hosted("alice/tiny:1b")))
    await served.add("alice")
    await served.model()
    stub = await served("GET", "/v2/alice/tiny/manifests/1b-cloud")
    by_digest = await served("GET", f"/v2/alice/tiny/manifests/{stub.headers['docker-content-digest']}")
    assert (stub.status, by_digest.body, served.pulled) == (200, stub.body, [])
    assert (await served("GET", "/v2/alice/tiny/manifests/latest")).status == 200
    assert served.pulled == ["alice/tiny"]


async def test_end07_put_by_digest_is_verified_also_with_sha512(served: Served) -> None:
    await served.model()
    body = a_manifest(WEIGHTS, note="x")
    for algorithm in ("sha256", "sha512"):
        digest = digest_of(body, algorithm)
        put = await served("PUT", f"/v2/alice/tiny/manifests/{digest}", body, headers={"content-type": MANIFEST_TYPE})
        assert (put.status, put.headers["docker-content-digest"]) == (201, str(digest))
        assert (await served("GET", f"/v2/alice/tiny/manifests/{digest}")).body == body
    wrong = digest_of(b"else")
    put = await served("PUT", f"/v2/alice/tiny/manifests/{wrong}", body, headers={"content-type": MANIFEST_TYPE})
    assert (put.status, code_of(put)) == (400, "DIGEST_INVALID")


async def test_end07b_put_sets_every_tag_that_is_named(served: Served) -> None:
    await served.model()
    digest = digest_of(a_manifest(WEIGHTS))
    headers = {"content-type": MANIFEST_TYPE}
    put = await served("PUT", f"/v2/alice/tiny/manifests/{digest}?tag=a&tag=b", a_manifest(WEIGHTS), headers=headers)
    assert (put.status, put.headers["oci-tag"]) == (201, "a, b")
    assert (await served("GET", "/v2/alice/tiny/tags/list")).json()["tags"] == ["a", "b", "latest"]


async def test_end07_put_with_a_subject_says_so(served: Served) -> None:
    subject = await served.model()
    body = a_manifest(
        WEIGHTS,
        mediaType=OCI_MANIFEST_TYPE,
        subject={"mediaType": MANIFEST_TYPE, "digest": str(subject), "size": 1},
    )
    put = await served("PUT", "/v2/alice/tiny/manifests/sig", body, headers={"content-type": OCI_MANIFEST_TYPE})
    assert (put.status, put.headers["oci-subject"]) == (201, str(subject))


async def test_t031_put_naming_a_blob_that_is_not_there_is_refused(served: Served) -> None:
    await served.blob(CONFIG)
    headers = {"content-type": MANIFEST_TYPE}
    answer = await served("PUT", "/v2/alice/tiny/manifests/v1", a_manifest(b"not there"), headers=headers)
    assert (answer.status, code_of(answer)) == (400, "MANIFEST_BLOB_UNKNOWN")


async def test_t036_put_of_a_huge_manifest_is_413(served: Served) -> None:
    headers = {"content-type": MANIFEST_TYPE, "content-length": str(17 << 20)}
    answer = await served("PUT", "/v2/alice/tiny/manifests/v1", headers=headers)
    assert (answer.status, code_of(answer)) == (413, "SIZE_INVALID")


async def test_end07_put_by_nobody_is_challenged_before_its_body_is_read(served: Served) -> None:
    headers = {"content-type": MANIFEST_TYPE, "content-length": str(17 << 20)}
    answer = await served("PUT", "/v2/alice/tiny/manifests/v1", by="", headers=headers)
    assert answer.status == 401
    assert parse_challenge(answer.headers["www-authenticate"]).scopes == ("repository:alice/tiny:pull,push",)


# ── Visibility ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_push_makes_a_private_repository_and_the_header_a_public_one(served: Served) -> None:
    await served.model(name="alice/mine")
    await served.model(name="alice/all", public=True)
    assert (await served("GET", "/v2/alice/mine/manifests/latest", by="")).status == 401
    assert (await served("GET", "/v2/alice/all/manifests/latest", by="")).status == 200


async def test_push_with_a_token_for_pushing_sets_the_visibility(served: Served) -> None:
    await served.model(public=True)
    token = (await served("GET", "/v2/token?service=corral&scope=repository:alice/tiny:pull,push")).json()["token"]
    headers = {"content-type": MANIFEST_TYPE, "x-corral-visibility": "private", "authorization": f"Bearer {token}"}
    put = await served("PUT", "/v2/alice/tiny/manifests/latest", a_manifest(WEIGHTS), by="", headers=headers)
    assert put.status == 201
    assert (await served("GET", "/v2/alice/tiny/manifests/latest", by="")).status == 401


async def test_push_of_a_collaborator_does_not_change_the_visibility(served: Served) -> None:
    await served.model()
    bob, found = await served.hub.accounts.by_name("bob"), await served.hub.store.repository("alice", "tiny")
    assert bob is not None
    assert found is not None
    await served.hub.store.set_collaborator(found.id, bob.id, Right.PUSH)
    headers = {"content-type": MANIFEST_TYPE, "x-corral-visibility": "public"}
    put = await served("PUT", "/v2/alice/tiny/manifests/by-bob", a_manifest(WEIGHTS), by="bob", headers=headers)
    assert put.status == 201
    kept = await served.hub.store.repository("alice", "tiny")
    assert kept is not None
    assert kept.visibility is Visibility.PRIVATE


async def test_push_with_an_unknown_visibility_is_refused(served: Served) -> None:
    headers = {"content-type": MANIFEST_TYPE, "x-corral-visibility": "secret"}
    assert (await served("PUT", "/v2/alice/tiny/manifests/v1", b"{}", headers=headers)).status == 400


# ── end-4, end-5, end-6, end-11, end-13, end-14: uploads ─────────────────────────────────────────────────────────────


async def test_end04a_post_begins_an_upload_at_an_absolute_address(served: Served) -> None:
    answer = await served("POST", "/v2/alice/tiny/blobs/uploads/")
    upload_id = answer.headers["docker-upload-uuid"]
    assert answer.status == 202
    assert answer.headers["location"] == f"{HUB}/v2/alice/tiny/blobs/uploads/{upload_id}"
    assert answer.headers["docker-upload-location"] == answer.headers["location"]
    assert (answer.headers["range"], answer.headers["content-length"]) == ("0-0", "0")


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_end04b_post_with_digest_and_body_stores_the_blob(served: Served, algorithm: str) -> None:
    digest = digest_of(WEIGHTS, algorithm)
    answer = await served("POST", f"/v2/alice/tiny/blobs/uploads/?digest={quote(str(digest))}", WEIGHTS)
    assert (answer.status, answer.headers["location"]) == (201, f"{HUB}/v2/alice/tiny/blobs/{digest}")
    assert answer.headers["docker-content-digest"] == str(digest)
    assert (await served("GET", f"/v2/alice/tiny/blobs/{digest}")).body == WEIGHTS


async def test_f01_post_with_another_digest_is_refused_and_leaves_nothing(served: Served) -> None:
    digest = digest_of(b"else")
    for _ in range(2):
        answer = await served("POST", f"/v2/alice/tiny/blobs/uploads/?digest={digest}", WEIGHTS)
        assert (answer.status, code_of(answer)) == (400, "DIGEST_INVALID")
    assert (await served("HEAD", f"/v2/alice/tiny/blobs/{digest}")).status == 404
    assert not served.hub.files.blobs


@pytest.mark.parametrize("text", ["md5:00", "sha256:00", "sha256-" + "0" * 64, "sha256:" + "A" * 64, "sha256:../../x", ""])
async def test_f08_digest_that_is_none_is_refused(served: Served, text: str) -> None:
    answer = await served("POST", f"/v2/alice/tiny/blobs/uploads/?digest={quote(text)}", WEIGHTS)
    assert (answer.status, code_of(answer)) == (400, "DIGEST_INVALID")


async def test_end04b_post_with_digest_and_no_body_begins_an_upload(served: Served) -> None:
    answer = await served("POST", f"/v2/alice/tiny/blobs/uploads/?digest={digest_of(WEIGHTS)}")
    assert answer.status == 202
    assert "x-direct-upload-url" not in answer.headers


async def test_end04b_post_with_the_digest_of_nothing_stores_the_empty_blob(served: Served) -> None:
    assert (await served("POST", f"/v2/alice/tiny/blobs/uploads/?digest={digest_of(b'')}")).status == 201
    assert (await served("HEAD", f"/v2/alice/tiny/blobs/{digest_of(b'')}")).status == 200


@pytest.mark.parametrize(("algorithm", "status"), [("sha256", 202), ("sha512", 202), ("md5", 400)])
async def test_end04c_post_with_an_algorithm_is_a_hint(served: Served, algorithm: str, status: int) -> None:
    assert (await served("POST", f"/v2/alice/tiny/blobs/uploads/?digest-algorithm={algorithm}")).status == status


async def test_end05_chunks_go_one_behind_the_other(served: Served) -> None:
    location = await served.session()
    first = await served("PATCH", location, WEIGHTS[:500], headers={"content-range": "0-499"})
    assert (first.status, first.headers["range"]) == (202, "0-499")
    location = path_of(first.headers["location"])
    second = await served("PATCH", location, WEIGHTS[500:], headers={"content-range": "500-2047"})
    assert (second.status, second.headers["range"]) == (202, "0-2047")
    done = await served("PUT", f"{location}?digest={digest_of(WEIGHTS)}")
    assert done.status == 201
    assert (await served("GET", f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}")).body == WEIGHTS


async def test_end05_body_without_a_range_is_added_at_the_end(served: Served) -> None:
    location = await served.session()
    await served("PATCH", location, WEIGHTS[:500])
    answer = await served("PATCH", location, WEIGHTS[500:])
    assert (answer.status, answer.headers["range"]) == (202, "0-2047")


@pytest.mark.parametrize("wanted", ["600-1099", "0-499", "100-599"])
async def test_end05_chunk_out_of_order_is_416_and_the_upload_goes_on(served: Served, wanted: str) -> None:
    location = await served.session()
    await served("PATCH", location, WEIGHTS[:500], headers={"content-range": "0-499"})
    for method, target in (("PATCH", location), ("PUT", f"{location}?digest={digest_of(WEIGHTS)}")):
        answer = await served(method, target, WEIGHTS[:500], headers={"content-range": wanted})
        assert (answer.status, code_of(answer), answer.headers["range"]) == (416, "BLOB_UPLOAD_INVALID", "0-499")
    assert (await served("GET", location)).headers["range"] == "0-499"


@pytest.mark.parametrize("wanted", ["0-5", "5-2", "bytes 0-499/2048", "x", "0-499, 500-999"])
async def test_f22_chunk_whose_range_and_length_differ_is_refused(served: Served, wanted: str) -> None:
    location = await served.session()
    answer = await served("PATCH", location, WEIGHTS[:500], headers={"content-range": wanted})
    assert (answer.status, code_of(answer)) == (400, "SIZE_INVALID")
    assert (await served("GET", location)).headers["range"] == "0-0"


async def test_f03_stock_client_may_send_its_last_part_again(served: Served) -> None:
    location, part = await served.session(), {"content-range": "0-2047", "x-redirect-uploads": "1"}
    for _ in range(2):
        answer = await served("PATCH", location, WEIGHTS, headers=part)
        assert (answer.status, answer.headers["range"]) == (202, "0-2047")
        assert answer.headers["docker-upload-location"].startswith(HUB)
    for _ in range(2):
        assert (await served("PUT", f"{location}?digest={digest_of(WEIGHTS)}&etag=x-1")).status == 201


async def test_f02_chunk_that_ends_early_is_taken_back(served: Served) -> None:
    location = await served.session()
    answer = await served("PATCH", location, WEIGHTS[:100], headers={"content-range": "0-499", "content-length": "500"})
    assert answer.status == 0
    assert (await served("GET", location)).headers["range"] == "0-0"
    assert (await served("PATCH", location, WEIGHTS[:500], headers={"content-range": "0-499"})).status == 202


async def test_end06_put_with_the_whole_content_stores_it(served: Served) -> None:
    location = await served.session()
    answer = await served("PUT", f"{location}?digest={digest_of(WEIGHTS)}", WEIGHTS)
    assert (answer.status, answer.headers["location"]) == (201, f"{HUB}/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}")


async def test_end06_put_with_the_last_chunk_stores_it(served: Served) -> None:
    location = await served.session()
    await served("PATCH", location, WEIGHTS[:500])
    headers = {"content-range": "500-2047"}
    assert (await served("PUT", f"{location}?digest={digest_of(WEIGHTS)}", WEIGHTS[500:], headers=headers)).status == 201


async def test_f01_put_with_another_digest_is_refused_again_and_again(served: Served) -> None:
    location = await served.session()
    await served("PATCH", location, WEIGHTS)
    for _ in range(3):
        answer = await served("PUT", f"{location}?digest={digest_of(b'else')}")
        assert (answer.status, code_of(answer)) == (400, "DIGEST_INVALID")
    assert (await served("PUT", f"{location}?digest={digest_of(WEIGHTS)}")).status == 201


async def test_end06_put_without_a_digest_is_refused(served: Served) -> None:
    answer = await served("PUT", await served.session())
    assert (answer.status, code_of(answer)) == (400, "DIGEST_INVALID")


async def test_end13_status_tells_how_far_it_is(served: Served) -> None:
    location = await served.session()
    await served("PATCH", location, WEIGHTS)
    answer = await served("GET", location)
    assert (answer.status, answer.headers["range"]) == (204, "0-2047")
    assert path_of(answer.headers["location"]) == location


async def test_end14_delete_gives_an_upload_up(served: Served) -> None:
    location = await served.session()
    assert (await served("DELETE", location)).status == 204
    answer = await served("GET", location)
    assert (answer.status, code_of(answer)) == (404, "BLOB_UPLOAD_UNKNOWN")
    assert (await served("DELETE", location)).status == 404


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_f10_upload_of_somebody_else_or_elsewhere_is_unknown(served: Served, method: str) -> None:
    location = await served.session()
    await served.blob(name="alice/second")
    await served.blob(name="bob/other", by="bob")
    for path, by in ((location.replace("tiny", "second"), "alice"), (location.replace("alice/tiny", "bob/other"), "bob")):
        answer = await served(method, path, by=by)
        assert (answer.status, code_of(answer)) == (404, "BLOB_UPLOAD_UNKNOWN")


async def test_end11_mount_gives_the_blob_without_an_upload(served: Served) -> None:
    digest = await served.blob()
    answer = await served("POST", f"/v2/alice/second/blobs/uploads/?mount={quote(str(digest))}&from=alice%2Ftiny")
    assert (answer.status, answer.headers["location"]) == (201, f"{HUB}/v2/alice/second/blobs/{digest}")
    assert (await served("HEAD", f"/v2/alice/second/blobs/{digest}")).status == 200


async def test_end11_mount_without_a_source_finds_one(served: Served) -> None:
    digest = await served.blob()
    assert (await served("POST", f"/v2/alice/second/blobs/uploads/?mount={digest}")).status == 201


@pytest.mark.parametrize("source", ["alice/tiny", "library/x.gguf", "no/such", "x", "../..", "registry.example/a/b"])
async def test_f23_mount_that_cannot_be_begins_an_upload(served: Served, source: str) -> None:
    digest = digest_of(b"nowhere")
    answer = await served("POST", f"/v2/alice/tiny/blobs/uploads/?mount={digest}&from={quote(source, safe='')}")
    assert answer.status == 202
    assert "docker-upload-uuid" in answer.headers


async def test_t032_mount_from_a_repository_that_may_not_be_read_begins_an_upload(served: Served) -> None:
    digest = await served.blob()
    answer = await served("POST", f"/v2/bob/other/blobs/uploads/?mount={digest}&from=alice%2Ftiny", by="bob")
    assert answer.status == 202
    assert (await served("HEAD", f"/v2/bob/other/blobs/{digest}", by="bob")).status == 404


# ── The transfer client's uploads ────────────────────────────────────────────────────────────────────────────────────


async def begin_direct(served: Served, content: bytes = WEIGHTS) -> Answer:
    headers = {**TRANSFER, "x-redirect-uploads": "2", "x-content-length": str(len(content))}
    return await served("POST", f"/v2/alice/tiny/blobs/uploads/?digest={digest_of(content)}", headers=headers)


async def test_direct_upload_goes_to_its_own_address_and_is_committed(served: Served) -> None:
    begun = await begin_direct(served)
    assert begun.status == 202
    direct = path_of(begun.headers["x-direct-upload-url"])
    for _ in range(2):
        assert (await served("PUT", direct, WEIGHTS, by="")).status == 201
    commit = f"{path_of(begun.headers['docker-upload-location'])}?digest={quote(str(digest_of(WEIGHTS)))}"
    assert (await served("PUT", commit)).status == 201
    assert (await begin_direct(served)).status == 201


@pytest.mark.parametrize("size", ["", "x", "-1", "9" * 40])
async def test_direct_upload_of_unknown_length_is_begun_all_the_same(served: Served, size: str) -> None:
    headers = {"x-redirect-uploads": "2", "x-content-length": size}
    answer = await served("POST", f"/v2/alice/tiny/blobs/uploads/?digest={digest_of(WEIGHTS)}", headers=headers)
    assert answer.status == 202


async def test_direct_upload_of_nothing_is_committed(served: Served) -> None:
    begun = await begin_direct(served, b"")
    assert (await served("PUT", path_of(begun.headers["x-direct-upload-url"]), by="")).status == 201
    assert (await served("PUT", f"{path_of(begun.headers['location'])}?digest={digest_of(b'')}")).status == 201


async def test_t039_direct_upload_address_is_for_its_upload_alone(served: Served) -> None:
    first, second = await begin_direct(served), await begin_direct(served)
    ticket = urlsplit(first.headers["x-direct-upload-url"]).query
    other = path_of(second.headers["x-direct-upload-url"]).partition("?")[0]
    for target in (f"{other}?{ticket}", other, f"{other}?t=", f"{other}?t=x.y.z"):
        assert (await served("PUT", target, WEIGHTS, by="")).status == 403
    blob = path_of(first.headers["location"]).partition("/uploads/")[0] + f"/{digest_of(WEIGHTS)}"
    assert (await served("GET", f"{blob}?{ticket}", by="")).status == 403


async def test_direct_upload_of_nothing_may_come_without_a_length(served: Served) -> None:
    begun = await begin_direct(served, b"")
    target = path_of(begun.headers["x-direct-upload-url"])
    for _ in range(2):
        assert (await served("PUT", target, by="", headers={"transfer-encoding": "chunked"})).status == 201
    assert (await served("PUT", f"{path_of(begun.headers['location'])}?digest={digest_of(b'')}")).status == 201


# ── end-8: tags ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_end08_tags_are_listed_in_order_and_in_pages(served: Served) -> None:
    for tag in ("b", "A", "c"):
        await served.model(tag)
    listed = await served("GET", "/v2/alice/tiny/tags/list")
    assert listed.json() == {"name": "alice/tiny", "tags": ["A", "b", "c"]}
    page = await served("GET", "/v2/alice/tiny/tags/list?n=2")
    assert page.json()["tags"] == ["A", "b"]
    assert page.headers["link"] == '</v2/alice/tiny/tags/list?n=2&last=b>; rel="next"'
    rest = await served("GET", "/v2/alice/tiny/tags/list?n=2&last=b")
    assert (rest.json()["tags"], "link" in rest.headers) == (["c"], False)
    assert (await served("GET", "/v2/alice/tiny/tags/list?last=A")).json()["tags"] == ["b", "c"]


async def test_end08_no_tags_wanted_is_an_empty_list_and_the_end(served: Served) -> None:
    await served.model()
    answer = await served("GET", "/v2/alice/tiny/tags/list?n=0")
    assert (answer.json()["tags"], "link" in answer.headers) == ([], False)


async def test_end08_repository_without_tags_has_an_empty_list(served: Served) -> None:
    await served.blob()
    assert (await served("GET", "/v2/alice/tiny/tags/list")).json()["tags"] == []


@pytest.mark.parametrize(("count", "status"), [("1e12", 400), ("-1", 400), ("abc", 400), ("", 400), ("9" * 40, 200)])
async def test_t037_count_of_tags_is_capped_or_refused(served: Served, count: str, status: int) -> None:
    await served.model()
    assert (await served("GET", f"/v2/alice/tiny/tags/list?n={count}")).status == status


async def test_end08_tags_of_no_repository_are_unknown(served: Served) -> None:
    answer = await served("GET", "/v2/alice/none/tags/list")
    assert (answer.status, code_of(answer)) == (404, "NAME_UNKNOWN")


# ── end-9, end-10: deleting ──────────────────────────────────────────────────────────────────────────────────────────


async def test_end09_delete_of_a_tag_leaves_the_manifest(served: Served) -> None:
    digest = await served.model("v1")
    await served.model("v2")
    assert (await served("DELETE", "/v2/alice/tiny/manifests/v1")).status == 202
    assert (await served("GET", "/v2/alice/tiny/manifests/v1")).status == 404
    assert (await served("GET", "/v2/alice/tiny/manifests/v2")).status == 200
    assert (await served("GET", f"/v2/alice/tiny/manifests/{digest}")).status == 200


async def test_end09_delete_of_a_manifest_takes_its_tags_along(served: Served) -> None:
    digest = await served.model("v1")
    assert (await served("DELETE", f"/v2/alice/tiny/manifests/{digest}")).status == 202
    assert (await served("GET", "/v2/alice/tiny/manifests/v1")).status == 404
    answer = await served("DELETE", f"/v2/alice/tiny/manifests/{digest}")
    assert (answer.status, code_of(answer)) == (404, "MANIFEST_UNKNOWN")


async def test_end10_delete_of_a_blob_is_at_once_and_only_here(served: Served) -> None:
    digest = await served.blob()
    await served.blob(name="alice/second")
    assert (await served("DELETE", f"/v2/alice/tiny/blobs/{digest}")).status == 202
    assert (await served("HEAD", f"/v2/alice/tiny/blobs/{digest}")).status == 404
    assert (await served("HEAD", f"/v2/alice/second/blobs/{digest}")).status == 200
    assert (await served("DELETE", f"/v2/alice/tiny/blobs/{digest}")).status == 404


async def test_end10_delete_of_a_blob_that_a_manifest_names_is_unsupported(served: Served) -> None:
    await served.model()
    answer = await served("DELETE", f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}")
    assert (answer.status, code_of(answer)) == (405, "UNSUPPORTED")


async def test_t081_manifest_that_says_it_is_a_page_is_none_to_a_browser(served: Served) -> None:
    await served.model(public=True)
    body = b'{"schemaVersion":2,"annotations":{"a":"<form action=/signin>"}}'
    pushed = await served("PUT", "/v2/alice/tiny/manifests/page", body, headers={"content-type": "text/html"})
    assert pushed.status == 201
    for method in ("GET", "HEAD"):
        answer = await served(method, "/v2/alice/tiny/manifests/page", by="")
        assert answer.headers["content-type"] == "text/html"
        assert answer.headers["content-disposition"] == "attachment"
        assert "sandbox" in answer.headers["content-security-policy"]


# ── end-12: referrers ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_end12_referrers_are_an_index_with_their_annotations(served: Served) -> None:
    subject = await served.model()
    body = a_manifest(
        WEIGHTS,
        mediaType=OCI_MANIFEST_TYPE,
        artifactType="application/x.sbom",
        annotations={"org.example": "yes"},
        subject={"mediaType": MANIFEST_TYPE, "digest": str(subject), "size": 1},
    )
    await served("PUT", "/v2/alice/tiny/manifests/sbom", body, headers={"content-type": OCI_MANIFEST_TYPE})
    target = f"/v2/alice/tiny/referrers/{subject}"
    answer = await served("GET", target)
    assert (answer.status, answer.headers["content-type"]) == (200, OCI_INDEX_TYPE)
    assert answer.json()["manifests"] == [
        {
            "mediaType": OCI_MANIFEST_TYPE,
            "digest": str(digest_of(body)),
            "size": len(body),
            "artifactType": "application/x.sbom",
            "annotations": {"org.example": "yes"},
        }
    ]
    assert "oci-filters-applied" not in answer.headers
    filtered = await served("GET", f"{target}?artifactType=application%2Fother")
    assert (filtered.json()["manifests"], filtered.headers["oci-filters-applied"]) == ([], "artifactType")
    await served("DELETE", f"/v2/alice/tiny/manifests/{digest_of(body)}")
    assert (await served("GET", target)).json()["manifests"] == []


async def test_t037_end12_long_listing_of_referrers_says_where_it_goes_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.hub.registry.MAX_REFERRERS", 1)
    subject = await served.model()
    described = {"mediaType": MANIFEST_TYPE, "digest": str(subject), "size": 1}
    for number in "12":
        body = a_manifest(WEIGHTS, subject=described, artifactType="a/b+c", annotations={"n": number})
        await served("PUT", f"/v2/alice/tiny/manifests/t{number}", body, headers={"content-type": MANIFEST_TYPE})
    target, found = f"/v2/alice/tiny/referrers/{subject}?artifactType=a/b%2Bc", []
    for _ in range(2):
        answer = await served("GET", target)
        found += [one["digest"] for one in answer.json()["manifests"]]
        target = re.sub(r'<(.*)>; rel="next"', r"\1", answer.headers.get("link", ""))
    assert (len(set(found)), target) == (2, "")
    assert (await served("GET", f"/v2/alice/tiny/referrers/{subject}?last=x")).status == 400


async def test_end12_referrers_in_a_repository_to_come_are_none(served: Served) -> None:
    answer = await served("GET", f"/v2/alice/future/referrers/{digest_of(b'x')}")
    assert (answer.status, answer.json()["manifests"]) == (200, [])


async def test_end12_referrers_of_no_digest_are_refused(served: Served) -> None:
    answer = await served("GET", "/v2/alice/tiny/referrers/sha256:x")
    assert (answer.status, code_of(answer)) == (400, "DIGEST_INVALID")


# ── Names and routes ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    [
        "alice/blobs",
        "alice/tags/list",
        "alice/blobs/uploads",
        "alice/manifests/latest",
        "alice/uploads/tags",
        "alice/blobs/uploads/manifests",
        "alice/referrers",
        "alice/token",
    ],
)
async def test_names_with_components_of_the_protocol_are_names(served: Served, name: str) -> None:
    digest = await served.model(name=name)
    assert (await served("GET", f"/v2/{name}/manifests/latest")).headers["docker-content-digest"] == str(digest)
    assert (await served("GET", f"/v2/{name}/tags/list")).json() == {"name": name, "tags": ["latest"]}
    assert (await served("HEAD", f"/v2/{name}/blobs/{digest_of(WEIGHTS)}")).status == 200
    location = await served.session(name)
    assert (await served("PATCH", location, b"x")).status == 202
    assert (await served("GET", f"/v2/{name}/referrers/{digest}")).status == 200


@pytest.mark.parametrize("name", ["one", "alice/.x", "alice/x/", "alice/%C3%A9", "a" * 300 + "/b", "alice/X/Y"])
async def test_f09_name_that_is_none_is_refused(served: Served, name: str) -> None:
    answer = await served("GET", f"/v2/{name}/manifests/latest")
    assert (answer.status, code_of(answer)) in ((400, "NAME_INVALID"), (404, "NAME_UNKNOWN"), (400, "UNKNOWN"))


@pytest.mark.parametrize("name", ["alice//tiny", "alice/../bob", "alice/tiny%00"])
async def test_f09_path_not_in_its_plain_form_is_refused(served: Served, name: str) -> None:
    assert (await served("GET", f"/v2/{name}/manifests/latest")).status == 400


async def test_path_of_no_endpoint_is_a_registry_error(served: Served) -> None:
    for target in ("/v2/alice", "/v2/_catalog", "/v2/alice/tiny/nothing"):
        answer = await served("GET", target)
        assert (answer.status, code_of(answer)) == (404, "NAME_UNKNOWN")


async def test_method_of_no_endpoint_is_unsupported(served: Served) -> None:
    answer = await served("POST", "/v2/alice/tiny/manifests/latest")
    assert (answer.status, code_of(answer)) == (405, "UNSUPPORTED")


async def test_f17_compressed_body_is_refused(served: Served) -> None:
    answer = await served("PATCH", await served.session(), WEIGHTS, headers={"content-encoding": "gzip"})
    assert (answer.status, code_of(answer)) == (415, "UNSUPPORTED")
    assert answer.headers["accept-encoding"] == "identity"


# ── Who may, and how they are told ───────────────────────────────────────────────────────────────────────────────────


def scopes_of(answer: Answer) -> tuple[str, ...]:
    assert answer.status == 401
    return parse_challenge(answer.headers["www-authenticate"]).scopes


async def test_t023_challenge_is_exactly_what_stock_clients_read(served: Served) -> None:
    answer = await served("GET", "/v2/alice/tiny/manifests/latest", by="")
    assert answer.headers["www-authenticate"] == (
        'Bearer realm="https://hub.example/v2/token",service="corral",scope="repository:alice/tiny:pull"'
    )


@pytest.mark.parametrize("host", ["HUB.example", "hub.example:443"])
async def test_t023_realm_spells_the_host_as_the_caller_did(served: Served, host: str) -> None:
    answer = await served("GET", "/v2/", by="", host=host)
    assert parse_challenge(answer.headers["www-authenticate"]).realm == f"https://{host}/v2/token"
    begun = await served("POST", "/v2/alice/tiny/blobs/uploads/", host=host)
    assert begun.headers["location"].startswith(f"https://{host}/v2/")


@pytest.mark.parametrize("host", ["evil.example", "hub.example:8443", "hub.example.evil.org"])
async def test_t023_name_that_is_not_ours_is_misdirected(served: Served, host: str) -> None:
    for method, target in (("GET", "/v2/"), ("GET", "/v2/token"), ("POST", "/v2/alice/tiny/blobs/uploads/")):
        answer = await served(method, target, host=host)
        assert (answer.status, "www-authenticate" in answer.headers) == (421, False)
        assert b"evil" not in answer.body


async def test_f25_hub_on_loopback_has_every_name_of_loopback(tmp_path: Path) -> None:
    served = Served(tmp_path, public_url="http://localhost:11435")
    await served.add("alice")
    for host in ("localhost:11435", "127.0.0.1:11435", "[::1]:11435"):
        answer = await served("GET", "/v2/", by="", host=host)
        assert parse_challenge(answer.headers["www-authenticate"]).realm == f"http://{host}/v2/token"
    for host in ("localhost:1", "example.org:11435"):
        assert (await served("GET", "/v2/", by="", host=host)).status == 421


async def test_challenge_asks_for_what_the_request_needs(served: Served) -> None:
    blob, upload = f"/v2/alice/tiny/blobs/{digest_of(b'')}", "/v2/alice/tiny/blobs/uploads/"
    assert scopes_of(await served("GET", blob, by="")) == ("repository:alice/tiny:pull",)
    assert scopes_of(await served("HEAD", blob, by="")) == ("repository:alice/tiny:pull,push",)
    assert scopes_of(await served("HEAD", "/v2/alice/tiny/manifests/v1", by="")) == ("repository:alice/tiny:pull",)
    assert scopes_of(await served("POST", upload, by="")) == ("repository:alice/tiny:pull,push",)
    assert scopes_of(await served("GET", f"{upload}x", by="")) == ("repository:alice/tiny:pull,push",)
    assert scopes_of(await served("DELETE", blob, by="")) == ("repository:alice/tiny:delete",)
    mount = await served("POST", f"{upload}?mount={digest_of(b'')}&from=bob%2Fother", by="")
    assert scopes_of(mount) == ("repository:alice/tiny:pull,push", "repository:bob/other:pull")
    odd = await served("POST", f"{upload}?mount={digest_of(b'')}&from=C:%5Cmodels", by="")
    assert scopes_of(odd) == ("repository:alice/tiny:pull,push",)


async def test_challenge_of_a_bad_token_says_so(served: Served) -> None:
    answer = await served("GET", "/v2/", by="", headers={"authorization": "Bearer a.b.c"})
    assert answer.status == 401
    assert answer.headers["www-authenticate"].endswith(',error="invalid_token"')


async def test_challenge_of_a_token_for_too_little_asks_for_more(served: Served) -> None:
    token = (await served("GET", "/v2/token?scope=repository:alice/tiny:pull")).json()["token"]
    bearer = {"authorization": f"Bearer {token}"}
    answer = await served("POST", "/v2/alice/tiny/blobs/uploads/", by="", headers=bearer)
    assert scopes_of(answer) == ("repository:alice/tiny:pull,push",)
    assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


async def test_t029_private_and_missing_repository_have_one_answer(served: Served) -> None:
    await served.model()
    private = await served("GET", "/v2/alice/tiny/manifests/latest", by="bob")
    missing = await served("GET", "/v2/alice/none/manifests/latest", by="bob")
    for answer in (private, missing):
        answer.headers.pop("x-request-id")
    assert (private.status, private.headers, private.body) == (missing.status, missing.headers, missing.body)
    assert (private.status, code_of(private)) == (404, "NAME_UNKNOWN")


async def test_push_to_somebody_elses_is_denied_in_words_that_stock_clients_show(served: Served) -> None:
    answer = await served("POST", "/v2/alice/tiny/blobs/uploads/", by="bob")
    assert (answer.status, code_of(answer)) == (403, "DENIED")
    text = answer.body.lower()
    assert b"unauthorized" not in text
    assert b"access denied" not in text


async def test_public_repository_is_pulled_by_anybody(served: Served) -> None:
    await served.model(public=True)
    assert (await served("GET", "/v2/alice/tiny/manifests/latest", by="")).status == 200
    located = await served("GET", f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}", by="", headers=OLLAMA)
    answer = await served("GET", path_of(located.headers["location"]), by="", headers={"range": "bytes=0-9"})
    assert answer.body == WEIGHTS[:10]
    await served.hub.repositories.set_visibility(TINY, await owner(served), Visibility.PRIVATE)
    assert (await served("GET", path_of(located.headers["location"]), by="")).status == 403


async def owner(served: Served) -> Principal:
    account = await served.hub.accounts.by_name("alice")
    assert account is not None
    return with_key(account)


async def test_t112_every_route_challenges_a_stranger(served: Served) -> None:
    await served.model()
    values = {"name": "alice/tiny", "digest": str(digest_of(WEIGHTS)), "reference": "latest", "upload_id": "x"}
    for row in served.api.endpoints():
        path = re.sub(r"\{(\w+)[^}]*\}", lambda match: values[match[1]], row.path)
        for method in row.methods:
            answer = await served(method, f"{path}?digest={digest_of(WEIGHTS)}", by="")
            # The address for an upload's content has a ticket for a credential.
            assert answer.status == (403 if path.endswith("/content") else 401), f"{method} {path}"
