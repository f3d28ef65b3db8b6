"""Work that is done once however many wait for it, and answers that hold for a while."""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Any, TypeVar

from corral.core.ports import Clock
from corral.wire.errors import CorralError

#: How many answers are remembered.
_MAX_REMEMBERED = 10_000

_log = logging.getLogger("corral.hub")

T = TypeVar("T")


class SharedWork:
    """Work under way, by what it is. It goes on when nobody waits for it any more, and is canceled with the hub."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}

    async def do(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        """What the work gives; done once for all who ask while it runs. key: the same for the same work. Raises: what the work
        does, each caller an error of its own; unavailable when it is canceled."""
        task, caller = self.begin(key, work), asyncio.current_task()
        try:
            result = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled() or (caller is not None and caller.cancelling()):
                raise
            raise CorralError("unavailable", "this server is stopping; try again") from None
        if isinstance(result, CorralError):
            raise result.again()
        return result

    def begin(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> asyncio.Task[T | CorralError]:
        """Have the work done without waiting for it."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = self._group.create_task(_result_of(work))
            task.add_done_callback(lambda _: self._tasks.pop(key, None))
        return task

    def cancel(self) -> None:
        """End all work."""
        for task in list(self._tasks.values()):
            task.cancel()


@contextlib.asynccontextmanager
async def shared_work() -> AsyncIterator[SharedWork]:
    """Shared work that ends with the block."""
    async with asyncio.TaskGroup() as group:
        work = SharedWork(group)
        try:
            yield work
        finally:
            work.cancel()


async def _result_of(work: Callable[[], Awaitable[T]]) -> T | CorralError:
    # An error is a result here: as an exception it would end the group, and with it the work of everybody else.
    try:
        return await work()
    except CorralError as error:
        return error
    except Exception:  # noqa: BLE001 - the outermost loop of a background task
        _log.exception("background work failed")
        return CorralError("internal")


class Remembered:
    """Answers that hold for a while: that something is so, or an error. The oldest are forgotten first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._answers: OrderedDict[Hashable, tuple[int, CorralError | None]] = OrderedDict()

    def note(self, question: Hashable, seconds: float, error: CorralError | None = None) -> None:
        """Remember an answer for so long."""
        self._answers[question] = (self._clock.monotonic_ns() + round(seconds * 1e9), error)
        self._answers.move_to_end(question)
        if len(self._answers) > _MAX_REMEMBERED:
            self._answers.popitem(last=False)

    def forget(self, question: Hashable) -> None:
        """Ask anew the next time."""
        self._answers.pop(question, None)

    def holds(self, question: Hashable) -> bool:
        """Whether the question was answered lately. Raises: the error that it was answered with."""
        until, error = self._answers.get(question, (0, None))
        if self._clock.monotonic_ns() >= until:
            return False
        if error is not None:
            raise error.again()
        return True
