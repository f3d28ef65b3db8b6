"""/api/create, /api/copy, /api/delete and /api/blobs as their callers see them: statuses, streams, texts, and who is kept out."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from asgi_client import Answer, Caller
from corral.edges.asgi import App, AppOptions, Dialect
from corral.edges.create_api import CreateApi
from corral.edges.local_guard import LocalGuard
from corral.wire.create import CreateRequest, ProgressEvent
from corral.wire.errors import CorralError

DIGEST = "sha256:" + "0" * 64


class ScriptedLibrary:
    """Answers with what the test says. asked: what arrived. fails_after: so many events."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.events = [
            ProgressEvent(status="parsing GGUF"),
            ProgressEvent(status="quantizing", digest="0", total=10, completed=5),
            ProgressEvent(status="success"),
        ]
        self.error: CorralError | None = None
        self.fails_after = 0
        self.blob: bytes | None = None
        self.closed = 0

    async def create(self, request: CreateRequest) -> AsyncGenerator[ProgressEvent, None]:
        self.asked.append(request)
        try:
            for index, event in enumerate(self.events):
                if self.error is not None and index == self.fails_after:
                    raise self.error
                yield event
        finally:
            self.closed += 1

    async def copy(self, source: str, destination: str) -> None:
        self.asked.append((source, destination))
        self._fail()

    async def delete(self, requested: str) -> None:
        self.asked.append(requested)
        self._fail()

    def require_blob(self, text: str) -> None:
        self.asked.append(text)
        self._fail()

    async def put_blob(self, text: str, chunks: AsyncIterator[bytes]) -> bool:
        self.asked.append(text)
        self._fail()
        if self.blob is not None:
            return False
        self.blob = b"".join([chunk async for chunk in chunks])
        return True

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def library() -> ScriptedLibrary:
    return ScriptedLibrary()


@pytest.fixture
def caller(library: ScriptedLibrary) -> Caller:
    guard = LocalGuard(hostname="box")
    options = AppOptions(guard=guard, fallback=lambda path: Dialect.TEXT)
    return Caller(App(CreateApi(library).endpoints(), options))


async def create(caller: Caller, body: bytes = b'{"model":"mine","from":"base"}') -> Answer:
    return await caller.request("POST", "/api/create", body=body)


# ── create ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_create_streams_events_without_what_they_do_not_say(caller: Caller) -> None:
    answer = await create(caller)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.parts == [
        b'{"status":"parsing GGUF"}\n',
        b'{"status":"quantizing","digest":"0","total":10,"completed":5}\n',
        b'{"status":"success"}\n',
    ]


async def test_create_without_a_stream_answers_the_last_event(caller: Caller) -> None:
    answer = await create(caller, b'{"model":"mine","from":"base","stream":false}')
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.body == b'{"status":"success"}'


async def test_create_reads_every_field_in_any_case(caller: Caller, library: ScriptedLibrary) -> None:
    body = (
        b'{"Name":"mine","FROM":"base","files":{"a":"d"},"adapters":{},"draft_files":null,"template":"t","system":"s","license":["l"],'
        b'"parameters":{"stop":["x"]},"messages":[{"role":"User","content":"hi"}],"quantize":"q","draft_quantize":"d","renderer":"r",'
        b'"parser":"p","requires":"1","remote_host":"h","info":{"base_name":"b"},"unknown":1}'
    )
    assert (await create(caller, body)).status == 200
    (asked,) = library.asked
    assert (asked.wanted, asked.source, asked.files, asked.adapters, asked.draft_files) == ("mine", "base", {"a": "d"}, {}, None)
    assert (asked.template, asked.system, asked.licenses, asked.parameters) == ("t", "s", ["l"], {"stop": ["x"]})
    assert (asked.quantize, asked.draft_quantize, asked.renderer, asked.parser, asked.requires) == ("q", "d", "r", "p", "1")
    assert (asked.remote_host, asked.info) == ("h", {"base_name": "b"})
    assert [(message.role, message.content) for message in asked.messages] == [("user", "hi")]


async def test_create_that_is_refused_at_once_has_a_real_status(caller: Caller, library: ScriptedLibrary) -> None:
    library.error = CorralError("bad_request", "invalid model name")
    answer = await create(caller)
    assert (answer.status, answer.json()) == (400, {"error": "invalid model name"})


