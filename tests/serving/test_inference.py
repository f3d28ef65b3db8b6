"""Native requests through runners: what the engine is asked, what callers are told, and what happens when things go wrong."""

import math
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, Timings
from corral.core.records import Capability, ModelDetails
from corral.serving.fitting import MAX_NUMBERS, TEXTS_AT_ONCE
from corral.serving.inference import Inference
from corral.wire.errors import CorralError
from corral.wire.native import (
    ChatRequest,
    ChatResponse,
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    GenerateResponse,
    Message,
)
from fakes import FakeClock
from fakes_inference import CONTEXT, STOP, FakePool, FakeRunner, Step, a_model

TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, "
    "adjust the context length in settings, or use a model with a longer context length"
)
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


class Kitchen:
    """Inference over one fake runner."""

    def __init__(self, *answer: Step, context_length: int = 0) -> None:
        self.clock = FakeClock()
        self.runner = FakeRunner(*answer, clock=self.clock, context_length=context_length)
        self.pool = FakePool(self.runner, context_length=context_length or CONTEXT)
        self.inference = Inference(self.pool, self.clock)
        self.model = a_model()

    async def generate(self, prompt: str = "hi", **fields: Any) -> list[GenerateResponse]:
        request = GenerateRequest(model="M:latest", prompt=prompt, **fields)
        return [event async for event in self.inference.generate(self.model, request)]

    async def chat(self, *contents: str, **fields: Any) -> list[ChatResponse]:
        messages = [Message(role="user", content=content) for content in contents or ("hi",)]
        return await self.chat_of(messages, **fields)

    async def chat_of(self, messages: list[Message], **fields: Any) -> list[ChatResponse]:
        request = ChatRequest(model="M:latest", messages=messages, **fields)
        return [event async for event in self.inference.chat(self.model, request)]

    async def refused(self, route: str, **fields: Any) -> CorralError:
        """The error of a request that must not reach the engine."""
        with pytest.raises(CorralError) as caught:
            await (self.generate(**fields) if route == "generate" else self.chat_of([Message(role="user", content="")], **fields))
        assert self.runner.calls == []
        assert self.pool.lent == 0
        return caught.value

    @property
    def chat_call(self) -> ChatCall:
        (call,) = self.runner.calls
        assert isinstance(call, ChatCall)
        return call

    @property
    def completion_call(self) -> CompletionCall:
        (call,) = self.runner.calls
        assert isinstance(call, CompletionCall)
        return call

    def can(self, *capabilities: Capability, **fields: Any) -> None:
        self.model = a_model(capabilities=frozenset({Capability.COMPLETION, *capabilities}), **fields)


def lines(events: list[Any]) -> list[str]:
    return [msgspec.json.encode(event).decode() for event in events]


# ── Chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_chat_streams_the_events_of_the_trace() -> None:
    kitchen = Kitchen(0.5, Chunk(thinking="User greets"), 0.4, Chunk(content="Hello"), 0.012345678, STOP)
    kitchen.can(Capability.THINKING)
    thinking, content, final = lines(await kitchen.chat(think=True))
    assert thinking == (
        '{"model":"M:latest","created_at":"2026-09-21T14:13:20.5Z",'
        '"message":{"role":"assistant","content":"","thinking":"User greets"},"done":false}'
    )
    assert content == (
        '{"model":"M:latest","created_at":"2026-09-21T14:13:20.9Z","message":{"role":"assistant","content":"Hello"},"done":false}'
    )
    assert final == (
        '{"model":"M:latest","created_at":"2026-09-21T14:13:20.912346Z","message":{"role":"assistant","content":""},"done":true,'
        '"done_reason":"stop","total_duration":912345678,"load_duration":41234567,"prompt_eval_count":11,'
        '"prompt_eval_duration":70000000,"eval_count":9,"eval_duration":300000000}'
    )


async def test_chat_numbers_that_are_zero_are_left_out() -> None:
    *_, final = lines(await Kitchen(Finish(reason="length", timings=Timings())).chat())
    assert final.endswith('"done":true,"done_reason":"length","load_duration":41234567}')


