"""Native requests answered by runners: what to check, what to ask the engine for, what to say of its answer.

A chat goes through the engine's chat with the template inside the weights, and so does a generation that is not raw: thinking and
calls are split off by the engine (Ollama does that for chats only). Where a Go template makes the prompt, serving.rendered does
the same around a completion. Nothing here knows HTTP, names of the hub or who is calling. Source: ollama server/routes.go,
fb30760.
"""

import hashlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from datetime import date
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol

from corral.core.ports import ChatCall, Chunk, Clock, CompletionCall, Finish, Runner, Sampling
from corral.core.records import Capability, Model
from corral.serving.fitting import count_tokens, embed_fitting, fitted_events
from corral.serving.rendered import (
    RenderedCall,
    completion_sampling,
    described,
    made_by_template,
    prompt_read,
    rendered_call,
    rendered_events,
    rendered_prompt,
    template_for,
)
from corral.wire.engine_chat import engine_message, native_call
from corral.wire.errors import CorralError
from corral.wire.goprompt import go_prompt
from corral.wire.inventory import DEFAULT_TEMPLATE
from corral.wire.native import (
    ChatRequest,
    ChatResponse,
    DebugInfo,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    Logprob,
    Message,
    TokenLogprob,
    ToolCall,
    estimated_tokens,
    format_time,
)
from corral.wire.options import Options, Think, completion_schema, merge_options, response_format, template_kwargs
from corral.wire.templates import go_fields

Call = ChatCall | CompletionCall | RenderedCall


class Slot(Protocol):
    """A runner lent for one request. load_ns: how long the request waited for it."""

    @property
    def runner(self) -> Runner: ...
    @property
    def load_ns(self) -> int: ...
    @property
    def context_length(self) -> int:
        """Tokens; 0 when nobody knows."""
        ...


class RunnerPool(Protocol):
    """Where runners come from: serving.runners for weights, the hub's upstreams for models that run elsewhere."""

    def use(
        self,
        model: Model,
        *,
        options: Options | None = ...,
        keep_alive_s: float | None = ...,
        embedding: bool = ...,
    ) -> AbstractAsyncContextManager[Slot]:
        """See serving.runners.Runners.use."""
        ...

    async def unload(self, model: Model) -> None: ...


