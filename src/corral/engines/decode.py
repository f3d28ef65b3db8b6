"""Streamed answers of llama.cpp and of OpenAI-compatible servers, turned into chunks. Pure: bytes in, as a socket gives them,
values out.

Only the members that are used are decoded. This runs once per generated token, so it is measured (docs/performance.md): one event
costs a few microseconds, framing included. Source: llama.cpp tools/server/README.md; OpenAI's chat completion chunk object.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from corral.core.ports import Chunk, Finish, Timings
from corral.wire.errors import CorralError
from corral.wire.frames import SseDecoder

T = TypeVar("T")

# Ends an OpenAI stream.
_DONE = b"[DONE]"
_NS_PER_MS = 1_000_000
#: Calls of one answer that are kept: an answer is bounded by its context, a hostile upstream's is not.
_MAX_CALLS = 1024


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Token(msgspec.Struct, omit_defaults=True):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list["_Token"] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Timings(msgspec.Struct, gc=False):
    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0


class _ChatEvent(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


class _CompletionEvent(msgspec.Struct):
    content: str = ""
    stop: bool = False
    stop_type: str = ""
    timings: _Timings | None = None
    completion_probabilities: list[_Token] | None = None
    error: Any = None


class _ErrorObject(msgspec.Struct):
    message: str = ""


class _ErrorBody(msgspec.Struct):
    error: _ErrorObject | str = ""


_chat_events = msgspec.json.Decoder(_ChatEvent)
_completion_events = msgspec.json.Decoder(_CompletionEvent)
_error_bodies = msgspec.json.Decoder(_ErrorBody)


class AnswerDecoder:
    """One streamed answer. code: of the errors that are raised for what an engine should not send, or says of itself."""

    def __init__(self, code: str = "engine_failed") -> None:
        self._code = code
        self._frames = SseDecoder()
        self._is_between_events = True

    def feed(self, data: bytes) -> Iterable[Chunk]:
        """What these bytes add to the answer; read it to its end before anything else is asked. Raises: an error of the given
        code, behind the chunks that came before it, which are part of the answer."""
        was_between, self._is_between_events = self._is_between_events, data.endswith(b"\n\n")
        if was_between and self._is_between_events and data.startswith(b"data: {") and data.count(b"\n") == 2:
            # One whole event, as one token gives: the frames of nearly every answer are of this kind.
            chunk = self._take(data[6:-2])
            return [] if chunk is None else [chunk]
        events = (event.data for event in self._frames.feed(data) if event.data != _DONE)
        return (chunk for event in events if (chunk := self._take(event)) is not None)

    def finish(self) -> Sequence[Chunk | Finish] | None:
        """What follows the last byte: complete calls, if any, and the end. None when the stream broke off before its end."""
        raise NotImplementedError

    def _take(self, event: bytes) -> Chunk | None:
        raise NotImplementedError

    def _decoded(self, decoder: "msgspec.json.Decoder[T]", data: bytes) -> T:
        try:
            return decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CorralError(self._code, f"the engine sent something that is not understood: {error}") from error

    def _failure(self, error: object) -> CorralError:
        text = error.get("message") if isinstance(error, dict) else error
        words = text if text and isinstance(text, str) else "no reason was given"
        return CorralError(self._code, f"an error was encountered while running the model: {words}")


class ChatDecoder(AnswerDecoder):
    """An answer of `/v1/chat/completions`, or of `/v1/completions`, whose choices hold a `text`. Calls arrive in pieces, are put
    together by index, and come out whole in `finish`."""

    def __init__(self, code: str = "engine_failed") -> None:
        super().__init__(code)
        self._calls: dict[int, dict[str, Any]] = {}
        self._reason: str | None = None
        self._usage: _Usage | None = None
        self._timings: _Timings | None = None

    def finish(self) -> Sequence[Chunk | Finish] | None:
        """See AnswerDecoder.finish."""
        if self._reason is None:
            return None
        end = Finish(reason=_reason(self._reason), timings=self._counted())
        calls = [self._calls[index] for index in sorted(self._calls)]
        return [Chunk(tool_calls=calls), end] if calls else [end]

    def _take(self, event: bytes) -> Chunk | None:
        found = self._decoded(_chat_events, event)
        if found.error is not None:
            raise self._failure(found.error)
        self._usage = found.usage or self._usage
        self._timings = found.timings or self._timings
        if not found.choices:
            return None
        choice = found.choices[0]
        self._reason = choice.finish_reason or self._reason
        delta = choice.delta
        if delta is None:
            return Chunk(content=choice.text) if choice.text else None
        for call in delta.tool_calls or ():
            self._add(call)
        logprobs = choice.logprobs.content if choice.logprobs else None
        if not (delta.content or delta.reasoning_content or logprobs):
            return None
        return Chunk(content=delta.content or "", thinking=delta.reasoning_content or "", logprobs=_told(logprobs))

    def _add(self, piece: _Call) -> None:
        if piece.index not in self._calls and len(self._calls) >= _MAX_CALLS:
            raise CorralError(self._code, f"the answer holds more than {_MAX_CALLS} tool calls")
        empty = {"index": piece.index, "id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        call = self._calls.setdefault(piece.index, empty)
        call["id"] = piece.id or call["id"]
        if piece.function is not None:
            call["function"]["name"] += piece.function.name or ""
            call["function"]["arguments"] += piece.function.arguments or ""

    def _counted(self) -> Timings:
        if self._timings is None and self._usage is not None:
            return Timings(prompt_tokens=self._usage.prompt_tokens, eval_tokens=self._usage.completion_tokens)
        return _counted(self._timings)


class CompletionDecoder(AnswerDecoder):
    """An answer of llama.cpp's `/completion`."""

    def __init__(self, code: str = "engine_failed") -> None:
        super().__init__(code)
        self._end: Finish | None = None

    def finish(self) -> Sequence[Chunk | Finish] | None:
        """See AnswerDecoder.finish."""
        return None if self._end is None else [self._end]

    def _take(self, event: bytes) -> Chunk | None:
        found = self._decoded(_completion_events, event)
        if found.error is not None:
            raise self._failure(found.error)
        if found.stop:
            reason = "length" if found.stop_type == "limit" else "stop"
            self._end = Finish(reason=reason, timings=_counted(found.timings))
        if not (found.content or found.completion_probabilities):
            return None
        return Chunk(content=found.content, logprobs=_told(found.completion_probabilities))


def error_text(body: bytes) -> str:
    """What an error answer says: the message of its error object, else its text."""
    try:
        error = _error_bodies.decode(body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode("utf-8", "replace").strip()
    return (error if isinstance(error, str) else error.message) or body.decode("utf-8", "replace").strip()


def _told(tokens: list[_Token] | None) -> Sequence[dict[str, Any]]:
    """Token objects as everybody else reads them: without what was null."""
    return msgspec.to_builtins(tokens) if tokens else ()


def _reason(engine_reason: str) -> str:
    # Calls end an answer with `tool_calls` in OpenAI's words; Ollama says `stop`.
    return "length" if engine_reason == "length" else "stop"


def _counted(timings: _Timings | None) -> Timings:
    if timings is None:
        return Timings()
    return Timings(
        prompt_tokens=timings.cache_n + timings.prompt_n,
        prompt_ns=round(timings.prompt_ms * _NS_PER_MS),
        eval_tokens=timings.predicted_n,
        eval_ns=round(timings.predicted_ms * _NS_PER_MS),
    )
