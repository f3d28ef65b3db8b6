"""For tests of engines and runners: an event loop whose time passes by itself, engines that load when told, and a llama.cpp
server made of prepared bytes."""

import asyncio
import functools
import inspect
import json
import selectors
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from corral.core.ports import LoadOptions
from corral.core.records import Model
from corral.engines.scripted import ScriptedEngine, ScriptedRunner
from fakes import NOON
from fakes_models import model

# ── Time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _NeverSleeps(selectors.DefaultSelector):
    """Instead of waiting, moves the loop's time on to whatever is due next."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits for something that cannot happen")
        if not ready and timeout:
            self.loop.now_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop for code that waits for timers and other tasks only. Its time costs nothing; it is exact up to some weeks,
    where floats grow coarser than the resolution that asyncio reckons with."""

    def __init__(self) -> None:
        selector = _NeverSleeps()
        selector.loop = self
        self.now_s = 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s


class LoopClock:
    """A Clock that shows the loop's time."""

    def now(self) -> datetime:
        return NOON + timedelta(seconds=asyncio.get_running_loop().time())

    def monotonic_ns(self) -> int:
        return round(asyncio.get_running_loop().time() * 1e9)


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a VirtualLoop."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(**fixtures))

    del run.__wrapped__  # type: ignore[attr-defined]  # pytest-asyncio would find the coroutine beneath and run it itself
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


# ── Engines ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def weights(name: str = "tiny:1b", **changes: object) -> Model:
    """A model with weights of its own path, trained for 8192 tokens."""
    metadata = {"general.architecture": "llama", "llama.context_length": 8192}
    return model(name, **{"weights": f"/models/{name}", "metadata": metadata, **changes})


class GatedEngine(ScriptedEngine):
    """A ScriptedEngine that is told how loads go. asked: what was to be loaded, in order, also what failed. gate: loads wait
    while it is closed. fails: raised by the next loads, first come, first served."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, LoadOptions]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails: list[Exception] = []
        self.aborted: list[str] = []

    async def load(self, model: Model, options: LoadOptions) -> ScriptedRunner:
        self.asked.append((model.name.short, options))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.aborted.append(model.name.short)
            raise
        if self.fails:
            raise self.fails.pop(0)
        return await super().load(model, options)

    @property
    def names(self) -> list[str]:
        """The models that were to be loaded, in order."""
        return [name for name, _ in self.asked]

    @property
    def alive(self) -> list[str]:
        """The models whose runners have not been closed."""
        return [runner.model.name.short for runner in self.runners if not runner.is_closed]


# ── A server ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class RawServer:
    """An HTTP server that answers with prepared bytes. answers: path -> pieces, sent one by one; None among them breaks off the
    connection, an Event is waited for. gone: set when a client has hung up."""

    url: str = ""
    answers: dict[str, list[bytes | asyncio.Event | None]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0

    def answer(self, path: str, value: object, *, status: int = 200, headers: str = "") -> None:
        """Answer with one JSON object."""
        body = json.dumps(value).encode()
        self.answers[path] = [_head(status, f"Content-Length: {len(body)}\r\n{headers}") + body]

    def stream(self, path: str, *pieces: object) -> None:
        """Answer with events: objects become JSON, text goes as it is, bytes are no event of their own."""
        sent: list[bytes | asyncio.Event | None] = [
            _head(200, "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n")
        ]
        for piece in pieces:
            if piece is None or isinstance(piece, asyncio.Event):
                sent.append(piece)
                continue
            data = piece if isinstance(piece, bytes) else _event(piece)
            sent.append(b"%x\r\n%s\r\n" % (len(data), data))
        self.answers[path] = [*sent, b"0\r\n\r\n"]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (asked := await _read_request(reader)) is not None:
                self.asked.append(asked)
                if not await self._respond(asked, reader, writer):
                    break
        except ConnectionError:
            self.gone.set()
        finally:
            writer.close()

    async def _respond(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        for piece in self.answers.get(asked.path, [_head(404, "Content-Length: 0\r\n")]):
            if piece is None:
                return False
            if isinstance(piece, asyncio.Event):
                if not await self._waited(piece, reader):
                    return False
                continue
            writer.write(piece)
            await writer.drain()
        return True

    async def _waited(self, event: asyncio.Event, reader: asyncio.StreamReader) -> bool:
        hung_up = asyncio.create_task(reader.read(1))
        opened = asyncio.create_task(event.wait())
        await asyncio.wait({hung_up, opened}, return_when=asyncio.FIRST_COMPLETED)
        if hung_up.done():
            self.gone.set()
        for task in (hung_up, opened):
            task.cancel()
        await asyncio.gather(hung_up, opened, return_exceptions=True)
        return not self.gone.is_set()


def _event(value: object) -> bytes:
    return b"data: %s\n\n" % (value if isinstance(value, str) else json.dumps(value)).encode()


def _head(status: int, headers: str) -> bytes:
    return f"HTTP/1.1 {status} Whatever\r\n{headers}\r\n".encode()


async def _read_request(reader: asyncio.StreamReader) -> Asked | None:
    head = await reader.readline()
    if not head:
        return None
    method, path, _ = head.decode().split(" ")
    headers = {}
    while line := (await reader.readline()).decode().strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return Asked(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))


@asynccontextmanager
async def raw_server(tls: ssl.SSLContext | None = None) -> AsyncIterator[RawServer]:
    """A RawServer on a free port of loopback."""
    served = RawServer()
    running: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        task.add_done_callback(running.discard)
        # asyncio's streams log a connection's task that ends as canceled, which is how the last ones end here.
        with suppress(asyncio.CancelledError):
            await served.handle(reader, writer)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    served.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield served
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def settle(is_so: Callable[[], bool], *, turns: int = 1000) -> None:
    """Let other tasks run until it is so: for loops whose time is virtual, where nothing takes long."""
    for _ in range(turns):
        if is_so():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come to pass")


async def eventually(ask: Callable[[], Awaitable[bool]], *, timeout_s: float = 10.0) -> None:
    """Ask again until it is so: for what other processes do in their own time."""
    async with asyncio.timeout(timeout_s):
        while not await ask():
            await asyncio.sleep(0.02)
