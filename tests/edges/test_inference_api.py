"""The inference routes over ASGI: bytes on the wire, dialects, streams that fail or are left."""

import asyncio
import gzip
import json
import re
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from asgi_client import Answer, Caller
from corral.core.policy import CLIENT_PROOFS, PUBLIC, Access
from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, Timings
from corral.core.records import Capability, Model, Principal, RequestFacts, Scope
from corral.edges import inference_api
from corral.edges.asgi import App, AppOptions
from corral.edges.inference_api import inference_endpoints, ps_endpoint
from corral.hub.hosting import Hosting
from corral.hub.inference import HostedInference
from corral.hub.metering import UsageMeter
from corral.hub.running import RunningRequests
from corral.wire.errors import CorralError
from corral.wire.frames import SseDecoder
from fakes import NOON, FakeClock, MemoryUsage
from fakes_inference import (
    STOP,
    FakePool,
    FakeRelay,
    FakeRunner,
    FakeStream,
    FakeUpstreams,
    Step,
    a_caller,
    a_hosted,
    a_hosting,
    a_model,
)

TIME = "2026-09-21T14:13:20Z"
METRICS = (
    '"load_duration":41234567,"prompt_eval_count":11,"prompt_eval_duration":70000000,"eval_count":9,"eval_duration":300000000'
)
MESSAGES = [{"role": "user", "content": "hi"}]
UPSTREAM_EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


async def always(principal: Principal) -> bool:
    return True


@dataclass
class Server:
    """The routes as a hub has them, over fakes, and a caller with a key unless told otherwise."""

    runner: FakeRunner = field(default_factory=FakeRunner)
    relay: FakeRelay | None = None
    model: Model = field(default_factory=lambda: a_model("m", capabilities=frozenset(Capability) - {Capability.IMAGE}))
    pool: FakePool = field(init=False)
    usage: MemoryUsage = field(default_factory=MemoryUsage)
    pool_fails: CorralError | None = None

    async def post(self, path: str, body: Any = None, *, raw: bytes | None = None, **options: Any) -> Answer:
        return await self.call("POST", path, raw if raw is not None else json.dumps(body).encode(), **options)

    async def call(self, method: str, path: str, body: bytes = b"", *, key: str = "ada", **options: Any) -> Answer:
        headers = {"authorization": key, **options.pop("headers", {})} if key else options.pop("headers", {})
        return await Caller(await self._app()).request(method, path, headers=headers, body=body, **options)

    async def _app(self) -> App:
        self.pool = FakePool(self.runner, fails=self.pool_fails)
        elsewhere = a_hosted("big", upstream_url="http://10.0.0.9:8000", upstream_model="meta/big")
        hidden = a_hosted("bob/secret", is_public=False)
        mine = a_hosted("m", model=self.model)
        self.meter = UsageMeter(self.usage)
        service = HostedInference(
            hosting=Hosting(await a_hosting(mine, hidden, elsewhere)),
            runners=self.pool,
            usage=self.meter,
            running=RunningRequests(always),
            clock=FakeClock(),
            upstreams=FakeUpstreams(),
            relay=self.relay,
        )
        access = Access(CLIENT_PROOFS, Scope.INFERENCE)
        rows = inference_endpoints(service, access, PUBLIC, upstreams=service if self.relay else None)
        return App(rows, AppOptions(authenticate=authenticate))


async def authenticate(facts: RequestFacts) -> Principal | None:
    """A stand-in for the hub's door: the header is the account's name."""
    names = facts.headers.get("authorization")
    return a_caller(names[0]) if names else None


def serving(*answer: Step, **fields: Any) -> Server:
    return Server(FakeRunner(*answer), **fields)


def lines(answer: Answer) -> list[str]:
    return answer.body.decode().splitlines()


# ── Native routes ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_chat_streams_the_trace_line_by_line() -> None:
    answer = await serving(Chunk(thinking="User greets"), Chunk(content="Hello"), Finish(reason="stop", timings=Timings())).post(
        "/api/chat", {"model": "m", "messages": MESSAGES, "think": True}
    )
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    start = f'{{"model":"m","created_at":"{TIME}",'
    assert [part.decode() for part in answer.parts] == [
        start + '"message":{"role":"assistant","content":"","thinking":"User greets"},"done":false}\n',
        start + '"message":{"role":"assistant","content":"Hello"},"done":false}\n',
        start + '"message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","load_duration":41234567}\n',
    ]


