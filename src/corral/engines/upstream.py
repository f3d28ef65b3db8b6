"""Models that other servers run: any server that speaks OpenAI's API (vLLM, llama-server, LiteLLM, a provider).

Two ways in. A Runner translates a call of ours, for requests in another dialect than OpenAI's. The relay passes a request on byte
by byte and parses nothing. Either way the only things of a caller's request that travel are in the body: addresses and keys are
the operator's.
"""

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import msgspec

from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, LoadOptions
from corral.core.records import Model
from corral.engines.decode import AnswerDecoder, ChatDecoder, error_text
from corral.engines.http1 import Answer, BrokenAnswer, Place, Pool
from corral.wire.errors import CorralError, shutting_down
from corral.wire.secrets import Secret

_CONNECT_S, _SILENCE_S = 10.0, 600.0
#: Below what common servers wait before they close an idle connection: reusing one that is being closed fails a request for
#: nothing.
_KEEP_ALIVE_S = 4.0
_MAX_CONNECTIONS = 1000
#: Addresses that are remembered with what is sent there.
_MAX_PLACES = 1000
#: Bytes are passed on as they are, so they must not come packed in a way the caller did not ask for.
_HEADERS = {"Content-Type": "application/json", "Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "corral"}
_ERROR_BYTES, _ANSWER_BYTES = 64 * 1024, 64 * 1024 * 1024
_MAX_TOKENS_NAME = "max_tokens"
_SECONDS = re.compile(r"[0-9]{1,5}")
#: llama.cpp's names -> OpenAI's, with the value that says nothing and is left out: providers refuse members they do not know, and
#: some refuse known ones at their default.
_SAMPLING: Mapping[str, tuple[str, object]] = {
    "temperature": ("temperature", None),
    "top_p": ("top_p", None),
    "presence_penalty": ("presence_penalty", 0.0),
    "frequency_penalty": ("frequency_penalty", 0.0),
    "seed": ("seed", -1),
    "stop": ("stop", []),
    "n_predict": (_MAX_TOKENS_NAME, -1),
    "logprobs": ("logprobs", False),
    "top_logprobs": ("top_logprobs", 0),
    "tool_choice": ("tool_choice", None),
    "parallel_tool_calls": ("parallel_tool_calls", None),
}

_encoder = msgspec.json.Encoder()


class _Embedding(msgspec.Struct, gc=False):
    embedding: list[float]
    index: int = 0


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    usage: _Usage | None = None


_embeddings = msgspec.json.Decoder(_Embeddings)


class UpstreamEngine:
    """An Engine and an UpstreamRelay. key_of: the API key that a base URL, without trailing slash, wants to hear; asked for every
    request. Whoever makes it closes it; needs a running event loop."""

    def __init__(self, *, key_of: Callable[[str], Secret | None] = lambda _: None) -> None:
        self._key_of = key_of
        self._places: dict[str, tuple[Secret | None, Place]] = {}
        self._pool = Pool(max_connections=_MAX_CONNECTIONS, connect_s=_CONNECT_S, silence_s=_SILENCE_S, idle_s=_KEEP_ALIVE_S)

    async def load(self, model: Model, options: LoadOptions) -> "UpstreamRunner":
        """A runner for a stub; nothing is loaded. Raises: invalid for an address that is none."""
        _check_address(model.remote_host)
        return UpstreamRunner(self, model.remote_host, model.remote_model)

    async def open_stream(self, base_url: str, path: str, body: bytes) -> "UpstreamStream":
        """See UpstreamRelay."""
        if self._pool.is_closed:
            raise shutting_down()
        try:
            place = self._place(base_url, self._key_of(base_url))
            return UpstreamStream(self._pool, place, await self._pool.post(place, path, body))
        except (OSError, ValueError) as error:
            raise _unreachable() from error

    def _place(self, base_url: str, key: Secret | None) -> Place:
        """Raises: ValueError."""
        known = self._places.get(base_url)
        if known is not None and known[0] == key:
            return known[1]
        if len(self._places) >= _MAX_PLACES:
            self._places.clear()
        place = Place(base_url, _HEADERS | ({"Authorization": f"Bearer {key.reveal()}"} if key else {}))
        self._places[base_url] = key, place
        return place

    async def close(self) -> None:
        """End every connection."""
        self._pool.close()


class UpstreamStream:
    """A HubStream: an upstream's answer that is still arriving."""

    def __init__(self, pool: Pool, place: Place, answer: Answer) -> None:
        self._pool = pool
        self._place = place
        self._answer = answer

    @property
    def status(self) -> int:
        """Of the answer."""
        return self._answer.status

    @property
    def headers(self) -> Sequence[tuple[str, str]]:
        """As received; lower-case names."""
        return self._answer.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises: upstream_failed when it ends too early."""
        while data := await self._next():
            yield data

    async def read(self, limit_bytes: int) -> bytes:
        """The body, cut off at the limit. Raises: upstream_failed."""
        body = await self._next()
        if not self._answer.is_read:
            whole = bytearray(body)
            while len(whole) < limit_bytes and (data := await self._next()):
                whole += data
            body = bytes(whole)
        return body[:limit_bytes]

    async def _next(self) -> bytes:
        try:
            return await self._answer.next()
        except BrokenAnswer as error:
            raise CorralError("upstream_failed", "the upstream broke off its answer") from error

    async def close(self) -> None:
        """Give the connection back, or end it when the body was not read to its end. Safe to call twice."""
        self._pool.release(self._place, self._answer)


class UpstreamRunner:
    """A Runner whose model is somewhere else."""

    def __init__(self, engine: UpstreamEngine, base_url: str, model: str) -> None:
        self._engine = engine
        self._base_url = base_url
        self._model = model

    def chat(self, call: ChatCall) -> AsyncIterator[Chunk | Finish]:
        """See Runner.chat. Raises: upstream_failed in place of engine_failed; rate_limited."""
        body: dict[str, Any] = {"messages": list(call.messages), **_sampling(call.sampling.values)}
        if call.tools:
            body["tools"] = list(call.tools)
        if call.response_format is not None:
            body["response_format"] = call.response_format
        if call.template_kwargs:
            body["chat_template_kwargs"] = call.template_kwargs
        return self._answer("/v1/chat/completions", body)

    def complete(self, call: CompletionCall) -> AsyncIterator[Chunk | Finish]:
        """See Runner.complete. Raises: not_supported for what OpenAI's API cannot express."""
        if call.context or call.grammar_schema is not None:
            raise CorralError("not_supported", "this model runs at an upstream, which takes neither a context nor a schema here")
        suffix = {"suffix": call.suffix} if call.suffix else {}
        return self._answer("/v1/completions", {"prompt": call.prompt, **suffix, **_sampling(call.sampling.values)})

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """See Runner.embed."""
        async with self._posted("/v1/embeddings", {"input": list(texts)}) as answer:
            body = await answer.read(_ANSWER_BYTES)
        try:
            found = _embeddings.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CorralError("upstream_failed", "the upstream's answer is not understood") from error
        if len(found.data) != len(texts):
            raise CorralError("upstream_failed", f"the upstream gave {len(found.data)} vectors for {len(texts)} texts")
        vectors = [item.embedding for item in sorted(found.data, key=lambda item: item.index)]
        return vectors, found.usage.prompt_tokens if found.usage else 0

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Not possible. Raises: not_supported."""
        raise CorralError("not_supported", "this model runs at an upstream, which does not tell its tokens")

    async def apply_template(self, call: ChatCall) -> str:
        """Not possible. Raises: not_supported."""
        raise CorralError("not_supported", "this model runs at an upstream, which does not tell its template")

    async def is_healthy(self) -> bool:
        """Taken for granted: each request finds out for itself."""
        return True

    async def close(self) -> None:
        """Nothing to end."""

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """None of ours."""
        return 0, 0

    async def _answer(self, path: str, body: dict[str, Any]) -> AsyncIterator[Chunk | Finish]:
        decoder: AnswerDecoder = ChatDecoder("upstream_failed")
        async with self._posted(path, {**body, "stream": True, "stream_options": {"include_usage": True}}) as answer:
            async for data in answer.chunks():
                for chunk in decoder.feed(data):
                    yield chunk
        end = decoder.finish()
        if end is None:
            raise CorralError("upstream_failed", "the upstream broke off its answer")
        for item in end:
            yield item

    @asynccontextmanager
    async def _posted(self, path: str, body: dict[str, Any]) -> AsyncIterator[UpstreamStream]:
        answer = await self._engine.open_stream(self._base_url, path, _encoder.encode({"model": self._model, **body}))
        try:
            if answer.status != 200:
                raise _refusal(answer.status, dict(answer.headers), await answer.read(_ERROR_BYTES))
            yield answer
        finally:
            await answer.close()


def _check_address(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        is_good = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.username or parts.query or parts.fragment)
        )
        is_good = is_good and (parts.port is None or parts.port > 0)
    except ValueError:
        is_good = False
    if not is_good:
        raise CorralError("invalid", "the address of this model's upstream is none; its operator has to offer the model again")


def _sampling(values: Mapping[str, object]) -> dict[str, object]:
    named = ((_SAMPLING[name], value) for name, value in values.items() if name in _SAMPLING)
    return {name: value for (name, empty), value in named if value is not None and value != empty}


def _unreachable() -> CorralError:
    return CorralError("upstream_failed", "the upstream server could not be reached")


def _refusal(status: int, headers: Mapping[str, str], body: bytes) -> CorralError:
    if status == 429:
        after = headers.get("retry-after", "")
        seconds = int(after) if _SECONDS.fullmatch(after) else None
        return CorralError("rate_limited", "the upstream has had too many requests; try again later", retry_after_s=seconds)
    if status in (400, 413, 422):
        return CorralError("bad_request", error_text(body) or None, status=status)
    if status in (401, 403):
        return CorralError("upstream_failed", "the upstream refused this hub's credentials; its operator has to look at them")
    return CorralError("upstream_failed", f"the upstream answered with status {status}")
