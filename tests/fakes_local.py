"""Stand-ins for what a local server talks to: a hub's memory, a device key, a gateway that answers as told, and a hub made of a
plain socket, so that a test sees the bytes that really travelled and may break off wherever it likes."""

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from corral.core.ports import HubCall, HubGateway, HubReply, HubTerms
from corral.core.records import Capability, Model, ModelDetails
from corral.local.cloud import CloudAccess, CloudSwitch
from corral.local.stubs import Remotes, StubModels
from corral.wire.discovery import STOCK, STRONG
from corral.wire.errors import CorralError
from corral.wire.names import Digest, ModelName, parse_name
from corral.wire.native import (
    ChatRequest,
    ChatResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    Message,
)
from corral.wire.signing import DevicePrivateKey, DevicePublicKey
from fakes import FakeClock

SEED = bytes(range(32))


class FakeDeviceKeys:
    """One key, or the refusal a damaged file gets."""

    def __init__(self, seed: bytes = SEED, *, refusal: CorralError | None = None) -> None:
        self.key = DevicePrivateKey(seed)
        self.refusal = refusal

    def load(self) -> DevicePrivateKey | None:
        return self.load_or_create()

    def load_or_create(self) -> DevicePrivateKey:
        if self.refusal:
            raise self.refusal
        return self.key


class MemoryHubs:
    """A HubMemory without a file."""

    def __init__(self, **terms: HubTerms) -> None:
        self.chosen = ""
        self.kept: dict[str, HubTerms] = dict(terms)

    def hub(self) -> str:
        return self.chosen

    def choose_hub(self, hub: str) -> None:
        self.chosen = hub

    def terms(self, hub: str) -> HubTerms | None:
        return self.kept.get(hub)

    def keep_terms(self, hub: str, terms: HubTerms) -> None:
        self.kept[hub] = terms


class MemoryModels:
    """A ModelStore of given models."""

    def __init__(self, *models: Model) -> None:
        self.models = {model.name.key: model for model in models}

    async def list(self) -> Sequence[Model]:
        return sorted(self.models.values(), key=lambda model: model.modified_at, reverse=True)

    async def get(self, name: ModelName) -> Model | None:
        return self.models.get(name.key)


# ── A gateway that answers as told ───────────────────────────────────────────────────────────────────────────────────


class FakeStream:
    """A HubStream of given pieces; an error among them is raised when its turn comes."""

    def __init__(self, status: int, headers: Sequence[tuple[str, str]], pieces: Sequence[bytes | CorralError]) -> None:
        self.status = status
        self.headers = headers
        self.pieces = pieces
        self.is_closed = False

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, CorralError):
                raise piece
            yield piece

    async def read(self, limit_bytes: int) -> bytes:
        return b"".join([piece async for piece in self.chunks()])[:limit_bytes]

    async def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeGateway:
    """A HubGateway. Calls are kept in `calls`; each takes the next of `answers`, which may be an error to raise."""

    base: str = "http://localhost:11435"
    key: DevicePublicKey = field(default_factory=lambda: DevicePrivateKey(SEED).public)
    answers: deque[FakeStream | CorralError] = field(default_factory=deque)
    calls: list[HubCall] = field(default_factory=list)

    def will_answer(
        self, status: int, *pieces: bytes | CorralError, headers: Mapping[str, str] | Iterable[tuple[str, str]] = ()
    ) -> FakeStream:
        stream = FakeStream(status, list(headers.items() if isinstance(headers, Mapping) else headers), pieces)
        self.answers.append(stream)
        return stream

    def will_fail(self, error: CorralError) -> None:
        self.answers.append(error)

    async def signin_base(self) -> str:
        return self.base

    def device_key(self) -> DevicePublicKey:
        return self.key

    async def send(self, call: HubCall) -> HubReply:
        stream = await self.open_stream(call)
        return HubReply(status=stream.status, headers=stream.headers, body=await stream.read(1024 * 1024))

    async def open_stream(self, call: HubCall) -> FakeStream:
        self.calls.append(call)
        answer = self.answers.popleft()
        if isinstance(answer, CorralError):
            raise answer
        return answer


class NoServers:
    """An UpstreamRelay that nobody may use."""

    async def open_stream(self, base_url: str, path: str, body: bytes) -> FakeStream:
        raise AssertionError(f"nobody expected a request to {base_url}{path}")


def stub_models(
    gateway: HubGateway | None = None, hub_url: str = "http://localhost:11435", *, hosts: tuple[str, ...] = (), **parts: Any
) -> StubModels:
    """Stubs at a gateway. parts: cloud, elsewhere."""
    gateway = gateway or FakeGateway()
    cloud = parts.get("cloud") or CloudAccess(gateway, CloudSwitch(False, lambda: False), device_name="box", version="0")
    elsewhere = parts.get("elsewhere") or NoServers()
    return StubModels(cloud, gateway, elsewhere, remotes=Remotes(hosts), hub_url=lambda: hub_url, clock=FakeClock())


