"""HTTP/1.1 to whoever runs models: our own child process, and the servers that an operator names.

Why not aiohttp: this is the relay's way out, once per request and once per token, beside an engine that computes on every core
there is. Measured in turn on two shared cores: 230 µs per token with aiohttp, 130 µs with this, of which the kernel and asyncio
take 60 to 100; and a hub in front of a quick upstream answers half as many requests again. llhttp parses, as for aiohttp.
What comes in is hostile text all the same: heads are bounded, a slow reader makes the server wait, and whatever is malformed ends
the connection.

Not here, because nothing that runs models wants them: redirects, cookies, compression, proxies, HTTP/2, and trying again.
"""

import asyncio
import re
import select
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from urllib.parse import quote, urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

#: Of a head, of what stands between chunks, and of trailers: everything that is parsed and not handed on.
_MAX_HEAD_BYTES = 64 * 1024
_MAX_HEADERS = 128
#: A reader that is slower than the server makes it wait, rather than us keep its words.
_HIGH_WATER_BYTES = 256 * 1024
#: Up to here head and body are worth copying together, for one system call and one packet.
_SMALL_BODY_BYTES = 64 * 1024
_HAPPY_EYEBALLS_S = 0.25
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_DIGITS = re.compile(r"[0-9.]+|[0-9a-f:.]*:[0-9a-f:.]*")
#: Of a header's value, as it may be sent.
_VALUE = re.compile(r"[\t !-~]*")
_PATH_SAFE = "/%:@!$&'()*+,;=~"


class BrokenAnswer(ConnectionError):
    """The connection ended, fell silent or spoke nonsense before the answer was whole."""


class Place:
    """A server, and the requests that go there. headers: sent with each. Raises: ValueError for an address or a header that is
    none."""

    __slots__ = ("_start", "host", "is_secure", "port")

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError(f"{parts.scheme!r} is no way to a server")
        self.host = parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname
        if not _HOST.fullmatch(self.host):
            raise ValueError("no host has such a name")
        self.is_secure = parts.scheme == "https"
        self.port = parts.port if parts.port is not None else 443 if self.is_secure else 80
        if not self.port:
            raise ValueError("nothing listens on port 0")
        name = f"[{self.host}]" if ":" in self.host else self.host
        authority = name if parts.port is None else f"{name}:{parts.port}"
        lines = {"Host": authority, **headers}
        if not all(map(_VALUE.fullmatch, lines.values())):
            raise ValueError("a header holds what cannot be sent")
        # The method and the prefix of the target in front, and the length of the body behind, are all that is missing.
        self._start = quote(parts.path, safe=_PATH_SAFE), "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    def request(self, target: str, body: bytes | None) -> tuple[bytes, ...]:
        """The bytes to send. target: our own, behind the path of the address. body: None makes it a GET."""
        prefix, headers = self._start
        if body is None:
            return (f"GET {prefix}{target} HTTP/1.1\r\n{headers}\r\n".encode("ascii"),)
        head = f"POST {prefix}{target} HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode("ascii")
        return (head + body,) if len(body) <= _SMALL_BODY_BYTES else (head, body)


@cache
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()


def _is_closed(tls: ssl.SSLObject) -> bool:
    """Whether the server itself has said the end, by close_notify; a cut between us and it looks the same to asyncio. Without
    a length, the end is all that tells a whole answer from a part of it (RFC 8446 6.1)."""
    try:
        return not tls.read(1)
    except ssl.SSLError:
        return False


async def _connected(place: Place, silence_s: float) -> "Connection":
    """Raises: OSError, UnicodeError."""
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(silence_s),
        place.host,
        place.port,
        ssl=_trust() if place.is_secure else None,
        # A race of one is run with tasks and all; an address of digits has no second.
        happy_eyeballs_delay=None if _DIGITS.fullmatch(place.host) else _HAPPY_EYEBALLS_S,
    )
    return connection


@asynccontextmanager
async def posted(place: Place, target: str, body: bytes | None, *, silence_s: float) -> AsyncIterator["Answer"]:
    """The answer to one request on a connection of its own, from its first byte on; the connection ends with the block. body:
    None makes it a GET. silence_s: how long the server may send nothing. Raises: OSError, of which BrokenAnswer is one."""
    connection = await _connected(place, silence_s)
    try:
        yield await connection.ask(place.request(target, body))
    finally:
        # Not close: nothing that is still to be sent or read matters any more, and the server stops when its peer is gone.
        connection.abort()


