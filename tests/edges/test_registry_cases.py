"""Cases of the registry that need more than one route, a body in pieces, or a hub's real database and disk.

The rules of each endpoint alone are in test_registry_api.py, by the same numbers.
"""

import asyncio
import json
import logging
from base64 import b64encode
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from asgi_client import Answer
from corral.core.records import Account
from corral.core.registry import Right
from corral.edges.bodies import StreamLimits
from corral.wire.manifest import CONFIG_TYPE, MANIFEST_TYPE, MAX_MANIFEST_BYTES, MODEL_LAYER
from corral.wire.names import Digest
from corral.wire.registry import OCI_INDEX_TYPE, OCI_MANIFEST_TYPE
from edges.test_registry_api import HOST, HUB, OLLAMA, WEIGHTS, Served, code_of, path_of
from fakes_registry import digest_of
from identity_hub import error_of
from registry_hub import CONFIG, TINY, a_manifest, with_key

UPLOADS = "/v2/alice/tiny/blobs/uploads/"
MANIFESTS = "/v2/alice/tiny/manifests"
ABSENT = Digest("0" * 64)
#: Alone layers of this kind may be absent.
ELSEWHERE = "application/vnd.oci.image.layer.nondistributable.v1.tar"


@pytest.fixture
async def served(tmp_path: Path) -> Served:
    served = Served(tmp_path)
    await served.add("alice")
    await served.add("bob")
    return served


async def streamed(
    served: Served,
    method: str,
    target: str,
    *parts: bytes | Callable[[], Awaitable[None]] | None,
    headers: dict[str, str] | None = None,
    by: str = "alice",
) -> Answer:
    """A request whose body comes in pieces and without a length, as docker, skopeo and Go's pipes send it. None: nothing
    comes any more, and the connection stays open. A function: what happens before the next piece comes."""
    path, _, query = target.partition("?")
    sent = {"host": HOST, "transfer-encoding": "chunked", **(headers or {})}
    if by:
        sent["authorization"] = "Basic " + b64encode(f"{by}:{served.keys[by]}".encode()).decode()
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 11435),
    }
    answer, pieces = Answer(), iter([*parts, b""])
    served.read = 0  # type: ignore[attr-defined]

    async def receive() -> dict[str, Any]:
        try:
            piece = next(pieces)
        except StopIteration:
            return {"type": "http.disconnect"}
        if callable(piece):
            await piece()
            return await receive()
        if piece is None:
            await asyncio.Event().wait()
            raise AssertionError
        served.read += len(piece)  # type: ignore[attr-defined]
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            answer.body += message.get("body", b"")

    await served.caller.app(scope, receive, send)
    return answer


async def put(served: Served, reference: str, body: bytes, media_type: str = MANIFEST_TYPE, **options: Any) -> Answer:
    return await served("PUT", f"{MANIFESTS}/{reference}", body, headers={"content-type": media_type}, **options)


async def token_for(served: Served, scope: str, *, by: str = "alice") -> dict[str, str]:
    """The Authorization header of a token for that scope."""
    answer = await served("GET", f"/v2/token?service=corral&scope={quote(scope)}", by=by)
    assert answer.status == 200
    return {"authorization": f"Bearer {answer.json()['token']}"}


async def account_of(served: Served, name: str) -> Account:
    account = await served.hub.accounts.by_name(name)
    assert account is not None
    return account


