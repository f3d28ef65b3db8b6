"""OpenAI's responses ⇄ native chat: a list of items in, a response object or a row of numbered events out.

Nothing is kept between requests: the whole conversation comes with each. Nothing runs here. Where we differ from Ollama on
purpose, docs/divergences.md says why. Source: ollama openai/responses.go and middleware/openai.go, fb30760.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import msgspec

from corral.wire.errors import CorralError
from corral.wire.frames import encode_event
from corral.wire.native import ChatRequest, ChatResponse, Message, ToolCall, ToolCallFunction, unix_seconds
from corral.wire.openai import image_of, openai_calls, parse_arguments, think_of_effort
from corral.wire.web_search import FUNCTION, MAX_SEARCHES, NAME, SearchBegun, SearchDone, SearchError, SearchEvent, is_built_in

# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "openai.ResponsesReasoning"

    effort: str = ""
    summary: str = ""


class _Format(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    go_name: ClassVar[str] = "openai.ResponsesTextFormat"

    type: str
    name: str = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class _Text(msgspec.Struct, frozen=True, kw_only=True):
    go_name: ClassVar[str] = "openai.ResponsesText"

    format: _Format | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses: the fields that mean something here, and those that are told back."""

    go_name: ClassVar[str] = "openai.ResponsesRequest"
    go_types: ClassVar[Mapping[str, str]] = {"tools": "[]openai.ResponsesTool"}

    model: str
    input: Any = None
    instructions: str = ""
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    reasoning: _Reasoning | None = None
    text: _Text | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Any = None
    truncation: str = "disabled"
    background: bool = False
    stream: bool = False


class NativeResponse(ChatRequest, frozen=True, kw_only=True):
    """A chat that came in by the route of responses, which usage entries name."""

    path: ClassVar[str] = "/v1/responses"


def to_native_response(request: ResponsesRequest) -> NativeResponse:
    """The same request for the native service. Raises: bad_request with Ollama's texts."""
    options: dict[str, Any] = {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": request.top_p,
        "num_predict": request.max_output_tokens,
    }
    return NativeResponse(
        model=request.model,
        messages=_native_messages(request),
        stream=request.stream,
        format=_native_format(request.text.format if request.text else None),
        options={name: value for name, value in options.items() if value is not None},
        tools=_native_tools(request.tools, request.tool_choice),
        think=think_of_effort(request.reasoning.effort if request.reasoning else ""),
    )


def _native_format(wanted: _Format | None) -> Any:
    match wanted:
        case _Format(type="json_schema"):
            return wanted.schema
        case _Format(type="json_object"):
            return "json"
    return None


def _native_tools(tools: Sequence[dict[str, Any]], choice: Any) -> list[dict[str, Any]]:
    """The caller's own functions and the web search, as far as tool_choice lets the model see them. Other built-in tools
    (local_shell …) are left out: nothing here runs them, and a model that is shown a tool nobody answers waits for it."""
    if choice == "none":
        return []
    found = [function for tool in tools for function in _functions(tool, "")]
    if any(is_built_in(tool.get("type")) for tool in tools):
        # The built-in tool owns the name: of two the model could not say which it means.
        found = [*(function for function in found if function["name"] != NAME), FUNCTION["function"]]
    match choice:
        case {"type": "function", "name": str() as name}:
            found = [function for function in found if function["name"] == name]
        case {"type": kind} if is_built_in(kind):
            found = [function for function in found if function["name"] == NAME]
    return [{"type": "function", "function": function} for function in found]


def searches_allowed(request: ResponsesRequest) -> int:
    """How often the model may search the web during the answer; 0 where the caller does not want that."""
    return MAX_SEARCHES if any(is_built_in(tool.get("type")) for tool in request.tools) and request.tool_choice != "none" else 0