class Inference:
    """Runs models. Generators must be closed by whoever does not read them to the end, which stops the engine.

    prefers_go: whether a model's Go template goes before the template inside its weights; None for the better one of the two.
    """

    def __init__(self, runners: RunnerPool, clock: Clock, *, prefers_go: bool | None = None) -> None:
        self._runners = runners
        self._clock = clock
        self._prefers_go = prefers_go

    def described(self, model: Model) -> Model:
        """The model as it is run here: with the template that makes its prompts, and what can be done by that one."""
        return described(model, prefers_go=self._prefers_go)

    async def generate(self, model: Model, request: GenerateRequest) -> AsyncGenerator[GenerateResponse, None]:
        """The events of a generation. Raises: bad_request, not_supported, busy, unavailable, engine_failed."""
        started_ns = self._clock.monotonic_ns()
        if request.only_loads and request.keep_alive_s == 0:
            await self._runners.unload(model)
            yield self._generated(request, done=True, done_reason="unload")
            return
        think = _check_generate(self.described(model), request)
        options = merge_options(model.parameters, request.options)
        async with self._runners.use(model, options=options, keep_alive_s=request.keep_alive_s) as slot:
            if request.only_loads:
                yield self._generated(request, done=True, done_reason="load")
                return
            call, instead = await self._generate_call(model, request, slot, _sampling(options, request, slot), think)
            if request.debug_render_only:
                yield self._generated(request, debug_info=await _debug_info(slot.runner, call, request.images))
                return
            run = _Run(slot, call, started_ns, instead=instead, unsupported=_no_insert(model) if request.suffix else None)
            if isinstance(call, ChatCall):
                run.as_completion = partial(_completion, call.sampling, request)
            async with aclosing(run.chunks(truncate=request.truncate is not False, shift=request.shift is not False)) as chunks:
                async for chunk in chunks:
                    yield self._generated(
                        request, response=chunk.content, thinking=chunk.thinking, logprobs=_logprobs(chunk, request.top_logprobs)
                    )
            context = [] if request.raw or request.suffix else await run.context(request.context or ())
            numbers = self._numbers(run)
            yield self._generated(
                request, done=True, done_reason=run.finish.reason, context=context, tool_calls=run.calls, **numbers
            )

    async def chat(self, model: Model, request: ChatRequest) -> AsyncGenerator[ChatResponse, None]:
        """The events of a chat; complete calls come with the last. Raises: as generate."""
        started_ns = self._clock.monotonic_ns()
        if request.only_loads and request.keep_alive_s == 0:
            await self._runners.unload(model)
            yield self._chatted(request, done=True, done_reason="unload")
            return
        think = _check_chat(self.described(model), request)
        options = merge_options(model.parameters, request.options)
        async with self._runners.use(model, options=options, keep_alive_s=request.keep_alive_s) as slot:
            if request.only_loads:
                yield self._chatted(request, done=True, done_reason="load")
                return
            call = self._chat_call(model, request, _sampling(options, request, slot), think)
            if request.debug_render_only:
                images = [image for message in request.messages for image in message.images]
                yield self._chatted(request, debug_info=await _debug_info(slot.runner, call, images))
                return
            run = _Run(slot, call, started_ns)
            async with aclosing(run.chunks(truncate=request.truncate is not False, shift=request.shift is not False)) as chunks:
                async for chunk in chunks:
                    logprobs = _logprobs(chunk, request.top_logprobs)
                    yield self._chatted(request, chunk.content, thinking=chunk.thinking, logprobs=logprobs)
            numbers = self._numbers(run)
            yield self._chatted(request, done=True, done_reason=run.finish.reason, tool_calls=run.calls, **numbers)

    async def count_tokens(self, model: Model, request: ChatRequest) -> int:
        """Of a chat's whole prompt, stored messages and tools included; an estimate where nobody tells its tokens. Raises: as
        generate."""
        think = _check_chat(self.described(model), request)
        options = merge_options(model.parameters, request.options)
        async with self._runners.use(model, options=options, keep_alive_s=request.keep_alive_s) as slot:
            call = self._chat_call(model, request, _sampling(options, request, slot), think)
            try:
                counted = call.completion(await call.prompt()) if isinstance(call, RenderedCall) else call
                return await count_tokens(slot.runner, counted)
            except CorralError as error:
                if error.code != "not_supported":
                    raise
                return estimated_tokens(request)

    async def embed(self, model: Model, request: EmbedRequest) -> EmbedResponse:
        """Unit vectors, one per text. Raises: bad_request, busy, unavailable, engine_failed."""
        started_ns = self._clock.monotonic_ns()
        texts = request.texts
        async with self._embedding_slot(model, request) as slot:
            if not texts:
                return EmbedResponse(model=request.model, embeddings=[])
            vectors, tokens = await embed_fitting(
                slot.runner, texts, limit=slot.context_length - 1, truncate=request.truncate is not False
            )
            return EmbedResponse(
                model=request.model,
                embeddings=[_unit(vector, request.dimensions) for vector in vectors],
                total_duration=self._clock.monotonic_ns() - started_ns,
                load_duration=slot.load_ns,
                prompt_eval_count=tokens,
            )

    async def embeddings(self, model: Model, request: EmbeddingsRequest) -> EmbeddingsResponse:
        """One vector as the engine gives it. Raises: as embed, but what the engine refuses has Ollama's status 500 here."""
        async with self._embedding_slot(model, request) as slot:
            if not request.prompt:
                return EmbeddingsResponse(embedding=[])
            try:
                vectors, _ = await embed_fitting(slot.runner, [request.prompt], limit=slot.context_length - 1, truncate=False)
            except CorralError as error:
                if error.code != "bad_request":
                    raise
                raise CorralError("bad_request", error.message, status=500) from error
            return EmbeddingsResponse(embedding=vectors[0])

    def _embedding_slot(self, model: Model, request: EmbedRequest | EmbeddingsRequest) -> AbstractAsyncContextManager[Slot]:
        options = merge_options(model.parameters, request.options)
        return self._runners.use(model, options=options, keep_alive_s=request.keep_alive_s, embedding=True)

    async def _generate_call(
        self, model: Model, request: GenerateRequest, slot: Slot, sampling: Sampling, think: Think
    ) -> tuple[Call, Call | None]:
        """The call, and another one for an engine that cannot do the first."""
        schema = completion_schema(request.format)
        if request.raw:
            raw = CompletionCall(prompt=request.prompt, grammar_schema=schema, sampling=sampling, media=request.images)
            return raw, None
        if request.suffix:
            # Whether the model has markers for the gap only the engine knows for sure, so it is asked (docs/divergences.md).
            prompt = await _infill(model, request, think, self._clock.now().date())
            asked = CompletionCall(prompt=request.prompt, suffix=request.suffix, grammar_schema=schema, sampling=sampling)
            rendered = CompletionCall(prompt=prompt, grammar_schema=schema, sampling=sampling) if prompt else None
            return (rendered, None) if rendered and request.template else (asked, rendered)
        call = self._templated(
            model,
            _messages(model, request),
            [],
            request.format,
            sampling,
            think,
            template=request.template or _default_template(model),
            context=request.context,
        )
        if not request.context or isinstance(call, RenderedCall):
            return call, None
        # An earlier answer's tokens are put in front of what the template makes of this prompt, as Ollama does.
        prompt = await rendered_prompt(slot.runner, call)
        sampling = completion_sampling(sampling)
        return CompletionCall(prompt=prompt, context=tuple(request.context), grammar_schema=schema, sampling=sampling), None

    def _chat_call(self, model: Model, request: ChatRequest, sampling: Sampling, think: Think) -> ChatCall | RenderedCall:
        stored = [Message(role=role, content=text) for role, text in model.messages]
        messages = [*stored, *request.messages]
        if model.system and request.messages[0].role != "system":
            messages.insert(0, Message(role="system", content=model.system))
        return self._templated(model, messages, request.tools, request.format, sampling, think)

    def _templated(
        self,
        model: Model,
        messages: Sequence[Message],
        tools: list[dict[str, Any]],
        wanted: object,
        sampling: Sampling,
        think: Think,
        *,
        template: str = "",
        context: Sequence[int] | None = None,
    ) -> ChatCall | RenderedCall:
        """The call for messages. wanted: the request's `format`. template: the request's own."""
        template = template or template_for(model, prefers_go=self._prefers_go)
        if template:
            return rendered_call(
                model,
                template,
                messages,
                tools=tools or None,
                think=think,
                today=self._clock.now().date(),
                sampling=sampling,
                schema=completion_schema(wanted),
                context=tuple(context or ()),
            )
        return ChatCall(
            messages=[engine_message(message) for message in messages],
            tools=tools,
            response_format=response_format(wanted),
            template_kwargs=template_kwargs(think),
            sampling=sampling,
        )

    def _generated(self, request: GenerateRequest, *, response: str = "", done: bool = False, **fields: Any) -> GenerateResponse:
        created_at = format_time(self._clock.now())
        return GenerateResponse(model=request.model, created_at=created_at, response=response, done=done, **fields)

    def _chatted(
        self,
        request: ChatRequest,
        content: str = "",
        *,
        done: bool = False,
        thinking: str = "",
        tool_calls: Sequence[ToolCall] = (),
        **fields: Any,
    ) -> ChatResponse:
        message = Message(role="assistant", content=content, thinking=thinking, tool_calls=list(tool_calls))
        created_at = format_time(self._clock.now())
        return ChatResponse(model=request.model, created_at=created_at, message=message, done=done, **fields)

    def _numbers(self, run: "_Run") -> dict[str, Any]:
        timings = run.finish.timings
        return {
            "total_duration": self._clock.monotonic_ns() - run.started_ns,
            "load_duration": run.slot.load_ns,
            "prompt_eval_count": timings.prompt_tokens,
            "prompt_eval_duration": timings.prompt_ns,
            "eval_count": timings.eval_tokens,
            "eval_duration": timings.eval_ns,
        }