async def test_chat_without_stream_is_one_object() -> None:
    answer = await serving().post("/api/chat", {"model": "m", "messages": MESSAGES, "stream": False})
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.body.decode() == (
        f'{{"model":"m","created_at":"{TIME}","message":{{"role":"assistant","content":"Hello"}},"done":true,'
        f'"done_reason":"stop",{METRICS}}}'
    )


async def test_generate_streams_and_collects() -> None:
    body = {"model": "m", "prompt": "hi"}
    assert [json.loads(line).get("response") for line in lines(await serving().post("/api/generate", body))] == ["Hel", "lo", ""]
    answer = await serving().post("/api/generate", {**body, "stream": False})
    assert answer.body.decode() == (
        f'{{"model":"m","created_at":"{TIME}","response":"Hello","done":true,"done_reason":"stop","context":[5,7],{METRICS}}}'
    )


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/api/generate", {"model": "m"}, '"response":"","done":true,"done_reason":"load"}'),
        ("/api/generate", {"model": "m", "keep_alive": 0}, '"response":"","done":true,"done_reason":"unload"}'),
        (
            "/api/chat",
            {"model": "m", "stream": True},
            '"message":{"role":"assistant","content":""},"done":true,"done_reason":"load"}',
        ),
    ],
)
async def test_loading_is_answered_by_one_object_even_as_a_stream(path: str, body: dict[str, Any], told: str) -> None:
    answer = await serving().post(path, body)
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.body.decode() == f'{{"model":"m","created_at":"{TIME}",{told}'


async def test_body_is_json_whatever_its_content_type() -> None:
    answer = await serving().post(
        "/api/generate",
        {"MODEL": "m", "Prompt": "hi", "stream": False, "zz": 1},
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert answer.status == 200


async def test_embed_and_embeddings_answer_in_their_forms() -> None:
    answer = await serving().post("/api/embed", {"model": "m", "input": ["a b", "c"]})
    assert answer.body.decode() == (
        '{"model":"m","embeddings":[[0.6,0.8],[0.6,0.8]],"load_duration":41234567,"prompt_eval_count":3}'
    )
    assert (await serving().post("/api/embeddings", {"model": "m", "prompt": "a"})).body == b'{"embedding":[3.0,4.0]}'


async def test_tags_and_show_are_for_anyone_and_hide_what_is_not() -> None:
    answer = await serving().call("GET", "/api/tags", key="")
    assert [row["name"] for row in answer.json()["models"]] == ["big:latest", "m:latest"]
    assert b"gguf" not in (await serving().post("/api/show", {"model": "m"}, key="")).json()["modelfile"].encode()
    bob = await serving().call("GET", "/api/tags", key="bob")
    assert [row["name"] for row in bob.json()["models"]] == ["big:latest", "bob/secret:latest", "m:latest"]
    for name in ("bob/secret", "nope"):
        answer = await serving().post("/api/show", {"name": name})
        assert (answer.status, answer.json()) == (404, {"error": f"model '{name}:latest' not found"})


async def test_show_calls_the_model_what_copilot_asked_for() -> None:
    answer = await serving().post("/api/show", {"model": "M"}, headers={"user-agent": "GitHubCopilotChat/1"})
    assert answer.json()["model_info"]["general.basename"] == "M"


async def test_ps_lists_what_is_loaded() -> None:
    @dataclass
    class Loaded:
        model: Model = field(default_factory=a_model)
        expires_at: Any = NOON
        size_bytes: int = 2
        vram_bytes: int = 1
        context_length: int = 4096

    answer = await Caller(App([ps_endpoint(lambda: [Loaded()], PUBLIC)], AppOptions())).request("GET", "/api/ps")
    (row,) = answer.json()["models"]
    assert (row["name"], row["size_vram"], row["context_length"], row["expires_at"]) == ("m:latest", 1, 4096, TIME)
    answer = await Caller(App([ps_endpoint(list, PUBLIC)], AppOptions())).request("GET", "/api/ps")
    assert answer.body == b'{"models":[]}'


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/api/show"])
async def test_request_without_body_says_so(path: str) -> None:
    answer = await serving().post(path, raw=b"")
    assert (answer.status, answer.json()) == (400, {"error": "missing request body"})


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/generate", {}, 404, "model '' not found"),
        ("/api/chat", {}, 400, "model is required"),
        ("/api/embed", {}, 404, "model '' not found"),
        ("/api/embeddings", {}, 400, "model is required"),
        ("/api/show", {}, 400, "model is required"),
        ("/api/generate", {"model": "x", "prompt": "p"}, 404, "model 'x' not found"),
        ("/api/chat", {"model": "x", "messages": MESSAGES}, 404, "model 'x' not found"),
        ("/api/embed", {"model": "x"}, 404, 'model "x" not found, try pulling it first'),
        ("/api/embeddings", {"model": "x"}, 404, 'model "x" not found, try pulling it first'),
        ("/api/chat", {"model": "a//b"}, 400, "invalid model name"),
        ("/api/generate", {"model": "x:cloud:local"}, 400, 'use either :local or :cloud, not both: "x:cloud:local"'),
        ("/api/chat", {"model": "m", "top_logprobs": 21}, 400, "top_logprobs must be between 0 and 20"),
        ("/api/embed", {"model": "m", "input": 1}, 400, "invalid input type"),
        ("/api/embed", {"model": "x", "input": 1}, 400, "invalid input type"),
        (
            "/api/show",
            {"model": "x", "options": "x"},
            400,
            "json: cannot unmarshal string into Go struct field ShowRequest.options of type map[string]interface {}",
        ),
        ("/api/chat", {"model": "m", "messages": MESSAGES, "options": {"stop": "x"}}, 500, 'option "stop" must be of type array'),
        ("/api/chat", {"model": "m", "messages": MESSAGES, "keep_alive": "10"}, 400, 'time: missing unit in duration "10"'),
    ],
)
async def test_errors_have_ollamas_status_and_text(path: str, body: dict[str, Any], status: int, text: str) -> None:
    answer = await serving().post(path, body)
    assert (answer.status, answer.json()) == (status, {"error": text})


