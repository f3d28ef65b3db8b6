"""The matrix of errors, byte by byte: every situation on every route that can get into it, on both servers, in the dialect of the
route, before the first byte of a stream and in its middle. Source: ollama server/routes.go, sched.go, llm/llama_server.go,
fb30760, compared with the answers of the real server.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import pytest

from api_servers import KINDS, ApiServer, Kind
from asgi_client import Answer
from corral.core.ports import Chunk
from corral.core.records import Capability
from corral.engines.llama_http import LlamaHttp
from corral.wire.errors import CorralError
from corral.wire.frames import SseDecoder
from corral.wire.secrets import Secret
from fakes_engine import RawServer, raw_server
from fakes_inference import FakeRunner, a_model

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
#: A body that every route takes to its engine.
ANY = {"model": "m", "prompt": "hi", "input": "hi", "messages": MESSAGES, "max_tokens": 9}

NATIVE = ("/api/generate", "/api/chat", "/api/embed", "/api/embeddings")
OPENAI = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
EVERY = NATIVE + OPENAI + ANTHROPIC
#: Route of another dialect -> the native one whose words it takes over.
SPEAKS_AS = {
    "/v1/chat/completions": "/api/chat",
    "/v1/completions": "/api/generate",
    "/v1/embeddings": "/api/embed",
    "/v1/responses": "/api/chat",
    "/v1/messages": "/api/chat",
    "/v1/messages/count_tokens": "/api/chat",
} | {path: path for path in NATIVE}
#: Routes that may stream.
GENERATING = [path for path in EVERY if SPEAKS_AS[path] in ("/api/generate", "/api/chat") and not path.endswith("count_tokens")]
OPENAI_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def told(path: str, status: int, text: str) -> bytes:
    """The body of an error on that route. The id of Anthropic's is not its content: `same` leaves it out."""
    shown = json.dumps(text, ensure_ascii=False)
    if path in OPENAI:
        kind = OPENAI_TYPES.get(status, "api_error")
        return f'{{"error":{{"message":{shown},"type":"{kind}","param":null,"code":null}}}}'.encode()
    if path in ANTHROPIC:
        kind = ANTHROPIC_TYPES.get(status, "api_error")
        return f'{{"type":"error","error":{{"type":"{kind}","message":{shown}}},"request_id":"req_ID"}}'.encode()
    return f'{{"error":{shown}}}'.encode()


def same(answer: Answer, path: str, status: int, text: str) -> None:
    body = re.sub(rb'"req_[0-9a-f]{24}"', b'"req_ID"', answer.body)
    assert (answer.status, body) == (status, told(path, status, text))
    expected = "application/json; charset=utf-8" if path in NATIVE else "application/json"
    assert answer.headers["content-type"] == expected


class Row(NamedTuple):
    """One situation on one native route. more: fields of the request. dialects: whether other routes can get into it too."""

    situation: str
    route: str
    status: int
    text: str
    more: Mapping[str, Any]
    dialects: bool = True


QUEUE_FULL = "server busy, please try again.  maximum pending requests exceeded"
FULL_NAME = "registry.ollama.ai/library/m:latest"

MALFORMED = ("a//b", ":cloud", "file://a")

NAMES = [
    Row("empty", "/api/generate", 404, "model '' not found", {"model": ""}),
    Row("empty", "/api/chat", 400, "model is required", {"model": ""}),
    Row("empty", "/api/embed", 404, "model '' not found", {"model": ""}),
    Row("empty", "/api/embeddings", 400, "model is required", {"model": ""}),
    Row("absent", "/api/generate", 404, "model 'x' not found", {"model": "x"}),
    Row("absent", "/api/chat", 404, "model 'x' not found", {"model": "x"}),
    Row("absent", "/api/embed", 404, 'model "x" not found, try pulling it first', {"model": "x"}),
    Row("absent", "/api/embeddings", 404, 'model "x" not found, try pulling it first', {"model": "x"}),
    *(Row("malformed", route, 400, "invalid model name", {"model": name}) for route in NATIVE for name in MALFORMED),
    *(
        Row("both sources", route, 400, 'use either :local or :cloud, not both: "x:cloud:local"', {"model": "x:cloud:local"})
        for route in NATIVE
    ),
]