# ── end-2, end-4, end-5, end-6, end-13, end-14: blobs and uploads ────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_end02_blob_is_named_by_the_digest_that_was_asked_for(served: Served, method: str) -> None:
    digest = digest_of(WEIGHTS, "sha512")
    assert (await served("POST", f"{UPLOADS}?digest={digest}", WEIGHTS)).status == 201
    answer = await served(method, f"/v2/alice/tiny/blobs/{digest}")
    assert (answer.status, answer.headers["docker-content-digest"]) == (200, str(digest))
    assert answer.headers["content-length"] == str(len(WEIGHTS))
    # The same bytes under another algorithm are another blob.
    assert (await served(method, f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}")).status == 404


async def test_end04b_body_without_a_length_is_stored(served: Served) -> None:
    answer = await streamed(served, "POST", f"{UPLOADS}?digest={digest_of(WEIGHTS)}", WEIGHTS[:9], WEIGHTS[9:])
    assert (answer.status, answer.headers["location"]) == (201, f"{HUB}/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}")
    assert (await served("GET", f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}")).body == WEIGHTS


async def test_end05_body_without_a_length_is_added_and_end06_closes_it(served: Served) -> None:
    location = await served.session()
    first = await streamed(served, "PATCH", location, WEIGHTS[:1], WEIGHTS[1:1000])
    assert (first.status, first.headers["range"]) == (202, "0-999")
    assert (await streamed(served, "PATCH", location)).headers["range"] == "0-999"
    done = await streamed(served, "PUT", f"{location}?digest={digest_of(WEIGHTS)}", WEIGHTS[1000:1500], WEIGHTS[1500:])
    assert done.status == 201
    assert (await served("GET", f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}")).body == WEIGHTS


@pytest.mark.parametrize("method", ["PATCH", "PUT", "GET", "DELETE"])
@pytest.mark.parametrize("upload_id", ["0" * 32, "x", "..%2e", "A" * 300])
async def test_end05_end06_end13_end14_upload_that_is_none_is_unknown(served: Served, method: str, upload_id: str) -> None:
    await served.blob()
    answer = await served(method, f"{UPLOADS}{upload_id}?digest={digest_of(WEIGHTS)}", WEIGHTS if method[0] == "P" else b"")
    assert (answer.status, code_of(answer)) in ((404, "BLOB_UPLOAD_UNKNOWN"), (400, "UNKNOWN"))
    assert answer.status == 404 or "%" in upload_id


async def test_end13_every_earlier_location_of_an_upload_keeps_working(served: Served) -> None:
    begun = await served("POST", UPLOADS)
    locations = [begun.headers["location"], begun.headers["docker-upload-location"]]
    for number in range(3):
        answer = await served("PATCH", path_of(locations[-1]), WEIGHTS[number * 100 : number * 100 + 100])
        locations += [answer.headers["location"], answer.headers["docker-upload-location"]]
    for location in locations:
        shown = await served("GET", path_of(location))
        assert (shown.status, shown.headers["range"], shown.body) == (204, "0-299", b"")
    assert (await served("PUT", f"{path_of(locations[0])}?digest={digest_of(WEIGHTS[:300])}")).status == 201


async def test_end06_algorithm_may_be_known_only_at_the_end(served: Served) -> None:
    location = await served.session()
    await served("PATCH", location, WEIGHTS)
    digest = digest_of(WEIGHTS, "sha512")
    answer = await served("PUT", f"{location}?digest={quote(str(digest))}")
    assert (answer.status, answer.headers["docker-content-digest"]) == (201, str(digest))
    assert (await served("GET", f"/v2/alice/tiny/blobs/{digest}")).body == WEIGHTS


@pytest.mark.parametrize("wanted", ["600-1099", "0-499", "100-599"])
async def test_end05_end06_chunk_out_of_order_is_dropped_and_the_right_one_taken(served: Served, wanted: str) -> None:
    location = await served.session()
    await served("PATCH", location, WEIGHTS[:500], headers={"content-range": "0-499"})
    for method, target in (("PATCH", location), ("PUT", f"{location}?digest={digest_of(WEIGHTS)}")):
        assert (await served(method, target, b"x" * 500, headers={"content-range": wanted})).status == 416
    headers = {"content-range": "500-2047"}
    assert (await served("PUT", f"{location}?digest={digest_of(WEIGHTS)}", WEIGHTS[500:], headers=headers)).status == 201


# ── end-3, end-7: manifests ──────────────────────────────────────────────────────────────────────────────────────────


def described(content: bytes, media_type: str = MODEL_LAYER, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": str(digest_of(content)), "size": len(content), **more}


SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "docker": (MANIFEST_TYPE, {}),
    "oci": (OCI_MANIFEST_TYPE, {"mediaType": OCI_MANIFEST_TYPE}),
    "without mediaType": (OCI_MANIFEST_TYPE, {"mediaType": None}),
    "without layers": (OCI_MANIFEST_TYPE, {"mediaType": OCI_MANIFEST_TYPE, "layers": []}),
    "layers null": (MANIFEST_TYPE, {"layers": None}),
    "unknown members": (MANIFEST_TYPE, {"org.example": {"a": [1, "2", None, True]}, "historie": "ü"}),
    "data": (MANIFEST_TYPE, {"config": described(CONFIG, CONFIG_TYPE, data=b64encode(CONFIG).decode())}),
    "names of tensors": (MANIFEST_TYPE, {"layers": [described(WEIGHTS, "application/vnd.ollama.image.tensor", name="a.b")]}),
    "from": (MANIFEST_TYPE, {"layers": [described(WEIGHTS, **{"from": "/home/x/y.gguf"})]}),
    "subject that is not there": (
        OCI_MANIFEST_TYPE,
        {"mediaType": OCI_MANIFEST_TYPE, "subject": {"mediaType": OCI_MANIFEST_TYPE, "digest": str(ABSENT), "size": 9}},
    ),
    "layer that is elsewhere": (
        MANIFEST_TYPE,
        {"layers": [{"mediaType": ELSEWHERE, "digest": str(ABSENT), "size": 9, "urls": ["https://example.org/x"]}]},
    ),
    "no blobs at all": (OCI_INDEX_TYPE, {"mediaType": OCI_INDEX_TYPE, "config": None, "layers": None, "manifests": []}),
    "kind nobody knows": ("application/vnd.example.thing+json", {"mediaType": "application/vnd.example.thing+json"}),
    "artifact": (OCI_MANIFEST_TYPE, {"mediaType": OCI_MANIFEST_TYPE, "artifactType": "application/x.y", "layers": []}),
}
#: Left out of a document rather than null in it.
_LEFT_OUT = {"without mediaType": {"mediaType"}, "no blobs at all": {"config", "layers"}}


@pytest.mark.parametrize("shape", SHAPES)
async def test_end03_end07_manifest_of_any_shape_comes_back_to_the_byte(served: Served, shape: str) -> None:
    for content in (WEIGHTS, CONFIG):
        await served.blob(content)
    media_type, members = SHAPES[shape]
    document = {**json.loads(a_manifest(WEIGHTS)), **members}
    for name in _LEFT_OUT.get(shape, ()):
        del document[name]
    body = json.dumps(document, indent=3).encode() + b"\n"
    pushed = await put(served, "v1", body, media_type)
    assert (pushed.status, pushed.headers["location"]) == (201, f"{HUB}{MANIFESTS}/v1"), pushed.body
    for reference in ("v1", str(digest_of(body))):
        for method in ("GET", "HEAD"):
            answer = await served(method, f"{MANIFESTS}/{reference}", headers={"accept": "text/html"})
            assert (answer.status, answer.headers["content-type"]) == (200, media_type)
            assert answer.headers["docker-content-digest"] == str(digest_of(body))
            assert answer.headers["content-length"] == str(len(body))
            assert answer.body == (body if method == "GET" else b"")


async def test_end07_manifest_of_more_than_four_mebibytes_is_taken(served: Served) -> None:
    for content in (WEIGHTS, CONFIG):
        await served.blob(content)
    body = a_manifest(WEIGHTS, annotations={f"org.example.{number}": "x" * 10_000 for number in range(450)})
    assert len(body) > 4 << 20
    digest = digest_of(body)
    answer = await served("PUT", f"{MANIFESTS}/{digest}?tag=large", body, headers={"content-type": MANIFEST_TYPE})
    assert (answer.status, answer.headers["oci-tag"]) == (201, "large")
    assert (await served("GET", f"{MANIFESTS}/large")).body == body


async def test_end07_t036_f15_manifest_without_a_length_is_read_up_to_the_limit(served: Served) -> None:
    piece = b" " * (1 << 20)
    answer = await streamed(served, "PUT", f"{MANIFESTS}/v1", *[piece] * 200, headers={"content-type": MANIFEST_TYPE})
    assert (answer.status, code_of(answer)) == (413, "SIZE_INVALID")
    # What is drained afterwards, so that the answer arrives, is bounded as well.
    assert served.read <= MAX_MANIFEST_BYTES + (66 << 20)  # type: ignore[attr-defined]


async def test_end07_index_needs_its_manifests(served: Served) -> None:
    digest = await served.model()
    entry = {"mediaType": MANIFEST_TYPE, "digest": str(digest), "size": len(a_manifest(WEIGHTS))}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX_TYPE, "manifests": [entry]}
    assert (await put(served, "all", json.dumps(index).encode(), OCI_INDEX_TYPE)).status == 201
    entry["digest"] = str(ABSENT)
    refused = await put(served, "all", json.dumps(index).encode(), OCI_INDEX_TYPE)
    assert (refused.status, code_of(refused)) == (400, "MANIFEST_BLOB_UNKNOWN")


# ── end-8, end-9, end-10, end-11, end-12 ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 2, 3, 7])
async def test_end08_links_lead_through_every_tag_once_and_end(served: Served, count: int) -> None:
    await served.model("b")
    names = ["B", "a", "A", "v1.0", "v1", "_x"]
    answer = await served(
        "PUT",
        f"{MANIFESTS}/{digest_of(a_manifest(WEIGHTS))}?" + "&".join(f"tag={name}" for name in names),
        a_manifest(WEIGHTS),
        headers={"content-type": MANIFEST_TYPE},
    )
    assert answer.status == 201
    target, seen = f"/v2/alice/tiny/tags/list?n={count}", []
    for _ in range(10):
        page = await served("GET", target)
        assert len(page.json()["tags"]) <= count
        seen += page.json()["tags"]
        if "link" not in page.headers:
            break
        assert len(page.json()["tags"]) == count
        target, _, rest = page.headers["link"].removeprefix("<").partition(">")
        assert rest == '; rel="next"'
    assert seen == sorted([*names, "b"], key=lambda name: (name.lower(), name))


async def test_end09_tag_or_manifest_that_is_not_there_is_unknown(served: Served) -> None:
    await served.model()
    for reference, status, code in (
        ("none", 404, "MANIFEST_UNKNOWN"),
        (".x", 404, "MANIFEST_UNKNOWN"),
        (str(ABSENT), 404, "MANIFEST_UNKNOWN"),
        ("sha256:x", 400, "DIGEST_INVALID"),
    ):
        answer = await served("DELETE", f"{MANIFESTS}/{reference}")
        assert (answer.status, code_of(answer)) == (status, code)
    assert (await served("GET", f"{MANIFESTS}/latest")).status == 200


async def test_end10_blob_goes_once_no_manifest_names_it(served: Served) -> None:
    digest = await served.model()
    blob = f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}"
    assert (await served("DELETE", blob)).status == 405
    assert (await served("HEAD", blob)).status == 200
    await served("DELETE", f"{MANIFESTS}/{digest}")
    assert (await served("DELETE", blob)).status == 202
    assert (await served("HEAD", blob)).status == 404


async def test_end11_f23_mount_is_never_refused_for_its_source(served: Served) -> None:
    await served.model()
    await served.model(name="alice/open", public=True)
    digest = digest_of(WEIGHTS)
    for source, status in (("Alice/OPEN", 201), ("alice/tiny", 202), ("alice/none", 202), ("carol/x", 202)):
        answer = await served(
            "POST", f"/v2/bob/m{status}{source[-1]}/blobs/uploads/?mount={digest}&from={quote(source)}", by="bob"
        )
        assert answer.status == status
        assert "?" not in answer.headers["location"]


async def test_end12_referrers_say_what_kind_they_are(served: Served) -> None:
    for content in (WEIGHTS, CONFIG):
        await served.blob(content)
    subject = {"mediaType": OCI_MANIFEST_TYPE, "digest": str(ABSENT), "size": 9}
    base = {"mediaType": OCI_MANIFEST_TYPE, "subject": subject}
    own = a_manifest(WEIGHTS, **base, artifactType="application/x.own", annotations={"a": "b"})
    config = a_manifest(WEIGHTS, **base)
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX_TYPE, "manifests": [], "subject": subject}).encode()
    for tag, body, media_type in (("o", own, OCI_MANIFEST_TYPE), ("c", config, OCI_MANIFEST_TYPE), ("i", index, OCI_INDEX_TYPE)):
        pushed = await put(served, tag, body, media_type)
        assert (pushed.status, pushed.headers["oci-subject"]) == (201, str(ABSENT))
    target = f"/v2/alice/tiny/referrers/{ABSENT}"
    answer = await served("GET", target)
    listed = {entry["digest"]: entry for entry in answer.json()["manifests"]}
    assert {key: entry.get("artifactType") for key, entry in listed.items()} == {
        str(digest_of(own)): "application/x.own",
        str(digest_of(config)): CONFIG_TYPE,
        str(digest_of(index)): None,
    }
    assert listed[str(digest_of(own))]["annotations"] == {"a": "b"}
    assert listed[str(digest_of(index))]["mediaType"] == OCI_INDEX_TYPE
    assert listed[str(digest_of(config))]["size"] == len(config)
    filtered = await served("GET", f"{target}?artifactType=application%2Fx.own")
    assert [entry["digest"] for entry in filtered.json()["manifests"]] == [str(digest_of(own))]
    assert filtered.headers["oci-filters-applied"] == "artifactType"
    assert filtered.headers["content-type"] == OCI_INDEX_TYPE


