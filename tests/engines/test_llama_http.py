"""The client of llama.cpp's API, against a server of prepared bytes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, Sampling, Timings
from corral.engines.llama_http import LlamaHttp, sampling_body
from corral.wire.errors import CorralError
from corral.wire.secrets import Secret
from fakes_engine import RawServer, raw_server

CHAT, COMPLETION = "/v1/chat/completions", "/completion"
HELLO = ChatCall(messages=[{"role": "user", "content": "hi"}])
WORD = {"choices": [{"delta": {"content": "word"}}]}
END = {"choices": [{"delta": {}, "finish_reason": "stop"}]}


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with raw_server() as served:
        yield served


@pytest.fixture
async def client(server: RawServer) -> LlamaHttp:
    return LlamaHttp(server.url, Secret("s3cret"), explain, stop=never)


async def never() -> None:
    raise AssertionError("the server is not to be stopped")


async def explain() -> CorralError:
    return CorralError("out_of_memory", "it is gone")


async def collect(events: AsyncIterator[Chunk | Finish]) -> list[Chunk | Finish]:
    return [event async for event in events]


async def failure(events: AsyncIterator[Chunk | Finish]) -> CorralError:
    with pytest.raises(CorralError) as failed:
        await collect(events)
    return failed.value


async def test_chat_sends_what_was_asked_and_the_key(server: RawServer, client: LlamaHttp) -> None:
    server.stream(CHAT, WORD, END, "[DONE]")
    call = ChatCall(
        messages=HELLO.messages,
        tools=[{"type": "function", "function": {"name": "f"}}],
        response_format={"type": "json_object"},
        template_kwargs={"enable_thinking": False},
        sampling=Sampling(values={"temperature": 0.5, "n_predict": 7, "stop": ["x"], "n_discard": -1}),
    )
    assert await collect(client.chat(call)) == [Chunk(content="word"), Finish(reason="stop", timings=Timings())]
    (asked,) = server.asked
    assert asked.headers["authorization"] == "Bearer s3cret"
    assert asked.json == {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"enable_thinking": False},
        "temperature": 0.5,
        "n_predict": 7,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_completion_sends_tokens_before_the_prompt_and_the_schema(server: RawServer, client: LlamaHttp) -> None:
    server.stream(COMPLETION, {"content": "a", "stop": False}, {"content": "", "stop": True, "stop_type": "eos"})
    call = CompletionCall(prompt="hi", context=[1, 2], grammar_schema={"type": "object"})
    assert await collect(client.complete(call)) == [Chunk(content="a"), Finish(reason="stop", timings=Timings())]
    assert server.asked[0].json["prompt"] == [1, 2, "hi"]
    assert server.asked[0].json["json_schema"] == {"type": "object"}


@pytest.mark.parametrize("marker", ["<__media_X9__>", ""])
async def test_files_stand_where_the_prompt_says_under_the_servers_own_marker(
    server: RawServer, client: LlamaHttp, marker: str
) -> None:
    server.answer("/props", {"media_marker": marker} if marker else {})
    server.stream(COMPLETION, {"content": "", "stop": True, "stop_type": "eos"})
    call = CompletionCall(prompt="[img-1] and [img-0], not [img-0] or [img-2]", media=[b"one", b"two"])
    assert await collect(client.complete(call)) == [Finish(reason="stop", timings=Timings())]
    marker = marker or "<__media__>"
    assert server.asked[1].json["prompt"] == {
        "prompt_string": f"{marker} and {marker}, not [img-0] or [img-2]",
        "multimodal_data": ["b25l", "dHdv"],
    }


async def test_files_cannot_follow_tokens(client: LlamaHttp) -> None:
    error = await failure(client.complete(CompletionCall(prompt="[img-0]", context=[1], media=[b"one"])))
    assert error.code == "not_supported"


async def test_suffix_is_asked_for_where_the_engine_fills_gaps(server: RawServer, client: LlamaHttp) -> None:
    server.stream("/infill", {"content": "a", "stop": False}, {"content": "", "stop": True, "stop_type": "eos"})
    call = CompletionCall(prompt="def f(", suffix="return 1", sampling=Sampling(values={"n_predict": 3, "n_discard": -1}))
    assert await collect(client.complete(call)) == [Chunk(content="a"), Finish(reason="stop", timings=Timings())]
    assert server.asked[0].json == {
        "n_predict": 3,
        "stream": True,
        "response_fields": ["content", "stop", "stop_type", "timings", "completion_probabilities"],
        "input_prefix": "def f(",
        "input_suffix": "return 1",
        "input_extra": [],
        "prompt": "",
    }


async def test_suffix_for_a_model_without_markers_is_refused_with_501(server: RawServer, client: LlamaHttp) -> None:
    server.answer("/infill", {"error": {"message": "Infill is not supported by this model"}}, status=501)
    error = await failure(client.complete(CompletionCall(prompt="a", suffix="b")))
    assert (error.code, error.status) == ("bad_request", 501)


async def test_chunks_arrive_while_the_answer_goes_on(server: RawServer, client: LlamaHttp) -> None:
    held = asyncio.Event()
    server.stream(CHAT, WORD, held, END)
    async with aclosing(client.chat(HELLO)) as events:  # type: ignore[type-var]
        assert await anext(events) == Chunk(content="word")
        held.set()
        assert isinstance(await anext(events), Finish)


async def test_closing_the_iterator_hangs_up_at_once(server: RawServer, client: LlamaHttp) -> None:
    server.stream(CHAT, WORD, asyncio.Event())
    async with aclosing(client.chat(HELLO)) as events:  # type: ignore[type-var]
        await anext(events)
        assert not server.gone.is_set()
    await asyncio.wait_for(server.gone.wait(), 2)


async def test_being_canceled_hangs_up_even_before_the_first_byte(server: RawServer, client: LlamaHttp) -> None:
    server.answers[CHAT] = [asyncio.Event()]
    task = asyncio.create_task(collect(client.chat(HELLO)))
    while not server.asked:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait_for(server.gone.wait(), 2)
    with pytest.raises(asyncio.CancelledError):
        await task


class Stopped(LlamaHttp):
    """A client that gives up soon. ended: set when it had the server stopped, whose answers then break off."""

    def __init__(self, server: RawServer) -> None:
        self.ended = asyncio.Event()
        super().__init__(server.url, Secret("s3cret"), explain, stop=self._end, template_s=0.01)

    async def _end(self) -> None:
        self.ended.set()


@pytest.mark.parametrize("leaves", [False, True])
async def test_t107_server_whose_template_has_no_end_for_some_messages_is_stopped(server: RawServer, leaves: bool) -> None:
    client = Stopped(server)
    server.answers[CHAT] = server.answers["/apply-template"] = [client.ended, None]
    task = asyncio.create_task(collect(client.chat(HELLO)))
    if leaves:
        while not server.asked:
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait_for(client.ended.wait(), 60)
    with pytest.raises(asyncio.CancelledError if leaves else CorralError):
        await task


async def test_t107_prompt_that_is_never_made_is_an_engine_failure(server: RawServer) -> None:
    client = Stopped(server)
    server.answers["/apply-template"] = [client.ended, None]
    with pytest.raises(CorralError, match="it is gone"):
        await client.apply_template(HELLO)
    assert client.ended.is_set()


async def test_server_that_reads_a_long_prompt_is_left_to_it(server: RawServer) -> None:
    client = LlamaHttp(server.url, Secret("s3cret"), explain, stop=never, template_s=0.5)
    has_read = asyncio.Event()
    server.answer("/apply-template", {"prompt": "hi"})
    server.stream(CHAT, WORD, END)
    server.answers[CHAT].insert(0, has_read)
    task = asyncio.create_task(collect(client.chat(HELLO)))
    while [asked.path for asked in server.asked] != [CHAT, "/apply-template"]:
        await asyncio.sleep(0.01)
    has_read.set()
    assert len(await task) == 2


@pytest.mark.parametrize("status", [400, 413, 422, 500, 501])
async def test_refusal_has_the_engines_status_and_words(server: RawServer, client: LlamaHttp, status: int) -> None:
    server.answer(CHAT, {"error": {"code": status, "message": "too long", "type": "x"}}, status=status)
    error = await failure(client.chat(HELLO))
    assert (error.code, error.status, error.message) == ("bad_request", status, "too long")


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_refusal_of_our_own_key_does_not_look_like_the_callers_fault(
    server: RawServer, client: LlamaHttp, status: int
) -> None:
    server.answer(CHAT, {"error": {"message": "Invalid API Key"}}, status=status)
    error = await failure(client.chat(HELLO))
    assert (error.code, error.status) == ("engine_failed", 500)


async def test_engine_that_is_loading_is_unavailable(server: RawServer, client: LlamaHttp) -> None:
    server.answer(CHAT, {"error": {"message": "Loading model"}}, status=503)
    error = await failure(client.chat(HELLO))
    assert (error.code, error.status, error.message) == ("unavailable", 503, "Loading model")


@pytest.mark.parametrize("pieces", [[None], [WORD, None], [WORD]])
async def test_r9_answer_that_breaks_off_fails_in_ollamas_and_the_process_words(
    server: RawServer, client: LlamaHttp, pieces: list[object]
) -> None:
    server.stream(CHAT, *pieces)
    error = await failure(client.chat(HELLO))
    assert (error.code, error.status) == ("out_of_memory", 500)
    assert error.message == "an error was encountered while running the model: it is gone"


async def test_r9_server_that_gives_no_answer_fails_in_ollamas_and_the_process_words(
    client: LlamaHttp, server: RawServer
) -> None:
    server.answers[CHAT] = [None]
    assert (await failure(client.chat(HELLO))).message == (
        "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error: it is gone"
    )


async def test_server_that_has_gone_is_an_engine_failure() -> None:
    async with raw_server() as gone:
        client = LlamaHttp(gone.url, Secret("s3cret"), explain, stop=never)
    assert (await failure(client.chat(HELLO))).message.endswith("an internal error: it is gone")
    assert not await client.is_healthy()


async def test_redirect_is_not_followed(server: RawServer, client: LlamaHttp) -> None:
    server.answer(CHAT, {}, status=302, headers="Location: /elsewhere\r\n")
    await failure(client.chat(HELLO))
    assert [asked.path for asked in server.asked] == [CHAT]


async def test_embeddings_are_put_in_order(server: RawServer, client: LlamaHttp) -> None:
    data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]
    server.answer("/v1/embeddings", {"data": data, "usage": {"prompt_tokens": 9}})
    assert await client.embed(["a", "b"]) == ([[1.0], [2.0]], 9)
    with pytest.raises(CorralError, match="2 vectors for 1"):
        await client.embed(["a"])


@pytest.mark.parametrize("answer", [{}, {"data": "x"}, {"data": [{"index": 0, "embedding": [None]}]}, [], "x"])
async def test_answer_that_is_not_understood_is_an_engine_failure(server: RawServer, client: LlamaHttp, answer: object) -> None:
    server.answer("/v1/embeddings", answer)
    with pytest.raises(CorralError) as failed:
        await client.embed(["a"])
    assert failed.value.code == "engine_failed"


async def test_tokens_and_template_are_asked_for(server: RawServer, client: LlamaHttp) -> None:
    server.answer("/tokenize", {"tokens": [1, 2]})
    server.answer("/apply-template", {"prompt": "<user>hi"})
    assert await client.tokenize("hi", add_special=True) == [1, 2]
    assert await client.apply_template(HELLO) == "<user>hi"
    assert server.asked[0].json == {"content": "hi", "add_special": True}


async def test_health_is_asked_for_and_taken_for_granted_after_an_answer(server: RawServer, client: LlamaHttp) -> None:
    server.answer("/health", {"error": {"message": "Loading model"}}, status=503)
    assert not await client.is_healthy()
    server.answer("/health", {"status": "ok"})
    assert await client.is_healthy()
    server.stream(CHAT, WORD, END)
    await collect(client.chat(HELLO))
    server.answer("/health", {}, status=503)
    assert await client.is_healthy()
    server.stream(CHAT, None)
    await failure(client.chat(HELLO))
    assert not await client.is_healthy()


@pytest.mark.parametrize(
    "values",
    [
        {"n_discard": -1},
        {"grammar": "root ::= x"},
        {"--log-file": "/x"},
        {"slot_save_path": "/x"},
        {"prompt": "other"},
        {"stream": False},
        {"temperature": None},
        {"lora": [{"id": 0}]},
        {"id_slot": 3},
    ],
)
def test_t096_unknown_option_never_reaches_the_engine(values: dict[str, object]) -> None:
    assert sampling_body(values) == {}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "--log-file=/x"},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e300},
        {"temperature": True},
        {"n_predict": 1.5},
        {"n_predict": 10**12},
        {"n_keep": -(10**12)},
        {"top_k": "$(id)"},
        {"stop": "text"},
        {"stop": [1]},
        {"stop": ["x" * 5000]},
        {"stop": ["x"] * 300},
        {"logprobs": 1},
        {"seed": 2**32},
    ],
)
def test_t096_option_with_a_value_that_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(CorralError) as refused:
        sampling_body(values)
    assert refused.value.status == 400


def test_ordinary_options_are_handed_on() -> None:
    values = {"temperature": 0, "top_p": 0.9, "seed": 2**32 - 1, "stop": [], "n_predict": -1, "logprobs": True}
    assert sampling_body(values) == values
