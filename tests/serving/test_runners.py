"""The scheduler of loaded models, on an engine that runs none and a clock that nobody waits for."""

import asyncio
import random
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any

import pytest

from corral.core.records import Model, ModelDetails
from corral.serving.runners import Lease, RunnerLimits, Runners
from corral.wire.errors import CorralError
from corral.wire.options import merge_options
from fakes import NOON
from fakes_engine import GatedEngine, LoopClock, in_virtual_time, settle, weights

A, B, C = weights("a:1b"), weights("b:1b"), weights("c:1b")


class Bench:
    """Runners with their engine, and requests that come and go."""

    def __init__(self, **limits: object) -> None:
        self.engine = GatedEngine()
        self.runners = Runners(self.engine, LoopClock(), RunnerLimits(**{"parallel": 1, **limits}))  # type: ignore[arg-type]
        # A task that waits for nobody but itself is garbage, which would give its slot back when it is collected.
        self._requests: list[Request] = []

    def request(self, model: Model, **wishes: object) -> "Request":
        """A request that keeps its slot until it is ended."""
        self._requests.append(Request(self, model, wishes))
        return self._requests[-1]

    async def once(self, model: Model, **wishes: object) -> Lease:
        """A request that is served and done."""
        async with self.use(model, wishes) as lease:
            return lease

    def use(self, model: Model, wishes: Mapping[str, Any]) -> AbstractAsyncContextManager[Lease]:
        """Lends a runner as for a request with these options."""
        options = merge_options(model.parameters, wishes["options"]) if "options" in wishes else None
        return self.runners.use(model, **{**wishes, "options": options})

    def shown(self) -> list[tuple[str, float]]:
        """(name, seconds from now to expiry) of what is loaded."""
        now = LoopClock().now()
        return [(entry.model.name.short, (entry.expires_at - now).total_seconds()) for entry in self.runners.loaded()]