async def test_chat_asks_the_engine_in_its_own_words() -> None:
    kitchen = Kitchen()
    await kitchen.chat(format="json", options={"temperature": 0, "num_ctx": 64, "n_discard": -1}, keep_alive=30)
    assert kitchen.chat_call == ChatCall(
        messages=[{"role": "user", "content": "hi"}],
        tools=[],
        response_format={"type": "json_object"},
        template_kwargs={},
        sampling=kitchen.chat_call.sampling,
    )
    assert kitchen.chat_call.sampling.values == {
        "temperature": 0.0,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repeat_last_n": 64,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": -1,
        "stop": [],
        "n_predict": 10 * CONTEXT,
        "n_keep": 4,
    }
    assert kitchen.pool.used == [{"model": kitchen.model, "options": {"num_ctx": 64}, "keep_alive_s": 30.0, "embedding": False}]


async def test_chat_calls_come_with_the_last_event() -> None:
    call = {"index": 0, "id": "call_ab12cd34", "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}}
    kitchen = Kitchen(Chunk(content="Let me see."), Chunk(tool_calls=[call]), STOP)
    kitchen.can(Capability.TOOLS)
    *rest, final = lines(await kitchen.chat(tools=[WEATHER]))
    assert kitchen.chat_call.tools == [WEATHER]
    assert len(rest) == 1
    assert (
        '"message":{"role":"assistant","content":"","tool_calls":[{"id":"call_ab12cd34",'
        '"function":{"index":0,"name":"get_weather","arguments":{"city":"Oslo"}}}]},"done":true,"done_reason":"stop"' in final
    )


async def test_chat_calls_without_id_get_one_each() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    kitchen = Kitchen(Chunk(tool_calls=[call]), Chunk(tool_calls=[call]), STOP)
    *_, final = await kitchen.chat()
    first, second = final.message.tool_calls
    assert first.id.startswith("call_")
    assert len(first.id) == len("call_") + 8
    assert first.id != second.id
    assert [first.function.index, second.function.index] == [0, 1]


async def test_chat_of_a_model_with_stored_words_puts_them_first() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(system="Be brief.", messages=(("user", "q"), ("assistant", "a")))
    await kitchen.chat()
    assert [(message["role"], message["content"]) for message in kitchen.chat_call.messages] == [
        ("system", "Be brief."),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "hi"),
    ]


async def test_chat_with_its_own_system_message_keeps_the_stored_one_out() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(system="Be brief.")
    await kitchen.chat_of([Message(role="system", content="Be long."), Message(role="user", content="hi")])
    assert [message["content"] for message in kitchen.chat_call.messages] == ["Be long.", "hi"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (None, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("low", {"enable_thinking": True, "reasoning_effort": "low"}),
        ("max", {"enable_thinking": True, "reasoning_effort": "max"}),
    ],
)
async def test_chat_of_a_thinking_model_thinks_unless_told_not_to(asked: object, told: dict[str, Any]) -> None:
    kitchen = Kitchen()
    kitchen.can(Capability.THINKING)
    await kitchen.chat(think=asked)
    assert kitchen.chat_call.template_kwargs == told


async def test_chat_of_gptoss_knows_three_levels() -> None:
    kitchen = Kitchen()
    kitchen.can(Capability.THINKING, details=ModelDetails(family="gptoss"))
    await kitchen.chat(think="max")
    assert kitchen.chat_call.template_kwargs["reasoning_effort"] == "high"


@pytest.mark.parametrize("route", ["generate", "chat"])
@pytest.mark.parametrize("think", [True, "low"])
async def test_thinking_is_refused_to_a_model_that_cannot(route: str, think: object) -> None:
    error = await Kitchen().refused(route, think=think)
    assert (error.message, error.status) == ('"M:latest" does not support thinking', 400)


async def test_chat_told_not_to_think_is_no_error_for_a_model_that_cannot() -> None:
    kitchen = Kitchen()
    await kitchen.chat(think=False)
    assert kitchen.chat_call.template_kwargs == {"enable_thinking": False}


