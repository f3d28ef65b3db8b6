"""The inference routes, the same on the local server and the hub: /api/generate|chat|embed|embeddings|show|tags|ps, and those of
OpenAI's and Anthropic's dialects over them.

Handlers decode, ask the service, and encode; who may call is said by the route table, what it means by the service. Native routes
stream unless told not to, the others stream when told to. Source: ollama server/routes.go, middleware/{openai,anthropic}.go.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from corral.core.local_rights import may_use_model
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
    server_log,
)
from corral.edges.stream_response import stream
from corral.hub.inference import PassedAnswer
from corral.serving.web_search import searching_chat
from corral.wire.anthropic import (
    CountTokensRequest,
    MessagesRequest,
    MessageStream,
    count_response,
    messages_response,
    searched_response,
    to_native_count,
)
from corral.wire.anthropic import searches_allowed as searches_in_messages
from corral.wire.anthropic import to_native as to_native_messages
from corral.wire.errors import CorralError
from corral.wire.frames import NDJSON, SSE, anthropic_error, encode_ndjson, ndjson_error, sse_error
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
    estimated_tokens,
    join_chat,
    join_generate,
    raw_request,
)
from corral.wire.openai import ChatCompletionRequest, ChatStream, chat_completion, model_object, to_native
from corral.wire.openai_more import (
    CompletionRequest,
    CompletionStream,
    EmbeddingRequest,
    completion,
    embedding_list,
    to_native_completion,
    to_native_embedding,
)
from corral.wire.responses import ResponsesRequest, ResponseStream, response_object, searches_allowed, to_native_response
from corral.wire.transcription import parse_transcription, to_native_transcription, transcription_text
from corral.wire.web_search import SearchEvent, SearchFailed
from corral.wire.webpage import SearchResult

N = TypeVar("N", bound=msgspec.Struct)
S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")

_CHAT_COMPLETIONS = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"
_EMBEDDINGS = "/v1/embeddings"
_TRANSCRIPTIONS = "/v1/audio/transcriptions"
#: Of a form with a recording; OpenAI's bound, and something for the other fields.
MAX_AUDIO_BYTES = 26 * 1024 * 1024
_PLAIN_JSON = "application/json"
_EMPTY_BODY = "EOF"  # what Ollama's OpenAI routes say of a request without body
#: Ollama draws ids from a thousand; ours are drawn from more, so that logs can be searched for one.
_COMPLETION_IDS = 10**12
_MESSAGE_ID_BYTES = 12
#: A body of so many bytes is decoded in a few milliseconds.
_QUICK_BYTES = 128 * 1024
#: This client shows general.basename where people expect the name they asked for.
_COPILOT_CHAT = "GitHubCopilotChat/"


class InferenceService(Protocol):
    """What answers these routes: local.models.LocalModels and hub.inference.HostedInference."""

    def generate(self, request: GenerateRequest, caller: Principal | None) -> AsyncIterator[GenerateResponse]: ...

    def chat(self, request: ChatRequest, caller: Principal | None) -> AsyncIterator[ChatResponse]: ...

    async def embed(self, request: EmbedRequest, caller: Principal | None) -> EmbedResponse: ...

    async def embeddings(self, request: EmbeddingsRequest, caller: Principal | None) -> EmbeddingsResponse: ...

    async def count_tokens(self, request: ChatRequest, caller: Principal | None) -> int:
        """Of a chat's whole prompt, which is not run."""
        ...

    async def tags(self, caller: Principal | None) -> list[Model]: ...

    async def show(self, name: str, caller: Principal | None) -> Model:
        """Raises: not_found with Ollama's text."""
        ...


class PassesOn(Protocol):
    """A service that can hand a request on as it is to a server that speaks its dialect."""

    async def pass_on(self, request: RawRequest, path: str, caller: Principal | None) -> PassedAnswer | None:
        """None for a request that takes the native way."""
        ...


class WebSearch(Protocol):
    """What a server searches the web by when a model wants to: hub.web_tools.WebTools, local.web_search.HubSearch."""

    async def search_for(self, caller: Principal | None, query: str) -> Sequence[SearchResult]:
        """Raises: not_supported, rate_limited, busy, upstream_failed, unauthorized, cloud_disabled."""
        ...


