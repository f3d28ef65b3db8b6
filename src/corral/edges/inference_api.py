"""The inference routes, the same on the local server and the hub: /api/generate|chat|embed|embeddings|show|tags|ps and the OpenAI
routes over them.

Handlers decode, ask the service, and encode; who may call is said by the route table, what it means by the service. Native routes
stream unless told not to, OpenAI's stream when told to. Source: ollama server/routes.go, middleware/openai.go.
"""

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import Access
from corral.core.records import Model, Principal
from corral.edges.asgi import (
    MAX_PROMPT_BYTES,
    Dialect,
    Endpoint,
    Handler,
    body_of,
    endpoint,
    json_response,
    maybe_caller,
    stream,
)
from corral.hub.inference import PassedAnswer
from corral.wire.frames import NDJSON, SSE, encode_ndjson, ndjson_error, sse_error
from corral.wire.inventory import LoadedLike, ps_entry, show_body, tags_entry
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
    ShowRequest,
    decode,
    join_chat,
    join_generate,
    raw_request,
)
from corral.wire.openai import ChatCompletionRequest, ChatStream, chat_completion, model_object, to_native

T = TypeVar("T")

_CHAT_COMPLETIONS = "/v1/chat/completions"
_OPENAI_JSON = "application/json"
_EMPTY_BODY = "EOF"  # what Ollama's OpenAI routes say of a request without body
#: Ollama draws ids from a thousand; ours are drawn from more, so that logs can be searched for one.
_COMPLETION_IDS = 10**12
#: This client shows general.basename where people expect the name they asked for.
_COPILOT_CHAT = "GitHubCopilotChat/"


class InferenceService(Protocol):
    """What answers these routes: local.models.LocalModels and hub.inference.HostedInference."""

    def generate(self, request: GenerateRequest, caller: Principal | None) -> AsyncIterator[GenerateResponse]: ...

    def chat(self, request: ChatRequest, caller: Principal | None) -> AsyncIterator[ChatResponse]: ...

    async def embed(self, request: EmbedRequest, caller: Principal | None) -> EmbedResponse: ...

    async def embeddings(self, request: EmbeddingsRequest, caller: Principal | None) -> EmbeddingsResponse: ...

    async def tags(self, caller: Principal | None) -> list[Model]: ...

    async def show(self, name: str, caller: Principal | None) -> Model:
        """Raises: not_found with Ollama's text."""
        ...


class PassesOn(Protocol):
    """A service that can hand a request on as it is to a server that speaks its dialect."""

    async def pass_on(self, request: RawRequest, path: str, caller: Principal | None) -> PassedAnswer | None:
        """None for a request that takes the native way."""
        ...


def inference_endpoints(
    service: InferenceService, access: Access, list_access: Access, *, upstreams: PassesOn | None = None
) -> list[Endpoint]:
    """Every inference route. access: to run models; list_access: to see which there are. upstreams: asked first on OpenAI's."""
    api = InferenceApi(service, upstreams)
    openai = Dialect.OPENAI

    def runs(path: str, handler: Handler, dialect: Dialect = Dialect.NATIVE) -> Endpoint:
        return endpoint(
            "POST", path, handler, access, dialect=dialect, max_body_bytes=MAX_PROMPT_BYTES, cancel_on_disconnect=True
        )

    return [
        runs("/api/generate", api.generate),
        runs("/api/chat", api.chat),
        runs("/api/embed", api.embed),
        runs("/api/embeddings", api.embeddings),
        endpoint("POST", "/api/show", api.show, list_access),
        endpoint("GET,HEAD", "/api/tags", api.tags, list_access),
        runs(_CHAT_COMPLETIONS, api.chat_completions, openai),
        endpoint("GET", "/v1/models", api.models, list_access, dialect=openai),
        endpoint("GET", "/v1/models/{model}", api.model, list_access, dialect=openai),
    ]


def ps_endpoint(loaded: Callable[[], Sequence[LoadedLike]], access: Access) -> Endpoint:
    """GET /api/ps, for a server whose runners are nobody's secret. loaded: serving.runners.Runners.loaded."""

    async def ps(request: Request) -> Response:
        return json_response({"models": [ps_entry(row) for row in loaded()]})

    return endpoint("GET", "/api/ps", ps, access)


