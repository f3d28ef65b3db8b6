"""Ollama's /api/* requests and responses: types, a decoder as tolerant as Go's, and the small pure rules that go with them.

The event of a running generation inside Corral is the native response as well: GenerateResponse and ChatResponse. Field order is
that of Ollama's structs, so that what we send can be compared byte by byte. A field without a default is always sent; one with a
default is left out when it holds it (Go's `omitempty`). Source: ollama api/types.go and server/routes.go, fb30760.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import msgspec
from msgspec.structs import force_setattr

from corral.wire.errors import CorralError
from corral.wire.gojson import syntax_complaint, type_complaint
from corral.wire.jsonparts import check_parts
from corral.wire.options import parse_keep_alive, parse_think

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
#: Usually near enough. Source: ollama anthropic/anthropic.go EstimateInputTokens.
_BYTES_PER_TOKEN = 4


# ── Types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ToolCallFunction(msgspec.Struct, frozen=True, kw_only=True):
    """What the model wants called. arguments: an object, in the model's order."""

    go_alias: ClassVar[str] = "api.ToolCallFunction"

    index: int = 0
    name: str
    arguments: dict[str, Any]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call of a tool."""

    go_alias: ClassVar[str] = "api.ToolCall"

    id: str = ""
    function: ToolCallFunction


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a chat. role: lower case, any word. images: the files' bytes; base64 on the wire."""

    #: See gojson: Go decodes it by way of another type.
    go_alias: ClassVar[str] = "api.Alias"

    role: str
    content: str
    thinking: str = ""
    images: list[bytes] = []
    tool_calls: list[ToolCall] = []
    tool_name: str = ""
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        force_setattr(self, "role", self.role.lower())


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How likely a token was. bytes: of its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int] = []


class Logprob(TokenLogprob, frozen=True, kw_only=True, omit_defaults=True):
    """The same of a token that was taken, with the most likely ones in its place."""

    top_logprobs: list[TokenLogprob] = []


class _RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What every request that runs a model has. keep_alive: seconds once decoded, negative for ever."""

    #: The route such a request comes in by, for usage entries.
    path: ClassVar[str]

    model: str
    keep_alive: Any = None
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        force_setattr(self, "keep_alive", parse_keep_alive(self.keep_alive))

    @property
    def keep_alive_s(self) -> float | None:
        """None when unset."""
        seconds: float | None = self.keep_alive
        return seconds


class _TextRequest(_RunRequest, frozen=True, kw_only=True):
    """What generate and chat share. think: True, False, a level or None. truncate, shift, stream: None means true."""

    #: Whether a model that cannot think is asked not to, instead of refusing.
    relaxes_thinking: ClassVar[bool] = False

    stream: bool | None = None
    format: Any = None
    think: Any = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    debug_render_only: bool = msgspec.field(default=False, name="_debug_render_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        force_setattr(self, "think", parse_think(self.think))
        if not 0 <= self.top_logprobs <= 20:
            raise CorralError("bad_request", "top_logprobs must be between 0 and 20")

    @property
    def wants_stream(self) -> bool:
        """Streaming is the default of native routes, except for a prompt that is only shown."""
        return self.stream is not False and not self.debug_render_only


class GenerateRequest(_TextRequest, frozen=True, kw_only=True):
    """POST /api/generate. context: token numbers of an earlier answer (deprecated by Ollama), None when absent."""

    path: ClassVar[str] = "/api/generate"

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: str = ""
    context: list[int] | None = None
    raw: bool = False
    images: list[bytes] = []

    @property
    def only_loads(self) -> bool:
        """Whether it asks for loading or unloading only, which one object answers even when a stream was asked for."""
        return not self.prompt


class _ToolFunction(msgspec.Struct, frozen=True, kw_only=True):
    """Of a tool's function what everything behind relies on; the rest of its schema is the engine's to judge."""

    go_name: ClassVar[str] = "api.ToolFunction"
    go_types: ClassVar[Mapping[str, str]] = {"parameters": "api.ToolFunctionParameters"}

    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool, to be checked only."""

    go_name: ClassVar[str] = "api.Tool"

    type: str | None = None
    function: _ToolFunction | None = None


class _Tools(msgspec.Struct, frozen=True, kw_only=True):
    """A request's tools, to be checked only."""

    go_name: ClassVar[str] = "api.ChatRequest"

    tools: list[_Tool]


class ChatRequest(_TextRequest, frozen=True, kw_only=True):
    """POST /api/chat. tools: as the caller wrote them, and of the right types."""

    path: ClassVar[str] = "/api/chat"
    go_types: ClassVar[Mapping[str, str]] = {"tools": "api.Tools"}

    messages: list[Message] = []
    tools: list[dict[str, Any]] = []

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tools:
            _check_tools({"tools": self.tools})

    @property
    def only_loads(self) -> bool:
        """As for generate."""
        return not self.messages


def _check_tools(given: Mapping[str, Any]) -> None:
    try:
        msgspec.convert(given, _Tools)
    except msgspec.ValidationError as error:
        raise CorralError("bad_request", type_complaint(given, _Tools) or str(error)) from error


