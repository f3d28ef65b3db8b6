"""Anthropic's Messages dialect ⇄ native chat: requests, answers, the named events of a stream, and how a stream tells an error.

A message of this dialect is a list of blocks; a native one has fields, and the result of a tool is a message of its own. Nothing
runs here. Where we differ from Ollama on purpose, docs/divergences.md says why. Source: ollama anthropic/anthropic.go and
middleware/anthropic.go, fb30760.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from corral.wire.errors import CorralError
from corral.wire.frames import encode_event
from corral.wire.gojson import base64_complaint
from corral.wire.native import ChatRequest, ChatResponse, Message, ToolCall, ToolCallFunction, join_chat
from corral.wire.options import Think
from corral.wire.web_search import FUNCTION, MAX_SEARCHES, NAME, SearchBegun, SearchDone, SearchEvent, is_built_in

_encode = msgspec.json.Encoder().encode
#: How types of tools begin that the server runs and not the caller.
_SERVER_TOOLS = (NAME, "web_fetch", "code_execution", "tool_search")


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Source(msgspec.Struct, frozen=True, kw_only=True):
    type: str | None = None
    data: str | None = None


class _Block(msgspec.Struct, frozen=True, kw_only=True):
    """One block of any type; which fields count depends on it."""

    type: str | None = None
    text: str | None = None
    thinking: str | None = None
    source: Any = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: Any = None


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "anthropic.MessageParam"
    go_alias: ClassVar[str] = 'struct { Role string "json:\\"role\\""; Content json.RawMessage "json:\\"content\\"" }'

    role: str
    content: Any = None


class _Tool(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "anthropic.Tool"

    type: str = ""
    name: str = ""
    description: str = ""
    input_schema: dict[str, Any] = {}
    max_uses: int | None = None


class _ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "anthropic.ToolChoice"

    type: str = ""
    name: str = ""


class _Thinking(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "anthropic.ThinkingConfig"

    type: str = ""


class _Format(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""
    schema: dict[str, Any] | None = None


class _OutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "anthropic.OutputConfig"

    effort: str = ""
    format: _Format | None = None


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens: what goes into a prompt."""

    go_name: ClassVar[str] = "anthropic.CountTokensRequest"

    model: str
    messages: list[_Message] = []
    system: Any = None
    tools: list[_Tool] = []
    tool_choice: _ToolChoice | None = None
    thinking: _Thinking | None = None
    output_config: _OutputConfig | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """POST /v1/messages: the fields that mean something here."""

    go_name: ClassVar[str] = "anthropic.MessagesRequest"

    max_tokens: int = 0
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] = []


class NativeMessages(ChatRequest, frozen=True, kw_only=True):
    """A chat that came in by Anthropic's route."""

    path: ClassVar[str] = "/v1/messages"
    # Its clients ask every model to think, also those that cannot.
    relaxes_thinking: ClassVar[bool] = True


class NativeCountTokens(NativeMessages, frozen=True, kw_only=True):
    """A chat whose tokens are counted, and that is not run."""

    path: ClassVar[str] = "/v1/messages/count_tokens"


def to_native(request: MessagesRequest) -> NativeMessages:
    """The same request for the native service. Raises: bad_request with Ollama's texts."""
    _check_model(request)
    if request.max_tokens <= 0:
        raise CorralError("bad_request", "max_tokens is required and must be positive")
    _check_messages(request)
    options = {
        "num_predict": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences or None,
    }
    return NativeMessages(
        model=request.model,
        messages=_native_messages(request),
        stream=request.stream,
        format=_native_format(request.output_config),
        options={name: value for name, value in options.items() if value is not None},
        tools=_native_tools(request),
        think=_think(request),
    )


def to_native_count(request: CountTokensRequest) -> NativeCountTokens:
    """The chat to count. Raises: bad_request."""
    _check_model(request)
    _check_messages(request)
    return NativeCountTokens(
        model=request.model, messages=_native_messages(request), tools=_native_tools(request), think=_think(request)
    )


def _check_model(request: CountTokensRequest) -> None:
    if not request.model:
        raise CorralError("bad_request", "model is required")


def _check_messages(request: CountTokensRequest) -> None:
    if not request.messages:
        raise CorralError("bad_request", "messages is required")


