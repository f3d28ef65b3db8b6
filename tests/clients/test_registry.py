"""The registry client against registries on real sockets: honest ones of every kind, and hostile ones."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from hashlib import sha256

import pytest

from corral.clients import registry as module
from corral.core.registry import Visibility
from corral.core.transfer_ports import BlobToSend, RemoteManifest, RemoteRepository
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from fakes_remote_registry import Answer, Asked, HonestRegistry, Wired, answer, wired

CONTENT = bytes(range(256)) * 1000
MANIFEST = b'{"schemaVersion":2}'
TYPE = "application/vnd.docker.distribution.manifest.v2+json"


def blob(content: bytes, **more: str) -> BlobToSend:
    async def read(first: int, count: int) -> AsyncIterator[bytes]:
        for offset in range(first, first + count, 50_000):
            yield content[offset : min(offset + 50_000, first + count)]

    return BlobToSend(digest=Digest(sha256(content).hexdigest()), size_bytes=len(content), read=read, **more)


async def send(to: Wired, content: bytes, **more: str) -> list[int]:
    told: list[int] = []
    await to.client.send_blob(to.repository, blob(content, **more), told.append)
    return told


def methods(to: Wired) -> list[str]:
    return [asked.method for asked in to.at.asked]


async def refused(awaitable: object) -> CorralError:
    with pytest.raises(CorralError) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_manifest_comes_with_its_bytes_type_and_digest() -> None:
    async with wired() as to:
        HonestRegistry(to.at).manifests["latest"] = (TYPE, MANIFEST)
        found = await to.client.manifest(to.repository, "latest")
    assert found == RemoteManifest(digest=Digest(sha256(MANIFEST).hexdigest()), media_type=TYPE, body=MANIFEST)
    assert to.at.asked[0].headers["accept"].startswith(TYPE)
    assert to.at.asked[0].headers["accept-encoding"] == "identity"


async def test_manifest_and_blob_that_are_not_there_are_none() -> None:
    async with wired() as to:
        HonestRegistry(to.at)
        assert await to.client.manifest(to.repository, "latest") is None
        assert await to.client.blob_size(to.repository, Digest("0" * 64)) is None


async def test_t120_manifest_under_a_wrong_digest_is_refused() -> None:
    async with wired() as to:
        to.at.on = lambda _: answer(200, MANIFEST, content_type=TYPE, docker_content_digest=f"sha256:{'1' * 64}")
        assert (await refused(to.client.manifest(to.repository, "latest"))).code == "upstream_failed"
        to.at.on = lambda _: answer(200, MANIFEST, content_type=TYPE)
        assert (await refused(to.client.manifest(to.repository, f"sha256:{'1' * 64}"))).code == "upstream_failed"


async def test_blob_range_is_exactly_what_was_asked_for() -> None:
    async with wired() as to:
        digest = HonestRegistry(to.at).add_blob(CONTENT)
        assert await to.client.blob_size(to.repository, digest) == len(CONTENT)
        assert await to.read(digest, 1000, 5000) == CONTENT[1000:6000]
        assert await to.read(digest, 0, len(CONTENT)) == CONTENT


async def test_blob_of_a_registry_without_ranges_is_read_all_the_same() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at, ranges=False)
        assert await to.read(registry.add_blob(CONTENT), 1000, 5000) == CONTENT[1000:6000]


@pytest.mark.parametrize("how", ["redirect", "location"])
async def test_blob_elsewhere_is_fetched_without_authorization(how: str) -> None:
    async with wired() as to, wired() as storage:
        registry = HonestRegistry(to.at, demands="any", hands_out=how)
        registry.direct_url = storage.at.url
        HonestRegistry(storage.at).blobs = registry.blobs
        if how == "location":
            # The same server, which gets the token again; the fake says so if a foreign one does.
            registry.demands = ""
        assert await to.read(registry.add_blob(CONTENT), 10, 20) == CONTENT[10:30]
    assert [asked.headers.get("authorization") for asked in storage.at.asked] == ([None] if how == "redirect" else [])


async def test_broken_connection_goes_on_where_it_broke() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at)
        digest = registry.add_blob(CONTENT)
        broken = iter([100_000, 100_000])

        def trouble(asked: Asked) -> Answer | None:
            count = next(broken, None)
            if count is None:
                return None
            first = int(asked.headers["range"][6:].partition("-")[0])
            body = CONTENT[first : first + count]
            span = f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}"
            return answer(206, body, length=len(CONTENT) - first, content_range=span)

        registry.trouble = trouble
        assert await to.read(digest, 0, len(CONTENT)) == CONTENT
    assert [asked.headers["range"] for asked in to.at.asked] == [
        "bytes=0-255999",
        "bytes=100000-255999",
        "bytes=200000-255999",
    ]
    assert len(to.pauses) == 2


async def test_stalled_answer_is_asked_for_again() -> None:
    async with wired(stall_s=0.02) as to:
        registry = HonestRegistry(to.at)
        digest = registry.add_blob(CONTENT)
        stalls = iter([True])

        async def stalling() -> AsyncIterator[bytes]:
            yield answer(206, CONTENT[:500], length=1000, content_range=f"bytes 0-999/{len(CONTENT)}")
            await asyncio.Event().wait()

        registry.trouble = lambda _: stalling() if next(stalls, False) else None
        assert await to.read(digest, 0, 1000) == CONTENT[:1000]
    assert to.at.asked[1].headers["range"] == "bytes=500-999"


async def test_server_in_need_is_asked_again_after_what_it_asks_for() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at)
        registry.manifests["latest"] = (TYPE, MANIFEST)
        troubles = iter([answer(503), answer(429, retry_after="9"), answer(500, b"oh")])
        registry.trouble = lambda _: next(troubles, None)
        assert await to.client.manifest(to.repository, "latest") is not None
    assert to.pauses[1] == 9.0
    assert to.pauses[2] > to.pauses[0]


async def test_server_that_stays_in_need_is_given_up() -> None:
    async with wired() as to:
        to.at.on = lambda _: answer(500, b"oh no")
        error = await refused(to.client.manifest(to.repository, "latest"))
    assert error.message == "max retries exceeded: 500: oh no"
    assert len(to.at.asked) == 7
    assert all(pause <= 48 for pause in to.pauses)


async def test_refusal_is_told_in_the_registrys_words_and_not_repeated() -> None:
    async with wired() as to:
        to.at.on = lambda _: answer(403, b'{"errors":[]}')
        error = await refused(to.client.manifest(to.repository, "latest"))
    assert (error.code, error.message) == ("forbidden", '403: {"errors":[]}')
    assert methods(to) == ["GET"]


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_public_model_is_read_without_a_signature() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at, demands="any")
        registry.manifests["latest"] = (TYPE, MANIFEST)
        assert await to.client.manifest(to.repository, "latest") is not None
        digest = registry.add_blob(CONTENT)
        assert await to.read(digest, 0, 5) == CONTENT[:5]
    assert to.keys.wanted == 0
    assert [asked.path for asked in to.at.asked] == [
        "/v2/a/b/manifests/latest",
        "/token",
        "/v2/a/b/manifests/latest",
        f"/v2/a/b/blobs/{digest}",
    ]


async def test_private_model_is_signed_for_when_a_stranger_does_not_find_it() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at, demands="signed")
        registry.manifests["latest"] = (TYPE, MANIFEST)
        assert await to.client.manifest(to.repository, "latest") is not None
    tokens = [asked for asked in to.at.asked if asked.path == "/token"]
    assert ["authorization" in asked.headers for asked in tokens] == [False, True]
    assert tokens[1].headers["authorization"].startswith(to.keys.public.blob_text + ":")
    assert tokens[1].query["scope"] == ["repository:a/b:pull"]
    assert len(tokens[1].query["nonce"][0]) == 22


async def test_push_is_signed_for_at_once() -> None:
    async with wired() as to:
        HonestRegistry(to.at, demands="signed")
        await send(to, CONTENT)
    assert [asked.path for asked in to.at.asked][:3] == [to.at.asked[0].path, "/token", to.at.asked[0].path]
    assert to.keys.wanted == 1


async def test_name_of_the_device_is_told_to_the_registry_it_pushes_to_and_to_nobody_else(small_parts: None) -> None:
    async with wired() as to, wired() as storage:
        registry = HonestRegistry(to.at, demands="signed", redirects_parts=True)
        registry.direct_url = storage.at.url
        HonestRegistry(storage.at).uploads = registry.uploads
        await send(to, CONTENT)
        pushed = len(to.at.asked)
        await to.client.manifest(to.repository, "latest")
    told = [(asked.path, asked.headers.get("corral-device-name")) for asked in to.at.asked]
    assert {name for path, name in told[:pushed] if path != "/token"} == {"ada's box"}
    assert {name for path, name in told if path == "/token"} == {None}
    assert {name for _, name in told[pushed:]} == {None}
    assert not [asked for asked in storage.at.asked if "corral-device-name" in asked.headers]


async def test_token_that_ran_out_in_the_middle_of_a_push_is_renewed() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at, demands="signed")
        expired = iter([True])

        def trouble(asked: Asked) -> Answer | None:
            if asked.method == "PATCH" and next(expired, False):
                realm = f'Bearer realm="{to.at.url}/token",service="reg",scope="repository:a/b:pull,push"'
                return answer(401, www_authenticate=realm)
            return None

        registry.trouble = trouble
        await send(to, CONTENT)
        assert registry.blobs[str(blob(CONTENT).digest)] == CONTENT
    assert [asked.path for asked in to.at.asked].count("/token") == 2
    assert to.pauses == []


async def test_client_without_a_key_never_signs() -> None:
    async with wired(keys=False) as to:
        HonestRegistry(to.at, demands="signed").manifests["latest"] = (TYPE, MANIFEST)
        assert await to.client.manifest(to.repository, "latest") is None
    assert all(not asked.headers.get("authorization", "").startswith("AAAA") for asked in to.at.asked)


async def test_t092_realm_elsewhere_gets_no_request_and_no_signature() -> None:
    async with wired() as to, wired() as thief:
        port = to.at.url.rpartition(":")[2]
        for realm in (
            f"{thief.at.url}/token",
            f"http://localhost:{port}/token",
            f"http://127.0.0.1:{port}@{thief.at.url[7:]}/token",
            f"http://user:pw@127.0.0.1:{port}/token",
            f"https://127.0.0.1:{port}/token",
            "http://169.254.169.254/token",
            "file:///etc/passwd",
            "",
        ):
            challenge = f'Bearer realm="{realm}",service="s",scope="repository:a/b:pull"'
            to.at.on = lambda _, challenge=challenge: answer(401, www_authenticate=challenge)  # type: ignore[misc]
            to.at.asked.clear()
            assert (await refused(to.client.manifest(to.repository, "latest"))).code == "upstream_failed", realm
            assert (await refused(send(to, CONTENT))).code == "upstream_failed", realm
            assert all(asked.path != "/token" for asked in to.at.asked)
    assert thief.at.asked == []
    assert to.keys.wanted == 0


async def test_t092_realm_in_another_case_gets_no_signature() -> None:
    async with wired() as to:
        port = to.at.url.rpartition(":")[2]
        challenge = f'Bearer realm="http://LOCALHOST:{port}/token",service="s",scope="repository:a/b:pull"'
        to.at.on = lambda _: answer(401, www_authenticate=challenge)
        at = RemoteRepository(f"http://localhost:{port}", "a/b")
        assert (await refused(to.client.send_blob(at, blob(CONTENT), lambda _: None))).code == "upstream_failed"
        assert (await refused(to.client.manifest(at, "latest"))).code == "upstream_failed"
        assert to.at.asked
        assert all(asked.path != "/token" for asked in to.at.asked)
    assert to.keys.wanted == 0


async def test_t092_realm_given_twice_gets_no_signature() -> None:
    async with wired() as to, wired() as thief:
        twice = f'Bearer realm="{to.at.url}/token",realm="{thief.at.url}/token",service="s",scope="x"'
        to.at.on = lambda _: answer(401, www_authenticate=twice)
        assert (await refused(send(to, CONTENT))).code == "upstream_failed"
    assert thief.at.asked == []
    assert to.keys.wanted == 0


async def test_t092_redirect_of_the_token_request_is_not_followed() -> None:
    async with wired() as to, wired() as thief:
        challenge = f'Bearer realm="{to.at.url}/token",service="s",scope="x"'

        def on(asked: Asked) -> Answer:
            is_token = asked.path == "/token"
            return answer(307, location=f"{thief.at.url}/x") if is_token else answer(401, www_authenticate=challenge)

        to.at.on = on
        assert (await refused(send(to, CONTENT))).code == "upstream_failed"
    assert thief.at.asked == []


async def test_t092_token_goes_to_no_other_host() -> None:
    async with wired() as to, wired() as thief:
        registry = HonestRegistry(to.at, demands="signed", hands_out="redirect", direct_url=thief.at.url)
        digest = registry.add_blob(CONTENT)
        HonestRegistry(thief.at).blobs = registry.blobs
        await to.read(digest, 0, 10)
    assert all("authorization" not in asked.headers for asked in thief.at.asked)


# ── T93: hostile registries ──────────────────────────────────────────────────────────────────────────────────────────


async def endless(head: bytes, piece: bytes = b"x" * 65536) -> AsyncIterator[bytes]:
    yield head
    for _ in range(2_000):  # more than any bound, and an end for a client that has none
        yield piece


async def test_t093_manifest_without_end_is_cut_at_16_mib() -> None:
    async with wired() as to:
        to.at.on = lambda _: endless(answer(200, length=10_000_000_000, content_type=TYPE))
        assert (await refused(to.client.manifest(to.repository, "latest"))).code == "too_large"
        assert to.at.sent_bytes < 64 << 20


async def test_t093_token_without_end_is_cut_at_64_kib() -> None:
    async with wired() as to:
        challenge = f'Bearer realm="{to.at.url}/token",service="s",scope="x"'

        def on(asked: Asked) -> Answer:
            if asked.path == "/token":
                return endless(answer(200, length=-1))
            return answer(401, www_authenticate=challenge)

        to.at.on = on
        assert (await refused(send(to, CONTENT))).code == "too_large"
        assert to.at.sent_bytes < 32 << 20


@pytest.mark.parametrize("token", [b"{}", b"[]", b'{"token":5}', b'{"token":"a\\r\\nX: y"}', b"{" * 50_000, b'{"token":""}'])
async def test_t093_token_that_is_none_is_refused(token: bytes) -> None:
    async with wired() as to:
        challenge = f'Bearer realm="{to.at.url}/token",service="s",scope="x"'
        to.at.on = lambda asked: answer(200, token) if asked.path == "/token" else answer(401, www_authenticate=challenge)
        assert (await refused(send(to, CONTENT))).code == "upstream_failed"


async def test_t093_error_without_end_is_cut() -> None:
    async with wired() as to:
        to.at.on = lambda _: endless(answer(400, length=-1))
        assert (await refused(to.client.manifest(to.repository, "latest"))).message == "400: X"
        assert to.at.sent_bytes < 32 << 20


async def test_t093_401_for_ever_ends() -> None:
    async with wired() as to:
        challenge = f'Bearer realm="{to.at.url}/token",service="s",scope="x"'

        def on(asked: Asked) -> Answer:
            if asked.path == "/token":
                return answer(200, json.dumps({"token": "t"}).encode())
            return answer(401, www_authenticate=challenge)

        to.at.on = on
        error = await refused(to.client.manifest(to.repository, "latest"))
        assert (error.code, error.message) == ("unauthorized", "unauthorized: access denied")
        error = await refused(send(to, CONTENT))
        assert (error.code, error.message) == ("unauthorized", "unauthorized: access denied")
    assert len(to.at.asked) < 12


async def test_t093_redirects_without_end_are_given_up() -> None:
    async with wired() as to:
        to.at.on = lambda asked: answer(307, location=asked.target + "x")
        assert (await refused(to.client.manifest(to.repository, "latest"))).code == "upstream_failed"
    assert len(to.at.asked) == 6


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "ftp://example.org/",
        "http://user:pw@example.org/",
        "http://[",
        "//",
        "",
    ],
)
async def test_t093_redirect_inside_is_not_followed(location: str) -> None:
    async with wired() as to:
        to.at.on = lambda _: answer(307, location=location)
        assert (await refused(to.read(Digest("0" * 64), 0, 10))).code == "upstream_failed"
        assert (await refused(to.client.blob_size(to.repository, Digest("0" * 64)))).code == "upstream_failed"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_t093_coded_answer_is_refused(coding: str) -> None:
    async with wired() as to:
        bomb = gzip.compress(bytes(1 << 20))
        to.at.on = lambda _: answer(200, bomb, content_encoding=coding, content_type=TYPE)
        assert (await refused(to.client.manifest(to.repository, "latest"))).code == "upstream_failed"
        assert (await refused(to.read(Digest("0" * 64), 0, 10))).code == "upstream_failed"


async def test_t093_range_that_was_not_asked_for_is_refused() -> None:
    async with wired() as to:
        for span in ("bytes 5-14/100", "bytes 0-99/100", "bytes 0-9", "", "bytes 99999999999999999999-1/5"):
            to.at.on = lambda _, span=span: answer(206, b"0123456789", content_range=span)  # type: ignore[misc]
            assert (await refused(to.read(Digest("0" * 64), 0, 10))).code == "upstream_failed", span


async def test_t093_blob_shorter_than_its_manifest_says_is_refused() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at, ranges=False)
        assert (await refused(to.read(registry.add_blob(b"short"), 0, 10))).code == "upstream_failed"
        registry.ranges = True
        assert (await refused(to.read(registry.add_blob(b"short"), 0, 10))).code == "upstream_failed"


async def test_t093_bytes_beyond_the_range_are_not_read() -> None:
    async with wired() as to:
        to.at.on = lambda _: endless(answer(206, length=-1, content_range="bytes 0-9/10"))
        assert len(await to.read(Digest("0" * 64), 0, 10)) == 10
        assert to.at.sent_bytes < 32 << 20


async def test_t093_length_that_is_none_is_refused() -> None:
    async with wired() as to:
        to.at.on = lambda _: b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        assert (await refused(to.client.blob_size(to.repository, Digest("0" * 64)))).code == "upstream_failed"


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Parts have 100 MB at least, which is no size for a unit test.
    monkeypatch.setattr(module, "part_size", lambda _: 100_000)


async def test_blob_that_is_there_is_not_sent() -> None:
    async with wired() as to:
        HonestRegistry(to.at).add_blob(CONTENT)
        assert await send(to, CONTENT) == [len(CONTENT)]
    assert methods(to) == ["HEAD"]


async def test_blob_is_sent_in_parts_and_committed(small_parts: None) -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at)
        told = await send(to, CONTENT)
        assert registry.blobs[str(blob(CONTENT).digest)] == CONTENT
    assert methods(to) == ["HEAD", "POST", "PATCH", "PATCH", "PATCH", "PUT"]
    assert [asked.headers["content-range"] for asked in to.at.asked[2:5]] == ["0-99999", "100000-199999", "200000-255999"]
    assert to.at.asked[2].headers["x-redirect-uploads"] == "1"
    assert told[-1] == len(CONTENT)


async def test_blob_of_no_bytes_is_sent() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at)
        await send(to, b"")
        assert registry.blobs[str(blob(b"").digest)] == b""
    assert methods(to) == ["HEAD", "POST", "PUT"]


async def test_blob_is_mounted_where_it_came_from() -> None:
    async with wired() as to:
        HonestRegistry(to.at, mounts=True)
        await send(to, CONTENT, mount_from="c/d")
    assert methods(to) == ["HEAD", "POST"]
    assert to.at.asked[1].query == {"from": ["c/d"], "mount": [str(blob(CONTENT).digest)]}


async def test_part_that_broke_goes_on_where_the_registry_is(small_parts: None) -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at)
        breaks = iter([True])

        def trouble(asked: Asked) -> Answer | None:
            if asked.method == "PATCH" and next(breaks, False):
                registry.uploads["u0"] += asked.body[:40_000]
                return b""
            return None

        registry.trouble = trouble
        await send(to, CONTENT)
        assert registry.blobs[str(blob(CONTENT).digest)] == CONTENT
    ranges = [asked.headers["content-range"] for asked in to.at.asked if asked.method == "PATCH"]
    assert ranges == ["0-99999", "40000-139999", "140000-239999", "240000-255999"]


async def test_part_whose_answer_was_lost_is_not_sent_twice(small_parts: None) -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at)
        lost = iter([True])

        def trouble(asked: Asked) -> Answer | None:
            if asked.method == "PATCH" and next(lost, False):
                registry.uploads["u0"] += asked.body
                return b""
            return None

        registry.trouble = trouble
        await send(to, CONTENT)
        assert registry.blobs[str(blob(CONTENT).digest)] == CONTENT
    assert methods(to).count("PATCH") == 3


async def test_upload_that_the_registry_forgot_begins_anew(small_parts: None) -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at)
        forgets = iter([True])

        def trouble(asked: Asked) -> Answer | None:
            return answer(404) if asked.method == "PATCH" and next(forgets, False) else None

        registry.trouble = trouble
        await send(to, CONTENT)
        assert registry.blobs[str(blob(CONTENT).digest)] == CONTENT
    assert methods(to).count("POST") == 2


async def test_commit_whose_answer_was_lost_is_found_done() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at)
        lost = iter([True])

        def trouble(asked: Asked) -> Answer | None:
            if asked.method == "PUT" and next(lost, False):
                registry.on(asked)
                return b""
            return None

        registry.trouble = trouble
        await send(to, CONTENT)
        assert registry.blobs[str(blob(CONTENT).digest)] == CONTENT
    assert methods(to).count("POST") == 1


async def test_redirected_parts_go_to_the_storage_without_authorization(small_parts: None) -> None:
    async with wired() as to, wired() as storage:
        registry = HonestRegistry(to.at, demands="signed", redirects_parts=True)
        registry.direct_url = storage.at.url
        HonestRegistry(storage.at).uploads = registry.uploads
        await send(to, CONTENT)
        assert registry.blobs[str(blob(CONTENT).digest)] == CONTENT
    assert [len(asked.body) for asked in storage.at.asked] == [100_000, 100_000, 56_000]
    assert to.at.asked[-1].query["etag"][0].endswith("-3")


async def test_refused_upload_says_why_though_head_cannot() -> None:
    async with wired() as to:
        to.at.on = lambda _: answer(403, b'{"errors":[{"message":"bob may not push here"}]}')
        error = await refused(send(to, CONTENT))
    assert (error.code, error.message) == ("forbidden", '403: {"errors":[{"message":"bob may not push here"}]}')


async def test_manifest_is_put_as_it_is() -> None:
    async with wired() as to:
        registry = HonestRegistry(to.at)
        manifest = RemoteManifest(digest=Digest("0" * 64), media_type=TYPE, body=MANIFEST)
        await to.client.put_manifest(to.repository, "latest", manifest, visibility=Visibility.PUBLIC)
        assert registry.manifests["latest"] == (TYPE, MANIFEST)
        assert registry.visibility == "public"


async def test_redirect_of_a_push_is_not_followed() -> None:
    async with wired() as to, wired() as thief:
        to.at.on = lambda asked: answer(302, location=thief.at.url) if asked.method != "HEAD" else answer(404)
        assert (await refused(send(to, CONTENT))).code == "upstream_failed"
        manifest = RemoteManifest(digest=Digest("0" * 64), media_type=TYPE, body=MANIFEST)
        assert (await refused(to.client.put_manifest(to.repository, "x", manifest))).code == "upstream_failed"
    assert thief.at.asked == []


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/blob", "http://localhost:9/blob"])
async def test_place_on_this_machine_that_nobody_runs_is_named_at_once(place: str) -> None:
    async with wired() as to:
        to.at.on = lambda _: answer(307, location=place)
        error = await refused(to.read(Digest("0" * 64), 0, 10))
        home = to.repository.base_url
        assert error.message.startswith(
            f"the registry {home} sends this client on to {place.removesuffix('/blob')}, which could not"
        )
        assert error.message.endswith("connection refused → is it running?")
    assert to.pauses == []


async def test_registry_that_nobody_runs_is_named_at_once_and_not_tried_again() -> None:
    nowhere = RemoteRepository("http://127.0.0.1:9", "a/b")
    async with wired() as to:
        for asked in (to.client.manifest(nowhere, "latest"), to.client.send_blob(nowhere, blob(CONTENT), lambda _: None)):
            error = await refused(asked)
            assert error.code == "upstream_failed"
            assert error.message == "could not reach the registry http://127.0.0.1:9: connection refused → is it running?"
    assert to.pauses == []
