"""Runners as tenants get them: what one caller asks for must not change what another gets."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from corral.core.ports import Engine, LoadOptions, Runner
from corral.core.records import Model
from corral.serving.inference import RunnerPool, Slot
from corral.wire.options import Options


class SharedRunners:
    """Runners whose loading only the operator decides. A caller's load-time options would reload the model under everybody else's
    requests, its keep_alive would unload it or hold it for ever: both are ignored."""

    def __init__(self, runners: RunnerPool) -> None:
        self._runners = runners

    def use(
        self,
        model: Model,
        *,
        options: Options | None = None,
        keep_alive_s: float | None = None,
        embedding: bool = False,
    ) -> AbstractAsyncContextManager[Slot]:
        """A slot of the model as its own parameters load it."""
        return self._runners.use(model, embedding=embedding)

    async def unload(self, model: Model) -> None:
        """Does nothing."""


@dataclass(frozen=True, slots=True)
class _UpstreamSlot:
    runner: Runner
    load_ns: int = 0
    context_length: int = 0


class UpstreamRunners:
    """Runners of models that run elsewhere: there is nothing to load, keep or unload here."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def use(
        self,
        model: Model,
        *,
        options: Options | None = None,
        keep_alive_s: float | None = None,
        embedding: bool = False,
    ) -> AsyncIterator[Slot]:
        """A runner for one request. model: a stub."""
        runner = await self._engine.load(model, LoadOptions(embedding=embedding))
        try:
            yield _UpstreamSlot(runner)
        finally:
            await runner.close()

    async def unload(self, model: Model) -> None:
        """Does nothing."""
