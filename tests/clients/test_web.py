"""Pages fetched for strangers, and the operator's search engine: what is reached, and what is never even dialled."""

import asyncio
import gzip
import ipaddress
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from corral.clients.web import (
    MAX_PAGE_BYTES,
    NameThreads,
    PageClient,
    PublicResolver,
    SearxngClient,
    open_page_session,
    open_search_session,
)
from corral.wire.errors import CorralError
from corral.wire.webpage import parse_page_address

LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
COULD_NOT = (502, "the page could not be fetched")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _row(host: str, address: str, port: int) -> ResolveResult:
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=0)


class Names(AbstractResolver):
    """A resolver of given names; each asking takes the next of a name's answers, and the last one again."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): rows for name, rows in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        self.asked.append(host)
        rows = self.answers.get(host)
        if not rows:
            raise OSError("unknown name")
        found = rows.pop(0) if len(rows) > 1 else rows[0]
        return [_row(host, address, port) for address in found]

    async def close(self) -> None:
        pass


class Web:
    """A client of the open web whose names mean what a test says, and which counts what it dials."""

    def __init__(self, names: Names, allowed: tuple[Any, ...] = (), *, time_s: float = 15.0) -> None:
        self.dialled: list[Any] = []
        self._resolver = PublicResolver(allowed, names)
        self._time_s = time_s

    def _socket(self, address: Any) -> socket.socket:
        self.dialled.append(address[4])
        return socket.socket(address[0], address[1], address[2])

    async def fetch(self, url: str) -> Any:
        async with open_page_session(self._resolver, make_socket=self._socket) as session:
            client = PageClient(session, self._resolver, user_agent="corral/test", time_s=self._time_s)
            return await client.fetch(parse_page_address(url))

    async def refusal(self, url: str) -> tuple[int, str]:
        with pytest.raises(CorralError) as refused:
            await self.fetch(url)
        return refused.value.status, refused.value.message


@asynccontextmanager
async def site(handler: Handler) -> AsyncIterator[int]:
    """A web server on this machine; gives its port."""
    server = web.Server(handler)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    place = web.TCPSite(runner, "127.0.0.1", 0)
    await place.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def here(**more: list[list[str]]) -> Names:
    return Names(site_test=[["127.0.0.1"]], **more)


# ── What is never dialled ────────────────────────────────────────────────────────────────────────────────────────────

INTERNAL = [
    "127.0.0.1", "127.255.0.9", "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.9.9", "192.168.0.1",
    "100.64.0.1", "100.100.100.200", "169.254.169.254", "169.254.0.1", "168.63.129.16", "192.0.0.1", "192.0.2.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "[::]", "[::1]", "[::2]",
    "[::127.0.0.1]", "[::10.0.0.1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[::ffff:169.254.169.254]", "[::ffff:a00:1]",
    "[64:ff9b::127.0.0.1]", "[64:ff9b::a00:1]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2002:a00:1::]", "[2002:a9fe:a9fe::]",
    "[fc00::1]", "[fd00::1]", "[fd00:ec2::254]", "[fe80::1]", "[fec0::1]", "[ff02::1]", "[ff0e::1]", "[100::1]", "[2001::1]",
    "[2001:db8::1]", "[2001:10::1]", "[::ffff:0:127.0.0.1]", "192.0.0.192",
    "[::ffff:168.63.129.16]", "[64:ff9b::a83f:8110]", "[2002:a83f:8110::]",
]  # fmt: skip


@pytest.mark.parametrize("host", INTERNAL)
async def test_t098_internal_address_is_never_dialled(host: str) -> None:
    names = Names(name_test=[[host.strip("[]")]])
    client = Web(names)
    assert await client.refusal(f"http://{host}/") == COULD_NOT
    assert names.asked == []
    assert await client.refusal("http://name.test/") == COULD_NOT
    assert client.dialled == []


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433/", "http://0x7f000001/", "http://017700000001/", "http://0177.0.0.1/", "http://127.1/", "http://0/",
        "http://localhost/", "http://localhost.localdomain/", "http://0x7f.1/", "https://metadata.google.internal/",
    ],
)  # fmt: skip
async def test_t098_address_in_disguise_is_never_dialled(url: str) -> None:
    client = Web(
        Names(localhost=[["127.0.0.1"]], localhost_localdomain=[["::1"]], metadata_google_internal=[["169.254.169.254"]])
    )
    with pytest.raises(CorralError):
        await client.fetch(url)
    assert client.dialled == []


async def test_t099_name_with_one_internal_address_among_public_ones_is_refused() -> None:
    client = Web(Names(mixed_test=[["8.8.8.8", "10.0.0.1"]]))
    assert await client.refusal("https://mixed.test/") == COULD_NOT
    assert client.dialled == []


async def test_t099_name_is_asked_once_for_what_is_dialled() -> None:
    async def page(request: web.Request) -> web.Response:
        return web.Response(text="here")

    async with site(page) as port:
        names = Names(site_test=[["127.0.0.1"], ["169.254.169.254"]])
        client = Web(names, (LOOPBACK,))
        assert (await client.fetch(f"http://site.test:{port}/")).text == "here"
        assert names.asked == ["site.test"]
        assert client.dialled == [("127.0.0.1", port)]
        assert await client.refusal(f"http://site.test:{port}/") == COULD_NOT
        assert len(client.dialled) == 1


@pytest.mark.parametrize("port", [22, 25, 6379, 8080, 11434])
async def test_t098_other_ports_of_public_addresses_are_not_dialled(port: int) -> None:
    client = Web(Names(name_test=[["8.8.8.8"]]))
    assert await client.refusal(f"http://name.test:{port}/") == COULD_NOT
    assert client.dialled == []


async def test_t098_link_local_address_is_not_dialled_even_where_everything_is_allowed() -> None:
    everything = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
    client = Web(Names(), everything)
    for host in ("169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "168.63.129.16"):
        assert await client.refusal(f"http://{host}/") == COULD_NOT
    assert client.dialled == []


# ── Redirects ────────────────────────────────────────────────────────────────────────────────────────────────────────


def leading(to: str, *, after: int = 0) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        count = int(request.query.get("n", "0"))
        if count < after:
            raise web.HTTPFound(f"?n={count + 1}")
        return web.Response(status=302, headers={"Location": to}, text="secret")

    return answer


@pytest.mark.parametrize("hop", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("to", ["http://10.0.0.1/", "http://inner.test/", "http://169.254.169.254/latest/meta-data/"])
async def test_t100_redirect_to_an_internal_address_is_not_followed(to: str, hop: int) -> None:
    async with site(leading(to, after=hop)) as port:
        client = Web(here(inner_test=[["192.168.1.1"]]), (LOOPBACK,))
        assert await client.refusal(f"http://site.test:{port}/") == COULD_NOT
        assert {address[0] for address in client.dialled} == {"127.0.0.1"}


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "gopher://x/", "ftp://x/", "data:text/html,x", "http://ada@site.test/", "//"]
)
async def test_t100_redirect_to_what_is_no_page_is_refused(to: str) -> None:
    async with site(leading(to)) as port:
        with pytest.raises(CorralError) as refused:
            await Web(here(), (LOOPBACK,)).fetch(f"http://site.test:{port}/")
    assert "secret" not in refused.value.message


async def test_t100_sixth_redirect_is_not_followed() -> None:
    async with site(leading("/end", after=99)) as port:
        assert await Web(here(), (LOOPBACK,)).refusal(f"http://site.test:{port}/") == (502, "the page leads on and on")


async def test_redirect_on_the_same_place_is_followed_and_told() -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/":
            raise web.HTTPFound("/there?x=1")
        return web.Response(text="<title>t</title>", content_type="text/html")

    async with site(answer) as port:
        page = await Web(here(), (LOOPBACK,)).fetch(f"http://site.test:{port}")
    assert str(page.address) == f"http://site.test:{port}/there?x=1"
    assert (page.media_type, page.text) == ("text/html", "<title>t</title>")


# ── Bounds, and what travels ─────────────────────────────────────────────────────────────────────────────────────────


async def test_t101_proxy_of_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    # Patched because that is where such variables come from; nothing of ours reads them there.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="direct")

    async with site(answer) as port:
        assert (await Web(here(), (LOOPBACK,)).fetch(f"http://site.test:{port}/")).text == "direct"


async def test_t102_endless_page_is_cut() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        for _ in range(2 * MAX_PAGE_BYTES // 65536):
            await response.write(b"x" * 65536)
        return response

    async with site(answer) as port:
        page = await Web(here(), (LOOPBACK,)).fetch(f"http://site.test:{port}/")
    assert len(page.text) == MAX_PAGE_BYTES


async def test_t102_page_that_unpacks_without_end_is_cut() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(b"x" * (4 * MAX_PAGE_BYTES)), headers={"Content-Encoding": "gzip"})

    async with site(answer) as port:
        page = await Web(here(), (LOOPBACK,)).fetch(f"http://site.test:{port}/")
    assert len(page.text) == MAX_PAGE_BYTES


@pytest.mark.parametrize(
    ("start", "goes_on"),
    [(gzip.compress(b"the page"), b"x" * 65536), (gzip.compress(b"", 0)[:10], b"\x00\x00\x00\xff\xff" * 13107)],
    ids=["behind its end", "in empty blocks"],
)
async def test_t102_packed_page_that_goes_on_without_a_word_more_is_cut(start: bytes, goes_on: bytes) -> None:
    sent = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Encoding": "gzip", "Content-Type": "text/plain"})
        await response.prepare(request)
        await response.write(start)
        # As the client hangs up, writing fails or the task ends; the test's own end is 60 MB away.
        while sent < 60_000_000:
            await response.write(goes_on)
            sent += len(goes_on)
        return response

    async with site(answer) as port:
        page = await Web(here(), (LOOPBACK,)).fetch(f"http://site.test:{port}/")
    assert page.text in ("the page", "")
    assert sent < 4 * MAX_PAGE_BYTES


@pytest.mark.parametrize(("coding", "body"), [("gzip", b"no gzip"), ("br", b"x"), ("gzip, gzip", b"x")])
async def test_t102_coding_that_cannot_be_undone_is_refused(coding: str, body: bytes) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, headers={"Content-Encoding": coding})

    async with site(answer) as port:
        assert await Web(here(), (LOOPBACK,)).refusal(f"http://site.test:{port}/") == COULD_NOT


async def test_t102_page_that_drips_is_given_up() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.02)

    async with site(answer) as port:
        assert await Web(here(), (LOOPBACK,), time_s=0.3).refusal(f"http://site.test:{port}/") == COULD_NOT


async def test_t104_nothing_of_ours_travels() -> None:
    heard: dict[str, str] = {}

    async def answer(request: web.Request) -> web.Response:
        heard.update({name.lower(): value for name, value in request.headers.items()})
        return web.Response(text="x", headers={"Set-Cookie": "a=b"})

    async with site(answer) as port:
        client = Web(here(), (LOOPBACK,))
        await client.fetch(f"http://site.test:{port}/")
        await client.fetch(f"http://site.test:{port}/")
    assert set(heard) == {"host", "accept", "accept-encoding", "user-agent", "connection"}


async def test_t104_error_tells_no_address_and_no_byte_of_what_is_there() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=403, text="root:x:0:0")

    async with site(answer) as port:
        client = Web(here(closed_test=[["127.0.0.1"]]), (LOOPBACK,))
        assert await client.refusal(f"http://site.test:{port}/") == (502, "the page answered 403")
        # Refused by policy, by the machine, and by the name: nobody can tell them apart.
        for url in ("http://10.0.0.1/", "http://closed.test:1/", "http://unknown.test/"):
            assert await client.refusal(url) == COULD_NOT


@pytest.mark.parametrize(
    ("content_type", "body", "text"),
    [
        ("text/html; charset=iso-8859-1", b"caf\xe9", "café"),
        ("text/html", b'<meta charset="windows-1252">\x80', '<meta charset="windows-1252">€'),
        ("text/html", "café".encode(), "café"),
        ("text/html; charset=punycode", b"caf\xc3\xa9", "café"),
        ("text/html; charset=rot13", b"abc", "abc"),
        ("text/html; charset=nonsense", b"\xff", "�"),
        # Seconds for a page of it, in which no other thread runs, and no browser reads it.
        ("text/html; charset=utf-7", b"+AOk-", "+AOk-"),
        ("text/html; charset=utf-16", "é".encode("utf-16-be"), "\ue900"),
        ("text/html; charset=utf-16", b"\xfe\xff" + "é".encode("utf-16-be"), "é"),
        ("text/html; charset=utf-32", "é".encode("utf-32-le"), "é"),
        # Longer than what is decoded at a time, and cut within a character.
        ("text/html; charset=shift_jis", b"a" + "語".encode("shift_jis") * 40_000, "a" + "語" * 40_000),
        ("text/html", b"a" + "é".encode() * 40_000 + b"\xc3", "a" + "é" * 40_000 + "�"),
    ],
)
async def test_page_is_decoded_as_it_says(content_type: str, body: bytes, text: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, headers={"Content-Type": content_type})

    async with site(answer) as port:
        assert (await Web(here(), (LOOPBACK,)).fetch(f"http://site.test:{port}/")).text == text


async def test_t102_names_that_nobody_answers_for_keep_no_thread_from_anything_else() -> None:
    answered = threading.Event()

    def look_up(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        answered.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))]

    names = NameThreads(look_up)
    waiting = [asyncio.create_task(names.resolve(f"{number}.test", 443)) for number in range(50)]
    try:
        # As many threads as asyncio has for everything would be held by those.
        assert await asyncio.wait_for(asyncio.to_thread(int, "7"), 30) == 7
        assert not any(task.done() for task in waiting)
    finally:
        answered.set()
    assert [rows[0]["host"] for rows in await asyncio.gather(*waiting)] == ["192.0.2.1"] * 50
    await names.close()


async def test_names_are_looked_up_as_the_system_does() -> None:
    names = NameThreads()
    assert {row["host"] for row in await names.resolve("localhost", 80)} & {"127.0.0.1", "::1"}
    await names.close()


# ── The search engine ────────────────────────────────────────────────────────────────────────────────────────────────


async def searched(handler: Handler, count: int = 2) -> Any:
    async with site(handler) as port, open_search_session() as session:
        return await SearxngClient(session, f"http://127.0.0.1:{port}/search", user_agent="corral/test").search("a & b", count)


async def test_search_asks_for_json_and_gives_the_first_usable_rows() -> None:
    heard: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        heard.append((request.path, dict(request.query)))
        rows = [
            {"title": "one", "url": "https://one.example/", "content": "first", "score": 3},
            {"title": "bad", "url": "javascript:alert(1)", "content": "x"},
            "nonsense",
            {"title": "two", "url": "https://two.example/"},
            {"title": "three", "url": "https://three.example/"},
        ]
        return web.json_response({"query": "x", "results": rows})

    found = await searched(answer)
    assert heard == [("/search", {"q": "a & b", "format": "json"})]
    assert [(row.title, row.url, row.content) for row in found] == [
        ("one", "https://one.example/", "first"),
        ("two", "https://two.example/", ""),
    ]


@pytest.mark.parametrize(
    ("status", "body", "refused"),
    [
        (403, "no json here", (502, "the search engine refuses answers in JSON")),
        (429, "", (429, "the search engine has had too many searches")),
        (500, "", (502, "the search engine's answer is not understood")),
        (200, "<html>", (502, "the search engine's answer is not understood")),
        (200, json.dumps({"results": {}}), (502, "the search engine's answer is not understood")),
        (302, "", (502, "the search engine's answer is not understood")),
        (200, "x" * (5 << 20), (502, "the search engine could not be reached")),
    ],
    ids=["forbidden", "limited", "broken", "page", "shape", "redirect", "large"],
)
async def test_search_engine_that_does_not_answer_is_told_in_a_sentence(status: int, body: str, refused: tuple[int, str]) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=body, headers={"Location": "http://127.0.0.1:1/"})

    with pytest.raises(CorralError) as error:
        await searched(answer)
    assert error.value.status == refused[0]
    assert error.value.message.startswith(refused[1])


async def test_search_engine_that_is_away_is_told_without_its_address() -> None:
    async with open_search_session() as session:
        with pytest.raises(CorralError) as error:
            await SearxngClient(session, "http://127.0.0.1:1/search", user_agent="x").search("q", 1)
    assert (error.value.status, error.value.message) == (502, "the search engine could not be reached")