RUNS = [
    *(f"/api/{name}" for name in ("generate", "chat", "embed", "embeddings")),
    *(f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "responses")),
    *(f"/v1/messages{more}" for more in ("", "/count_tokens")),
]


@pytest.mark.parametrize("path", RUNS)
async def test_running_a_model_needs_a_credential(path: str) -> None:
    assert (await serving().post(path, {"model": "m"}, key="")).status == 401


# A body that every route takes to its engine.
ANY = {"model": "m", "prompt": "hi", "input": "hi", "messages": MESSAGES, "max_tokens": 9}
NATIVE_RUNS = RUNS[:4]


@pytest.mark.parametrize("path", NATIVE_RUNS)
async def test_full_queue_is_told_in_ollamas_words(path: str) -> None:
    server = serving()
    server.pool_fails = CorralError("busy")
    answer = await server.post(path, ANY)
    text = "server busy, please try again.  maximum pending requests exceeded"
    assert (answer.status, answer.body.decode()) == (503, f'{{"error":"{text}"}}')


@pytest.mark.parametrize("path", NATIVE_RUNS)
async def test_name_that_is_none_or_two_things_at_once_is_told_in_ollamas_words(path: str) -> None:
    for name, text in (("a//b", "invalid model name"), ("x:cloud:local", 'use either :local or :cloud, not both: \\"{}\\"')):
        answer = await serving().post(path, {**ANY, "model": name})
        assert (answer.status, answer.body.decode()) == (400, f'{{"error":"{text.format(name)}"}}')


@pytest.mark.parametrize(
    ("path", "has", "fields", "text"),
    [
        ("/api/generate", Capability.EMBEDDING, {}, '"m" does not support generate'),
        ("/api/generate", Capability.IMAGE, {"raw": True, "system": "s"}, "image generation models are not currently supported"),
        ("/api/chat", Capability.EMBEDDING, {}, '"m" does not support chat'),
        ("/api/chat", Capability.COMPLETION, {"think": True}, '"m" does not support thinking'),
        ("/api/generate", Capability.COMPLETION, {"think": "low"}, '"m" does not support thinking'),
        (
            "/api/chat",
            Capability.COMPLETION,
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "registry.ollama.ai/library/m:latest does not support tools",
        ),
        (
            "/api/chat",
            Capability.COMPLETION,
            {"think": "x"},
            'invalid think value: "x" (must be "high", "medium", "low", "max", true, or false)',
        ),
        (
            "/api/generate",
            Capability.COMPLETION,
            {"raw": True, "system": "s"},
            "raw mode does not support template, system, or context",
        ),
    ],
)
async def test_what_a_model_cannot_is_told_in_ollamas_words(path: str, has: Capability, fields: Any, text: str) -> None:
    answer = await serving(model=a_model("m", capabilities=frozenset({has}))).post(path, {**ANY, **fields})
    assert (answer.status, answer.json()) == (400, {"error": text})


