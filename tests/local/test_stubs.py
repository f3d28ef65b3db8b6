"""Models that are installed here and run elsewhere: where they may run, what is sent there, and what comes back."""

import json
from dataclasses import replace
from typing import Any

import pytest

from corral.core.records import Model, ModelDetails
from corral.local.cloud import CloudAccess, CloudSwitch
from corral.local.models import LocalModels
from corral.local.stubs import Remotes, chat_body, generate_body
from corral.wire.anthropic import MessagesRequest
from corral.wire.anthropic import to_native as to_native_messages
from corral.wire.errors import CorralError, native_body
from corral.wire.native import ChatRequest, GenerateRequest, Message, decode
from corral.wire.openai import ChatCompletionRequest, to_native
from corral.wire.openai_more import CompletionRequest, to_native_completion
from corral.wire.responses import ResponsesRequest, to_native_response
from corral.wire.signing import connect_url
from fakes_local import FakeGateway, FakeInference, FakeStream, MemoryModels, installed, stub, stub_models

HUB = "http://localhost:11435"
THERE = stub(installed("mine:latest"), host=HUB, remote="big:1t")
TOLD = replace(
    THERE,
    system="Be brief.",
    template="{{ .Prompt }}!",
    parameters={"temperature": 0.5, "stop": ["END"], "num_ctx": 64},
    messages=(("user", "1+1"), ("assistant", "2")),
)


class Servers:
    """An UpstreamRelay that answers as told and keeps what it was asked."""

    def __init__(self, *answers: FakeStream | CorralError) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, Any]] = []

    async def open_stream(self, base_url: str, path: str, body: bytes) -> FakeStream:
        self.asked.append((base_url, path, json.loads(body)))
        answer = self.answers.pop(0)
        if isinstance(answer, CorralError):
            raise answer
        return answer


def lines(*values: object) -> list[bytes | CorralError]:
    return [json.dumps(value).encode() + b"\n" for value in values]


def generate(**fields: Any) -> GenerateRequest:
    return decode(json.dumps({"model": "mine", **fields}).encode(), GenerateRequest)


def chat(*messages: tuple[str, str], **fields: Any) -> ChatRequest:
    rows = [{"role": role, "content": text} for role, text in messages]
    return decode(json.dumps({"model": "mine", "messages": rows, **fields}).encode(), ChatRequest)


async def refusal_of(events: Any) -> CorralError:
    with pytest.raises(CorralError) as refused:
        [event async for event in events]
    return refused.value


# ── Where a stub may run ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("host", "hosts", "is_hub"),
    [
        (HUB, (), True),
        ("http://127.0.0.1:11435", (), True),
        (f"{HUB}/", (), True),
        (HUB, ("localhost",), True),
        ("http://box:11434", ("box",), False),
        ("http://box:11434/below", ("other", "box"), False),
        ("http://localhost:1", ("localhost",), False),
        (f"{HUB}/below", ("localhost",), False),
        ("https://box:8443/below", ("box:8443",), False),
        ("https://box", ("box:443",), False),
        ("http://box", ("box:80",), False),
        ("http://[::1]:11434", ("[::1]:11434",), False),
        ("http://[fe80::1]:80", ("fe80::1",), False),
        (HUB, ("localhost:11435",), True),
    ],
)
def test_stub_runs_at_the_hub_or_where_somebody_allowed_it(host: str, hosts: tuple[str, ...], is_hub: bool) -> None:
    assert Remotes(hosts).is_hub(stub(installed(), host=host, remote="x"), HUB) == is_hub


@pytest.mark.parametrize(
    ("host", "hosts"),
    [
        ("http://box:11434", ()),
        ("https://ollama.com:443", ()),
        ("http://localhost:11436", ()),
        (f"{HUB}/below", ()),
        (HUB, ("ollama.com",)),
        ("http://box.evil:11434", ("box",)),
        ("http://box:11434", ("box:11435",)),
        ("http://box:22", ("box:443", "box:11434")),
        ("http://[fe80::1]:80", ("fe80::1:80",)),
        ("http://[fe80::1]:81", ("[fe80::1]:80",)),
        (HUB, ("localhost:1",)),
        ("http://box@evil:11434", ("box",)),
        ("file:///box", ("box",)),
        ("", ("",)),
    ],
)
def test_t090_stub_of_any_other_server_is_refused(host: str, hosts: tuple[str, ...]) -> None:
    with pytest.raises(CorralError) as refused:
        Remotes(hosts).is_hub(stub(installed(), host=host, remote="x"), HUB)
    assert (refused.value.status, refused.value.message) == (400, "this server cannot run this remote model")


