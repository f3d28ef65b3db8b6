"""Stand-ins for engines, runners and upstreams: they answer what a test tells them to, and remember what they were asked."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, LoadOptions, Timings
from corral.core.records import Account, Capability, HostedModel, Model, ModelDetails, Principal, Proof, Scope
from corral.wire.errors import CorralError
from corral.wire.names import Digest, parse_name
from corral.wire.options import Options
from fakes import NOON, FakeClock
from fakes_models import MemoryHosting

#: What a scripted answer may hold. A float lets so many seconds of the fake clock pass.
Step = Chunk | Finish | Exception | float
TIMINGS = Timings(prompt_tokens=11, prompt_ns=70_000_000, eval_tokens=9, eval_ns=300_000_000)
STOP = Finish(reason="stop", timings=TIMINGS)
CONTEXT = 100


class FakeRunner:
    """A Runner whose tokens are words. answer: the events of every call. context_length: prompts of so many words and more are
    refused, as llama.cpp does."""

    def __init__(self, *answer: Step, clock: FakeClock | None = None, context_length: int = 0) -> None:
        self.answer = answer or (Chunk(content="Hel"), Chunk(content="lo"), STOP)
        self.calls: list[ChatCall | CompletionCall] = []
        self.embedded: list[list[str]] = []
        self.vector: list[float] = [3.0, 4.0]
        self.open_answers = 0
        self.is_closed = False
        #: Set when an answer that waits for `go_on` was reached, for tests of interruption.
        self.waits = asyncio.Event()
        self.go_on: asyncio.Event | None = None
        self._clock = clock
        self._context_length = context_length

    def chat(self, call: ChatCall) -> AsyncIterator[Chunk | Finish]:
        return self._answer(call, _rendered(call))

    def complete(self, call: CompletionCall) -> AsyncIterator[Chunk | Finish]:
        return self._answer(call, call.prompt)

    async def _answer(self, call: ChatCall | CompletionCall, prompt: str) -> AsyncIterator[Chunk | Finish]:
        self.calls.append(call)
        self._check(prompt)
        self.open_answers += 1
        try:
            for step in self.answer:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    assert self._clock is not None
                    self._clock.advance(step)
                else:
                    yield step
            if self.go_on is not None:
                self.waits.set()
                await self.go_on.wait()
        finally:
            self.open_answers -= 1

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        self.embedded.append(list(texts))
        for text in texts:
            self._check(text)
        return [list(self.vector) for _ in texts], sum(len(text.split()) for text in texts)

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        return [len(word) for word in text.split()]

    async def apply_template(self, call: ChatCall) -> str:
        return _rendered(call)

    async def is_healthy(self) -> bool:
        return not self.is_closed

    async def close(self) -> None:
        self.is_closed = True

    @property
    def memory_bytes(self) -> tuple[int, int]:
        return 0, 0

    def _check(self, prompt: str) -> None:
        if self._context_length and len(prompt.split()) >= self._context_length:
            raise CorralError("bad_request", "the request exceeds the available context size")


def _rendered(call: ChatCall) -> str:
    return " ".join(f"{message['role']}: {_text_of(message['content'])}" for message in call.messages)


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


@dataclass(frozen=True)
class FakeSlot:
    """A Slot."""

    runner: FakeRunner
    load_ns: int = 41_234_567
    context_length: int = CONTEXT


@dataclass
class FakePool:
    """A RunnerPool with one runner. used: what was asked for, each time. lent: slots that are out now."""

    runner: FakeRunner = field(default_factory=FakeRunner)
    context_length: int = CONTEXT
    fails: CorralError | None = None
    used: list[dict[str, Any]] = field(default_factory=list)
    unloaded: list[Model] = field(default_factory=list)
    lent: int = 0

    @asynccontextmanager
    async def use(
        self,
        model: Model,
        *,
        options: Options | None = None,
        keep_alive_s: float | None = None,
        embedding: bool = False,
    ) -> AsyncIterator[FakeSlot]:
        self.used.append(
            {"model": model, "options": options and options.load, "keep_alive_s": keep_alive_s, "embedding": embedding}
        )
        if self.fails is not None:
            raise self.fails
        self.lent += 1
        try:
            yield FakeSlot(self.runner, context_length=self.context_length)
        finally:
            self.lent -= 1

    async def unload(self, model: Model) -> None:
        self.unloaded.append(model)


class FakeUpstreams:
    """An Engine whose models are elsewhere. loaded: the stubs it was asked for."""

    def __init__(self, runner: FakeRunner | None = None) -> None:
        self.runner = runner or FakeRunner()
        self.loaded: list[Model] = []

    async def load(self, model: Model, options: LoadOptions) -> FakeRunner:
        self.loaded.append(model)
        return self.runner


class FakeStream:
    """A HubStream. parts: of the body; an exception among them is raised in its place."""

    def __init__(
        self, *parts: bytes | Exception, status: int = 200, content_type: str = "text/event-stream", **headers: str
    ) -> None:
        self.status = status
        self.headers = [("content-type", content_type), *((name.replace("_", "-"), value) for name, value in headers.items())]
        self.is_closed = False
        self._parts = parts

    async def chunks(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            yield part

    async def read(self, limit_bytes: int) -> bytes:
        return b"".join([part async for part in self.chunks()])[:limit_bytes]

    async def close(self) -> None:
        self.is_closed = True


class FakeRelay:
    """An UpstreamRelay that gives one answer. sent: (base URL, path, body) of each request."""

    def __init__(self, answer: FakeStream | CorralError) -> None:
        self.answer = answer
        self.sent: list[tuple[str, str, bytes]] = []

    async def open_stream(self, base_url: str, path: str, body: bytes) -> FakeStream:
        self.sent.append((base_url, path, body))
        if isinstance(self.answer, CorralError):
            raise self.answer
        return self.answer


def a_model(name: str = "m", **fields: Any) -> Model:
    """A model that can chat."""
    facts: dict[str, Any] = {
        "name": parse_name(name),
        "digest": Digest("ab" * 32),
        "size_bytes": 5,
        "modified_at": NOON,
        "details": ModelDetails(format="gguf", family="llama"),
        "capabilities": frozenset({Capability.COMPLETION}),
        "weights": "/models/m.gguf",
        "chat_template": "{{ messages }}",
    }
    return Model(**(facts | fields))


def a_hosted(name: str = "m", **fields: Any) -> HostedModel:
    """A hosted model with weights, unless an upstream is given."""
    model = None if "upstream_url" in fields else a_model(name)
    return HostedModel(**({"name": parse_name(name).short, "model": model, "created_at": NOON} | fields))


def a_caller(name: str = "ada", *, is_admin: bool = False, credential_id: str = "k1") -> Principal:
    """Somebody with an API key for inference."""
    account = Account(id=f"id-{name}", name=name, email="", is_admin=is_admin, created_at=NOON)
    return Principal(account=account, proof=Proof.API_KEY, credential_id=credential_id, scopes=frozenset({Scope.INFERENCE}))


async def a_hosting(*offered: HostedModel) -> MemoryHosting:
    """A store that offers these models."""
    store = MemoryHosting(*(hosted.model for hosted in offered if hosted.model is not None))
    for hosted in offered:
        await store.offer(hosted)
    return store
