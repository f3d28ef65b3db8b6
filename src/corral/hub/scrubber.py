"""Scrubbing: every blob is read again now and then, so that a disk that changed one is found out before somebody needs it.

A blob that is wrong is set aside (storage/scrubbing.py) and so is missing for everybody; it is told of in the audit log and in
the log, with the models it belongs to. A push of it makes it whole, and the next scrub notes that.

A running hub reads slowly and stops while its machine is busy. Who asks for a scrub has it at once, at the disk's own pace.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from corral.core.ports import AuditLog, Clock
from corral.core.records import AuditEvent
from corral.core.scrubbing import BlobToCheck, Condition, HurtBlob, Pace, ScrubFiles, ScrubProgress, ScrubStore
from corral.wire.names import Digest

#: How often a running hub looks for blobs that are due, and how many bytes a second it then reads.
SCRUB_EVERY_S, SCRUB_BYTES_S = 3600.0, 16_000_000
_BUSY_PAUSE_S = 5.0
_AT_ONCE = 100
#: Models that an audit row names.
_NAMED = 5

_log = logging.getLogger("corral.registry")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrubbed:
    """What a scrub found. damaged, healed: this time. hurt: all that are damaged now."""

    blobs: int
    size_bytes: int
    damaged: int
    healed: int
    hurt: Sequence[HurtBlob]


@dataclass(slots=True)
class _Run:
    """One scrub under way. is_asked: by somebody, who has time, so that what was set aside is read again as well."""

    progress: ScrubProgress
    report: Callable[[ScrubProgress], None]
    pace: Pace
    actor: str
    is_asked: bool
    damaged: list[Digest] = field(default_factory=list)
    healed: int = 0

    async def read(self, count: int) -> None:
        """Told of bytes that were read."""
        self.progress.done_bytes += count
        self.report(self.progress)
        await self.pace(count)


class Scrubber:
    """Reads blobs again. alone: holds off every other scrub that somebody asked for. sleep: for seconds."""

    def __init__(
        self,
        *,
        store: ScrubStore,
        files: ScrubFiles,
        size_of: Callable[[Digest], int | None],
        audit: AuditLog,
        clock: Clock,
        alone: Callable[[], AbstractContextManager[None]],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._store = store
        self._files = files
        self._size_of = size_of
        self._audit = audit
        self._clock = clock
        self._alone = alone
        self._sleep = sleep

    async def scrub(self, *, actor: str, bytes_s: int = 0, report: Callable[[ScrubProgress], None] = lambda _: None) -> Scrubbed:
        """Read everything now, at most that many bytes a second where that is not 0. Raises: conflict when another scrub is under
        way; unavailable."""
        moment = self._clock.now() + timedelta(microseconds=1)
        pace = self._paced(bytes_s, lambda: False)
        with self._alone():
            return await self._scrub(moment, actor=actor, pace=pace, report=report, is_asked=True)

    async def tend(self, *, every: timedelta, is_busy: Callable[[], bool]) -> Scrubbed:
        """Read what was not read for so long, slowly, while the machine has nothing better to do. This may take days, so it keeps
        nobody from a scrub: a blob that both read at once is read twice. Raises: unavailable."""
        pace = self._paced(SCRUB_BYTES_S, is_busy)
        return await self._scrub(self._clock.now() - every, actor="", pace=pace, report=lambda _: None, is_asked=False)

    async def _scrub(
        self, before: datetime, *, actor: str, pace: Pace, report: Callable[[ScrubProgress], None], is_asked: bool
    ) -> Scrubbed:
        progress = ScrubProgress(await self._store.bytes_to_check(checked_before=before))
        run, after = _Run(progress, report, pace, actor, is_asked), ""
        while due := await self._store.blobs_to_check(checked_before=before, limit=_AT_ONCE, after=after):
            for blob in due:
                await self._check(blob, run)
            after = str(due[-1].digest)
        hurt = await self._store.hurt_blobs()
        await self._tell(run, hurt)
        return Scrubbed(
            blobs=progress.blobs, size_bytes=progress.done_bytes, damaged=len(run.damaged), healed=run.healed, hurt=hurt
        )

    async def _check(self, blob: BlobToCheck, run: _Run) -> None:
        if blob.is_damaged and not run.is_asked and self._size_of(blob.digest) is None:
            return
        end = run.progress.done_bytes + blob.size_bytes
        found = await self._files.check(blob.digest, blob.size_bytes, run.read)
        # What is wrong is read twice, or not at all.
        run.progress.done_bytes = end
        is_damaged = found is not Condition.INTACT
        await self._store.note_check(blob.digest, at=self._clock.now(), is_damaged=is_damaged)
        run.progress.blobs += 1
        if is_damaged and not blob.is_damaged:
            run.damaged.append(blob.digest)
        if blob.is_damaged and not is_damaged:
            await self._files.forget_aside(blob.digest)
            run.healed += 1
            await self._record("blob.healed", blob.digest, run, "")

    async def _tell(self, run: _Run, hurt: Sequence[HurtBlob]) -> None:
        for blob in hurt:
            if blob.digest in run.damaged:
                more = f" and {len(blob.models) - _NAMED} more" if len(blob.models) > _NAMED else ""
                models = ", ".join(blob.models[:_NAMED]) + more
                if not run.is_asked:
                    _log.error("blob %s is damaged and is not served any more; push it again: %s", blob.digest, models)
                await self._record("blob.damaged", blob.digest, run, models)

    async def _record(self, action: str, digest: Digest, run: _Run, note: str) -> None:
        await self._audit.append(AuditEvent(at=self._clock.now(), actor=run.actor, action=action, subject=str(digest), note=note))

    def _paced(self, bytes_s: int, is_busy: Callable[[], bool]) -> Pace:
        """Waits after what was read, so that no more than that is in a second."""
        free_ns = self._clock.monotonic_ns()

        async def pace(count: int) -> None:
            nonlocal free_ns
            while is_busy():
                await self._sleep(_BUSY_PAUSE_S)
            if bytes_s:
                now_ns = self._clock.monotonic_ns()
                # Time that was not used is not saved up.
                free_ns = max(free_ns, now_ns) + count * 10**9 // bytes_s
                if free_ns > now_ns:
                    await self._sleep((free_ns - now_ns) / 1e9)

        return pace
