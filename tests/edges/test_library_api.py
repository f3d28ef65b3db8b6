"""/api/pull and /api/push as their callers see them: statuses, streams, texts, and who is kept out."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from asgi_client import Answer, Caller
from corral.core.registry import Visibility
from corral.edges.asgi import App, AppOptions, Dialect
from corral.edges.library_api import transfer_endpoints
from corral.edges.local_guard import LocalGuard
from corral.wire.create import ProgressEvent
from corral.wire.errors import CorralError


class ScriptedTransfer:
    """Tells what the test says. fails_after: so many events."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.events = [
            ProgressEvent(status="pulling manifest"),
            ProgressEvent(status="pulling 000000000000", digest="sha256:0", total=10, completed=5),
            ProgressEvent(status="success"),
        ]
        self.error: CorralError | None = None
        self.fails_after = 0
        self.closed = 0

    async def pull(self, requested: str, *, insecure: bool = False) -> AsyncGenerator[ProgressEvent, None]:
        self.asked.append((requested, insecure))
        async for event in self._events():
            yield event

    async def push(
        self, requested: str, *, insecure: bool = False, visibility: Visibility | None = None
    ) -> AsyncGenerator[ProgressEvent, None]:
        self.asked.append((requested, insecure, visibility))
        async for event in self._events():
            yield event

    async def _events(self) -> AsyncGenerator[ProgressEvent, None]:
        try:
            for index, event in enumerate(self.events):
                if self.error is not None and index == self.fails_after:
                    raise self.error
                yield event
        finally:
            self.closed += 1


@pytest.fixture
def transfer() -> ScriptedTransfer:
    return ScriptedTransfer()


async def post(transfer: ScriptedTransfer, path: str, body: Any, **more: Any) -> Answer:
    guard = LocalGuard(hostname="here", hosts=["127.0.0.1"], origins=[])
    app = App(transfer_endpoints(transfer), AppOptions(guard=guard, fallback=lambda _: Dialect.TEXT))
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await Caller(app, host="localhost:11434").request("POST", path, body=content, **more)


async def test_pull_streams_by_default(transfer: ScriptedTransfer) -> None:
    found = await post(transfer, "/api/pull", {"model": "alice/tiny"})
    assert (found.status, found.headers["content-type"]) == (200, "application/x-ndjson")
    assert found.body == (
        b'{"status":"pulling manifest"}\n'
        b'{"status":"pulling 000000000000","digest":"sha256:0","total":10,"completed":5}\n'
        b'{"status":"success"}\n'
    )
    assert transfer.asked == [("alice/tiny", False)]


async def test_pull_without_stream_answers_the_last_event(transfer: ScriptedTransfer) -> None:
    found = await post(transfer, "/api/pull", {"name": "x", "insecure": True, "stream": False})
    assert (found.status, found.headers["content-type"], found.body) == (200, "application/json", b'{"status":"success"}')
    assert transfer.asked == [("x", True)]


async def test_model_goes_before_name(transfer: ScriptedTransfer) -> None:
    await post(transfer, "/api/pull", {"model": "a", "name": "b"})
    assert transfer.asked[0][0] == "a"


@pytest.mark.parametrize(("visibility", "meant"), [("private", Visibility.PRIVATE), ("public", Visibility.PUBLIC), (None, None)])
async def test_push_asks_for_a_visibility(visibility: str | None, meant: Visibility | None, transfer: ScriptedTransfer) -> None:
    body = {"model": "x", "username": "u", "password": "p", "visibility": visibility}
    assert (await post(transfer, "/api/push", body)).status == 200
    assert transfer.asked == [("x", False, meant)]


async def test_push_for_a_visibility_there_is_not_is_refused(transfer: ScriptedTransfer) -> None:
    assert (await post(transfer, "/api/push", {"model": "x", "visibility": "secret"})).status == 400
    assert transfer.asked == []


async def test_error_before_the_first_event_is_a_status(transfer: ScriptedTransfer) -> None:
    transfer.error = CorralError("bad_request", "invalid model name")
    found = await post(transfer, "/api/pull", {"model": "../x"})
    assert (found.status, found.json()) == (400, {"error": "invalid model name"})


async def test_error_after_the_first_event_is_the_last_line(transfer: ScriptedTransfer) -> None:
    transfer.error, transfer.fails_after = CorralError("not_found", "pull model manifest: file does not exist", status=500), 1
    found = await post(transfer, "/api/pull", {"model": "x"})
    assert found.status == 200
    assert found.body.splitlines()[-1] == b'{"error":"pull model manifest: file does not exist"}'


async def test_error_without_stream_is_500(transfer: ScriptedTransfer) -> None:
    transfer.error, transfer.fails_after = CorralError("not_found", "pull model manifest: file does not exist", status=500), 1
    found = await post(transfer, "/api/pull", {"model": "x", "stream": False})
    assert (found.status, found.json()) == (500, {"error": "pull model manifest: file does not exist"})


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/api/push", {}, "model is required"),
        ("/api/push", {"model": ""}, "model is required"),
        ("/api/pull", b"", "missing request body"),
        ("/api/push", b"", "missing request body"),
    ],
)
async def test_request_that_names_nothing_is_refused(path: str, body: Any, text: str, transfer: ScriptedTransfer) -> None:
    found = await post(transfer, path, body)
    assert (found.status, found.json()) == (400, {"error": text})


async def test_caller_who_leaves_ends_the_transfer(transfer: ScriptedTransfer) -> None:
    await post(transfer, "/api/pull", {"model": "x"}, leave_after=1)
    assert transfer.closed == 1


@pytest.mark.parametrize("path", ["/api/pull", "/api/push"])
@pytest.mark.parametrize("origin", ["https://evil.example", "chrome-extension://abc", "null"])
async def test_t088_web_pages_and_extensions_move_no_models(path: str, origin: str, transfer: ScriptedTransfer) -> None:
    found = await post(transfer, path, {"model": "x"}, headers={"origin": origin})
    assert found.status == 403
    assert transfer.asked == []
