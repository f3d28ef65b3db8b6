"""Usage entries on their way to the database: gathered in memory, written in batches, never in the way of a request.

A crash loses at most what one interval gathered. While the database is away entries wait in memory; when more gather than fit,
the oldest go, and the log says how many.
"""

import logging
from collections import deque

from corral.core.ports import UsageStore
from corral.core.records import UsageEntry
from corral.wire.errors import CorralError

#: How often a background task is to call `flush`.
FLUSH_EVERY_S = 1.0
#: At about 300 bytes each, some ten megabytes.
_CAPACITY = 32_768
#: One transaction's worth: few enough to keep the database's write lock short.
_BATCH = 500

_log = logging.getLogger("corral.server")


class UsageMeter:
    """Takes entries from requests and hands them to the store. dropped: how many were lost because it did not take them."""

    def __init__(self, store: UsageStore, *, capacity: int = _CAPACITY) -> None:
        self.dropped = 0
        self._store = store
        self._waiting: deque[UsageEntry] = deque(maxlen=capacity)
        self._dropped_unsaid = 0

    def record(self, entry: UsageEntry) -> None:
        """Note one request. Never waits and never fails."""
        if len(self._waiting) == self._waiting.maxlen:
            self._drop(1)
        self._waiting.append(entry)

    async def flush(self) -> None:
        """Write all that waits, every FLUSH_EVERY_S and once at the end of the process. A store that is away keeps it waiting."""
        if self._dropped_unsaid:
            _log.warning("%d usage entries were dropped: the database did not take them in time", self._dropped_unsaid)
            self._dropped_unsaid = 0
        try:
            while self._waiting:
                await self._write([self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))])
        except CorralError as error:
            _log.warning("%d usage entries wait for the database: %s", len(self._waiting), error.message)

    async def _write(self, batch: list[UsageEntry]) -> None:
        """A batch leaves the queue before it is written, and comes back when that fails. It does not come back when the task is
        canceled: the adapter's thread goes on writing, and nothing may be counted twice."""
        try:
            await self._store.add(batch)
        except Exception:
            assert self._waiting.maxlen is not None
            excess = max(0, len(self._waiting) + len(batch) - self._waiting.maxlen)
            self._drop(excess)
            self._waiting.extendleft(reversed(batch[excess:]))
            raise

    def _drop(self, count: int) -> None:
        self.dropped += count
        self._dropped_unsaid += count
