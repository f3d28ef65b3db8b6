"""One HTTP/1.1 connection: uvicorn's, with the bounds it lacks, targets exactly as they came, and files sent without a copy.

uvicorn's protocol parses by llhttp, which refuses what two parsers may read in two ways (a body with two lengths, bare line ends,
spaces before a colon). It bounds neither how long nor how large a head may be, drops the authority of `GET http://other/`, and
closes on whoever is still sending, which then sees a reset instead of the answer. What is added here, and nothing else:

    head        at most `MAX_HEAD_BYTES`, `MAX_HEADERS` and `HEAD_TIMEOUT_S`, and so everything that is parsed and not handed on:
                chunk extensions, trailers, empty lines between requests; at most `MAX_WAITING` requests at once
    upgrades    are not offered here, and an offer is passed over instead of ending what the request was about
    trailers    are dropped: as headers they would pass by whatever a proxy checks or overwrites in the head (RFC 9110, 6.5.1)
    pipelining  what cannot be parsed never lands inside of the answer to what came before; who leaves has left all requests
    target      `raw_path` and `query_string` are the bytes that were sent, whatever form they have; edges/asgi.py judges them
    answer      its head leaves together with the first bytes of its body; who has left is told by `Disconnected`; HTTP/1.0 gets
                no chunks
    files       `http.response.zerocopysend` of the ASGI specification: the kernel copies from the file to the socket
    end         of a request that was answered before all of its body came: it is read and dropped for a while, then closed
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any
from urllib.parse import unquote_to_bytes

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from corral.edges.bodies import Disconnected

Application = Callable[[Any, Any, Any], Awaitable[None]]

HEAD_TIMEOUT_S = 10.0
#: Of a head as it is read: edges/asgi.py refuses far smaller ones, in words.
MAX_HEAD_BYTES = 64 * 1024
#: Each takes a hundred bytes and more, however short it is.
MAX_HEADERS = 128
#: Requests that were sent before the first of them was answered.
MAX_WAITING = 32
#: Longer than the minute for which proxies keep a connection to use again, so that it is they who end it.
IDLE_S = 120
#: After an answer that did not wait for its request's body: how long in all, how long without a byte, and how much is read. A
#: socket closed with bytes unread resets the connection, and whoever still writes sees only that.
LINGER_S, LINGER_PAUSE_S, LINGER_BYTES = 30.0, 5.0, 64 * 1024 * 1024
#: What the kernel is handed at once. A thread is kept for that long, a few milliseconds when the disk has to be waited for.
_AT_ONCE_BYTES = 4 * 1024 * 1024
#: How long the other end of a file may take nothing; on Linux the system is faster to see it (listen.py).
_STALL_S = 60.0
#: Headers that only mean something to the next hop, of a request that offers to change the protocol.
_OF_AN_OFFER = frozenset({b"connection", b"upgrade", b"http2-settings"})
_EXTENSIONS: dict[str, dict[object, object]] = {"http.response.zerocopysend": {}} if hasattr(os, "sendfile") else {}


class State(ServerState):
    """What the connections of one server share: which there are, and the requests that run."""

    def __init__(self) -> None:
        super().__init__()
        #: Called at the end of each connection.
        self.on_end: Callable[[], None] | None = None
        self._one_ended = asyncio.Event()
        self._dated = 0

    def note_end(self) -> None:
        """A connection is gone."""
        self._one_ended.set()
        if self.on_end is not None:
            self.on_end()

    async def wait_until_idle(self) -> None:
        """Return when there is neither a connection nor a request left."""
        while self.connections:
            self._one_ended.clear()
            await self._one_ended.wait()
        while self.tasks:
            await asyncio.wait(self.tasks)

    def renew_date(self) -> None:
        """Have answers carry the present second."""
        if self._dated != (now := int(time.time())):
            self._dated = now
            self.default_headers[:] = [(b"date", formatdate(now, usegmt=True).encode())]


def connection_factory(app: Application, state: State) -> Callable[[], "Connection"]:
    """What makes the connections of a server. app: gets every request."""
    config = Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
    )
    config.load()
    return lambda: Connection(config, state)


class _TooMuch(Exception):
    """Tells the parser to stop, and the other end why."""


class Connection(HttpToolsProtocol):
    """One of a server's connections. See the module."""

    def __init__(self, config: Config, state: State) -> None:
        super().__init__(config, state, {})
        self._state = state
        # edges/asgi.py writes one, with what only it knows.
        self.access_log = False
        self._timer: asyncio.TimerHandle | None = None
        #: Bytes given to the parser since it last handed something on.
        self._pending_bytes = 0
        self._is_in_message = False
        #: Whether a request has started whose body has not come to its end.
        self._is_in_body = False
        self._lingering: _Lingering | None = None
        #: What is being answered; `cycle` is the request that came last.
        self._running: RequestResponseCycle | None = None
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None

    # What asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first head its time."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self._stop_timer()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        super().connection_lost(exc)
        if (running := self._running) is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        self._state.note_end()

    def data_received(self, data: bytes) -> None:
        """Parse, within bounds."""
        if self._lingering is not None:
            self._lingering.bytes += len(data)
        self._pending_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as offer:
            self._pass_over(data[offer.args[0] :])
        except HttpParserError as error:
            reason = error.__context__
            self.send_400_response(str(reason) if isinstance(reason, _TooMuch) else "Invalid HTTP request received.")
        if self._pending_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")
        elif not self._is_in_body and (self._is_in_message or self._pending_bytes):
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed. Behind a request that came whole, this would be taken for its answer, or land inside of
        it: that one is answered, and is the last."""
        running = self._running
        if self._lingering is not None:
            # It has its answer.
            self.transport.close()
        elif running is None or running.response_complete:
            super().send_400_response(msg)
        elif running.more_body:
            # Its own body is damaged.
            self.transport.abort() if running.response_started else super().send_400_response(msg)
        else:
            self._stop_timer()
            self._is_in_message = self._is_in_body = False
            self._pending_bytes = 0
            self.pipeline.clear()
            running.keep_alive = False
            self.flow.pause_reading()

    def _pass_over(self, rest: bytes) -> None:
        """Go on with a request that offers to go over to another protocol, as if it had not. The parser leaves everything after
        its head to that protocol, so another one reads the head without the offer. Java's client makes it in its first request
        to every server (h2c), of whatever kind."""
        method, version, headers = self.parser.get_method(), self.parser.get_http_version().encode(), self.headers
        if method == b"CONNECT":
            self.send_400_response("This server is no proxy.")
            return
        lines = [method + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in headers if name not in _OF_AN_OFFER]
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    # What the parser calls

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._is_in_message = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; the parser tells of trailers, too."""
        if self._is_in_body:
            return
        if len(self.headers) >= MAX_HEADERS:
            raise _TooMuch("The head of the request is too large.")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request. Its target is kept from uvicorn, which would read it as a URL and lose what does not fit."""
        if self.parser.should_upgrade():
            return
        if len(self.pipeline) >= MAX_WAITING:
            # Thousands fit into what is read at once, and each takes a hundred times what it took on the wire.
            raise _TooMuch("Too many requests at once.")
        self._stop_timer()
        self._pending_bytes = 0
        self._is_in_body = True
        self._state.renew_date()
        target, self.url = self.url, b"/"
        super().on_headers_complete()
        raw_path, _, query = target.partition(b"?")
        self.scope["raw_path"], self.scope["query_string"] = raw_path, query
        self.scope["path"] = (
            unquote_to_bytes(raw_path).decode("utf-8", "replace") if b"%" in raw_path else raw_path.decode("latin-1")
        )
        self.scope["extensions"] = _EXTENSIONS

    def on_body(self, body: bytes) -> None:
        """Hand a part of the body on."""
        self._pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        if self.parser.should_upgrade():
            return
        self._is_in_message = self._is_in_body = False
        self._pending_bytes = 0
        super().on_message_complete()
        if self._lingering is not None:
            self._end_lingering()

    # How a request is answered

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self.transport.is_closing() or (self._lingering is not None and self._lingering.then_closes):
            # Whoever was told that this connection ends does not get another request done on it.
            return
        self._running = cycle
        answer = _Answer(cycle, self)
        cycle.transport = answer  # type: ignore[assignment]

        async def run(scope: Any, receive: Any, send: Any) -> None:
            try:
                await app(scope, receive, answer.send)
            except asyncio.CancelledError:
                # By the server's end alone. uvicorn would log each as a failure of ours.
                if not cycle.response_started:
                    await cycle.send_500_response()
                cycle.disconnected = True
                self.transport.close()

        super()._start_asgi_task(cycle, run)

    def end(self) -> None:
        """Close once what was written has left; but read on for a while first when the other end is still sending."""
        if self._is_in_body and not self.transport.is_closing():
            self._linger(then_closes=True)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for it, or for the rest of this one. Not uvicorn's way, which makes and cancels a
        timer for each."""
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._is_in_body:
            self._linger(then_closes=False)
        else:
            self._rest()

    def shutdown(self) -> None:
        """End an idle connection now, a busy one after its answer."""
        if self._lingering is not None:
            self.transport.close()
        super().shutdown()

    # Time

    def _rest(self) -> None:
        """Give the next request its time."""
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(IDLE_S, self._look_at_idleness)

    def _look_at_idleness(self) -> None:
        """Once in a while: has nothing come for so long?"""
        self._idle_timer = None
        if self._is_in_message or self._is_in_body or not (self.cycle is None or self.cycle.response_complete):
            # Another time begins with the answer.
            return
        left_s = self._idle_since + IDLE_S - self.loop.time()
        if left_s <= 0:
            self.transport.close()
        else:
            self._idle_timer = self.loop.call_later(left_s, self._look_at_idleness)

    def _await_head(self) -> None:
        if self._timer is None and self._lingering is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_is_late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # The next request has begun to come while this one is answered.
            self._await_head()
        else:
            self.transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _linger(self, *, then_closes: bool) -> None:
        if self._lingering is None:
            self._stop_timer()
            self._lingering = _Lingering(self.loop.time() + LINGER_S)
            self._timer = self.loop.call_later(LINGER_PAUSE_S, self._look_at_lingering)
            self.flow.resume_reading()
        self._lingering.then_closes |= then_closes

    def _look_at_lingering(self) -> None:
        lingering = self._lingering
        assert lingering is not None
        is_over = lingering.bytes > LINGER_BYTES or self.loop.time() > lingering.ends_at
        if is_over or lingering.bytes == lingering.seen_bytes:
            self.transport.close()
            return
        lingering.seen_bytes = lingering.bytes
        self._timer = self.loop.call_later(LINGER_PAUSE_S, self._look_at_lingering)

    def _end_lingering(self) -> None:
        """All of the request has come after all."""
        assert self._lingering is not None
        then_closes, self._lingering = self._lingering.then_closes, None
        self._stop_timer()
        if then_closes:
            self.transport.close()
        else:
            self._rest()


