"""Answers with a blob: whole or a range of it, at the pace of whoever reads it.

A whole file is handed to the HTTP server where that can send files by itself. A range is read in blocks, one at a time: what a
slow reader has not taken yet is a few blocks of ours and whatever the kernel holds (R7). Of a reader who stops, the file and the
task are let go after a while; the connection ends a little later, by the system (listen.py): the HTTP server gives us no way to.

A blob whose file is missing or has another size is unknown, for HEAD as well: a client that learns so pushes it again, and one
that got the wrong bytes would only see its own check fail (fault case 24).

Blocks are small because the HTTP server keeps two or three of them per stream besides: sixteen streams took 120 MB with blocks of
1 MiB, 25 MB with these. What makes small blocks cheap is to take what the kernel has in memory without a thread: sixteen ranges
came at 530 MB/s, and at 180 MB/s with a thread for each 1 MiB (on two busy cores).
"""

import asyncio
import os
import sys
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
#: What the kernel is asked to have in memory by the time it is needed.
_AHEAD_BYTES = 8 * BLOCK_BYTES
_CAN_TELL = sys.platform == "linux"
#: How long a reader may take nothing at all.
STALL_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """What is to be sent. source: where its file is, or its bytes. may_hand_over: whether the HTTP server may send a whole file
    by itself. That is cheaper, and a reader who stops has the file open for longer; so it is not for strangers."""

    digest: Digest
    size_bytes: int
    source: str | bytes
    may_hand_over: bool = False


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
    if request.method == "HEAD":
        await asyncio.to_thread(_check_file, blob)
        return _Bare(200, sent)
    part = _wanted(request, blob)
    if part is None:
        return await _whole(request, blob, sent, stall_s)
    sent |= {"Content-Length": str(part.length), "Content-Range": f"bytes {part}/{blob.size_bytes}"}
    if isinstance(blob.source, bytes):
        return _Bare(206, sent, blob.source[part.first : part.last + 1])
    return _FromFile(206, sent, await asyncio.to_thread(_open, blob), part, stall_s)


async def _whole(request: Request, blob: Blob, sent: Mapping[str, str], stall_s: float) -> Response:
    if isinstance(blob.source, bytes):
        return _Bare(200, sent, blob.source)
    if not blob.size_bytes or (blob.may_hand_over and "http.response.pathsend" in request.scope.get("extensions", {})):
        await asyncio.to_thread(_check_file, blob)
        return _HandedOver(200, sent, blob.source) if blob.size_bytes else _Bare(200, sent)
    whole = ByteRange(0, blob.size_bytes - 1)
    return _FromFile(200, sent, await asyncio.to_thread(_open, blob), whole, stall_s)


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


def _read_at_once(descriptor: int, count: int, position: int) -> bytes | None:
    """What is in memory of these bytes, at least one, or none at the end of the file; None when the disk would have to be waited
    for, or where the system cannot tell."""
    if not _CAN_TELL:
        return None
    buffer = bytearray(count)
    try:
        return bytes(memoryview(buffer)[: os.preadv(descriptor, [buffer], position, os.RWF_NOWAIT)])
    except OSError:
        return None


def _read(descriptor: int, count: int, position: int) -> bytes:
    block = os.pread(descriptor, count, position)
    if _CAN_TELL:
        os.posix_fadvise(descriptor, position + len(block), _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    return block


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


class _HandedOver(_Bare):
    """Leaves the file to the HTTP server."""

    def __init__(self, status: int, headers: Mapping[str, str], path: str) -> None:
        super().__init__(status, headers)
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._start(send)
        await send({"type": "http.response.pathsend", "path": self._path})


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
            position, end = self._part.first, self._part.last + 1
            while position < end:
                count = min(BLOCK_BYTES, end - position)
                block = _read_at_once(self._descriptor, count, position)
                if block is None:
                    block = await asyncio.to_thread(_read, self._descriptor, count, position)
                position += len(block)
                if not block:
                    # Cut short while it was read. The connection has to end early too, or this would be taken for the whole.
                    raise Disconnected
                await self._send_block(send, block, is_last=position == end)
        finally:
            os.close(self._descriptor)

    async def _send_block(self, send: Send, block: bytes, *, is_last: bool) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": block, "more_body": not is_last})
        except TimeoutError:
            raise Disconnected from None