async def test_model_without_markers_for_a_gap_is_told_in_ollamas_words() -> None:
    refusal = CorralError("bad_request", "Infill is not supported by this model", status=501)
    for path in ("/api/generate", "/v1/completions"):
        answer = await serving(refusal).post(path, {**ANY, "suffix": "x"})
        assert answer.status == 400
        assert "registry.ollama.ai/library/m:latest does not support insert" in answer.body.decode()


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
async def test_engines_own_refusal_keeps_its_status_and_words(path: str) -> None:
    answer = await serving(CorralError("bad_request", "no such grammar", status=422)).post(path, ANY)
    assert (answer.status, answer.json()) == (422, {"error": "no such grammar"})


async def test_format_that_is_none_is_told_in_ollamas_words() -> None:
    answer = await serving().post("/api/chat", {**ANY, "format": "yaml"})
    text = 'invalid format: "\\"yaml\\""; expected "json" or a valid JSON Schema object'
    assert (answer.status, answer.json()) == (500, {"error": text})


async def test_chat_streams_calls_in_its_last_line() -> None:
    calls = [{"id": "call_ab12cd34", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]
    answer = await serving(Chunk(tool_calls=calls), Finish(reason="stop", timings=Timings())).post("/api/chat", ANY)
    assert lines(answer) == [
        f'{{"model":"m","created_at":"{TIME}","message":{{"role":"assistant","content":"","tool_calls":[{{"id":"call_ab12cd34",'
        '"function":{"index":0,"name":"get_weather","arguments":{"city":"Oslo"}}}]},"done":true,"done_reason":"stop",'
        '"load_duration":41234567}'
    ]


async def test_logprobs_have_their_alternatives_only_when_asked_for() -> None:
    token = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [{"token": "e", "logprob": -1.5}]}
    answer = Chunk(content="é", logprobs=[token])
    for asked, more in ((0, ""), (1, ',"top_logprobs":[{"token":"e","logprob":-1.5,"bytes":[101]}]')):
        body = {**ANY, "logprobs": True, "top_logprobs": asked}
        first = lines(await serving(answer, Finish(reason="stop", timings=Timings())).post("/api/chat", body))[0]
        assert first == (
            f'{{"model":"m","created_at":"{TIME}","message":{{"role":"assistant","content":"é"}},"done":false,'
            f'"logprobs":[{{"token":"é","logprob":-0.5,"bytes":[195,169]{more}}}]}}'
        )


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_t095_compressed_bodies_are_refused(path: str) -> None:
    body = gzip.compress(json.dumps({"model": "m", "messages": MESSAGES}).encode())
    for encoding in ("gzip", "zstd", "br"):
        answer = await serving().post(path, raw=body, headers={"content-encoding": encoding})
        assert answer.status == 400
    answer = await serving().post(path, raw=b"x" * 10, headers={"content-length": str(20 * 1024 * 1024 + 1)})
    assert answer.status == 413


async def test_t106_deep_json_is_refused_in_both_dialects() -> None:
    body = b'{"model":"m","messages":' + b"[" * 100_000
    for path in RUNS:
        assert (await serving().post(path, raw=body)).status == 400


# ── OpenAI's routes ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_completion_streams_the_trace() -> None:
    answer = await serving(
        Chunk(content="Hel"), Chunk(content="lo"), Finish(reason="stop", timings=Timings(prompt_tokens=3, eval_tokens=2))
    ).post(
        "/v1/chat/completions",
        {"model": "m", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
    )
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    frames = answer.body.decode().removesuffix("\n\n").split("\n\n")
    completion_id = json.loads(frames[0].removeprefix("data: "))["id"]
    assert completion_id.startswith("chatcmpl-")
    head = (
        f'data: {{"id":"{completion_id}","object":"chat.completion.chunk","created":1790000000,"model":"m",'
        '"system_fingerprint":"fp_ollama",'
    )
    assert frames == [
        head + '"choices":[{"index":0,"delta":{"role":"assistant","content":"Hel"},"finish_reason":null}]}',
        head + '"choices":[{"index":0,"delta":{"content":"lo"},"finish_reason":null}]}',
        head + '"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
        head + '"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}',
        "data: [DONE]",
    ]


async def test_completion_is_one_object_by_default() -> None:
    answer = await serving().post("/v1/chat/completions", {"model": "m", "messages": MESSAGES})
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 9, "total_tokens": 20}