async def test_t090_refused_stub_reaches_nobody() -> None:
    gateway, servers = FakeGateway(base=HUB), Servers()
    far = stub(installed(), host="http://evil.example:80", remote="x")
    models = stub_models(gateway, HUB, elsewhere=servers)
    await refusal_of(models.generate(far, generate(prompt="secret")))
    assert (gateway.calls, servers.asked) == ([], [])


async def test_cloud_that_is_off_is_told_before_the_host_is_judged() -> None:
    cloud = CloudAccess(FakeGateway(), CloudSwitch(True, lambda: False), device_name="box", version="0")
    far = stub(installed(), host="http://evil.example:80", remote="x")
    refused = await refusal_of(stub_models(cloud=cloud).chat(far, chat(("user", "x"))))
    assert (refused.status, refused.message) == (403, "ollama cloud is disabled: remote model is unavailable")


# ── What is sent ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_prompt_leaves_open_the_stub_says() -> None:
    assert generate_body(TOLD, generate(prompt="hi", options={"seed": 1, "temperature": 0})) == (
        b'{"model":"big:1t","prompt":"hi","suffix":"","system":"Be brief.","template":"{{ .Prompt }}!",'
        b'"options":{"num_ctx":64,"seed":1,"stop":["END"],"temperature":0}}'
    )


def test_what_a_prompt_says_counts() -> None:
    asked = generate(
        prompt="hi", suffix="s", system="S", template="T", context=[1], stream=False, raw=True, format="json", keep_alive="90s",
        images=["AAEC"], think="high", truncate=False, shift=True, logprobs=True, top_logprobs=2, _debug_render_only=True,
    )  # fmt: skip
    assert json.loads(generate_body(TOLD, asked)) == {
        "model": "big:1t", "prompt": "hi", "suffix": "s", "system": "S", "template": "T", "context": [1], "stream": False,
        "raw": True, "format": "json", "keep_alive": "1m30s", "images": ["AAEC"], "think": "high", "truncate": False,
        "shift": True, "logprobs": True, "top_logprobs": 2, "_debug_render_only": True,
        "options": {"num_ctx": 64, "stop": ["END"], "temperature": 0.5},
    }  # fmt: skip


def test_chat_takes_the_stubs_messages_and_system_along() -> None:
    assert chat_body(TOLD, chat(("user", "hi"), stream=False, keep_alive=-1)) == (
        b'{"model":"big:1t","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"1+1"},'
        b'{"role":"assistant","content":"2"},{"role":"user","content":"hi"}],"stream":false,'
        b'"keep_alive":"2562047h47m16.854775807s","options":{"num_ctx":64,"stop":["END"],"temperature":0.5}}'
    )


def test_chat_with_a_system_message_of_its_own_gets_no_second_one() -> None:
    sent = json.loads(chat_body(TOLD, chat(("system", "Mine."), ("user", "hi"))))
    assert [message["content"] for message in sent["messages"]] == ["1+1", "2", "Mine.", "hi"]


def test_chat_that_only_loads_sends_no_messages() -> None:
    assert json.loads(chat_body(TOLD, chat()))["messages"] is None


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (replace(THERE, details=ModelDetails(family="qwen3")), ["b", "", "<think>c</think>d", "<think>e</think>f"]),
        (stub(installed("deepseek-r1:7b"), host=HUB, remote="x"), ["b", "", "<think>c</think>d", "<think>e</think>f"]),
        (THERE, ["<think>a</think>\nb", "<think>never ends", "<think>c</think>d", "<think>e</think>f"]),
    ],
)
def test_thoughts_before_the_last_question_stay_behind_for_models_that_write_them_into_content(
    model: Model, told: list[str]
) -> None:
    asked = chat(
        ("assistant", "<think>a</think>\nb"), ("assistant", "<think>never ends"), ("user", "<think>c</think>d"),
        ("assistant", "<think>e</think>f"),
    )  # fmt: skip
    assert [message["content"] for message in json.loads(chat_body(model, asked))["messages"]] == told


async def test_request_goes_to_the_hub_signed_and_as_stream_of_lines() -> None:
    gateway = FakeGateway(base=HUB)
    gateway.will_answer(200, *lines({"done": True}))
    [event async for event in stub_models(gateway, HUB).chat(THERE, chat(("user", "x")))]
    (call,) = gateway.calls
    assert (call.method, call.path, call.query) == ("POST", "/api/chat", "")
    assert dict(call.headers) == {"accept": "application/x-ndjson", "content-type": "application/json"}


