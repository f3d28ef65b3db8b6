"""The relay with sockets on both sides: caller → the real HTTP server → the signed client → a hub made of a plain socket."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from corral.clients.hub import HubClient, open_session
from corral.core.ports import HubTerms
from corral.edges.listen import serve
from corral.edges.local_api import LocalApi, local_app
from corral.edges.local_guard import LocalGuard
from corral.local.cloud import CloudAccess, CloudSwitch
from corral.local.models import LocalModels
from corral.wire.discovery import STRONG
from corral.wire.strong import verify_headers
from fakes import NOON, FakeClock, SeededEntropy
from fakes_local import (
    FakeDeviceKeys,
    FakeInference,
    MemoryHubs,
    MemoryModels,
    Received,
    SocketHub,
    Wire,
    installed,
    socket_hub,
    stub_models,
)

PATIENCE_S = 10
BODY = b'{"model":"gpt:20b-cloud","messages":[{"role":"user","content":"caf\xc3\xa9"}],"x":1.50}'


@dataclass
class Served:
    """A local server on a port of its own, and the hub behind it."""

    hub: SocketHub
    port: int

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def post(self, path: str, body: bytes, *headers: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request by hand; the answer is the test's to read."""
        reader, writer = await self.connect()
        lines = [f"POST {path} HTTP/1.1", f"Host: localhost:{self.port}", f"Content-Length: {len(body)}", *headers]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        return reader, writer


async def silent(request: Received, wire: Wire) -> None:
    await wire.has_left.wait()


@asynccontextmanager
async def local_server(hub: SocketHub) -> AsyncIterator[Served]:
    """The server, until the end of the block; then ended in order."""
    stop, ready = asyncio.Event(), asyncio.Event()
    memory = MemoryHubs()
    memory.keep_terms(hub.url, HubTerms(signature=STRONG, public_url=hub.url.replace("127.0.0.1", "localhost")))
    async with open_session() as session:
        gateway = HubClient(
            lambda: hub.url,
            FakeDeviceKeys(),
            memory=memory,
            clock=FakeClock(),
            entropy=SeededEntropy(),
            session=session,
            device_name="box",
            version="9",
        )
        api = LocalApi(
            models=LocalModels(MemoryModels(installed()), FakeInference(), stub_models()),  # type: ignore[arg-type]
            loaded=list,
            cloud=CloudAccess(gateway, CloudSwitch(False, lambda: False), device_name="box", version="0.34.0"),
            hub_url=lambda: hub.url,
            version="0.34.0",
        )
        port = _free_port()
        app = local_app(api, LocalGuard(hostname="box"))

        async def release() -> None:
            gateway.abandon()

        serving = asyncio.create_task(serve(app, "127.0.0.1", port, on_ready=ready.set, release=release, stop=stop, drain_s=0.1))
        await asyncio.wait_for(ready.wait(), PATIENCE_S)
        try:
            yield Served(hub, port)
        finally:
            stop.set()
            await asyncio.wait_for(serving, PATIENCE_S)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with socket_hub(silent) as hub, local_server(hub) as running:
        yield running