def _think(request: CountTokensRequest) -> Think:
    match request.thinking.type if request.thinking else "":
        case "enabled":
            return True
        case "disabled":
            return False
    effort = request.output_config.effort.strip().lower() if request.output_config else ""
    return {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "max"}.get(effort)


def _native_format(wanted: _OutputConfig | None) -> dict[str, Any] | None:
    match wanted:
        case _OutputConfig(format=_Format(type="json_schema", schema=schema)):
            return schema
    return None


def _native_tools(request: CountTokensRequest) -> list[dict[str, Any]]:
    """The caller's own tools and the web search, as far as tool_choice lets the model see them. What else the server should run
    itself is left out: nothing here does, and a model that is shown a tool nobody answers waits for it."""
    choice = request.tool_choice or _ToolChoice()
    if choice.type == "none":
        return []
    tools = [tool for tool in request.tools if not tool.type.startswith(_SERVER_TOOLS)]
    searches = [FUNCTION] if any(is_built_in(tool.type) for tool in request.tools) else []
    if searches:
        # The built-in tool owns the name: of two the model could not say which it means.
        tools = [tool for tool in tools if tool.name != NAME]
    if choice.type == "tool":
        tools = [tool for tool in tools if tool.name == choice.name]
        searches = searches if choice.name == NAME else []
    return [*map(_native_tool, tools), *map(dict, searches)]


def searches_allowed(request: MessagesRequest) -> int:
    """How often the model may search the web during the answer; 0 where the caller does not want that."""
    if request.tool_choice and request.tool_choice.type == "none":
        return 0
    limits = (tool.max_uses for tool in request.tools if is_built_in(tool.type))
    return max((MAX_SEARCHES if limit is None else min(max(limit, 1), MAX_SEARCHES) for limit in limits), default=0)


def _native_tool(tool: _Tool) -> dict[str, Any]:
    parameters = tool.input_schema or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": parameters}}


def _native_messages(request: CountTokensRequest) -> list[Message]:
    turns = [(message.role.lower(), _blocks(message.content, f"messages[{at}]")) for at, message in enumerate(request.messages)]
    names = {block.id or "": block.name or "" for _, blocks in turns for block in blocks if block.type in _CALLS}
    system = _system_text(request.system)
    messages = [Message(role="system", content=system)] if system else []
    for role, blocks in turns:
        messages += _turn(role, blocks, names)
    return messages


def _system_text(system: Any) -> str:
    match system:
        case str() as text:
            return text
        case list() as blocks:
            return "".join(
                block["text"]
                for block in blocks
                if isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)
            )
    return ""


_CALLS = ("tool_use", "server_tool_use")
_block_list = list[_Block]


def _blocks(content: Any, where: str) -> list[_Block]:
    """Raises: bad_request."""
    if isinstance(content, str):
        return [_Block(type="text", text=content)]
    if not isinstance(content, list):
        raise CorralError("bad_request", f"{where}: content must be a string or a list of blocks")
    try:
        return msgspec.convert(content, _block_list)
    except msgspec.ValidationError as error:
        raise CorralError("bad_request", f"{where}: {error}") from error


def _turn(role: str, blocks: Sequence[_Block], names: Mapping[str, str]) -> list[Message]:
    """The native messages of one message: what tools said, and what the speaker said. names: call id -> the tool's name."""
    calls = [_call(block) for block in blocks if block.type in _CALLS]
    results = [_result(block, names) for block in blocks if block.type in ("tool_result", "web_search_tool_result")]
    message = Message(
        role=role,
        content="".join(block.text or "" for block in blocks if block.type == "text"),
        thinking=next((block.thinking or "" for block in reversed(blocks) if block.type == "thinking"), ""),
        images=[_image(block.source, "invalid image source") for block in blocks if block.type == "image"],
        tool_calls=calls,
    )
    said = [message] if message.content or message.images or calls or message.thinking else []
    # What a caller says beside results was said after them.
    return [*results, *said] if role == "user" else [*said, *results]


def _call(block: _Block) -> ToolCall:
    if block.type == "tool_use":
        for field, value in (("id", block.id), ("name", block.name)):
            if not value:
                raise CorralError("bad_request", f"tool_use block missing required '{field}' field")
    arguments = {} if block.input is None else block.input
    if not isinstance(arguments, dict):
        raise CorralError("bad_request", "the input of a tool_use block must be an object")
    return ToolCall(id=block.id or "", function=ToolCallFunction(name=block.name or "", arguments=arguments))


