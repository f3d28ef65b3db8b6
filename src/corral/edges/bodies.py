"""Request bodies: read whole before a handler runs, or handed to it as they arrive; within bounds of size, time and memory.

A whole body is read before anybody knows whether its sender may send it, since a signature may cover it. So a stranger can make
the server wait and keep bytes; how long and how many is bounded here. A streamed body is not touched before its sender is known.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from corral.wire.errors import CorralError

_RETRY_AFTER_S = 5
#: More digits would be beyond any size, and are not turned into a number.
_LENGTH = re.compile(r"[0-9]{1,18}")
#: Of each streamed body that is read whole: kept without asking, so that those who hold large ones do not keep out small ones.
_ALWAYS_KEPT = 64 * 1024
#: Of a streamed body that shares its memory with no other.
_KEPT_ALONE = 64 * 1024 * 1024


class Disconnected(Exception):
    """The caller left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """How much a server bears with its callers.

    stall_s: how long a body may pause. bytes_per_s: what it must bring on average; a byte now and then is a pause.
    max_unfinished_bytes: kept for all bodies together that are still on their way; as much again for those that a handler reads
    whole, until it is done with them.
    """

    stall_s: float = 10
    bytes_per_s: int = 8 * 1024
    max_unfinished_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """How much a server bears with whoever sends it a blob. A gigabyte over a slow line is normal, so this bounds only who hardly
    sends at all.

    stall_s: how long a body may pause. grace_s: how long it may take however little it brings. bytes_per_s: what it must bring on
    average after that.
    """

    stall_s: float = 30
    grace_s: float = 120
    bytes_per_s: int = 2 * 1024


class Memory:
    """What all the bodies of one server may take up together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept_bytes = 0

    def keep(self, count: int) -> None:
        """So many bytes more are kept. Raises: unavailable when that is too much; they count all the same."""
        self._kept_bytes += count
        if self._kept_bytes > self._max_bytes:
            text = "too many request bodies are on their way; try again later"
            raise CorralError("unavailable", text, retry_after_s=_RETRY_AFTER_S)

    def let_go(self, count: int) -> None:
        """So many are not kept any more."""
        self._kept_bytes -= count


class BodyStream:
    """A body as it arrives. Iterate once; nothing is read before. declared_bytes: its Content-Length, 0 for no body, None when
    the sender does not say (chunked transfer). memory: of the server, for a body that is read whole. confirm: awaited when all of
    a body has come, before its last part is given; what it raises, whoever iterates gets in place of that part."""

    def __init__(
        self,
        headers: Mapping[str, Sequence[str]],
        receive: Receive,
        limits: StreamLimits,
        *,
        memory: Memory | None = None,
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        lengths = headers.get("content-length", ())
        if len(lengths) > 1 or any(not _LENGTH.fullmatch(text) for text in lengths):
            raise CorralError("bad_request", "Content-Length must be one number")
        is_chunked = "transfer-encoding" in headers
        self.declared_bytes = None if is_chunked else int(lengths[0]) if lengths else 0
        self._receive = receive
        self._limits = limits
        self._memory = memory or Memory(_KEPT_ALONE)
        self._confirm = confirm
        self._kept_bytes = 0
        self._received_bytes = 0
        self._is_over = self.declared_bytes == 0
        self._started = 0.0

    def __aiter__(self) -> "BodyStream":
        return self

    async def __anext__(self) -> bytes:
        """The next part; never empty. Raises: Disconnected when the sender leaves or the body ends before its Content-Length;
        too_slow; what `confirm` does."""
        while not self._is_over:
            part = await self._timely()
            if self._is_over and self._confirm is not None:
                await self._confirm()
            if part:
                return part
        raise StopAsyncIteration

    async def read(self, max_bytes: int) -> bytes:
        """All of it; it counts as kept until `forget`. Raises: too_large, unavailable, and as iterating does."""
        if self.declared_bytes is not None and self.declared_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts = []
        async for part in self:
            if self._received_bytes > max_bytes:
                raise _too_large(max_bytes)
            self._keep()
            parts.append(part)
        return b"".join(parts)

    def _keep(self) -> None:
        more = self._received_bytes - _ALWAYS_KEPT - self._kept_bytes
        if more > 0:
            self._kept_bytes += more
            self._memory.keep(more)

    def forget(self) -> None:
        """The request is over, and nobody has what was read any more."""
        self._memory.let_go(self._kept_bytes)
        self._kept_bytes = 0

    async def _timely(self) -> bytes:
        limits, now = self._limits, time.monotonic()
        self._started = self._started or now
        if now - self._started > limits.grace_s + self._received_bytes / limits.bytes_per_s:
            raise CorralError("too_slow")
        try:
            async with asyncio.timeout(limits.stall_s):
                return await self._next()
        except TimeoutError:
            raise CorralError("too_slow") from None

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part: bytes = message.get("body", b"")
        self._received_bytes += len(part)
        self._is_over = not message.get("more_body", False)
        # A server may tell of a peer that left as of an orderly end. What was announced and did not come was never sent.
        if self._is_over and self.declared_bytes is not None and self._received_bytes < self.declared_bytes:
            raise Disconnected
        return part


class _Wait:
    """A body on its way. ends_at: when patience with it does, by the loop's clock."""

    __slots__ = ("ends_at", "is_over", "task")

    def __init__(self, task: asyncio.Task[Any], ends_at: float) -> None:
        self.task = task
        self.ends_at = ends_at
        self.is_over = False