async def test_chat_logprobs_have_alternatives_only_when_asked_for() -> None:
    token = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [{"token": "a", "logprob": -1.5}]}
    for top, others in ((0, []), (2, [{"token": "a", "logprob": -1.5, "bytes": [97]}])):
        kitchen = Kitchen(Chunk(content="é", logprobs=[token]), STOP)
        first, _ = await kitchen.chat(logprobs=True, top_logprobs=top)
        sent = msgspec.to_builtins(first.logprobs)
        assert sent == [{"token": "é", "logprob": -0.5, "bytes": [195, 169], **({"top_logprobs": others} if others else {})}]
        asked = kitchen.chat_call.sampling.values
        assert (asked["logprobs"], asked["top_logprobs"]) == (True, max(top, 1))


async def test_chat_event_with_nothing_but_logprobs_is_sent() -> None:
    token = {"token": "", "logprob": 0.0}
    assert len(await Kitchen(Chunk(logprobs=[token]), STOP).chat(logprobs=True)) == 2


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, '"M:latest" does not support chat'),
        ({"tools": [WEATHER]}, '"M:latest" does not support chat'),
    ],
)
async def test_chat_is_refused_to_a_model_that_cannot(fields: dict[str, Any], text: str) -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(capabilities=frozenset({Capability.EMBEDDING}))
    error = await kitchen.refused("chat", **fields)
    assert (error.message, error.status) == (text, 400)


async def test_chat_tools_are_refused_with_the_full_name() -> None:
    error = await Kitchen().refused("chat", tools=[WEATHER])
    assert (error.message, error.status) == ("registry.ollama.ai/library/m:latest does not support tools", 400)


async def test_chat_without_messages_loads_or_unloads() -> None:
    kitchen = Kitchen()
    assert lines(await kitchen.chat_of([])) == [
        '{"model":"M:latest","created_at":"2026-09-21T14:13:20Z","message":{"role":"assistant","content":""},"done":true,'
        '"done_reason":"load"}'
    ]
    assert lines(await kitchen.chat_of([], keep_alive="0")) == [
        '{"model":"M:latest","created_at":"2026-09-21T14:13:20Z","message":{"role":"assistant","content":""},"done":true,'
        '"done_reason":"unload"}'
    ]
    assert kitchen.pool.unloaded == [kitchen.model]
    assert len(kitchen.pool.used) == 1
    assert kitchen.runner.calls == []


# ── Generate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_generate_streams_text_and_ends_with_the_context() -> None:
    first, second, final = lines(await Kitchen().generate("one three"))
    assert first == '{"model":"M:latest","created_at":"2026-09-21T14:13:20Z","response":"Hel","done":false}'
    assert second == '{"model":"M:latest","created_at":"2026-09-21T14:13:20Z","response":"lo","done":false}'
    # The fake's tokens are the lengths of words of `user: one threeHello`.
    assert final == (
        '{"model":"M:latest","created_at":"2026-09-21T14:13:20Z","response":"","done":true,"done_reason":"stop",'
        '"context":[5,3,10],"load_duration":41234567,"prompt_eval_count":11,"prompt_eval_duration":70000000,"eval_count":9,'
        '"eval_duration":300000000}'
    )


async def test_generate_goes_through_chat_so_that_thinking_is_split_off() -> None:
    kitchen = Kitchen(Chunk(thinking="hm"), Chunk(content="4"), STOP)
    kitchen.can(Capability.THINKING, system="stored", messages=(("user", "q"), ("assistant", "a")))
    thinking, _, _ = await kitchen.generate("2+2", images=[b"\x89PNG\r\n\x1a\n"])
    assert (thinking.thinking, thinking.response) == ("hm", "")
    contents = [message["content"] for message in kitchen.chat_call.messages]
    assert contents[:3] == ["stored", "q", "a"]
    assert [part["type"] for part in contents[3]] == ["text", "image_url"]


async def test_generate_system_of_the_request_replaces_the_models() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(system="stored")
    await kitchen.generate(system="mine")
    assert kitchen.chat_call.messages[0] == {"role": "system", "content": "mine"}