async def test_request_of_another_dialect_goes_to_the_native_route() -> None:
    gateway = FakeGateway(base=HUB)
    models = stub_models(gateway, HUB)
    message = {"role": "user", "content": "x"}
    for body, kind, native in (
        ({"model": "mine", "max_tokens": 5, "messages": [message]}, MessagesRequest, to_native_messages),
        ({"model": "mine", "input": "x"}, ResponsesRequest, to_native_response),
        ({"model": "mine", "messages": [message]}, ChatCompletionRequest, to_native),
    ):
        gateway.will_answer(200, *lines({"done": True}))
        asked: ChatRequest = native(decode(json.dumps(body).encode(), kind))  # type: ignore[operator]
        [event async for event in models.chat(THERE, asked)]
    gateway.will_answer(200, *lines({"done": True}))
    completion = to_native_completion(decode(b'{"model":"mine","prompt":"x"}', CompletionRequest))
    [event async for event in models.generate(THERE, completion)]
    assert [call.path for call in gateway.calls] == ["/api/chat"] * 3 + ["/api/generate"]


async def test_request_goes_to_an_allowed_server_below_its_path_and_not_to_the_hub() -> None:
    gateway, servers = FakeGateway(base=HUB), Servers(FakeStream(200, [], lines({"response": "x", "done": True})))
    there = stub(installed(), host="http://box:11434/below", remote="r")
    models = stub_models(gateway, HUB, hosts=("box",), elsewhere=servers)
    (event,) = [event async for event in models.generate(there, generate(prompt="p"))]
    assert (event.remote_host, event.remote_model) == ("http://box:11434/below", "r")
    assert servers.asked[0][:2] == ("http://box:11434/below", "/api/generate")
    assert gateway.calls == []


async def test_empty_chat_that_unloads_asks_nobody() -> None:
    models = stub_models(FakeGateway(base=HUB), HUB)
    (event,) = [event async for event in models.chat(THERE, chat(keep_alive=0))]
    assert (event.done_reason, event.done, event.message, event.remote_model) == (
        "unload",
        True,
        Message(role="assistant", content=""),
        "",
    )


# ── What comes back ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_line_says_the_requested_name_and_where_it_ran() -> None:
    gateway = FakeGateway(base=HUB)
    when = "2026-08-22T10:00:00.123456789Z"
    rows = [
        {
            "model": "big:1t",
            "created_at": when,
            "message": {"role": "assistant", "content": word, "thinking": None},
            "done": False,
            "new": 1,
        }
        for word in ("a", "b")
    ]
    body = b"".join(
        line for line in lines(*rows, {"done": True, "done_reason": "stop", "eval_count": 7}) if isinstance(line, bytes)
    )
    gateway.will_answer(200, body[:30], body[30:31], body[31:])
    events = [event async for event in stub_models(gateway, HUB).chat(THERE, chat(("user", "x"), model="Mine:latest"))]
    assert {(event.model, event.remote_model, event.remote_host) for event in events} == {("Mine:latest", "big:1t", HUB)}
    assert [event.message.content for event in events] == ["a", "b", ""]
    assert [event.created_at for event in events][:2] == [when, when]
    assert events[-1].created_at.startswith("20")
    assert (events[-1].eval_count, events[-1].done_reason) == (7, "stop")


LEADS_ELSEWHERE = "the remote server answered 307, which leads elsewhere; check its address"


def told(text: str, status: int, phrase: str = "") -> dict[str, Any]:
    return {"error": text, "StatusCode": status, "Status": f"{status} {phrase}".rstrip()}


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (FakeStream(429, [], [b'{"error":"slow down"}']), 429, told("slow down", 429, "Too Many Requests")),
        (FakeStream(404, [], [b'{"error":"no such model"}']), 404, told("no such model", 404, "Not Found")),
        (FakeStream(503, [], [b"<html>\x1b[2J\nsecond"]), 503, told("<html> [2J", 503, "Service Unavailable")),
        (FakeStream(599, [], [b"[]"]), 599, told("the remote server answered 599", 599)),
        (FakeStream(307, [("location", "http://evil")], []), 500, {"error": LEADS_ELSEWHERE}),
        (FakeStream(200, [], []), 500, {"error": f"{HUB} gave no answer"}),
        (FakeStream(200, [], [b"no json\n"]), 500, {"error": "no json"}),
        (FakeStream(200, [], [b'{"error":"out of memory"}\n']), 500, {"error": "out of memory"}),
        (FakeStream(200, [], [CorralError("upstream_failed", "gone")]), 500, {"error": "gone"}),
        (CorralError("upstream_failed", "could not reach the hub"), 500, {"error": "could not reach the hub"}),
        (CorralError("invalid", "the key is damaged"), 500, {"error": "the key is damaged"}),
        (CorralError("clock_skew", "the clock is wrong"), 403, {"error": "the clock is wrong"}),
    ],
)  # fmt: skip
async def test_refusal_keeps_its_status_and_words(answer: FakeStream | CorralError, status: int, body: dict[str, Any]) -> None:
    gateway = FakeGateway(base=HUB)
    gateway.answers.append(answer)
    refused = await refusal_of(stub_models(gateway, HUB).generate(THERE, generate(prompt="x")))
    assert (refused.status, native_body(refused)) == (status, body)
    assert isinstance(answer, CorralError) or answer.is_closed


