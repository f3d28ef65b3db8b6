"""Streams as bytes: one JSON object a line (NDJSON) and server-sent events (SSE). Encode one, decode incrementally, error frames.

What a frame holds is up to the dialects; nothing here knows a model from a message. The decoders take the bytes as a socket gives
them, cut anywhere, and give the same frames for every cut. Both bound what they keep, since a peer may never end its line.
Source: ollama server/routes.go streamResponse and middleware/openai.go; WHATWG HTML, "Server-sent events".
"""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from corral.wire.errors import CorralError, anthropic_body, native_body, openai_body

NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
#: Ends an OpenAI stream that is complete. A stream that failed does not send it.
SSE_DONE = b"data: [DONE]\n\n"
#: The longest line or event a decoder keeps. Tool calls and embeddings come as one frame, so it is generous.
MAX_FRAME_BYTES = 16 * 1024 * 1024

_encoder = msgspec.json.Encoder()


def encode_ndjson(value: object) -> bytes:
    """value as one line."""
    return _encoder.encode(value) + b"\n"


def encode_sse(value: object) -> bytes:
    """value as one event without a name, as the OpenAI dialect sends them."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


def encode_event(name: str, value: object) -> bytes:
    """value as one event with a name, as OpenAI's responses and Anthropic's messages send them."""
    return b"event: " + name.encode() + b"\ndata: " + _encoder.encode(value) + b"\n\n"


def ndjson_error(error: CorralError) -> bytes:
    """The last line of a native stream that failed after its status was sent."""
    return encode_ndjson(native_body(error))


def sse_error(error: CorralError) -> bytes:
    """The last event of an OpenAI stream that failed after its status was sent. No `[DONE]` follows, so that a client that
    waits for it knows that the answer is not complete (Ollama swallows the error; see docs/divergences.md)."""
    return encode_sse(openai_body(error))


def anthropic_error(error: CorralError) -> bytes:
    """The last event of a stream of Anthropic's dialect that failed after its status was sent. Nothing follows it, neither
    `message_delta` nor `message_stop`."""
    return encode_event("error", {"type": "error", "error": anthropic_body(error, "")["error"]})


def responses_error(error: CorralError) -> bytes:
    """The last event of a passed-on stream of OpenAI's responses that failed. Our own streams end in `response.failed`, which
    needs the whole response."""
    return encode_event("error", {"type": "error", "code": "server_error", "message": error.message, "param": None})


class NdjsonDecoder:
    """Gives complete, non-blank lines without their line end. A last line without one comes from `finish`."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._rest = bytearray()
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that data completes. Raises: too_large for a line over the bound."""
        if b"\n" not in data:
            _keep(self._rest, data, self._max_bytes)
            return []
        head, _, tail = data.rpartition(b"\n")
        lines = (bytes(self._rest) + head).split(b"\n")
        self._rest.clear()
        _keep(self._rest, tail, self._max_bytes)
        return [line for line in (line.strip() for line in lines) if line]

    def finish(self) -> list[bytes]:
        """What is left when the stream has ended."""
        line = bytes(self._rest).strip()
        self._rest.clear()
        return [line] if line else []


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event. name: of its `event:` line, empty when it has none. data: its `data:` lines, joined by line feeds."""

    data: bytes
    name: str = ""


class SseDecoder:
    """Gives complete events. Comments, ids and retry times are skipped; an event that the stream's end cuts off is dropped."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._rest = bytearray()
        self._max_bytes = max_bytes
        self._name = ""
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._is_first = True
        self._ended_in_cr = False

    def feed(self, data: bytes) -> list[SseEvent]:
        """The events that data completes. Raises: too_large for an event over the bound."""
        events = []
        for line in self._lines(data):
            event = self._take(line)
            if event is not None:
                events.append(event)
        return events

    def _lines(self, data: bytes) -> Iterator[bytes]:
        """Lines end in CR LF, LF or CR; a CR at the end of one piece may be half of a CR LF."""
        if self._ended_in_cr and data.startswith(b"\n"):
            data = data[1:]
            self._ended_in_cr = False
        if not data:
            return
        self._ended_in_cr = data.endswith(b"\r")
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first, *more = data.split(b"\n")
        _keep(self._rest, first, self._max_bytes)
        for following in more:
            line = bytes(self._rest)
            self._rest.clear()
            _keep(self._rest, following, self._max_bytes)
            yield line

    def _take(self, line: bytes) -> SseEvent | None:
        if self._is_first:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._is_first = False
        if not line:
            return self._dispatch()
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data_bytes += len(value)
            if self._data_bytes > self._max_bytes:
                raise _too_large(self._max_bytes)
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode("utf-8", "replace")
        return None

    def _dispatch(self) -> SseEvent | None:
        event = SseEvent(b"\n".join(self._data), self._name) if self._data else None
        self._name, self._data, self._data_bytes = "", [], 0
        return event


def _keep(rest: bytearray, data: bytes, max_bytes: int) -> None:
    if len(rest) + len(data) > max_bytes:
        raise _too_large(max_bytes)
    rest += data


def _too_large(max_bytes: int) -> CorralError:
    return CorralError("too_large", f"one frame of the stream is larger than {max_bytes} bytes")
