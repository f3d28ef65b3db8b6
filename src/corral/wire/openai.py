"""The OpenAI dialect ⇄ native: chat completions and model listings.

Requests become native requests and native events become OpenAI's answers; nothing runs here. Completions and embeddings are in
openai_more, responses in responses, made the same way: a request struct with `to_native`, and an encoder of native events.
Where we differ from Ollama on purpose, docs/divergences.md says why. Source: ollama openai/openai.go and
middleware/openai.go, fb30760.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

import msgspec

from corral.wire.errors import CorralError
from corral.wire.frames import SSE_DONE, encode_sse
from corral.wire.gojson import go_type_of
from corral.wire.names import ModelName
from corral.wire.native import (
    ChatRequest,
    ChatResponse,
    GenerateResponse,
    Message,
    ToolCall,
    ToolCallFunction,
    unix_seconds,
)
from corral.wire.options import Think

#: `system_fingerprint` of every answer.
FINGERPRINT = "fp_ollama"
_JSON_TEXT = msgspec.json.Encoder()
_ARGUMENTS = msgspec.json.Decoder(dict[str, Any])


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Function(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = ""  # there it has no name

    name: str
    #: JSON text of an object.
    arguments: str


class _Call(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "openai.ToolCall"
    go_types: ClassVar[Mapping[str, str]] = {
        "function": 'struct { Name string "json:\\"name\\""; Arguments string "json:\\"arguments\\"" }'
    }

    id: str
    index: int
    type: str = "function"
    function: _Function


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "openai.Message"

    role: str
    content: Any = None
    reasoning: str = ""
    tool_calls: list[_Call] | None = None
    name: str = ""
    tool_call_id: str = ""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream shall hold beside the answer."""

    go_name: ClassVar[str] = "openai.StreamOptions"

    include_usage: bool = False


class _JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "openai.JsonSchema"

    schema: dict[str, Any] | None = None


class _ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "openai.ResponseFormat"

    type: str
    json_schema: _JsonSchema | None = None


class _Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "openai.Reasoning"

    effort: str = ""


class ChatCompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/chat/completions: the fields that mean something here."""

    go_name: ClassVar[str] = "openai.ChatCompletionRequest"
    go_types: ClassVar[Mapping[str, str]] = {"tools": "[]api.Tool"}

    model: str
    messages: list[_Message] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    stop: Any = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: _ResponseFormat | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Any = None
    reasoning: _Reasoning | None = None
    reasoning_effort: str | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def includes_usage(self) -> bool:
        """Whether a stream shall end with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class NativeChatCompletion(ChatRequest, frozen=True, kw_only=True):
    """A chat that came in by the OpenAI route, which usage entries name."""

    path: ClassVar[str] = "/v1/chat/completions"


def to_native(request: ChatCompletionRequest) -> NativeChatCompletion:
    """The same request for the native service. Raises: bad_request with Ollama's texts."""
    if not request.messages:
        raise CorralError("bad_request", "[] is too short - 'messages'")
    # The function that a tool message answers; the last call with its id counts.
    names = {call.id: call.function.name for message in request.messages for call in message.tool_calls or () if call.id}
    return NativeChatCompletion(
        model=request.model,
        messages=[_native_message(message, names) for message in request.messages],
        stream=request.stream,
        format=_native_format(request.response_format),
        options=_native_options(request),
        tools=_chosen_tools(request.tools, request.tool_choice),
        think=think_of_effort(request.reasoning.effort if request.reasoning else request.reasoning_effort or ""),
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
    )


def _native_options(request: ChatCompletionRequest) -> dict[str, Any]:
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    options: dict[str, Any] = {
        "num_predict": limit,
        "seed": request.seed,
        # OpenAI's defaults, not the model's: clients of this dialect expect them.
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
    }
    match request.stop:
        case str() as text:
            options["stop"] = [text]
        case list() as texts:
            options["stop"] = [text for text in texts if isinstance(text, str)]
    return {name: value for name, value in options.items() if value is not None}


def _native_format(wanted: _ResponseFormat | None) -> Any:
    match wanted.type.strip().lower() if wanted else "":
        case "json_object":
            return "json"
        case "json_schema":
            return wanted.json_schema.schema if wanted and wanted.json_schema else None
    return None


_EFFORTS: Mapping[str, Think] = {
    "": None,
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "ultra": "max",
    "max": "max",
}


def think_of_effort(effort: str) -> Think:
    """OpenAI's scale of reasoning on ours; its ends are cut off. Raises: bad_request with Ollama's text."""
    if effort not in _EFFORTS:
        allowed = 'must be "minimal", "low", "medium", "high", "xhigh", "ultra", "max", or "none"'
        raise CorralError("bad_request", f'invalid reasoning value: "{effort[:100]}" ({allowed})')
    return _EFFORTS[effort]