async def test_generate_raw_sends_the_prompt_as_it_is_and_no_context() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(system="stored", template="{{ .System }} {{ .Prompt }}", chat_template="")
    *_, final = await kitchen.generate("<s>x", raw=True, format={"type": "object"}, logprobs=True, top_logprobs=3)
    assert kitchen.completion_call.prompt == "<s>x"
    assert kitchen.completion_call.grammar_schema == {"type": "object"}
    assert kitchen.completion_call.sampling.values["n_probs"] == 3
    assert final.context == []


async def test_generate_of_weights_without_any_template_sends_the_prompt_as_it_is() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(chat_template="", system="unused")
    await kitchen.generate("once upon")
    assert kitchen.completion_call.prompt == "once upon"


async def test_generate_with_context_puts_its_tokens_first_and_leaves_stored_messages_out() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(messages=(("user", "q"),))
    *_, final = await kitchen.generate("two", context=[7, 8])
    assert kitchen.completion_call.context == (7, 8)
    assert kitchen.completion_call.prompt == "user: two"
    assert final.context == [7, 8, 5, 8]


async def test_generate_of_an_engine_that_cannot_count_has_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    kitchen = Kitchen()

    async def refuse(text: str, *, add_special: bool = True) -> list[int]:
        raise CorralError("not_supported")

    monkeypatch.setattr(kitchen.runner, "tokenize", refuse)  # an upstream has no tokenizer to ask
    *_, final = await kitchen.generate()
    assert final.done_reason == "stop"
    assert final.context == []


async def test_generate_without_prompt_loads_or_unloads() -> None:
    kitchen = Kitchen()
    assert lines(await kitchen.generate("")) == [
        '{"model":"M:latest","created_at":"2026-09-21T14:13:20Z","response":"","done":true,"done_reason":"load"}'
    ]
    assert lines(await kitchen.generate("", keep_alive=0)) == [
        '{"model":"M:latest","created_at":"2026-09-21T14:13:20Z","response":"","done":true,"done_reason":"unload"}'
    ]
    assert kitchen.pool.unloaded == [kitchen.model]


@pytest.mark.parametrize("fields", [{"template": "x"}, {"system": "x"}, {"context": [1]}])
async def test_generate_raw_refuses_what_would_change_the_prompt(fields: dict[str, Any]) -> None:
    error = await Kitchen().refused("generate", raw=True, **fields)
    assert (error.message, error.status) == ("raw mode does not support template, system, or context", 400)


@pytest.mark.parametrize(
    ("capabilities", "fields", "text"),
    [
        ({Capability.EMBEDDING}, {}, '"M:latest" does not support generate'),
        ({Capability.COMPLETION}, {"suffix": "x", "raw": True}, "registry.ollama.ai/library/m:latest does not support insert"),
    ],
)
async def test_generate_is_refused_to_a_model_that_cannot(
    capabilities: set[Capability], fields: dict[str, Any], text: str
) -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(capabilities=frozenset(capabilities))
    error = await kitchen.refused("generate", **fields)
    assert (error.message, error.status) == (text, 400)


async def test_suffix_goes_to_the_engine_beside_the_prompt_and_past_the_template() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(chat_template="", template="{{ .Prompt }}{{ .Suffix }}", system="be brief")
    events = await kitchen.generate("def f(", suffix="return 1", logprobs=True, format={"type": "string"})
    (call,) = kitchen.runner.calls
    assert isinstance(call, CompletionCall)
    assert (call.prompt, call.suffix, call.context, call.grammar_schema) == ("def f(", "return 1", (), {"type": "string"})
    assert call.sampling.values["n_probs"] == 1
    assert ("".join(event.response for event in events), events[-1].done_reason, events[-1].context) == ("Hello", "stop", [])


async def test_suffix_for_a_model_without_markers_is_refused_in_ollamas_words() -> None:
    kitchen = Kitchen(CorralError("bad_request", "Infill is not supported by this model: …", status=501))
    with pytest.raises(CorralError) as refused:
        await kitchen.generate(suffix="x")
    assert (refused.value.message, refused.value.status) == ("registry.ollama.ai/library/m:latest does not support insert", 400)
    assert kitchen.pool.lent == 0