#: A namespace within a namespace within a … ends here.
_MAX_NESTING = 8
#: Members that clients of this dialect want of a function, whether they were sent or not, in Ollama's order.
_FUNCTION_MEMBERS: Final = {"type": "function", "name": "", "description": None, "strict": None, "parameters": None}


def _functions(tool: Mapping[str, Any], prefix: str, depth: int = 0) -> list[dict[str, Any]]:
    """A tool's functions: one, or those of a namespace, whose names begin with its own."""
    name = str(tool.get("name") or "")
    match tool.get("type"):
        case "namespace" if depth < _MAX_NESTING:
            inner = f"{name}." if name else ""
            members = [member for member in tool.get("tools") or () if isinstance(member, dict)]
            found = [function for member in members for function in _functions(member, inner, depth + 1)]
        case "function" | "custom":
            parameters = tool.get("parameters") or {"type": "object", "properties": {}}
            found = [{"name": name, "description": tool.get("description") or "", "parameters": parameters}]
        case _:
            found = []
    return [function | {"name": _prefixed(prefix, function["name"])} for function in found]


def _prefixed(prefix: str, name: str) -> str:
    return name if name.startswith(prefix) else prefix + name


# ── Input ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Item(msgspec.Struct, frozen=True, kw_only=True):
    """One item of any type; which fields count depends on it."""

    type: str | None = None
    role: str | None = None
    content: Any = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Any = None
    encrypted_content: str | None = None

    @property
    def kind(self) -> str:
        """The type; what has a role is a message without saying so."""
        return self.type or ("message" if self.role else "")


def _native_messages(request: ResponsesRequest) -> list[Message]:
    messages = [Message(role="system", content=request.instructions)] if request.instructions else []
    match request.input:
        case None | "":
            return messages
        case str() as text:
            return [*messages, Message(role="user", content=text)]
        case list() as items:
            return _Conversation(messages).of(_parsed_items(items))
    raise CorralError("bad_request", "input must be a string or array")


def _parsed_items(items: Sequence[Any]) -> list[_Item]:
    found = []
    for index, item in enumerate(items):
        try:
            found.append(msgspec.convert(item, _Item))
        except msgspec.ValidationError as error:
            raise CorralError("bad_request", f"input[{index}]: {error}") from error
    return found


class _Conversation:
    """Items put together to messages: reasoning and calls belong to the message of the model that they stand beside."""

    def __init__(self, messages: list[Message]) -> None:
        self._messages = messages
        self._thinking = ""
        self._names: dict[str, str] = {}

    def of(self, items: Sequence[_Item]) -> list[Message]:
        """The messages. Raises: bad_request with the item's number."""
        for index, item in enumerate(items):
            following = items[index + 1] if index + 1 < len(items) else None
            answered = following.call_id or "" if following is not None and following.kind == "function_call_output" else ""
            self._add(item, f"input[{index}]: ", answered)
        if self._thinking:
            self._append(Message(role="assistant", content=""))
        return self._messages

    def _add(self, item: _Item, where: str, answered: str) -> None:
        match item.kind:
            case "message":
                self._add_message(item, where, answered)
            case "function_call":
                self._add_call(item, where)
            case "function_call_output":
                text, images = _content(item.output, where, "output")
                call_id = item.call_id or ""
                name = self._names.get(call_id, "")
                self._messages.append(Message(role="tool", content=text, images=images, tool_call_id=call_id, tool_name=name))
            case "reasoning":
                self._thinking = item.encrypted_content or ""
            case "web_search_call":
                pass  # what was found is in the message that follows
            case "":
                raise CorralError("bad_request", f"{where}input item missing required 'type' field")
            case other:
                raise CorralError("bad_request", f'{where}unknown input item type: "{other[:100]}"')

    def _add_message(self, item: _Item, where: str, answered: str) -> None:
        text, images = _content(item.content, where, "content")
        message = Message(role=item.role or "", content=text, images=images)
        last = self._messages[-1] if self._messages else None
        is_between = message.role == "assistant" and answered and last is not None and last.role == "assistant"
        if not (is_between and last is not None and any(call.id == answered for call in last.tool_calls)):
            self._append(message)
            return
        # The model's words between a call and its result join the call's message, since a result must follow its call.
        self._replace_last(last, content="\n".join(filter(None, (last.content, text))), images=[*last.images, *images])

    def _add_call(self, item: _Item, where: str) -> None:
        arguments = parse_arguments(item.arguments) if item.arguments else {}
        if arguments is None:
            raise CorralError("bad_request", f"{where}failed to parse function call arguments: they are no JSON object")
        call_id, name = item.call_id or "", item.name or ""
        self._names[call_id] = name
        last = self._messages[-1] if self._messages else None
        index = len(last.tool_calls) if last is not None and last.role == "assistant" else 0
        call = ToolCall(id=call_id, function=ToolCallFunction(index=index, name=name, arguments=arguments))
        if last is not None and last.role == "assistant":
            # Appended in place: copying the list for each of a hundred thousand calls would take hours.
            last.tool_calls.append(call)
            self._replace_last(last)
        else:
            self._append(Message(role="assistant", content="", tool_calls=[call]))

    def _append(self, message: Message) -> None:
        self._messages.append(message)
        if message.role == "assistant":
            self._replace_last(message)

    def _replace_last(self, message: Message, **changes: Any) -> None:
        thinking, self._thinking = self._thinking, ""
        self._messages[-1] = msgspec.structs.replace(message, thinking=thinking or message.thinking, **changes)


