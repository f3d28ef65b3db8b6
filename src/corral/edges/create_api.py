"""The routes that change what is installed: /api/create, /api/copy, /api/delete and /api/blobs, as Ollama answers them.

For the local server only; its guard keeps web pages and extensions out (T88). Statuses and texts come from the service.
Source: ollama server/routes.go, fb30760.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import MANAGES
from corral.edges.asgi import Endpoint, body_of, body_stream, endpoint
from corral.edges.stream_response import stream
from corral.wire.create import CopyRequest, CreateRequest, DeleteRequest, ProgressEvent
from corral.wire.errors import CorralError
from corral.wire.frames import NDJSON, encode_ndjson, ndjson_error
from corral.wire.native import decode

#: A request may hold licences, a template and a long conversation.
_MAX_CREATE_BYTES = 20 * 1024 * 1024
_PLAIN_JSON = "application/json"


class LibraryService(Protocol):
    """What answers these routes: local.library.Library."""

    def create(self, request: CreateRequest) -> AsyncGenerator[ProgressEvent, None]: ...

    async def copy(self, source: str, destination: str) -> None: ...

    async def delete(self, requested: str) -> None: ...

    def require_blob(self, text: str) -> None: ...

    async def put_blob(self, text: str, chunks: AsyncIterator[bytes]) -> bool: ...


class CreateApi:
    """The handlers."""

    def __init__(self, library: LibraryService) -> None:
        self._library = library

    def endpoints(self) -> list[Endpoint]:
        """Every route."""
        return [
            endpoint("POST", "/api/create", self.create, MANAGES, max_body_bytes=_MAX_CREATE_BYTES, cancel_on_disconnect=True),
            endpoint("POST", "/api/copy", self.copy, MANAGES),
            endpoint("DELETE", "/api/delete", self.delete, MANAGES),
            endpoint("HEAD", "/api/blobs/{digest}", self.has_blob, MANAGES),
            endpoint("POST", "/api/blobs/{digest}", self.put_blob, MANAGES, streams_body=True),
        ]

    async def create(self, request: Request) -> Response:
        """Make a model; events as they come, or the last one alone."""
        asked = decode(body_of(request), CreateRequest)
        events = self._library.create(asked)
        if asked.stream is not False:
            return await stream(request, events, encode_ndjson, content_type=NDJSON, error_frame=ndjson_error)
        return await last_event(events)

    async def copy(self, request: Request) -> Response:
        """Have a model under another name too."""
        asked = decode(body_of(request), CopyRequest)
        await self._library.copy(asked.source, asked.destination)
        return Response()

    async def delete(self, request: Request) -> Response:
        """Remove a model."""
        asked = decode(body_of(request), DeleteRequest)
        await self._library.delete(asked.model or asked.name)
        return Response()

    async def has_blob(self, request: Request) -> Response:
        """Whether a blob need not be sent."""
        self._library.require_blob(request.path_params["digest"])
        return Response()

    async def put_blob(self, request: Request) -> Response:
        """Take a blob in; 200 when it is here already."""
        is_new = await self._library.put_blob(request.path_params["digest"], body_stream(request))
        return Response(status_code=201 if is_new else 200)


async def last_event(events: AsyncGenerator[ProgressEvent, None]) -> Response:
    """What `stream: false` answers. Raises: whatever ends the events; with Ollama's 500 where it says nothing else."""
    last: ProgressEvent | None = None
    async with aclosing(events) as following:
        async for event in following:
            last = event
    if last is None:
        raise CorralError("internal")
    return Response(msgspec.json.encode(last), media_type=_PLAIN_JSON)
