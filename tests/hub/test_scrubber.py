"""Scrubbing: what is read when, what is told of it, and that it keeps to its pace."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest

from corral.core.scrubbing import BlobToCheck, Condition, HurtBlob, Pace, ScrubProgress
from corral.hub.scrubber import SCRUB_BYTES_S, Scrubber
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from fakes import NOON, FakeClock, MemoryAudit
from identity_hub import error_of

WEIGHTS, CONFIG = Digest("a" * 64), Digest("b" * 64)
MONTH = timedelta(days=30)
ROTTEN = Condition.DAMAGED


@dataclass
class Row:
    size_bytes: int
    checked_at: datetime = NOON
    damaged_at: datetime | None = None
    models: tuple[str, ...] = ("alice/tiny:latest",)


@dataclass
class Store:
    rows: dict[Digest, Row]

    def _due(self, before: datetime) -> list[tuple[Digest, Row]]:
        return sorted(
            ((digest, row) for digest, row in self.rows.items() if row.damaged_at or row.checked_at < before),
            key=lambda item: str(item[0]),
        )

    async def blobs_to_check(self, *, checked_before: datetime, limit: int, after: str = "") -> Sequence[BlobToCheck]:
        due = [(digest, row) for digest, row in self._due(checked_before) if str(digest) > after][:limit]
        return [
            BlobToCheck(digest=digest, size_bytes=row.size_bytes, is_damaged=row.damaged_at is not None) for digest, row in due
        ]

    async def bytes_to_check(self, *, checked_before: datetime) -> int:
        return sum(row.size_bytes for _, row in self._due(checked_before))

    async def note_check(self, digest: Digest, *, at: datetime, is_damaged: bool) -> None:
        row = self.rows[digest]
        row.checked_at, row.damaged_at = at, (row.damaged_at or at) if is_damaged else None

    async def hurt_blobs(self) -> Sequence[HurtBlob]:
        return [
            HurtBlob(digest=digest, size_bytes=row.size_bytes, since=row.damaged_at, models=row.models)
            for digest, row in sorted(self.rows.items(), key=lambda item: str(item[0]))
            if row.damaged_at is not None
        ]


@dataclass
class Files:
    """conditions: of those that are not intact. here: what has a file in its place, of the damaged."""

    conditions: dict[Digest, Condition] = field(default_factory=dict)
    here: set[Digest] = field(default_factory=set)
    read: list[Digest] = field(default_factory=list)
    forgotten: list[Digest] = field(default_factory=list)

    async def check(self, digest: Digest, size_bytes: int, pace: Pace) -> Condition:
        self.read.append(digest)
        await pace(size_bytes)
        return self.conditions.get(digest, Condition.INTACT)

    async def forget_aside(self, digest: Digest) -> None:
        self.forgotten.append(digest)

    def size_of(self, digest: Digest) -> int | None:
        return 1 if digest in self.here else None


class Hub:
    """A scrubber over two blobs that came at noon."""

    def __init__(self) -> None:
        self.clock, self.audit = FakeClock(), MemoryAudit()
        self.store = Store({WEIGHTS: Row(SCRUB_BYTES_S * 10), CONFIG: Row(500)})
        self.files = Files()
        self.pauses: list[float] = []
        self.is_other_at_it = False
        self.scrubber = Scrubber(
            store=self.store,
            files=self.files,
            size_of=self.files.size_of,
            audit=self.audit,
            clock=self.clock,
            alone=self._alone,
            sleep=self._sleep,
        )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self.is_other_at_it:
            raise CorralError("conflict", "another scrub is under way")
        yield

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock.advance(seconds)

    @property
    def told(self) -> list[tuple[str, str, str, str]]:
        return [(event.actor, event.action, event.subject, event.note) for event in self.audit.events]


@pytest.fixture
def hub() -> Hub:
    return Hub()


async def test_scrub_reads_everything_and_says_how_far_it_is(hub: Hub) -> None:
    seen: list[tuple[int, int]] = []

    def report(progress: ScrubProgress) -> None:
        seen.append((progress.done_bytes, progress.total_bytes))

    found = await hub.scrubber.scrub(actor="console", report=report)
    total = SCRUB_BYTES_S * 10 + 500
    assert (found.blobs, found.size_bytes, found.damaged, found.healed, found.hurt) == (2, total, 0, 0, [])
    assert seen == [(SCRUB_BYTES_S * 10, total), (total, total)]
    assert hub.pauses == []
    assert hub.told == []


async def test_damage_is_told_once_with_the_models_it_hurts(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.files.conditions[WEIGHTS] = ROTTEN
    hub.store.rows[WEIGHTS].models = tuple(f"alice/m{number}:v1" for number in range(7))
    hub.clock.advance(MONTH.total_seconds() + 1)
    with caplog.at_level(logging.ERROR):
        found = await hub.scrubber.tend(every=MONTH, is_busy=lambda: False)
    assert (found.damaged, [blob.digest for blob in found.hurt]) == (1, [WEIGHTS])
    models = "alice/m0:v1, alice/m1:v1, alice/m2:v1, alice/m3:v1, alice/m4:v1 and 2 more"
    assert hub.told == [("", "blob.damaged", str(WEIGHTS), models)]
    assert [record.getMessage() for record in caplog.records] == [
        f"blob {WEIGHTS} is damaged and is not served any more; push it again: {models}"
    ]
    since = found.hurt[0].since
    hub.clock.advance(60)
    again = await hub.scrubber.scrub(actor="console")
    assert (again.damaged, again.hurt[0].since, len(hub.told)) == (0, since, 1)


async def test_missing_blob_is_damaged_too(hub: Hub) -> None:
    hub.files.conditions[CONFIG] = Condition.MISSING
    found = await hub.scrubber.scrub(actor="console")
    assert found.damaged == 1
    assert hub.told == [("console", "blob.damaged", str(CONFIG), "alice/tiny:latest")]


async def test_blob_that_was_pushed_again_is_found_whole(hub: Hub) -> None:
    hub.files.conditions[WEIGHTS] = ROTTEN
    await hub.scrubber.scrub(actor="console")
    del hub.files.conditions[WEIGHTS]
    hub.files.here.add(WEIGHTS)
    found = await hub.scrubber.tend(every=MONTH, is_busy=lambda: False)
    assert (found.blobs, found.healed, found.hurt) == (1, 1, [])
    assert hub.files.forgotten == [WEIGHTS]
    assert hub.told[-1] == ("", "blob.healed", str(WEIGHTS), "")


async def test_running_hub_reads_what_is_due_and_slowly(hub: Hub) -> None:
    assert (await hub.scrubber.tend(every=MONTH, is_busy=lambda: False)).blobs == 0
    hub.clock.advance(MONTH.total_seconds() + 1)
    assert (await hub.scrubber.tend(every=MONTH, is_busy=lambda: False)).blobs == 2
    assert sum(hub.pauses) == pytest.approx(10, abs=0.1)
    assert (await hub.scrubber.tend(every=MONTH, is_busy=lambda: False)).blobs == 0


async def test_running_hub_does_not_read_what_was_set_aside_every_hour(hub: Hub) -> None:
    hub.files.conditions[WEIGHTS] = ROTTEN
    await hub.scrubber.scrub(actor="console")
    hub.files.read.clear()
    assert (await hub.scrubber.tend(every=MONTH, is_busy=lambda: False)).blobs == 0
    assert hub.files.read == []
    # Who asks wants to know whether a repair was one.
    await hub.scrubber.scrub(actor="console")
    assert hub.files.read == [WEIGHTS, CONFIG]


async def test_busy_machine_is_left_alone(hub: Hub) -> None:
    hub.clock.advance(MONTH.total_seconds() + 1)
    busy = [True, True, False, True, False]
    await hub.scrubber.tend(every=MONTH, is_busy=lambda: busy.pop(0))
    assert hub.pauses.count(5.0) == 3
    assert busy == []


async def test_rate_that_is_asked_for_is_kept(hub: Hub) -> None:
    await hub.scrubber.scrub(actor="console", bytes_s=SCRUB_BYTES_S * 5)
    assert sum(hub.pauses) == pytest.approx(2, abs=0.01)


async def test_two_do_not_scrub_at_once(hub: Hub) -> None:
    hub.is_other_at_it = True
    assert (await error_of(hub.scrubber.scrub(actor="console"))).code == "conflict"
    assert hub.files.read == []


async def test_running_hub_keeps_nobody_from_a_scrub(hub: Hub) -> None:
    hub.is_other_at_it = True
    hub.clock.advance(MONTH.total_seconds() + 1)
    assert (await hub.scrubber.tend(every=MONTH, is_busy=lambda: False)).blobs == 2
