"""Hosted inference: admit the caller, run the model where it lives, write down what was used.

Every request that gets as far as a model leaves one usage entry, whatever becomes of it: written in `finally`, so also when the
caller leaves or the engine dies. Tokens are those the engine counted; of an answer that was cut off, those that were sent, and an
estimate of the prompt, so that leaving early is no way to use a model for nothing.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from corral.core.ports import Clock, Engine, HubStream, UpstreamRelay
from corral.core.records import HostedModel, Model, Principal, UsageEntry
from corral.hub.hosting import Hosting, runnable_model, shown_model
from corral.hub.metering import UsageMeter
from corral.hub.pools import SharedRunners, UpstreamRunners
from corral.hub.running import RunningRequests, Watched
from corral.serving.inference import Inference, RunnerPool
from corral.wire.errors import CorralError
from corral.wire.frames import MAX_FRAME_BYTES, SSE
from corral.wire.names import parse_name, parse_reference
from corral.wire.native import (
    ChatRequest,
    ChatResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    RawRequest,
    model_not_found,
    model_not_pulled,
    model_required,
)
from corral.wire.openai import usage_in_tail, usage_of

#: An upstream's whole answer may be this large.
_MAX_ANSWER_BYTES = 32 * 1024 * 1024
#: Usually near enough, and only used where the engine never said.
_CHARACTERS_PER_TOKEN = 4
#: What of an upstream's answer concerns the caller. Its rate limits, cookies and ids are between it and the operator.
_PASSED_HEADERS = ("content-type", "retry-after")
#: Path -> what occurs about once in each event of its stream that carries text.
_CONTENT_KEYS = {"/v1/completions": b'"text":'}
_CONTENT_KEY = b'"content":'


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedAnswer:
    """An upstream's answer to a request that was passed on. headers: lower-case names. chunks: whole SSE events of a stream, to
    be read or closed by whoever asked; None for any other answer, which is in body."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""
    chunks: AsyncGenerator[bytes, None] | None = None


class _Use:
    """One request's share in the usage of its account: entered while the request runs, written down when it is left, however that
    comes. characters: of the prompt, should nobody count its tokens."""

    __slots__ = (
        "_caller", "_characters", "_clock", "_is_settled", "_meter", "_model", "_path", "_started_at", "_started_ns",
        "eval_tokens", "is_handed_on", "outcome", "prompt_tokens", "watched",
    )  # fmt: skip

    def __init__(
        self, watched: Watched, model: str, path: str, characters: Callable[[], int], *, meter: UsageMeter, clock: Clock
    ) -> None:
        self.watched = watched
        self.prompt_tokens = 0
        self.eval_tokens = 0
        self.outcome = "ok"
        self._is_settled = False
        self.is_handed_on = False
        self._caller = watched.principal
        self._model = model
        self._path = path
        self._characters = characters
        self._meter = meter
        self._clock = clock
        self._started_at = clock.now()
        self._started_ns = clock.monotonic_ns()

    def __enter__(self) -> "_Use":
        self.watched.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.is_handed_on and error is None:
            self.is_handed_on = False
            return
        self.watched.__exit__()
        self._write_down(error)

    def hand_on(self) -> "_Use":
        """Let the use go on beyond the block that is running, until the end of the next one."""
        self.is_handed_on = True
        return self

    def count(self, event: GenerateResponse | ChatResponse) -> None:
        """Add one event of a native stream."""
        if event.done:
            self.settle(event.prompt_eval_count, event.eval_count)
        else:
            self.eval_tokens += 1

    def settle(self, prompt_tokens: int, eval_tokens: int) -> None:
        """Take the engine's own numbers."""
        self.prompt_tokens, self.eval_tokens, self._is_settled = prompt_tokens, eval_tokens, True

    def _write_down(self, error: BaseException | None) -> None:
        outcome = self._outcome_of(error)
        if not self._is_settled and (self.eval_tokens or outcome == "ok"):
            self.prompt_tokens = self._characters() // _CHARACTERS_PER_TOKEN
        self._meter.record(
            UsageEntry(
                account_id=self._caller.account.id,
                credential_id=self._caller.credential_id,
                proof=self._caller.proof,
                model=self._model,
                path=self._path,
                started_at=self._started_at,
                duration_ns=self._clock.monotonic_ns() - self._started_ns,
                prompt_tokens=self.prompt_tokens,
                eval_tokens=self.eval_tokens,
                outcome=outcome,
            )
        )

    def _outcome_of(self, error: BaseException | None) -> str:
        if error is None:
            return self.outcome
        if isinstance(error, CorralError):
            return error.code
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            # Who leaves after the last event has had everything.
            return "ok" if self._is_settled else "canceled"
        return "internal"


