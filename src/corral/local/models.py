"""The installed models of this machine, as the inference routes see them: found by name, shown, and run.

The wording for a model that is not there differs from route to route, because clients of Ollama match on it (ollama-surface.md
1.10); everything else about a request is the business of serving.inference. The caller of these verbs is None unless the server
is secured; a model that a caller may not know of is not there, in the same words.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from corral.core.local_rights import may_know_model
from corral.core.ports import ModelStore
from corral.core.records import Model, Principal
from corral.local.stubs import StubModels
from corral.serving.inference import Inference
from corral.wire.errors import CorralError
from corral.wire.names import Source, parse_name, parse_reference
from corral.wire.native import (
    ChatRequest,
    ChatResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    model_not_found,
    model_not_pulled,
    model_required,
)


class RunsElsewhere(CorralError):
    """What was asked for is a stub of a model of another server: who knows that server may take the request there."""

    def __init__(self, stub: Model) -> None:
        self.stub = stub
        super().__init__("bad_request", "this server cannot run this remote model")


class LocalModels:
    """An `InferenceService` over a model store. stubs: runs models that are installed as stubs."""

    def __init__(self, store: ModelStore, inference: Inference, stubs: StubModels) -> None:
        self._store = store
        self._inference = inference
        self._stubs = stubs

    async def tags(self, caller: Principal | None) -> list[Model]:
        """What is installed, newest first."""
        installed = await self._store.list()
        return [self._inference.described(model) for model in installed if may_know_model(caller, model)]

    async def show(self, name: str, caller: Principal | None) -> Model:
        """One model; a stub too, unless `:local` is asked for. Raises: bad_request, not_found; cloud_disabled for a stub."""
        if not name:
            raise model_required()
        reference = parse_reference(name)
        parsed = parse_name(reference.base)
        model = await self._store.get(parsed)
        if model is None or not may_know_model(caller, model):
            raise model_not_found(parsed.short)
        if model.is_stub:
            self._stubs.require_shown()
            if reference.source is Source.LOCAL:
                raise model_not_found(name)
        return self._inference.described(model)

    async def generate(self, request: GenerateRequest, caller: Principal | None) -> AsyncGenerator[GenerateResponse, None]:
        """Raises: bad_request, not_found, whatever Inference.generate raises."""
        if not request.model:
            raise model_not_found("")
        model = await self._found(request.model, model_not_found, caller)
        answering = self._stubs.generate if model.is_stub else self._inference.generate
        async with aclosing(answering(model, request)) as events:
            async for event in events:
                yield event

    async def chat(self, request: ChatRequest, caller: Principal | None) -> AsyncGenerator[ChatResponse, None]:
        """Raises: bad_request, not_found, whatever Inference.chat raises."""
        if not request.model:
            raise model_required()
        model = await self._found(request.model, model_not_found, caller)
        answering = self._stubs.chat if model.is_stub else self._inference.chat
        async with aclosing(answering(model, request)) as events:
            async for event in events:
                yield event

    async def count_tokens(self, request: ChatRequest, caller: Principal | None) -> int:
        """Raises: as chat."""
        if not request.model:
            raise model_required()
        return await self._inference.count_tokens(await self._installed(request.model, model_not_found, caller), request)

    async def embed(self, request: EmbedRequest, caller: Principal | None) -> EmbedResponse:
        """Raises: bad_request, not_found, whatever Inference.embed raises."""
        if not request.model:
            raise model_not_found("")
        return await self._inference.embed(await self._installed(request.model, model_not_pulled, caller), request)

    async def embeddings(self, request: EmbeddingsRequest, caller: Principal | None) -> EmbeddingsResponse:
        """Raises: bad_request, not_found, whatever Inference.embeddings raises."""
        if not request.model:
            raise model_required()
        return await self._inference.embeddings(await self._installed(request.model, model_not_pulled, caller), request)

    async def _installed(self, name: str, absent: Callable[[str], CorralError], caller: Principal | None) -> Model:
        """The model that runs here under a requested name. Raises: what `absent` makes; bad_request for a malformed name and a
        stub of a server that may not be asked; RunsElsewhere for one of the hub."""
        model = await self._found(name, absent, caller)
        if model.is_stub:
            self._stubs.require_at_hub(model)
            raise RunsElsewhere(model)
        return model

    async def _found(self, name: str, absent: Callable[[str], CorralError], caller: Principal | None) -> Model:
        """The model, or the stub, that is installed under a requested name; for `:local` there are no stubs. Raises: what
        `absent` makes, also of one that the caller may not know of; bad_request."""
        reference = parse_reference(name)
        parsed = parse_name(reference.base)
        if reference.source is Source.CLOUD:
            # Every route but one hands these on before they come here.
            raise CorralError("not_supported", "this route runs models of this machine only")
        model = await self._store.get(parsed)
        if model is None or not may_know_model(caller, model) or (model.is_stub and reference.source is Source.LOCAL):
            raise absent(name)
        return model
