"""Answers that are sent as they come: events, encoded one at a time, and an error frame where one goes wrong."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from corral.wire.errors import CorralError, shutting_down

T = TypeVar("T")


async def stream(
    request: Request,
    events: AsyncIterator[T],
    encode: Callable[[T], bytes],
    *,
    content_type: str,
    error_frame: Callable[[CorralError], bytes],
) -> Response:
    """Answer with a stream. The first event is awaited before the status is sent, so an early error is a real status; a later one
    becomes one error frame and the stream ends. events is closed when the caller leaves."""
    try:
        first = await anext(events, None)
    except BaseException:
        await _close(events)
        raise
    closing: asyncio.Event = request.scope["corral.closing"]
    return _StreamResponse(_frames(first, events, encode, error_frame, closing), events, content_type)


async def _frames(
    first: T | None,
    events: AsyncIterator[T],
    encode: Callable[[T], bytes],
    error_frame: Callable[[CorralError], bytes],
    closing: asyncio.Event,
) -> AsyncGenerator[bytes, None]:
    try:
        if first is not None:
            yield encode(first)
            async for event in events:
                yield encode(event)
                if closing.is_set():
                    raise shutting_down()
    except CorralError as error:
        yield error_frame(told(error, closing))
    finally:
        await _close(events)


def told(error: CorralError, closing: asyncio.Event) -> CorralError:
    """What a caller hears of an error. Once the server ends what still runs, whatever was waited for is taken away; that an
    engine "ended (signal 9)" is no news then."""
    is_ours = closing.is_set() and error.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return shutting_down() if is_ours else error


async def _close(events: AsyncIterator[Any]) -> None:
    if isinstance(events, AsyncGenerator):
        await events.aclose()


class _StreamResponse(Response):
    """Sends frames as they come, and always closes what they are made of, also when the frames never began."""

    def __init__(self, frames: AsyncGenerator[bytes, None], events: AsyncIterator[Any], content_type: str) -> None:
        self.frames = frames
        self.events = events
        self.status_code = 200
        self.background = None
        self.raw_headers = [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with contextlib.aclosing(self.frames) as frames:
                async for frame in frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
        finally:
            await _close(self.events)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