class Pool:
    """Connections that are used again. idle_s: how long one is kept. connect_s: how long making one may take. silence_s: how long
    a server may send nothing. Belongs to one event loop; whoever makes it closes it."""

    def __init__(self, *, max_connections: int, connect_s: float, silence_s: float, idle_s: float) -> None:
        self._free = asyncio.Semaphore(max_connections)
        self._connect_s = connect_s
        self._silence_s = silence_s
        self._idle_s = idle_s
        #: Of each place, the one that was used last at the end; with when that was.
        self._idle: dict[Place, list[tuple[Connection, float]]] = {}
        self._used: set[Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self.is_closed = False

    async def post(self, place: Place, target: str, body: bytes) -> "Answer":
        """Returns when status and headers are there; the answer is given back by `release`. Raises: OSError, UnicodeError."""
        if self._free.locked():
            async with asyncio.timeout(self._connect_s):
                await self._free.acquire()
        else:
            await self._free.acquire()
        connection: Connection | None = None
        try:
            connection = self._take(place)
            if connection is None:
                async with asyncio.timeout(self._connect_s):
                    connection = await _connected(place, self._silence_s)
                if self.is_closed:
                    raise BrokenAnswer("closed")
            self._used.add(connection)
            return await connection.ask(place.request(target, body))
        except BaseException:
            self._let_go(connection)
            raise

    def release(self, place: Place, answer: "Answer") -> None:
        """Keep the connection for the next request, or end it when the body was not read to its end. Safe to call twice."""
        connection = answer.connection
        if answer.is_released:
            return
        answer.is_released = True
        if self.is_closed or not connection.is_reusable:
            self._let_go(connection)
            return
        self._used.discard(connection)
        self._free.release()
        loop = asyncio.get_running_loop()
        self._idle.setdefault(place, []).append((connection, loop.time()))
        if self._sweep is None:
            self._sweep = loop.call_later(self._idle_s, self._end_idle)

    def close(self) -> None:
        """End every connection, whatever it is doing."""
        self.is_closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in [*self._used, *(connection for idle in self._idle.values() for connection, _ in idle)]:
            connection.abort()
        self._idle.clear()

    def _take(self, place: Place) -> "Connection | None":
        idle = self._idle.get(place, [])
        oldest = asyncio.get_running_loop().time() - self._idle_s
        while idle:
            connection, since = idle.pop()
            if connection.is_reusable and since > oldest and connection.is_quiet():
                return connection
            connection.abort()
        return None

    def _let_go(self, connection: "Connection | None") -> None:
        if connection is not None:
            connection.abort()
            self._used.discard(connection)
        self._free.release()

    def _end_idle(self) -> None:
        """Once in a while, instead of a timer for each."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self._idle_s
        for place, idle in list(self._idle.items()):
            for connection, since in idle:
                if since <= oldest:
                    connection.abort()
            idle[:] = [(connection, since) for connection, since in idle if since > oldest and connection.is_reusable]
            if not idle:
                del self._idle[place]
        self._sweep = loop.call_later(self._idle_s, self._end_idle) if self._idle else None


class Answer:
    """An answer that is arriving. status, headers (lower-case names): there from the beginning, since `Connection.ask` waits for
    them."""

    __slots__ = ("_ready", "_ready_bytes", "connection", "headers", "is_released", "is_whole", "status")

    def __init__(self, connection: "Connection") -> None:
        self.connection = connection
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        #: Whether all of it has arrived, read or not.
        self.is_whole = False
        self.is_released = False
        self._ready: list[bytes] = []
        self._ready_bytes = 0

    @property
    def is_read(self) -> bool:
        """Whether all of it has been read."""
        return self.is_whole and not self._ready

    async def next(self) -> bytes:
        """What has arrived of the body since the last call; empty at its end. Raises: BrokenAnswer."""
        ready = self._ready
        while not ready:
            if self.is_whole:
                return b""
            await self.connection.more()
        data = ready[0] if len(ready) == 1 else b"".join(ready)
        ready.clear()
        if self._ready_bytes > _HIGH_WATER_BYTES:
            self.connection.resume()
        self._ready_bytes = 0
        return data

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises: BrokenAnswer, also when it is larger."""
        body = await self.next()
        if self.is_read and len(body) <= limit_bytes:
            return body
        whole = bytearray(body)
        while body and len(whole) <= limit_bytes:
            body = await self.next()
            whole += body
        if len(whole) > limit_bytes:
            raise BrokenAnswer(f"more than {limit_bytes} bytes")
        return bytes(whole)

    def put(self, data: bytes) -> bool:
        """Add to what can be read. Returns: whether that is enough for now."""
        self._ready.append(data)
        self._ready_bytes += len(data)
        return self._ready_bytes > _HIGH_WATER_BYTES


class Connection(asyncio.Protocol):
    """One connection, asked one thing after the other. silence_s: see Pool."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._parser = HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: BrokenAnswer | None = None
        self._heard_at = 0.0
        #: We are the ones who keep the server waiting.
        self._is_paused = False
        self._watch: asyncio.TimerHandle | None = None
        #: Bytes given to the parser since it last handed something on.
        self._pending_bytes = 0
        self._has_begun = False
        #: Whether the head says where the body ends; else the connection's end says it.
        self._is_sized = False
        self._keeps_alive = True

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent: the answer was read to its end, and both sides are still there."""
        transport = self._transport
        if self._error is not None or transport is None or transport.is_closing() or not self._keeps_alive:
            return False
        return (self._answer is None or self._answer.is_read) and transport.get_write_buffer_size() == 0

    def is_quiet(self) -> bool:
        """Whether nothing has come that the event loop has not looked at yet: the end, which a server may send right behind an
        answer, or words that nobody asked for and that would be taken for the next answer."""
        assert self._transport is not None
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    async def ask(self, request: Sequence[bytes]) -> Answer:
        """Send a request; returns when status and headers of its answer are there. Raises: BrokenAnswer."""
        assert self._transport is not None
        answer = self._answer = Answer(self)
        self._has_begun = False
        self._pending_bytes = 0
        self._heard_at = self._loop.time()
        if self._watch is None:
            self._watch = self._loop.call_later(self._silence_s, self._listen)
        for piece in request:
            self._transport.write(piece)
        while not self._has_begun:
            await self.more()
        return answer

    async def more(self) -> None:
        """Wait until something has happened. Raises: BrokenAnswer when nothing will any more."""
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def resume(self) -> None:
        """Read on after there was enough."""
        self._is_paused = False
        self._heard_at = self._loop.time()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """End it now."""
        if self._error is None:
            self._error = BrokenAnswer("the connection was ended")
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._heard_at = self._loop.time()
        if self._answer is None or self._answer.is_whole:
            self._fail("words that nobody asked for")
            return
        self._pending_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self._fail("nonsense")
            return
        if self._pending_bytes > _MAX_HEAD_BYTES:
            self._fail("endless headers")
        self._wake()

    def eof_received(self) -> None:
        """The server says no more. asyncio would first wait until it has taken all that we have to say."""
        assert self._transport is not None
        tls = self._transport.get_extra_info("ssl_object")
        if tls is not None and not _is_closed(tls):
            self._fail("cut off without a farewell")
        elif self._transport.get_write_buffer_size():
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._watch is not None:
            self._watch.cancel()
        if self._error is None:
            self._error = BrokenAnswer("the connection ended")
            if self._answer is not None and self._has_begun and not self._is_sized and exc is None:
                self._answer.is_whole = True
        # It holds us as we hold it, and a connection made for each request should not wait for the garbage collector.
        del self._parser
        self._wake()

    # What the parser calls

    def on_message_begin(self) -> None:
        """An answer, or something said in advance (1xx)."""
        if self._answer is None or self._has_begun:
            raise ValueError("a second answer")
        self._is_sized = False
        self._answer.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; the parser tells of trailers, too, at which nobody looks."""
        assert self._answer is not None
        if self._has_begun:
            return
        headers, name = self._answer.headers, name.lower()
        if len(headers) >= _MAX_HEADERS:
            raise ValueError("endless headers")
        self._is_sized = self._is_sized or name in (b"content-length", b"transfer-encoding")
        headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """The body begins, unless this was said in advance."""
        assert self._answer is not None
        status = self._parser.get_status_code()
        if not 100 <= status < 600:
            raise ValueError("no status")
        if status < 200:
            return
        self._pending_bytes = 0
        self._answer.status = status
        self._has_begun = True
        self._keeps_alive = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        assert self._answer is not None
        self._pending_bytes = 0
        if self._answer.put(body) and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """All of it is there."""
        assert self._answer is not None
        self._answer.is_whole = self._has_begun

    # The rest

    def _fail(self, why: str) -> None:
        self._error = BrokenAnswer(why)
        self.abort()
        self._wake()

    def _listen(self) -> None:
        """Once in a while: has it said anything? One slow timer instead of one that is renewed for every token and request."""
        self._watch = None
        if self._answer is None or self._answer.is_whole:
            return
        left_s = self._silence_s if self._is_paused else self._heard_at + self._silence_s - self._loop.time()
        if left_s <= 0:
            self._fail(f"nothing for {self._silence_s:.0f} s")
        else:
            self._watch = self._loop.call_later(left_s, self._listen)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