@pytest.mark.parametrize(
    ("body", "status", "kind", "text"),
    [
        (b"", 400, "invalid_request_error", "EOF"),
        (b'{"model":"m"}', 400, "invalid_request_error", "[] is too short - 'messages'"),
        (b'{"model":"x","messages":[{"role":"user","content":"a"}]}', 404, "not_found_error", "model 'x' not found"),
        (b'{"messages":[{"role":"user","content":"a"}]}', 400, "invalid_request_error", "model is required"),
    ],
)
@pytest.mark.parametrize("relay", [None, FakeRelay(FakeStream())])
async def test_completion_errors_have_openais_form(
    body: bytes, status: int, kind: str, text: str, relay: FakeRelay | None
) -> None:
    answer = await Server(relay=relay).post("/v1/chat/completions", raw=body)
    expected = {"error": {"message": text, "type": kind, "param": None, "code": None}}
    assert (answer.status, answer.json()) == (status, expected)
    assert answer.headers["content-type"] == "application/json"


async def test_text_completion_is_one_object_or_a_stream() -> None:
    answer = await serving().post("/v1/completions", {"model": "m", "prompt": "hi"})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    body = answer.json()
    assert body.pop("id").startswith("cmpl-")
    assert body == {
        "object": "text_completion",
        "created": 1790000000,
        "model": "m",
        "system_fingerprint": "fp_ollama",
        "choices": [{"text": "Hello", "index": 0, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 9, "total_tokens": 20},
    }
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = await serving().post("/v1/completions", {"model": "m", "prompt": "hi", **options})
    assert answer.headers["content-type"] == "text/event-stream"
    chunks = answer.body.decode().removesuffix("\n\n").split("\n\n")
    assert [json.loads(chunk[6:])["choices"] for chunk in chunks[:-1]] == [
        [{"text": "Hel", "index": 0, "finish_reason": None}],
        [{"text": "lo", "index": 0, "finish_reason": None}],
        [{"text": "", "index": 0, "finish_reason": "stop"}],
        [],
    ]
    assert (json.loads(chunks[-2][6:])["usage"]["total_tokens"], chunks[-1]) == (20, "data: [DONE]")


async def test_text_completion_takes_a_suffix() -> None:
    server = serving()
    await server.post("/v1/completions", {"model": "m", "prompt": "def f(", "suffix": "return 1"})
    (call,) = server.runner.calls
    assert isinstance(call, CompletionCall)
    assert (call.prompt, call.suffix) == ("def f(", "return 1")


async def test_openais_embeddings_are_numbers_or_bytes() -> None:
    answer = await serving().post("/v1/embeddings", {"model": "m", "input": ["a b", "c"]})
    assert answer.headers["content-type"] == "application/json"
    assert answer.body == (
        b'{"object":"list","data":[{"object":"embedding","embedding":[0.6,0.8],"index":0},'
        b'{"object":"embedding","embedding":[0.6,0.8],"index":1}],"model":"m","usage":{"prompt_tokens":3,"total_tokens":3}}'
    )
    answer = await serving().post("/v1/embeddings", {"model": "m", "input": "", "encoding_format": "base64"})
    assert answer.json()["data"] == [{"object": "embedding", "embedding": "mpkZP83MTD8=", "index": 0}]


async def test_response_is_one_object_or_a_stream() -> None:
    answer = await serving().post("/v1/responses", {"model": "m", "input": "hi", "instructions": "be brief"})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    body = answer.json()
    assert (body["id"][:5], body["status"], body["created_at"], body["completed_at"]) == (
        "resp_",
        "completed",
        1790000000,
        1790000000,
    )
    assert body["output"][0]["content"][0]["text"] == "Hello"
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (11, 9)
    answer = await serving(Chunk(thinking="hm"), Chunk(content="Hi"), STOP).post(
        "/v1/responses", {"model": "m", "input": "hi", "stream": True}
    )
    assert answer.headers["content-type"] == "text/event-stream"
    found = [json.loads(item.data) for item in SseDecoder().feed(answer.body)]
    assert [item["type"] for item in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [item["sequence_number"] for item in found] == list(range(len(found)))


# ── Anthropic's routes ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_messages_stream_the_trace() -> None:
    end = Finish(reason="stop", timings=Timings(prompt_tokens=9, eval_tokens=2))
    answer = await serving(Chunk(content="Hi"), end).post(
        "/v1/messages", {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello there"}], "stream": True}
    )
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    frames = answer.body.decode().removesuffix("\n\n").split("\n\n")
    message_id = json.loads(frames[0].partition("data: ")[2])["message"]["id"]
    assert re.fullmatch("msg_[0-9a-f]{24}", message_id)
    assert frames == [
        'event: message_start\ndata: {"type":"message_start","message":{"id":"' + message_id + '","type":"message",'
        '"role":"assistant","model":"m","content":[],"usage":{"input_tokens":3,"output_tokens":0}}}',
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}',
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}',
        'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
        '"usage":{"input_tokens":9,"output_tokens":2}}',
        'event: message_stop\ndata: {"type":"message_stop"}',
    ]


async def test_message_is_one_object_by_default() -> None:
    answer = await serving().post("/v1/messages?beta=true", ANY, headers={"x-api-key": "k", "anthropic-version": "2023-06-01"})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    message_id = answer.json()["id"]
    assert answer.body.decode() == (
        f'{{"id":"{message_id}","type":"message","role":"assistant","model":"m","content":[{{"type":"text","text":"Hello"}}],'
        '"stop_reason":"end_turn","usage":{"input_tokens":11,"output_tokens":9}}'
    )


async def test_model_that_cannot_think_answers_who_asks_it_to_in_anthropics_dialect() -> None:
    server = serving(model=a_model("m"))
    answer = await server.post("/v1/messages", {**ANY, "thinking": {"type": "enabled", "budget_tokens": 1024}})
    assert answer.status == 200
    (call,) = server.runner.calls
    assert isinstance(call, ChatCall)
    assert call.template_kwargs == {}


async def test_tokens_of_a_prompt_are_counted_and_nothing_runs() -> None:
    server = serving()
    answer = await server.post("/v1/messages/count_tokens", {"model": "m", "system": "be brief", "messages": MESSAGES})
    # system: be brief user: hi
    assert (answer.status, answer.body) == (200, b'{"input_tokens":5}')
    assert server.runner.calls == []
    await server.meter.flush()
    assert [(entry.path, entry.prompt_tokens, entry.eval_tokens) for entry in server.usage.entries] == [
        ("/v1/messages/count_tokens", 0, 0)
    ]


@pytest.mark.parametrize(
    ("body", "status", "kind", "text"),
    [
        (b"", 400, "invalid_request_error", "EOF"),
        (b"{}", 400, "invalid_request_error", "model is required"),
        (b'{"model":"m"}', 400, "invalid_request_error", "max_tokens is required and must be positive"),
        (b'{"model":"m","max_tokens":1}', 400, "invalid_request_error", "messages is required"),
        (
            b'{"model":"x","max_tokens":1,"messages":[{"role":"user","content":"a"}]}',
            404,
            "not_found_error",
            "model 'x' not found",
        ),
    ],
)
async def test_errors_of_messages_have_anthropics_form(body: bytes, status: int, kind: str, text: str) -> None:
    answer = await serving().post("/v1/messages", raw=body)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    told = answer.json()
    assert re.fullmatch("req_[0-9a-f]{24}", told.pop("request_id"))
    assert told == {"type": "error", "error": {"type": kind, "message": text}}


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (CorralError("unauthorized"), 401, "authentication_error"),
        (CorralError("forbidden"), 403, "permission_error"),
        (CorralError("rate_limited"), 429, "rate_limit_error"),
        (CorralError("busy"), 503, "overloaded_error"),
        (CorralError("bad_request", status=529), 529, "overloaded_error"),
        (CorralError("engine_failed"), 500, "api_error"),
    ],
)
async def test_error_types_of_messages_follow_the_status(error: CorralError, status: int, kind: str) -> None:
    answer = await serving(error).post("/v1/messages", ANY)
    assert (answer.status, answer.json()["error"]["type"]) == (status, kind)


