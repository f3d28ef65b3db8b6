"""The signed client against a hub on a real socket: what travels, what is agreed once, and what is never taken back."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from email.utils import format_datetime

import aiohttp
import pytest

from corral.clients.hub import HubClient, open_session, reason_of
from corral.core.ports import HubCall, HubMemory, HubTerms
from corral.wire.discovery import DISCOVERY_PATH, STOCK, STRONG
from corral.wire.errors import CorralError
from corral.wire.proxies import ProxyRules
from corral.wire.signing import (
    enrollment_challenge,
    parse_authorization,
    parse_ts,
    request_challenge,
    verify,
    verify_enrollment,
)
from corral.wire.strong import verify_headers
from fakes import NOON, FakeClock, SeededEntropy
from fakes_local import FakeDeviceKeys, MemoryHubs, Received, Script, SocketHub, Wire, discovery, socket_hub

KEYS = FakeDeviceKeys()


class Client(HubClient):
    """A HubClient with everything a test may want to look at."""

    def __init__(self, url: str, session: aiohttp.ClientSession, memory: HubMemory, keys: FakeDeviceKeys) -> None:
        self.clock = FakeClock()
        self.url = url
        super().__init__(
            lambda: self.url,
            keys,
            memory=memory,
            clock=self.clock,
            entropy=SeededEntropy(),
            session=session,
            device_name="Ada's MacBook",
            version="9.9",
        )


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session() as opened:
        yield opened


@pytest.fixture
def memory() -> MemoryHubs:
    return MemoryHubs()


def client(hub: SocketHub | str, session: aiohttp.ClientSession, memory: HubMemory, keys: FakeDeviceKeys = KEYS) -> Client:
    return Client(hub if isinstance(hub, str) else hub.url, session, memory, keys)


def stock(then: Script) -> Script:
    """A hub that has never heard of the strong form."""

    async def script(request: Received, wire: Wire) -> None:
        if request.target == DISCOVERY_PATH:
            await wire.answer(404)
        else:
            await then(request, wire)

    return script


def strong(then: Script, *, public_url: str = "", date: str = "") -> Script:
    """A Corral hub. public_url: its own address when empty."""

    async def script(request: Received, wire: Wire) -> None:
        if request.target == DISCOVERY_PATH:
            dated = (("Date", date),) if date else ()
            await wire.answer_json(200, discovery(public_url or f"http://{request.header('host')}"), *dated)
        else:
            await then(request, wire)

    return script


async def ok(request: Received, wire: Wire) -> None:
    await wire.answer_json(200, {"ok": True})


def check_stock(request: Received) -> None:
    """As a hub checks it: nothing but the bytes that arrived. Raises: unauthorized."""
    proof = parse_authorization(request.header("authorization"))
    assert proof.key == KEYS.key.public
    parse_ts(request.target.partition("?")[2])
    verify(proof, request_challenge(request.method, request.target))


def check_strong(request: Received, public_url: str, *, now: float = NOON.timestamp()) -> str:
    """As a hub checks it, against its own public URL. Returns the nonce. Raises: unauthorized."""
    proof = verify_headers(request.method, public_url + request.target, dict(request.headers), body=request.body, now=now)
    assert proof.key == KEYS.key.public
    return proof.nonce


# ── The stock form ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("query", ["", "b=2&a=1", "z&a=%31&a=0&ts=5", "ts=1&ts=2&x=%2F&X=1&=&a==&%74s=1", "a=1&&b"])
async def test_stock_signature_verifies_over_the_target_that_travelled(
    query: str, session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async with socket_hub(stock(ok)) as hub:
        reply = await client(hub, session, memory).send(HubCall(method="POST", path="/api/chat", query=query, body=b"{}"))
    assert reply.status == 200
    request = hub.received[-1]
    check_stock(request)
    assert parse_ts(request.target.partition("?")[2]) == int(NOON.timestamp())
    assert request.body == b"{}"


async def test_stock_request_carries_no_strong_signature_and_is_remembered_as_stock(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async with socket_hub(stock(ok)) as hub:
        await client(hub, session, memory).request("POST", "/api/me")
        assert memory.terms(hub.url) == HubTerms(signature=STOCK, public_url=hub.url)
    assert not {"signature", "signature-input", "content-digest"} & set(hub.received[-1].names)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"null"])
async def test_discovery_that_is_some_other_page_means_stock(
    body: bytes, session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer(200, body)

    async with socket_hub(script) as hub:
        await client(hub, session, memory).request("GET", "/api/usage")
        check_stock(hub.received[-1])


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_discovery_that_fails_agrees_on_nothing(status: int, session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    async def script(request: Received, wire: Wire) -> None:
        await wire.answer(status)

    async with socket_hub(script) as hub:
        with pytest.raises(CorralError) as failed:
            await client(hub, session, memory).request("POST", "/api/me")
        assert failed.value.code == "upstream_failed"
        assert memory.kept == {}
        assert [request.target for request in hub.received] == [DISCOVERY_PATH]


# ── The strong form ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_strong_signature_covers_the_public_url_the_body_and_the_content_type(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async with socket_hub(strong(ok)) as hub:
        public_url = hub.url.replace("127.0.0.1", "localhost")
        hub.script = strong(ok, public_url=public_url)
        made = client(hub, session, memory)
        await made.request("POST", "/api/keys?b=1&a=2", b'{"name":"x"}')
        request = hub.received[-1]
        nonce = check_strong(request, public_url)
        assert request.target == "/api/keys?b=1&a=2"
        assert "authorization" not in request.names
        assert "content-type" in request.header("signature-input")
        assert await made.signin_base() == public_url
        for changed in (
            Received(request.method, request.target, request.headers, b"other"),
            Received("DELETE", request.target, request.headers, request.body),
            Received(request.method, "/api/keys?b=1&a=3", request.headers, request.body),
        ):
            with pytest.raises(CorralError):
                check_strong(changed, public_url)
        with pytest.raises(CorralError):
            check_strong(request, hub.url)
        await made.request("POST", "/api/keys?b=1&a=2", b'{"name":"x"}')
        assert check_strong(hub.received[-1], public_url) != nonce


async def test_terms_are_asked_for_once_also_by_requests_that_start_together(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async with socket_hub(strong(ok)) as hub:
        made = client(hub, session, memory)
        await asyncio.gather(*(made.request("GET", f"/api/usage?n={number}") for number in range(8)))
        await client(hub, session, memory).request("GET", "/api/usage")
        assert [request.target for request in hub.received].count(DISCOVERY_PATH) == 1


async def test_hub_that_agreed_on_strong_is_never_talked_to_in_stock_form_again(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async def refuse(request: Received, wire: Wire) -> None:
        await wire.answer_json(401, {"error": "unauthorized"})

    async with socket_hub(stock(refuse)) as hub:
        memory.keep_terms(hub.url, HubTerms(signature=STRONG, public_url=hub.url))
        made = client(hub, session, memory)
        for method, path in (("POST", "/api/me"), ("GET", "/api/keys")):
            with pytest.raises(CorralError) as refused:
                await made.request(method, path)
            assert refused.value.code == "forbidden"
            assert "corral signin" in refused.value.message
            made.clock.advance(61)
        assert memory.kept[hub.url].signature == STRONG
        assert not any("authorization" in request.names for request in hub.received)


async def test_refused_strong_signature_is_looked_into_once_a_minute_at_most(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async def refuse(request: Received, wire: Wire) -> None:
        await wire.answer_json(401, {"error": "unauthorized"})

    async with socket_hub(strong(refuse)) as hub:
        made = client(hub, session, memory)
        for _ in range(5):
            assert (await made.request("POST", "/api/me"))[0] == 401
        # Once to agree, once to see whether the agreement still holds.
        assert [request.target for request in hub.received].count(DISCOVERY_PATH) == 2


async def test_signing_in_again_takes_a_weaker_answer_and_says_so(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    async with socket_hub(stock(ok)) as hub:
        agreed = HubTerms(signature=STRONG, public_url=hub.url)
        memory.keep_terms(hub.url, agreed)
        made = client(hub, session, memory)
        assert await made.renegotiate() == (agreed, HubTerms(signature=STOCK, public_url=hub.url))
        await made.request("POST", "/api/me")
        check_stock(hub.received[-1])


async def test_hub_that_moved_its_public_url_is_signed_for_at_the_new_one(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async def only_signed_for(request: Received, wire: Wire) -> None:
        try:
            check_strong(request, public_url)
        except CorralError:
            await wire.answer_json(401, {"error": "unauthorized"})
        else:
            await ok(request, wire)

    async with socket_hub(strong(only_signed_for)) as hub:
        public_url = hub.url
        memory.keep_terms(hub.url, HubTerms(signature=STRONG, public_url=hub.url.replace("127.0.0.1", "localhost")))
        assert (await client(hub, session, memory).request("POST", "/api/me"))[0] == 200
        assert memory.kept[hub.url].public_url == public_url


async def test_hub_that_announces_another_hubs_url_is_not_signed_for(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    async with socket_hub(strong(ok, public_url="https://hub.example.org")) as hub:
        with pytest.raises(CorralError, match=r"corral signin --hub https://hub\.example\.org"):
            await client(hub, session, memory).request("POST", "/api/me")
        assert [request.target for request in hub.received] == [DISCOVERY_PATH]
        memory.keep_terms(hub.url, HubTerms(signature=STRONG, public_url="https://hub.example.org"))
        with pytest.raises(CorralError):
            await client(hub, session, memory).request("POST", "/api/me")
        assert len(hub.received) == 1


async def test_terms_of_a_later_version_are_not_replaced_by_weaker_ones(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async with socket_hub(strong(ok)) as hub:
        memory.keep_terms(hub.url, HubTerms(signature="corral-v2", public_url=hub.url))
        with pytest.raises(CorralError, match="corral-v2"):
            await client(hub, session, memory).request("POST", "/api/me")
        assert hub.received == []


# ── Clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("offset_s", [-200, -70, 90, 290])
@pytest.mark.parametrize("is_agreed", [True, False])
async def test_strong_signature_follows_the_hubs_clock_when_ours_is_off(
    offset_s: int, is_agreed: bool, session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    theirs = NOON + timedelta(seconds=offset_s)
    date = ("Date", format_datetime(theirs, usegmt=True))

    async def checked(request: Received, wire: Wire) -> None:
        try:
            check_strong(request, hub.url, now=theirs.timestamp())
        except CorralError as error:
            await wire.answer_json(401, {"error": error.message}, date)
        else:
            await wire.answer_json(200, {}, date)

    async with socket_hub(strong(checked, date=date[1])) as hub:
        if is_agreed:
            memory.keep_terms(hub.url, HubTerms(signature=STRONG, public_url=hub.url))
        made = client(hub, session, memory)
        assert (await made.request("POST", "/api/me"))[0] == 200
        before = len(hub.received)
        assert (await made.request("POST", "/api/me"))[0] == 200
        assert len(hub.received) == before + 1


async def test_clock_that_is_far_off_is_named_and_not_worked_around(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    date = format_datetime(NOON + timedelta(seconds=412), usegmt=True)
    async with socket_hub(strong(ok, date=date)) as hub:
        with pytest.raises(CorralError, match="412 s behind") as failed:
            await client(hub, session, memory).request("POST", "/api/me")
    assert failed.value.code == "clock_skew"


# ── Where a signature may go ─────────────────────────────────────────────────────────────────────────────────────────


async def test_t047_device_signs_for_being_added_by_the_hubs_url_and_clock(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    date = format_datetime(NOON + timedelta(seconds=100), usegmt=True)
    async with socket_hub(strong(ok, date=date)) as hub:
        ours = client(hub, session, memory)
        await ours.renegotiate()
        made = await ours.enrollment("0123456789")
    assert (made["key"], made["ts"]) == (KEYS.key.public.authorized_key, int(NOON.timestamp()) + 100)
    message = enrollment_challenge(hub.url, "0123456789", int(NOON.timestamp()) + 100)
    verify_enrollment(KEYS.key.public, str(made["signature"]), message)


@pytest.mark.parametrize("url", ["http://hub.example.org", "http://192.0.2.1:11435", "http://[2001:db8::1]"])
async def test_t017_plain_http_beyond_loopback_is_not_even_contacted(
    url: str, session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    made = client(url, session, memory)
    for work in (made.request("POST", "/api/me"), made.signin_base(), made.renegotiate()):
        with pytest.raises(CorralError) as refused:
            await work
        assert refused.value.code == "forbidden"
        assert "https" in refused.value.message


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_t090_redirect_is_an_answer_and_is_not_followed(
    status: int, session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async def elsewhere(request: Received, wire: Wire) -> None:
        await wire.answer(status, b"", ("Location", "/elsewhere"))

    async with socket_hub(stock(elsewhere)) as hub:
        reply = await client(hub, session, memory).send(HubCall(method="POST", path="/api/chat", body=b"{}"))
        assert reply.status == status
        assert len(hub.received) == 2


async def test_cookies_and_proxies_of_the_environment_are_not_used(
    session: aiohttp.ClientSession, memory: MemoryHubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def sweet(request: Received, wire: Wire) -> None:
        await wire.answer_json(200, {}, ("Set-Cookie", "a=b; Path=/"))

    async with socket_hub(stock(sweet)) as hub:
        made = client(hub, session, memory)
        await made.request("POST", "/api/me")
        await made.request("POST", "/api/me")
        assert "cookie" not in hub.received[-1].names


async def test_damaged_key_sends_nothing(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    keys = FakeDeviceKeys(refusal=CorralError("invalid", "the key is damaged"))
    async with socket_hub(strong(ok)) as hub:
        with pytest.raises(CorralError, match="the key is damaged"):
            await client(hub, session, memory, keys).request("POST", "/api/me")
        assert hub.received == []


async def test_hub_is_asked_for_anew_so_that_signin_reaches_a_running_server(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async with socket_hub(stock(ok)) as one, socket_hub(strong(ok)) as two:
        made = client(one, session, memory)
        await made.request("POST", "/api/me")
        made.url = two.url
        await made.request("POST", "/api/me")
        check_stock(one.received[-1])
        check_strong(two.received[-1], two.url)


async def test_request_names_its_device_and_itself_and_asks_for_plain_bytes(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async with socket_hub(stock(ok)) as hub:
        await client(hub, session, memory).send(HubCall(method="POST", path="/api/me", headers=[("user-agent", "theirs")]))
        request = hub.received[-1]
        assert request.header("corral-device-name") == "Ada's MacBook"
        assert request.header("accept-encoding") == "identity"
        assert request.header("user-agent") == "theirs"
        assert hub.received[0].header("user-agent").startswith("corral/9.9 ")
        assert request.names["host"] == request.names["content-length"] == 1
        await client(hub, session, memory).request("POST", "/api/me")
        assert hub.received[-1].header("user-agent").startswith("corral/9.9 ")


# ── Streams and failures ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_stream_gives_bytes_as_they_arrive_and_the_connection_back(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    may_go_on = asyncio.Event()

    async def slowly(request: Received, wire: Wire) -> None:
        await wire.begin_stream()
        await wire.chunk(b"one\n")
        await may_go_on.wait()
        await wire.chunk(b"two\n")
        await wire.end_stream()

    async with socket_hub(stock(slowly)) as hub:
        stream = await client(hub, session, memory).open_stream(HubCall(method="POST", path="/api/chat", body=b"{}"))
        chunks = stream.chunks()
        assert await anext(chunks) == b"one\n"
        may_go_on.set()
        assert [chunk async for chunk in chunks] == [b"two\n"]
        await stream.close()
        await stream.close()
        assert session.connector is not None
        assert len(session.connector._conns) == 1  # type: ignore[attr-defined]  # the one kept for the next request


async def test_closing_a_stream_early_ends_the_connection(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def endless(request: Received, wire: Wire) -> None:
        await wire.begin_stream()
        await wire.chunk(b"one\n")
        await wire.has_left.wait()
        left.set_result(None)

    async with socket_hub(stock(endless)) as hub:
        stream = await client(hub, session, memory).open_stream(HubCall(method="POST", path="/api/chat", body=b"{}"))
        assert await anext(stream.chunks()) == b"one\n"
        await stream.close()
        await asyncio.wait_for(left, 5)


async def test_abandoned_streams_fail_for_their_readers_instead_of_waiting_for_ever(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async def endless(request: Received, wire: Wire) -> None:
        await wire.begin_stream()
        await wire.chunk(b"one\n")
        await wire.has_left.wait()

    async with socket_hub(stock(endless)) as hub:
        made = client(hub, session, memory)
        stream = await made.open_stream(HubCall(method="POST", path="/api/chat", body=b"{}"))
        chunks = stream.chunks()
        assert await anext(chunks) == b"one\n"
        waiting = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        made.abandon()
        with pytest.raises(CorralError) as failed:
            await asyncio.wait_for(waiting, 5)
        assert failed.value.code == "upstream_failed"
        await stream.close()


@pytest.mark.parametrize("ending", ["cut", "short"])
async def test_hub_that_dies_in_the_middle_is_an_error_and_not_an_end(
    ending: str, session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async def dying(request: Received, wire: Wire) -> None:
        if ending == "short":
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
        else:
            await wire.begin_stream()
            await wire.chunk(b"one\n")
        wire.cut()

    async with socket_hub(stock(dying)) as hub:
        stream = await client(hub, session, memory).open_stream(HubCall(method="POST", path="/api/chat", body=b"{}"))
        with pytest.raises(CorralError, match="before its answer was complete") as failed:
            async for _ in stream.chunks():
                pass
        await stream.close()
        assert failed.value.code == "upstream_failed"


async def test_kept_connection_that_the_hub_closed_is_replaced_and_signed_anew(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    answered = 0

    async def once_then_gone(request: Received, wire: Wire) -> None:
        nonlocal answered
        answered += 1
        if answered == 2:
            wire.cut()
        else:
            await ok(request, wire)

    async with socket_hub(strong(once_then_gone)) as hub:
        made = client(hub, session, memory)
        assert (await made.request("POST", "/api/me"))[0] == 200
        assert (await made.request("POST", "/api/me"))[0] == 200
        nonces = [check_strong(request, hub.url) for request in hub.received if request.target == "/api/me"]
        assert len(set(nonces)) == 3


async def test_hub_that_never_answers_a_request_is_named(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    async def cut(request: Received, wire: Wire) -> None:
        wire.cut()

    async with socket_hub(stock(cut)) as hub:
        with pytest.raises(CorralError) as failed:
            await client(hub, session, memory).request("POST", "/api/me")
        assert failed.value.code == "upstream_failed"
        assert hub.url in failed.value.message


async def test_new_connection_that_breaks_is_not_tried_again_since_the_hub_may_have_acted(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async def cut(request: Received, wire: Wire) -> None:
        wire.cut()

    async with socket_hub(cut) as hub:
        memory.keep_terms(hub.url, HubTerms(signature=STOCK, public_url=hub.url))
        with pytest.raises(CorralError):
            await client(hub, session, memory).request("POST", "/api/keys", b"{}")
        assert len(hub.received) == 1


async def test_hub_that_is_not_there_is_named_with_the_question_to_ask(
    session: aiohttp.ClientSession, memory: MemoryHubs
) -> None:
    async with socket_hub(stock(ok)) as hub:
        url = hub.url
    with pytest.raises(CorralError) as failed:
        await client(url, session, memory).request("POST", "/api/me")
    assert failed.value.code == "upstream_failed"
    assert failed.value.message == f"could not reach the hub {url}: connection refused → is it running?"


async def test_answer_that_is_no_http_is_an_error(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    async def ssh(request: Received, wire: Wire) -> None:
        await wire.send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

    async with socket_hub(stock(ssh)) as hub:
        with pytest.raises(CorralError, match="is that address a hub's"):
            await client(hub, session, memory).request("POST", "/api/me")


async def test_large_body_travels_whole_and_large_errors_are_cut(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    async def flood(request: Received, wire: Wire) -> None:
        await wire.answer(500, b"x" * 1_000_000)

    async with socket_hub(stock(flood)) as hub:
        body = b"y" * 3_000_000
        reply = await client(hub, session, memory).send(HubCall(method="POST", path="/api/chat", body=body))
        assert hub.received[-1].body == body
        assert len(reply.body) == 64 * 1024


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (aiohttp.ClientSSLError(None, OSError(1, "x")), "TLS"),  # type: ignore[arg-type]
        (ssl.SSLError(1, "x"), "SSL_CERT_FILE, for the local server too"),
        (TimeoutError(), "in time"),
        (aiohttp.ConnectionTimeoutError(), "in time"),
        (aiohttp.ServerDisconnectedError(), "without an answer"),
        (aiohttp.ClientConnectorDNSError(None, OSError(-2, "Name or service not known")), "not known"),  # type: ignore[arg-type]
        (OSError(113, "No route to host"), "no route to host"),
        (aiohttp.ClientPayloadError("secret"), "not understood"),
    ],
)
def test_reason_of_a_failure_says_what_to_do(error: Exception, words: str) -> None:
    assert words in reason_of(error)
    assert "→" in reason_of(error)
    assert "secret" not in reason_of(error)


async def test_local_server_is_not_taken_for_a_hub(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    async def script(request: Received, wire: Wire) -> None:
        assert request.target == DISCOVERY_PATH
        await wire.answer_json(200, {"corral": "1", "hub": "http://localhost:11435"})

    async with socket_hub(script) as hub:
        with pytest.raises(CorralError, match="is a local server; its hub is http://localhost:11435") as caught:
            await client(hub, session, memory).request("POST", "/api/me")
        assert caught.value.code == "invalid"
        assert memory.terms(hub.url) is None


async def test_hub_behind_a_proxy_is_asked_through_it_and_the_proxy_sees_no_signature(session: aiohttp.ClientSession) -> None:
    async def refusing(request: Received, wire: Wire) -> None:
        await wire.answer(403)

    async with socket_hub(refusing) as proxy:
        memory = MemoryHubs()
        memory.keep_terms("https://hub.example", HubTerms(signature=STOCK, public_url="https://hub.example"))
        through = Client("https://hub.example", session, memory, KEYS)
        through._proxies = ProxyRules(https=proxy.url.replace("//", "//ada:hunter2@"))
        with pytest.raises(CorralError, match="HTTPS_PROXY") as refused:
            await through.request("POST", "/api/me")
        (request,) = proxy.received
    assert (request.method, request.target) == ("CONNECT", "hub.example:443")
    assert request.header("proxy-authorization").startswith("Basic ")
    assert request.header("authorization") == ""
    assert "hunter2" not in refused.value.message


async def test_hub_on_this_machine_is_never_asked_through_a_proxy(session: aiohttp.ClientSession, memory: MemoryHubs) -> None:
    async def me(request: Received, wire: Wire) -> None:
        await wire.answer_json(200, {"name": "ada"})

    async with socket_hub(stock(me)) as hub:
        direct = client(hub, session, memory)
        direct._proxies = ProxyRules(http="http://127.0.0.1:1", https="http://127.0.0.1:1")
        assert (await direct.request("POST", "/api/me"))[0] == 200