class EmbedRequest(_RunRequest, frozen=True, kw_only=True):
    """POST /api/embed. input: text or texts."""

    path: ClassVar[str] = "/api/embed"

    input: Any = None
    truncate: bool | None = None
    dimensions: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.texts  # refused before the model is looked for

    @property
    def texts(self) -> list[str]:
        """What to embed; an empty text alone is nothing to embed. Raises: bad_request `invalid input type`."""
        match self.input:
            case None | "":
                return []
            case str() as text:
                return [text]
            case list() as items if all(isinstance(item, str) for item in items):
                return items
            case _:
                raise CorralError("bad_request", "invalid input type")


class EmbeddingsRequest(_RunRequest, frozen=True, kw_only=True):
    """POST /api/embeddings, the older form."""

    path: ClassVar[str] = "/api/embeddings"
    go_name: ClassVar[str] = "api.EmbeddingRequest"

    prompt: str = ""


class ShowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/show. name: what older clients send instead of model."""

    model: str = ""
    name: str = ""
    system: str = ""
    verbose: bool = False
    options: dict[str, Any] = {}


class DebugInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What `_debug_render_only` is answered with: the prompt that the model would have read."""

    rendered_template: str
    image_count: int = 0


class GenerateResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a generation; the last has done set. Durations in ns. created_at: see format_time."""

    model: str
    remote_model: str = ""
    remote_host: str = ""
    created_at: str
    response: str
    thinking: str = ""
    done: bool
    done_reason: str = ""
    context: list[int] = []
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    tool_calls: list[ToolCall] = []
    debug_info: DebugInfo | None = msgspec.field(default=None, name="_debug_info")
    logprobs: list[Logprob] = []


class ChatResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a chat; the last has done set."""

    model: str
    remote_model: str = ""
    remote_host: str = ""
    created_at: str
    message: Message
    done: bool
    done_reason: str = ""
    debug_info: DebugInfo | None = msgspec.field(default=None, name="_debug_info")
    logprobs: list[Logprob] = []
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class EmbedResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answer of /api/embed."""

    model: str
    embeddings: list[list[float]]
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0


class EmbeddingsResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /api/embeddings."""

    embedding: list[float]


# ── Decoding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def decode(body: bytes, kind: type[S], *, empty: str = "missing request body") -> S:
    """A request out of its body, whatever Content-Type came with it. Unknown fields are ignored, null means unset, a key in
    another case counts unless the exact one is there. empty: what to say of a body without content. Raises: bad_request;
    too_large for one of too many parts."""
    if not body or body.isspace():
        raise CorralError("bad_request", empty)
    check_parts(body)
    value = _parsed(body, _VALUES)
    if value is None:
        value = {}
    folded = _folded(value, _shape(kind))
    try:
        return msgspec.convert(folded, kind)
    except msgspec.ValidationError as error:
        raise CorralError("bad_request", type_complaint(folded, kind) or str(error)) from error


# Made once: decode() with a type would look at the type again for every request.
_VALUES: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_RAW_OBJECTS = msgspec.json.Decoder(dict[str, msgspec.Raw] | None)
_TEXTS = msgspec.json.Decoder(str | None)


