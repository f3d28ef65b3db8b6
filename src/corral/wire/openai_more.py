"""OpenAI's older completions and its embeddings ⇄ native: requests, answers, and the chunks of a stream.

Source: ollama openai/openai.go and middleware/openai.go, fb30760.
"""

import base64
import struct
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from corral.wire.errors import CorralError
from corral.wire.frames import SSE_DONE, encode_sse
from corral.wire.gojson import go_type_of
from corral.wire.native import EmbedRequest, EmbedResponse, GenerateRequest, GenerateResponse, unix_seconds
from corral.wire.openai import FINGERPRINT, StreamOptions, Usage, usage_numbers

# ── Completions ──────────────────────────────────────────────────────────────────────────────────────────────────────


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/completions: the fields that mean something here."""

    go_name: ClassVar[str] = "openai.CompletionRequest"

    model: str
    prompt: Any = ""
    suffix: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int = 0

    @property
    def includes_usage(self) -> bool:
        """Whether a stream's chunks shall count tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class NativeCompletion(GenerateRequest, frozen=True, kw_only=True):
    """A generation that came in by the OpenAI route, which usage entries name."""

    path: ClassVar[str] = "/v1/completions"


def to_native_completion(request: CompletionRequest) -> NativeCompletion:
    """The same request for the native service. Raises: bad_request with Ollama's texts."""
    options: dict[str, Any] = {
        "num_predict": request.max_tokens,
        "seed": request.seed,
        "stop": _stops(request.stop),
        # OpenAI's defaults, not the model's: clients of this dialect expect them.
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": request.top_p or 1.0,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
    }
    return NativeCompletion(
        model=request.model,
        prompt=_prompt(request.prompt),
        suffix=request.suffix,
        stream=request.stream,
        options={name: value for name, value in options.items() if value is not None},
        logprobs=request.logprobs > 0,
        top_logprobs=max(request.logprobs, 0),
    )


def _prompt(prompt: Any) -> str:
    """One text. Several would be several answers in one, and token numbers are those of another model's vocabulary."""
    match prompt:
        case str() as text:
            return text
        case [str() as text]:
            return text
    raise CorralError("bad_request", "prompt must be one text; send a request for each of several, and text instead of tokens")


def _stops(stop: Any) -> list[str] | None:
    match stop:
        case str() as text:
            return [text]
        case list() as texts:
            for text in texts:
                if not isinstance(text, str):
                    raise CorralError("bad_request", f"invalid type for 'stop' field: {go_type_of(text)}")
            return texts
    return None


class _Choice(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    index: int = 0
    finish_reason: str | None


class _Chunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: str
    object: str
    created: int
    choices: list[_Choice]
    model: str
    system_fingerprint: str
    usage: Usage | None = None


def completion(completion_id: str, response: GenerateResponse) -> dict[str, Any]:
    """The whole answer of an unstreamed request. completion_id: `cmpl-…`."""
    return {
        "id": completion_id,
        "object": "text_completion",
        "created": unix_seconds(response.created_at),
        "model": response.model,
        "system_fingerprint": FINGERPRINT,
        "choices": [_Choice(text=response.response, finish_reason=response.done_reason or None)],
        "usage": usage_numbers(response),
    }


_NO_USAGE = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)


class CompletionStream:
    """Turns the events of one generation into SSE frames. completion_id: `cmpl-…`, the same in every chunk."""

    def __init__(self, completion_id: str, *, includes_usage: bool) -> None:
        self._id = completion_id
        self._includes_usage = includes_usage
        self._created: int | None = None

    def encode(self, response: GenerateResponse) -> bytes:
        """The frame of one event; of the last one also the usage when asked for, and `[DONE]`. Thinking has no place here, but
        its events are sent, without text, so that nobody gives up waiting."""
        if self._created is None:
            self._created = unix_seconds(response.created_at)
        choice = _Choice(text=response.response, finish_reason=response.done_reason or None)
        frames = [self._chunk(response.model, [choice], _NO_USAGE if self._includes_usage else None)]
        if response.done and self._includes_usage:
            frames.append(self._chunk(response.model, [], usage_numbers(response)))
        return b"".join([*map(encode_sse, frames), SSE_DONE if response.done else b""])

    def _chunk(self, model: str, choices: list[_Choice], usage: Usage | None) -> _Chunk:
        assert self._created is not None
        return _Chunk(
            id=self._id,
            object="text_completion",
            created=self._created,
            choices=choices,
            model=model,
            system_fingerprint=FINGERPRINT,
            usage=usage,
        )


# ── Embeddings ───────────────────────────────────────────────────────────────────────────────────────────────────────


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/embeddings. input: text or texts."""

    go_name: ClassVar[str] = "openai.EmbedRequest"

    model: str
    input: Any = None
    dimensions: int = 0
    encoding_format: str = ""

    @property
    def is_base64(self) -> bool:
        """Whether vectors shall be bytes in base64 instead of numbers."""
        return self.encoding_format.lower() == "base64"


class NativeEmbedding(EmbedRequest, frozen=True, kw_only=True):
    """Texts to embed that came in by the OpenAI route."""

    path: ClassVar[str] = "/v1/embeddings"


def to_native_embedding(request: EmbeddingRequest) -> NativeEmbedding:
    """The same request for the native service. Raises: bad_request with Ollama's texts."""
    if request.encoding_format and request.encoding_format.lower() not in ("float", "base64"):
        shown = request.encoding_format[:100]
        raise CorralError("bad_request", f"Invalid value for 'encoding_format' = {shown}. Supported values: ['float', 'base64'].")
    if request.input is None or request.input == []:
        raise CorralError("bad_request", "invalid input")
    # Nothing is a text here as well; to the native route it would mean that the model is to be loaded only.
    texts = [""] if request.input == "" else request.input
    return NativeEmbedding(model=request.model, input=texts, dimensions=request.dimensions)


class _Embedding(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "embedding"
    embedding: list[float] | str
    index: int


def embedding_list(response: EmbedResponse, *, is_base64: bool) -> dict[str, Any]:
    """The vectors of a request's texts, in their order."""
    vectors = [_packed(vector) if is_base64 else vector for vector in response.embeddings]
    tokens = response.prompt_eval_count
    return {
        "object": "list",
        "data": [_Embedding(embedding=vector, index=index) for index, vector in enumerate(vectors)],
        "model": response.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _packed(vector: Sequence[float]) -> str:
    """32-bit floats, lowest byte first."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
