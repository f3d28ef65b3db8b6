"""Loaded models: which are in memory, who may use them now, and when they leave it.

Theory of operation. A request *claims* a runner and then takes one of its *slots*; a runner without claims is *at rest*, and only
then can it expire, be evicted or be replaced. Whoever finds a runner that suits claims it at once. Everybody else waits for a
*load*: loads run strictly one at a time, in the order they were asked for, since two of them would fight for the same memory. A
load first retires what stands in its way. A retiring runner takes no new claims, so that a stream of requests to one model cannot
starve another. Requests that want the same load share it; when the last of them leaves, it is aborted.

No step between two awaits leaves the books in a half-written state, so none of this needs a lock but the loads' turn.
Source: ollama-surface.md 7.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from corral.core.ports import Clock, Engine, LoadOptions, Runner
from corral.core.records import Model
from corral.serving.capacity import (
    automatic_context,
    can_shift,
    context_for,
    fits,
    needed_bytes,
    slots_for,
    smaller_context,
)
from corral.wire.errors import CorralError, shutting_down
from corral.wire.options import Options, merge_options

#: The longest Go duration, which is what Ollama shows for a model that stays for ever.
_FOREVER = timedelta(microseconds=2**63 // 1000)
_MAX_BACKOFF_S = 30
_NS_PER_S = 1_000_000_000
#: Where these are not positive, they mean that the engine decides.
_AUTOMATIC_UNLESS_POSITIVE = ("num_ctx", "num_batch", "num_thread")
#: Codes that tell that an engine ended or could not start.
_FAILURES = ("engine_failed", "out_of_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """keep_alive_s: as in `use`. max_loaded: models in memory. max_queue: requests that wait for a load or a slot. parallel:
    slots of one model. context_length: 0 means automatic. memory_bytes, accelerator_bytes: what models may plan with; 0 for
    unknown memory, for no accelerator. kv_bytes: of one number of the key-value cache."""

    keep_alive_s: float = 300
    max_loaded: int = 3
    max_queue: int = 512
    parallel: int = 4
    context_length: int = 0
    memory_bytes: int = 0
    accelerator_bytes: int = 0
    kv_bytes: float = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in memory, as `ps` shows it. expires_at: an estimate while it is in use. context_length: tokens per request."""

    model: Model
    expires_at: datetime
    size_bytes: int
    vram_bytes: int
    context_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One slot of a runner. load_ns: from the call of `use` until the runner was ready, never 0."""

    runner: Runner
    load_ns: int
    context_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What a request needs of a runner. explicit: the load-time options that somebody asked for, after clamping. blame: what a
    failure is counted against. Options that a caller chose may be what kills an engine, so whoever chooses none is not kept
    waiting for what became of them."""

    key: str
    blame: tuple[str, bool]
    model: Model
    explicit: Mapping[str, object]
    options: LoadOptions

    def is_met_by(self, wish: "_Wish", options: LoadOptions) -> bool:
        """Whether a runner that was loaded for that wish, with these options, will do. What nobody asked for is no reason to load
        again; what somebody else asked for is one, but for the layers on a GPU. Source: ollama server/sched.go needsReload."""
        left = (name for name in wish.explicit if name not in self.explicit and name != "num_gpu")
        return (
            all(getattr(options, name) == value for name, value in self.explicit.items())
            and all(getattr(options, name) == getattr(self.options, name) for name in left)
            and (options.embedding or not self.options.embedding)
            and (wish.model.adapters, wish.model.projector) == (self.model.adapters, self.model.projector)
        )


class _Loaded:
    """A runner and its books. claims: requests that hold or wait for a slot. is_leaving: takes no new claims. is_gone: ended."""

    def __init__(self, wish: _Wish, options: LoadOptions, runner: Runner, keep_alive_s: float, now: datetime) -> None:
        self.wish = wish
        self.key = wish.key
        self.blame = wish.blame
        self.model = wish.model
        self.options = options
        self.runner = runner
        self.keep_alive_s = keep_alive_s
        self.expires_at = now
        self.slots = asyncio.Semaphore(options.parallel)
        self.claims = 0
        self.at_rest = asyncio.Event()
        self.timer: asyncio.TimerHandle | None = None
        self.is_leaving = False
        self.is_gone = False

    @property
    def eviction_order(self) -> tuple[float, str]:
        """Those to be evicted first come first: the shortest keep-alive, ties by path."""
        return (math.inf if self.keep_alive_s < 0 else self.keep_alive_s, self.key)


