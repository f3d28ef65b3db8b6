"""Request bodies: read whole before a handler runs, within bounds of size, time and memory.

A body is read before anybody knows whether its sender may send it, since a signature may cover it. So a stranger can make the
server wait and keep bytes; how long and how many is bounded here.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from corral.wire.errors import CorralError

_RETRY_AFTER_S = 5


class Disconnected(Exception):
    """The caller left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """How much a server bears with its callers.

    stall_s: how long a body may pause. bytes_per_s: what it must bring on average; a byte now and then is a pause.
    max_unfinished_bytes: kept for all bodies together that are still on their way.
    """

    stall_s: float = 10
    bytes_per_s: int = 8 * 1024
    max_unfinished_bytes: int = 256 * 1024 * 1024


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
        self._unfinished_bytes = 0
        self._waiting: set[_Wait] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, headers: Mapping[str, Sequence[str]], receive: Receive, max_bytes: int) -> bytes:
        """The body of one request. headers: lower-case names. Raises: too_large, too_slow, unavailable, Disconnected."""
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return b""
        declared = headers.get("content-length", ("0",))[0]
        if not declared.isdecimal() or int(declared) > max_bytes:
            raise _too_large(max_bytes)
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
                self._keep(len(part))
                self._extend(wait, len(part))
        finally:
            self._unfinished_bytes -= size

    def _keep(self, count: int) -> None:
        self._unfinished_bytes += count
        if self._unfinished_bytes > self._limits.max_unfinished_bytes:
            raise CorralError(
                "unavailable", "too many request bodies are on their way; try again later", retry_after_s=_RETRY_AFTER_S
            )

    def _extend(self, wait: _Wait, count: int) -> None:
        """Every byte buys a little time, which cannot be saved up beyond one pause."""
        latest = asyncio.get_running_loop().time() + self._limits.stall_s
        wait.ends_at = min(latest, wait.ends_at + count / self._limits.bytes_per_s)


def _too_large(max_bytes: int) -> CorralError:
    return CorralError("too_large", f"the request body is larger than {max_bytes} bytes")