def _chosen_tools(tools: list[dict[str, Any]], choice: Any) -> list[dict[str, Any]]:
    """What tool_choice can be honoured by choosing what the model is shown: `none`, and one named function."""
    if choice == "none":
        return []
    match choice:
        case {"type": "function", "function": {"name": str() as name}}:
            return [tool for tool in tools if isinstance(tool.get("function"), dict) and tool["function"].get("name") == name]
    return tools


def _native_message(message: _Message, names: Mapping[str, str]) -> Message:
    """One message stays one message. Ollama makes one of each part, which templates that want turns to alternate refuse. names:
    call id -> function."""
    content, images = _content(message)
    is_tool = message.role.lower() == "tool"
    return Message(
        role=message.role,
        content=content,
        thinking=message.reasoning,
        images=images,
        tool_calls=[_native_call(call) for call in message.tool_calls or ()],
        tool_name=(message.name or names.get(message.tool_call_id, "")) if is_tool else "",
        tool_call_id=message.tool_call_id,
    )


def _content(message: _Message) -> tuple[str, list[bytes]]:
    match message.content:
        case str() as text:
            return text, []
        case list() as parts:
            texts = [_text_part(part) for part in parts if _part_type(part) == "text"]
            images = [_media_part(part) for part in parts if _part_type(part) != "text"]
            return "\n".join(texts), images
        case None if message.tool_calls is not None:
            return "", []
        case None:
            raise CorralError("bad_request", "invalid message content type: <nil>")
        case other:
            raise CorralError("bad_request", f"invalid message content type: {go_type_of(other)}")


_BAD_PART = "invalid message format"


def _part_type(part: Any) -> Any:
    if not isinstance(part, dict):
        raise CorralError("bad_request", _BAD_PART)
    return part.get("type")


def _text_part(part: dict[str, Any]) -> str:
    text = part.get("text")
    if not isinstance(text, str):
        raise CorralError("bad_request", _BAD_PART)
    return text


def _media_part(part: dict[str, Any]) -> bytes:
    match part:
        case {"type": "image_url", "image_url": {"url": str() as url}} | {"type": "image_url", "image_url": str() as url}:
            return image_of(url)
        case {"type": "input_audio", "input_audio": {"data": str() as data}}:
            return _base64(data, "invalid input_audio base64 data")
        case {"type": "input_audio"}:
            raise CorralError("bad_request", "invalid input_audio format")
    raise CorralError("bad_request", _BAD_PART)


_IMAGE_PREFIXES = ("data:;base64,", *(f"data:image/{kind};base64," for kind in ("jpeg", "jpg", "png", "webp")))


def image_of(url: str) -> bytes:
    """The bytes of a data URI. Nothing is ever fetched: an address chosen by a caller is not ours to visit.
    Raises: bad_request."""
    if url.startswith(("http://", "https://")):
        raise CorralError("bad_request", "image URLs are not currently supported, please use base64 encoded data instead")
    prefix = next((prefix for prefix in _IMAGE_PREFIXES if url.startswith(prefix)), None)
    if prefix is None:
        raise CorralError("bad_request", "invalid image input")
    return _base64(url[len(prefix) :], "invalid image input")


def _base64(text: str, complaint: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CorralError("bad_request", complaint) from error


def _native_call(call: _Call) -> ToolCall:
    arguments = parse_arguments(call.function.arguments)
    if arguments is None:
        raise CorralError("bad_request", "invalid tool call arguments")
    return ToolCall(id=call.id, function=ToolCallFunction(index=call.index, name=call.function.name, arguments=arguments))


def parse_arguments(text: str) -> dict[str, Any] | None:
    """The object a JSON text holds, in its order; None when it is no object."""
    try:
        return _ARGUMENTS.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: str = ""
    #: Left out when None; an empty text is sent.
    content: str | None = None
    reasoning: str = ""
    tool_calls: list[_Call] = []


class _Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    content: list[Any]


class _ChunkChoice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    index: int
    delta: _Delta
    finish_reason: str | None
    logprobs: _Logprobs | None = None


class _Chunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[_ChunkChoice]
    usage: Usage | None = None


def usage_numbers(response: ChatResponse | GenerateResponse) -> Usage:
    """What the last native event counted."""
    prompt, answer = response.prompt_eval_count, response.eval_count
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


def openai_calls(calls: Sequence[ToolCall]) -> list[_Call]:
    """Calls with their arguments as JSON text, which is how this dialect carries them."""
    return [
        _Call(
            id=call.id,
            index=call.function.index,
            function=_Function(name=call.function.name, arguments=_JSON_TEXT.encode(call.function.arguments).decode()),
        )
        for call in calls
    ]


def chat_completion(completion_id: str, response: ChatResponse) -> dict[str, Any]:
    """The whole answer of an unstreamed request. completion_id: `chatcmpl-…`."""
    message: dict[str, Any] = {"role": response.message.role, "content": response.message.content}
    if response.message.thinking:
        message["reasoning"] = response.message.thinking
    if response.message.tool_calls:
        message["tool_calls"] = openai_calls(response.message.tool_calls)
    reason = _finish_reason(response.done_reason, has_calls=bool(response.message.tool_calls))
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason}
    if response.logprobs:
        choice["logprobs"] = {"content": response.logprobs}
    return {
        "id": completion_id,
        "object": "chat.completion",
        "created": unix_seconds(response.created_at),
        "model": response.model,
        "system_fingerprint": FINGERPRINT,
        "choices": [choice],
        "usage": usage_numbers(response),
    }