class _Run:
    """One call on its way through the engine. finish, calls and the text are complete once `chunks` has ended. instead: the call
    to make when the engine says that it cannot do such a thing, or else unsupported: what that means. as_completion: see
    fitted_events."""

    def __init__(
        self,
        slot: Slot,
        call: Call,
        started_ns: int,
        *,
        instead: Call | None = None,
        unsupported: CorralError | None = None,
    ) -> None:
        self.slot = slot
        self.call = call
        self.started_ns = started_ns
        self.calls: list[ToolCall] = []
        self.finish: Finish
        self.as_completion: Callable[[str], CompletionCall] | None = None
        self._text: list[str] = []
        self._instead = instead
        self._unsupported = unsupported

    async def chunks(self, *, truncate: bool, shift: bool) -> AsyncGenerator[Chunk, None]:
        """Everything worth an event of its own. Raises: engine_failed also for an answer that ends without saying why."""
        finish: Finish | None = None
        async with _worded(self._unsupported), aclosing(self._events(truncate=truncate, shift=shift)) as events:
            async for event in events:
                if isinstance(event, Finish):
                    finish = event
                    continue
                for call in event.tool_calls:
                    index = len(self.calls)
                    self.calls.append(native_call(call, index, _call_id(self.started_ns, index)))
                self._text.append(event.content)
                if event.content or event.thinking or event.logprobs:
                    yield event
        if finish is None:
            raise CorralError("engine_failed", "an error was encountered while running the model: the answer ended early")
        self.finish = finish

    async def _events(self, *, truncate: bool, shift: bool) -> AsyncGenerator[Chunk | Finish, None]:
        try:
            async with aclosing(self._started(truncate=truncate, shift=shift)) as events:
                async for event in events:
                    yield event
            return
        except CorralError as error:
            if self._instead is None or error.status != HTTPStatus.NOT_IMPLEMENTED:
                raise
        self.call, self._instead = self._instead, None
        async with aclosing(self._started(truncate=truncate, shift=shift)) as events:
            async for event in events:
                yield event

    def _started(self, *, truncate: bool, shift: bool) -> AsyncGenerator[Chunk | Finish, None]:
        runner, context_length = self.slot.runner, self.slot.context_length
        if isinstance(self.call, RenderedCall):
            return rendered_events(runner, self.call, context_length=context_length, truncate=truncate, shift=shift)
        return fitted_events(
            runner,
            self.call,
            context_length=context_length,
            truncate=truncate,
            shift=shift,
            as_completion=self.as_completion,
        )

    async def context(self, earlier: Sequence[int]) -> list[int]:
        """The tokens of prompt and answer, for a later request's `context`; empty where the engine cannot tell, because an answer
        that is complete must not fail for the sake of a deprecated field."""
        runner, call = self.slot.runner, self.call
        try:
            # Where parts are told apart here, the tags between them belong to the text.
            text = call.raw if isinstance(call, RenderedCall) else self._text
            prompt = await prompt_read(runner, call)
            return [*earlier, *await runner.tokenize(prompt + "".join(text), add_special=not earlier)]
        except CorralError:
            return []