async def test_engine_that_refuses_a_prompt_without_suffix_keeps_its_own_words() -> None:
    kitchen = Kitchen(CorralError("bad_request", "not here", status=501))
    with pytest.raises(CorralError, match="not here"):
        await kitchen.generate()


async def test_tokens_of_a_chat_are_counted_over_its_template_and_the_stored_messages() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(system="be brief", messages=(("user", "a"), ("assistant", "b")))
    request = ChatRequest(model="m", messages=[Message(role="user", content="one two", images=[b"x"])])
    # system: be brief user: a assistant: b user: one two
    assert await kitchen.inference.count_tokens(kitchen.model, request) == 10 + 768
    assert (kitchen.runner.calls, kitchen.pool.lent) == ([], 0)


async def test_tokens_are_estimated_where_nobody_tells_them() -> None:
    class Silent(FakeRunner):
        async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
            raise CorralError("not_supported", "not told")

    kitchen = Kitchen()
    kitchen.pool.runner = Silent()
    request = ChatRequest(model="m", messages=[Message(role="user", content="x" * 40)])
    assert await kitchen.inference.count_tokens(kitchen.model, request) == 11


async def test_counting_fails_as_the_engine_does() -> None:
    class Broken(FakeRunner):
        async def apply_template(self, call: ChatCall) -> str:
            raise CorralError("engine_failed", "gone")

    kitchen = Kitchen()
    kitchen.pool.runner = Broken()
    with pytest.raises(CorralError, match="gone"):
        await kitchen.inference.count_tokens(kitchen.model, ChatRequest(model="m", messages=[Message(role="user", content="x")]))


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ({"weights": None, "chat_template": ""}, {"raw": True, "images": [b"x"]}),
        ({"weights": None, "chat_template": ""}, {"template": "{{ .Prompt }}"}),
    ],
)
async def test_generate_says_what_is_not_built_yet(model: dict[str, Any], fields: dict[str, Any]) -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(**model)
    with pytest.raises(CorralError) as refused:
        await kitchen.generate(**fields)
    assert refused.value.code == "not_supported"
    assert kitchen.runner.calls == []


async def test_chat_of_weights_without_any_template_is_the_turns_in_a_row() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(chat_template="", template="{{ .Prompt }}", system="unused")
    await kitchen.chat_of(
        [Message(role="user", content="a"), Message(role="assistant", content="b"), Message(role="user", content="c")]
    )
    assert kitchen.completion_call.prompt == "abc"


# ── Options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("route", ["generate", "chat"])
async def test_option_of_a_wrong_type_answers_ollamas_text(route: str) -> None:
    error = await Kitchen().refused(route, options={"num_ctx": "x"})
    assert (error.message, error.status) == ('option "num_ctx" must be of type integer', 500)


@pytest.mark.parametrize("value", [10**12, "--log-file=/x", "4096\n", "$(id)", float("nan"), True, [1]])
async def test_t096_context_that_is_no_sane_number_is_refused_and_no_runner_asked_for(value: object) -> None:
    kitchen = Kitchen()
    assert (await kitchen.refused("chat", options={"num_ctx": value})).code == "bad_request"
    assert kitchen.pool.used == []


async def test_options_of_the_request_win_over_the_models() -> None:
    kitchen = Kitchen()
    kitchen.model = a_model(parameters={"temperature": 0.1, "top_k": 3, "num_ctx": 50})
    await kitchen.chat(options={"temperature": 0.9, "num_predict": 5})
    values = kitchen.chat_call.sampling.values
    assert (values["temperature"], values["top_k"], values["n_predict"]) == (0.9, 3, 5)
    assert kitchen.pool.used[0]["options"] == {"num_ctx": 50}


async def test_format_of_another_kind_answers_ollamas_text() -> None:
    error = await Kitchen().refused("chat", format="xml")
    assert error.status == 500
    assert "invalid format" in error.message


