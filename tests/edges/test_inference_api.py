"""The inference routes over ASGI: bytes on the wire, dialects, streams that fail or are left."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from asgi_client import Answer, Caller
from corral.core.policy import CLIENT_PROOFS, PUBLIC, Access
from corral.core.ports import Chunk, Finish, Timings
from corral.core.records import Capability, Model, Principal, RequestFacts, Scope
from corral.edges.asgi import App, AppOptions
from corral.edges.inference_api import inference_endpoints, ps_endpoint
from corral.hub.hosting import Hosting
from corral.hub.inference import HostedInference
from corral.hub.metering import UsageMeter
from corral.hub.running import RunningRequests
from corral.wire.errors import CorralError
from fakes import NOON, FakeClock, MemoryUsage
from fakes_inference import (
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
    model: Model = field(default_factory=lambda: a_model("m", capabilities=frozenset(Capability)))
    pool: FakePool = field(init=False)
    usage: MemoryUsage = field(default_factory=MemoryUsage)

    async def post(self, path: str, body: Any = None, *, raw: bytes | None = None, **options: Any) -> Answer:
        return await self.call("POST", path, raw if raw is not None else json.dumps(body).encode(), **options)

    async def call(self, method: str, path: str, body: bytes = b"", *, key: str = "ada", **options: Any) -> Answer:
        headers = {"authorization": key, **options.pop("headers", {})} if key else options.pop("headers", {})
        return await Caller(await self._app()).request(method, path, headers=headers, body=body, **options)

    async def _app(self) -> App:
        self.pool = FakePool(self.runner)
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
        ("/api/chat", {"model": "m", "messages": MESSAGES, "options": {"stop": "x"}}, 500, 'option "stop" must be of type array'),
        ("/api/chat", {"model": "m", "messages": MESSAGES, "keep_alive": "10"}, 400, 'time: missing unit in duration "10"'),
    ],
)
async def test_errors_have_ollamas_status_and_text(path: str, body: dict[str, Any], status: int, text: str) -> None:
    answer = await serving().post(path, body)
    assert (answer.status, answer.json()) == (status, {"error": text})


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/v1/chat/completions"])
async def test_running_a_model_needs_a_credential(path: str) -> None:
    assert (await serving().post(path, {"model": "m"}, key="")).status == 401


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_t095_compressed_bodies_are_refused(path: str) -> None:
    body = gzip.compress(json.dumps({"model": "m", "messages": MESSAGES}).encode())
    for encoding in ("gzip", "zstd", "br"):
        answer = await serving().post(path, raw=body, headers={"content-encoding": encoding})
        assert answer.status == 400
    answer = await serving().post(path, raw=b"x" * 10, headers={"content-length": str(20 * 1024 * 1024 + 1)})
    assert answer.status == 413


async def test_t106_deep_json_is_refused_in_both_dialects() -> None:
    body = b'{"model":"m","messages":' + b"[" * 100_000
    for path in ("/api/chat", "/v1/chat/completions"):
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


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_error_before_the_first_event_is_a_real_status(path: str, is_stream: bool) -> None:
    answer = await serving(CorralError("busy")).post(
        path, {"model": "m", "prompt": "hi", "messages": MESSAGES, "stream": is_stream}
    )
    assert answer.status == 503
    assert "maximum pending requests exceeded" in answer.body.decode()


async def test_error_in_the_middle_of_a_collected_answer_is_a_real_status() -> None:
    server = serving(Chunk(content="Hel"), CorralError("engine_failed", "gone"))
    answer = await server.post("/api/chat", {"model": "m", "messages": MESSAGES, "stream": False})
    assert (answer.status, answer.json()) == (500, {"error": "gone"})
    assert server.pool.lent == 0


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_caller_who_leaves_stops_the_engine(path: str, is_stream: bool) -> None:
    server = serving(Chunk(content="Hel"))
    server.runner.go_on = asyncio.Event()
    leave_after = 1 if is_stream else 0
    await server.post(path, {"model": "m", "prompt": "hi", "messages": MESSAGES, "stream": is_stream}, leave_after=leave_after)
    assert (server.pool.lent, server.runner.open_answers) == (0, 0)
    await server.meter.flush()
    assert [entry.outcome for entry in server.usage.entries] == ["canceled"]


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
