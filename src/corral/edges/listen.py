"""Serves an application on one address until told to stop: the port, the signals and the draining.

The connections themselves are in edges/connection.py, and how they are taken in edges/accepting.py. The order of an orderly end:
stop accepting → let what runs finish, for at most `drain_s` → set `App.closing`, which ends every stream with an error line at
its next event, and call `release`, which takes away what the others wait for → cancel what is left. A second signal goes straight
to the end of that list.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator

from corral.edges.accepting import connections_taken
from corral.edges.asgi import App
from corral.edges.connection import State, connection_factory
from corral.edges.port import listening_socket

DRAIN_S = 30.0
#: How long the other end of a connection may take nothing of what is sent, or be gone, until the system ends the connection.
STALLED_S = 60
_PROBE_EVERY_S = 10
#: How long streams get to write their error line, and tasks to end once they are canceled.
_LAST_WORDS_S = 2.0
_BACKLOG = 512

_log = logging.getLogger("corral.server")


async def serve(
    app: App,
    host: str,
    port: int,
    *,
    on_ready: Callable[[], None],
    release: Callable[[], Awaitable[None]],
    stop: asyncio.Event | None = None,
    drain_s: float = DRAIN_S,
) -> None:
    """Serve until SIGTERM or SIGINT (or `stop`), then end in order. on_ready: called once the port answers. release: ends engines
    and connections that running streams wait for; called only when draining takes too long. Raises: see `listening_socket`."""
    stop, hurry = stop or asyncio.Event(), asyncio.Event()
    state = State()
    make = connection_factory(app, state)
    with listening_socket(host, port) as listening, _signals(stop, hurry):
        _end_what_stalls(listening)
        listening.setblocking(False)
        listening.listen(_BACKLOG)
        async with connections_taken(listening, make, state):
            on_ready()
            await stop.wait()
        # Now, and not when all is drained: whoever comes yet shall hear that nobody listens.
        listening.close()
        if not await _drained(state, hurry, drain_s):
            await _cut(app, state, release)
        for connection in tuple(state.connections):
            connection.transport.abort()


def _end_what_stalls(listening: socket.socket) -> None:
    """Have the system end connections that stall, and look after those whose other end may be gone (R7, R8). Connections inherit
    the options of the socket that listens."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_USER_TIMEOUT", STALLED_S * 1000), ("TCP_KEEPIDLE", STALLED_S), ("TCP_KEEPINTVL", _PROBE_EVERY_S)):
        # A system may not know an option, or know and refuse it; served is all the same.
        if (option := getattr(socket, name, None)) is not None:
            with contextlib.suppress(OSError):
                listening.setsockopt(socket.IPPROTO_TCP, option, value)


async def _drained(state: State, hurry: asyncio.Event, drain_s: float) -> bool:
    """Let what runs come to its end. Returns: whether it did."""
    for connection in tuple(state.connections):
        connection.shutdown()
    waiting = [asyncio.create_task(state.wait_until_idle()), asyncio.create_task(hurry.wait())]
    await asyncio.wait(waiting, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return not state.tasks


async def _cut(app: App, state: State, release: Callable[[], Awaitable[None]]) -> None:
    _log.warning("ending %d requests that are still running", len(state.tasks))
    app.closing.set()
    await release()
    await _ended(state)
    for task in tuple(state.tasks):
        task.cancel()
    await _ended(state)


async def _ended(state: State) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_S):
            await state.wait_until_idle()


@contextlib.contextmanager
def _signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`, and `hurry` the second time."""
    loop = asyncio.get_running_loop()

    def note() -> None:
        (hurry if stop.is_set() else stop).set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    former = {number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(note)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