def _content(content: Any, where: str, member: str) -> tuple[str, list[bytes]]:
    """Text and images of a message or of a function's output."""
    match content:
        case None:
            return "", []
        case str() as text:
            return text, []
        case list() as parts:
            found = [_part(part, f"{where}{member}[{index}]: ") for index, part in enumerate(parts)]
            texts = [part for part in found if isinstance(part, str)]
            return "".join(texts), [part for part in found if isinstance(part, bytes)]
    raise CorralError("bad_request", f"{where}{member} must be a string or array")


def _part(part: Any, where: str) -> str | bytes:
    match part:
        case {"type": "input_text" | "output_text", "text": str() as text}:
            return text
        case {"type": "input_image", "image_url": str() as url} if url:
            return image_of(url)
        case {"type": "input_image"}:
            return ""  # a file that was stored elsewhere: there is nothing to see
        case {"type": "input_file"}:
            raise CorralError("bad_request", "file inputs are not currently supported")
        case {"type": "input_text" | "output_text"}:
            raise CorralError("bad_request", f"{where}text must be a string")
        case {"type": str() as kind}:
            raise CorralError("bad_request", f"{where}unknown content type: {kind[:100]}")
    raise CorralError("bad_request", f"{where}unknown content type: ")


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def response_object(number: int, request: ResponsesRequest, response: ChatResponse) -> dict[str, Any]:
    """The whole answer of an unstreamed request. number: ids are made of it."""
    items = _Items(number)
    message = response.message
    output = [items.reasoning(message.thinking)] if message.thinking else []
    if message.content or not message.tool_calls:
        output.append(items.message(message.content))
    output += [items.call(call) for call in message.tool_calls]
    created = unix_seconds(response.created_at)
    told = _told(number, request, created)
    return told | {"completed_at": created, "status": "completed", "output": output, "usage": _usage(response)}


def _told(number: int, request: ResponsesRequest, created: int) -> dict[str, Any]:
    """A response that has begun, with every member in its place."""
    chosen = request.text.format if request.text else None
    return {
        "id": f"resp_{number}",
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "model": request.model,
        "previous_response_id": None,
        "instructions": request.instructions or None,
        "output": [],
        "error": None,
        "tools": [{**_FUNCTION_MEMBERS, **tool} if tool.get("type") == "function" else tool for tool in request.tools],
        "tool_choice": "auto",
        "truncation": request.truncation,
        "parallel_tool_calls": True,
        "text": {"format": chosen or {"type": "text"}},
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_logprobs": 0,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "reasoning": _told_reasoning(request.reasoning),
        "usage": None,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "store": False,
        "background": request.background,
        "service_tier": "default",
        "metadata": {},
        "safety_identifier": None,
        "prompt_cache_key": None,
    }