class InferenceApi:
    """The handlers."""

    def __init__(self, service: InferenceService, upstreams: PassesOn | None = None) -> None:
        self._service = service
        self._upstreams = upstreams

    async def generate(self, request: Request) -> Response:
        """Text from a prompt."""
        asked = decode(body_of(request), GenerateRequest)
        events = self._service.generate(asked, maybe_caller(request))
        if asked.wants_stream and not asked.only_loads:
            return await stream(request, events, encode_ndjson, content_type=NDJSON, error_frame=ndjson_error)
        return json_response(join_generate(await _all_of(events)))

    async def chat(self, request: Request) -> Response:
        """The next message of a chat."""
        asked = decode(body_of(request), ChatRequest)
        events = self._service.chat(asked, maybe_caller(request))
        if asked.wants_stream and not asked.only_loads:
            return await stream(request, events, encode_ndjson, content_type=NDJSON, error_frame=ndjson_error)
        return json_response(join_chat(await _all_of(events)))

    async def embed(self, request: Request) -> Response:
        """Vectors of texts."""
        return json_response(await self._service.embed(decode(body_of(request), EmbedRequest), maybe_caller(request)))

    async def embeddings(self, request: Request) -> Response:
        """The vector of a text, in the older form."""
        return json_response(await self._service.embeddings(decode(body_of(request), EmbeddingsRequest), maybe_caller(request)))

    async def show(self, request: Request) -> Response:
        """Everything about one model."""
        asked = decode(body_of(request), ShowRequest)
        name = asked.model or asked.name
        body = show_body(await self._service.show(name, maybe_caller(request)), verbose=asked.verbose, system=asked.system)
        if request.headers.get("user-agent", "").startswith(_COPILOT_CHAT):
            body["model_info"]["general.basename"] = name
        return json_response(body)

    async def tags(self, request: Request) -> Response:
        """Which models there are."""
        models = await self._service.tags(maybe_caller(request))
        return json_response({"models": [tags_entry(model) for model in models]})

    async def chat_completions(self, request: Request) -> Response:
        """The next message of a chat, in OpenAI's dialect."""
        body, caller = body_of(request), maybe_caller(request)
        if self._upstreams is not None:
            passed = await self._upstreams.pass_on(raw_request(body, empty=_EMPTY_BODY), _CHAT_COMPLETIONS, caller)
            if passed is not None:
                return await _passed_response(request, passed)
        asked = decode(body, ChatCompletionRequest, empty=_EMPTY_BODY)
        completion_id = f"chatcmpl-{secrets.randbelow(_COMPLETION_IDS)}"
        events = self._service.chat(to_native(asked), caller)
        if asked.stream:
            encode = ChatStream(completion_id, includes_usage=asked.includes_usage).encode
            return await stream(request, events, encode, content_type=SSE, error_frame=sse_error)
        return _openai_response(chat_completion(completion_id, join_chat(await _all_of(events))))

    async def models(self, request: Request) -> Response:
        """Which models there are, in OpenAI's dialect."""
        models = await self._service.tags(maybe_caller(request))
        rows = [model_object(model.name.short, model.name, model.modified_at) for model in models]
        return _openai_response({"object": "list", "data": rows})

    async def model(self, request: Request) -> Response:
        """One model in OpenAI's dialect, under the name it was asked for by."""
        name = request.path_params["model"]
        model = await self._service.show(name, maybe_caller(request))
        return _openai_response(model_object(name, model.name, model.modified_at))


async def _all_of(events: AsyncIterator[T]) -> list[T]:
    """All events of a request that is answered at once; closed also when they end early."""
    try:
        return [event async for event in events]
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


def _openai_response(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type=_OPENAI_JSON)


async def _passed_response(request: Request, passed: PassedAnswer) -> Response:
    """An upstream's answer as it came."""
    if passed.chunks is not None:
        return await stream(request, passed.chunks, bytes, content_type=SSE, error_frame=sse_error)
    return Response(passed.body, passed.status, headers=dict(passed.headers))