def _result(block: _Block, names: Mapping[str, str]) -> Message:
    text, images = _result_content(block.content) if block.type == "tool_result" else (_found(block.content), [])
    call_id = block.tool_use_id or ""
    return Message(role="tool", content=text, images=images, tool_call_id=call_id, tool_name=names.get(call_id, ""))


def _result_content(content: Any) -> tuple[str, list[bytes]]:
    if isinstance(content, str):
        return content, []
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [part["text"] for part in parts if part.get("type") == "text" and isinstance(part.get("text"), str)]
    images = [_image(part.get("source"), "invalid tool_result image source") for part in parts if part.get("type") == "image"]
    return "".join(texts), images


def _found(content: Any) -> str:
    """What an earlier search found, for the model to read."""
    if isinstance(content, str):
        return content
    items = content if isinstance(content, list) else [content]
    lines = []
    for item in items:
        match item:
            case {"type": "web_search_result"}:
                lines.append(f"- {item.get('title') or ''}: {item.get('url') or ''}\n")
            case {"type": "web_search_tool_result_error"}:
                return ": ".join(filter(None, ("web_search_tool_result_error", str(item.get("error_code") or ""))))
    return "".join(lines)


def _image(source: Any, complaint: str) -> bytes:
    """Raises: bad_request. Nothing is ever fetched: an address chosen by a caller is not ours to visit."""
    try:
        found = msgspec.convert(source, _Source)
    except msgspec.ValidationError as error:
        raise CorralError("bad_request", complaint) from error
    if found.type != "base64":
        kind = (found.type or "")[:100]
        raise CorralError("bad_request", f"invalid image source type: {kind}. Only base64 images are supported.")
    try:
        return base64.b64decode(found.data or "", validate=True)
    except (binascii.Error, ValueError) as error:
        raise CorralError("bad_request", f"invalid base64 image data: {base64_complaint(found.data or '') or error}") from error


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Usage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    output_tokens: int


def messages_response(message_id: str, response: ChatResponse) -> dict[str, Any]:
    """The whole answer of an unstreamed request. message_id: `msg_…`."""
    return _whole(message_id, response, _blocks_of(response.message))


def searched_response(message_id: str, events: Sequence[ChatResponse | SearchEvent]) -> dict[str, Any]:
    """The whole answer where the model could search the web. events: the last one with done set."""
    content: list[dict[str, Any]] = []
    words: list[ChatResponse] = []
    for event in events:
        if isinstance(event, ChatResponse):
            words.append(event)
            continue
        content += [*(_blocks_of(join_chat(words).message) if words else ()), _search_block(message_id, event)]
        words = []
    return _whole(message_id, words[-1], [*content, *_blocks_of(join_chat(words).message)])


def _whole(message_id: str, last: ChatResponse, content: Sequence[dict[str, Any]]) -> dict[str, Any]:
    answer = _empty_answer(message_id, last.model) | {"content": content}
    if reason := _stop_reason(last.done_reason, has_calls=bool(last.message.tool_calls)):
        answer["stop_reason"] = reason
    return answer | {"usage": _usage(last)}


def _blocks_of(message: Message) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    if message.thinking:
        content.append({"type": "thinking", "thinking": message.thinking})
    if message.content:
        content.append({"type": "text", "text": message.content})
    for call in message.tool_calls:
        content.append({"type": "tool_use", "id": call.id, "name": call.function.name, "input": call.function.arguments})
    return content


#: Without them Anthropic's SDK takes what was found for an error.
_RESULT_MEMBERS = {"type": "web_search_result", "encrypted_content": "", "page_age": None}


def _search_block(message_id: str, event: SearchEvent) -> dict[str, Any]:
    """What the model wanted searched for, or what became of it."""
    suffix = "" if event.number == 1 else f"_{event.number}"
    search_id = f"srvtoolu_{message_id.removeprefix('msg_')}{suffix}"
    match event:
        case SearchBegun(query=query):
            return {"type": "server_tool_use", "id": search_id, "name": NAME, "input": {"query": query}}
        case SearchDone(results=results):
            found = [{"url": result.url, "title": result.title, **_RESULT_MEMBERS} for result in results]
            return {"type": "web_search_tool_result", "tool_use_id": search_id, "content": found}
    failed = {"type": "web_search_tool_result_error", "error_code": event.error_code}
    return {"type": "web_search_tool_result", "tool_use_id": search_id, "content": failed}