def inference_endpoints(
    service: InferenceService,
    access: Access,
    list_access: Access,
    *,
    upstreams: PassesOn | None = None,
    web: WebSearch | None = None,
) -> list[Endpoint]:
    """Every inference route. access: to run models; list_access: to see which there are. upstreams: asked first on OpenAI's.
    web: None for a server that does not search."""
    api = InferenceApi(service, upstreams, web)
    openai, anthropic = Dialect.OPENAI, Dialect.ANTHROPIC

    def runs(path: str, handler: Handler, dialect: Dialect = Dialect.NATIVE, max_body_bytes: int = MAX_PROMPT_BYTES) -> Endpoint:
        return endpoint("POST", path, handler, access, dialect=dialect, max_body_bytes=max_body_bytes, cancel_on_disconnect=True)

    return [
        runs("/api/generate", api.generate),
        runs("/api/chat", api.chat),
        runs("/api/embed", api.embed),
        runs("/api/embeddings", api.embeddings),
        endpoint("POST", "/api/show", api.show, list_access),
        endpoint("GET,HEAD", "/api/tags", api.tags, list_access),
        runs(_CHAT_COMPLETIONS, api.chat_completions, openai),
        runs(_COMPLETIONS, api.completions, openai),
        runs(_EMBEDDINGS, api.openai_embeddings, openai),
        runs("/v1/responses", api.responses, openai),
        runs(_TRANSCRIPTIONS, api.transcriptions, openai, MAX_AUDIO_BYTES),
        runs("/v1/messages", api.messages, anthropic),
        runs("/v1/messages/count_tokens", api.count_tokens, anthropic),
        endpoint("GET", "/v1/models", api.models, list_access, dialect=openai),
        endpoint("GET", "/v1/models/{model}", api.model, list_access, dialect=openai),
    ]


def ps_endpoint(loaded: Callable[[], Sequence[LoadedLike]], access: Access) -> Endpoint:
    """GET /api/ps, for a server whose runners are nobody's secret. loaded: serving.runners.Runners.loaded."""

    async def ps(request: Request) -> Response:
        caller = maybe_caller(request)
        return json_response({"models": [ps_entry(row) for row in loaded() if may_use_model(caller, row.model.name)]})

    return endpoint("GET", "/api/ps", ps, access)


