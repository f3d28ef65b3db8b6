"""Running requests end when their credential does, and only then."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from corral.core.records import Principal
from corral.hub.running import RunningRequests, Watched
from corral.wire.errors import CorralError
from fakes_inference import a_caller


class Door:
    """Says which credentials live, and counts how often it is asked."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()
        self.fails: Exception | None = None
        self.asked: list[str] = []

    async def __call__(self, principal: Principal) -> bool:
        self.asked.append(principal.credential_id)
        if self.fails is not None:
            raise self.fails
        return principal.credential_id not in self.revoked


async def events() -> AsyncIterator[int]:
    yield 1
    await asyncio.Event().wait()


async def read(watched: Watched, reached: asyncio.Event) -> None:
    source = events()
    assert await watched.next(source) == 1
    reached.set()
    await watched.next(source)


async def test_watched_events_pass_until_their_end() -> None:
    async def two() -> AsyncIterator[int]:
        yield 1
        yield 2

    with RunningRequests(Door()).watch(a_caller()) as watched:
        source = two()
        assert [await watched.next(source) for _ in range(3)] == [1, 2, None]


async def test_t021_request_that_waits_ends_when_its_credential_is_revoked() -> None:
    door = Door()
    running = RunningRequests(door)
    reached = asyncio.Event()
    with running.watch(a_caller()) as watched:
        reading = asyncio.create_task(read(watched, reached))
        await reached.wait()
        await running.recheck()
        assert not reading.done()
        door.revoked.add("k1")
        await running.recheck()
        with pytest.raises(CorralError, match="revoked") as caught:
            await reading
    assert caught.value.code == "unauthorized"


async def test_t021_request_that_is_sending_ends_at_its_next_event() -> None:
    door = Door()
    running = RunningRequests(door)
    with running.watch(a_caller()) as watched:
        source = events()
        await watched.next(source)
        door.revoked.add("k1")
        await running.recheck()
        with pytest.raises(CorralError, match="revoked"):
            await watched.next(source)


async def test_t062_other_credentials_go_on() -> None:
    door = Door()
    running = RunningRequests(door)
    with running.watch(a_caller("ada", credential_id="k1")) as one, running.watch(a_caller("bob", credential_id="k2")) as two:
        door.revoked.add("k1")
        await running.recheck()
        with pytest.raises(CorralError):
            await one.next(events())
        assert await two.next(events()) == 1


async def test_many_requests_of_one_credential_cost_one_question() -> None:
    door = Door()
    running = RunningRequests(door)
    with running.watch(a_caller()), running.watch(a_caller()), running.watch(a_caller(credential_id="k2")):
        await running.recheck()
    assert sorted(door.asked) == ["k1", "k2"]
    await running.recheck()
    assert len(door.asked) == 2


async def test_database_that_is_away_is_forgiven_once() -> None:
    door = Door()
    running = RunningRequests(door)
    with running.watch(a_caller()) as watched:
        source = events()
        door.fails = CorralError("unavailable")
        await running.recheck()
        assert await watched.next(source) == 1
        await running.recheck()
        with pytest.raises(CorralError) as caught:
            await watched.next(source)
    assert caught.value.code == "unavailable"


async def test_database_that_came_back_starts_the_count_anew() -> None:
    door = Door()
    running = RunningRequests(door)
    with running.watch(a_caller()) as watched:
        for failure in (CorralError("unavailable"), None, CorralError("unavailable")):
            door.fails = failure
            await running.recheck()
        assert await watched.next(events()) == 1


async def test_cancellation_from_outside_goes_on() -> None:
    reached = asyncio.Event()
    with RunningRequests(Door()).watch(a_caller()) as watched:
        reading = asyncio.create_task(read(watched, reached))
        await reached.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_cancellation_from_outside_wins_over_a_revocation() -> None:
    door = Door()
    running = RunningRequests(door)
    reached = asyncio.Event()
    with running.watch(a_caller()) as watched:
        reading = asyncio.create_task(read(watched, reached))
        await reached.wait()
        door.revoked.add("k1")
        await running.recheck()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_checks_go_on_by_themselves_while_something_runs_and_survive_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    door = Door()
    door.fails = ZeroDivisionError()
    running = RunningRequests(door, every_s=0)
    reached = asyncio.Event()
    with running.watch(a_caller()) as watched:
        reading = asyncio.create_task(read(watched, reached))
        await reached.wait()
        while not door.asked:
            await asyncio.sleep(0)
        door.fails = None
        door.revoked.add("k1")
        with pytest.raises(CorralError, match="revoked"):
            await reading
    assert "checking running requests failed" in caplog.text