def count_response(tokens: int) -> dict[str, Any]:
    """The answer of count_tokens."""
    return {"input_tokens": tokens}


def _empty_answer(message_id: str, model: str) -> dict[str, Any]:
    return {"id": message_id, "type": "message", "role": "assistant", "model": model, "content": []}


def _usage(response: ChatResponse) -> _Usage:
    return _Usage(input_tokens=response.prompt_eval_count, output_tokens=response.eval_count)


def _stop_reason(done_reason: str, *, has_calls: bool) -> str:
    if has_calls:
        return "tool_use"
    return {"stop": "end_turn", "length": "max_tokens", "": ""}.get(done_reason, "stop_sequence")


#: How a block of each kind begins.
_STARTS: Mapping[str, Mapping[str, str]] = {
    "thinking": {"type": "thinking", "thinking": ""},
    "text": {"type": "text", "text": ""},
}


class MessageStream:
    """Turns the events of one chat into the events of this dialect. It remembers which block is open, since a stream is a row of
    blocks that each begin and end. estimate: of the prompt's tokens, which the first event has to state."""

    def __init__(self, message_id: str, model: str, *, estimate: int) -> None:
        self._id = message_id
        self._model = model
        self._estimate = estimate
        self._has_started = False
        self._has_sent_calls = False
        self._open = ""
        self._index = 0

    def encode(self, event: ChatResponse | SearchEvent) -> bytes:
        """The events of one native event, or of a search, which comes in whole blocks."""
        if not isinstance(event, ChatResponse):
            block = _search_block(self._id, event)
            frames = [*self._close(), _event("content_block_start", index=self._index, content_block=block)]
            self._open = block["type"]
            return b"".join([*frames, *self._close()])
        return self._encode_chat(event)

    def _encode_chat(self, response: ChatResponse) -> bytes:
        message = response.message
        frames = [] if self._has_started else [self._start(response)]
        if message.thinking:
            frames += self._delta("thinking", {"type": "thinking_delta", "thinking": message.thinking})
        if message.content:
            frames += self._delta("text", {"type": "text_delta", "text": message.content})
        for call in message.tool_calls:
            frames += self._call(call)
        if response.done:
            frames += self._end(response)
        return b"".join(frames)

    def _start(self, response: ChatResponse) -> bytes:
        self._has_started = True
        usage = _Usage(input_tokens=response.prompt_eval_count or self._estimate, output_tokens=0)
        return _event("message_start", message=_empty_answer(self._id, self._model) | {"usage": usage})

    def _delta(self, kind: str, delta: Mapping[str, str]) -> list[bytes]:
        frames = []
        if self._open != kind:
            frames = [*self._close(), _event("content_block_start", index=self._index, content_block=_STARTS[kind])]
            self._open = kind
        return [*frames, _event("content_block_delta", index=self._index, delta=delta)]

    def _call(self, call: ToolCall) -> list[bytes]:
        """A call comes whole, so its block begins and ends at once."""
        self._has_sent_calls = True
        frames = self._close()
        block = {"type": "tool_use", "id": call.id, "name": call.function.name, "input": {}}
        self._open = "tool_use"
        text = _encode(call.function.arguments).decode()
        return [
            *frames,
            _event("content_block_start", index=self._index, content_block=block),
            _event("content_block_delta", index=self._index, delta={"type": "input_json_delta", "partial_json": text}),
            *self._close(),
        ]

    def _close(self) -> list[bytes]:
        if not self._open:
            return []
        self._open = ""
        self._index += 1
        return [_event("content_block_stop", index=self._index - 1)]

    def _end(self, response: ChatResponse) -> list[bytes]:
        reason = _stop_reason(response.done_reason, has_calls=self._has_sent_calls)
        delta = {"stop_reason": reason} if reason else {}
        return [*self._close(), _event("message_delta", delta=delta, usage=_usage(response)), _event("message_stop")]


def _event(name: str, **members: Any) -> bytes:
    return encode_event(name, {"type": name, **members})