class _Lingering:
    """A request whose answer has been sent. bytes: that came since; seen_bytes: of these, when last looked at."""

    __slots__ = ("bytes", "ends_at", "seen_bytes", "then_closes")

    def __init__(self, ends_at: float) -> None:
        self.bytes = self.seen_bytes = 0
        self.ends_at = ends_at
        self.then_closes = False


class _Answer:
    """Where uvicorn writes one answer: the connection's transport, which it takes this for, with the head held back until the
    first part of the body is there. A system call, and a process woken up at the other end, cost more than all else of a short
    answer."""

    def __init__(self, cycle: RequestResponseCycle, connection: Connection) -> None:
        self._cycle = cycle
        self._connection = connection
        self._transport = connection.transport
        self._head: bytes | None = None
        self._is_of_unknown_length = False
        self._send = cycle.send

    async def send(self, message: Any) -> None:
        """ASGI's send. Raises: Disconnected when nobody is there to take it."""
        kind = message["type"]
        if kind == "http.response.start":
            self._head = b""
            if self._ends_with_connection(message):
                self._is_of_unknown_length = True
                self._cycle.chunked_encoding, self._cycle.expected_content_length = False, sys.maxsize
        elif kind == "http.response.zerocopysend":
            await self._send_file(message["file"], message["offset"], message["count"])
            message = {"type": "http.response.body", "body": b"", "more_body": message.get("more_body", False)}
        if self._is_of_unknown_length and kind != "http.response.start" and not message.get("more_body", False):
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)
        if kind != "http.response.start":
            # Nothing was written for it when it has no body: the answer to a HEAD.
            self._flush()
        if self._cycle.disconnected:
            raise Disconnected

    def _ends_with_connection(self, start: Any) -> bool:
        """Whether the end of the connection is the only way to tell where the body ends: HTTP/1.0 knows no chunks."""
        return self._cycle.scope["http_version"] == "1.0" and all(name != b"content-length" for name, _ in start["headers"])

    async def _send_file(self, file: int, offset: int, count: int) -> None:
        cycle, transport = self._cycle, self._transport
        self._flush()
        # What is written before must have left: the kernel knows nothing of what the transport still holds.
        transport.set_write_buffer_limits(high=0)
        try:
            await cycle.flow.drain()
            if cycle.disconnected or transport.is_closing():
                raise Disconnected
            await _copy_to_socket(transport, file, offset, count)
        finally:
            transport.set_write_buffer_limits()
        cycle.expected_content_length -= count

    def _flush(self) -> None:
        if self._head:
            self._transport.write(self._head)
        self._head = None

    # What uvicorn uses of a transport

    def write(self, data: bytes) -> None:
        """Send, the head together with what follows it."""
        if self._head is None:
            self._transport.write(data)
        elif not self._head:
            self._head = data
        else:
            head, self._head = self._head, None
            self._transport.write(head + data if data else head)

    def close(self) -> None:
        """Close in order."""
        self._flush()
        self._connection.end()

    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._transport.is_closing()