async def test_stranger_is_told_in_anthropics_form() -> None:
    answer = await serving().post("/v1/messages", ANY, key="")
    assert (answer.status, answer.json()["error"]["type"]) == (401, "authentication_error")


async def test_models_are_listed_and_found_by_the_name_asked_for() -> None:
    answer = await serving().call("GET", "/v1/models", key="")
    assert answer.body == (
        b'{"object":"list","data":[{"id":"big:latest","object":"model","created":1790000000,"owned_by":"library"},'
        b'{"id":"m:latest","object":"model","created":1790000000,"owned_by":"library"}]}'
    )
    answer = await serving().call("GET", "/v1/models/M:cloud", key="")
    assert answer.json()["id"] == "M:cloud"
    answer = await serving().call("GET", "/v1/models/x")
    assert (answer.status, answer.json()["error"]["type"]) == (404, "not_found_error")


# ── Streams that fail ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_r09_native_stream_ends_with_an_error_line() -> None:
    answer = await serving(Chunk(content="Hel"), CorralError("engine_failed", "gone")).post(
        "/api/chat", {"model": "m", "messages": MESSAGES}
    )
    assert answer.status == 200
    first, last = lines(answer)
    assert json.loads(first)["message"]["content"] == "Hel"
    assert last == '{"error":"gone"}'


