"""Models of other servers, against a server of prepared bytes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, LoadOptions, Runner, Sampling, Timings
from corral.engines.upstream import UpstreamEngine
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret
from fakes_engine import RawServer, raw_server
from fakes_models import model

CHAT, PLAIN, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = ChatCall(messages=[{"role": "user", "content": "hi"}])
WORD = {"choices": [{"delta": {"content": "word"}}]}
END = {"choices": [{"delta": {}, "finish_reason": "length"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with raw_server() as served:
        yield served


@pytest.fixture
async def engine(server: RawServer) -> AsyncIterator[UpstreamEngine]:
    found = UpstreamEngine(key_of={server.url: Secret("sk-provider")}.get)
    yield found
    await found.close()


@pytest.fixture
async def runner(server: RawServer, engine: UpstreamEngine) -> Runner:
    return await engine.load(model(remote_host=server.url, remote_model="gpt-big"), LoadOptions())


async def collect(events: AsyncIterator[Chunk | Finish]) -> list[Chunk | Finish]:
    return [event async for event in events]


async def failure(events: AsyncIterator[Chunk | Finish]) -> CorralError:
    with pytest.raises(CorralError) as failed:
        await collect(events)
    return failed.value


async def test_chat_speaks_openais_words_and_leaves_out_what_says_nothing(server: RawServer, runner: Runner) -> None:
    server.stream(CHAT, WORD, END, USAGE, "[DONE]")
    values = {"temperature": 0.5, "top_k": 40, "seed": -1, "stop": [], "n_predict": 9, "presence_penalty": 0.0, "n_discard": -1}
    found = await collect(runner.chat(ChatCall(messages=HELLO.messages, sampling=Sampling(values=values))))
    assert found == [Chunk(content="word"), Finish(reason="length", timings=Timings(prompt_tokens=5, eval_tokens=7))]
    (asked,) = server.asked
    assert asked.headers["authorization"] == "Bearer sk-provider"
    assert asked.json == {
        "model": "gpt-big",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_plain_completion_is_passed_on_as_one(server: RawServer, runner: Runner) -> None:
    server.stream(PLAIN, {"choices": [{"text": "word"}]}, {"choices": [{"text": "", "finish_reason": "stop"}]})
    found = await collect(runner.complete(CompletionCall(prompt="Once")))
    assert found == [Chunk(content="word"), Finish(reason="stop", timings=Timings())]
    assert server.asked[0].json["prompt"] == "Once"


async def test_suffix_is_passed_on_beside_the_prompt(server: RawServer, runner: Runner) -> None:
    server.stream(PLAIN, {"choices": [{"text": "word", "finish_reason": "stop"}]})
    await collect(runner.complete(CompletionCall(prompt="Once", suffix="end")))
    assert (server.asked[0].json["prompt"], server.asked[0].json["suffix"]) == ("Once", "end")


async def test_what_openais_api_cannot_express_is_refused(runner: Runner) -> None:
    for call in (CompletionCall(prompt="x", context=[1]), CompletionCall(prompt="x", grammar_schema={})):
        with pytest.raises(CorralError) as refused:
            runner.complete(call)
        assert refused.value.code == "not_supported"
    for ask in (runner.tokenize("x"), runner.apply_template(HELLO)):
        with pytest.raises(CorralError) as refused:
            await ask
        assert refused.value.code == "not_supported"


async def test_embeddings_are_put_in_order(server: RawServer, runner: Runner) -> None:
    data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]
    server.answer(EMBED, {"data": data, "usage": {"prompt_tokens": 9}})
    assert await runner.embed(["a", "b"]) == ([[1.0], [2.0]], 9)
    assert server.asked[0].json == {"model": "gpt-big", "input": ["a", "b"]}
    server.answer(EMBED, {"nothing": 1})
    with pytest.raises(CorralError) as failed:
        await runner.embed(["a"])
    assert failed.value.code == "upstream_failed"


@pytest.mark.parametrize(
    ("status", "code", "answered"),
    [
        (400, "bad_request", 400),
        (422, "bad_request", 422),
        (401, "upstream_failed", 502),
        (403, "upstream_failed", 502),
        (404, "upstream_failed", 502),
        (302, "upstream_failed", 502),
        (500, "upstream_failed", 502),
        (503, "upstream_failed", 502),
        (429, "rate_limited", 429),
    ],
)
async def test_r10_refusal_tells_whose_fault_it_is(
    server: RawServer, runner: Runner, status: int, code: str, answered: int
) -> None:
    server.answer(CHAT, {"error": {"message": "because"}}, status=status, headers="Retry-After: 7\r\nLocation: /x\r\n")
    error = await failure(runner.chat(HELLO))
    assert (error.code, error.status) == (code, answered)
    assert error.retry_after_s == (7 if status == 429 else None)
    assert len(server.asked) == 1


@pytest.mark.parametrize("pieces", [[None], [WORD, None], [WORD], [WORD, b"data: {nonsense\n\n"]])
async def test_r10_garbage_and_early_ends_are_upstream_failures(server: RawServer, runner: Runner, pieces: list[object]) -> None:
    server.stream(CHAT, *pieces)
    assert (await failure(runner.chat(HELLO))).code == "upstream_failed"


async def test_r10_upstream_that_is_not_there_is_an_upstream_failure(engine: UpstreamEngine) -> None:
    async with raw_server() as gone:
        url = gone.url
    with pytest.raises(CorralError) as failed:
        await engine.open_stream(url, CHAT, b"{}")
    assert (failed.value.code, failed.value.status) == ("upstream_failed", 502)


async def test_closing_an_answer_early_hangs_up(server: RawServer, runner: Runner) -> None:
    server.stream(CHAT, WORD, asyncio.Event())
    async with aclosing(runner.chat(HELLO)) as events:  # type: ignore[type-var]
        await anext(events)
    await asyncio.wait_for(server.gone.wait(), 2)


@pytest.mark.parametrize(
    "address",
    ["", "localhost:1", "ftp://x", "http://", "http://user@x", "http://x?y", "http://x#y", "http://[", "http://x:99999"],
)
async def test_address_that_is_none_is_refused(engine: UpstreamEngine, address: str) -> None:
    with pytest.raises(CorralError) as refused:
        await engine.load(model(remote_host=address, remote_model="m"), LoadOptions())
    assert refused.value.code == "invalid"


# ── Passing on ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_stream_passes_status_headers_and_bytes_as_they_came(server: RawServer, engine: UpstreamEngine) -> None:
    server.stream(CHAT, WORD, b": comment\n\n", "[DONE]")
    body = b'{"model" : "m",  "unknown":1}'
    answer = await engine.open_stream(server.url, CHAT, body)
    assert answer.status == 200
    assert ("content-type", "text/event-stream") in answer.headers
    received = b"".join([data async for data in answer.chunks()])
    assert received == b'data: {"choices": [{"delta": {"content": "word"}}]}\n\n: comment\n\ndata: [DONE]\n\n'
    assert server.asked[0].body == body
    await answer.close()
    await answer.close()


async def test_t090_nothing_of_the_callers_request_travels_but_the_body(server: RawServer, engine: UpstreamEngine) -> None:
    server.answer(CHAT, {}, headers="Set-Cookie: upstream=1; Path=/\r\n")
    for _ in range(2):
        answer = await engine.open_stream(server.url, CHAT, b"{}")
        await answer.read(100)
        await answer.close()
    assert len(server.asked) == 2
    for asked in server.asked:
        assert asked.headers.keys() <= {
            "host",
            "accept",
            "authorization",
            "content-type",
            "content-length",
            "accept-encoding",
            "user-agent",
        }
        assert asked.headers["authorization"] == "Bearer sk-provider"


async def test_key_goes_only_to_the_server_it_belongs_to(engine: UpstreamEngine) -> None:
    async with raw_server() as other:
        other.answer(CHAT, {})
        answer = await engine.open_stream(other.url, CHAT, b"{}")
        await answer.close()
        assert "authorization" not in other.asked[0].headers


async def test_stream_is_not_redirected(server: RawServer, engine: UpstreamEngine) -> None:
    server.answer(CHAT, {}, status=307, headers="Location: http://169.254.169.254/\r\n")
    answer = await engine.open_stream(server.url, CHAT, b"{}")
    assert answer.status == 307
    assert len(server.asked) == 1
    await answer.close()


async def test_body_is_cut_off_at_the_limit(server: RawServer, engine: UpstreamEngine) -> None:
    server.answer(CHAT, {"text": "x" * 1000})
    answer = await engine.open_stream(server.url, CHAT, b"{}")
    assert len(await answer.read(10)) == 10
    await answer.close()


async def test_stream_that_breaks_off_is_an_upstream_failure(server: RawServer, engine: UpstreamEngine) -> None:
    server.stream(CHAT, WORD, None)
    answer = await engine.open_stream(server.url, CHAT, b"{}")
    with pytest.raises(CorralError) as failed:
        await answer.read(10_000)
    assert failed.value.code == "upstream_failed"
    await answer.close()


async def test_connection_is_used_again_after_a_whole_answer_only(server: RawServer, engine: UpstreamEngine) -> None:
    server.answer(CHAT, {"whole": 1})
    for _ in range(3):
        answer = await engine.open_stream(server.url, CHAT, b"{}")
        await answer.read(1000)
        await answer.close()
    assert server.connections == 1
    server.stream(CHAT, WORD, asyncio.Event())
    answer = await engine.open_stream(server.url, CHAT, b"{}")
    await answer.close()
    await asyncio.wait_for(server.gone.wait(), 2)