async def test_limit_of_the_hub_says_when_to_come_again() -> None:
    gateway = FakeGateway(base=HUB)
    gateway.will_answer(429, b"{}", headers={"retry-after": "7"})
    assert (await refusal_of(stub_models(gateway, HUB).chat(THERE, chat(("user", "x"))))).retry_after_s == 7


async def test_device_that_is_not_connected_gets_the_link() -> None:
    gateway = FakeGateway(base=HUB)
    gateway.will_answer(401, b'{"error":"unauthorized","signin_url":"https://evil.example/"}')
    refused = await refusal_of(stub_models(gateway, HUB).chat(THERE, chat(("user", "x"))))
    link = connect_url(HUB, "box", gateway.key)
    assert (refused.status, native_body(refused)) == (401, {"error": "unauthorized", "signin_url": link})


async def test_t090_only_the_hub_names_a_page_to_sign_in_at() -> None:
    servers = Servers(FakeStream(401, [], [b'{"error":"unauthorized","signin_url":"https://evil.example/"}']))
    there = stub(installed(), host="http://box:11434", remote="r")
    refused = await refusal_of(stub_models(hosts=("box",), elsewhere=servers).chat(there, chat(("user", "x"))))
    assert (refused.status, native_body(refused)) == (401, {"error": "unauthorized"})


async def test_server_that_is_away_is_named_without_its_address() -> None:
    servers = Servers(CorralError("upstream_failed", "connect to 10.1.2.3 failed"))
    there = stub(installed(), host="http://box:11434", remote="r")
    refused = await refusal_of(stub_models(hosts=("box",), elsewhere=servers).chat(there, chat(("user", "x"))))
    assert (refused.status, refused.message) == (500, "http://box:11434 could not be reached")


async def test_line_without_end_is_cut() -> None:
    gateway = FakeGateway(base=HUB)
    gateway.will_answer(200, *[b" " * (1 << 20)] * 17)
    assert (await refusal_of(stub_models(gateway, HUB).chat(THERE, chat(("user", "x"))))).status == 500


async def test_stream_that_is_left_lets_the_server_go() -> None:
    gateway = FakeGateway(base=HUB)
    stream = gateway.will_answer(200, *lines(*[{"done": False}] * 3))
    events = stub_models(gateway, HUB).generate(THERE, generate(prompt="x"))
    await anext(events)
    await events.aclose()
    assert stream.is_closed


# ── By name ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", ["generate", "chat", "embed", "embeddings"])
async def test_local_suffix_finds_no_stub(verb: str) -> None:
    models = LocalModels(MemoryModels(THERE), FakeInference(), stub_models())  # type: ignore[arg-type]
    request = chat(("user", "x"), model="mine:latest:local") if verb == "chat" else generate(model="mine:latest:local")
    answer = getattr(models, verb)(request, None)
    with pytest.raises(CorralError) as refused:
        [event async for event in answer] if verb in ("generate", "chat") else await answer
    assert refused.value.status == 404
    assert "mine:latest:local" in refused.value.message


async def test_embedding_by_a_stub_of_another_server_is_refused_in_a_sentence() -> None:
    far = stub(installed("far:1"), host="http://box:11434", remote="r")
    models = LocalModels(MemoryModels(far), FakeInference(), stub_models(hosts=("box",)))  # type: ignore[arg-type]
    with pytest.raises(CorralError, match="takes chats and prompts only"):
        await models.embed(generate(model="far:1"), None)  # type: ignore[arg-type]


async def test_stub_is_not_shown_while_the_cloud_is_off() -> None:
    cloud = CloudAccess(FakeGateway(), CloudSwitch(False, lambda: True), device_name="box", version="0")
    models = LocalModels(MemoryModels(THERE), FakeInference(), stub_models(cloud=cloud))  # type: ignore[arg-type]
    with pytest.raises(CorralError) as refused:
        await models.show("mine", None)
    assert (refused.value.status, refused.value.message) == (
        403,
        "ollama cloud is disabled: remote model details are unavailable",
    )
