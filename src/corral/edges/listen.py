"""Serves an application on one address until told to stop: the port, the signals and the draining.

This is the only module that knows which HTTP server is in use: Granian, embedded, on our own event loop (one process, one loop).
The order of an orderly end: stop accepting → let what runs finish, for at most `drain_s` → set `App.closing`, which ends every
stream with an error line at its next event, and call `release`, which takes away what the others wait for → cancel what is left.
A second signal goes straight to the end of that list.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server
from starlette.types import Receive, Scope, Send

from corral.edges.asgi import App
from corral.edges.port import check_free, resolve
from corral.wire.errors import CorralError

HEADER_TIMEOUT_MS = 10_000
DRAIN_S = 30.0
#: How long the other end of a connection may take nothing of what is sent, or be gone, until the system ends the connection.
STALLED_S = 60
_PROBE_EVERY_S = 10
#: How long streams get to write their error line, and tasks to end once they are canceled.
_LAST_WORDS_S = 2.0
_READY_S = 10.0
_BACKLOG = 512

_log = logging.getLogger("corral.server")


class _Tracked:
    """The application, with the tasks that are running it, so that an end can wait for them or cancel them."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.tasks: set[asyncio.Task[Any]] = set()
        self.is_cut = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self.is_cut:
                raise
        finally:
            self.tasks.discard(task)


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
    and connections that running streams wait for; called only when draining takes too long. Raises: see `check_free`."""
    check_free(host, port)
    address = resolve(host, port)
    stop, hurry = stop or asyncio.Event(), asyncio.Event()
    tracked = _Tracked(app)
    server = _make_server(tracked, address, port)
    with _signals(stop, hurry):
        serving = asyncio.create_task(server.serve())
        await _until_ready(serving, address, port)
        _end_what_stalls(port)
        on_ready()
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([stopping, serving], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        server.stop()  # type: ignore[no-untyped-call]
        if not await _drained(serving, hurry, drain_s):
            await _cut(app, tracked, serving, release)
    if serving.done():
        serving.result()


def _make_server(target: Callable[[Scope, Receive, Send], Awaitable[None]], address: str, port: int) -> Server:
    return Server(
        target,
        address=address,
        port=port,
        # Start and end of the application are ours: Granian would swallow what went wrong in a lifespan.
        interface=Interfaces.ASGINL,
        # Nothing here needs HTTP/2, and while Granian looks for its preface, no time limit runs.
        http=HTTPModes.http1,
        backlog=_BACKLOG,
        websockets=False,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_TIMEOUT_MS),
        log_level=LogLevels.error,
        log_dictconfig={"handlers": {}, "loggers": {"_granian": {"propagate": True}, "granian.access": {"propagate": False}}},
    )


def _end_what_stalls(port: int) -> None:
    """Have the system end connections that stall, and look after those whose other end may be gone (R7, R8).

    The HTTP server never ends a connection that takes nothing, and keeps up to two megabytes for each: whoever begins to read
    something could use up its memory. It does not hand its sockets out either, so the one that listens is looked for;
    connections inherit its options.
    """
    for listening in _listening_sockets(port):
        # A system may know an option and refuse it; served is all the same.
        with listening, contextlib.suppress(OSError):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_S * 1000)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, STALLED_S)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_S)


def _listening_sockets(port: int) -> Iterator[socket.socket]:
    """Copies of this process's sockets that listen on that port, where the system shows them.

    Nothing else is copied: closing the copy of a file would give up every lock that this process has on it, the database's.
    """
    names = os.listdir("/proc/self/fd") if sys.platform == "linux" else ()  # noqa: PTH208 - names, no paths
    # All looked at before the first copy is made, which would be found as well.
    for descriptor in [descriptor for descriptor in map(int, names) if _is_socket(descriptor)]:
        with contextlib.suppress(OSError):
            found = socket.socket(fileno=os.dup(descriptor))
            is_ours = found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port
            if is_ours and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield found
            else:
                found.close()


def _is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return False


async def _until_ready(serving: asyncio.Task[None], address: str, port: int) -> None:
    """Return when a connection is taken. Raises: what made the server end before that."""
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - where to knock, not where to listen
    async with asyncio.timeout(_READY_S):
        while not serving.done():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(target, port)
                writer.close()
                return
            await asyncio.sleep(0.005)
    try:
        serving.result()
    except RuntimeError as error:
        # Granian's text is a stack trace of its own; the race for the port that causes this is described well enough by one line.
        raise CorralError("conflict", f"something already listens on {address}:{port}") from error
    raise CorralError("unavailable", f"the HTTP server ended before it listened on {address}:{port}")


async def _drained(serving: asyncio.Task[None], hurry: asyncio.Event, drain_s: float) -> bool:
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait([serving, hurrying], timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    return serving.done()


async def _cut(app: App, tracked: _Tracked, serving: asyncio.Task[None], release: Callable[[], Awaitable[None]]) -> None:
    _log.warning("ending %d requests that are still running", len(tracked.tasks))
    app.closing.set()
    await release()
    await asyncio.wait([serving], timeout=_LAST_WORDS_S)
    tracked.is_cut = True
    # The tasks are canceled, never `serving` itself: Granian's threads would call into a loop that is gone.
    for task in tuple(tracked.tasks):
        task.cancel()
    await asyncio.wait([serving], timeout=_LAST_WORDS_S)


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