async def test_r09_openai_stream_ends_with_an_error_event_and_no_done() -> None:
    answer = await serving(Chunk(content="Hel"), CorralError("engine_failed", "gone")).post(
        "/v1/chat/completions", {"model": "m", "messages": MESSAGES, "stream": True}
    )
    assert answer.status == 200
    *_, last, end = answer.body.decode().split("\n\n")
    assert (last, end) == ('data: {"error":{"message":"gone","type":"api_error","param":null,"code":null}}', "")


async def test_r09_completion_stream_ends_with_an_error_event_and_no_done() -> None:
    answer = await serving(Chunk(content="Hel"), CorralError("engine_failed", "gone")).post(
        "/v1/completions", {**ANY, "stream": True}
    )
    *_, last, end = answer.body.decode().split("\n\n")
    assert (last, end) == ('data: {"error":{"message":"gone","type":"api_error","param":null,"code":null}}', "")


async def test_r09_message_stream_ends_with_an_error_event() -> None:
    answer = await serving(Chunk(content="Hel"), CorralError("engine_failed", "gone")).post(
        "/v1/messages", {**ANY, "stream": True}
    )
    assert answer.status == 200
    *_, last, end = answer.body.decode().split("\n\n")
    assert (last, end) == ('event: error\ndata: {"type":"error","error":{"type":"api_error","message":"gone"}}', "")


async def test_r09_response_stream_ends_with_a_failed_response() -> None:
    answer = await serving(Chunk(content="Hel"), CorralError("engine_failed", "gone")).post(
        "/v1/responses", {**ANY, "stream": True}
    )
    last = SseDecoder().feed(answer.body)[-1]
    assert last.name == "response.failed"
    assert json.loads(last.data)["response"]["error"] == {"code": "server_error", "message": "gone"}


STREAMS = ["/api/generate", "/api/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("is_stream", [True, False])
async def test_error_before_the_first_event_is_a_real_status(path: str, is_stream: bool) -> None:
    answer = await serving(CorralError("busy")).post(path, {**ANY, "stream": is_stream})
    assert answer.status == 503
    assert "maximum pending requests exceeded" in answer.body.decode()


async def test_error_in_the_middle_of_a_collected_answer_is_a_real_status() -> None:
    server = serving(Chunk(content="Hel"), CorralError("engine_failed", "gone"))
    answer = await server.post("/api/chat", {"model": "m", "messages": MESSAGES, "stream": False})
    assert (answer.status, answer.json()) == (500, {"error": "gone"})
    assert server.pool.lent == 0


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("is_stream", [True, False])
async def test_caller_who_leaves_stops_the_engine(path: str, is_stream: bool) -> None:
    server = serving(Chunk(content="Hel"))
    server.runner.go_on = asyncio.Event()
    leave_after = 1 if is_stream else 0
    await server.post(path, {**ANY, "stream": is_stream}, leave_after=leave_after)
    assert (server.pool.lent, server.runner.open_answers) == (0, 0)
    await server.meter.flush()
    assert [(entry.path, entry.outcome) for entry in server.usage.entries] == [(path, "canceled")]


# ── Passing on ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_request_for_an_upstream_is_answered_by_it() -> None:
    stream = FakeStream(b'{"id":"theirs"}', content_type="application/json", set_cookie="a=b")
    server = Server(relay=FakeRelay(stream))
    answer = await server.post("/v1/chat/completions", raw=b'{"model":"big:cloud","unknown": 1.50}')
    assert (answer.status, answer.body) == (200, b'{"id":"theirs"}')
    assert answer.headers["content-type"] == "application/json"
    assert "set-cookie" not in answer.headers
    assert server.relay is not None
    assert server.relay.sent[0][2] == b'{"model":"meta/big","unknown":1.50}'


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_other_requests_in_openais_dialect_are_passed_on_and_counted(path: str) -> None:
    body = b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    server = Server(relay=FakeRelay(FakeStream(body, content_type="application/json")))
    answer = await server.post(path, raw=b'{"model":"big:cloud","unknown": 1.50}')
    assert (answer.status, answer.body) == (200, body)
    assert server.relay is not None
    assert server.relay.sent == [("http://10.0.0.9:8000", path, b'{"model":"meta/big","unknown":1.50}')]
    await server.meter.flush()
    assert [(entry.path, entry.prompt_tokens, entry.eval_tokens) for entry in server.usage.entries] == [(path, 3, 2)]


async def test_pieces_of_a_passed_completion_are_counted_when_nobody_says_how_many() -> None:
    piece = b'data: {"choices":[{"text":"x"}]}\n\n'
    server = Server(relay=FakeRelay(FakeStream(piece, piece, b"data: [DONE]\n\n")))
    await server.post("/v1/completions", {"model": "big", "stream": True})
    await server.meter.flush()
    assert [entry.eval_tokens for entry in server.usage.entries] == [2]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_requests_in_dialects_few_upstreams_speak_are_translated(path: str) -> None:
    server = Server(relay=FakeRelay(FakeStream()))
    answer = await server.post(path, {**ANY, "model": "big"})
    assert (answer.status, b"Hello" in answer.body) == (200, True)
    assert server.relay is not None
    assert server.relay.sent == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v1/chat/completions", "model 'x' not found"),
        ("/v1/completions", "model 'x' not found"),
        ("/v1/embeddings", 'model "x" not found, try pulling it first'),
        ("/v1/responses", "model 'x' not found"),
    ],
)
@pytest.mark.parametrize("relay", [None, FakeRelay(FakeStream())])
async def test_unknown_model_is_told_in_the_words_of_the_native_route(path: str, text: str, relay: FakeRelay | None) -> None:
    answer = await Server(relay=relay).post(path, {**ANY, "model": "x"})
    expected = {"error": {"message": text, "type": "not_found_error", "param": None, "code": None}}
    assert (answer.status, answer.json()) == (404, expected)