class BodyReader:
    """Reads the bodies of one server's requests.

    Most bodies are there at once, and a timer for each costs more than the rest of reading it. So there is one timer for all: it
    looks ten times per `stall_s` for a body whose time is over, and only while some are awaited.
    """

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._memory = Memory(limits.max_unfinished_bytes)
        self._waiting: set[_Wait] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, headers: Mapping[str, Sequence[str]], receive: Receive, max_bytes: int) -> bytes:
        """The body of one request. headers: lower-case names. Raises: too_large, too_slow, unavailable, Disconnected."""
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return b""
        declared = headers.get("content-length", ("0",))[0]
        if not _LENGTH.fullmatch(declared) or int(declared) > max_bytes:
            raise _too_large(max_bytes)
        if declared == "0" and "transfer-encoding" not in headers:
            # Nothing will come; asking the server for it takes a round trip to its own threads.
            return b""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        wait = _Wait(task, loop.time() + self._limits.stall_s)
        self._waiting.add(wait)
        if self._timer is None:
            self._look_later(loop)
        try:
            return await self._parts(receive, max_bytes, wait)
        except asyncio.CancelledError:
            # uncancel() tells our own cancellation from one that comes from the server, which must go on.
            if wait.is_over and task.uncancel() == 0:
                raise CorralError("too_slow") from None
            raise
        finally:
            self._waiting.discard(wait)

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._limits.stall_s / 10, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for wait in self._waiting:
            if wait.ends_at <= now and not wait.is_over:
                wait.is_over = True
                wait.task.cancel()
        self._timer = None
        if self._waiting:
            self._look_later(loop)

    async def _parts(self, receive: Receive, max_bytes: int, wait: _Wait) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                part: bytes = message.get("body", b"")
                if size + len(part) > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
                if not message.get("more_body", False):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
                size += len(part)
                self._memory.keep(len(part))
                self._extend(wait, len(part))
        finally:
            self._memory.let_go(size)

    def _extend(self, wait: _Wait, count: int) -> None:
        """Every byte buys a little time, which cannot be saved up beyond one pause."""
        latest = asyncio.get_running_loop().time() + self._limits.stall_s
        wait.ends_at = min(latest, wait.ends_at + count / self._limits.bytes_per_s)


def _too_large(max_bytes: int) -> CorralError:
    return CorralError("too_large", f"the request body is larger than {max_bytes} bytes")