async def test_create_that_fails_later_ends_the_stream_with_the_error(caller: Caller, library: ScriptedLibrary) -> None:
    library.error, library.fails_after = CorralError("bad_request", "unknown type"), 1
    answer = await create(caller)
    assert answer.status == 200
    assert answer.parts[-1] == b'{"error":"unknown type"}\n'


async def test_create_that_fails_without_a_stream_has_the_errors_status(caller: Caller, library: ScriptedLibrary) -> None:
    library.error, library.fails_after = CorralError("bad_request", "no quantization", status=500), 1
    answer = await create(caller, b'{"model":"mine","from":"base","stream":false}')
    assert (answer.status, answer.json()) == (500, {"error": "no quantization"})
    assert library.closed == 1


async def test_create_stops_when_its_caller_leaves(caller: Caller, library: ScriptedLibrary) -> None:
    await caller.request("POST", "/api/create", body=b'{"model":"mine"}', leave_after=1)
    assert library.closed == 1


@pytest.mark.parametrize(("method", "path"), [("POST", "/api/create"), ("POST", "/api/copy"), ("DELETE", "/api/delete")])
async def test_request_without_a_body_is_refused_in_ollamas_words(caller: Caller, method: str, path: str) -> None:
    answer = await caller.request(method, path)
    assert (answer.status, answer.json()) == (400, {"error": "missing request body"})


# ── copy and delete ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_copy_answers_nothing(caller: Caller, library: ScriptedLibrary) -> None:
    answer = await caller.request("POST", "/api/copy", body=b'{"source":"a","destination":"b"}')
    assert (answer.status, answer.body) == (200, b"")
    assert library.asked == [("a", "b")]


@pytest.mark.parametrize("body", [b'{"model":"a"}', b'{"name":"a"}', b'{"model":"a","name":"b"}'])
async def test_delete_answers_nothing(caller: Caller, library: ScriptedLibrary, body: bytes) -> None:
    answer = await caller.request("DELETE", "/api/delete", body=body)
    assert (answer.status, answer.body) == (200, b"")
    assert library.asked == ["a"]


async def test_delete_of_an_unknown_model_is_404(caller: Caller, library: ScriptedLibrary) -> None:
    library.error = CorralError("not_found", "model 'a' not found")
    answer = await caller.request("DELETE", "/api/delete", body=b'{"model":"a"}')
    assert (answer.status, answer.json()) == (404, {"error": "model 'a' not found"})


# ── blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_blob_is_asked_for_and_sent(caller: Caller, library: ScriptedLibrary) -> None:
    assert (await caller.request("HEAD", f"/api/blobs/{DIGEST}")).status == 200
    content = b"x" * (21 << 20)  # more than any other route takes
    answer = await caller.request("POST", f"/api/blobs/{DIGEST}", body=content)
    assert (answer.status, answer.body) == (201, b"")
    assert library.blob == content
    assert (await caller.request("POST", f"/api/blobs/{DIGEST}", body=b"again")).status == 200
    assert library.asked == [DIGEST, DIGEST, DIGEST]


@pytest.mark.parametrize("method", ["HEAD", "POST"])
async def test_blob_under_a_wrong_digest_is_400(caller: Caller, library: ScriptedLibrary, method: str) -> None:
    library.error = CorralError("bad_request", "invalid digest format")
    assert (await caller.request(method, "/api/blobs/sha256:x")).status == 400


async def test_t033_a_digest_is_one_part_of_the_path(caller: Caller, library: ScriptedLibrary) -> None:
    for path in ("/api/blobs/sha256:../x", "/api/blobs/a/b", "/api/blobs/"):
        assert (await caller.request("HEAD", path)).status in (400, 404)
    assert library.asked == []


# ── Who is kept out ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "chrome-extension://abc", "moz-extension://abc"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("DELETE", "/api/delete"),
        ("POST", f"/api/blobs/{DIGEST}"),
        ("HEAD", f"/api/blobs/{DIGEST}"),
    ],
)
async def test_t088_pages_and_extensions_change_nothing(
    caller: Caller, library: ScriptedLibrary, origin: str, method: str, path: str
) -> None:
    headers = {"origin": origin, "content-type": "text/plain"}
    answer = await caller.request(method, path, headers=headers, body=b'{"model":"a","from":"b"}')
    assert answer.status == 403
    assert library.asked == []
