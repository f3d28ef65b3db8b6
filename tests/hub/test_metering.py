"""Usage on its way to the database: batched, bounded, and neither lost nor counted twice."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest

from corral.core.records import Proof, UsageEntry
from corral.hub.metering import UsageMeter
from corral.wire.errors import CorralError
from fakes import NOON, MemoryUsage

ENTRY = UsageEntry(
    account_id="a",
    credential_id="k",
    proof=Proof.API_KEY,
    model="m:latest",
    path="/api/chat",
    started_at=NOON,
    duration_ns=1,
    prompt_tokens=1,
    eval_tokens=1,
    outcome="ok",
)


def entries(count: int) -> list[UsageEntry]:
    return [replace(ENTRY, duration_ns=number) for number in range(count)]


async def test_flush_writes_what_was_recorded_in_batches_and_order() -> None:
    store = MemoryUsage()
    meter = UsageMeter(store)
    for entry in entries(1201):
        meter.record(entry)
    await meter.flush()
    assert store.entries == entries(1201)
    assert store.calls["add"] == 3
    await meter.flush()
    assert store.calls["add"] == 3


async def test_flush_keeps_entries_while_the_store_is_away(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryUsage()
    meter = UsageMeter(store)
    store.fails = CorralError("unavailable")
    for entry in entries(3):
        meter.record(entry)
    with caplog.at_level(logging.WARNING):
        await meter.flush()
    assert "3 usage entries wait" in caplog.text
    store.fails = None
    await meter.flush()
    assert store.entries == entries(3)


async def test_full_queue_drops_the_oldest_and_says_how_many(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryUsage()
    meter = UsageMeter(store, capacity=3)
    for entry in entries(5):
        meter.record(entry)
    with caplog.at_level(logging.WARNING):
        await meter.flush()
        await meter.flush()
    assert store.entries == entries(5)[2:]
    assert meter.dropped == 2
    assert [record.message for record in caplog.records] == [
        "2 usage entries were dropped: the database did not take them in time"
    ]


async def test_entries_that_arrive_during_a_failing_write_push_out_older_ones() -> None:
    meter: UsageMeter

    class Slow(MemoryUsage):
        async def add(self, batch: Sequence[UsageEntry]) -> None:
            if self.calls["add"] == 0:
                meter.record(replace(ENTRY, duration_ns=100))
                self.fails = CorralError("unavailable")
            else:
                self.fails = None
            await super().add(batch)

    store = Slow()
    meter = UsageMeter(store, capacity=3)
    for entry in entries(3):
        meter.record(entry)
    await meter.flush()
    assert meter.dropped == 1
    await meter.flush()
    assert [entry.duration_ns for entry in store.entries] == [1, 2, 100]


async def test_unexpected_failure_keeps_the_batch_and_is_raised() -> None:
    store = MemoryUsage()
    meter = UsageMeter(store)
    meter.record(ENTRY)
    store.fails = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        await meter.flush()
    store.fails = None
    await meter.flush()
    assert store.entries == [ENTRY]


async def test_canceled_flush_does_not_write_twice() -> None:
    written: list[UsageEntry] = []
    started = asyncio.Event()

    class Hanging(MemoryUsage):
        async def add(self, batch: Sequence[UsageEntry]) -> None:
            written.extend(batch)  # as the adapter's thread does, whatever becomes of who waits for it
            started.set()
            await asyncio.Event().wait()

    meter = UsageMeter(Hanging())
    meter.record(ENTRY)
    flushing = asyncio.create_task(meter.flush())
    await started.wait()
    flushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    assert written == [ENTRY]
    meter._store = MemoryUsage()
    await meter.flush()
    assert meter._store.entries == []