@dataclass(slots=True, kw_only=True, eq=False)
class _Load:
    """A load that is queued or under way, shared by waiting requests. loaded: what came of it, already claimed by each of
    them."""

    wish: _Wish
    waiting: int = 0
    task: "asyncio.Task[None]" = field(init=False)
    loaded: _Loaded | None = None


@dataclass(slots=True)
class _Failures:
    """Failures of one model since it last worked, with options that callers chose or without. retry_at_ns: by the steady
    counter."""

    count: int = 0
    retry_at_ns: int = 0
    reason: str = ""


class Runners:
    """The runners of one process. Whoever makes it closes it."""

    def __init__(self, engine: Engine, clock: Clock, limits: RunnerLimits) -> None:
        self._engine = engine
        self._clock = clock
        self._limits = limits
        self._loaded: dict[str, _Loaded] = {}
        self._loads: list[_Load] = []
        self._turn = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()
        self._failures: dict[tuple[str, bool], _Failures] = {}
        self._queued = 0
        self._is_closed = False

    @asynccontextmanager
    async def use(
        self,
        model: Model,
        *,
        options: Options | None = None,
        keep_alive_s: float | None = None,
        embedding: bool = False,
    ) -> AsyncIterator[Lease]:
        """One slot of a runner for this model, loaded if need be.

        options: the request's merged over the model's own; None for its own alone. keep_alive_s: how long the runner stays after
        its last lease; negative for ever, 0 not at all, None as it is. It sticks to the runner. Raises: busy, bad_request,
        engine_failed, out_of_memory, unavailable while a model that crashed is held back.
        """
        began_ns = self._clock.monotonic_ns()
        wish = self._wish(model, options, embedding=embedding)
        loaded, load_ns = await self._enter(wish, began_ns)
        if keep_alive_s is not None:
            loaded.keep_alive_s = keep_alive_s
        loaded.expires_at = self._expiry(loaded)
        try:
            yield Lease(runner=loaded.runner, load_ns=load_ns, context_length=loaded.options.num_ctx)
            self._failures.pop(loaded.blame, None)
        except CorralError as error:
            if error.code in _FAILURES:
                await self._examine(loaded, error.message)
            if error.code == "out_of_memory":
                self._expire_all()
            raise
        finally:
            loaded.slots.release()
            self._unclaim(loaded)

    async def unload(self, model: Model) -> None:
        """End the model's runner: now if it is at rest, else after the work in flight."""
        loaded = self._loaded.get(_key_of(model))
        if loaded is None:
            return
        loaded.keep_alive_s = 0
        loaded.expires_at = self._clock.now()
        if loaded.claims == 0:
            await self._ended(loaded)

    def loaded(self) -> Sequence[LoadedModel]:
        """What is in memory, latest expiry first."""
        entries = [
            LoadedModel(
                model=loaded.model,
                expires_at=loaded.expires_at,
                size_bytes=loaded.runner.memory_bytes[0],
                vram_bytes=loaded.runner.memory_bytes[1],
                context_length=loaded.options.num_ctx,
            )
            for loaded in self._loaded.values()
        ]
        return sorted(entries, key=lambda entry: entry.expires_at, reverse=True)

    def files_in_use(self) -> frozenset[str]:
        """Paths of what is in memory or being loaded."""
        models = [*(loaded.model for loaded in self._loaded.values()), *(load.wish.model for load in self._loads)]
        return frozenset(path for model in models for path in (model.weights, model.projector, *model.adapters) if path)

    async def close(self) -> None:
        """End every engine process, whatever it is doing. Nothing can be used afterwards."""
        self._is_closed = True
        for load in self._loads:
            load.task.cancel()
        for loaded in list(self._loaded.values()):
            self._end(loaded)
        tasks = [*(load.task for load in self._loads), *self._ending]
        await asyncio.gather(*tasks, return_exceptions=True)

    # ── Claims and slots ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _enter(self, wish: _Wish, began_ns: int) -> tuple[_Loaded, int]:
        """A claimed runner with one slot taken, and how long it took until it was ready."""
        while True:
            loaded = await self._claim(wish)
            load_ns = max(1, self._clock.monotonic_ns() - began_ns)
            try:
                with self._queue(is_needed=loaded.slots.locked()):
                    await loaded.slots.acquire()
            except BaseException:
                self._unclaim(loaded)
                raise
            if not loaded.is_gone:
                return loaded, load_ns
            # It ended while we waited for our slot: begin again.
            loaded.slots.release()
            self._unclaim(loaded)

    async def _claim(self, wish: _Wish) -> _Loaded:
        while True:
            if self._is_closed:
                raise shutting_down()
            loaded = self._suitable(wish)
            if loaded is None:
                return await self._load(wish)
            was_at_rest = loaded.claims == 0
            self._add_claims(loaded, 1)
            try:
                # An engine may have died while nobody looked. One that is at work shows that by itself.
                if not was_at_rest or await loaded.runner.is_healthy():
                    return loaded
            except BaseException:
                self._unclaim(loaded)
                raise
            self._drop(loaded, "it stopped while it was idle")
            self._unclaim(loaded)

    def _suitable(self, wish: _Wish) -> _Loaded | None:
        loaded = self._loaded.get(wish.key)
        if loaded is None or loaded.is_leaving or not wish.is_met_by(loaded.wish, loaded.options):
            return None
        return loaded

    def _add_claims(self, loaded: _Loaded, count: int) -> None:
        loaded.claims += count
        if loaded.timer is not None:
            loaded.timer.cancel()
            loaded.timer = None
        if loaded.claims:
            loaded.at_rest.clear()
        else:
            self._rest(loaded)

    def _unclaim(self, loaded: _Loaded) -> None:
        loaded.claims -= 1
        if loaded.claims == 0:
            self._rest(loaded)

    def _rest(self, loaded: _Loaded) -> None:
        """Nobody uses it: start its time, unless a load is waiting to replace it."""
        loaded.at_rest.set()
        if loaded.is_gone or loaded.is_leaving:
            return
        loaded.expires_at = self._expiry(loaded)
        if loaded.keep_alive_s == 0:
            self._end(loaded)
        elif loaded.keep_alive_s > 0:
            loaded.timer = asyncio.get_running_loop().call_later(loaded.keep_alive_s, self._end, loaded)

    def _expiry(self, loaded: _Loaded) -> datetime:
        lasts = timedelta(seconds=loaded.keep_alive_s) if loaded.keep_alive_s >= 0 else _FOREVER
        return self._clock.now() + min(lasts, _FOREVER)

    @contextmanager
    def _queue(self, *, is_needed: bool = True) -> Iterator[None]:
        """A place in the queue while the block waits. Raises: busy."""
        if not is_needed:
            yield
            return
        if self._queued >= self._limits.max_queue:
            raise CorralError("busy")
        self._queued += 1
        try:
            yield
        finally:
            self._queued -= 1

    # ── Loads ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wish(self, model: Model, chosen: Options | None, *, embedding: bool) -> _Wish:
        own = merge_options(model.parameters, {}).load
        explicit = dict(own if chosen is None else chosen.load)
        blame = (_key_of(model), explicit != own)
        limits = self._limits
        for name in _AUTOMATIC_UNLESS_POSITIVE:
            if _is_below(explicit.get(name), 1):
                del explicit[name]
        if _is_below(explicit.get("num_gpu"), 0):
            del explicit["num_gpu"]
        asked = explicit.get("num_ctx")
        automatic = limits.context_length or automatic_context(limits.accelerator_bytes)
        context = context_for(model, asked if isinstance(asked, int) else None, automatic=automatic)
        if asked is not None:
            explicit["num_ctx"] = context
        memory, _ = self._memory(explicit.get("num_gpu"))
        slots = slots_for(model, limits.parallel, context=context, memory_bytes=memory, kv_bytes=limits.kv_bytes)
        fixed = {"num_ctx": context, "parallel": slots, "embedding": embedding, "context_shift": can_shift(model)}
        options = LoadOptions(**{**explicit, **fixed})  # type: ignore[arg-type]
        return _Wish(key=_key_of(model), blame=blame, model=model, explicit=explicit, options=options)

    def _memory(self, gpu_layers: object) -> tuple[int, int]:
        """The memory that a model goes into, and how much of it the loaded ones use. gpu_layers: as asked for; 0 keeps a model
        off the accelerators."""
        sizes = [loaded.runner.memory_bytes for loaded in self._loaded.values()]
        if self._limits.accelerator_bytes and gpu_layers != 0:
            return self._limits.accelerator_bytes, sum(vram for _, vram in sizes)
        return self._limits.memory_bytes, sum(size - vram for size, vram in sizes)

    async def _load(self, wish: _Wish) -> _Loaded:
        """A runner loaded for the wish, claimed. Waits its turn; who need not wait for others is not in the queue."""
        with self._queue(is_needed=bool(self._loads)):
            load = self._joined(wish)
            try:
                await asyncio.wait({load.task})
            except asyncio.CancelledError:
                load.waiting -= 1
                if load.loaded is not None:
                    self._unclaim(load.loaded)
                elif load.waiting == 0:
                    load.task.cancel()
                raise
        if load.loaded is not None:
            return load.loaded
        error = None if load.task.cancelled() else load.task.exception()
        if isinstance(error, CorralError):
            raise error.again() from error
        if error is not None:
            raise error
        raise shutting_down()

    def _joined(self, wish: _Wish) -> _Load:
        for load in self._loads:
            # A load whose last waiter has just left is being aborted, and a finished one has handed out its claims.
            if (
                load.waiting
                and not load.task.done()
                and load.wish.key == wish.key
                and wish.is_met_by(load.wish, load.wish.options)
            ):
                load.waiting += 1
                return load
        self._check_backoff(wish.blame)
        load = _Load(wish=wish, waiting=1)
        load.task = asyncio.create_task(self._run(load))
        # Looked at here already, since those who would may all have left by the time it fails.
        load.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._loads.append(load)
        return load

    async def _run(self, load: _Load) -> None:
        try:
            async with self._turn:
                loaded = self._suitable(load.wish) or await self._start(load.wish)
                self._add_claims(loaded, load.waiting)
                load.loaded = loaded
        finally:
            self._loads.remove(load)

    async def _start(self, wish: _Wish) -> _Loaded:
        options = wish.options
        former = self._loaded.get(wish.key)
        if former is not None:
            # A runner that embeds also completes, so once it was needed it stays that way: no flapping between the two.
            options = replace(options, embedding=options.embedding or former.options.embedding)
            await self._retire(former)
        await self._make_room(wish.model, options)
        # Ending processes still hold their memory.
        if self._ending:
            await asyncio.wait(set(self._ending))
        try:
            runner, options = await self._started(wish, options)
        except CorralError as error:
            if error.code in _FAILURES:
                self._count_failure(wish.blame, error.message)
            raise
        loaded = _Loaded(wish, options, runner, self._limits.keep_alive_s, self._clock.now())
        self._loaded[wish.key] = loaded
        return loaded

    async def _started(self, wish: _Wish, options: LoadOptions) -> tuple[Runner, LoadOptions]:
        """Tried once more, smaller and alone in the house, when memory did not suffice: the prediction was too bold."""
        try:
            return await self._engine.load(wish.model, options), options
        except CorralError as error:
            smaller = self._smaller(wish, options)
            if error.code != "out_of_memory" or not (self._loaded or smaller != options):
                raise
        while self._loaded:
            await self._retire(_first_to_leave(self._loaded.values()))
        return await self._engine.load(wish.model, smaller), smaller

    def _smaller(self, wish: _Wish, options: LoadOptions) -> LoadOptions:
        """With one slot, and the next smaller context where nobody chose one."""
        is_chosen = "num_ctx" in wish.explicit or self._limits.context_length > 0
        context = None if is_chosen else smaller_context(options.num_ctx)
        return replace(options, parallel=1, num_ctx=context or options.num_ctx)

    async def _make_room(self, model: Model, options: LoadOptions) -> None:
        needed = needed_bytes(model, context=options.num_ctx, slots=options.parallel, kv_bytes=self._limits.kv_bytes)
        while self._loaded:
            memory, used = self._memory(options.num_gpu)
            is_room = len(self._loaded) < max(1, self._limits.max_loaded)
            if is_room and fits(needed, used, memory_bytes=memory):
                return
            await self._retire(_first_to_leave(self._loaded.values()))

    async def _retire(self, loaded: _Loaded) -> None:
        """Let the work in flight finish, then end it. If we are canceled meanwhile, it stays."""
        loaded.is_leaving = True
        try:
            while loaded.claims and not loaded.is_gone:
                await loaded.at_rest.wait()
            await self._ended(loaded)
        finally:
            loaded.is_leaving = False
            if loaded.claims == 0:
                self._rest(loaded)

    # ── Ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _end(self, loaded: _Loaded) -> None:
        """Take it off the books and end its process in the background. Does nothing to one that has ended."""
        if loaded.is_gone:
            return
        loaded.is_gone = True
        if loaded.timer is not None:
            loaded.timer.cancel()
        del self._loaded[loaded.key]
        task = asyncio.get_running_loop().create_task(loaded.runner.close())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _expire_all(self) -> None:
        """Memory ran out under a model at work: whatever is at rest goes now, the others after their work."""
        for loaded in list(self._loaded.values()):
            loaded.keep_alive_s = 0
            if loaded.claims == 0:
                self._end(loaded)

    async def _ended(self, loaded: _Loaded) -> None:
        self._end(loaded)
        if self._ending:
            await asyncio.wait(set(self._ending))

    # ── Failures ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _examine(self, loaded: _Loaded, reason: str) -> None:
        """After a failure: has the engine died, or did it only fail at this request?"""
        if not loaded.is_gone and not await loaded.runner.is_healthy():
            self._drop(loaded, reason)

    def _drop(self, loaded: _Loaded, reason: str) -> None:
        # Several requests see the same death; it counts once.
        if not loaded.is_gone:
            self._count_failure(loaded.blame, reason)
            self._end(loaded)

    def _count_failure(self, blame: tuple[str, bool], reason: str) -> None:
        failures = self._failures.setdefault(blame, _Failures())
        failures.count += 1
        delay_s = 0 if failures.count == 1 else min(_MAX_BACKOFF_S, 2 ** (failures.count - 2))
        failures.retry_at_ns = self._clock.monotonic_ns() + delay_s * _NS_PER_S
        failures.reason = reason

    def _check_backoff(self, blame: tuple[str, bool]) -> None:
        failures = self._failures.get(blame)
        if failures is None:
            return
        left_s = math.ceil((failures.retry_at_ns - self._clock.monotonic_ns()) / _NS_PER_S)
        if left_s > 0:
            text = f"the model failed {failures.count} times and is tried again in {left_s} s: {failures.reason}"
            raise CorralError("unavailable", text, retry_after_s=left_s)


def _key_of(model: Model) -> str:
    """Models with the same weights share a runner; one without weights stands for itself."""
    return model.weights or str(model.digest)


def _first_to_leave(loaded: Iterable[_Loaded]) -> _Loaded:
    """One at rest if there is any, else the one that would leave first."""
    return min(loaded, key=lambda one: (one.claims > 0, one.eviction_order))


def _is_below(value: object, least: int) -> bool:
    return isinstance(value, int) and value < least