async def test_stream_of_an_upstream_is_passed_as_it_arrives() -> None:
    server = Server(relay=FakeRelay(FakeStream(UPSTREAM_EVENT, UPSTREAM_EVENT, b"data: [DONE]\n\n")))
    answer = await server.post("/v1/chat/completions", {"model": "big", "stream": True})
    assert answer.parts == [UPSTREAM_EVENT, UPSTREAM_EVENT, b"data: [DONE]\n\n"]
    assert answer.headers["content-type"] == "text/event-stream"


async def test_r10_stream_of_an_upstream_that_breaks_off_ends_with_an_error_event() -> None:
    server = Server(relay=FakeRelay(FakeStream(UPSTREAM_EVENT, b"data: {", CorralError("upstream_failed", "gone"))))
    answer = await server.post("/v1/chat/completions", {"model": "big", "stream": True})
    assert answer.status == 200
    assert answer.body == UPSTREAM_EVENT + (b'data: {"error":{"message":"gone","type":"api_error","param":null,"code":null}}\n\n')


async def test_r10_upstream_that_cannot_be_reached_is_a_real_status() -> None:
    server = Server(relay=FakeRelay(CorralError("upstream_failed")))
    answer = await server.post("/v1/chat/completions", {"model": "big", "stream": True})
    assert (answer.status, answer.json()["error"]["type"]) == (502, "api_error")


async def test_caller_who_leaves_lets_the_upstream_go() -> None:
    class Endless(FakeStream):
        async def chunks(self) -> AsyncIterator[bytes]:
            yield UPSTREAM_EVENT
            await asyncio.Event().wait()

    stream = Endless()
    server = Server(relay=FakeRelay(stream))
    await server.post("/v1/chat/completions", {"model": "big", "stream": True}, leave_after=1)
    assert stream.is_closed
    await server.meter.flush()
    assert [(entry.outcome, entry.eval_tokens) for entry in server.usage.entries] == [("canceled", 1)]


async def test_request_for_a_model_of_this_hub_takes_the_native_way() -> None:
    server = Server(relay=FakeRelay(FakeStream()))
    answer = await server.post("/v1/chat/completions", {"model": "m", "messages": MESSAGES})
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"


@pytest.mark.parametrize(
    ("path", "name", "fields"),
    [
        ("/v1/chat/completions", "to_native", {"messages": MESSAGES}),
        ("/v1/responses", "to_native_response", {"input": "hi"}),
        ("/v1/messages", "to_native_messages", {"messages": MESSAGES, "max_tokens": 5}),
    ],
)
async def test_t106_large_request_of_another_dialect_is_made_native_where_nobody_waits_for_it(
    path: str, name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_in: list[bool] = []
    real = getattr(inference_api, name)

    def noted(asked: Any) -> Any:
        made_in.append(threading.current_thread() is threading.main_thread())
        return real(asked)

    # Patched because in which thread it happens shows nowhere else.
    monkeypatch.setattr(inference_api, name, noted)
    for padding in ("", "x" * 200_000):
        answer = await Server().post(path, {"model": "m", **fields, "metadata": {"x": padding}})
        assert answer.status == 200
    assert made_in == [True, False]
