"""An engine that runs no model: its answers come from its construction, so tests and benches see the same every time.

It keeps the Engine contract as the real one does (tests/contracts/test_engine.py runs on both): contexts overflow, answers are
cut at n_predict, runners can be made to die.
"""

from collections.abc import AsyncIterator, Collection, Sequence
from hashlib import sha256
from typing import Any

from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, LoadOptions, Sampling, Timings
from corral.core.records import Model
from corral.wire.errors import CorralError

_NS_PER_TOKEN = 1_000_000
_START_TOKEN = 1
_BYTES_PER_TOKEN = 1024
_DIMENSIONS = 8

Piece = str | Chunk


class ScriptedEngine:
    """An Engine. pieces: the answer to everything, one token each. unreadable: paths of weights that are refused as no GGUF.
    has_markers: whether its models fill in the middle. runners: all that were loaded, in order, also those that have ended."""

    def __init__(
        self,
        pieces: Sequence[Piece] = ("Hello", ",", " world", "!"),
        *,
        unreadable: Collection[str] = (),
        has_markers: bool = True,
    ) -> None:
        self.runners: list[ScriptedRunner] = []
        self.pieces = pieces
        self.has_markers = has_markers
        self._unreadable = unreadable

    async def load(self, model: Model, options: LoadOptions) -> "ScriptedRunner":
        """See Engine.load."""
        if model.weights is None or model.weights in self._unreadable:
            raise CorralError("bad_request", f"the weights of {model.name.short} are not a GGUF file")
        runner = ScriptedRunner(self, model, options)
        self.runners.append(runner)
        return runner


class ScriptedRunner:
    """A Runner. active: generations under way."""

    def __init__(self, engine: ScriptedEngine, model: Model, options: LoadOptions) -> None:
        self._engine = engine
        self.model = model
        self.options = options
        self.active = 0
        self.is_closed = False
        self._has_died = False

    def die(self) -> None:
        """End as a process that was killed does."""
        self._has_died = True

    def chat(self, call: ChatCall) -> AsyncIterator[Chunk | Finish]:
        """See Runner.chat."""
        return self._answer(_templated(call), call.sampling)

    def complete(self, call: CompletionCall) -> AsyncIterator[Chunk | Finish]:
        """See Runner.complete."""
        if call.suffix and not self._engine.has_markers:
            raise CorralError("bad_request", "infill is not supported by this model", status=501)
        return self._answer(call.prompt + call.suffix, call.sampling, before=len(call.context))

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """See Runner.embed. Equal texts have equal vectors."""
        self._check_alive()
        if not self.options.embedding:
            raise CorralError("bad_request", "this runner was not loaded for embeddings", status=501)
        counts = [len(_tokens(text)) for text in texts]
        if max(counts, default=0) > self.options.num_ctx:
            raise CorralError("bad_request", "input is too large to process", status=500)
        return [self._vector(text) for text in texts], sum(counts)

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """See Runner.tokenize. One token per character."""
        self._check_alive()
        return _tokens(text) if add_special else _tokens(text)[1:]

    async def apply_template(self, call: ChatCall) -> str:
        """See Runner.apply_template."""
        self._check_alive()
        return _templated(call)

    async def is_healthy(self) -> bool:
        """See Runner.is_healthy."""
        return not (self._has_died or self.is_closed)

    async def close(self) -> None:
        """See Runner.close."""
        self.is_closed = True

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """A number that grows with the model and its context."""
        return self.model.size_bytes + self.options.num_ctx * self.options.parallel * _BYTES_PER_TOKEN, 0

    async def _answer(self, prompt: str, sampling: Sampling, *, before: int = 0) -> AsyncIterator[Chunk | Finish]:
        self._check_alive()
        count = before + len(_tokens(prompt))
        if count >= self.options.num_ctx:
            raise CorralError("bad_request", f"request ({count} tokens) exceeds the available context size")
        pieces = self._engine.pieces
        limit = sampling.values.get("n_predict", -1)
        said = pieces if limit < 0 else pieces[:limit]
        wants_logprobs = bool(sampling.values.get("logprobs") or sampling.values.get("n_probs"))
        self.active += 1
        try:
            for piece in said:
                self._check_alive()
                yield (
                    piece
                    if isinstance(piece, Chunk)
                    else Chunk(content=piece, logprobs=_logprobs(piece) if wants_logprobs else ())
                )
            self._check_alive()
            yield Finish(
                reason="length" if len(said) < len(pieces) else "stop",
                timings=Timings(
                    prompt_tokens=count,
                    prompt_ns=count * _NS_PER_TOKEN,
                    eval_tokens=len(said),
                    eval_ns=len(said) * _NS_PER_TOKEN,
                ),
            )
        finally:
            self.active -= 1

    def _check_alive(self) -> None:
        if self._has_died or self.is_closed:
            raise CorralError("engine_failed", "model runner has unexpectedly stopped")

    def _vector(self, text: str) -> list[float]:
        digest = sha256(text.encode("utf-8", "replace")).digest()
        return [digest[position % len(digest)] / 255 for position in range(_DIMENSIONS)]


def _tokens(text: str) -> list[int]:
    return [_START_TOKEN, *map(ord, text)]


def _templated(call: ChatCall) -> str:
    return "".join(f"<{message.get('role')}>{message.get('content')}\n" for message in call.messages)


def _logprobs(piece: str) -> list[dict[str, Any]]:
    token = {"token": piece, "logprob": -0.5, "bytes": list(piece.encode())}
    return [{**token, "top_logprobs": [token]}]