def _finish_reason(done_reason: str, *, has_calls: bool) -> str | None:
    if done_reason == "stop" and has_calls:
        return "tool_calls"
    return done_reason or None


class ChatStream:
    """Turns the events of one chat into SSE frames. It remembers what a stream must say once: the role, the time, that calls
    were sent. completion_id: `chatcmpl-…`, the same in every chunk."""

    def __init__(self, completion_id: str, *, includes_usage: bool) -> None:
        self._id = completion_id
        self._includes_usage = includes_usage
        self._created: int | None = None
        self._has_sent_calls = False

    def encode(self, response: ChatResponse) -> bytes:
        """The frames of one event; of the last one also the finish chunk, the usage when asked for, and `[DONE]`."""
        is_first = self._created is None
        if self._created is None:
            self._created = unix_seconds(response.created_at)
        frames = []
        message = response.message
        # The last event usually holds nothing but numbers; only as the first it must still open the stream with the role.
        if is_first or not response.done or message.content or message.thinking or message.tool_calls or response.logprobs:
            self._has_sent_calls = self._has_sent_calls or bool(message.tool_calls)
            frames += self._content_chunks(response, "assistant" if is_first else "")
        if response.done:
            frames += self._last_chunks(response)
            return b"".join([*map(encode_sse, frames), SSE_DONE])
        return b"".join(map(encode_sse, frames))

    def _content_chunks(self, response: ChatResponse, role: str) -> list[_Chunk]:
        """One chunk, or two where thinking and answer meet in one event."""
        message = response.message
        logprobs = _Logprobs(content=response.logprobs) if response.logprobs else None
        calls = openai_calls(message.tool_calls) if message.tool_calls else []
        if message.thinking and (message.content or calls):
            deltas = [_Delta(role=role, reasoning=message.thinking), _Delta(content=message.content, tool_calls=calls)]
        else:
            deltas = [_Delta(role=role, content=message.content, reasoning=message.thinking, tool_calls=calls)]
        first, *rest = (_ChunkChoice(index=0, delta=delta, finish_reason=None) for delta in deltas)
        first = msgspec.structs.replace(first, logprobs=logprobs) if logprobs else first
        return [self._chunk(response.model, [choice]) for choice in (first, *rest)]

    def _last_chunks(self, response: ChatResponse) -> list[_Chunk]:
        reason = _finish_reason(response.done_reason or "stop", has_calls=self._has_sent_calls)
        chunks = [self._chunk(response.model, [_ChunkChoice(index=0, delta=_Delta(), finish_reason=reason)])]
        if self._includes_usage:
            chunks.append(self._chunk(response.model, [], usage_numbers(response)))
        return chunks

    def _chunk(self, model: str, choices: list[_ChunkChoice], usage: Usage | None = None) -> _Chunk:
        assert self._created is not None
        return _Chunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
        )


def model_object(shown_id: str, name: ModelName, modified_at: datetime) -> dict[str, Any]:
    """One model of GET /v1/models. shown_id: as listed, or as the caller asked for it."""
    return {"id": shown_id, "object": "model", "created": int(modified_at.timestamp()), "owned_by": name.namespace}


# ── Counting what is only passed on ──────────────────────────────────────────────────────────────────────────────────

#: No answer is believed to hold more tokens than this.
_MAX_TOKENS = 2**31 - 1


class _CountedUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Counted(msgspec.Struct, frozen=True):
    usage: _CountedUsage | None = None


_counter = msgspec.json.Decoder(_Counted)


def usage_of(body: bytes) -> tuple[int, int] | None:
    """(prompt tokens, completion tokens) that an upstream's answer or last chunk states; None when it states none that can be
    believed. Never negative: an upstream is not trusted with anybody's quota."""
    try:
        counted = _counter.decode(body).usage
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if counted is None or counted.prompt_tokens < 0 or counted.completion_tokens < 0:
        return None
    return min(counted.prompt_tokens, _MAX_TOKENS), min(counted.completion_tokens, _MAX_TOKENS)


def usage_in_tail(tail: bytes) -> tuple[int, int] | None:
    """The same of the last piece of an SSE stream: usage travels in one of its last events, if at all."""
    position = tail.rfind(b'"usage"')
    start = tail.rfind(b"data:", 0, position) if position >= 0 else -1
    if start < 0:
        return None
    end = tail.find(b"\n", position)
    return usage_of(tail[start + len(b"data:") : end if end >= 0 else len(tail)])
