"""Connections byte by byte: bounds on what is parsed, exact targets, answers to whoever still sends, files sent by the kernel."""

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import PUBLIC
from corral.edges import connection
from corral.edges.asgi import App, AppOptions, body_of, body_stream, endpoint, facts_of, json_response
from corral.edges.blob_response import Blob, bare_response, blob_response
from corral.edges.connection import State, connection_factory
from corral.edges.stream_response import stream
from fakes_registry import digest_of

pytestmark = pytest.mark.flow

CONTENT = os.urandom(9 * 1024 * 1024 + 3)


class Served:
    """An application behind real connections. seen: what its handlers were given."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str | bytes] = []
        self.goes_on = asyncio.Event()
        self.state = State()
        self.port = 0
        self.path = folder / "blob"
        self.path.write_bytes(CONTENT)
        rows = [
            endpoint("GET,POST", "/echo", self._echo, PUBLIC),
            endpoint("POST", "/refuse", self._refuse, PUBLIC, streams_body=True),
            endpoint("PUT", "/keep", self._keep, PUBLIC, streams_body=True),
            endpoint("GET,HEAD", "/blob", self._blob, PUBLIC),
            endpoint("GET", "/nothing", self._nothing, PUBLIC),
            endpoint("POST", "/headers", self._headers, PUBLIC),
            endpoint("GET", "/wait", self._wait, PUBLIC, cancel_on_disconnect=True),
        ]
        self.app = App(rows, AppOptions())

    async def _echo(self, request: Request) -> Response:
        self.seen += [request.scope["raw_path"] + b"?" + request.scope["query_string"], body_of(request)]
        return json_response({"length": len(body_of(request))})

    async def _refuse(self, request: Request) -> Response:
        return json_response({"error": "no"}, 403)

    async def _keep(self, request: Request) -> Response:
        size = 0
        async for part in body_stream(request):
            size += len(part)
        return json_response({"length": size})

    async def _nothing(self, request: Request) -> Response:
        return bare_response(204, {})

    async def _headers(self, request: Request) -> Response:
        return json_response(list(facts_of(request).headers))

    async def _wait(self, request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"begun"
            await self.goes_on.wait()
            yield b"end"

        return await stream(request, parts(), bytes, content_type="text/plain", error_frame=lambda _: b"")

    @property
    def is_deaf(self) -> bool:
        """Whether the only connection reads no more for now."""
        [only] = self.state.connections
        return bool(only.flow.read_paused)

    async def _blob(self, request: Request) -> Response:
        blob = Blob(digest=digest_of(CONTENT), size_bytes=len(CONTENT), source=str(self.path))
        return await blob_response(request, blob, {})

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def say(self, *parts: bytes) -> bytes:
        """What comes back until the server closes."""
        reader, writer = await self.open()
        try:
            for part in parts:
                writer.write(part)
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(tmp_path)
    server = await asyncio.get_running_loop().create_server(connection_factory(made.app, made.state), "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()
    for left in tuple(made.state.connections):
        left.transport.abort()
    async with asyncio.timeout(20):
        await made.state.wait_until_idle()


def request(method: str, target: str, body: bytes = b"", *headers: str, keep: bool = False) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers, *(() if keep else ("Connection: close",))]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def bodies(answers: bytes) -> list[bytes]:
    """The bodies of answers that came one after another."""
    found = []
    while answers:
        head, _, rest = answers.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])  # type: ignore[index]
        found.append(rest[:length])
        answers = rest[length:]
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208


async def until(condition: "Iterator[bool]") -> None:
    async with asyncio.timeout(20):
        while not next(condition):
            await asyncio.sleep(0.005)


async def test_answer_carries_the_date_and_closes_when_asked_to(served: Served) -> None:
    answer = await served.say(request("POST", "/echo", b"{}"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert re.search(rb"\r\ndate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n", answer)
    assert b"\r\nconnection: close\r\n" in answer


async def test_head_of_an_answer_leaves_together_with_its_body(served: Served) -> None:
    with contextlib.closing(socket.create_connection(("127.0.0.1", served.port))) as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, request("POST", "/echo", b"abc", keep=True))
        assert (await asyncio.wait_for(loop.sock_recv(client, 65536), 20)).endswith(b'{"length":3}')


@pytest.mark.parametrize(
    "target", ["/echo?b=%20&a=%6d&", "/%65cho", "//echo", "/echo/../echo", "http://other/echo", "/echo#x", "*", "echo"]
)
async def test_t110_target_arrives_exactly_as_sent_or_is_refused(served: Served, target: str) -> None:
    answer = await served.say(request("GET", target))
    if answer.startswith(b"HTTP/1.1 200"):
        assert served.seen[0] == target.encode()
        assert target.startswith("/echo?")
    else:
        assert answer.startswith(b"HTTP/1.1 400")
        assert served.seen == []


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 3\r\nContent-Length: 4",
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 3",
        "Content-Length: +3",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
        "X: a\n y",
        "X: a\x00b",
    ],
)
async def test_t110_ambiguous_head_is_refused_and_the_connection_ends(served: Served, lines: str) -> None:
    head = f"POST /echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}\r\n\r\n".encode()
    answer = await served.say(head + b"3\r\nabc\r\n0\r\n\r\nGET /echo HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    assert served.seen == []


async def test_t110_chunks_of_http_1_0_are_refused(served: Served) -> None:
    head = b"POST /echo HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"
    answer = await served.say(head + b"3\r\nabc\r\n0\r\n\r\n" + request("GET", "/echo"))
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    assert served.seen == []


@pytest.mark.parametrize(
    "flood",
    [
        b"GET /" + b"a" * 1_000_000,
        b"GET / HTTP/1.1\r\nX: " + b"a" * 1_000_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200_000,
        b"\r\n" * 500_000,
        request("PUT", "/keep", b"", "Transfer-Encoding: chunked") + b"1;" + b"a" * 1_000_000,
        request("PUT", "/keep", b"", "Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\n" + b"X: y\r\n" * 200_000,
    ],
    ids=["target", "header", "headers", "empty lines", "chunk extension", "trailers"],
)
async def test_t110_head_without_end_is_ended_by_the_server(served: Served, flood: bytes) -> None:
    reader, writer = await served.open()
    with contextlib.suppress(ConnectionError):
        writer.write(flood)
        answer = await asyncio.wait_for(reader.read(), 20)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")) or not answer
    writer.close()


async def test_r14_number_of_headers_is_bounded(served: Served) -> None:
    few = ["X: y"] * (connection.MAX_HEADERS - 2)
    assert (await served.say(request("GET", "/echo", b"", *few))).startswith(b"HTTP/1.1 200")
    answer = await served.say(request("GET", "/echo", b"", *few, "X: y"))
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.endswith(b"The head of the request is too large.")


async def test_requests_sent_at_once_are_answered_in_order(served: Served) -> None:
    sent = [request("POST", "/echo", b"x" * size, keep=True) for size in (1, 2)]
    assert bodies(await served.say(*sent, request("POST", "/echo", b"xxx"))) == [
        b'{"length":1}',
        b'{"length":2}',
        b'{"length":3}',
    ]


async def test_r14_requests_sent_at_once_are_bounded(served: Served) -> None:
    with contextlib.suppress(ConnectionError):
        await served.say(request("POST", "/echo", b"x", keep=True) * 10_000)
    assert len(served.seen) <= 2 * (connection.MAX_WAITING + 1)


async def test_nothing_is_done_of_what_follows_the_last_request(served: Served) -> None:
    answer = await served.say(request("POST", "/echo", b"x"), request("POST", "/echo", b"xx"))
    assert bodies(answer) == [b'{"length":1}']
    assert len(served.seen) == 2


@pytest.mark.parametrize("at_once", [True, False])
async def test_offer_to_upgrade_is_passed_over(served: Served, at_once: bool) -> None:
    # What Java's client sends first to every server that it does not know yet.
    offer = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"]
    first = "\r\n".join(["POST /echo?a=b HTTP/1.1", "Host: localhost", *offer, "Content-Length: 5", "", "hello"]).encode()
    second = request("POST", "/echo", b"xx")
    parts = [first + second] if at_once else [first[index : index + 7] for index in range(0, len(first), 7)] + [second]
    assert bodies(await served.say(*parts)) == [b'{"length":5}', b'{"length":2}']
    assert served.seen[:2] == [b"/echo?a=b", b"hello"]


async def test_connect_is_refused(served: Served) -> None:
    assert (await served.say(b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n")).startswith(b"HTTP/1.1 400")


async def test_client_that_waits_to_be_asked_for_its_body_is_asked(served: Served) -> None:
    reader, writer = await served.open()
    writer.write(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"abc")
    assert b'{"length":3}' in await asyncio.wait_for(reader.readuntil(b"}"), 20)
    writer.close()


@pytest.mark.parametrize("ending", [(), ("Connection: close",)])
async def test_f26_sender_of_a_refused_body_sees_the_answer(served: Served, ending: tuple[str, ...]) -> None:
    size = 20 * 1024 * 1024
    reader, writer = await served.open()
    writer.write(request("POST", "/refuse", b"", f"Content-Length: {size}", *ending, keep=True))
    for _ in range(20):
        writer.write(b"x" * 1024 * 1024)
        await writer.drain()
    assert (await asyncio.wait_for(reader.readuntil(b"}"), 20)).startswith(b"HTTP/1.1 403")
    # All of it came, so this connection is as good as new, unless it was to end.
    writer.write(request("POST", "/echo", b"xx"))
    assert bodies(await asyncio.wait_for(reader.read(), 20)) == ([] if ending else [b'{"length":2}'])
    writer.close()


@pytest.mark.parametrize(("name", "value"), [("LINGER_S", 0.0), ("LINGER_BYTES", 1000), ("LINGER_PAUSE_S", 0.02)])
async def test_f26_rest_of_a_refused_body_is_read_within_bounds(
    served: Served, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LINGER_PAUSE_S", 0.05)
    monkeypatch.setattr(connection, name, value)
    reader, writer = await served.open()
    writer.write(request("POST", "/refuse", b"", "Content-Length: 1000000000", keep=True))
    answer = await asyncio.wait_for(reader.readuntil(b"}"), 20)
    assert answer.startswith(b"HTTP/1.1 403")
    with contextlib.suppress(ConnectionError):
        if name != "LINGER_PAUSE_S":
            for _ in range(100_000):
                writer.write(b"x" * 2000)
                await writer.drain()
                if reader.at_eof():
                    break
                await asyncio.sleep(0.005)
        assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


async def test_answer_without_a_body_arrives_at_once(served: Served) -> None:
    reader, writer = await served.open()
    for method, path, expected in (("HEAD", "/blob", b"content-length: %d\r\n" % len(CONTENT)), ("GET", "/nothing", b" 204 ")):
        writer.write(request(method, path, keep=True))
        assert expected in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    writer.close()


@pytest.mark.parametrize(("wanted", "expected"), [((), CONTENT), (("Range: bytes=5-8000004",), CONTENT[5:8000005])])
async def test_file_arrives_whole_or_in_part(served: Served, wanted: tuple[str, ...], expected: bytes) -> None:
    before = open_files()
    [body] = bodies(await served.say(request("GET", "/blob", b"", *wanted)))
    assert body == expected
    await until(open_files() <= before for _ in iter(int, 1))


async def test_files_and_answers_follow_each_other_on_one_connection(served: Served) -> None:
    asked = [request("GET", "/blob", b"", keep=True), request("POST", "/echo", b"x", keep=True), request("GET", "/blob")]
    assert bodies(await served.say(*asked)) == [CONTENT, b'{"length":1}', CONTENT]


async def test_f24_file_that_gets_shorter_while_it_is_sent_ends_the_connection(served: Served) -> None:
    reader, writer = await served.open()
    writer.write(request("GET", "/blob", keep=True))
    await reader.readuntil(b"\r\n\r\n")
    os.truncate(served.path, 1000)
    with contextlib.suppress(ConnectionError):
        assert len(await asyncio.wait_for(reader.read(), 20)) < len(CONTENT)
    writer.close()


async def test_r07_reader_who_leaves_in_the_middle_of_a_file_leaves_nothing_open(served: Served) -> None:
    before = open_files()
    reader, writer = await served.open()
    writer.write(request("GET", "/blob", keep=True))
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    await until(not served.state.tasks and open_files() <= before for _ in iter(int, 1))


async def test_r07_reader_who_stops_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_STALL_S", 0.05)
    before = open_files()
    with contextlib.closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", served.port))
        await loop.sock_sendall(client, request("GET", "/blob", keep=True))
        await until(bool(served.state.tasks) for _ in iter(int, 1))
        await until(not served.state.connections and open_files() <= before + 1 for _ in iter(int, 1))


async def test_idle_connection_is_closed_and_a_busy_one_after_its_answer(served: Served) -> None:
    reader, writer = await served.open()
    writer.write(request("POST", "/echo", b"x", keep=True))
    await asyncio.wait_for(reader.readuntil(b"}"), 20)
    [only] = served.state.connections
    only.shutdown()
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


async def test_t110_trailers_are_no_headers(served: Served) -> None:
    trailers = b"X-Forwarded-For: 192.0.2.1\r\nAuthorization: Bearer x\r\nHost: other\r\n"
    sent = request("POST", "/headers", b"", "Transfer-Encoding: chunked", keep=True) + b"3\r\nabc\r\n0\r\n"
    [names, _] = bodies(await served.say(sent + trailers + b"\r\n" + request("POST", "/echo", b"x")))
    assert names == b'["host","transfer-encoding"]'


@pytest.mark.parametrize(
    "behind",
    [b"\x01\x02\r\n\r\n", request("POST", "/echo", b"x", keep=True) + b"\x01\x02", request("GET", "/echo", keep=True) * 50],
    ids=["at once", "behind another", "too many"],
)
async def test_t110_what_cannot_be_parsed_never_lands_inside_of_an_answer(served: Served, behind: bytes) -> None:
    reader, writer = await served.open()
    writer.write(request("GET", "/wait", keep=True))
    answer = await asyncio.wait_for(reader.readuntil(b"begun"), 20)
    writer.write(behind)
    await until(served.is_deaf for _ in iter(int, 1))
    served.goes_on.set()
    answer += await asyncio.wait_for(reader.read(), 20)
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b"\r\n3\r\nend\r\n0\r\n\r\n")
    assert served.seen == []
    writer.close()


async def test_t110_damaged_rest_of_a_refused_body_gets_no_second_answer(served: Served) -> None:
    reader, writer = await served.open()
    writer.write(request("POST", "/refuse", b"", "Transfer-Encoding: chunked", keep=True) + b"1\r\na\r\n")
    await asyncio.wait_for(reader.readuntil(b"}"), 20)
    writer.write(b"x\r\n")
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


async def test_r07_who_leaves_with_requests_waiting_ends_the_one_that_runs(served: Served) -> None:
    reader, writer = await served.open()
    writer.write(request("GET", "/wait", keep=True))
    await asyncio.wait_for(reader.readuntil(b"begun"), 20)
    writer.write(request("POST", "/echo", b"x", keep=True))
    await until(served.is_deaf for _ in iter(int, 1))
    [only] = served.state.connections
    only.transport.abort()
    writer.close()
    await until(not served.state.tasks for _ in iter(int, 1))
    assert served.seen == []


async def test_r16_connection_that_rests_too_long_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.05)
    reader, writer = await served.open()
    writer.write(request("POST", "/echo", b"x", keep=True))
    await asyncio.wait_for(reader.readuntil(b"}"), 20)
    assert await asyncio.wait_for(reader.read(), 20) == b""
    await until(not served.state.connections for _ in iter(int, 1))
    writer.close()


async def test_connection_rests_from_its_last_answer_on(served: Served) -> None:
    reader, writer = await served.open()
    writer.write(request("POST", "/echo", b"x", keep=True))
    await asyncio.wait_for(reader.readuntil(b"}"), 20)
    [only] = served.state.connections
    only._idle_since -= connection.IDLE_S - 1
    only._look_at_idleness()
    writer.write(request("POST", "/echo", b"y", keep=True))
    await asyncio.wait_for(reader.readuntil(b"}"), 20)
    only._look_at_idleness()
    assert not only.transport.is_closing()
    only._idle_since -= connection.IDLE_S
    only._look_at_idleness()
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


async def test_request_right_behind_a_refused_body_gets_all_the_time_it_takes(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.0)
    reader, writer = await served.open()
    writer.write(request("POST", "/refuse", b"", "Content-Length: 3", keep=True))
    await asyncio.wait_for(reader.readuntil(b"}"), 20)
    [only] = served.state.connections
    writer.write(b"abc" + request("GET", "/wait", keep=True))
    await asyncio.wait_for(reader.readuntil(b"begun"), 20)
    only._look_at_idleness()
    assert not only.transport.is_closing()
    served.goes_on.set()
    await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
    writer.close()


async def test_http_1_0_gets_no_chunks(served: Served) -> None:
    served.goes_on.set()
    answer = await served.say(request("GET", "/wait", keep=True).replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b"begunend"
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