async def test_every_answer_about_errors_has_the_specifications_code(served: Served) -> None:
    await served.model()
    served.hub.uploads._max_open = 1
    location = await served.session()
    headers = {"content-type": MANIFEST_TYPE}
    cases: list[tuple[str, str, bytes, dict[str, str], int, str]] = [
        ("GET", f"/v2/alice/tiny/blobs/{ABSENT}", b"", {}, 404, "BLOB_UNKNOWN"),
        ("PATCH", location, b"abc", {"content-range": "5-7"}, 416, "BLOB_UPLOAD_INVALID"),
        ("GET", f"{UPLOADS}{'0' * 32}", b"", {}, 404, "BLOB_UPLOAD_UNKNOWN"),
        ("PUT", f"{location}?digest={ABSENT}", b"", {}, 400, "DIGEST_INVALID"),
        ("PUT", f"{MANIFESTS}/x", a_manifest(b"none"), headers, 400, "MANIFEST_BLOB_UNKNOWN"),
        ("PUT", f"{MANIFESTS}/x", b"{", headers, 400, "MANIFEST_INVALID"),
        ("GET", f"{MANIFESTS}/none", b"", {}, 404, "MANIFEST_UNKNOWN"),
        ("POST", "/v2/alice/.x/blobs/uploads/", b"", {}, 400, "NAME_INVALID"),
        ("GET", "/v2/alice/none/tags/list", b"", {}, 404, "NAME_UNKNOWN"),
        ("PATCH", location, b"abc", {"content-range": "0-3"}, 400, "SIZE_INVALID"),
        ("POST", "/v2/bob/x/blobs/uploads/", b"", {}, 403, "DENIED"),
        ("POST", f"{MANIFESTS}/x", b"", {}, 405, "UNSUPPORTED"),
        ("POST", UPLOADS, b"", {}, 429, "TOOMANYREQUESTS"),
        ("PUT", f"{MANIFESTS}/x", b" " * (17 << 20), headers, 413, "SIZE_INVALID"),
    ]
    for method, target, body, sent, status, code in cases:
        answer = await served(method, target, body, headers=sent)
        assert (answer.status, code_of(answer)) == (status, code), target
        assert ("retry-after" in answer.headers) == (status == 429)
    stranger = await served("GET", "/v2/", by="")
    assert (stranger.status, code_of(stranger)) == (401, "UNAUTHORIZED")


