"""The client side of llama.cpp's HTTP API, as its llama-server and xllamacpp's embedded server speak it.

Source: llama.cpp tools/server/README.md.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import msgspec

from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish
from corral.engines.decode import AnswerDecoder, ChatDecoder, CompletionDecoder, error_text
from corral.engines.http1 import Answer, Place, posted
from corral.engines.machine import exhausted, is_exhausted
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret

T = TypeVar("T")

#: llama.cpp sends a comment every 30 s while it reads a long prompt; silence for so long means that it hangs.
_STREAM_SILENCE_S = 1800.0
_UNARY_S = 3600.0
_HEALTH_S, _FRESH_S = 10.0, 5.0
#: How long a prompt may take to be made of a chat. Usual are milliseconds; to be read by the model it may take far longer.
_TEMPLATE_S = 60.0
_ERROR_BYTES = 64 * 1024
_ANSWER_BYTES = 256 * 1024 * 1024

#: By what llama.cpp knew the place of a file in a prompt before it drew markers at random.
_OLD_MEDIA_MARKER = "<__media__>"

_NUMBER, _TEXTS = (int, float), (list,)
#: Sampling options that are handed on, with the types they may have. A name that is not here reaches no engine: a negative
#: `n_discard` once made llama.cpp write outside its memory (CVE-2026-21869).
_SAMPLING: Mapping[str, tuple[type, ...]] = {
    "temperature": _NUMBER,
    "top_k": (int,),
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "typical_p": _NUMBER,
    "repeat_last_n": (int,),
    "repeat_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "seed": (int,),
    "stop": _TEXTS,
    "n_predict": (int,),
    "n_keep": (int,),
    "n_probs": (int,),
    "logprobs": (bool,),
    "top_logprobs": (int,),
    "ignore_eos": (bool,),
    "cache_prompt": (bool,),
    "tool_choice": (str,),
    "parallel_tool_calls": (bool,),
}
_MAX_STOPS, _MAX_STOP_CHARACTERS = 256, 4096
#: Ollama's words for an engine that is gone, before it answered and while it did.
_NO_ANSWER = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error"
_BROKEN_OFF = "an error was encountered while running the model"

_encoder = msgspec.json.Encoder()


class _Embedding(msgspec.Struct, gc=False):
    index: int
    embedding: list[float]


class _EmbeddingUsage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    usage: _EmbeddingUsage = msgspec.field(default_factory=_EmbeddingUsage)


class _Tokens(msgspec.Struct, gc=False):
    tokens: list[int]


class _Prompt(msgspec.Struct, gc=False):
    prompt: str


class _Properties(msgspec.Struct, gc=False):
    media_marker: str = ""


_embeddings = msgspec.json.Decoder(_Embeddings)
_tokens = msgspec.json.Decoder(_Tokens)
_prompts = msgspec.json.Decoder(_Prompt)
_properties = msgspec.json.Decoder(_Properties)


class LlamaHttp:
    """Calls to one server. url: `http://127.0.0.1:PORT`. explain: asked what became of the server when it stops answering: the
    code and the words to say it with. stop: ends the server, whatever it is doing. template_s: see `apply_template`.

    Iterators are returned as they are, not wrapped in a second generator: closing the outer one would leave the inner one, and
    its connection, to the garbage collector.
    """

    def __init__(
        self,
        url: str,
        key: Secret,
        explain: Callable[[], Awaitable[CorralError]],
        *,
        stop: Callable[[], Awaitable[None]],
        template_s: float = _TEMPLATE_S,
    ) -> None:
        # It ends the connection behind every stream, whatever we ask for.
        headers = {"Connection": "close", "Authorization": f"Bearer {key.reveal()}", "Content-Type": "application/json"}
        self._server = Place(url, headers)
        self._explain = explain
        self._stop = stop
        self._template_s = template_s
        self._trials: set[asyncio.Task[None]] = set()
        self._answered_at_s: float | None = None

    def chat(self, call: ChatCall) -> AsyncIterator[Chunk | Finish]:
        """See Runner.chat."""
        body = {**chat_body(call), "stream": True, "stream_options": {"include_usage": True}}
        return self._answer("/v1/chat/completions", body, ChatDecoder(), chat=call)

    def complete(self, call: CompletionCall) -> AsyncIterator[Chunk | Finish]:
        """See Runner.complete."""
        body: dict[str, Any] = {
            **sampling_body(call.sampling.values),
            "stream": True,
            # Without this the last event repeats the prompt and every setting.
            "response_fields": ["content", "stop", "stop_type", "timings", "completion_probabilities"],
        }
        if call.grammar_schema is not None:
            body["json_schema"] = call.grammar_schema
        if call.preserved_tokens:
            body["preserved_tokens"] = list(call.preserved_tokens)
        if call.suffix:
            between = {"input_prefix": call.prompt, "input_suffix": call.suffix, "input_extra": [], "prompt": ""}
            return self._answer("/infill", body | between, CompletionDecoder())
        # llama.cpp takes tokens and text mixed in one list.
        prompt = [*call.context, call.prompt] if call.context else call.prompt
        return self._answer("/completion", body | {"prompt": prompt}, CompletionDecoder(), media=call.media)

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """See Runner.embed."""
        found = _understood(_embeddings, await self._unary("/v1/embeddings", {"input": list(texts)}))
        vectors = [item.embedding for item in sorted(found.data, key=lambda item: item.index)]
        if len(vectors) != len(texts):
            raise CorralError("engine_failed", f"the engine gave {len(vectors)} vectors for {len(texts)} texts")
        return vectors, found.usage.prompt_tokens

    async def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """See Runner.tokenize."""
        body = {"content": text, "add_special": add_special}
        return _understood(_tokens, await self._unary("/tokenize", body)).tokens

    async def apply_template(self, call: ChatCall) -> str:
        """See Runner.apply_template. A server that does not get through is stopped, whoever else it works for: the template came
        with the weights, and one without an end takes all memory there is, in a thread that no hanging up ends (T107)."""
        try:
            async with asyncio.timeout(self._template_s):
                body = await self._unary("/apply-template", chat_body(call))
        except TimeoutError as error:
            await self._stop()
            raise await self._lost(_NO_ANSWER) from error
        return _understood(_prompts, body).prompt

    async def is_healthy(self) -> bool:
        """Whether it answers and its model is loaded; taken for granted for a few seconds after a good answer, since this is
        asked before every request."""
        if self._answered_at_s is not None and asyncio.get_running_loop().time() - self._answered_at_s < _FRESH_S:
            return True
        try:
            async with asyncio.timeout(_HEALTH_S), posted(self._server, "/health", None, silence_s=_HEALTH_S) as answer:
                return answer.status == 200
        except OSError as error:  # TimeoutError is one
            # Nothing is known then; to call a runner dead would end the answers that it is giving.
            return is_exhausted(error)

    async def _answer(
        self,
        path: str,
        body: dict[str, Any],
        decoder: AnswerDecoder,
        *,
        chat: ChatCall | None = None,
        media: Sequence[bytes] = (),
    ) -> AsyncIterator[Chunk | Finish]:
        if media:
            body["prompt"] = await self._with_media(body["prompt"], media)
        with self._watched(chat) if chat else nullcontext(_nothing) as begun:
            async with self._posted(path, body, silence_s=_STREAM_SILENCE_S) as answer:
                begun()
                while data := await answer.next():
                    for chunk in decoder.feed(data):
                        yield chunk
                end = decoder.finish()
                if end is None:
                    raise await self._lost(_BROKEN_OFF)
        for item in end:
            yield item

    @contextmanager
    def _watched(self, call: ChatCall) -> Iterator[Callable[[], None]]:
        """Gives what is to be called when the answer begins. If it does not for long, the server may be busy, or its template
        without an end for these messages; then it is asked for the prompt alone. So it is if the caller has left meanwhile, since
        the server would go on."""
        timer = asyncio.get_running_loop().call_later(self._template_s, self._begin_trial, call)
        try:
            yield timer.cancel
        except CorralError:
            timer.cancel()
            raise

    def _begin_trial(self, call: ChatCall) -> None:
        task = asyncio.create_task(self._try_template(call))
        self._trials.add(task)
        task.add_done_callback(self._trials.discard)

    async def _try_template(self, call: ChatCall) -> None:
        with suppress(CorralError):
            await self.apply_template(call)

    async def _with_media(self, prompt: object, media: Sequence[bytes]) -> dict[str, object]:
        """A prompt whose places for media have the server's own marker. It is drawn at random, so that nobody writes it by chance
        or on purpose. Raises: not_supported after tokens, which are not text that could hold a marker."""
        if not isinstance(prompt, str):
            raise CorralError("not_supported", "pictures cannot follow a context; send the conversation to /api/chat")
        marker = await self._media_marker()
        for number in range(len(media)):
            # Only the first: what a person writes later is text like any other.
            prompt = prompt.replace(f"[img-{number}]", marker, 1)
        return {"prompt_string": prompt, "multimodal_data": [base64.b64encode(data).decode() for data in media]}

    async def _media_marker(self) -> str:
        async with self._posted("/props", None, silence_s=_HEALTH_S) as answer:
            found = _understood(_properties, await answer.read(_ANSWER_BYTES))
        return found.media_marker or _OLD_MEDIA_MARKER

    async def _unary(self, path: str, body: dict[str, Any]) -> bytes:
        async with self._posted(path, body, silence_s=_UNARY_S) as answer:
            return await answer.read(_ANSWER_BYTES)

    @asynccontextmanager
    async def _posted(self, path: str, body: dict[str, Any] | None, *, silence_s: float) -> AsyncIterator[Answer]:
        """A good answer, whose connection ends with the block: that is what stops llama.cpp's generation."""
        words = _NO_ANSWER
        content = None if body is None else _encoder.encode(body)
        try:
            async with posted(self._server, path, content, silence_s=silence_s) as answer:
                if answer.status != 200:
                    raise _refusal(answer.status, await answer.read(_ERROR_BYTES))
                words = _BROKEN_OFF
                yield answer
                self._answered_at_s = asyncio.get_running_loop().time()
        except OSError as error:
            if is_exhausted(error):
                raise exhausted() from error
            self._answered_at_s = None
            raise await self._lost(words) from error

    async def _lost(self, words: str) -> CorralError:
        reason = await self._explain()
        return CorralError(reason.code, f"{words}: {reason.message}")


