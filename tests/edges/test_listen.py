"""Serving and ending: a taken port, draining, streams that outlast it, requests that hang, and the second signal."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import PUBLIC
from corral.edges import connection, listen
from corral.edges.asgi import App, AppOptions, endpoint, json_response
from corral.edges.bodies import BodyLimits
from corral.edges.listen import serve
from corral.edges.port import check_free, listening_socket, resolve
from corral.edges.stream_response import stream
from corral.wire.errors import CorralError
from corral.wire.frames import encode_ndjson, ndjson_error

pytestmark = pytest.mark.flow


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def app_of(events: Callable[[], AsyncGenerator[dict[str, Any], None]]) -> App:
    async def answer(request: Request) -> Response:
        return await stream(request, events(), encode_ndjson, content_type="application/x-ndjson", error_frame=ndjson_error)

    async def alive(request: Request) -> Response:
        return json_response({"alive": True})

    return App([endpoint("GET", "/stream", answer, PUBLIC), endpoint("GET", "/", alive, PUBLIC)], AppOptions())


class Served:
    """A running `serve` and a raw connection to it."""

    def __init__(self, app: App, *, drain_s: float, release: Callable[[], Awaitable[None]] | None = None) -> None:
        self.port = free_port()
        self.stop = asyncio.Event()
        self.ready = asyncio.Event()
        self.released = 0

        async def release_all() -> None:
            self.released += 1
            if release:
                await release()

        self.task = asyncio.create_task(
            serve(app, "localhost", self.port, on_ready=self.ready.set, release=release_all, stop=self.stop, drain_s=drain_s)
        )

    async def get(self, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        await asyncio.wait_for(self.ready.wait(), 20)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return reader, writer

    async def say(self, data: bytes) -> bytes:
        """What comes back until the server closes the connection."""
        await asyncio.wait_for(self.ready.wait(), 20)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()

    async def ended(self) -> None:
        await asyncio.wait_for(self.task, 20)


async def test_serve_answers_and_ends_when_told_to() -> None:
    served = Served(app_of(lambda: no_events()), drain_s=5)
    reader, writer = await served.get("/")
    assert b'{"alive":true}' in await reader.read()
    writer.close()
    served.stop.set()
    await served.ended()
    assert served.released == 0
    with pytest.raises(OSError):  # noqa: PT011 - any refusal will do
        await asyncio.open_connection("127.0.0.1", served.port)


async def no_events() -> AsyncGenerator[dict[str, Any], None]:
    return
    yield {}


async def test_r12_stream_that_ends_in_time_is_let_finish() -> None:
    go_on = asyncio.Event()

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        yield {"n": 1}
        await go_on.wait()
        yield {"n": 2}

    served = Served(app_of(events), drain_s=10)
    reader, writer = await served.get("/stream")
    await reader.readuntil(b'{"n":1}')
    served.stop.set()
    await asyncio.sleep(0)
    go_on.set()
    assert b'{"n":2}' in await reader.read()
    writer.close()
    await served.ended()
    assert served.released == 0


async def test_r12_stream_that_outlasts_the_drain_ends_with_an_error_line() -> None:
    async def events() -> AsyncGenerator[dict[str, Any], None]:
        while True:
            yield {"n": 1}
            await asyncio.sleep(0.01)

    served = Served(app_of(events), drain_s=0.05)
    reader, writer = await served.get("/stream")
    await reader.readuntil(b'{"n":1}')
    served.stop.set()
    assert b'{"error":"the server is shutting down"}' in await reader.read()
    writer.close()
    await served.ended()
    assert served.released == 1


@pytest.mark.parametrize("has_begun", [True, False])
async def test_r12_whoever_waits_for_an_engine_is_freed_by_releasing_it_and_told_why(has_begun: bool) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        if has_begun:
            yield {"n": 1}
        asked.set()
        await gone.wait()
        raise CorralError("engine_failed", "the engine ended (signal 9)")

    async def release() -> None:
        gone.set()

    served = Served(app_of(events), drain_s=0.05, release=release)
    reader, writer = await served.get("/stream")
    await asked.wait()
    served.stop.set()
    answer = await reader.read()
    assert b'{"error":"the server is shutting down"}' in answer
    assert answer.startswith(b"HTTP/1.1 200" if has_begun else b"HTTP/1.1 503")
    writer.close()
    await served.ended()


async def test_request_that_hangs_for_ever_does_not_hold_the_end_up(caplog: pytest.LogCaptureFixture) -> None:
    was_canceled = False

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        nonlocal was_canceled
        yield {"n": 1}
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_canceled = True
            raise

    served = Served(app_of(events), drain_s=0.05)
    reader, writer = await served.get("/stream")
    await reader.readuntil(b'{"n":1}')
    served.stop.set()
    await served.ended()
    writer.close()
    assert was_canceled
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == []


async def test_second_signal_does_not_wait_for_the_drain() -> None:
    async def events() -> AsyncGenerator[dict[str, Any], None]:
        while True:
            yield {"n": 1}
            await asyncio.sleep(0.01)

    served = Served(app_of(events), drain_s=600)
    reader, writer = await served.get("/stream")
    await reader.readuntil(b'{"n":1}')
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(served.stop.wait(), 5)
    os.kill(os.getpid(), signal.SIGINT)
    assert b"shutting down" in await reader.read()
    writer.close()
    await served.ended()


@pytest.mark.parametrize("head", ["GET / HTTP/1.1", "GET / HTTP/1.1\r\nHost:", "GET / HTTP/1.0"])
async def test_t110_missing_host_is_refused_on_the_wire(head: str) -> None:
    served = Served(app_of(no_events), drain_s=5)
    answer = await served.say(f"{head}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    served.stop.set()
    await served.ended()


@pytest.mark.parametrize(
    "beginning", [b"", b"GET / HTTP/1.1\r\nHost: loc", b"PRI * HTTP/2.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
async def test_t110_connection_that_sends_no_whole_head_is_closed(beginning: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.1)
    served = Served(app_of(no_events), drain_s=5)
    # Anything but an answer of this application will do; what counts is that the connection ends.
    assert b"200" not in await served.say(beginning)
    served.stop.set()
    await served.ended()


async def test_t110_body_that_stalls_is_408_and_its_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_PAUSE_S", 0.05)

    async def answer(request: Request) -> Response:
        return json_response({})

    app = App([endpoint("POST", "/", answer, PUBLIC)], AppOptions(body_limits=BodyLimits(stall_s=0.05)))
    served = Served(app, drain_s=5)
    said = await served.say(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx")
    assert said.startswith(b"HTTP/1.1 408")
    assert b"did not arrive in time" in said
    served.stop.set()
    await served.ended()


async def test_small_pieces_of_an_answer_leave_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[connection.Connection] = []
    take = connection.Connection.connection_made

    def noting(self: connection.Connection, transport: asyncio.Transport) -> None:
        made.append(self)
        take(self, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", noting)
    served = Served(app_of(no_events), drain_s=5)
    _, writer = await served.get("/")
    while not made:
        await asyncio.sleep(0.005)
    assert made[0].transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()
    served.stop.set()
    await served.ended()


async def test_serve_on_a_taken_port_touches_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        async def release() -> None:
            raise AssertionError("nothing was started")

        with pytest.raises(CorralError, match=f"something already listens on 127.0.0.1:{port}"):
            await serve(app_of(no_events), "127.0.0.1", port, on_ready=lambda: None, release=release)


def test_port_that_a_server_shares_counts_as_taken() -> None:
    with socket.socket() as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(("127.0.0.1", 0))
        shared.listen()
        with pytest.raises(CorralError) as refused:
            check_free("127.0.0.1", shared.getsockname()[1])
    assert refused.value.code == "conflict"


@pytest.mark.parametrize(("host", "code"), [("203.0.113.1", "invalid"), ("no-such-host.invalid", "invalid")])
def test_address_that_is_not_ours_is_told_as_such(host: str, code: str) -> None:
    with pytest.raises(CorralError, match="cannot listen on") as refused:
        check_free(host, free_port())
    assert refused.value.code == code


def test_name_resolves_to_ipv4_first() -> None:
    assert resolve("localhost", 80) == "127.0.0.1"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told to end what stalls")
def test_r07_r08_connections_that_stall_or_are_half_open_are_ended_by_the_system() -> None:
    with listening_socket("127.0.0.1", 0) as listening:
        listen._end_what_stalls(listening)
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as taken:
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == listen.STALLED_S * 1000
            assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