def _parsed(body: bytes | msgspec.Raw, decoder: "msgspec.json.Decoder[T]") -> T:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise CorralError("bad_request", syntax_complaint(bytes(body)) or str(error)) from error
    except UnicodeDecodeError as error:
        raise CorralError("bad_request", "the request body is not UTF-8") from error
    except RecursionError as error:
        raise CorralError("bad_request", "the request body is nested too deeply") from error


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the tolerant pass needs to know of a struct. names: in lower case -> as declared. zeros: Go's zero value of every
    field that must be there. nested: fields that hold structs or lists of structs. media: fields of bytes in base64."""

    names: Mapping[str, str]
    zeros: Mapping[str, Any]
    nested: Mapping[str, type[msgspec.Struct]]
    media: frozenset[str]


@cache
def _shape(kind: type[msgspec.Struct]) -> _Shape:
    names, zeros, nested = {}, {}, {}
    media = set()
    for row in msgspec.structs.fields(kind):
        names[row.encode_name.lower()] = row.encode_name
        inner = _without_none(row.type)
        inner = get_args(inner)[0] if get_origin(inner) is list else inner
        if inner is bytes:
            media.add(row.encode_name)
        elif isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            nested[row.encode_name] = inner
        if row.required:
            zeros[row.encode_name] = {} if row.encode_name in nested else (get_origin(row.type) or row.type)()
    return _Shape(names, zeros, nested, frozenset(media))


def _without_none(kind: Any) -> Any:
    """X of `X | None`; anything else as it is."""
    inner = [arm for arm in get_args(kind) if arm is not NoneType]
    return inner[0] if isinstance(kind, UnionType) and len(inner) == 1 else kind


def _folded(value: Any, shape: _Shape) -> Any:
    """The object with declared keys only, in their declared case, without nulls. What is no object is left for convert to
    refuse."""
    if not isinstance(value, dict):
        return value
    kept = dict(shape.zeros)
    for key, item in value.items():
        name = shape.names.get(key.lower())
        if name is None or item is None or (key != name and name in value):
            continue
        if inner := shape.nested.get(name):
            nested = _shape(inner)
            # A null among structs is a struct whose fields are unset.
            item = (
                [_folded({} if one is None else one, nested) for one in item] if isinstance(item, list) else _folded(item, nested)
            )
        elif name in shape.media and isinstance(item, list):
            item = [_unbroken(one) for one in item]
        kept[name] = item
    for name, inner in shape.nested.items():
        if kept.get(name) == {} and name in shape.zeros:
            kept[name] = dict(_shape(inner).zeros)
    return kept


def _unbroken(text: Any) -> Any:
    """base64 without the line breaks that Go passes over."""
    return text.replace("\r", "").replace("\n", "") if isinstance(text, str) and "\n" in text else text


# ── Bodies that are passed on ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request whose values are not looked into. fields: top-level key -> its bytes as sent, in the order sent."""

    fields: Mapping[str, msgspec.Raw]

    @property
    def model(self) -> str:
        """Empty when there is none. Raises: bad_request when it is no text."""
        raw = self._field("model")
        return "" if raw is None else _parsed(raw, _TEXTS) or ""

    def with_model(self, model: str) -> bytes:
        """The body with another model. Every other value keeps its bytes. A second spelling of the key is dropped, so that no
        receiver can understand another model than we did."""
        name = msgspec.Raw(_encode(model))
        changed: dict[str, msgspec.Raw] = {}
        for key, raw in self.fields.items():
            if key.lower() == "model":
                changed["model"] = name
            else:
                changed[key] = raw
        changed.setdefault("model", name)
        return _encode(changed)

    def _field(self, name: str) -> msgspec.Raw | None:
        exact = self.fields.get(name)
        if exact is not None:
            return exact
        return next((raw for key, raw in self.fields.items() if key.lower() == name), None)


def raw_request(body: bytes, *, empty: str = "missing request body") -> RawRequest:
    """Look at a body without decoding its values. Raises: bad_request for what is not one JSON object."""
    if not body or body.isspace():
        raise CorralError("bad_request", empty)
    return RawRequest(_parsed(body, _RAW_OBJECTS) or {})


# ── Times and texts ──────────────────────────────────────────────────────────────────────────────────────────────────


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with a `Z`, without trailing zeros of the fraction, as Go writes it. moment: aware."""
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat()
    return f"{text.rstrip('0') if '.' in text else text}Z"


def unix_seconds(created_at: str) -> int:
    """Whole seconds since the epoch of a time that format_time wrote."""
    return int(datetime.fromisoformat(created_at).timestamp())


def model_required() -> CorralError:
    """What chat, embeddings and show say of an empty model."""
    return CorralError("bad_request", "model is required")


def model_not_found(name: str) -> CorralError:
    """What generate, chat and show say of an unknown model. name: as requested."""
    return CorralError("not_found", f"model '{name}' not found")


def model_not_pulled(name: str) -> CorralError:
    """What embed and embeddings say of an unknown model."""
    return CorralError("not_found", f'model "{name}" not found, try pulling it first')


def estimated_tokens(request: ChatRequest) -> int:
    """About how many tokens a prompt has, for whoever must say so before it was read."""
    size = sum(len(_encode(tool.get("function", tool))) for tool in request.tools)
    for message in request.messages:
        size += len(message.content.encode("utf-8", "replace")) + len(message.thinking.encode("utf-8", "replace"))
        size += sum(len(_encode(call)) for call in message.tool_calls)
        size += len(message.role) if message.role != "system" else 0
    return max(size // _BYTES_PER_TOKEN, 1)


# ── Answers without a stream ─────────────────────────────────────────────────────────────────────────────────────────


def join_generate(parts: Sequence[GenerateResponse]) -> GenerateResponse:
    """One response of all events: the last one, with all text. parts: at least one."""
    return msgspec.structs.replace(
        parts[-1],
        response="".join(part.response for part in parts),
        thinking="".join(part.thinking for part in parts),
        tool_calls=_chained(part.tool_calls for part in parts),
        logprobs=_chained(part.logprobs for part in parts),
    )


def join_chat(parts: Sequence[ChatResponse]) -> ChatResponse:
    """One response of all events: the last one, with all text and all calls. parts: at least one."""
    message = msgspec.structs.replace(
        parts[-1].message,
        content="".join(part.message.content for part in parts),
        thinking="".join(part.message.thinking for part in parts),
        tool_calls=_chained(part.message.tool_calls for part in parts),
    )
    return msgspec.structs.replace(parts[-1], message=message, logprobs=_chained(part.logprobs for part in parts))


def _chained(lists: Iterable[Sequence[T]]) -> list[T]:
    return [item for part in lists for item in part]
