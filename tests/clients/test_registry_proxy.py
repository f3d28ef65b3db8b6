"""Registries behind a proxy: what goes by it, and that a hostile registry cannot use it to reach what lies inside."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp.abc import ResolveResult
from yarl import URL

from corral.core.transfer_ports import RemoteRepository
from corral.wire.errors import CorralError
from corral.wire.proxies import ProxyRules
from fakes_remote_registry import Answer, Asked, Names, ScriptedRegistry, Wired, answer, wired

MANIFEST = b'{"schemaVersion":2}'
TYPE = "application/vnd.docker.distribution.manifest.v2+json"
PROXY = "http://ada:hunter2@proxy.test:3128"
HOME = "https://reg.test"
#: Reached here, and public all the same: as far inside as the outermost of its addresses.
BOTH = ["127.0.0.1", "192.31.196.1"]


class FewNames(Names):
    """A resolver that knows what the test says, and that nothing else is there."""

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        if host not in self.addresses:
            raise OSError(None, "no such name")
        return await super().resolve(host, port, family)


@dataclass
class Behind:
    """A client behind a proxy. sent: (host, the proxy it went by) of each request.

    No test has a certificate that a client takes, so what is asked by https is noted with the proxy that aiohttp was told, and
    then sent to the scripted registry by http; the tests with a proxy of their own look at the line itself.
    """

    to: Wired
    sent: list[tuple[str, str]] = field(default_factory=list)

    async def manifest(self, home: str = HOME) -> bytes | None:
        found = await self.to.client.manifest(RemoteRepository(home, "a/b"), "latest")
        return None if found is None else found.body


@asynccontextmanager
async def behind(monkeypatch: pytest.MonkeyPatch, *exceptions: str, **names: list[str]) -> AsyncIterator[Behind]:
    async with wired(resolver=FewNames(**names), proxies=ProxyRules(http=PROXY, https=PROXY, exceptions=exceptions)) as to:
        here, real = Behind(to), aiohttp.ClientSession.request

        async def request(session: aiohttp.ClientSession, method: str, url: URL, **options: Any) -> aiohttp.ClientResponse:
            if options["proxy"] is None:
                return await real(session, method, url, **options)
            here.sent.append((str(url.host), options.pop("proxy")))
            target = URL(to.at.url + url.raw_path_qs, encoded=True)
            headers = {**options.pop("headers"), "x-host": str(url.host)}
            response = await real(session, method, target, headers=headers, **options)
            response._url = url
            return response

        monkeypatch.setattr(aiohttp.ClientSession, "request", request)
        yield here


def sending_to(target: str) -> Any:
    """A registry that redirects, and a place that has what is asked for."""

    def on(asked: Asked) -> Answer:
        if asked.path.startswith("/v2/"):
            return answer(307, location=target)
        return answer(200, MANIFEST, content_type=TYPE)

    return on


async def test_registry_that_is_not_known_here_is_asked_by_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with behind(monkeypatch) as here:
        here.to.at.on = lambda _: answer(200, MANIFEST, content_type=TYPE)
        assert await here.manifest() == MANIFEST
        assert here.sent == [("reg.test", PROXY)]


async def test_place_that_is_not_known_here_is_asked_by_the_proxy_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    async with behind(monkeypatch) as here:

        def on(asked: Asked) -> Answer:
            match asked.path, asked.headers.get("authorization"):
                case "/token", None:
                    return answer(200, b'{"token":"anonymous"}')
                case "/stored", None:
                    return answer(200, MANIFEST, content_type=TYPE)
                case _, "Bearer anonymous":
                    return answer(307, location="https://cdn.test/stored")
            return answer(401, www_authenticate='Bearer realm="https://auth.test/token",service="s",scope="repository:a/b:pull"')

        here.to.at.on = on
        assert await here.manifest() == MANIFEST
        assert [host for host, _ in here.sent] == ["reg.test", "auth.test", "reg.test", "cdn.test"]
        assert here.to.keys.wanted == 0


@pytest.mark.parametrize(
    "target",
    [
        "https://127.0.0.1/x",
        "https://127.0.0.1:3128/x",
        "https://10.0.0.1/x",
        "https://169.254.169.254/latest/meta-data",
        "https://100.64.0.1/x",
        "https://0.0.0.0/x",
        "https://[::1]/x",
        "https://[fe80::1]/x",
        "https://[fd00::1]/x",
        "https://[::ffff:10.0.0.1]/x",
        "https://[64:ff9b::10.0.0.1]/x",
        # As numbers, which each reader of addresses takes for another.
        "https://2130706433/x",
        "https://0x7f000001/x",
        "https://0x7f.1/x",
        "https://127.1/x",
        "https://010.0.0.1/x",
        "https://0177.0.0.1/x",
        "https://127.0.0.1./x",
        # Names.
        "https://localhost/x",
        "https://a.localhost/x",
        "https://intranet/x",
        "https://intranet./x",
        "https://printer.local/x",
        "https://metadata.google.internal/x",
        "https://wiki.corp/x",
        "https://wiki.CORP./x",
        "https://inside.test/x",
        "https://half.test/x",
        # The proxy itself: that it may be connected to does not make it a place to point to.
        "https://proxy.test/x",
        "https://proxy.test:3128/x",
        # Excepted from the proxy, and therefore reached from here.
        "https://excepted.test/x",
        # No https any more.
        "http://cdn.test/x",
        "https://\uff11\uff12\uff17.0.0.1/x",
    ],
)
async def test_t093_registry_points_nobody_inside_through_the_proxy(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "inside_test": ["10.0.0.1"],
        "half_test": ["8.8.8.8", "10.0.0.1"],
        "proxy_test": ["10.0.0.9"],
        "excepted_test": ["10.0.0.7"],
        "localhost": ["127.0.0.1"],
        "a_localhost": ["127.0.0.1"],
        # What a resolver may make of other spellings: 010.0.0.1 is a public address to this one.
        "010_0_0_1": ["8.0.0.1"],
        "127_0_0_1_": ["127.0.0.1"],
    }
    async with behind(monkeypatch, "excepted.test", **names) as here:
        here.to.at.on = sending_to(target.encode().decode("latin-1"))
        with pytest.raises(CorralError) as caught:
            await here.manifest()
        assert caught.value.code == "upstream_failed"
        assert [host for host, _ in here.sent] == ["reg.test"]


@pytest.mark.parametrize("realm", ["https://10.0.0.1/token", "https://intranet/token", "https://proxy.test:3128/token"])
async def test_t093_registry_sends_nobody_inside_for_a_token_through_the_proxy(
    realm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind(monkeypatch, proxy_test=["10.0.0.9"]) as here:
        here.to.at.on = lambda _: answer(401, www_authenticate=f'Bearer realm="{realm}",service="s",scope="repository:a/b:pull"')
        with pytest.raises(CorralError) as caught:
            await here.manifest()
        assert caught.value.code == "upstream_failed"
        assert [host for host, _ in here.sent] == ["reg.test"]


async def test_private_registry_may_point_to_its_own_network_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with behind(monkeypatch, reg_test=["10.0.0.2"], store_test=["10.0.0.3"]) as here:
        here.to.at.on = sending_to("https://store.test/x")
        assert await here.manifest() == MANIFEST
        assert [host for host, _ in here.sent] == ["reg.test", "store.test"]


# ── On the line ──────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def refusing_proxy() -> AsyncIterator[ScriptedRegistry]:
    """A proxy on this machine that connects nobody, and remembers who asked."""
    async with ScriptedRegistry().listening() as proxy:
        proxy.on = lambda _: answer(403)
        yield proxy


def port_of(at: ScriptedRegistry) -> str:
    return at.url.rpartition(":")[2]


async def test_proxy_on_this_machine_is_used_for_what_a_public_registry_points_to_and_sees_no_token() -> None:
    async with refusing_proxy() as proxy:
        rules = ProxyRules(https=f"http://ada:hunter2@proxy.test:{port_of(proxy)}", http="http://127.0.0.1:1")
        names = FewNames(reg_test=BOTH, proxy_test=["127.0.0.1"])
        async with wired(resolver=names, proxies=rules) as to:
            to.at.on = sending_to("https://cdn.test/stored?signature=x")
            with pytest.raises(CorralError, match="HTTPS_PROXY") as caught:
                await to.client.manifest(RemoteRepository(f"http://reg.test:{port_of(to.at)}", "a/b"), "latest")
    first = proxy.asked[0]
    assert (first.method, first.target) == ("CONNECT", "cdn.test:443")
    assert first.headers["proxy-authorization"].startswith("Basic ")
    assert "authorization" not in first.headers
    assert "hunter2" not in caught.value.message
    assert all("proxy-authorization" not in asked.headers for asked in to.at.asked)


async def test_t093_proxy_on_this_machine_is_no_place_to_point_to() -> None:
    async with refusing_proxy() as proxy:
        rules = ProxyRules(https=f"http://proxy.test:{port_of(proxy)}")
        names = FewNames(reg_test=BOTH, proxy_test=["127.0.0.1"])
        async with wired(resolver=names, proxies=rules) as to:
            home = RemoteRepository(f"http://reg.test:{port_of(to.at)}", "a/b")
            for scheme in ("http", "https"):
                to.at.on = sending_to(f"{scheme}://proxy.test:{port_of(proxy)}/")
                with pytest.raises(CorralError, match="internal address"):
                    await to.client.manifest(home, "latest")
    assert proxy.asked == []


async def test_registry_by_http_is_asked_without_the_proxy() -> None:
    names = FewNames(reg_test=["127.0.0.1"])
    async with wired(resolver=names, proxies=ProxyRules(http="http://127.0.0.1:1", https="http://127.0.0.1:1")) as to:
        to.at.on = lambda _: answer(200, MANIFEST, content_type=TYPE)
        found = await to.client.manifest(RemoteRepository(f"http://reg.test:{port_of(to.at)}", "a/b"), "latest")
    assert found is not None


async def test_t093_host_that_was_asked_before_is_judged_again() -> None:
    """A connection that is kept from what a person asked for must not carry what a registry points to."""
    async with wired(resolver=FewNames(reg_test=BOTH, inside_test=["127.0.0.1"])) as to:
        inside = f"http://inside.test:{port_of(to.at)}"
        to.at.on = lambda _: b"HTTP/1.1 200 OK\r\nContent-Type: " + TYPE.encode() + b"\r\nContent-Length: 19\r\n\r\n" + MANIFEST
        assert await to.client.manifest(RemoteRepository(inside, "a/b"), "latest") is not None
        to.at.on = sending_to(f"{inside}/stored")
        with pytest.raises(CorralError, match="internal address"):
            await to.client.manifest(RemoteRepository(f"http://reg.test:{port_of(to.at)}", "a/b"), "latest")