@asynccontextmanager
async def _worded(unsupported: CorralError | None) -> AsyncIterator[None]:
    """Say what is given, where an engine says only that it cannot do such a thing."""
    try:
        yield
    except CorralError as error:
        if unsupported is None or error.status != HTTPStatus.NOT_IMPLEMENTED:
            raise
        raise unsupported from error


def _call_id(started_ns: int, index: int) -> str:
    """An id for engines that give calls none, in Ollama's form: it need only differ from the others of one conversation."""
    return f"call_{hashlib.blake2b(f'{started_ns}.{index}'.encode(), digest_size=4).hexdigest()}"


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_generate(model: Model, request: GenerateRequest) -> Think:
    """What to think, when the model can do what is asked. Raises: bad_request, not_supported."""
    if Capability.IMAGE in model.capabilities:
        raise CorralError("bad_request", "image generation models are not currently supported")
    if request.raw and (request.template or request.system or request.context):
        raise CorralError("bad_request", "raw mode does not support template, system, or context")
    think = _think(model, request)
    if Capability.COMPLETION not in model.capabilities:
        raise CorralError("bad_request", f'"{request.model}" does not support generate')
    if request.suffix and request.raw and Capability.INSERT not in model.capabilities:
        raise _no_insert(model)
    if request.template and not model.weights:
        raise CorralError("not_supported", "this model runs at an upstream, which takes no template in a request")
    if request.raw and request.images and not model.weights:
        raise CorralError("not_supported", "this model runs at an upstream, which takes no pictures in a raw prompt")
    return think