class HostedInference:
    """An `InferenceService` of the hub. runners: of the hub's own weights. upstreams, relay: None without any upstream."""

    def __init__(
        self,
        *,
        hosting: Hosting,
        runners: RunnerPool,
        usage: UsageMeter,
        running: RunningRequests,
        clock: Clock,
        upstreams: Engine | None = None,
        relay: UpstreamRelay | None = None,
    ) -> None:
        self._hosting = hosting
        self._weights = Inference(SharedRunners(runners), clock)
        self._elsewhere = None if upstreams is None else Inference(UpstreamRunners(upstreams), clock)
        self._relay = relay
        self._usage = usage
        self._running = running
        self._clock = clock

    async def tags(self, caller: Principal | None) -> list[Model]:
        """What the caller may use."""
        return [self._shown(hosted) for hosted in await self._hosting.list(caller)]

    async def show(self, name: str, caller: Principal | None) -> Model:
        """One model, without what it is on this machine. Raises: bad_request, not_found."""
        if not name:
            raise model_required()
        hosted = await self._hosting.resolve(name, caller)
        if hosted is None:
            raise model_not_found(parse_name(parse_reference(name).base).short)
        return self._shown(hosted)

    def _shown(self, hosted: HostedModel) -> Model:
        model = None if hosted.model is None else self._weights.described(hosted.model)
        return shown_model(replace(hosted, model=model))

    async def generate(self, request: GenerateRequest, caller: Principal | None) -> AsyncGenerator[GenerateResponse, None]:
        """Raises: unauthorized, bad_request, not_found, whatever Inference.generate raises."""
        caller = _required(caller)
        if not request.model:
            raise model_not_found("")
        hosted = await self._admitted(request.model, caller, model_not_found)
        with self._use(caller, hosted, request.path, lambda: len(request.system) + len(request.prompt)) as use:
            async with aclosing(self._inference_of(hosted).generate(runnable_model(hosted), request)) as events:
                while (event := await use.watched.next(events)) is not None:
                    use.count(event)
                    yield event

    async def chat(self, request: ChatRequest, caller: Principal | None) -> AsyncGenerator[ChatResponse, None]:
        """Raises: as generate."""
        caller = _required(caller)
        if not request.model:
            raise model_required()
        hosted = await self._admitted(request.model, caller, model_not_found)
        with self._use(caller, hosted, request.path, lambda: sum(len(each.content) for each in request.messages)) as use:
            async with aclosing(self._inference_of(hosted).chat(runnable_model(hosted), request)) as events:
                while (event := await use.watched.next(events)) is not None:
                    use.count(event)
                    yield event

    async def count_tokens(self, request: ChatRequest, caller: Principal | None) -> int:
        """Raises: as generate. Counting is a use of the model, but of no tokens."""
        caller = _required(caller)
        if not request.model:
            raise model_required()
        hosted = await self._admitted(request.model, caller, model_not_found)
        with self._use(caller, hosted, request.path, lambda: 0):
            return await self._inference_of(hosted).count_tokens(runnable_model(hosted), request)

    async def embed(self, request: EmbedRequest, caller: Principal | None) -> EmbedResponse:
        """Raises: as generate."""
        caller = _required(caller)
        if not request.model:
            raise model_not_found("")
        hosted = await self._admitted(request.model, caller, model_not_pulled)
        with self._use(caller, hosted, request.path, lambda: sum(map(len, request.texts))) as use:
            response = await self._inference_of(hosted).embed(runnable_model(hosted), request)
            use.settle(response.prompt_eval_count, 0)
            return response

    async def embeddings(self, request: EmbeddingsRequest, caller: Principal | None) -> EmbeddingsResponse:
        """Raises: as generate. This answer states no tokens, so usage has an estimate."""
        caller = _required(caller)
        if not request.model:
            raise model_required()
        hosted = await self._admitted(request.model, caller, model_not_pulled)
        with self._use(caller, hosted, request.path, lambda: len(request.prompt)):
            return await self._inference_of(hosted).embeddings(runnable_model(hosted), request)

    async def _admitted(self, name: str, caller: Principal, absent: Callable[[str], CorralError]) -> HostedModel:
        """The model, when this caller may run it. Raises: bad_request, what `absent` makes."""
        hosted = await self._hosting.resolve(name, caller)
        if hosted is None:
            raise absent(name)
        return hosted

    def _inference_of(self, hosted: HostedModel) -> Inference:
        if hosted.model is not None:
            return self._weights
        if self._elsewhere is None:
            raise _no_upstreams(hosted)
        return self._elsewhere

    # ── Passing on ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def pass_on(self, request: RawRequest, path: str, caller: Principal | None) -> PassedAnswer | None:
        """The upstream's own answer to a request in its dialect, with only `model` replaced; None for a model that is not at an
        upstream, and for one that is not there: that request takes the native way, which has the right words for it. Raises:
        unauthorized, bad_request, upstream_failed."""
        caller, name = _required(caller), request.model
        hosted = await self._hosting.resolve(name, caller) if name else None
        if hosted is None or hosted.model is not None:
            return None
        if self._relay is None:
            raise _no_upstreams(hosted)
        body = request.with_model(hosted.upstream_model)
        with self._use(caller, hosted, path, lambda: len(body)) as use:
            answer = await self._relay.open_stream(hosted.upstream_url, path, body)
            try:
                headers = tuple((key, value) for key, value in answer.headers if key in _PASSED_HEADERS)
                if answer.status == 200 and dict(headers).get("content-type", "").startswith(SSE):
                    chunks = _counted_events(use.hand_on(), answer, _CONTENT_KEYS.get(path, _CONTENT_KEY))
                    return PassedAnswer(status=200, headers=headers, chunks=chunks)
                return await _whole_answer(use, answer, headers)
            finally:
                if not use.is_handed_on:
                    await answer.close()

    def _use(self, caller: Principal, hosted: HostedModel, path: str, characters: Callable[[], int]) -> _Use:
        watched = self._running.watch(caller)
        return _Use(watched, hosted.name, path, characters, meter=self._usage, clock=self._clock)