def on_every_route(rows: list[Row]) -> list[tuple[str, Row]]:
    """Each row with its own route and those of other dialects that take over its words."""
    return [(path, row) for row in rows for path in EVERY if SPEAKS_AS[path] == row.route and (row.dialects or path == row.route)]


def named(value: object) -> str:
    return f"{value.situation}" if isinstance(value, Row) else str(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("path", "row"), on_every_route(NAMES), ids=named)
async def test_name_that_leads_nowhere_is_told_in_the_words_of_its_route(path: str, row: Row, kind: Kind) -> None:
    same(await ApiServer(kind).post(path, ANY | row.more), path, row.status, row.text)


CANNOT = [
    ("/api/generate", {Capability.EMBEDDING}, {}, '"m" does not support generate'),
    ("/v1/completions", {Capability.EMBEDDING}, {}, '"m" does not support generate'),
    ("/api/chat", {Capability.EMBEDDING}, {}, '"m" does not support chat'),
    ("/v1/chat/completions", {Capability.EMBEDDING}, {}, '"m" does not support chat'),
    ("/v1/responses", {Capability.EMBEDDING}, {}, '"m" does not support chat'),
    ("/v1/messages", {Capability.EMBEDDING}, {}, '"m" does not support chat'),
    ("/v1/messages/count_tokens", {Capability.EMBEDDING}, {}, '"m" does not support chat'),
    ("/api/chat", {Capability.COMPLETION}, {"tools": TOOLS}, f"{FULL_NAME} does not support tools"),
    ("/v1/chat/completions", {Capability.COMPLETION}, {"tools": TOOLS}, f"{FULL_NAME} does not support tools"),
    (
        "/v1/responses",
        {Capability.COMPLETION},
        {"tools": [{"type": "function", "name": "f"}]},
        f"{FULL_NAME} does not support tools",
    ),
    ("/v1/messages", {Capability.COMPLETION}, {"tools": [{"name": "f"}]}, f"{FULL_NAME} does not support tools"),
    ("/api/generate", {Capability.COMPLETION}, {"raw": True, "suffix": "x"}, f"{FULL_NAME} does not support insert"),
    ("/api/generate", {Capability.COMPLETION}, {"think": True}, '"m" does not support thinking'),
    ("/api/chat", {Capability.COMPLETION}, {"think": "high"}, '"m" does not support thinking'),
    ("/v1/chat/completions", {Capability.COMPLETION}, {"reasoning_effort": "low"}, '"m" does not support thinking'),
    ("/v1/responses", {Capability.COMPLETION}, {"reasoning": {"effort": "low"}}, '"m" does not support thinking'),
    ("/api/generate", {Capability.IMAGE}, {}, "image generation models are not currently supported"),
    ("/v1/completions", {Capability.IMAGE}, {}, "image generation models are not currently supported"),
    (
        "/api/generate",
        {Capability.COMPLETION},
        {"raw": True, "system": "s"},
        "raw mode does not support template, system, or context",
    ),
    (
        "/api/generate",
        {Capability.COMPLETION},
        {"raw": True, "template": "t"},
        "raw mode does not support template, system, or context",
    ),
    (
        "/api/generate",
        {Capability.COMPLETION},
        {"raw": True, "context": [1]},
        "raw mode does not support template, system, or context",
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("path", "has", "more", "text"), CANNOT)
async def test_what_a_model_cannot_is_refused_before_anything_runs(
    path: str, has: set[Capability], more: dict[str, Any], text: str, kind: Kind
) -> None:
    server = ApiServer(kind, model=a_model("m", capabilities=frozenset(has)))
    same(await server.post(path, ANY | more), path, 400, text)
    assert server.runner.calls == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/api/generate", "/v1/completions"])
async def test_engine_that_knows_no_markers_for_a_gap_means_that_insert_is_missing(path: str, kind: Kind) -> None:
    refusal = CorralError("bad_request", "Infill is not supported by this model", status=501)
    server = ApiServer(kind, FakeRunner(refusal), model=a_model("m"))
    same(await server.post(path, {**ANY, "suffix": "x"}), path, 400, f"{FULL_NAME} does not support insert")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("path", EVERY)
async def test_full_queue_is_a_503(path: str, is_stream: bool, kind: Kind) -> None:
    server = ApiServer(kind, pool_fails=CorralError("busy"))
    same(await server.post(path, {**ANY, "stream": is_stream}), path, 503, QUEUE_FULL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", EVERY)
async def test_model_that_does_not_load_is_a_500_with_the_engines_last_words(path: str, kind: Kind) -> None:
    text = "the engine ended while it loaded the model (exit status 1): unknown model architecture: 'x'"
    server = ApiServer(kind, pool_fails=CorralError("engine_failed", text))
    same(await server.post(path, ANY), path, 500, text)


@pytest.mark.parametrize("path", EVERY)
async def test_wait_that_was_canceled_is_a_499(path: str) -> None:
    server = ApiServer(pool_fails=CorralError("canceled"))
    same(await server.post(path, ANY), path, 499, "request canceled")


@pytest.mark.parametrize("path", GENERATING)
async def test_caller_who_left_while_waiting_is_told_nothing_and_logged_as_499(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = ApiServer(runner=FakeRunner(Chunk(content="x")))
    server.runner.go_on = asyncio.Event()
    with caplog.at_level(logging.INFO, "corral.access"):
        answer = await server.post(path, {**ANY, "stream": False}, leave_after=0)
    assert (answer.status, answer.body) == (0, b"")
    assert [record.fields["status"] for record in caplog.records if record.name == "corral.access"] == [499]  # type: ignore[attr-defined]
    assert (server.pool.lent, server.runner.open_answers) == (0, 0)


# ── Errors of a real HTTP engine ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def engine() -> AsyncIterator[RawServer]:
    async with raw_server() as served:
        yield served


async def gone() -> CorralError:
    return CorralError("engine_failed", "signal 9")


async def never() -> None:
    raise AssertionError("no test here lets a template go on for ever")


class _Runner(LlamaHttp):
    """A runner that is only HTTP."""

    def __init__(self, served: RawServer) -> None:
        super().__init__(served.url, Secret("k"), gone, stop=never)

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        return await super().tokenize(text, add_special=add_special)


#: Native route -> where the engine is asked.
ENGINE_PATHS = {"/api/generate": "/v1/chat/completions", "/api/chat": "/v1/chat/completions", "/api/embed": "/v1/embeddings"}
STATUSES = [(400, "no such grammar"), (413, "too much"), (500, "boom"), (503, "Loading model")]


@pytest.mark.parametrize(("status", "text"), STATUSES)
@pytest.mark.parametrize("path", [path for path in EVERY if not path.endswith(("count_tokens", "/embeddings"))])
async def test_refusal_of_the_engine_keeps_its_status_and_words(path: str, status: int, text: str, engine: RawServer) -> None:
    engine.answer(ENGINE_PATHS[SPEAKS_AS[path]], {"error": {"code": status, "message": text, "type": "t"}}, status=status)
    engine.answer("/tokenize", {"tokens": [1]})
    engine.answer("/apply-template", {"prompt": "hi"})
    server = ApiServer(runner=_Runner(engine))
    same(await server.post(path, {**ANY, "stream": True}), path, status, text)


async def test_refusal_of_the_engine_is_a_500_on_the_older_route_of_embeddings(engine: RawServer) -> None:
    engine.answer("/v1/embeddings", {"error": {"code": 400, "message": "no", "type": "t"}}, status=400)
    engine.answer("/tokenize", {"tokens": [1]})
    server = ApiServer(runner=_Runner(engine))
    same(await server.post("/api/embeddings", ANY), "/api/embeddings", 500, "no")


NO_ANSWER = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error: signal 9"
BROKEN_OFF = "an error was encountered while running the model: signal 9"


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("path", GENERATING)
async def test_engine_that_dies_before_its_first_byte_is_a_500(path: str, is_stream: bool, engine: RawServer) -> None:
    engine.answers["/v1/chat/completions"] = [None]
    server = ApiServer(runner=_Runner(engine))
    same(await server.post(path, {**ANY, "stream": is_stream}), path, 500, NO_ANSWER)


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings", "/v1/embeddings"])
async def test_engine_that_dies_while_it_embeds_is_a_500(path: str, engine: RawServer) -> None:
    engine.answers["/v1/embeddings"] = [None]
    same(await ApiServer(runner=_Runner(engine)).post(path, ANY), path, 500, NO_ANSWER)


HEL = {"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]}


@pytest.mark.parametrize("path", GENERATING)
async def test_engine_that_dies_in_the_middle_of_a_collected_answer_is_a_500(path: str, engine: RawServer) -> None:
    engine.stream("/v1/chat/completions", HEL, None)
    server = ApiServer(runner=_Runner(engine))
    same(await server.post(path, {**ANY, "stream": False}), path, 500, BROKEN_OFF)


#: The last frame of a stream that failed, in the form of each dialect. Nothing follows it.
LAST_FRAMES = {
    "/api/generate": b'{"error":"gone"}\n',
    "/api/chat": b'{"error":"gone"}\n',
    "/v1/chat/completions": b'data: {"error":{"message":"gone","type":"api_error","param":null,"code":null}}\n\n',
    "/v1/completions": b'data: {"error":{"message":"gone","type":"api_error","param":null,"code":null}}\n\n',
    "/v1/messages": b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"gone"}}\n\n',
}
ENDINGS = (b"[DONE]", b"message_stop", b"response.completed", b'"done":true')


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", GENERATING)
async def test_error_in_the_middle_of_a_stream_is_its_last_frame_in_the_dialects_own_form(path: str, kind: Kind) -> None:
    server = ApiServer(kind, FakeRunner(Chunk(content="Hel"), CorralError("engine_failed", "gone")))
    answer = await server.post(path, {**ANY, "stream": True})
    assert answer.status == 200
    assert b"Hel" in b"".join(answer.parts[:-1])
    assert not any(ending in answer.body for ending in ENDINGS)
    if path == "/v1/responses":
        last = SseDecoder().feed(answer.parts[-1])[-1]
        failed = json.loads(last.data)
        assert (last.name, failed["type"]) == ("response.failed", "response.failed")
        assert failed["response"]["status"] == "failed"
        assert failed["response"]["error"] == {"code": "server_error", "message": "gone"}
        assert failed["sequence_number"] == len(SseDecoder().feed(answer.body)) - 1
    else:
        assert answer.parts[-1] == LAST_FRAMES[path]


@pytest.mark.parametrize("path", GENERATING)
async def test_engine_that_dies_in_the_middle_of_a_stream_is_told_in_its_last_frame(path: str, engine: RawServer) -> None:
    engine.stream("/v1/chat/completions", HEL, None)
    answer = await ApiServer(runner=_Runner(engine)).post(path, {**ANY, "stream": True})
    assert answer.status == 200
    assert BROKEN_OFF.encode() in answer.parts[-1]
    assert not any(ending in answer.body for ending in ENDINGS)


# ── Requests that are refused for what they say ──────────────────────────────────────────────────────────────────────

FORMAT = 'invalid format: "\\"yaml\\""; expected "json" or a valid JSON Schema object'
THINK = 'invalid think value: "x" (must be "high", "medium", "low", "max", true, or false)'
REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    *((path, {"format": "yaml"}, 500, FORMAT) for path in ("/api/generate", "/api/chat")),
    *((path, {"think": "x"}, 400, THINK) for path in ("/api/generate", "/api/chat")),
    *((path, {"top_logprobs": 21}, 400, "top_logprobs must be between 0 and 20") for path in ("/api/generate", "/api/chat")),
    *((path, {"keep_alive": "10"}, 400, 'time: missing unit in duration "10"') for path in NATIVE),
    *((path, {"keep_alive": True}, 400, "Unsupported type: 'bool'") for path in NATIVE),
    *((path, {"options": {"num_ctx": "x"}}, 500, 'option "num_ctx" must be of type integer') for path in NATIVE),
    *((path, {"options": {"temperature": "x"}}, 500, 'option "temperature" must be of type float32') for path in NATIVE),
    *((path, {"options": {"use_mmap": 1}}, 500, 'option "use_mmap" must be of type boolean') for path in NATIVE),
    *((path, {"options": {"stop": "x"}}, 500, 'option "stop" must be of type array') for path in NATIVE),
    ("/api/embed", {"input": 1}, 400, "invalid input type"),
    ("/api/embed", {"input": ["a", 1]}, 400, "invalid input type"),
    ("/api/chat", {"messages": [{"role": "user", "images": ["@"]}]}, 400, "illegal base64 data at input byte 0"),
    ("/v1/chat/completions", {"messages": []}, 400, "[] is too short - 'messages'"),
    (
        "/v1/chat/completions",
        {"reasoning_effort": "x"},
        400,
        'invalid reasoning value: "x" (must be "minimal", "low", "medium", "high", "xhigh", "ultra", "max", or "none")',
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "invalid message content type: <nil>"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
        400,
        "image URLs are not currently supported, please use base64 encoded data instead",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/gif;base64,aGk="}]}]},
        400,
        "invalid image input",
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "invalid message format"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
        400,
        "invalid tool call arguments",
    ),
    ("/v1/completions", {"stop": [1]}, 400, "invalid type for 'stop' field: float64"),
    (
        "/v1/embeddings",
        {"encoding_format": "x"},
        400,
        "Invalid value for 'encoding_format' = x. Supported values: ['float', 'base64'].",
    ),
    ("/v1/embeddings", {"input": []}, 400, "invalid input"),
    ("/v1/embeddings", {"input": None}, 400, "invalid input"),
    ("/v1/responses", {"input": [{"type": "x"}]}, 400, 'input[0]: unknown input item type: "x"'),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
        400,
        "file inputs are not currently supported",
    ),
    ("/v1/messages", {"max_tokens": 0}, 400, "max_tokens is required and must be positive"),
    ("/v1/messages", {"messages": []}, 400, "messages is required"),
    (
        "/v1/messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]},
        400,
        "invalid image source type: url. Only base64 images are supported.",
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("path", "more", "status", "text"), REFUSED)
async def test_request_that_says_something_impossible_is_refused(
    path: str, more: dict[str, Any], status: int, text: str, kind: Kind
) -> None:
    same(await ApiServer(kind).post(path, ANY | more), path, status, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [*NATIVE, "/api/show"])
async def test_body_of_nothing_is_missing(path: str, kind: Kind) -> None:
    for body in (b"", b"  \n"):
        same(await ApiServer(kind).post(path, raw=body), path if path in NATIVE else NATIVE[0], 400, "missing request body")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", OPENAI + ANTHROPIC)
async def test_body_of_nothing_is_an_end_of_file_to_other_dialects(path: str, kind: Kind) -> None:
    same(await ApiServer(kind).post(path, raw=b""), path, 400, "EOF")


@pytest.mark.parametrize("path", EVERY)
async def test_body_that_is_no_json_is_told_in_gos_words(path: str) -> None:
    same(await ApiServer().post(path, raw=b'{"model":}'), path, 400, "invalid character '}' looking for beginning of value")
    same(await ApiServer().post(path, raw=b'{"model":"m"'), path, 400, "unexpected EOF")
