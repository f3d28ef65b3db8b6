"""Work that is done once for all who wait, and answers that hold for a while."""

import asyncio

import pytest

from corral.hub import sharing
from corral.hub.sharing import Remembered, shared_work
from corral.wire.errors import CorralError
from fakes import FakeClock


async def test_work_is_done_once_for_all_who_wait() -> None:
    runs = 0

    async def work() -> int:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0)
        return runs

    async with shared_work() as shared:
        assert await asyncio.gather(*(shared.do("a", work) for _ in range(5))) == [1] * 5
        assert await shared.do("b", work) == 2
        assert await shared.do("a", work) == 3


async def test_error_reaches_each_who_waits_as_one_of_its_own() -> None:
    failure = CorralError("busy", "try again", detail={"by": "us"}, retry_after_s=3, status=529, headers={"Kind": "odd"})

    async def work() -> None:
        raise failure

    async with shared_work() as shared:
        errors = await asyncio.gather(*(shared.do("a", work) for _ in range(2)), return_exceptions=True)
    assert [vars(error) for error in errors] == [vars(failure)] * 2
    assert len({id(error) for error in (*errors, failure)}) == 3


async def test_bug_in_one_work_does_not_end_the_others(caplog: pytest.LogCaptureFixture) -> None:
    go_on = asyncio.Event()

    async def broken() -> None:
        raise RuntimeError("a bug")

    async def other() -> str:
        await go_on.wait()
        return "done"

    async with shared_work() as shared:
        waiting = shared.begin("other", other)
        with pytest.raises(CorralError) as caught:
            await shared.do("broken", broken)
        go_on.set()
        assert await waiting == "done"
    assert caught.value.code == "internal"
    assert "a bug" in caplog.text


async def test_work_goes_on_when_nobody_waits_and_ends_with_the_block() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with shared_work() as shared:
        waiting = asyncio.create_task(shared.do("a", work))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not ended.is_set()
    assert ended.is_set()


async def test_whoever_waits_when_all_work_ends_is_told_so() -> None:
    async with shared_work() as shared:
        waiting = asyncio.create_task(shared.do("a", asyncio.Event().wait))
        await asyncio.sleep(0)
        shared.cancel()
        with pytest.raises(CorralError) as caught:
            await waiting
    assert caught.value.code == "unavailable"


async def test_whoever_is_canceled_together_with_the_work_is_canceled() -> None:
    async with shared_work() as shared:
        waiting = asyncio.create_task(shared.do("a", asyncio.Event().wait))
        await asyncio.sleep(0)
        shared.cancel()
        waiting.cancel()
        await asyncio.wait([waiting])
    assert waiting.cancelled()


def test_answer_holds_for_its_time() -> None:
    clock = FakeClock()
    remembered = Remembered(clock)
    remembered.note("a", 10)
    assert remembered.holds("a")
    assert not remembered.holds("b")
    clock.advance(10)
    assert not remembered.holds("a")
    remembered.note("a", 10)
    remembered.forget("a")
    assert not remembered.holds("a")


def test_error_is_raised_anew_while_it_holds() -> None:
    remembered = Remembered(FakeClock())
    remembered.note("a", 10, CorralError("upstream_failed", "no"))
    for _ in range(2):
        with pytest.raises(CorralError, match="no"):
            remembered.holds("a")


def test_oldest_answers_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_MAX_REMEMBERED", 2)
    remembered = Remembered(FakeClock())
    for question in ("a", "b", "a", "c"):
        remembered.note(question, 10)
    assert [remembered.holds(question) for question in ("a", "b", "c")] == [True, False, True]