def _no_insert(model: Model) -> CorralError:
    return CorralError("bad_request", f"{model.name} does not support insert")


def _check_chat(model: Model, request: ChatRequest) -> Think:
    """As for generate."""
    think = _think(model, request)
    if Capability.COMPLETION not in model.capabilities:
        raise CorralError("bad_request", f'"{request.model}" does not support chat')
    if request.tools and Capability.TOOLS not in model.capabilities:
        raise CorralError("bad_request", f"{model.name} does not support tools")
    return think


def _think(model: Model, request: GenerateRequest | ChatRequest) -> Think:
    """What was asked for; a model that can think does unless told not to. Raises: bad_request."""
    think: Think = request.think
    if Capability.THINKING not in model.capabilities:
        if think and not request.relaxes_thinking:
            raise CorralError("bad_request", f'"{request.model}" does not support thinking')
        return None if think else think
    if think == "max" and model.details.family == "gptoss":
        return "high"  # its template knows three levels
    return True if think is None else think


# ── Calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sampling(options: Options, request: GenerateRequest | ChatRequest, slot: Slot) -> Sampling:
    return Sampling(values=options.bounded(slot.context_length) | _logprob_options(request))


def _logprob_options(request: GenerateRequest | ChatRequest) -> dict[str, Any]:
    if not request.logprobs:
        return {}
    wanted = max(request.top_logprobs, 1)
    if isinstance(request, GenerateRequest) and (request.raw or request.suffix):
        return {"n_probs": wanted}
    return {"logprobs": True, "top_logprobs": wanted}


def _messages(model: Model, request: GenerateRequest) -> list[Message]:
    """The chat that a generation is a turn of."""
    system = request.system or model.system
    stored = [] if request.context is not None else [Message(role=role, content=text) for role, text in model.messages]
    return [
        *([Message(role="system", content=system)] if system else []),
        *stored,
        Message(role="user", content=request.prompt, images=request.images),
    ]


def _completion(sampling: Sampling, request: GenerateRequest, prompt: str) -> CompletionCall:
    """A generation as a completion of the prompt that its template gave: of that, the middle can be left out."""
    schema = completion_schema(request.format)
    return CompletionCall(prompt=prompt, grammar_schema=schema, sampling=completion_sampling(sampling))


def _default_template(model: Model) -> str:
    """What a generation is put into where a model has no template at all: nothing. A chat gets the engine's own."""
    return DEFAULT_TEMPLATE if model.weights and not (model.template or model.chat_template) else ""


async def _infill(model: Model, request: GenerateRequest, think: Think, today: date) -> str:
    """The prompt that a Go template makes of prompt and suffix; empty when there is none that knows of a suffix."""
    template = request.template or model.template
    if not model.weights or (not request.template and "suffix" not in go_fields(template)):
        return ""
    made = partial(go_prompt(template).infill, request.prompt, request.suffix, think, today=today)
    return await made_by_template(lambda allowance: made(allowance=allowance))


async def _debug_info(runner: Runner, call: Call, images: Sequence[bytes]) -> DebugInfo:
    return DebugInfo(rendered_template=await rendered_prompt(runner, call), image_count=len(images))


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _logprobs(chunk: Chunk, top: int) -> list[Logprob]:
    """The engine's token objects; the alternatives only when they were asked for."""
    return [
        Logprob(
            token=item["token"],
            logprob=item["logprob"],
            bytes=_bytes_of(item),
            top_logprobs=[
                TokenLogprob(token=other["token"], logprob=other["logprob"], bytes=_bytes_of(other))
                for other in (item.get("top_logprobs", ()) if top else ())
            ],
        )
        for item in chunk.logprobs
    ]


def _bytes_of(item: Mapping[str, Any]) -> list[int]:
    return item.get("bytes") or list(str(item["token"]).encode("utf-8", "replace"))


def _unit(vector: Sequence[float], dimensions: int) -> list[float]:
    """The vector, cut to so many dimensions when that is fewer, at length one. Raises: bad_request for what is no number."""
    cut = vector[:dimensions] if 0 < dimensions < len(vector) else vector
    length = math.hypot(*cut)
    if not math.isfinite(length):
        raise CorralError("bad_request", "embedding contains NaN or Inf values")
    return [value / max(length, 1e-12) for value in cut]