# ── Too long ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_chat_too_long_leaves_out_the_oldest_messages() -> None:
    # Each message is two words to the fake tokenizer (`user: x`), so four messages fit below ten words.
    kitchen = Kitchen(context_length=10)
    system = Message(role="system", content="s")
    messages = [Message(role="user", content=str(number)) for number in range(8)]
    assert (await kitchen.chat_of([system, *messages]))[-1].done
    _, sent = kitchen.runner.calls
    assert isinstance(sent, ChatCall)
    assert [message["content"] for message in sent.messages] == ["s", "5", "6", "7"]
    assert kitchen.runner.open_answers == 0


async def test_chat_too_long_is_refused_when_it_may_not_be_cut() -> None:
    kitchen = Kitchen(context_length=10)
    with pytest.raises(CorralError) as caught:
        await kitchen.chat(*"abcdefgh", truncate=False)
    assert (caught.value.message, caught.value.status) == (TOO_LONG, 400)
    assert kitchen.pool.lent == 0


@pytest.mark.parametrize("contents", [("word " * 20,), ("a", "word " * 20)])
async def test_chat_whose_last_message_is_too_long_is_refused(contents: tuple[str, ...]) -> None:
    with pytest.raises(CorralError) as caught:
        await Kitchen(context_length=10).chat(*contents)
    assert caught.value.message == TOO_LONG


async def test_chat_images_count_as_tokens_when_it_is_cut() -> None:
    kitchen = Kitchen(context_length=1000)
    seen = Message(role="user", content="word " * 990, images=[b"x"])
    assert (await kitchen.chat_of([seen, Message(role="user", content="word " * 20)]))[-1].done
    sent = kitchen.runner.calls[-1]
    assert isinstance(sent, ChatCall)
    assert len(sent.messages) == 1


@pytest.mark.parametrize("fields", [{}, {"raw": True}])
@pytest.mark.parametrize("wishes", [{"shift": False}, {"truncate": False}])
async def test_generate_too_long_is_refused_when_it_may_not_be_cut(fields: dict[str, Any], wishes: dict[str, Any]) -> None:
    with pytest.raises(CorralError) as caught:
        await Kitchen(context_length=10).generate("word " * 20, **fields, **wishes)
    assert (caught.value.message, caught.value.status) == (TOO_LONG, 400)


@pytest.mark.parametrize("raw", [False, True])
async def test_generate_too_long_leaves_out_the_middle(raw: bool) -> None:
    kitchen = Kitchen(context_length=10)
    # The fake tokenizer tells each word's length; the template puts `user:` in front.
    words = ["w" * length for length in range(1, 21)]
    assert (await kitchen.generate(" ".join(words), raw=raw, options={"num_keep": 2}, format="json"))[-1].done
    sent = kitchen.runner.calls[-1]
    assert isinstance(sent, CompletionCall)
    assert (sent.prompt, sent.context) == ("", (*((1, 2) if raw else (5, 1)), 17, 18, 19, 20))
    assert sent.grammar_schema is not None


async def test_generate_too_long_with_pictures_is_refused() -> None:
    with pytest.raises(CorralError, match="longer than the context"):
        await Kitchen(context_length=10).generate("word " * 20, images=[b"x"])


@pytest.mark.parametrize(("wanted", "sent"), [({}, 7), ({"num_predict": 3}, 3), ({"num_predict": 500}, 7)])
async def test_answer_without_shift_ends_with_the_context(wanted: dict[str, Any], sent: int) -> None:
    kitchen = Kitchen(context_length=10)
    await kitchen.generate("one two", shift=False, options=wanted)
    await kitchen.chat("one two", shift=False, options=wanted)
    assert [call.sampling.values["n_predict"] for call in kitchen.runner.calls] == [sent, sent]


async def test_chat_without_shift_that_was_cut_ends_with_the_context() -> None:
    kitchen = Kitchen(context_length=10)
    await kitchen.chat(*"abcdefgh", shift=False)
    assert kitchen.runner.calls[-1].sampling.values["n_predict"] == 2


