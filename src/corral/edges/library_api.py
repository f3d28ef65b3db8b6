"""The routes that move models between this machine and registries: /api/pull and /api/push, as Ollama answers them.

Source: ollama server/routes.go PullHandler, PushHandler, streamResponse, waitForStream, fb30760.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import MANAGES
from corral.core.registry import Visibility
from corral.edges.asgi import Endpoint, body_of, endpoint
from corral.edges.create_api import last_event
from corral.edges.stream_response import stream
from corral.wire.create import ProgressEvent
from corral.wire.frames import NDJSON, encode_ndjson, ndjson_error
from corral.wire.library import PullRequest, PushRequest
from corral.wire.native import decode, model_required


class TransferService(Protocol):
    """What answers these routes: local.transfer.Transfer."""

    def pull(self, requested: str, *, insecure: bool = False) -> AsyncGenerator[ProgressEvent, None]: ...

    def push(
        self, requested: str, *, insecure: bool = False, visibility: Visibility | None = None
    ) -> AsyncGenerator[ProgressEvent, None]: ...


def transfer_endpoints(transfer: TransferService) -> list[Endpoint]:
    """Every route. Whoever leaves ends the transfer; what has arrived is kept."""

    async def pull(request: Request) -> Response:
        """Bring a model here from its registry; events as they come, or the last one alone."""
        asked = decode(body_of(request), PullRequest)
        return await _answer(request, transfer.pull(asked.wanted, insecure=bool(asked.insecure)), asked)

    async def push(request: Request) -> Response:
        """Send a model to its registry; `visibility` (`private`, `public`) is an addition of ours, for Corral hubs."""
        asked = decode(body_of(request), PushRequest)
        if not asked.wanted:
            raise model_required()
        visibility = Visibility(asked.visibility) if asked.visibility is not None else None
        events = transfer.push(asked.wanted, insecure=bool(asked.insecure), visibility=visibility)
        return await _answer(request, events, asked)

    return [
        endpoint("POST", "/api/pull", pull, MANAGES, cancel_on_disconnect=True),
        endpoint("POST", "/api/push", push, MANAGES, cancel_on_disconnect=True),
    ]


async def _answer(request: Request, events: AsyncGenerator[ProgressEvent, None], asked: PullRequest) -> Response:
    """Events as they come, or the last one alone."""
    if asked.stream is not False:
        return await stream(request, events, encode_ndjson, content_type=NDJSON, error_frame=ndjson_error)
    return await last_event(events)