async def head_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers; names in lower case, twice-sent ones joined."""
    first, *lines = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)).decode().split("\r\n")
    headers: dict[str, str] = {}
    for name, _, value in (line.partition(": ") for line in lines if line):
        headers[name.lower()] = f"{headers[name.lower()]}, {value}" if name.lower() in headers else value
    return int(first.split()[1]), headers


async def chunk_of(reader: asyncio.StreamReader) -> bytes:
    """One chunk of a chunked body; empty at its end."""
    size = int((await asyncio.wait_for(reader.readline(), PATIENCE_S)).strip() or b"0", 16)
    return (await asyncio.wait_for(reader.readexactly(size + 2), PATIENCE_S))[:-2]


async def test_relayed_request_arrives_byte_for_byte_and_strongly_signed(served: Served) -> None:
    async def answer(request: Received, wire: Wire) -> None:
        await wire.answer(200, b'{"done":true}', ("Content-Type", "application/json; charset=utf-8"), ("Set-Cookie", "a=b"))

    served.hub.script = answer
    reader, writer = await served.post(
        "/api/chat?b=2&a=%31",
        BODY,
        "Authorization: Bearer crlk_callers",
        "Cookie: a=b",
        "User-Agent: ollama-js/1",
        "Content-Type: application/json",
        "X-Api-Key: crlk_callers",
        "X-Forwarded-For: 1.2.3.4",
    )
    status, headers = await head_of(reader)
    assert (status, await reader.readexactly(13)) == (200, b'{"done":true}')
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert headers["content-length"] == "13"
    assert "set-cookie" not in headers
    assert "," not in headers.get("date", "Mon, x").replace(", ", " ", 1)
    writer.close()
    (request,) = served.hub.received
    assert (request.method, request.target) == ("POST", "/api/chat?b=2&a=%31")
    assert request.body == BODY.replace(b"gpt:20b-cloud", b"gpt:20b")
    assert set(request.names) == {
        "host",
        "user-agent",
        "content-type",
        "content-length",
        "x-ollama-client-version",
        "corral-device-name",
        "accept-encoding",
        "content-digest",
        "signature-input",
        "signature",
    }
    public_url = served.hub.url.replace("127.0.0.1", "localhost")
    verify_headers(request.method, public_url + request.target, dict(request.headers), body=request.body, now=NOON.timestamp())


@pytest.mark.parametrize("content_type", ["application/x-ndjson", "text/event-stream"])
async def test_relayed_line_reaches_the_caller_before_the_next_is_made(content_type: str, served: Served) -> None:
    was_read = asyncio.Event()
    pieces = [b'{"a":1}\n\n', b'{"b":2}\n\n']

    async def slowly(request: Received, wire: Wire) -> None:
        await wire.begin_stream(content_type)
        await wire.chunk(pieces[0])
        await was_read.wait()
        await wire.chunk(pieces[1])
        await wire.end_stream()

    served.hub.script = slowly
    reader, writer = await served.post("/api/chat", BODY)
    status, headers = await head_of(reader)
    assert (status, headers["content-type"]) == (200, content_type)
    assert await chunk_of(reader) == pieces[0]
    was_read.set()
    assert await chunk_of(reader) == pieces[1]
    assert await chunk_of(reader) == b""
    writer.close()


@pytest.mark.parametrize("leaves", ["before the answer", "in the middle"])
async def test_caller_that_closes_its_connection_ends_the_hubs_work(leaves: str, served: Served) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def endless(request: Received, wire: Wire) -> None:
        if leaves == "in the middle":
            await wire.begin_stream()
            await wire.chunk(b'{"a":1}\n')
        asked.set()
        await wire.has_left.wait()
        left.set()

    served.hub.script = endless
    reader, writer = await served.post("/api/chat", BODY)
    await asyncio.wait_for(asked.wait(), PATIENCE_S)
    if leaves == "in the middle":
        await head_of(reader)
        assert await chunk_of(reader) == b'{"a":1}\n'
    writer.close()
    await asyncio.wait_for(left.wait(), PATIENCE_S)


async def test_hub_killed_in_a_stream_gives_one_error_line_and_a_proper_end(served: Served) -> None:
    async def dying(request: Received, wire: Wire) -> None:
        await wire.begin_stream()
        await wire.chunk(b'{"a":1}\n{"half')
        wire.cut()

    served.hub.script = dying
    reader, writer = await served.post("/api/chat", BODY)
    await head_of(reader)
    assert await chunk_of(reader) == b'{"a":1}\n'
    assert "stopped before its answer was complete" in json.loads(await chunk_of(reader))["error"]
    assert await chunk_of(reader) == b""
    writer.close()


async def test_hub_killed_before_its_answer_is_502_and_the_next_request_works(served: Served) -> None:
    async def cut(request: Received, wire: Wire) -> None:
        wire.cut()

    async def answer(request: Received, wire: Wire) -> None:
        await wire.answer_json(200, {"done": True})

    for script, expected in ((cut, 502), (answer, 200)):
        served.hub.script = script
        reader, writer = await served.post("/api/chat", BODY)
        assert (await head_of(reader))[0] == expected
        writer.close()


async def test_server_that_ends_gives_a_waiting_stream_its_error_line() -> None:
    async def endless(request: Received, wire: Wire) -> None:
        await wire.begin_stream()
        await wire.chunk(b'{"a":1}\n')
        await wire.has_left.wait()

    async with socket_hub(endless) as hub:
        async with local_server(hub) as running:
            reader, writer = await running.post("/api/chat", BODY)
            await head_of(reader)
            assert await chunk_of(reader) == b'{"a":1}\n'
        assert json.loads(await chunk_of(reader)) == {"error": "the server is shutting down"}
        writer.close()


async def test_t086_foreign_host_is_refused_on_the_wire(served: Served) -> None:
    for method, path, expected in (("GET", "/", 403), ("HEAD", "/", 403), ("OPTIONS", "/api/chat", 403), ("GET", "/x", 403)):
        reader, writer = await served.connect()
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: evil.com\r\n\r\n".encode())
        assert (await head_of(reader))[0] == expected
        writer.close()
    assert served.hub.received == []