class Request:
    """One use of a model, as a task."""

    def __init__(self, bench: Bench, model: Model, wishes: dict[str, object]) -> None:
        self.lease: Lease | None = None
        self._end = asyncio.Event()
        self._fails: Exception | None = None
        self.task = asyncio.create_task(self._run(bench, model, wishes))

    async def _run(self, bench: Bench, model: Model, wishes: dict[str, object]) -> None:
        async with bench.use(model, wishes) as lease:
            self.lease = lease
            await self._end.wait()
            if self._fails is not None:
                raise self._fails

    @property
    def has_slot(self) -> bool:
        return self.lease is not None and not self.task.done()

    async def served(self) -> "Request":
        """Wait for its slot."""
        await settle(lambda: self.lease is not None or self.task.done())
        if self.task.done():
            await self.task
        return self

    async def end(self, fails: Exception | None = None) -> None:
        self._fails = fails
        self._end.set()
        await self.task

    async def leave(self) -> None:
        """Go away, as a client that hangs up."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def pass_time(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def stand_still() -> None:
    """Let everything happen that can happen without time passing."""
    for _ in range(50):
        await asyncio.sleep(0)


# ── Sharing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_use_of_a_loaded_model_loads_nothing_again() -> None:
    bench = Bench()
    first = await bench.once(A)
    second = await bench.once(A)
    assert bench.engine.names == ["a:1b"]
    assert second.runner is first.runner


@in_virtual_time
async def test_lease_tells_how_long_the_load_took_and_is_never_zero() -> None:
    bench = Bench()
    bench.engine.gate.clear()
    request = bench.request(A)
    await pass_time(2)
    bench.engine.gate.set()
    await request.served()
    assert request.lease is not None
    assert request.lease.load_ns == 2_000_000_000
    await request.end()
    assert (await bench.once(A)).load_ns == 1


@in_virtual_time
async def test_slot_is_given_to_one_request_at_a_time_in_order() -> None:
    bench = Bench(parallel=2)
    requests = [bench.request(A) for _ in range(5)]
    await stand_still()
    assert [request.has_slot for request in requests] == [True, True, False, False, False]
    await requests[1].end()
    await stand_still()
    assert [request.has_slot for request in requests] == [True, False, True, False, False]
    await requests[3].leave()
    await requests[0].end()
    await stand_still()
    assert [request.has_slot for request in requests] == [False, False, True, False, True]
    assert bench.engine.names == ["a:1b"]


@in_virtual_time
async def test_load_is_one_at_a_time_and_first_come_first_served() -> None:
    bench = Bench()
    bench.engine.gate.clear()
    requests = [bench.request(model) for model in (A, B, C)]
    await stand_still()
    assert bench.engine.names == ["a:1b"]
    bench.engine.gate.set()
    for request in requests:
        await request.served()
    assert bench.engine.names == ["a:1b", "b:1b", "c:1b"]


@in_virtual_time
async def test_requests_for_the_same_load_share_it() -> None:
    bench = Bench(parallel=3)
    bench.engine.gate.clear()
    requests = [bench.request(A) for _ in range(3)]
    await stand_still()
    bench.engine.gate.set()
    for request in requests:
        await request.served()
    assert bench.engine.names == ["a:1b"]


@in_virtual_time
async def test_use_of_a_loaded_model_does_not_wait_behind_a_load() -> None:
    bench = Bench()
    await bench.once(A)
    bench.engine.gate.clear()
    bench.request(B)
    await stand_still()
    assert (await bench.request(A).served()).has_slot


# ── The queue ────────────────────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_request_beyond_the_queue_is_refused_as_busy() -> None:
    bench = Bench(max_queue=2)
    await bench.request(A).served()
    waiting = [bench.request(A), bench.request(A)]
    await stand_still()
    with pytest.raises(CorralError) as refused:
        await bench.once(A)
    assert (refused.value.status, refused.value.message) == (
        503,
        "server busy, please try again.  maximum pending requests exceeded",
    )
    await waiting[0].leave()
    bench.request(A)
    await stand_still()
    with pytest.raises(CorralError, match="busy"):
        await bench.once(A)


@in_virtual_time
async def test_load_that_begins_at_once_needs_no_place_in_the_queue_and_those_behind_it_do() -> None:
    bench = Bench(max_queue=1)
    bench.engine.gate.clear()
    first = bench.request(A)
    await stand_still()
    second = bench.request(B)
    await stand_still()
    for model in (A, B, C):
        with pytest.raises(CorralError, match="maximum pending requests exceeded"):
            await bench.once(model)
    bench.engine.gate.set()
    assert (await first.served()).has_slot
    assert (await second.served()).has_slot


@in_virtual_time
async def test_queue_of_no_places_serves_who_need_not_wait() -> None:
    bench = Bench(max_queue=0)
    request = await bench.request(A).served()
    with pytest.raises(CorralError, match="busy"):
        await bench.once(A)
    await request.end()
    await bench.once(A)
    await bench.once(B)


@in_virtual_time
async def test_request_that_was_refused_holds_nothing() -> None:
    bench = Bench(max_queue=0, keep_alive_s=10)
    bench.engine.gate.clear()
    loading = bench.request(A)
    await stand_still()
    with pytest.raises(CorralError, match="busy"):
        await bench.once(A)
    bench.engine.gate.set()
    await (await loading.served()).end()
    await pass_time(11)
    assert bench.engine.alive == []


# ── Leaving while waiting ────────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_load_is_aborted_when_the_only_requester_leaves() -> None:
    bench = Bench()
    bench.engine.gate.clear()
    request = bench.request(A)
    await stand_still()
    await request.leave()
    await stand_still()
    assert bench.engine.aborted == ["a:1b"]
    bench.engine.gate.set()
    await bench.once(A)
    assert bench.engine.names == ["a:1b", "a:1b"]


@in_virtual_time
async def test_load_goes_on_when_another_waits_for_it() -> None:
    bench = Bench()
    bench.engine.gate.clear()
    first, second = bench.request(A), bench.request(A)
    await stand_still()
    await first.leave()
    bench.engine.gate.set()
    await second.served()
    assert (bench.engine.names, bench.engine.aborted) == (["a:1b"], [])


@in_virtual_time
async def test_load_that_nobody_waits_for_any_more_is_never_begun() -> None:
    bench = Bench()
    bench.engine.gate.clear()
    first, second = bench.request(A), bench.request(B)
    await stand_still()
    await second.leave()
    bench.engine.gate.set()
    await first.served()
    await stand_still()
    assert bench.engine.names == ["a:1b"]


@in_virtual_time
async def test_requester_that_leaves_as_its_load_ends_leaves_a_runner_that_expires() -> None:
    bench = Bench(keep_alive_s=10)
    bench.engine.gate.clear()
    request = bench.request(A)
    await stand_still()
    bench.engine.gate.set()
    # The load's task has been woken, the requester's not yet.
    await settle(lambda: bool(bench.engine.runners))
    await request.leave()
    await pass_time(11)
    assert bench.engine.alive == []
    assert bench.runners.loaded() == []


@in_virtual_time
async def test_runner_stays_when_the_one_that_wanted_another_leaves() -> None:
    bench = Bench(keep_alive_s=10)
    busy = await bench.request(A).served()
    other = bench.request(A, options={"num_ctx": 2048})
    await stand_still()
    await other.leave()
    await busy.end()
    await bench.once(A)
    assert bench.engine.names == ["a:1b"]
    await pass_time(11)
    assert bench.engine.alive == []


# ── Keep-alive ───────────────────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_keep_alive_starts_when_the_last_lease_ends() -> None:
    bench = Bench(keep_alive_s=10, parallel=2)
    first, second = bench.request(A), bench.request(A)
    await first.served()
    await second.served()
    await pass_time(100)
    await first.end()
    await pass_time(100)
    await second.end()
    await pass_time(9)
    assert bench.engine.alive == ["a:1b"]
    assert bench.shown() == [("a:1b", 1.0)]
    await pass_time(2)
    assert bench.engine.alive == []


@in_virtual_time
async def test_keep_alive_starts_anew_with_every_use() -> None:
    bench = Bench(keep_alive_s=10)
    for _ in range(5):
        await bench.once(A)
        await pass_time(8)
    assert bench.engine.names == ["a:1b"]


@in_virtual_time
async def test_keep_alive_of_a_request_sticks_until_another_one_says_otherwise() -> None:
    bench = Bench(keep_alive_s=10)
    await bench.once(A, keep_alive_s=100)
    await bench.once(A)
    assert bench.shown() == [("a:1b", 100.0)]
    await bench.once(A, keep_alive_s=5)
    assert bench.shown() == [("a:1b", 5.0)]


@in_virtual_time
async def test_keep_alive_of_zero_ends_the_runner_when_idle() -> None:
    bench = Bench(parallel=2)
    slow = await bench.request(A).served()
    await bench.once(A, keep_alive_s=0)
    assert bench.engine.alive == ["a:1b"]
    await slow.end()
    await stand_still()
    assert bench.engine.alive == []


@in_virtual_time
async def test_keep_alive_below_zero_is_for_ever() -> None:
    bench = Bench()
    await bench.once(A, keep_alive_s=-1)
    await pass_time(10 * 86400)
    assert bench.engine.alive == ["a:1b"]
    assert bench.runners.loaded()[0].expires_at > NOON + timedelta(days=290 * 365)


@in_virtual_time
async def test_keep_alive_of_a_hundred_thousand_years_is_for_ever() -> None:
    bench = Bench()
    await bench.once(A, keep_alive_s=3e12)
    assert bench.runners.loaded()[0].expires_at > NOON + timedelta(days=290 * 365)


@in_virtual_time
async def test_loaded_lists_the_latest_expiry_first() -> None:
    bench = Bench()
    await bench.once(A, keep_alive_s=5)
    await bench.once(B, keep_alive_s=500)
    await bench.once(C, keep_alive_s=50)
    assert [name for name, _ in bench.shown()] == ["b:1b", "c:1b", "a:1b"]
    entry = bench.runners.loaded()[0]
    assert entry.context_length == 4096
    assert entry.size_bytes > B.size_bytes
    assert entry.vram_bytes == 0


# ── Unloading ────────────────────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_unload_ends_an_idle_runner_before_it_returns() -> None:
    bench = Bench()
    await bench.once(A)
    await bench.runners.unload(A)
    assert bench.engine.alive == []


@in_virtual_time
async def test_unload_lets_the_work_in_flight_finish() -> None:
    bench = Bench()
    request = await bench.request(A).served()
    await bench.runners.unload(A)
    assert bench.engine.alive == ["a:1b"]
    assert bench.shown() == [("a:1b", 0.0)]
    await request.end()
    await stand_still()
    assert bench.engine.alive == []


@in_virtual_time
async def test_unload_of_what_is_not_loaded_does_nothing() -> None:
    bench = Bench()
    await bench.once(A)
    await bench.runners.unload(B)
    assert bench.engine.alive == ["a:1b"]


# ── Room ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_full_house_evicts_the_idle_runner_with_the_shortest_keep_alive() -> None:
    bench = Bench(max_loaded=2)
    await bench.once(A, keep_alive_s=100)
    await bench.once(B, keep_alive_s=50)
    await bench.once(C)
    assert bench.engine.alive == ["a:1b", "c:1b"]


@in_virtual_time
async def test_full_house_evicts_one_that_stays_for_ever_last() -> None:
    bench = Bench(max_loaded=2)
    await bench.once(A, keep_alive_s=-1)
    await bench.once(B, keep_alive_s=5000)
    await bench.once(C)
    assert bench.engine.alive == ["a:1b", "c:1b"]


@in_virtual_time
async def test_full_house_at_work_waits_for_the_shortest_keep_alive_and_nobody_can_prolong_it() -> None:
    bench = Bench(max_loaded=2, parallel=2)
    long = await bench.request(A, keep_alive_s=100).served()
    short = await bench.request(B, keep_alive_s=50).served()
    wanted = bench.request(C)
    await stand_still()
    late = bench.request(B)
    await stand_still()
    assert not late.has_slot
    await long.end()
    await stand_still()
    assert not wanted.has_slot
    await short.end()
    await wanted.served()
    await late.served()
    assert bench.engine.names == ["a:1b", "b:1b", "c:1b", "b:1b"]
    assert bench.engine.alive == ["c:1b", "b:1b"]


@in_virtual_time
async def test_house_without_enough_memory_is_emptied_first() -> None:
    big = weights("big:1b", size_bytes=600)
    other = weights("other:1b", size_bytes=600)
    bench = Bench(memory_bytes=1000, context_length=0)
    await bench.once(big, options={"num_ctx": 4})
    await bench.once(other, options={"num_ctx": 4})
    assert bench.engine.alive == ["other:1b"]


@in_virtual_time
async def test_new_runner_is_not_evicted_before_its_requester_has_it() -> None:
    bench = Bench(max_loaded=1, parallel=1)
    requests = [bench.request(model) for model in (A, B, C)]
    for request in requests:
        await request.served()
        assert request.lease is not None
        assert await request.lease.runner.is_healthy()
        await request.end()
    assert bench.engine.names == ["a:1b", "b:1b", "c:1b"]


@in_virtual_time
async def test_full_house_evicts_of_equal_keep_alives_the_first_by_path() -> None:
    bench = Bench(max_loaded=2)
    await bench.once(B)
    await bench.once(A)
    await bench.once(C)
    assert bench.engine.alive == ["b:1b", "c:1b"]


@in_virtual_time
async def test_memory_of_accelerators_is_planned_apart_from_main_memory() -> None:
    big = weights("big:1b", size_bytes=600)
    bench = Bench(memory_bytes=10**9, accelerator_bytes=1000)
    await bench.once(A, options={"num_ctx": 4})
    # Scripted runners are in main memory, so the accelerator is as good as empty however many there are.
    await bench.once(big, options={"num_ctx": 4})
    assert bench.engine.alive == ["a:1b", "big:1b"]
    small = Bench(memory_bytes=1000, accelerator_bytes=10**9)
    await small.once(big, options={"num_ctx": 4, "num_gpu": 0})
    await small.once(weights("other:1b", size_bytes=600), options={"num_ctx": 4, "num_gpu": 0})
    assert small.engine.alive == ["other:1b"]


# ── Want of memory ───────────────────────────────────────────────────────────────────────────────────────────────────


def no_memory() -> CorralError:
    return CorralError("out_of_memory", "cudaMalloc failed")


@in_virtual_time
async def test_load_without_memory_is_tried_once_more_alone_with_one_slot() -> None:
    bench = Bench(parallel=4)
    await bench.once(A)
    bench.engine.fails = [no_memory()]
    await bench.once(B, options={"num_ctx": 1024})
    assert [(name, options.num_ctx, options.parallel) for name, options in bench.engine.asked] == [
        ("a:1b", 4096, 4),
        ("b:1b", 1024, 4),
        ("b:1b", 1024, 1),
    ]
    assert bench.engine.alive == ["b:1b"]
    await bench.once(B, options={"num_ctx": 1024})
    assert len(bench.engine.asked) == 3


@in_virtual_time
async def test_load_without_memory_takes_a_smaller_context_where_nobody_chose_one() -> None:
    large = weights("large:1b", metadata={"general.architecture": "llama", "llama.context_length": 500_000})
    for limits, contexts in (
        ({"accelerator_bytes": 48 << 30}, [262_144, 32_768]),
        ({"accelerator_bytes": 24 << 30}, [32_768, 4096]),
        ({"context_length": 50_000}, [50_000]),
        ({}, [4096]),
    ):
        bench = Bench(parallel=1, **limits)
        bench.engine.fails = [no_memory()]
        if len(contexts) == 1:
            with pytest.raises(CorralError, match="cudaMalloc"):
                await bench.once(large)
        else:
            assert (await bench.once(large)).context_length == contexts[-1]
            await bench.once(large)
        assert [options.num_ctx for _, options in bench.engine.asked] == contexts


@in_virtual_time
async def test_load_without_memory_is_tried_no_third_time_and_held_back_after() -> None:
    bench = Bench(parallel=4)
    bench.engine.fails = [no_memory() for _ in range(4)]
    for _ in range(2):
        with pytest.raises(CorralError) as failed:
            await bench.once(A)
        assert (failed.value.code, failed.value.status) == ("out_of_memory", 500)
    assert len(bench.engine.asked) == 4
    with pytest.raises(CorralError) as held:
        await bench.once(A)
    assert (held.value.code, held.value.retry_after_s) == ("unavailable", 1)


@in_virtual_time
async def test_memory_that_runs_out_under_a_model_at_work_ends_the_idle_and_then_the_busy() -> None:
    bench = Bench()
    await bench.once(A, keep_alive_s=-1)
    busy, failing = await bench.request(B).served(), await bench.request(C).served()
    bench.engine.runners[-1].die()
    with pytest.raises(CorralError, match="cudaMalloc"):
        await failing.end(no_memory())
    assert bench.engine.alive == ["b:1b"]
    await busy.end()
    await stand_still()
    assert bench.engine.alive == []


# ── Options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_context_is_automatic_unless_asked_for_and_never_beyond_training() -> None:
    bench = Bench()
    small = weights("small:1b", metadata={"general.architecture": "llama", "llama.context_length": 2048})
    assert (await bench.once(A)).context_length == 4096
    assert (await bench.once(small)).context_length == 2048
    assert (await bench.once(B, options={"num_ctx": 10**9})).context_length == 8192
    assert (await bench.once(C, options={"num_ctx": 1})).context_length == 4


@in_virtual_time
async def test_context_is_shifted_but_by_the_family_that_cannot() -> None:
    bench = Bench()
    await bench.once(A)
    await bench.once(weights("deep:1b", details=ModelDetails(family="deepseek2")))
    assert [options.context_shift for _, options in bench.engine.asked] == [True, False]


@in_virtual_time
async def test_option_that_was_asked_for_loads_again_and_an_automatic_one_does_not() -> None:
    bench = Bench()
    await bench.once(A)
    await bench.once(A, options={"num_ctx": 4096, "temperature": 0.1})
    assert bench.engine.names == ["a:1b"]
    await bench.once(A, options={"num_ctx": 2048})
    await bench.once(A, options={"num_ctx": 2048, "num_gpu": -1, "num_thread": 0, "num_batch": 0, "main_gpu": None})
    assert [options.num_ctx for _, options in bench.engine.asked] == [4096, 2048]
    await bench.once(A, options={"num_ctx": 2048, "num_gpu": 0, "use_mmap": False})
    assert bench.engine.asked[-1][1].num_gpu == 0
    assert len(bench.engine.asked) == 3


@in_virtual_time
@pytest.mark.parametrize(("name", "value"), [("num_ctx", 32), ("num_batch", 8), ("num_thread", 1), ("use_mmap", False)])
async def test_what_one_caller_asked_for_is_not_what_the_next_one_gets(name: str, value: object) -> None:
    bench = Bench()
    await bench.once(A, options={name: value})
    await bench.once(A)
    await bench.once(A)
    given = [getattr(options, name) for _, options in bench.engine.asked]
    assert given[0] == value
    assert len(given) == 2
    assert given[1] != value


@in_virtual_time
async def test_layers_stay_on_the_gpu_where_one_caller_wanted_them() -> None:
    bench = Bench()
    await bench.once(A, options={"num_gpu": 3})
    await bench.once(A)
    assert len(bench.engine.asked) == 1


@in_virtual_time
async def test_clamped_context_is_not_loaded_again_for_the_same_wish() -> None:
    bench = Bench()
    await bench.once(A, options={"num_ctx": 100_000})
    await bench.once(A, options={"num_ctx": 200_000})
    assert bench.engine.names == ["a:1b"]


@in_virtual_time
async def test_parameter_of_the_model_counts_as_asked_for_beneath_the_request() -> None:
    bench = Bench()
    tuned = weights("tuned:1b", parameters={"num_ctx": 1024, "num_thread": 1})
    await bench.once(tuned)
    await bench.once(tuned, options={"num_ctx": 512})
    assert [(options.num_ctx, options.num_thread) for _, options in bench.engine.asked] == [(1024, 1), (512, 1)]


@in_virtual_time
async def test_reload_waits_for_the_work_in_flight() -> None:
    bench = Bench()
    request = await bench.request(A).served()
    other = bench.request(A, options={"num_ctx": 2048})
    await stand_still()
    assert bench.engine.names == ["a:1b"]
    await request.end()
    await other.served()
    assert bench.engine.alive == ["a:1b"]
    assert len(bench.engine.names) == 2


@in_virtual_time
async def test_embedding_loads_again_once_and_is_kept_from_then_on() -> None:
    bench = Bench()
    await bench.once(A)
    await bench.once(A, embedding=True)
    await bench.once(A)
    await bench.once(A, embedding=True)
    await bench.once(A, options={"num_ctx": 2048})
    await bench.once(A, options={"num_ctx": 2048}, embedding=True)
    assert [options.embedding for _, options in bench.engine.asked] == [False, True, True]


@in_virtual_time
async def test_model_with_another_projector_on_the_same_weights_is_loaded_again() -> None:
    bench = Bench()
    await bench.once(A)
    await bench.once(weights("copy:1b", weights=A.weights))
    assert bench.engine.names == ["a:1b"]
    await bench.once(weights("seeing:1b", weights=A.weights, projector="/models/eye"))
    assert bench.engine.names == ["a:1b", "seeing:1b"]


# ── Failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def crash(bench: Bench) -> CorralError:
    """The newest runner dies."""
    bench.engine.runners[-1].die()
    return CorralError("engine_failed", "it crashed")


async def crashed_use(bench: Bench) -> None:
    request = await bench.request(A).served()
    with pytest.raises(CorralError, match="it crashed"):
        await request.end(crash(bench))


@in_virtual_time
async def test_r9_runner_that_died_is_dropped_and_loaded_again_at_once_the_first_time() -> None:
    bench = Bench()
    await crashed_use(bench)
    assert bench.runners.loaded() == []
    await bench.once(A)
    assert bench.engine.names == ["a:1b", "a:1b"]


@in_virtual_time
async def test_r9_runner_that_keeps_dying_is_held_back_longer_each_time() -> None:
    bench = Bench()
    await crashed_use(bench)
    for delay_s in (1, 2, 4, 8, 16, 30, 30):
        await crashed_use(bench)
        with pytest.raises(CorralError) as held:
            await bench.once(A)
        assert (held.value.code, held.value.status, held.value.retry_after_s) == ("unavailable", 503, delay_s)
        assert "it crashed" in held.value.message
        await pass_time(delay_s)


@in_virtual_time
async def test_r9_success_forgets_earlier_crashes() -> None:
    bench = Bench()
    await crashed_use(bench)
    await bench.once(A)
    await crashed_use(bench)
    await bench.once(A)


@in_virtual_time
async def test_r9_other_models_are_not_held_back() -> None:
    bench = Bench()
    await crashed_use(bench)
    await crashed_use(bench)
    await bench.once(B)


@in_virtual_time
async def test_r9_options_of_one_caller_that_kill_the_engine_hold_back_nobody_without_them() -> None:
    bench = Bench()
    bench.engine.fails = [CorralError("engine_failed", "it aborted") for _ in range(2)]
    for context in (64, 32):
        with pytest.raises(CorralError):
            await bench.once(A, options={"num_ctx": context})
    with pytest.raises(CorralError) as held:
        await bench.once(A, options={"num_ctx": 16})
    assert held.value.code == "unavailable"
    await bench.once(A)


@in_virtual_time
async def test_death_seen_by_several_requests_counts_once() -> None:
    bench = Bench(parallel=3)
    requests = [await bench.request(A).served() for _ in range(3)]
    error = crash(bench)
    for request in requests:
        with pytest.raises(CorralError):
            await request.end(error)
    await bench.once(A)


@in_virtual_time
async def test_request_waiting_for_a_slot_of_a_runner_that_dies_gets_a_new_one() -> None:
    bench = Bench()
    request, waiting = await bench.request(A).served(), bench.request(A)
    await stand_still()
    with pytest.raises(CorralError):
        await request.end(crash(bench))
    await waiting.served()
    assert bench.engine.alive == ["a:1b"]
    assert len(bench.engine.names) == 2


@in_virtual_time
async def test_failure_of_a_runner_that_lives_on_keeps_it() -> None:
    bench = Bench()
    request = await bench.request(A).served()
    with pytest.raises(CorralError):
        await request.end(CorralError("engine_failed", "this answer only"))
    await bench.once(A)
    assert bench.engine.names == ["a:1b"]


@in_virtual_time
async def test_runner_that_died_while_idle_is_replaced_unnoticed() -> None:
    bench = Bench()
    await bench.once(A)
    crash(bench)
    lease = await bench.once(A)
    assert lease.runner is bench.engine.runners[1]
    assert bench.engine.alive == ["a:1b"]


@in_virtual_time
async def test_failed_load_reaches_everyone_who_waits_for_it() -> None:
    bench = Bench()
    bench.engine.gate.clear()
    bench.engine.fails = [CorralError("engine_failed", "out of memory")]
    requests = [bench.request(A) for _ in range(2)]
    await stand_still()
    bench.engine.gate.set()
    found = await asyncio.gather(*(request.task for request in requests), return_exceptions=True)
    assert [(error.code, error.message) for error in found] == [("engine_failed", "out of memory")] * 2  # type: ignore[union-attr]
    assert found[0] is not found[1]
    await bench.once(A)


@in_virtual_time
async def test_load_that_is_refused_is_not_held_back() -> None:
    bench = Bench()
    bench.engine.fails = [CorralError("bad_request", "not a GGUF file") for _ in range(4)]
    for _ in range(4):
        with pytest.raises(CorralError, match="GGUF"):
            await bench.once(A)
    await bench.once(A)


# ── A storm ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def passing(bench: Bench, dice: random.Random) -> str:
    """A request that comes, stays and goes when it likes; what became of it."""
    await pass_time(dice.uniform(0, 5))
    wishes: dict[str, object] = {"keep_alive_s": dice.choice([None, 0, 1, 60, -1])}
    if dice.random() < 0.2:
        wishes["options"] = {"num_ctx": dice.choice([1024, 2048])}
    try:
        async with asyncio.timeout(dice.uniform(0, 4) if dice.random() < 0.4 else None):
            async with bench.use(dice.choice([A, B, C]), wishes) as lease:
                await pass_time(dice.uniform(0, 3))
                if dice.random() < 0.05:
                    bench.engine.runners[-1].die()
                if not await lease.runner.is_healthy():
                    raise CorralError("engine_failed", "it crashed")
    except TimeoutError:
        return "left"
    except CorralError as error:
        return error.code
    return "served"


@pytest.mark.parametrize("seed", range(12))
@in_virtual_time
async def test_storm_of_requests_that_come_and_go_leaves_nothing_behind(seed: int) -> None:
    dice = random.Random(seed)
    bench = Bench(max_loaded=2, parallel=3, max_queue=30, keep_alive_s=30)
    ended = await asyncio.gather(*(passing(bench, random.Random(dice.random())) for _ in range(64)))
    assert set(ended) <= {"served", "left", "busy", "engine_failed", "unavailable"}
    assert "served" in ended
    for model in (A, B, C):
        await bench.runners.unload(model)
    assert bench.engine.alive == []
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await pass_time(60)
    # Exactly as many find a slot and a place to wait as at the beginning.
    await bench.once(A)
    requests = [bench.request(A) for _ in range(33)]
    await stand_still()
    assert sum(request.has_slot for request in requests) == 3
    with pytest.raises(CorralError, match="busy"):
        await bench.once(A)
    for request in requests:
        await request.leave()
    await bench.runners.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


# ── The end ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_close_ends_all_engines_loads_and_waiting_requests() -> None:
    bench = Bench()
    busy = await bench.request(A).served()
    waiting = bench.request(A)
    await bench.once(B, keep_alive_s=-1)
    bench.engine.gate.clear()
    loading = bench.request(C)
    await stand_still()
    await bench.runners.close()
    assert bench.engine.alive == []
    assert bench.engine.aborted == ["c:1b"]
    with pytest.raises(CorralError, match="shutting down"):
        await loading.task
    await busy.end()
    with pytest.raises(CorralError, match="shutting down"):
        await waiting.task
    with pytest.raises(CorralError, match="shutting down"):
        await bench.once(B)
    await bench.runners.close()