def _told_reasoning(reasoning: _Reasoning | None) -> dict[str, Any] | None:
    if reasoning is None or not (reasoning.effort or reasoning.summary):
        return None
    return {"effort": reasoning.effort or None, "summary": reasoning.summary or None}


def _usage(response: ChatResponse) -> dict[str, Any]:
    prompt, answer = response.prompt_eval_count, response.eval_count
    return {
        "input_tokens": prompt,
        "output_tokens": answer,
        "total_tokens": prompt + answer,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _Items:
    """Finished output items and their ids, in the order they are made."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._count = 0

    def new_id(self, kind: str) -> str:
        """kind: `rs`, `msg` or `fc`."""
        self._count += 1
        return f"{kind}_{self._number}_{self._count - 1}"

    def reasoning(self, text: str, item_id: str = "") -> dict[str, Any]:
        # Nothing is encrypted: the member is how clients hand thinking back, and the model here reads plain text.
        summary = [{"type": "summary_text", "text": text}]
        return {"id": item_id or self.new_id("rs"), "type": "reasoning", "summary": summary, "encrypted_content": text}

    def message(self, text: str, item_id: str = "") -> dict[str, Any]:
        head = {"id": item_id or self.new_id("msg"), "type": "message", "status": "completed", "role": "assistant"}
        return {**head, "content": [_text_part(text)]}

    def search(self, number: int, query: str) -> dict[str, Any]:
        head = {"id": f"ws_{self._number}_{number}", "type": "web_search_call", "status": "completed"}
        return {**head, "action": {"type": "search", "query": query}}

    def call(self, call: ToolCall) -> dict[str, Any]:
        (converted,) = openai_calls([call])
        return {
            "id": self.new_id("fc"),
            "type": "function_call",
            "status": "completed",
            "call_id": converted.id,
            "name": converted.function.name,
            "arguments": converted.function.arguments,
        }


class ResponseStream:
    """Turns the events of one chat into the numbered events of this dialect. It remembers which item is open, and what was said,
    since the last event repeats everything. number: ids are made of it."""

    def __init__(self, number: int, request: ResponsesRequest) -> None:
        self._number = number
        self._request = request
        self._items = _Items(number)
        self._created: int | None = None
        self._sequence = 0
        self._output: list[dict[str, Any]] = []
        self._open = ""
        self._open_id = ""
        self._said: list[str] = []
        #: The whole response, once the stream has ended.
        self.whole: dict[str, Any] | None = None

    def encode(self, event: ChatResponse | SearchEvent) -> bytes:
        """The events of one native event, or of a search. Raises: SearchError where the search failed."""
        if not isinstance(event, ChatResponse):
            return b"".join(self._search(event))
        return self._encode_chat(event)

    def _encode_chat(self, response: ChatResponse) -> bytes:
        message = response.message
        frames = self._start(response) if self._created is None else []
        if message.thinking:
            frames += self._think(message.thinking)
        if message.content:
            frames += self._say(message.content)
        for call in message.tool_calls:
            frames += self._call(call)
        if response.done:
            frames += self._end(response)
        return b"".join(frames)

    def error(self, error: CorralError) -> bytes:
        """The last event of a stream that failed."""
        told = _told(self._number, self._request, self._created or 0)
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        if isinstance(error, SearchError):
            code = error.response_code
        failed = told | {
            "status": "failed",
            "output": self._output,
            "error": {"code": code, "message": error.message},
        }
        return self._event("response.failed", response=failed)

    def _start(self, response: ChatResponse) -> list[bytes]:
        self._created = unix_seconds(response.created_at)
        told = _told(self._number, self._request, self._created)
        return [self._event("response.created", response=told), self._event("response.in_progress", response=told)]

    def _think(self, text: str) -> list[bytes]:
        frames = []
        if self._open != "rs":
            frames = [*self._close(), self._add("rs", {"type": "reasoning", "summary": []})]
        self._said.append(text)
        return [*frames, self._event("response.reasoning_summary_text.delta", **self._place("summary"), delta=text)]

    def _say(self, text: str) -> list[bytes]:
        frames = []
        if self._open != "msg":
            item = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
            frames = [*self._close(), self._add("msg", item)]
            frames.append(self._event("response.content_part.added", **self._place("content"), part=_text_part("")))
        self._said.append(text)
        return [*frames, self._event("response.output_text.delta", **self._place("content"), delta=text, logprobs=[])]

    def _call(self, call: ToolCall) -> list[bytes]:
        """A call comes whole, so its item begins and ends at once."""
        frames = self._close()
        item = self._items.call(call)
        place = {"item_id": item["id"], "output_index": len(self._output)}
        begun = item | {"status": "in_progress", "arguments": ""}
        return [
            *frames,
            self._event("response.output_item.added", output_index=len(self._output), item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=item["arguments"]),
            self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]),
            self._done(item),
        ]

    def _search(self, event: SearchEvent) -> list[bytes]:
        """A search keeps its place in the output from its beginning on; nothing else is said until it ends."""
        if not isinstance(event, SearchBegun | SearchDone):
            raise event.error
        frames = self._close()
        item = self._items.search(event.number, event.query)
        place = {"item_id": item["id"], "output_index": len(self._output)}
        if isinstance(event, SearchDone):
            return [self._event("response.web_search_call.completed", **place), self._done(item)]
        begun = item | {"status": "in_progress"}
        return [
            *frames,
            self._event("response.output_item.added", output_index=len(self._output), item=begun),
            self._event("response.web_search_call.in_progress", **place),
            self._event("response.web_search_call.searching", **place),
        ]

    def _add(self, kind: str, item: dict[str, Any]) -> bytes:
        self._open, self._open_id = kind, self._items.new_id(kind)
        return self._event("response.output_item.added", output_index=len(self._output), item={"id": self._open_id, **item})

    def _place(self, part: str) -> dict[str, Any]:
        """Where in the output a piece of the open item belongs. part: `summary` or `content`."""
        return {"item_id": self._open_id, "output_index": len(self._output), f"{part}_index": 0}

    def _close(self) -> list[bytes]:
        """The end of the open item, if any."""
        kind, text = self._open, "".join(self._said)
        self._open, self._said = "", []
        if kind == "rs":
            done = self._event("response.reasoning_summary_text.done", **self._place("summary"), text=text)
            return [done, self._done(self._items.reasoning(text, self._open_id))]
        if kind == "msg":
            place = self._place("content")
            return [
                self._event("response.output_text.done", **place, text=text, logprobs=[]),
                self._event("response.content_part.done", **place, part=_text_part(text)),
                self._done(self._items.message(text, self._open_id)),
            ]
        return []

    def _done(self, item: dict[str, Any]) -> bytes:
        self._output.append(item)
        return self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _end(self, response: ChatResponse) -> list[bytes]:
        frames = self._close()
        ended = unix_seconds(response.created_at)
        told = _told(self._number, self._request, self._created or ended)
        self.whole = told | {"completed_at": ended, "status": "completed", "output": self._output, "usage": _usage(response)}
        return [*frames, self._event("response.completed", response=self.whole)]

    def _event(self, kind: str, **members: Any) -> bytes:
        self._sequence += 1
        return encode_event(kind, {"type": kind, "sequence_number": self._sequence - 1, **members})
