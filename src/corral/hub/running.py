"""Requests that are running, each ended within seconds when its credential is revoked.

One task checks them all, so that a thousand streams of one key cost one look-up and no stream has a timer of its own. It lives
only while something runs, so that nobody has to remember to start it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from corral.core.records import Principal
from corral.wire.errors import CorralError

T = TypeVar("T")

#: A revoked credential's streams end within five seconds (T21), of which the check itself may take one.
RECHECK_EVERY_S = 4.0
#: A database that cannot be asked is forgiven once: a lock of some seconds must not end everybody's streams.
_FORGIVEN_FAILURES = 1

_log = logging.getLogger("corral.server")


class Watched:
    """One running request, checked while its block runs."""

    __slots__ = ("_error", "_is_interrupted", "_running", "_waiting", "principal")

    def __init__(self, principal: Principal, running: "RunningRequests") -> None:
        self.principal = principal
        self._running = running
        self._error: CorralError | None = None
        self._waiting: asyncio.Task[object] | None = None
        self._is_interrupted = False

    def __enter__(self) -> "Watched":
        self._running.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._running.discard(self)

    async def next(self, events: AsyncIterator[T]) -> T | None:
        """The next event, None at the end. Raises: unauthorized once the credential is found revoked, also while waiting."""
        if self._error is not None:
            raise self._error
        task = self._waiting = asyncio.current_task()
        try:
            return await anext(events, None)
        except asyncio.CancelledError:
            # uncancel() tells our own interruption from a cancellation that comes from outside, which must go on.
            if self._is_interrupted and self._error is not None and task is not None and task.uncancel() == 0:
                raise self._error from None
            raise
        finally:
            self._waiting = None

    def end(self, error: CorralError) -> None:
        """Let the request fail with this error, now if it waits for an event."""
        if self._error is not None:
            return
        self._error = error
        if self._waiting is not None:
            self._is_interrupted = True
            self._waiting.cancel()


class RunningRequests:
    """All running requests of one process. is_live: whether a credential would still be accepted."""

    def __init__(self, is_live: Callable[[Principal], Awaitable[bool]], *, every_s: float = RECHECK_EVERY_S) -> None:
        self._is_live = is_live
        self._every_s = every_s
        self._watched: set[Watched] = set()
        self._checker: asyncio.Task[None] | None = None
        self._failures: dict[str, int] = {}

    def watch(self, principal: Principal) -> Watched:
        """A request of somebody; checked while a `with` block of it runs."""
        return Watched(principal, self)

    def add(self, watched: Watched) -> None:
        """Begin to check a request; for Watched."""
        self._watched.add(watched)
        if self._checker is None or self._checker.done():
            self._checker = asyncio.create_task(self._check_while_running())

    def discard(self, watched: Watched) -> None:
        """Check it no longer."""
        self._watched.discard(watched)

    async def recheck(self) -> None:
        """Ask for every credential in use once, and end the requests of those that are refused now."""
        by_credential: dict[str, list[Watched]] = {}
        for watched in self._watched:
            by_credential.setdefault(watched.principal.credential_id, []).append(watched)
        self._failures = {credential: count for credential, count in self._failures.items() if credential in by_credential}
        for credential, group in by_credential.items():
            error = await self._judge(credential, group[0].principal)
            if error is not None:
                for watched in group:
                    watched.end(error)

    async def _judge(self, credential: str, principal: Principal) -> CorralError | None:
        """Why the requests of a credential must end, if they must."""
        try:
            is_live = await self._is_live(principal)
        except CorralError as error:
            self._failures[credential] = self._failures.get(credential, 0) + 1
            return error if self._failures[credential] > _FORGIVEN_FAILURES else None
        self._failures.pop(credential, None)
        return None if is_live else CorralError("unauthorized", "this credential was revoked")

    async def _check_while_running(self) -> None:
        while self._watched:
            await asyncio.sleep(self._every_s)
            try:
                await self.recheck()
            except Exception:  # noqa: BLE001 - the outermost loop of a background task
                _log.exception("checking running requests failed")