async def test_chat_refused_for_another_reason_keeps_the_engines_words() -> None:
    kitchen = Kitchen(CorralError("bad_request", "image input is not supported"))
    with pytest.raises(CorralError, match="image input is not supported"):
        await kitchen.chat("a", "b")
    assert len(kitchen.runner.calls) == 1


# ── Endings ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_r09_engine_that_dies_ends_the_stream_with_an_error_and_frees_the_slot() -> None:
    kitchen = Kitchen(Chunk(content="Hel"), CorralError("engine_failed"))
    request = ChatRequest(model="m", messages=[Message(role="user", content="hi")])
    events = kitchen.inference.chat(kitchen.model, request)
    assert (await anext(events)).message.content == "Hel"
    with pytest.raises(CorralError) as caught:
        await anext(events)
    assert caught.value.code == "engine_failed"
    assert (kitchen.pool.lent, kitchen.runner.open_answers) == (0, 0)


@pytest.mark.parametrize("route", ["generate", "chat"])
async def test_r09_answer_that_ends_without_its_end_is_an_error(route: str) -> None:
    kitchen = Kitchen(Chunk(content="Hel"))
    with pytest.raises(CorralError, match="ended early") as caught:
        await (kitchen.generate() if route == "generate" else kitchen.chat())
    assert caught.value.code == "engine_failed"


async def test_stream_that_is_closed_stops_the_engine_at_once() -> None:
    kitchen = Kitchen()
    request = GenerateRequest(model="m", prompt="hi")
    async with aclosing(kitchen.inference.generate(kitchen.model, request)) as events:
        await anext(events)
        assert (kitchen.pool.lent, kitchen.runner.open_answers) == (1, 1)
    assert (kitchen.pool.lent, kitchen.runner.open_answers) == (0, 0)


async def test_events_of_an_iterator_that_cannot_be_closed_are_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Events:
        def __init__(self) -> None:
            self.left = [Chunk(content="a"), STOP]

        def __aiter__(self) -> "Events":
            return self

        async def __anext__(self) -> Chunk | Finish:
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop(0)

    kitchen = Kitchen()
    monkeypatch.setattr(kitchen.runner, "chat", lambda call: Events())  # the port promises an iterator, not a generator
    assert [event.done for event in await kitchen.chat()] == [False, True]


@pytest.mark.parametrize("route", ["generate", "chat"])
async def test_queue_that_is_full_is_told_before_anything_is_sent(route: str) -> None:
    kitchen = Kitchen()
    kitchen.pool.fails = CorralError("busy")
    assert (await kitchen.refused(route)).status == 503


# ── Embeddings ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_embed_gives_unit_vectors_and_counts() -> None:
    kitchen = Kitchen()
    response = await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input=["one two", "three"]))
    assert response.embeddings == [[0.6, 0.8], [0.6, 0.8]]
    assert (response.model, response.prompt_eval_count, response.load_duration) == ("M", 3, 41234567)
    assert kitchen.pool.used[0]["embedding"] is True


@pytest.mark.parametrize("given_input", [None, "", []])
async def test_embed_of_nothing_only_loads(given_input: object) -> None:
    kitchen = Kitchen()
    response = await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input=given_input))
    assert lines([response]) == ['{"model":"M","embeddings":[]}']
    assert len(kitchen.pool.used) == 1


async def test_t106_many_texts_are_given_to_the_engine_a_few_at_a_time() -> None:
    kitchen = Kitchen()
    texts = [f"text {number}" for number in range(2 * TEXTS_AT_ONCE + 1)]
    response = await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input=texts))
    assert [len(given) for given in kitchen.runner.embedded] == [TEXTS_AT_ONCE, TEXTS_AT_ONCE, 1]
    assert [text for given in kitchen.runner.embedded for text in given] == texts
    assert (len(response.embeddings), response.prompt_eval_count) == (len(texts), 2 * len(texts))


async def test_t106_texts_whose_vectors_no_answer_has_room_for_are_refused_after_the_first_few() -> None:
    kitchen = Kitchen()
    kitchen.runner.vector = [1.0] * 1000
    texts = ["a"] * (MAX_NUMBERS // 1000 + 1)
    with pytest.raises(CorralError, match="embed at most 16,777 of them at a time") as refused:
        await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input=texts))
    assert refused.value.status == 413
    assert len(kitchen.runner.embedded) == 1


