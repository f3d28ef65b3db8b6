"""Takes in the connections of a server, and no more of them than it has descriptors for.

asyncio's own way, once there are none left: it says so hundreds of times a second, each time with a traceback, and has by then
given away those that the requests themselves would need. Here what is too much waits in the system's queue, until a connection
ends.
"""

import asyncio
import contextlib
import logging
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable

from corral.edges.connection import Connection, State

#: When the system has no descriptor left all the same.
_RETRY_S = 1.0
#: It is said no more often than this: a full server is not to write logs besides.
_WARN_EVERY_S = 60.0

_log = logging.getLogger("corral.server")


@contextlib.asynccontextmanager
async def connections_taken(listening: socket.socket, make: Callable[[], Connection], state: State) -> AsyncIterator[None]:
    """Take connections while the block runs. After it, all that were taken are in `state`. listening: listens, does not block."""
    door = _Door(listening, make, state)
    try:
        yield
    finally:
        await door.close()


class _Door:
    def __init__(self, listening: socket.socket, make: Callable[[], Connection], state: State) -> None:
        self._listening = listening
        self._make = make
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._most = _most()
        #: Taken, and not yet in `state`.
        self._arriving: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_open = False
        self._warned_at = -_WARN_EVERY_S
        state.on_end = self._open
        self._open()

    async def close(self) -> None:
        self._state.on_end = None
        self._shut()
        if self._timer is not None:
            self._timer.cancel()
        if self._arriving:
            await asyncio.wait(self._arriving)

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            self._loop.add_reader(self._listening, self._take)

    def _shut(self) -> None:
        self._is_open = False
        self._loop.remove_reader(self._listening)

    def _take(self) -> None:
        while len(self._state.connections) + len(self._arriving) < self._most:
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._warn(f"no connection can be taken: {error.strerror}")
                self._timer = self._loop.call_later(_RETRY_S, self._open)
                break
            connection.setblocking(False)
            task: asyncio.Task[object] = self._loop.create_task(self._loop.connect_accepted_socket(self._make, connection))
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)
        else:
            self._warn(f"{self._most} connections are as many as there are descriptors for: the next waits until one ends")
        self._shut()

    def _warn(self, text: str) -> None:
        now = self._loop.time()
        if now >= self._warned_at + _WARN_EVERY_S:
            self._warned_at = now
            _log.warning("%s", text)


def _most() -> int:
    """Half of the descriptors: each connection may come to need a file, or another connection."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft // 2)
