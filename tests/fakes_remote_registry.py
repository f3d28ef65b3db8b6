"""A registry on a real socket that does what a test tells it to, byte by byte if need be: for what clients must bear.

`HonestRegistry` is one that keeps to the protocol, with switches for the ways in which honest registries differ.
"""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from corral.clients.reach import GuardedResolver
from corral.clients.registry import RegistryClient
from corral.clients.registry_transport import RegistryTransport, open_registry_session
from corral.core.transfer_ports import RemoteRepository
from corral.wire.names import Digest
from corral.wire.proxies import ProxyRules
from corral.wire.signing import DevicePrivateKey, DevicePublicKey
from fakes import FakeClock, SeededEntropy


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came. headers: lower-case names."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)


#: A whole answer, or its pieces as they are to be sent; after them the connection is closed.
Answer = bytes | AsyncIterator[bytes]


def answer(status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> bytes:
    """An answer. headers: `content_type` for `Content-Type`. length: what Content-Length says, if not the truth."""
    lines = [f"HTTP/1.1 {status} X", "Connection: close"]
    if length is None or length >= 0:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class ScriptedRegistry:
    """Answers with what `on` returns. url: where it listens. asked: every request so far."""

    def __init__(self) -> None:
        self.on: Callable[[Asked], Answer] = lambda _: answer(404)
        self.asked: list[Asked] = []
        self.url = ""
        self.sent_bytes = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = await _read(reader)
            self.asked.append(asked)
            replied = self.on(asked)
            if isinstance(replied, bytes):
                writer.write(replied if asked.method != "HEAD" else replied.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
                self.sent_bytes += len(replied)
            else:
                async for piece in replied:
                    writer.write(piece)
                    self.sent_bytes += len(piece)
                    await writer.drain()
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["ScriptedRegistry"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        raise AssertionError("bodies are sent with their length: some registries take no others")
    return Asked(method, target, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


@dataclass
class HonestRegistry:
    """What a registry holds, and how it answers. demands_token: of everybody; `signed` only of writers."""

    at: ScriptedRegistry
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    #: "" nothing, "any" any token, "signed" a token that a device signed for.
    demands: str = ""
    ranges: bool = True
    #: `redirect`: 307 to the blob elsewhere; `location`: 200 with a Location and no body; else the bytes.
    hands_out: str = ""
    direct_url: str = ""
    redirects_parts: bool = False
    mounts: bool = False
    uploads: dict[str, bytearray] = field(default_factory=dict)
    visibility: str = ""
    #: Called before each answer; what it returns is sent instead.
    trouble: Callable[[Asked], Answer | None] = lambda _: None

    def __post_init__(self) -> None:
        self.at.on = self.on

    def add_blob(self, content: bytes) -> Digest:
        digest = Digest(sha256(content).hexdigest())
        self.blobs[str(digest)] = content
        return digest

    def on(self, asked: Asked) -> Answer:
        if (troubled := self.trouble(asked)) is not None:
            return troubled
        if asked.path == "/token":
            is_signed = "authorization" in asked.headers
            return answer(200, json.dumps({"token": "signed" if is_signed else "anonymous"}).encode())
        if asked.path.startswith("/direct/"):
            assert "authorization" not in asked.headers
            return self._blob_bytes(asked, asked.path.removeprefix("/direct/"))
        if asked.path.startswith("/part/"):
            assert "authorization" not in asked.headers
            _, _, upload, offset = asked.path.split("/")
            self.uploads[upload][int(offset) : int(offset) + len(asked.body)] = asked.body
            return answer(200)
        if self.demands and (denied := self._denied(asked)):
            return denied
        return self._granted(asked)

    def _denied(self, asked: Asked) -> bytes | None:
        token = asked.headers.get("authorization", "")
        if token == "Bearer signed" or (self.demands == "any" and token == "Bearer anonymous"):
            return None
        if token == "Bearer anonymous" and asked.method in ("GET", "HEAD"):
            return answer(404)
        return answer(401, www_authenticate=f'Bearer realm="{self.at.url}/token",service="reg",scope="repository:a/b:pull"')

    def _granted(self, asked: Asked) -> Answer:
        path, method = asked.path, asked.method
        if match := re.fullmatch(r"/v2/a/b/manifests/(.+)", path):
            return self._manifest(asked, match[1])
        if match := re.fullmatch(r"/v2/a/b/blobs/(sha256:[0-9a-f]{64})", path):
            return self._blob(asked, match[1])
        if path == "/v2/a/b/blobs/uploads/" and method == "POST":
            if self.mounts and "mount" in asked.query:
                return answer(201)
            name = f"u{len(self.uploads)}"
            self.uploads[name] = bytearray()
            return answer(202, location=f"/v2/a/b/blobs/uploads/{name}?_state=x%2By")
        if match := re.fullmatch(r"/v2/a/b/blobs/uploads/(u[0-9]+)", path):
            return self._upload(asked, match[1])
        return answer(404)

    def _manifest(self, asked: Asked, reference: str) -> bytes:
        if asked.method == "PUT":
            self.manifests[reference] = (asked.headers["content-type"], asked.body)
            self.visibility = asked.headers.get("x-corral-visibility", "")
            return answer(201)
        found = self.manifests.get(reference)
        return answer(200, found[1], content_type=found[0]) if found else answer(404)

    def _blob(self, asked: Asked, digest: str) -> Answer:
        if digest not in self.blobs:
            return answer(404)
        if asked.method == "GET" and self.hands_out == "redirect":
            return answer(307, location=f"{self.direct_url}/direct/{digest}")
        if asked.method == "GET" and self.hands_out == "location":
            return answer(200, location=f"/direct/{digest}")
        return self._blob_bytes(asked, digest)

    def _blob_bytes(self, asked: Asked, digest: str) -> bytes:
        content = self.blobs[digest]
        wanted = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", asked.headers.get("range", ""))
        if not wanted or not self.ranges:
            return answer(200, content)
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        if first > last:
            return answer(416)
        return answer(206, content[first : last + 1], content_range=f"bytes {first}-{last}/{len(content)}")

    def _upload(self, asked: Asked, name: str) -> bytes:
        held = self.uploads.get(name)
        if held is None:
            return answer(404)
        assert asked.query["_state"] == ["x+y"]
        here = f"/v2/a/b/blobs/uploads/{name}?_state=x%2By"
        if asked.method == "GET":
            return answer(204, location=here, range=f"0-{max(len(held) - 1, 0)}")
        if asked.method == "PUT":
            content, digest = bytes(held), asked.query["digest"][0]
            if f"sha256:{sha256(content).hexdigest()}" != digest:
                return answer(400, b'{"errors":[{"code":"DIGEST_INVALID"}]}')
            self.blobs[digest] = content
            del self.uploads[name]
            return answer(201)
        first = int(asked.headers["content-range"].partition("-")[0])
        if self.redirects_parts:
            return answer(307, location=f"{self.direct_url}/part/{name}/{first}", docker_upload_location=here)
        if first != len(held):
            return answer(416, range=f"0-{max(len(held) - 1, 0)}")
        held += asked.body
        return answer(202, location=here, range=f"0-{len(held) - 1}")


class Keys:
    """A device key in memory, and how often somebody wanted it."""

    def __init__(self) -> None:
        self.key = DevicePrivateKey(bytes(range(32)))
        self.wanted = 0

    @property
    def public(self) -> DevicePublicKey:
        return self.key.public

    def load(self) -> DevicePrivateKey:
        self.wanted += 1
        return self.key

    def load_or_create(self) -> DevicePrivateKey:
        return self.load()


@dataclass
class Wired:
    """A client of a scripted registry. pauses: how long it waited, without waiting."""

    at: ScriptedRegistry
    client: RegistryClient
    keys: Keys
    pauses: list[float]
    session: aiohttp.ClientSession

    @property
    def repository(self) -> RemoteRepository:
        return RemoteRepository(self.at.url, "a/b")

    async def read(self, digest: Digest, first: int, count: int) -> bytes:
        return b"".join([chunk async for chunk in self.client.read_blob(self.repository, digest, first=first, count=count)])


class Names(AbstractResolver):
    """A resolver that knows what the test says."""

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses = {name.replace("_", "."): found for name, found in addresses.items()}

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in self.addresses[host]
        ]

    async def close(self) -> None: ...


@asynccontextmanager
async def wired(
    *, stall_s: float = 5.0, keys: bool = True, resolver: Any = None, proxies: ProxyRules | None = None
) -> AsyncIterator[Wired]:
    """A registry and a client, for as long as the block runs."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    own, guarded = Keys(), GuardedResolver(resolver)
    async with ScriptedRegistry().listening() as at, open_registry_session(guarded) as session:
        transport = RegistryTransport(
            session,
            guarded,
            keys=own if keys else None,
            clock=FakeClock(),
            entropy=SeededEntropy(),
            user_agent="corral/test",
            device_name="ada's box",
            stall_s=stall_s,
            proxies=proxies,
        )
        client = RegistryClient(transport, sleep=sleep, entropy=SeededEntropy())
        yield Wired(at, client, own, pauses, session)