async def test_embed_to_fewer_dimensions_is_a_unit_vector_again() -> None:
    kitchen = Kitchen()
    kitchen.runner.vector = [3.0, 4.0, 12.0]
    response = await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input="a", dimensions=2))
    assert response.embeddings == [[0.6, 0.8]]
    response = await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input="a", dimensions=9))
    assert math.hypot(*response.embeddings[0]) == pytest.approx(1)


async def test_embed_of_a_zero_vector_stays_zero() -> None:
    kitchen = Kitchen()
    kitchen.runner.vector = [0.0, 0.0]
    assert (await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input="a"))).embeddings == [[0.0, 0.0]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_embed_that_is_no_number_is_an_error(value: float) -> None:
    kitchen = Kitchen()
    kitchen.runner.vector = [value, 1.0]
    with pytest.raises(CorralError, match="embedding contains NaN or Inf values"):
        await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input="a"))


async def test_embed_too_long_is_cut_at_the_context() -> None:
    kitchen = Kitchen(context_length=10)
    response = await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input=["w " * 20, "short"]))
    assert len(response.embeddings) == 2
    (cut, short) = kitchen.runner.embedded[-1]
    assert (len(cut.split()), short) == (9, "short")


async def test_embed_too_long_is_refused_when_it_may_not_be_cut() -> None:
    kitchen = Kitchen(context_length=10)
    with pytest.raises(CorralError) as caught:
        await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input="w " * 20, truncate=False))
    assert (caught.value.message, caught.value.status) == ("the input length exceeds the context length", 400)


async def test_embed_refused_for_another_reason_keeps_the_engines_words(monkeypatch: pytest.MonkeyPatch) -> None:
    kitchen = Kitchen()

    async def refuse(texts: list[str]) -> tuple[list[list[float]], int]:
        raise CorralError("bad_request", "pooling type none")

    monkeypatch.setattr(kitchen.runner, "embed", refuse)  # the fake runner refuses for length only
    with pytest.raises(CorralError, match="pooling type none"):
        await kitchen.inference.embed(kitchen.model, EmbedRequest(model="M", input="a"))
    with pytest.raises(CorralError) as caught:
        await kitchen.inference.embeddings(kitchen.model, EmbeddingsRequest(model="M", prompt="a"))
    assert (caught.value.message, caught.value.status) == ("pooling type none", 500)


async def test_embeddings_gives_the_engines_own_vector() -> None:
    kitchen = Kitchen()
    response = await kitchen.inference.embeddings(kitchen.model, EmbeddingsRequest(model="M", prompt="a"))
    assert response.embedding == [3.0, 4.0]
    response = await kitchen.inference.embeddings(kitchen.model, EmbeddingsRequest(model="M"))
    assert response.embedding == []


@pytest.mark.parametrize("route", ["embed", "embeddings"])
async def test_vector_of_an_engine_that_died_says_so(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kitchen = Kitchen()

    async def die(texts: list[str]) -> tuple[list[list[float]], int]:
        raise CorralError("engine_failed")

    monkeypatch.setattr(kitchen.runner, "embed", die)  # the fake runner never dies by itself
    request = EmbedRequest(model="M", input="a") if route == "embed" else EmbeddingsRequest(model="M", prompt="a")
    with pytest.raises(CorralError) as caught:
        await getattr(kitchen.inference, route)(kitchen.model, request)
    assert caught.value.code == "engine_failed"


# ── Texts that are too long for the older route of embeddings ────────────────────────────────────────────────────────


async def test_older_route_of_embeddings_says_that_a_text_is_too_long() -> None:
    kitchen = Kitchen(context_length=3)
    with pytest.raises(CorralError) as caught:
        await kitchen.inference.embeddings(kitchen.model, EmbeddingsRequest(model="m", prompt="a b c d"))
    assert (caught.value.status, caught.value.message) == (500, "the input length exceeds the context length")