class InferenceApi:
    """The handlers."""

    def __init__(self, service: InferenceService, upstreams: PassesOn | None = None, web: WebSearch | None = None) -> None:
        self._service = service
        self._upstreams = upstreams
        self._web = web

    async def generate(self, request: Request) -> Response:
        """Text from a prompt."""
        asked = await _decoded(request, GenerateRequest)
        events = self._service.generate(asked, maybe_caller(request))
        if asked.wants_stream and not asked.only_loads:
            return await stream(request, events, encode_ndjson, content_type=NDJSON, error_frame=ndjson_error)
        return json_response(join_generate(await _all_of(events)))

    async def chat(self, request: Request) -> Response:
        """The next message of a chat."""
        asked = await _decoded(request, ChatRequest)
        events = self._service.chat(asked, maybe_caller(request))
        if asked.wants_stream and not asked.only_loads:
            return await stream(request, events, encode_ndjson, content_type=NDJSON, error_frame=ndjson_error)
        return json_response(join_chat(await _all_of(events)))

    async def embed(self, request: Request) -> Response:
        """Vectors of texts."""
        return json_response(await self._service.embed(await _decoded(request, EmbedRequest), maybe_caller(request)))

    async def embeddings(self, request: Request) -> Response:
        """The vector of a text, in the older form."""
        return json_response(await self._service.embeddings(await _decoded(request, EmbeddingsRequest), maybe_caller(request)))

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
        if (passed := await self._passed_on(request, _CHAT_COMPLETIONS)) is not None:
            return passed
        asked = await _decoded(request, ChatCompletionRequest, empty=_EMPTY_BODY)
        completion_id = f"chatcmpl-{secrets.randbelow(_COMPLETION_IDS)}"
        events = self._service.chat(await _made_native(request, to_native, asked), maybe_caller(request))
        if asked.stream:
            encode = ChatStream(completion_id, includes_usage=asked.includes_usage).encode
            return await stream(request, events, encode, content_type=SSE, error_frame=sse_error)
        return _plain_json(chat_completion(completion_id, join_chat(await _all_of(events))))

    async def completions(self, request: Request) -> Response:
        """Text from a prompt, in OpenAI's dialect."""
        if (passed := await self._passed_on(request, _COMPLETIONS)) is not None:
            return passed
        asked = await _decoded(request, CompletionRequest, empty=_EMPTY_BODY)
        completion_id = f"cmpl-{secrets.randbelow(_COMPLETION_IDS)}"
        events = self._service.generate(to_native_completion(asked), maybe_caller(request))
        if asked.stream:
            encode = CompletionStream(completion_id, includes_usage=asked.includes_usage).encode
            return await stream(request, events, encode, content_type=SSE, error_frame=sse_error)
        return _plain_json(completion(completion_id, join_generate(await _all_of(events))))

    async def openai_embeddings(self, request: Request) -> Response:
        """Vectors of texts, in OpenAI's dialect."""
        if (passed := await self._passed_on(request, _EMBEDDINGS)) is not None:
            return passed
        asked = await _decoded(request, EmbeddingRequest, empty=_EMPTY_BODY)
        response = await self._service.embed(to_native_embedding(asked), maybe_caller(request))
        return _plain_json(embedding_list(response, is_base64=asked.is_base64))

    async def responses(self, request: Request) -> Response:
        """The next items of a conversation, in OpenAI's newer dialect."""
        asked = await _decoded(request, ResponsesRequest, empty=_EMPTY_BODY)
        number = secrets.randbelow(_COMPLETION_IDS)
        native, told = await _made_native(request, to_native_response, asked), ResponseStream(number, asked)
        if limit := searches_allowed(asked):
            searching = self._searching(native, limit, maybe_caller(request))
            if asked.stream:
                return await stream(request, searching, told.encode, content_type=SSE, error_frame=told.error)
            # An answer of several turns is put together as its stream is.
            for event in await _all_of(searching):
                told.encode(event)
            return _plain_json(told.whole)
        events = self._service.chat(native, maybe_caller(request))
        if asked.stream:
            return await stream(request, events, told.encode, content_type=SSE, error_frame=told.error)
        return _plain_json(response_object(number, asked, join_chat(await _all_of(events))))

    async def transcriptions(self, request: Request) -> Response:
        """The words that are spoken in a recording, which comes in a form; in OpenAI's dialect."""
        content_type = request.headers.get("content-type", "")
        asked = await asyncio.to_thread(parse_transcription, content_type, body_of(request))
        events = self._service.chat(to_native_transcription(asked), maybe_caller(request))
        text = transcription_text(join_chat(await _all_of(events)))
        if asked.response_format == "text":
            return PlainTextResponse(text)
        return _plain_json({"text": text})

    async def messages(self, request: Request) -> Response:
        """The next message of a chat, in Anthropic's dialect."""
        asked = await _decoded(request, MessagesRequest, empty=_EMPTY_BODY)
        native = await _made_native(request, to_native_messages, asked)
        message_id = f"msg_{secrets.token_hex(_MESSAGE_ID_BYTES)}"
        encode = MessageStream(message_id, asked.model, estimate=estimated_tokens(native)).encode
        if limit := searches_in_messages(asked):
            searching = self._searching(native, limit, maybe_caller(request))
            if asked.stream:
                return await stream(request, searching, encode, content_type=SSE, error_frame=anthropic_error)
            return _plain_json(searched_response(message_id, await _all_of(searching)))
        events = self._service.chat(native, maybe_caller(request))
        if asked.stream:
            return await stream(request, events, encode, content_type=SSE, error_frame=anthropic_error)
        return _plain_json(messages_response(message_id, join_chat(await _all_of(events))))

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens a prompt has, in Anthropic's dialect."""
        asked = await _made_native(request, to_native_count, await _decoded(request, CountTokensRequest, empty=_EMPTY_BODY))
        return _plain_json(count_response(await self._service.count_tokens(asked, maybe_caller(request))))

    async def _searching(
        self, native: ChatRequest, limit: int, caller: Principal | None
    ) -> AsyncGenerator[ChatResponse | SearchEvent, None]:
        """The events of a chat whose model may search the web."""

        async def search(query: str) -> Sequence[SearchResult]:
            if self._web is None:
                raise CorralError("not_supported", "this server does not search the web")
            return await self._web.search_for(caller, query)

        def chat(request: ChatRequest) -> AsyncIterator[ChatResponse]:
            return self._service.chat(request, caller)

        async with aclosing(searching_chat(native, limit=limit, chat=chat, search=search)) as events:
            async for event in events:
                if isinstance(event, SearchFailed):
                    server_log.warning("a web search for a model failed: %s", event.error.message)
                yield event

    async def _passed_on(self, request: Request, path: str) -> Response | None:
        """The upstream's answer, when the model is at one that speaks this dialect."""
        if self._upstreams is None:
            return None
        raw = raw_request(body_of(request), empty=_EMPTY_BODY)
        passed = await self._upstreams.pass_on(raw, path, maybe_caller(request))
        return None if passed is None else await _passed_response(request, passed)

    async def models(self, request: Request) -> Response:
        """Which models there are, in OpenAI's dialect."""
        models = await self._service.tags(maybe_caller(request))
        rows = [model_object(model.name.short, model.name, model.modified_at) for model in models]
        return _plain_json({"object": "list", "data": rows})

    async def model(self, request: Request) -> Response:
        """One model in OpenAI's dialect, under the name it was asked for by."""
        name = request.path_params["model"]
        model = await self._service.show(name, maybe_caller(request))
        return _plain_json(model_object(name, model.name, model.modified_at))


async def _decoded(request: Request, kind: type[S], *, empty: str = "missing request body") -> S:
    """What a request asks for. A large body is looked through in a thread: that of many messages takes a third of a second."""
    body = body_of(request)
    if len(body) <= _QUICK_BYTES:
        return decode(body, kind, empty=empty)
    return await asyncio.to_thread(decode, body, kind, empty=empty)


async def _made_native(request: Request, convert: Callable[[S], N], asked: S) -> N:
    """The request of another dialect as the native one. That of a large body, which takes a second, is made in a thread."""
    if len(body_of(request)) <= _QUICK_BYTES:
        return convert(asked)
    return await asyncio.to_thread(convert, asked)


async def _all_of(events: AsyncIterator[T]) -> list[T]:
    """All events of a request that is answered at once; closed also when they end early."""
    try:
        return [event async for event in events]
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


def _plain_json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type=_PLAIN_JSON)


async def _passed_response(request: Request, passed: PassedAnswer) -> Response:
    """An upstream's answer as it came."""
    if passed.chunks is not None:
        return await stream(request, passed.chunks, bytes, content_type=SSE, error_frame=sse_error)
    return Response(passed.body, passed.status, headers=dict(passed.headers))
