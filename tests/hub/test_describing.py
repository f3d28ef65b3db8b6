"""Describing in the background: everything that waits, once, also after trouble."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from corral.core.catalog import Facts, Kind
from corral.core.records import Principal
from corral.core.registry import StoredManifest
from corral.hub.describing import Describing
from fakes_catalog import MemoryCatalog, PlainDescriber
from registry_hub import TINY, RegistryHub

LLAMA = Facts(kind=Kind.MODEL, family="llama")


class Workshop(RegistryHub):
    """A registry in memory, and what describes it."""

    def __init__(self, *, fails: int = 0, pause_s: float = 60.0) -> None:
        super().__init__()
        self.catalog = MemoryCatalog(self.store, self.accounts)
        self.describer = PlainDescriber(LLAMA, fails=fails)
        self.describing = Describing(self.catalog, self.describer, pause_s=pause_s)

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """While the background task runs."""
        task = asyncio.create_task(self.describing.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def until_described(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.describer.seen) < count or await self.catalog.undescribed(limit=1):
                await asyncio.sleep(0)


@pytest.fixture
async def workshop() -> Workshop:
    return Workshop()


async def put(workshop: Workshop, *tags: str) -> None:
    alice = await workshop.add("alice") if await workshop.accounts.by_name("alice") is None else None
    caller: Principal = alice or workshop.alice  # type: ignore[attr-defined]
    workshop.alice = caller  # type: ignore[attr-defined]
    for tag in tags:
        await workshop.push(TINY, caller, tag.encode(), tag=tag)


async def test_everything_that_waits_is_described_once(workshop: Workshop) -> None:
    await put(workshop, *(f"v{number}" for number in range(40)))
    await workshop.describing.catch_up()
    await workshop.describing.catch_up()
    assert len(workshop.describer.seen) == len(set(workshop.describer.seen)) == 40


async def test_start_catches_up_with_what_was_pushed_before(workshop: Workshop) -> None:
    await put(workshop, "a", "b")
    async with workshop.working():
        await workshop.until_described(2)


async def test_push_is_described_without_waiting_for_the_pause(workshop: Workshop) -> None:
    async with workshop.working():
        await asyncio.sleep(0)
        await put(workshop, "a")
        workshop.describing.notify()
        await workshop.until_described(1)


async def test_what_another_process_stored_is_found_after_the_pause() -> None:
    workshop = Workshop(pause_s=0.001)
    async with workshop.working():
        await asyncio.sleep(0)
        await put(workshop, "a")
        await workshop.until_described(1)


async def test_r004_what_could_not_be_tried_is_tried_again() -> None:
    workshop = Workshop(fails=2, pause_s=0.001)
    await put(workshop, "a", "b")
    async with workshop.working():
        await workshop.until_described(2)


class _Broken(PlainDescriber):
    """Fails once in a way nobody thought of."""

    async def describe(self, stored: StoredManifest) -> object:  # type: ignore[override]
        if not self.seen:
            self.seen.append(stored.digest)
            raise RuntimeError("a bug")
        return await super().describe(stored)


async def test_failure_nobody_thought_of_does_not_end_the_work() -> None:
    workshop = Workshop(pause_s=0.001)
    workshop.describer = _Broken(LLAMA)
    workshop.describing = Describing(workshop.catalog, workshop.describer, pause_s=0.001)
    await put(workshop, "a")
    async with workshop.working():
        await workshop.until_described(2)


@pytest.mark.parametrize("turns", range(6))
async def test_shutdown_that_comes_with_a_push_ends_the_work(workshop: Workshop, turns: int) -> None:
    task = asyncio.create_task(workshop.describing.run())
    for _ in range(20):
        await asyncio.sleep(0)
    workshop.describing.notify()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0.2)
    # A second time, so that a failure of this test is no task that is left.
    task.cancel()
    assert done
    assert task.cancelled()