def _required(caller: Principal | None) -> Principal:
    if caller is None:
        raise CorralError("unauthorized")
    return caller


def _no_upstreams(hosted: HostedModel) -> CorralError:
    return CorralError("unavailable", f"model '{hosted.name}' is at an upstream, and this hub is set up without any")


async def _whole_answer(use: _Use, answer: HubStream, headers: tuple[tuple[str, str], ...]) -> PassedAnswer:
    """An answer that is no stream. Raises: upstream_failed for one that concerns the operator and not the caller."""
    if answer.status in (401, 403):
        raise CorralError("upstream_failed", "the upstream refused this hub's credentials; its operator has to look at them")
    if not 200 <= answer.status < 300 and answer.status < 400:
        raise CorralError("upstream_failed", f"the upstream answered {answer.status}, which leads nowhere")
    body = await answer.read(_MAX_ANSWER_BYTES)
    if answer.status >= 400:
        use.outcome = "upstream_failed" if answer.status >= 500 else "bad_request"
    elif (counted := usage_of(body)) is not None:
        use.settle(*counted)
    return PassedAnswer(status=answer.status, headers=headers, body=body)


async def _counted_events(use: _Use, answer: HubStream, content_key: bytes) -> AsyncGenerator[bytes, None]:
    """The stream as it arrives, in whole events: should the upstream break off, an error frame can follow the last whole one.
    Nothing is parsed until the end, when the last two pieces may state the usage. The use ends with the stream."""
    with use:
        try:
            chunks, rest, last, one_before = answer.chunks(), b"", b"", b""
            while (chunk := await use.watched.next(chunks)) is not None:
                if rest or not chunk.endswith(b"\n\n"):
                    chunk, rest = _whole_events(rest + chunk)
                    if not chunk:
                        continue
                use.eval_tokens += chunk.count(content_key)
                one_before, last = last, chunk
                yield chunk
            if (counted := usage_in_tail(one_before + last + rest)) is not None:
                use.settle(*counted)
            if rest:
                yield rest
        finally:
            await answer.close()


def _whole_events(data: bytes) -> tuple[bytes, bytes]:
    """(whole events, the beginning of the next one). Raises: upstream_failed for an event without end."""
    cut = max((at + len(end) for end in (b"\n\n", b"\r\n\r\n") if (at := data.rfind(end)) >= 0), default=0)
    if len(data) - cut > MAX_FRAME_BYTES:
        raise CorralError("upstream_failed", "the upstream sent an event that does not end")
    return data[:cut], data[cut:]