def _nothing() -> None:
    pass


def chat_body(call: ChatCall) -> dict[str, Any]:
    """What `/v1/chat/completions` and `/apply-template` take, without the wish to stream."""
    body: dict[str, Any] = {**sampling_body(call.sampling.values), "messages": list(call.messages)}
    if call.tools:
        body["tools"] = list(call.tools)
    if call.response_format is not None:
        body["response_format"] = call.response_format
    if call.template_kwargs:
        body["chat_template_kwargs"] = call.template_kwargs
    return body


def sampling_body(values: Mapping[str, object]) -> dict[str, object]:
    """The options that are known, rebuilt. Unknown ones and nulls are left out. Raises: bad_request for a wrong type."""
    body = {}
    for name, value in values.items():
        if name not in _SAMPLING or value is None:
            continue
        is_wrong_bool = isinstance(value, bool) and bool not in _SAMPLING[name]
        if is_wrong_bool or not isinstance(value, _SAMPLING[name]) or not _is_sane(value):
            raise CorralError("bad_request", f'option "{name}" has a value that cannot be used')
        body[name] = value
    return body


def _is_sane(value: object) -> bool:
    """Numbers that JSON and llama.cpp's 32-bit integers and floats can hold; not too many, not too long stop texts."""
    match value:
        case float():
            return abs(value) < 3.4e38  # false for NaN as well
        case int():
            return -(2**31) <= value < 2**32
        case list():
            return len(value) <= _MAX_STOPS and all(isinstance(item, str) and len(item) <= _MAX_STOP_CHARACTERS for item in value)
        case _:
            return True


def _refusal(status: int, body: bytes) -> CorralError:
    if status < 400 or status in (401, 403, 404, 405):
        # About our own call, not about what the caller asked for; passed on, a 401 would tell them to sign in.
        return CorralError("engine_failed", "the engine did not accept our call")
    if status == 503:
        return CorralError("unavailable", error_text(body) or None, retry_after_s=1)
    return CorralError("bad_request", error_text(body) or f"the engine answered with status {status}", status=status)


def _understood(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorralError("engine_failed", "the engine's answer is not understood") from error