async def _copy_to_socket(transport: asyncio.Transport, file: int, offset: int, count: int) -> None:
    """Have the kernel send a part of a file. Raises: Disconnected when the other end has left or the file ends too early."""
    loop = asyncio.get_running_loop()
    # Copies of both descriptors: whatever becomes of the connection and of this task, a thread must never find another file or
    # another socket under a number that it was given.
    socket = os.dup(transport.get_extra_info("socket").fileno())
    try:
        copies = socket, os.dup(file)
    except OSError:
        os.close(socket)
        raise
    work: asyncio.Future[int] | None = None
    try:
        while count:
            work = loop.run_in_executor(None, _push, *copies, offset, min(count, _AT_ONCE_BYTES))
            sent = await asyncio.shield(work)
            offset, count = offset + sent, count - sent
            if count:
                await _writable(loop, copies[0])
    except OSError:
        raise Disconnected from None
    finally:
        if work is None or work.done():
            _close(copies)
        else:
            work.add_done_callback(lambda _: _close(copies))


def _push(socket: int, file: int, offset: int, count: int) -> int:
    """Send until the socket takes no more, or all is sent. Returns: how many bytes. Raises: OSError."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < count:
            done = os.sendfile(socket, file, offset + sent, count - sent)
            if not done:
                # Cut short while it was read. The connection has to end early too, or this would be taken for the whole.
                raise BrokenPipeError
            sent += done
    return sent


async def _writable(loop: asyncio.AbstractEventLoop, socket: int) -> None:
    """Return when the socket takes more. Raises: TimeoutError, an OSError."""
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(socket, tell)
    try:
        async with asyncio.timeout(_STALL_S):
            await ready
    finally:
        loop.remove_writer(socket)


def _close(descriptors: tuple[int, int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
