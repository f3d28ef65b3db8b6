"""HTTP to our own child process, and nothing else: one request per connection, no more of the protocol than llama.cpp's server
uses.

Why not aiohttp: an engine computes on every core there is, so each microsecond spent on a token is taken from the next one.
Measured per token, in turn on two shared cores: 230 µs with aiohttp, 130 µs with this, of which the kernel and asyncio take 60 to
100. What comes in is still hostile text: sizes are bounded, and whatever is malformed ends the connection.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

_MAX_HEAD_BYTES = 64 * 1024
_MAX_SIZE_LINE_BYTES = 1024
#: A reader that is slower than the engine makes it wait, rather than us keep its words.
_HIGH_WATER_BYTES = 256 * 1024
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")


class BrokenAnswer(ConnectionError):
    """The connection ended, fell silent or spoke nonsense before the answer was whole."""


@asynccontextmanager
async def posted(
    address: tuple[str, int], target: str, headers: Mapping[str, str], body: bytes | None, *, silence_s: float
) -> AsyncIterator["Answer"]:
    """The answer to one request, from its first byte on; the connection ends with the block. body: None makes it a GET.
    silence_s: how long the server may send nothing. Raises: OSError, of which BrokenAnswer is one."""
    loop = asyncio.get_running_loop()
    transport, answer = await loop.create_connection(lambda: Answer(silence_s), *address)
    try:
        transport.write(_request(address, target, headers, body))
        await answer.begin()
        yield answer
    finally:
        # Not close: nothing that is still to be sent or read matters any more, and the server stops when its peer is gone.
        transport.abort()


def _request(address: tuple[str, int], target: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    lines = [f"{'GET' if body is None else 'POST'} {target} HTTP/1.1", f"Host: {address[0]}:{address[1]}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + (body or b"")


class Answer(asyncio.Protocol):
    """An answer that is arriving. status: known once `begin` has returned."""

    def __init__(self, silence_s: float) -> None:
        self.status = 0
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._body: _Body | None = None
        self._head = b""
        self._ready: list[bytes] = []
        self._ready_bytes = 0
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._heard_at = self._loop.time()
        self._watch = self._loop.call_later(silence_s, self._listen)

    async def begin(self) -> None:
        """Wait for status and headers. Raises: BrokenAnswer."""
        while self._body is None:
            self._check()
            await self._wait()

    async def next(self) -> bytes:
        """What has arrived of the body since the last call; empty at its end. Raises: BrokenAnswer."""
        assert self._body is not None
        while not self._ready:
            if self._body.is_whole:
                return b""
            self._check()
            await self._wait()
        data = self._ready[0] if len(self._ready) == 1 else b"".join(self._ready)
        self._ready.clear()
        if self._ready_bytes > _HIGH_WATER_BYTES and self._transport is not None:
            self._transport.resume_reading()
        self._ready_bytes = 0
        return data

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises: BrokenAnswer, also when it is larger."""
        body = bytearray()
        while data := await self.next():
            body += data
            if len(body) > limit_bytes:
                raise BrokenAnswer(f"more than {limit_bytes} bytes")
        return bytes(body)

    # ── What the event loop calls ────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._heard_at = self._loop.time()
        if self._body is None:
            data = self._take_head(data)
        if self._body is not None and data:
            try:
                pieces = self._body.feed(data)
            except ValueError:
                self._fail("nonsense")
                return
            for piece in pieces:
                self._ready.append(piece)
                self._ready_bytes += len(piece)
            if self._ready_bytes > _HIGH_WATER_BYTES and self._transport is not None:
                self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._watch.cancel()
        if self._error is None:
            if self._body is not None:
                self._body.end()
            self._error = BrokenAnswer("the connection ended")
        self._wake()

    # ── The rest ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_head(self, data: bytes) -> bytes:
        """Returns what follows the head; empty as long as that is not complete."""
        self._head += data
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if not end:
            if len(self._head) > _MAX_HEAD_BYTES:
                self._fail("endless headers")
            return b""
        try:
            self.status, self._body = _parse_head(head)
        except ValueError:
            self._fail("nonsense")
        return rest

    def _fail(self, why: str) -> None:
        self._error = BrokenAnswer(why)
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    def _listen(self) -> None:
        """Once in a while: has it said anything? One slow timer instead of one that is renewed for every token."""
        left_s = self._heard_at + self._silence_s - self._loop.time()
        if left_s <= 0:
            self._fail(f"nothing for {self._silence_s:.0f} s")
        else:
            self._watch = self._loop.call_later(left_s, self._listen)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Body:
    """A body that ends with its connection."""

    is_whole = False

    def feed(self, data: bytes) -> list[bytes]:
        """The body's bytes among these. Raises: ValueError."""
        return [data]

    def end(self) -> None:
        """The connection has ended."""
        self.is_whole = True


class _Sized(_Body):
    """A body of so many bytes."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.is_whole = size == 0

    def feed(self, data: bytes) -> list[bytes]:
        """See _Body."""
        data = data[: self._left]
        self._left -= len(data)
        self.is_whole = self._left == 0
        return [data] if data else []

    def end(self) -> None:
        """See _Body."""


class _Chunked(_Body):
    """A body in chunks. Source: RFC 9112 7.1; trailers are not looked at."""

    def __init__(self) -> None:
        self._rest = b""
        # Bytes that are left of the chunk under way, with the line end behind it.
        self._left = 0

    def feed(self, data: bytes) -> list[bytes]:
        """See _Body."""
        found = []
        data, self._rest = self._rest + data, b""
        while data and not self.is_whole:
            if self._left == 0:
                line, end, after = data.partition(b"\r\n")
                if not end:
                    if len(data) > _MAX_SIZE_LINE_BYTES:
                        raise ValueError("endless chunk size")
                    self._rest = data
                    break
                size = _chunk_size(line)
                self.is_whole = size == 0
                self._left, data = size + 2, after
                continue
            piece, data = data[: self._left], data[self._left :]
            # The last two bytes of what is left are the line end, which belongs to nobody.
            content = piece[: max(0, self._left - 2)]
            self._left -= len(piece)
            if content:
                found.append(content)
        return found

    def end(self) -> None:
        """See _Body."""


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not _CHUNK_SIZE.fullmatch(digits):
        raise ValueError("no chunk size")
    return int(digits, 16)


def _parse_head(head: bytes) -> tuple[int, _Body]:
    """Raises: ValueError."""
    first, *lines = head.split(b"\r\n")
    version, status, *_ = first.split(b" ", 2)
    if not version.startswith(b"HTTP/1.") or len(status) != 3 or not status.isdigit():
        raise ValueError("no status line")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        return int(status), _Chunked()
    size = headers.get(b"content-length")
    if size is None:
        return int(status), _Body()
    if not size.isdigit() or len(size) > 15:
        raise ValueError("no content length")
    return int(status), _Sized(int(size))
