"""Routes whose requests are written down before they are answered, where somebody asked for that."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Final, Protocol

from starlette.requests import Request
from starlette.responses import Response

from corral.edges.asgi import Endpoint, body_of, facts_of

#: Those that run a model with a prompt. Source: ollama server/routes.go withInferenceRequestLogging.
LOGGED: Final = frozenset(
    {"/api/generate", "/api/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)


class RequestNotes(Protocol):
    """storage.requestlog.RequestLog."""

    def note(self, path: str, host: str, content_type: str, body: bytes, *, now: datetime) -> None: ...


def noted(row: Endpoint, notes: RequestNotes, now: Callable[[], datetime]) -> Endpoint:
    """The route, with what comes in by it written down; any other as it is."""
    if row.path not in LOGGED:
        return row
    answer = row.handler

    async def handle(request: Request) -> Response:
        headers = facts_of(request).headers
        host, kind = headers.get("host", [""])[0], headers.get("content-type", ["application/json"])[0]
        await asyncio.to_thread(notes.note, row.path, host, kind, body_of(request), now=now())
        return await answer(request)

    return replace(row, handler=handle)
