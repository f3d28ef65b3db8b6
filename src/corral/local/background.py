"""Small work that nobody waits for: begun by a request, ended with the server."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from corral.wire.errors import CorralError

#: More than that is not begun: whatever floods a server with requests must not flood the hub as well.
_MAX_TASKS = 16

_log = logging.getLogger("corral.server")


class Background:
    """Tasks of one server."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, work: Callable[[], Awaitable[None]], *, time_s: float) -> bool:
        """Have work done, for so long at most. Its failure is nobody's. False when too much is under way already: it is not
        begun."""
        if len(self._tasks) >= _MAX_TASKS:
            return False
        task = self._group.create_task(_done(work, time_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def cancel(self) -> None:
        """End all work."""
        for task in list(self._tasks):
            task.cancel()


@contextlib.asynccontextmanager
async def background_work() -> AsyncIterator[Background]:
    """Work that ends with the block."""
    async with asyncio.TaskGroup() as group:
        work = Background(group)
        try:
            yield work
        finally:
            work.cancel()


async def _done(work: Callable[[], Awaitable[None]], time_s: float) -> None:
    try:
        async with asyncio.timeout(time_s):
            await work()
    except CorralError as error:
        _log.info("background work failed: %s", error.message)
    except TimeoutError:
        _log.info("background work took too long")
    except Exception:  # noqa: BLE001 - the outermost loop of a background task
        _log.exception("background work failed")
