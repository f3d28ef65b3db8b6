"""Answers with a blob: whole or a range of it, at the pace of whoever reads it.

The kernel copies from the file to the socket where the HTTP server can have it do so: that takes a third of the processor's
time, and no memory of ours however many read. Elsewhere blocks are read and sent one at a time, so that what a slow reader has
not taken is one of them (R7). Of a reader who stops, the file and the task are let go after a while.

A blob whose file is missing or has another size is unknown, for HEAD as well: a client that learns so pushes it again, and one
that got the wrong bytes would only see its own check fail (fault case 24).
"""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from corral.edges.asgi import facts_of
from corral.edges.bodies import Disconnected
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.registry import ByteRange, parse_range

BLOCK_BYTES = 256 * 1024
#: How long a reader may take nothing at all, where blocks are sent.
STALL_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """What is to be sent. source: where its file is, or its bytes."""

    digest: Digest
    size_bytes: int
    source: str | bytes


async def blob_response(request: Request, blob: Blob, headers: Mapping[str, str], *, stall_s: float = STALL_S) -> Response:
    """The answer to GET or HEAD of a blob. headers: sent besides. Raises: range_invalid, blob_unknown."""
    sent = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(blob.size_bytes),
        "Docker-Content-Digest": str(blob.digest),
        "ETag": f'"{blob.digest}"',
        "Accept-Ranges": "bytes",
        **headers,
    }
    if request.method == "HEAD" or not blob.size_bytes:
        await asyncio.to_thread(_check_file, blob)
        return _Bare(200, sent)
    part = _wanted(request, blob)
    if part is not None:
        status = 206
        sent |= {"Content-Length": str(part.length), "Content-Range": f"bytes {part}/{blob.size_bytes}"}
    else:
        status, part = 200, ByteRange(0, blob.size_bytes - 1)
    if isinstance(blob.source, bytes):
        return _Bare(status, sent, blob.source[part.first : part.last + 1])
    return _FromFile(status, sent, await asyncio.to_thread(_open, blob), part, stall_s)


def bare_response(status: int, headers: Mapping[str, str], content: bytes = b"") -> Response:
    """An answer with exactly these headers and its length, which is that of the content unless headers say otherwise."""
    length = {} if status == HTTPStatus.NO_CONTENT else {"Content-Length": str(len(content))}
    return _Bare(status, {**length, **headers}, content)


def _wanted(request: Request, blob: Blob) -> ByteRange | None:
    """The range that is asked for; None for the whole. Raises: range_invalid."""
    headers = facts_of(request).headers
    ranges, conditions = headers.get("range", []), headers.get("if-range", [])
    if len(ranges) != 1 or any(condition != f'"{blob.digest}"' for condition in conditions):
        return None
    return parse_range(ranges[0], blob.size_bytes)


def _check_file(blob: Blob) -> None:
    if isinstance(blob.source, str):
        os.close(_open(blob))


def _open(blob: Blob) -> int:
    """The blob's file, to be closed by the caller. Raises: blob_unknown."""
    assert isinstance(blob.source, str)
    try:
        descriptor = os.open(blob.source, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorralError("blob_unknown") from None
    if os.fstat(descriptor).st_size != blob.size_bytes:
        os.close(descriptor)
        raise CorralError("blob_unknown")
    return descriptor


class _Bare(Response):
    """Sends what it is given, without the additions of the framework."""

    def __init__(self, status: int, headers: Mapping[str, str], content: bytes = b"") -> None:
        self.status_code = status
        self.background = None
        self.body = content
        self.raw_headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._start(send)
        await send({"type": "http.response.body", "body": self.body, "more_body": False})

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})


class _FromFile(_Bare):
    """Sends a part of an open file, and closes it."""

    def __init__(self, status: int, headers: Mapping[str, str], descriptor: int, part: ByteRange, stall_s: float) -> None:
        super().__init__(status, headers)
        self._descriptor = descriptor
        self._part = part
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._start(send)
            if "http.response.zerocopysend" in scope.get("extensions", {}):
                part = {"file": self._descriptor, "offset": self._part.first, "count": self._part.length}
                await send({"type": "http.response.zerocopysend", **part, "more_body": False})
            else:
                await self._send_blocks(send)
        finally:
            os.close(self._descriptor)

    async def _send_blocks(self, send: Send) -> None:
        position, end = self._part.first, self._part.last + 1
        while position < end:
            block = await asyncio.to_thread(os.pread, self._descriptor, min(BLOCK_BYTES, end - position), position)
            position += len(block)
            if not block:
                # Cut short while it was read. The connection has to end early too, or this would be taken for the whole.
                raise Disconnected
            await self._send_block(send, block, is_last=position == end)

    async def _send_block(self, send: Send, block: bytes, *, is_last: bool) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": block, "more_body": not is_last})
        except TimeoutError:
            raise Disconnected from None