# ── A hub on a real socket ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Received:
    """One request as its bytes arrived. headers: names in lower case, in order."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def names(self) -> Counter[str]:
        return Counter(name for name, _ in self.headers)

    def header(self, name: str) -> str:
        return next((value for given, value in self.headers if given == name), "")


class Wire:
    """The answering side of one request."""

    def __init__(self, writer: asyncio.StreamWriter, has_left: asyncio.Event) -> None:
        self._writer = writer
        #: Set when the other side closed the connection.
        self.has_left = has_left

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, status: int, body: bytes = b"", *headers: tuple[str, str]) -> None:
        """A complete answer on a connection that stays open."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        await self.send(f"HTTP/1.1 {status} X\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def answer_json(self, status: int, value: Any, *headers: tuple[str, str]) -> None:
        await self.answer(status, json.dumps(value).encode(), ("Content-Type", "application/json"), *headers)

    async def begin_stream(self, content_type: str = "application/x-ndjson", *headers: tuple[str, str]) -> None:
        """The head of a chunked answer."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in (("Content-Type", content_type), *headers))
        await self.send(f"HTTP/1.1 200 OK\r\n{lines}Transfer-Encoding: chunked\r\n\r\n".encode())

    async def chunk(self, data: bytes) -> None:
        await self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")

    def cut(self) -> None:
        """End the connection without any manners."""
        self._writer.transport.abort()


Script = Callable[[Received, Wire], Awaitable[None]]


class SocketHub:
    """Answers every request by the script its test gave; keeps what it received."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.received: list[Received] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        has_left = asyncio.Event()
        try:
            while (request := await _read_request(reader)) is not None:
                self.received.append(request)
                watching = asyncio.create_task(_watch(reader, has_left))
                try:
                    await self.script(request, Wire(writer, has_left))
                finally:
                    watching.cancel()
                    await asyncio.gather(watching, return_exceptions=True)
                if has_left.is_set():
                    return
        except OSError:
            return
        finally:
            writer.close()


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines if line)]
    length = int(dict(headers).get("content-length", "0"))
    method, target, _ = first.split(" ")
    return Received(method, target, headers, await reader.readexactly(length))


async def _watch(reader: asyncio.StreamReader, has_left: asyncio.Event) -> None:
    # Nobody sends a second request before the first is answered, so a byte here would be a mistake of the client's.
    with suppress(OSError):
        assert await reader.read(1) == b""
    has_left.set()


@asynccontextmanager
async def socket_hub(script: Script) -> AsyncIterator[SocketHub]:
    """A hub on a free loopback port, gone at the end of the block."""
    hub = SocketHub(script)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(hub.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    hub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def discovery(public_url: str, *signatures: str) -> dict[str, Any]:
    """The discovery document of a Corral hub."""
    return {"corral": "0.1.0", "public_url": public_url, "signatures": list(signatures or (STRONG, STOCK))}


def stub(model: Model, *, host: str, remote: str) -> Model:
    """The model as a stub of one that runs elsewhere."""
    return replace(model, weights=None, remote_host=host, remote_model=remote)


# ── Running models ───────────────────────────────────────────────────────────────────────────────────────────────────


class FakeInference:
    """Answers every request with words, without a model. closed: how many streams were ended."""

    def __init__(self, *words: str) -> None:
        self.words = words or ("one", "two")
        self.models: list[Model] = []
        self.closed = 0

    async def generate(self, model: Model, request: GenerateRequest) -> AsyncGenerator[GenerateResponse, None]:
        self.models.append(model)
        try:
            for word in self.words:
                yield GenerateResponse(model=request.model, created_at=CREATED_AT, response=word, done=False)
            yield GenerateResponse(model=request.model, created_at=CREATED_AT, response="", done=True, done_reason="stop")
        finally:
            self.closed += 1

    async def chat(self, model: Model, request: ChatRequest) -> AsyncGenerator[ChatResponse, None]:
        self.models.append(model)
        try:
            for word in self.words:
                message = Message(role="assistant", content=word)
                yield ChatResponse(model=request.model, created_at=CREATED_AT, message=message, done=False)
            message = Message(role="assistant", content="")
            yield ChatResponse(model=request.model, created_at=CREATED_AT, message=message, done=True, done_reason="stop")
        finally:
            self.closed += 1

    def described(self, model: Model) -> Model:
        return model

    async def embed(self, model: Model, request: EmbedRequest) -> EmbedResponse:
        self.models.append(model)
        return EmbedResponse(model=request.model, embeddings=[[1.0]])

    async def embeddings(self, model: Model, request: EmbeddingsRequest) -> EmbeddingsResponse:
        self.models.append(model)
        return EmbeddingsResponse(embedding=[1.0])


CREATED_AT = "2026-09-21T12:00:00Z"


def installed(name: str = "llama3:8b") -> Model:
    """A model as a store gives it."""
    return Model(
        name=parse_name(name),
        digest=Digest("0" * 64),
        size_bytes=1,
        modified_at=datetime(2026, 1, 1, tzinfo=UTC),
        details=ModelDetails(),
        capabilities=frozenset({Capability.COMPLETION}),
        weights="/weights",
    )
