"""Hosted inference: who gets which model, where it runs, what is passed on, and that every request is written down once."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from corral.core.ports import Chunk, Finish, Timings
from corral.core.records import Principal, Proof, UsageEntry
from corral.hub.hosting import Hosting
from corral.hub.inference import HostedInference, PassedAnswer
from corral.hub.metering import UsageMeter
from corral.hub.running import RunningRequests
from corral.wire.errors import CorralError
from corral.wire.native import ChatRequest, EmbeddingsRequest, EmbedRequest, GenerateRequest, Message, decode, raw_request
from corral.wire.openai import ChatCompletionRequest, to_native
from fakes import NOON, FakeClock, MemoryUsage
from fakes_inference import FakePool, FakeRelay, FakeRunner, FakeStream, FakeUpstreams, Step, a_caller, a_hosted, a_hosting

COMPLETIONS = "/v1/chat/completions"
ADA = a_caller("ada")
HERE = a_hosted("m")
SECRET = a_hosted("bob/secret", is_public=False)
ELSEWHERE = a_hosted("big", upstream_url="http://10.0.0.9:8000", upstream_model="meta/big")
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'


class Hub:
    """Hosted inference over fakes."""

    def __init__(self, *answer: Step) -> None:
        self.clock = FakeClock()
        self.runner = FakeRunner(*answer, clock=self.clock)
        self.pool = FakePool(self.runner)
        self.upstreams = FakeUpstreams()
        self.usage = MemoryUsage()
        self.meter = UsageMeter(self.usage)
        self.revoked: set[str] = set()
        self.running = RunningRequests(self._is_live)
        self.service: HostedInference

    async def open(self, relay: FakeRelay | None = None, *, upstreams: bool = True) -> "Hub":
        self.service = HostedInference(
            hosting=Hosting(await a_hosting(HERE, SECRET, ELSEWHERE)),
            runners=self.pool,
            usage=self.meter,
            running=self.running,
            clock=self.clock,
            upstreams=self.upstreams if upstreams else None,
            relay=relay,
        )
        return self

    async def _is_live(self, principal: Principal) -> bool:
        return principal.credential_id not in self.revoked

    async def chat(self, model: str = "m", caller: Principal | None = ADA, **fields: Any) -> list[Any]:
        return [event async for event in self.service.chat(chat_request(model, **fields), caller)]

    async def pass_on(self, body: bytes = b'{"model":"big:cloud"}', caller: Principal | None = ADA) -> PassedAnswer | None:
        return await self.service.pass_on(raw_request(body), COMPLETIONS, caller)

    async def entries(self) -> list[UsageEntry]:
        await self.meter.flush()
        return self.usage.entries

    async def entry(self) -> UsageEntry:
        (entry,) = await self.entries()
        return entry


def chat_request(model: str = "m", content: str = "hello there you", **fields: Any) -> ChatRequest:
    return ChatRequest(model=model, messages=[Message(role="user", content=content)], **fields)


async def text_of(passed: PassedAnswer | None) -> bytes:
    assert passed is not None
    assert passed.chunks is not None
    return b"".join([chunk async for chunk in passed.chunks])


# ── Who gets which model ─────────────────────────────────────────────────────────────────────────────────────────────


ROUTES = {
    "generate": (GenerateRequest, {"prompt": "x"}, "model 'x' not found"),
    "chat": (ChatRequest, {"messages": [Message(role="user", content="x")]}, "model 'x' not found"),
    "embed": (EmbedRequest, {"input": "x"}, 'model "x" not found, try pulling it first'),
    "embeddings": (EmbeddingsRequest, {"prompt": "x"}, 'model "x" not found, try pulling it first'),
}


async def run(hub: Hub, route: str, model: str, caller: Principal | None = ADA) -> None:
    kind, fields, _ = ROUTES[route]
    answer = getattr(hub.service, route)(kind(model=model, **fields), caller)
    if route in ("generate", "chat"):
        assert [event async for event in answer]
    else:
        await answer


@pytest.mark.parametrize("route", ROUTES)
async def test_hidden_model_is_answered_like_one_that_never_was(route: str) -> None:
    hub = await Hub().open()
    errors = []
    for name in ("x", "bob/secret"):
        with pytest.raises(CorralError) as caught:
            await run(hub, route, name)
        errors.append((caught.value.code, caught.value.status, caught.value.message.replace("bob/secret", "x")))
    assert errors == [("not_found", 404, ROUTES[route][2])] * 2
    assert await hub.entries() == []


@pytest.mark.parametrize("route", ROUTES)
async def test_hidden_model_runs_for_its_owner(route: str) -> None:
    hub = await Hub().open()
    await run(hub, route, "bob/secret", a_caller("bob"))
    assert (await hub.entry()).model == "bob/secret:latest"


@pytest.mark.parametrize(("route", "status"), [("generate", 404), ("chat", 400), ("embed", 404), ("embeddings", 400)])
async def test_empty_model_has_each_routes_own_answer(route: str, status: int) -> None:
    with pytest.raises(CorralError) as caught:
        await run(await Hub().open(), route, "")
    assert caught.value.status == status
    assert caught.value.message == ("model '' not found" if status == 404 else "model is required")


@pytest.mark.parametrize("route", ROUTES)
async def test_nobody_runs_nothing(route: str) -> None:
    with pytest.raises(CorralError) as caught:
        await run(await Hub().open(), route, "m", None)
    assert caught.value.code == "unauthorized"


async def test_malformed_name_is_refused() -> None:
    with pytest.raises(CorralError, match="invalid model name"):
        await (await Hub().open()).chat("a//b")


async def test_tags_and_show_tell_what_the_caller_may_see() -> None:
    service = (await Hub().open()).service
    assert [model.name.short for model in await service.tags(None)] == ["big:latest", "m:latest"]
    assert (await service.show("m:cloud", None)).weights is None
    for name in ("bob/secret", "bob/other"):
        with pytest.raises(CorralError) as caught:
            await service.show(f"{name}:cloud", ADA)
        assert caught.value.message == f"model '{name}:latest' not found"
    with pytest.raises(CorralError, match="model is required"):
        await service.show("", None)


# ── Where it runs ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_callers_load_options_and_keep_alive_do_not_touch_the_shared_runner() -> None:
    hub = await Hub().open()
    await hub.chat(options={"num_ctx": 8, "temperature": 0}, keep_alive=-1)
    assert hub.pool.used == [{"model": HERE.model, "options": None, "keep_alive_s": None, "embedding": False}]


async def test_caller_cannot_unload_the_shared_runner() -> None:
    hub = await Hub().open()
    (event,) = [event async for event in hub.service.generate(GenerateRequest(model="m", keep_alive=0), ADA)]
    assert event.done_reason == "unload"
    assert (hub.pool.unloaded, hub.pool.used) == ([], [])


async def test_model_at_an_upstream_runs_there() -> None:
    hub = await Hub().open()
    events = await hub.chat("big:cloud")
    assert [event.model for event in events] == ["big:cloud"] * 3
    (stub,) = hub.upstreams.loaded
    assert (stub.remote_host, stub.remote_model) == ("http://10.0.0.9:8000", "meta/big")
    assert hub.pool.used == []
    assert (await hub.entry()).model == "big:latest"


async def test_model_at_an_upstream_of_a_hub_without_any_is_unavailable() -> None:
    hub = await Hub().open(upstreams=False)
    with pytest.raises(CorralError) as caught:
        await hub.chat("big")
    assert caught.value.code == "unavailable"
    with pytest.raises(CorralError) as caught:
        await hub.pass_on()
    assert caught.value.code == "unavailable"


# ── Usage ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_usage_entry_has_the_engines_numbers() -> None:
    hub = await Hub(1.5, Chunk(content="a"), Finish(reason="stop", timings=Timings(prompt_tokens=7, eval_tokens=5))).open()
    await hub.chat("M:cloud")
    assert await hub.entry() == UsageEntry(
        account_id="id-ada",
        credential_id="k1",
        proof=Proof.API_KEY,
        model="m:latest",
        path="/api/chat",
        started_at=NOON,
        duration_ns=1_500_000_000,
        prompt_tokens=7,
        eval_tokens=5,
        outcome="ok",
    )


@pytest.mark.parametrize(
    ("route", "tokens"), [("generate", (11, 9)), ("chat", (11, 9)), ("embed", (1, 0)), ("embeddings", (0, 0))]
)
async def test_usage_entry_names_its_route(route: str, tokens: tuple[int, int]) -> None:
    hub = await Hub().open()
    await run(hub, route, "m")
    entry = await hub.entry()
    assert (entry.path, entry.prompt_tokens, entry.eval_tokens) == (f"/api/{route}", *tokens)


async def test_usage_entry_of_an_openai_request_names_that_route() -> None:
    hub = await Hub().open()
    request = to_native(decode(b'{"model":"m","messages":[{"role":"user","content":"hi"}]}', ChatCompletionRequest))
    assert [event async for event in hub.service.chat(request, ADA)]
    assert (await hub.entry()).path == COMPLETIONS


async def test_r09_engine_that_dies_is_counted_once_with_what_was_sent() -> None:
    hub = await Hub(Chunk(content="a"), Chunk(content="b"), CorralError("engine_failed")).open()
    with pytest.raises(CorralError):
        await hub.chat(content="x" * 40)
    entry = await hub.entry()
    assert (entry.outcome, entry.prompt_tokens, entry.eval_tokens) == ("engine_failed", 10, 2)


async def test_usage_of_a_caller_who_leaves_is_counted_with_what_was_sent() -> None:
    hub = await Hub(Chunk(content="a"), Chunk(content="b")).open()
    async with aclosing(hub.service.chat(chat_request(content="x" * 40), ADA)) as events:
        await anext(events)
    entry = await hub.entry()
    assert (entry.outcome, entry.prompt_tokens, entry.eval_tokens) == ("canceled", 10, 1)
    assert (hub.pool.lent, hub.runner.open_answers) == (0, 0)


async def test_usage_of_a_caller_who_leaves_after_the_last_event_is_complete() -> None:
    hub = await Hub().open()
    async with aclosing(hub.service.chat(chat_request(), ADA)) as events:
        async for event in events:
            if event.done:
                break
    entry = await hub.entry()
    assert (entry.outcome, entry.prompt_tokens, entry.eval_tokens) == ("ok", 11, 9)


@pytest.mark.parametrize(("error", "outcome"), [(CorralError("busy"), "busy"), (CorralError("bad_request", "x"), "bad_request")])
async def test_usage_of_a_request_that_never_ran_has_no_tokens(error: CorralError, outcome: str) -> None:
    hub = await Hub().open()
    hub.pool.fails = error
    with pytest.raises(CorralError):
        await hub.chat()
    entry = await hub.entry()
    assert (entry.outcome, entry.prompt_tokens, entry.eval_tokens) == (outcome, 0, 0)


async def test_usage_of_a_failure_of_ours_is_counted_as_internal() -> None:
    hub = await Hub(ZeroDivisionError()).open()
    with pytest.raises(ZeroDivisionError):
        await hub.chat()
    assert (await hub.entry()).outcome == "internal"


async def test_t021_revoked_credential_ends_the_running_stream() -> None:
    hub = await Hub(Chunk(content="a")).open()
    hub.runner.go_on = asyncio.Event()
    received: list[Any] = []

    async def read() -> None:
        async for event in hub.service.chat(chat_request(), ADA):
            received.append(event)

    reading = asyncio.create_task(read())
    await hub.runner.waits.wait()
    hub.revoked.add("k1")
    await hub.running.recheck()
    with pytest.raises(CorralError, match="revoked"):
        await reading
    assert len(received) == 1
    assert (hub.pool.lent, hub.runner.open_answers) == (0, 0)
    assert (await hub.entry()).outcome == "unauthorized"


# ── Passing on ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_passed_request_keeps_everything_but_the_model() -> None:
    relay = FakeRelay(FakeStream(b"{}", content_type="application/json"))
    hub = await Hub().open(relay)
    await hub.pass_on(b'{"zz": 1.50,"model":"BIG:cloud","messages":[ ]}')
    assert relay.sent == [("http://10.0.0.9:8000", COMPLETIONS, b'{"zz":1.50,"model":"meta/big","messages":[ ]}')]


async def test_request_for_a_model_of_this_hub_is_not_passed_on() -> None:
    relay = FakeRelay(FakeStream())
    hub = await Hub().open(relay)
    assert await hub.pass_on(b'{"model":"m"}') is None
    assert relay.sent == []
    assert await hub.entries() == []


@pytest.mark.parametrize("body", [b"{}", b'{"model":"nope"}', b'{"model":"bob/secret"}'])
async def test_request_without_a_model_to_run_is_left_to_the_native_way(body: bytes) -> None:
    relay = FakeRelay(FakeStream())
    hub = await Hub().open(relay)
    assert await hub.pass_on(body) is None
    assert relay.sent == []


async def test_request_of_nobody_is_not_passed_on() -> None:
    relay = FakeRelay(FakeStream())
    hub = await Hub().open(relay)
    with pytest.raises(CorralError) as caught:
        await hub.pass_on(b'{"model":"big"}', None)
    assert (caught.value.code, relay.sent) == ("unauthorized", [])


async def test_whole_answer_is_passed_as_it_is_and_counted() -> None:
    body = b'{"id":"x", "usage":{"prompt_tokens":3,"completion_tokens":2}}'
    stream = FakeStream(body, content_type="application/json", set_cookie="a=b", x_request_id="1", retry_after="3")
    hub = await Hub().open(FakeRelay(stream))
    passed = await hub.pass_on()
    assert passed == PassedAnswer(
        status=200, headers=(("content-type", "application/json"), ("retry-after", "3")), body=body, chunks=None
    )
    assert stream.is_closed
    entry = await hub.entry()
    assert (entry.model, entry.path, entry.outcome) == ("big:latest", COMPLETIONS, "ok")
    assert (entry.prompt_tokens, entry.eval_tokens) == (3, 2)


@pytest.mark.parametrize("usage", [b'{"prompt_tokens":-1}', b'{"prompt_tokens":1e308}', b"null"])
async def test_t118_whole_answer_with_usage_nobody_can_believe_is_estimated(usage: bytes) -> None:
    stream = FakeStream(b'{"usage":' + usage + b"}", content_type="application/json")
    hub = await Hub().open(FakeRelay(stream))
    body = b'{"model":"big","x":"' + b"y" * 400 + b'"}'
    await hub.pass_on(body)
    entry = await hub.entry()
    assert entry.eval_tokens == 0
    assert entry.prompt_tokens == pytest.approx(len(body) // 4, abs=3)


@pytest.mark.parametrize(("status", "outcome"), [(400, "bad_request"), (429, "bad_request"), (500, "upstream_failed")])
async def test_refusal_of_an_upstream_is_passed_with_its_status(status: int, outcome: str) -> None:
    stream = FakeStream(b'{"error":{}}', content_type="application/json", status=status)
    hub = await Hub().open(FakeRelay(stream))
    passed = await hub.pass_on()
    assert passed is not None
    assert (passed.status, passed.body) == (status, b'{"error":{}}')
    entry = await hub.entry()
    assert (entry.outcome, entry.prompt_tokens) == (outcome, 0)


@pytest.mark.parametrize("status", [301, 307, 401, 403])
async def test_answer_that_concerns_the_operator_is_not_passed(status: int) -> None:
    stream = FakeStream(b"internal", content_type="text/html", status=status, location="http://169.254.169.254/")
    hub = await Hub().open(FakeRelay(stream))
    with pytest.raises(CorralError) as caught:
        await hub.pass_on()
    assert caught.value.code == "upstream_failed"
    assert "internal" not in caught.value.message
    assert stream.is_closed
    assert (await hub.entry()).outcome == "upstream_failed"


async def test_upstream_that_cannot_be_reached_is_counted_once() -> None:
    hub = await Hub().open(FakeRelay(CorralError("upstream_failed")))
    with pytest.raises(CorralError):
        await hub.pass_on()
    entry = await hub.entry()
    assert (entry.outcome, entry.prompt_tokens) == ("upstream_failed", 0)


EVENTS = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number for number in range(3)]


async def test_stream_is_passed_as_it_arrives_and_counted_by_its_usage() -> None:
    stream = FakeStream(*EVENTS, USAGE, b"data: [DONE]\n\n")
    hub = await Hub().open(FakeRelay(stream))
    passed = await hub.pass_on()
    assert passed is not None
    assert passed.headers == (("content-type", "text/event-stream"),)
    assert await hub.entries() == []
    assert await text_of(passed) == b"".join(EVENTS) + USAGE + b"data: [DONE]\n\n"
    assert stream.is_closed
    entry = await hub.entry()
    assert (entry.prompt_tokens, entry.eval_tokens, entry.outcome) == (3, 2, "ok")


async def test_stream_without_usage_is_counted_by_its_events() -> None:
    hub = await Hub().open(FakeRelay(FakeStream(*EVENTS, b"data: [DONE]\n\n")))
    await text_of(await hub.pass_on(b'{"model":"big","x":"' + b"y" * 100 + b'"}'))
    entry = await hub.entry()
    assert (entry.prompt_tokens > 20, entry.eval_tokens, entry.outcome) == (True, 3, "ok")


@pytest.mark.parametrize("size", [1, 7, 50, 1000])
async def test_stream_is_passed_in_whole_events_however_it_arrives(size: int) -> None:
    data = b"".join(EVENTS) + b'data: {"crlf":1}\r\n\r\n' + USAGE
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    hub = await Hub().open(FakeRelay(FakeStream(*parts)))
    passed = await hub.pass_on()
    assert passed is not None
    assert passed.chunks is not None
    received = [chunk async for chunk in passed.chunks]
    assert b"".join(received) == data
    assert all(chunk.endswith((b"\n\n", b"\r\n\r\n")) for chunk in received)
    assert (await hub.entry()).eval_tokens == 2


async def test_r10_stream_that_breaks_off_passes_whole_events_only_and_then_fails() -> None:
    stream = FakeStream(EVENTS[0], b'data: {"choi', CorralError("upstream_failed"))
    hub = await Hub().open(FakeRelay(stream))
    passed = await hub.pass_on()
    assert passed is not None
    assert passed.chunks is not None
    assert await anext(passed.chunks) == EVENTS[0]
    with pytest.raises(CorralError):
        await anext(passed.chunks)
    assert stream.is_closed
    assert (await hub.entry()).outcome == "upstream_failed"


async def test_stream_whose_end_is_no_whole_event_is_passed_to_the_last_byte() -> None:
    hub = await Hub().open(FakeRelay(FakeStream(EVENTS[0], USAGE.rstrip())))
    assert await text_of(await hub.pass_on()) == EVENTS[0] + USAGE.rstrip()
    assert (await hub.entry()).eval_tokens == 2


async def test_stream_with_an_event_that_does_not_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.hub.inference.MAX_FRAME_BYTES", 100)  # 16 MB would make a slow test
    hub = await Hub().open(FakeRelay(FakeStream(b"x" * 60, b"x" * 60)))
    with pytest.raises(CorralError, match="does not end"):
        await text_of(await hub.pass_on())


async def test_stream_whose_reader_leaves_lets_the_upstream_go() -> None:
    stream = FakeStream(*EVENTS)
    hub = await Hub().open(FakeRelay(stream))
    passed = await hub.pass_on()
    assert passed is not None
    assert passed.chunks is not None
    await anext(passed.chunks)
    await passed.chunks.aclose()
    assert stream.is_closed
    entry = await hub.entry()
    assert (entry.outcome, entry.eval_tokens) == ("canceled", 1)


async def test_t021_revoked_credential_ends_a_passed_stream() -> None:
    hub = await Hub().open(FakeRelay(FakeStream(*EVENTS)))
    passed = await hub.pass_on()
    assert passed is not None
    assert passed.chunks is not None
    await anext(passed.chunks)
    hub.revoked.add("k1")
    await hub.running.recheck()
    with pytest.raises(CorralError, match="revoked"):
        await anext(passed.chunks)
    assert (await hub.entry()).outcome == "unauthorized"