@pytest.mark.parametrize(
    "target",
    ["/v2", "/V2/", "/v2/alice/tiny/blobs/uploads", "/v2/alice/tiny/tags/list/", f"{MANIFESTS}/latest/", "/v2/alice/tiny"],
)
async def test_no_path_of_the_registry_redirects(served: Served, target: str) -> None:
    """Go makes a GET of a request that is redirected, and takes the answer for its own."""
    await served.model()
    for method in ("GET", "POST", "PUT", "PATCH"):
        answer = await served(method, target)
        assert answer.status in (200, 400, 401, 404, 405)
        assert "location" not in answer.headers


# ── F07, F18: room ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f07_t040_full_disk_is_507_in_the_registrys_form_and_pulling_goes_on(served: Served) -> None:
    await served.model()
    location = await served.session()
    served.hub.files.free = 256 << 20
    length = {"x-redirect-uploads": "2", "x-content-length": "5000"}
    for method, target, body, headers in (
        ("POST", f"{UPLOADS}?digest={digest_of(b'x' * 5000)}", b"", length),
        ("POST", f"{UPLOADS}?digest={digest_of(b'x' * 5000)}", b"x" * 5000, {}),
        ("PATCH", location, b"x" * 5000, {"content-range": "0-4999"}),
    ):
        answer = await served(method, target, body, headers=headers)
        assert (answer.status, code_of(answer)) == (507, "UNKNOWN")
    assert (await served("GET", location)).headers["range"] == "0-0"
    assert (await served("GET", f"{MANIFESTS}/latest")).status == 200
    assert (await served("GET", f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}")).body == WEIGHTS
    assert (await served("GET", "/v2/token?scope=repository:alice/tiny:pull")).status == 200
    served.hub.files.free = 1 << 40
    assert (await served("PATCH", location, b"x" * 5000)).status == 202


async def test_f07_t040_quota_is_denied_in_the_registrys_form(served: Served) -> None:
    await served.model()
    await served.hub.repositories.set_quota(TINY, await served.hub.store.stored_bytes("alice") + 10)
    answer = await served("POST", f"{UPLOADS}?digest={digest_of(b'x' * 11)}", b"x" * 11)
    assert (answer.status, code_of(answer)) == (403, "DENIED")
    assert b"quota" in answer.body
    assert b"access denied" not in answer.body.lower()
    assert (await served("POST", f"{UPLOADS}?digest={digest_of(b'x' * 10)}", b"x" * 10)).status == 201


async def test_f18_uploads_that_nobody_finishes_are_429_and_given_up_after_a_day(served: Served) -> None:
    served.hub.uploads._max_open = 3
    for _ in range(3):
        await served.session()
    answer = await served("POST", UPLOADS)
    assert (answer.status, code_of(answer)) == (429, "TOOMANYREQUESTS")
    assert int(answer.headers["retry-after"]) > 0
    # What one account holds open is nothing to another one.
    await served.blob(name="bob/other", by="bob")
    served.hub.clock.advance(25 * 3600)
    await served.hub.uploads.purge()
    await served.session()


async def test_f18_chunk_that_hardly_arrives_is_given_up_and_taken_back(served: Served) -> None:
    app = served.caller.app
    app.options = replace(app.options, stream_limits=StreamLimits(stall_s=0.02))
    location = await served.session()
    answer = await streamed(served, "PATCH", location, WEIGHTS[:100], None)
    assert answer.status == 408
    assert (await served("GET", location)).headers["range"] == "0-0"
    assert (await served("PATCH", location, WEIGHTS)).headers["range"] == "0-2047"


# ── F08, F09, T33, T34: digests and names ────────────────────────────────────────────────────────────────────────────

BAD_DIGESTS = [
    "sha256:../../x",
    "sha256:" + "0" * 63,
    "sha256:" + "0" * 65,
    "sha256:" + "A" * 64,
    "sha256-" + "0" * 64,
    "sha256:" + "0" * 64 + "\n",
    "sha256:" + "0" * 63 + "\0",
    "sha256:..\\..\\x",
    "sha256:%2e%2e",
    "sha512:" + "0" * 64,
    "md5:" + "0" * 32,
    "sha256:",
    "sha256:" + "\u0660" * 64,
]


@pytest.mark.parametrize("text", BAD_DIGESTS)
async def test_f08_t033_digest_that_is_none_is_refused_wherever_it_may_stand(served: Served, text: str) -> None:
    await served.model()
    location, digest = await served.session(), quote(text, safe="")
    in_query = [
        ("POST", f"{UPLOADS}?digest={digest}"),
        ("POST", f"{UPLOADS}?mount={digest}&from=alice%2Ftiny"),
        ("PUT", f"{location}?digest={digest}"),
    ]
    for method, target in in_query:
        answer = await served(method, target)
        assert (answer.status, code_of(answer)) == (400, "DIGEST_INVALID"), target
    in_path = [(method, f"/v2/alice/tiny/blobs/{digest}") for method in ("GET", "HEAD", "DELETE")]
    in_path += [("GET", f"/v2/alice/tiny/referrers/{digest}"), ("GET", f"/v2/alice/tiny/blobs/{digest}?t=x")]
    # Without a colon it is a tag, and a good one.
    in_path += [(method, f"{MANIFESTS}/{digest}") for method in ("GET", "PUT", "DELETE") if ":" in text]
    for method, target in in_path:
        body = a_manifest(WEIGHTS) if method == "PUT" else b""
        answer = await served(method, target, body, headers={"content-type": MANIFEST_TYPE} if body else {})
        assert answer.status in (400, 404, 405), target
    assert (await served("GET", "/v2/alice/tiny/tags/list")).json()["tags"] == ["latest"]
    assert set(served.hub.files.blobs) == {digest_of(WEIGHTS), digest_of(CONFIG)}


@pytest.mark.parametrize("name", ["one", "alice/.x", "alice/-x", "alice/X/Y", "alice/b/_uploads", "a" * 200 + "/" + "b" * 60])
async def test_f09_t034_name_that_is_none_is_invalid_for_every_method(served: Served, name: str) -> None:
    for method, target in (
        ("GET", f"/v2/{name}/manifests/latest"),
        ("PUT", f"/v2/{name}/manifests/latest"),
        ("HEAD", f"/v2/{name}/blobs/{ABSENT}"),
        ("POST", f"/v2/{name}/blobs/uploads/"),
        ("GET", f"/v2/{name}/tags/list"),
        ("GET", f"/v2/{name}/referrers/{ABSENT}"),
    ):
        answer = await served(method, target)
        assert (answer.status, method == "HEAD" or code_of(answer)) in ((400, True), (400, "NAME_INVALID")), target


async def test_f09_t034_names_that_differ_by_case_are_one_repository(served: Served) -> None:
    digest = await served.model()
    for name in ("ALICE/tiny", "Alice/TINY", "alice/Tiny"):
        assert (await served("GET", f"/v2/{name}/manifests/latest")).headers["docker-content-digest"] == str(digest)
    await served.model("second", name="Alice/Tiny")
    assert (await served("GET", "/v2/alice/tiny/tags/list")).json() == {"name": "alice/tiny", "tags": ["latest", "second"]}


@pytest.mark.parametrize("name", ["alice/" + "a/" * 5000 + "b", "alice/" + "a" * 10_000, "al%C4%B1ce/tiny", "%D0%B0lice/tiny"])
async def test_f09_t034_long_names_and_lookalikes_are_refused(served: Served, name: str) -> None:
    await served.model()
    answer = await served("GET", f"/v2/{name}/manifests/latest")
    assert answer.status in (400, 404, 414)
    assert len(answer.body) < 2000


@pytest.mark.parametrize("tag", [".x", "-x", "a%2Fb", "x" * 129, "a%0A", "a%20b", "%C3%A9", "local", "7b-cloud", "cloud"])
async def test_f09_tag_that_is_none_is_not_made(served: Served, tag: str) -> None:
    await served.model()
    answer = await put(served, tag, a_manifest(WEIGHTS))
    # A slash makes it another path.
    assert (answer.status, code_of(answer)) in ((400, "MANIFEST_INVALID"), (400, "UNKNOWN"), (404, "NAME_UNKNOWN")), tag
    assert (await served("GET", "/v2/alice/tiny/tags/list")).json()["tags"] == ["latest"]


# ── F10, F11, T29-T32: who sees what ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("repository", ["alice/tiny", "alice/second", "bob/other"])
async def test_f10_upload_of_another_is_neither_written_nor_committed(served: Served, repository: str) -> None:
    await served.blob(name="alice/second")
    await served.blob(name="bob/other", by="bob")
    await served.hub.repositories.find(TINY, Right.PUSH, with_key(await account_of(served, "alice")))
    await served.hub.repositories.set_collaborator(TINY, with_key(await account_of(served, "alice")), "bob", Right.PUSH)
    location = await served.session()
    await served("PATCH", location, WEIGHTS)
    by = "alice" if repository == "alice/second" else "bob"
    path = location.replace("alice/tiny", repository)
    for method, target in (("PATCH", path), ("PUT", f"{path}?digest={digest_of(WEIGHTS)}"), ("GET", path), ("DELETE", path)):
        answer = await served(method, target, b"x" if method == "PATCH" else b"", by=by)
        assert (answer.status, code_of(answer)) == (404, "BLOB_UPLOAD_UNKNOWN")
    assert (await served("GET", location)).headers["range"] == "0-2047"


async def test_f11_t030_t031_t032_nothing_tells_whether_others_have_a_blob(served: Served) -> None:
    subject = await served.model()
    await put(served, "sbom", a_manifest(WEIGHTS, subject=described(b"", MANIFEST_TYPE) | {"digest": str(subject)}))
    await served.blob(b"own", name="bob/other", by="bob")
    await served.blob(CONFIG, name="bob/other", by="bob")
    other = "/v2/bob/other"

    async def shown(digest: Digest, manifest: bytes) -> list[tuple[object, ...]]:
        """All that bob is told of one digest."""
        start = {"x-redirect-uploads": "2", "x-content-length": str(len(WEIGHTS))}
        asked = [
            await served("HEAD", f"{other}/blobs/{digest}", by="bob"),
            await served("GET", f"{other}/blobs/{digest}", by="bob"),
            await served("GET", f"{other}/blobs/{digest}", by="bob", headers={"range": "bytes=0-0"}),
            await served("POST", f"{other}/blobs/uploads/?mount={digest}&from=alice%2Ftiny", by="bob"),
            await served("POST", f"{other}/blobs/uploads/?mount={digest}", by="bob"),
            await served("POST", f"{other}/blobs/uploads/?digest={digest}", by="bob", headers=start),
            await served("DELETE", f"{other}/blobs/{digest}", by="bob"),
            await served("PUT", f"{other}/manifests/x", manifest, by="bob", headers={"content-type": MANIFEST_TYPE}),
            await served("GET", f"{other}/referrers/{digest}", by="bob"),
        ]
        varying = {"x-request-id", "location", "docker-upload-location", "docker-upload-uuid", "x-direct-upload-url"}
        names = [sorted(set(answer.headers) - {"x-request-id"}) for answer in asked]
        values = [{key: text for key, text in answer.headers.items() if key not in varying} for answer in asked]
        bodies = [answer.body.replace(str(digest).encode(), b"DIGEST") for answer in asked]
        return list(zip([answer.status for answer in asked], names, map(str, values), bodies, strict=True))

    nobody = b"n" * len(WEIGHTS)
    theirs, none = await shown(digest_of(WEIGHTS), a_manifest(WEIGHTS)), await shown(digest_of(nobody), a_manifest(nobody))
    assert theirs == none
    assert [row[0] for row in theirs] == [404, 404, 404, 202, 202, 202, 404, 400, 200]
    assert json.loads(theirs[-1][3])["manifests"] == []  # type: ignore[arg-type]


async def test_t029_private_and_missing_repository_have_one_answer_at_every_endpoint(served: Served) -> None:
    digest = await served.model()
    session = (await served.session()).rpartition("/")[2]
    bobs = await token_for(served, "repository:alice/tiny:pull,push repository:alice/none:pull,push", by="bob")
    anonymous = await token_for_nobody(served)
    for caller in ({"by": "bob"}, {"by": "", "headers": bobs}, {"by": "", "headers": anonymous}, {"by": ""}):
        answers = []
        for name in ("alice/tiny", "alice/none"):
            requests = [
                ("GET", f"/v2/{name}/manifests/latest"),
                ("HEAD", f"/v2/{name}/manifests/{digest}"),
                ("PUT", f"/v2/{name}/manifests/latest"),
                ("DELETE", f"/v2/{name}/manifests/latest"),
                ("GET", f"/v2/{name}/blobs/{digest_of(WEIGHTS)}"),
                ("HEAD", f"/v2/{name}/blobs/{digest_of(WEIGHTS)}"),
                ("DELETE", f"/v2/{name}/blobs/{digest_of(WEIGHTS)}"),
                ("POST", f"/v2/{name}/blobs/uploads/"),
                ("GET", f"/v2/{name}/blobs/uploads/{session}"),
                ("PATCH", f"/v2/{name}/blobs/uploads/{session}"),
                ("GET", f"/v2/{name}/tags/list"),
                ("GET", f"/v2/{name}/referrers/{digest}"),
            ]
            told = [await served(method, target, **caller) for method, target in requests]  # type: ignore[arg-type]
            for answer in told:
                answer.headers.pop("x-request-id")
            # What a request names may come back to whoever sent it, and nothing else differs.
            plain = [(answer.status, str(answer.headers), answer.body.decode()) for answer in told]
            answers.append([(status, *(text.replace(name, "NAME") for text in texts)) for status, *texts in plain])
        assert answers[0] == answers[1]
        assert {row[0] for row in answers[0]} <= ({401} if caller == {"by": ""} else {404, 403, 401})


async def token_for_nobody(served: Served) -> dict[str, str]:
    answer = await served("GET", "/v2/token?service=corral&scope=repository:alice/tiny:pull,push", by="")
    assert answer.status == 200
    return {"authorization": f"Bearer {answer.json()['token']}"}


# ── F19, T26, T27: tokens ────────────────────────────────────────────────────────────────────────────────────────────


async def test_t026_token_asked_for_too_much_does_not_push(served: Served) -> None:
    await served.model(public=True)
    answer = await served("GET", "/v2/token?scope=repository:alice/tiny:pull,push", by="bob")
    assert answer.json()["scope"] == "repository:alice/tiny:pull"
    bearer = {"authorization": f"Bearer {answer.json()['token']}"}
    assert (await served("GET", f"{MANIFESTS}/latest", by="", headers=bearer)).status == 200
    for method, target in (("POST", UPLOADS), ("PUT", f"{MANIFESTS}/x"), ("DELETE", f"{MANIFESTS}/latest")):
        refused = await served(method, target, by="", headers=bearer)
        # Not 401: a client with a good token would fetch another one without end.
        assert (refused.status, code_of(refused)) == (403, "DENIED")


async def test_f19_t027_token_is_good_for_its_repository_and_its_actions(served: Served) -> None:
    await served.model()
    await served.model(name="alice/second")
    pulling = await token_for(served, "repository:alice/tiny:pull")
    assert (await served("GET", f"{MANIFESTS}/latest", by="", headers=pulling)).status == 200
    for method, target in (
        ("GET", "/v2/alice/second/manifests/latest"),
        ("PUT", f"{MANIFESTS}/latest"),
        ("POST", UPLOADS),
        ("DELETE", f"{MANIFESTS}/latest"),
    ):
        answer = await served(method, target, by="", headers=pulling)
        assert (answer.status, code_of(answer)) == (401, "UNAUTHORIZED")
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
    served.hub.clock.advance(3601)
    answer = await served("GET", f"{MANIFESTS}/latest", by="", headers=pulling)
    assert answer.status == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


async def test_f19_push_that_outlives_its_token_goes_on(served: Served) -> None:
    pushing = await token_for(served, "repository:alice/tiny:pull,push")
    begun = await served("POST", UPLOADS, by="", headers=pushing)
    location = path_of(begun.headers["location"])
    served.hub.clock.advance(3601)
    part = {**pushing, "content-range": f"0-{len(WEIGHTS) - 1}", "x-redirect-uploads": "1"}
    assert (await served("PATCH", location, WEIGHTS, by="", headers=part)).status == 202
    assert (await served("PUT", f"{location}?digest={digest_of(WEIGHTS)}", by="", headers=pushing)).status == 201
    # The manifest needs a new one, and gets it by the challenge that stock clients answer.
    body = a_manifest(layers=[], config=described(WEIGHTS, CONFIG_TYPE))
    refused = await served("PUT", f"{MANIFESTS}/v1", body, by="", headers={**pushing, "content-type": MANIFEST_TYPE})
    assert refused.status == 401
    again = await token_for(served, "repository:alice/tiny:pull,push")
    assert (await served("PUT", f"{MANIFESTS}/v1", body, by="", headers={**again, "content-type": MANIFEST_TYPE})).status == 201


# ── F17, F20, F22, F25 ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
async def test_f17_coded_content_is_refused_and_decoded_nowhere(served: Served, coding: str) -> None:
    location = await served.session()
    headers = {"content-encoding": coding}
    for method, target in (
        ("PATCH", location),
        ("PUT", f"{location}?digest={digest_of(WEIGHTS)}"),
        ("POST", f"{UPLOADS}?digest={digest_of(WEIGHTS)}"),
        ("PUT", f"{MANIFESTS}/v1"),
    ):
        answer = await served(method, target, WEIGHTS, headers={**headers, "content-type": MANIFEST_TYPE})
        assert answer.status == 415, target
        assert b"compressed" in answer.body
    assert (await served("GET", location)).headers["range"] == "0-0"
    assert not served.hub.files.blobs


async def test_f17_t105_weights_that_nobody_could_read_are_pushed_and_pulled_all_the_same(served: Served) -> None:
    bomb = b"GGUF\x03\0\0\0" + (1 << 60).to_bytes(8, "little") * 2 + b"\xff" * 100
    for content in (bomb, CONFIG):
        await served.blob(content)
    assert (await put(served, "bomb", a_manifest(bomb))).status == 201
    assert (await served("GET", f"/v2/alice/tiny/blobs/{digest_of(bomb)}")).body == bomb


async def test_f20_t039_address_is_in_no_log_and_sent_nowhere(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    digest = await served.blob()
    located = await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=OLLAMA)
    target = path_of(located.headers["location"])
    ticket = target.partition("?t=")[2]
    with caplog.at_level(logging.DEBUG):
        answer = await served("GET", target, by="")
        await served("GET", target[:-1], by="")
        await served("GET", target, by="", headers={"range": "bytes=9999-"})
    assert answer.status == 200
    assert (answer.headers["referrer-policy"], answer.headers["cache-control"]) == ("no-referrer", "no-store")
    assert caplog.records
    assert all(ticket[:20] not in f"{record.getMessage()}{record.__dict__}" for record in caplog.records)


async def test_f20_upload_to_an_address_is_logged_as_its_owners(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    begun = await served("POST", f"{UPLOADS}?digest={digest_of(WEIGHTS)}", headers={"x-redirect-uploads": "2"})
    with caplog.at_level(logging.INFO, "corral.access"):
        await served("PUT", path_of(begun.headers["x-direct-upload-url"]), WEIGHTS, by="")
    [line] = [record.__dict__["fields"] for record in caplog.records if record.name == "corral.access"]
    assert (line["status"], line["account"]) == (201, "alice")


async def test_f20_t039_right_taken_away_ends_an_address_and_so_does_a_repository(served: Served) -> None:
    digest = await served.blob()
    alice = with_key(await account_of(served, "alice"))
    await served.hub.repositories.set_collaborator(TINY, alice, "bob", Right.PULL)
    target = path_of((await served("GET", f"/v2/alice/tiny/blobs/{digest}", by="bob", headers=OLLAMA)).headers["location"])
    assert (await served("GET", target, by="", headers={"range": "bytes=0-9"})).status == 206
    await served.hub.repositories.set_collaborator(TINY, alice, "bob", None)
    answer = await served("GET", target, by="", headers={"range": "bytes=0-9"})
    assert (answer.status, answer.body) == (403, b"")
    own = path_of((await served("GET", f"/v2/alice/tiny/blobs/{digest}", headers=OLLAMA)).headers["location"])
    await served.hub.repositories.remove(TINY, alice)
    answer = await served("GET", own, by="", headers={"range": "bytes=0-9"})
    assert (answer.status in (403, 404), answer.body) == (True, b"")


@pytest.mark.parametrize(
    "headers",
    [
        {"transfer-encoding": "chunked", "content-length": "4"},
        {"transfer-encoding": "gzip, chunked"},
        {"content-length": "+4"},
        {"content-length": "4, 4"},
        {"content-length": "0x4"},
        {"content-length": ""},
    ],
)
async def test_f22_body_of_unclear_length_is_refused_and_the_upload_untouched(served: Served, headers: dict[str, str]) -> None:
    location = await served.session()
    await served("PATCH", location, b"abc")
    for method, target in (("PATCH", location), ("PUT", f"{location}?digest={digest_of(b'abcdata')}")):
        answer = await served(method, target, b"data", headers=headers)
        assert answer.status in (400, 501), answer.body
    assert (await served("GET", location)).headers["range"] == "0-2"


async def test_f25_t023_addresses_are_the_hubs_own_whatever_the_request_says(served: Served) -> None:
    digest = await served.blob()
    lies = {
        "x-forwarded-host": "evil.example",
        "x-forwarded-proto": "http",
        "x-forwarded-port": "1",
        "forwarded": "host=evil.example",
        "x-original-url": "/evil",
        "x-forwarded-prefix": "/evil",
        "referer": "https://evil.example/",
        "origin": "https://evil.example",
    }
    for method, target in (
        ("POST", UPLOADS),
        ("GET", f"/v2/alice/tiny/blobs/{digest}"),
        ("POST", f"/v2/alice/new/blobs/uploads/?mount={digest}&from=alice%2Ftiny"),
    ):
        answer = await served(method, target, headers={**lies, **OLLAMA})
        assert answer.headers["location"].startswith(f"{HUB}/v2/alice/")
    stranger = await served("GET", "/v2/", by="", headers=lies)
    assert 'realm="https://hub.example/v2/token"' in stranger.headers["www-authenticate"]
    for answer in (stranger, await served("GET", f"{MANIFESTS}/x", headers=lies)):
        assert b"evil" not in answer.body + str(answer.headers).encode()


# ── T35, T119 ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wanted", "length", "status"),
    [("0-99", 200, 400), ("0-199", 100, 400), ("1-100", 100, 416), ("0-18446744073709551616", 5, 400)],
)
async def test_t035_f22_chunk_that_contradicts_itself_leaves_nothing(
    served: Served, wanted: str, length: int, status: int
) -> None:
    location = await served.session()
    answer = await served("PATCH", location, b"x" * length, headers={"content-range": wanted})
    assert answer.status == status
    assert (await served("GET", location)).headers["range"] == "0-0"
    assert not served.hub.files.upload_bytes(location.rpartition("/")[2])
    assert not served.hub.files.blobs


@pytest.mark.parametrize("is_disabled", [False, True])
async def test_t062_manifest_that_comes_after_its_key_was_revoked_publishes_nothing(served: Served, is_disabled: bool) -> None:
    await served.model()

    async def revoke() -> None:
        if is_disabled:
            await served.identity.accounts.set_disabled("alice", True)
            return
        alice = await account_of(served, "alice")
        [key] = await served.identity.credentials.keys_of(alice)
        await served.identity.credentials.revoke_key(alice, key.id)

    manifest = a_manifest(CONFIG)
    headers = {"content-type": MANIFEST_TYPE, "x-corral-visibility": "public"}
    answer = await streamed(served, "PUT", f"{MANIFESTS}/late", manifest[:9], revoke, manifest[9:], headers=headers)
    assert (answer.status, code_of(answer)) == (401, "UNAUTHORIZED")
    await served.identity.accounts.set_disabled("alice", False)
    _, served.keys["alice"] = await served.identity.key(await account_of(served, "alice"))
    assert (await served("GET", f"{MANIFESTS}/late")).status == 404
    assert (await served("GET", f"{MANIFESTS}/latest", by="")).status == 401


async def test_t119_nothing_of_a_deleted_account_answers_any_more(served: Served) -> None:
    await served.identity.add("grace", is_admin=True)
    digest = await served.model(public=True)
    bearer = await token_for(served, "repository:alice/tiny:pull,push")
    blob = f"/v2/alice/tiny/blobs/{digest_of(WEIGHTS)}"
    target = path_of((await served("GET", blob, headers=OLLAMA)).headers["location"])
    location = await served.session()
    await served.identity.accounts.remove("alice")
    for path in (f"{MANIFESTS}/latest", f"{MANIFESTS}/{digest}", blob, "/v2/alice/tiny/tags/list"):
        answer = await served("GET", path, by="bob")
        assert (answer.status, code_of(answer)) == (404, "NAME_UNKNOWN")
        assert (await served("GET", path, by="")).status == 401
        assert (await served("GET", path)).status == 401
        assert (await served("GET", path, by="", headers=bearer)).status == 401
    assert (await served("PATCH", location, b"x", by="", headers=bearer)).status == 401
    refused = await served("GET", target, by="", headers={"range": "bytes=0-9"})
    assert (refused.status in (403, 404), refused.body) == (True, b"")
    for name in ("alice", "ALICE", "Alice"):
        assert (await error_of(served.identity.add(name))).code == "conflict"
    for name in ("\u0430lice", "al\u0131ce", "alice\u200b", "ａlice"):
        assert (await error_of(served.identity.add(name))).code == "invalid"
    assert (await served("POST", UPLOADS, by="bob")).status == 403
