"""Where tokens are fetched from: by anybody from wherever it is safe to ask, by signature from the registry alone."""

from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from typing import Any

import aiohttp
import pytest
from yarl import URL

from corral.clients.reach import GuardedResolver
from corral.core.transfer_ports import BlobToSend, RemoteRepository
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from fakes_remote_registry import Answer, Asked, Names, ScriptedRegistry, answer, wired

MANIFEST = b'{"schemaVersion":2}'
TYPE = "application/vnd.docker.distribution.manifest.v2+json"


async def _content(first: int, count: int) -> AsyncIterator[bytes]:
    yield b"content"[first : first + count]


BLOB = BlobToSend(digest=Digest(sha256(b"content").hexdigest()), size_bytes=7, read=_content)


async def refused(awaitable: object) -> CorralError:
    with pytest.raises(CorralError) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value


class TokenService:
    """A token service at https://auth.test, which gives everybody the token `anonymous`. asked: every request that reached it.

    No test has a certificate that a client takes, so requests by https are judged as connections are and then sent to it by
    http: what goes over the line is not looked at here.
    """

    def __init__(self, at: ScriptedRegistry, resolver: GuardedResolver, monkeypatch: pytest.MonkeyPatch) -> None:
        at.on = lambda _: answer(200, b'{"token":"anonymous"}')
        self.asked = at.asked
        real = aiohttp.ClientSession.request

        async def request(session: aiohttp.ClientSession, method: str, url: URL, **options: Any) -> aiohttp.ClientResponse:
            if url.scheme == "https":
                if url.host == "auth.test":
                    await resolver.resolve(url.host, 443)
                url = URL(at.url + url.raw_path_qs, encoded=True)
            return await real(session, method, url, **options)

        monkeypatch.setattr(aiohttp.ClientSession, "request", request)


def guarded_by(demanded: str, *, realm: str = "https://auth.test/token") -> Callable[[Asked], Answer]:
    """A registry that gives its manifest for one token."""
    challenge = f'Bearer realm="{realm}",service="s",scope="repository:a/b:pull"'

    def on(asked: Asked) -> Answer:
        given = asked.headers.get("authorization")
        if given is None:
            return answer(401, www_authenticate=challenge)
        return answer(200, MANIFEST, content_type=TYPE) if given == f"Bearer {demanded}" else answer(404)

    return on


async def test_anonymous_token_is_fetched_from_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(auth_test=["192.31.196.1"])
    async with wired(resolver=names) as to, wired() as other:
        service = TokenService(other.at, GuardedResolver(names), monkeypatch)
        to.at.on = guarded_by("anonymous")
        found = await to.client.manifest(to.repository, "latest")
    assert found is not None
    assert found.body == MANIFEST
    assert [asked.path for asked in service.asked] == ["/token"]
    assert service.asked[0].query["scope"] == ["repository:a/b:pull"]
    assert "authorization" not in service.asked[0].headers
    assert to.keys.wanted == 0


async def test_t092_signature_goes_to_no_other_host_by_https_either(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(auth_test=["192.31.196.1"])
    async with wired(resolver=names) as to, wired() as other:
        service = TokenService(other.at, GuardedResolver(names), monkeypatch)
        to.at.on = guarded_by("signed")
        assert (await refused(to.client.send_blob(to.repository, BLOB, lambda _: None))).code == "upstream_failed"
        assert service.asked == []
        # A stranger does not find it, and nobody else is there to ask as.
        assert await to.client.manifest(to.repository, "latest") is None
    assert [asked.headers.get("authorization") for asked in service.asked] == [None]
    assert to.keys.wanted == 0


@pytest.mark.parametrize(
    ("realm", "address"),
    [
        ("https://auth.test/token", "127.0.0.1"),
        ("https://auth.test/token", "169.254.169.254"),
        ("https://auth.test/token", "10.0.0.1"),
        ("https://10.0.0.1/token", ""),
        ("https://127.0.0.1/token", ""),
        ("https://[::1]/token", ""),
        ("https://[::ffff:169.254.169.254]/token", ""),
        ("http://auth.test/token", "192.31.196.1"),
    ],
)
async def test_t093_public_registry_sends_nobody_inside_for_a_token(
    realm: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As far inside as the outermost of its addresses: this one is public, though it is reached here.
    names = Names(auth_test=[address], reg_test=["127.0.0.1", "192.31.196.1"])
    async with wired(resolver=names) as to, wired() as other:
        service = TokenService(other.at, GuardedResolver(names), monkeypatch)
        to.at.on = guarded_by("anonymous", realm=realm)
        public = RemoteRepository(f"http://reg.test:{to.at.url.rpartition(':')[2]}", "a/b")
        assert (await refused(to.client.manifest(public, "latest"))).code == "upstream_failed"
    assert service.asked == []


async def test_registry_on_a_private_network_may_have_its_token_service_there(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(auth_test=["10.0.0.1"])
    async with wired(resolver=names) as to, wired() as other:
        service = TokenService(other.at, GuardedResolver(names), monkeypatch)
        to.at.on = guarded_by("anonymous")
        assert await to.client.manifest(to.repository, "latest") is not None
    assert len(service.asked) == 1
