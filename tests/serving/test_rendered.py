"""Chats whose prompt a Go template makes: which template it is, the prompt, and thoughts and calls told apart."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

import go_templates
from corral.core.ports import ChatCall, Chunk, CompletionCall, Finish, LoadOptions, Sampling, Timings
from corral.core.records import Capability, Model, ModelDetails
from corral.engines.llamacpp import LlamaCppEngine, LlamaRunner
from corral.serving.inference import Inference
from corral.serving.rendered import RenderedCall, rendered_call, template_for
from corral.wire.errors import CorralError
from corral.wire.goprompt import GoPrompt, go_prompt
from corral.wire.inventory import show_body
from corral.wire.native import ChatRequest, GenerateRequest, Message, ToolCall, ToolCallFunction
from fakes import NOON, FakeClock, SeededEntropy
from fakes_inference import CONTEXT, STOP, FakePool, FakeRunner, Step, a_model

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
BY_TEMPLATE = frozenset({Capability.TOOLS, Capability.THINKING})
TOOLS_IN_JINJA = "{% if tools %}{{ tools }}{% endif %}"


def model_with(template: str, /, *capabilities: Capability, **fields: Any) -> Model:
    can = frozenset({Capability.COMPLETION, *capabilities})
    return a_model(**({"template": template, "chat_template": "", "capabilities": can} | fields))


def pieces(text: str, size: int = 3) -> list[Step]:
    return [*(Chunk(content=text[at : at + size]) for at in range(0, len(text), size)), STOP]


class Kitchen:
    """Inference over one fake runner and a model with a Go template."""

    def __init__(self, model: Model, *answer: Step, context_length: int = 0, prefers_go: bool | None = None) -> None:
        self.runner = FakeRunner(*answer, context_length=context_length)
        self.pool = FakePool(self.runner, context_length=context_length or CONTEXT)
        self.inference = Inference(self.pool, FakeClock(), prefers_go=prefers_go)
        self.model = model

    async def chat(self, *turns: str | Message, **fields: Any) -> Message:
        """The whole answer. turns: of user and assistant in turn, where they are text."""
        messages = [
            turn if isinstance(turn, Message) else Message(role=("user", "assistant")[index % 2], content=turn)
            for index, turn in enumerate(turns or ("hi",))
        ]
        request = ChatRequest(model="m", messages=messages, **fields)
        async with aclosing(self.inference.chat(self.model, request)) as events:
            self.events = [event async for event in events]
        parts = [event.message for event in self.events]
        return Message(
            role="assistant",
            content="".join(part.content for part in parts),
            thinking="".join(part.thinking for part in parts),
            tool_calls=[call for part in parts for call in part.tool_calls],
        )

    async def generate(self, prompt: str = "hi", **fields: Any) -> list[Any]:
        request = GenerateRequest(model="m", prompt=prompt, **fields)
        return [event async for event in self.inference.generate(self.model, request)]

    @property
    def calls(self) -> list[CompletionCall]:
        assert all(isinstance(call, CompletionCall) for call in self.runner.calls)
        return self.runner.calls  # type: ignore[return-value]

    @property
    def prompt(self) -> str:
        return self.calls[-1].prompt


# ── Which template ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "prefers_go", "is_go"),
    [
        ({"chat_template": ""}, None, True),
        ({"chat_template": ""}, False, True),
        ({"chat_template": "{{ messages }}"}, None, True),
        ({"chat_template": "{{ messages }}"}, False, False),
        ({"chat_template": TOOLS_IN_JINJA}, None, False),
        ({"chat_template": TOOLS_IN_JINJA}, True, True),
        ({"chat_template": "{{ messages }}", "template": "{{ oops"}, None, False),
        ({"chat_template": "{{ messages }}", "template": ""}, True, False),
        ({"chat_template": "{{ messages }}", "renderer": "qwen3-coder"}, True, False),
        ({"chat_template": "{{ messages }}", "details": ModelDetails(format="gguf", family="gptoss")}, True, False),
        ({"weights": None}, True, False),
    ],
)
def test_go_template_is_chosen_by_ollamas_rule(fields: dict[str, Any], prefers_go: bool | None, is_go: bool) -> None:
    model = model_with(go_templates.CHATML, **fields)
    assert template_for(model, prefers_go=prefers_go) == (model.template if is_go else "")


async def test_weights_without_any_template_chat_by_the_engines_own_and_generate_from_the_prompt_alone() -> None:
    kitchen = Kitchen(model_with(""))
    await kitchen.chat("hi")
    assert isinstance(kitchen.runner.calls.pop(), ChatCall)
    await kitchen.generate("hi")
    assert kitchen.prompt == "hi"


HISTORY_IN_JINJA = "{% for m in messages %}{{ m.tool_calls }}{{ m.tool_response }}{% endfor %}{{ tools }}<think></think>"
THINKS_IN_GO = "{{ range .Messages }}{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ .Content }}{{ end }}"


@pytest.mark.parametrize(
    ("fields", "prefers_go", "is_go", "can"),
    [
        ({"chat_template": HISTORY_IN_JINJA}, None, False, {Capability.TOOLS, Capability.THINKING}),
        ({"chat_template": HISTORY_IN_JINJA}, True, True, set()),
        ({"chat_template": "{{ messages }}", "template": THINKS_IN_GO}, None, True, {Capability.TOOLS, Capability.THINKING}),
        ({"chat_template": "{{ messages }}", "template": THINKS_IN_GO}, False, False, {Capability.TOOLS}),
        ({"chat_template": HISTORY_IN_JINJA, "parser": "qwen3"}, True, False, {Capability.TOOLS, Capability.THINKING}),
        ({"chat_template": "", "template": THINKS_IN_GO}, None, True, {Capability.TOOLS, Capability.THINKING}),
    ],
)
async def test_model_is_described_with_the_template_that_it_runs_by_and_what_that_can(
    fields: dict[str, Any], prefers_go: bool | None, is_go: bool, can: set[Capability]
) -> None:
    model = model_with(go_templates.CHATML, **{"capabilities": frozenset({Capability.COMPLETION, *BY_TEMPLATE}), **fields})
    kitchen = Kitchen(model, prefers_go=prefers_go)
    shown = kitchen.inference.described(model)
    assert shown.capabilities == {Capability.COMPLETION, *can}
    assert show_body(shown)["template"] == (model.template if is_go else model.chat_template)
    if Capability.TOOLS not in can:
        with pytest.raises(CorralError, match="does not support tools"):
            await kitchen.chat("hi", tools=[WEATHER])


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chat_template", ["", "{{ messages }}"])
async def test_pictures_stand_before_the_words_of_their_message_or_where_those_say(chat_template: str) -> None:
    kitchen = Kitchen(model_with(go_templates.CHATML, chat_template=chat_template))
    await kitchen.chat(
        Message(role="user", content="both", images=[b"one", b"two"]),
        "ok",
        Message(role="user", content="here [img] and [img], not [img]", images=[b"three", b"four"]),
    )
    assert kitchen.prompt == (
        "<|im_start|>user\n[img-0][img-1]both<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
        "<|im_start|>user\nhere [img-2] and [img-3], not [img]<|im_end|>\n<|im_start|>assistant\n"
    )
    assert kitchen.calls[0].media == [b"one", b"two", b"three", b"four"]


async def test_pictures_of_messages_that_are_left_out_are_left_out_too() -> None:
    kitchen = Kitchen(model_with(go_templates.CHATML), context_length=8)
    long = Message(role="user", content="a b c d e f g h", images=[b"old"])
    await kitchen.chat(long, "ok", Message(role="user", content="new"))
    assert (kitchen.calls[-1].media, "[img" in kitchen.prompt) == ([], False)


async def test_picture_of_a_generation_is_shown_and_counted() -> None:
    kitchen = Kitchen(model_with(go_templates.CHATML_TURNS))
    (event,) = await kitchen.generate("what?", images=[b"one"], debug_render_only=True)
    assert (event.debug_info.image_count, "user\n[img-0]what?" in event.debug_info.rendered_template) == (1, True)
    await kitchen.generate("see [img-0]", images=[b"one"], raw=True)
    assert (kitchen.prompt, kitchen.calls[-1].media) == ("see [img-0]", [b"one"])


# ── Parsers by name ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("parser", "thinking", "calls"),
    [("qwen3-thinking", "hm", 1), ("deepseek3", "hm", 0), ("qwen3", "", 1), ("nobody-knows", "", 0), ("", "", 0)],
)
async def test_parser_of_a_known_name_tells_what_the_template_does_not(parser: str, thinking: str, calls: int) -> None:
    model = model_with(go_templates.CHATML, Capability.TOOLS, Capability.THINKING, parser=parser)
    said = "<think>hm</think>" if thinking else ""
    kitchen = Kitchen(model, *pieces(said + 'So <tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'))
    answer = await kitchen.chat("hi", tools=[WEATHER], think=bool(thinking))
    assert (answer.thinking, len(answer.tool_calls)) == (thinking, calls)
    assert answer.content.startswith("So ")


async def test_name_of_a_parser_or_renderer_leaves_the_template_inside_the_weights_its_work() -> None:
    for fields in ({"parser": "harmony"}, {"renderer": "nobody-knows"}, {"parser": "x", "renderer": "y"}):
        kitchen = Kitchen(model_with(go_templates.CHATML, chat_template="{{ messages }}", **fields))
        await kitchen.chat("hi")
        assert isinstance(kitchen.runner.calls[0], ChatCall)


# ── The prompt ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_chat_is_rendered_with_what_is_stored() -> None:
    kitchen = Kitchen(model_with(go_templates.CHATML, system="Be brief.", messages=(("user", "q"), ("assistant", "a"))))
    answer = await kitchen.chat("hi", options={"stop": ["<|im_end|>"]}, logprobs=True, top_logprobs=2)
    assert answer.content == "Hello"
    assert kitchen.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    values = kitchen.calls[0].sampling.values
    assert (values["stop"], values["n_probs"], "logprobs" in values) == (["<|im_end|>"], 2, False)


async def test_generate_is_rendered_and_its_context_is_what_was_said() -> None:
    kitchen = Kitchen(model_with(go_templates.CHATML_TURNS, system="S"))
    *_, final = await kitchen.generate("hi")
    assert kitchen.prompt == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert final.context
    await kitchen.generate("more", context=[7, 8])
    assert kitchen.calls[-1].context == (7, 8)


async def test_template_of_the_request_replaces_the_models() -> None:
    for chat_template in ("", "{{ messages }}"):
        kitchen = Kitchen(model_with("", chat_template=chat_template, system="S"))
        await kitchen.generate("hi", template="<{{ .System }}|{{ .Prompt }}>")
        assert kitchen.prompt == "<S|hi>"


async def test_template_of_the_request_that_cannot_be_read_is_refused_with_its_line() -> None:
    kitchen = Kitchen(model_with(""))
    with pytest.raises(CorralError, match=r"^template: :2: unclosed action$") as refused:
        await kitchen.generate("hi", template="\n{{ .Prompt")
    assert (refused.value.status, kitchen.runner.calls, kitchen.pool.lent) == (400, [], 0)


async def test_t107_template_that_never_ends_is_stopped() -> None:
    kitchen = Kitchen(model_with("{{ range 999999999 }}{{ range 999999999 }}{{ end }}{{ end }}"))
    with pytest.raises(CorralError, match="takes too many steps"):
        await kitchen.chat()
    assert kitchen.pool.lent == 0


async def test_beginning_that_the_tokenizer_adds_itself_is_not_said_twice() -> None:
    class Adds(FakeRunner):
        async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
            return [1] * add_special + [1]

    for runner, prompt in ((Adds(), "hi"), (FakeRunner(), "<s>hi")):
        kitchen = Kitchen(model_with("<s>{{ .Prompt }}"))
        kitchen.pool.runner = kitchen.runner = runner
        await kitchen.chat()
        assert kitchen.prompt == prompt


async def test_beginning_is_not_said_twice_by_what_is_left_of_a_long_chat_and_in_its_context() -> None:
    class Adds(FakeRunner):
        async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
            words = [1 if word == "<s>" else len(word) for word in text.split()]
            return [1, *words] if add_special else words

    kitchen = Kitchen(model_with("<s>{{ range .Messages }} {{ .Content }}{{ end }}"), context_length=6)
    kitchen.pool.runner = kitchen.runner = Adds(context_length=6)
    await kitchen.chat("1 2 3", "4 5", "6 7")
    assert kitchen.prompt == " 4 5 6 7"
    events = await kitchen.generate("abc")
    assert events[-1].context == [1, len("abcHello")]


async def test_oldest_messages_are_left_out_of_a_chat_that_is_too_long() -> None:
    kitchen = Kitchen(model_with("{{ range .Messages }} {{ .Content }}{{ end }}"), context_length=6)
    await kitchen.chat(Message(role="system", content="s"), Message(role="user", content="1 2 3"), "4 5", "6 7")
    assert kitchen.prompt == " s 4 5 6 7"
    with pytest.raises(CorralError, match="the prompt is longer than the context length"):
        await kitchen.chat("1 2 3", "4 5 6", "7", truncate=False)


class Noted(GoPrompt):
    """Notes whether its prompts were made where the event loop runs."""

    __slots__ = ("inline",)

    def chat(self, *args: Any, **kwargs: Any) -> str:
        self.inline.append(threading.current_thread() is threading.main_thread())
        return super().chat(*args, **kwargs)


def noted(template: str, turns: int = 20) -> tuple[RenderedCall, list[bool]]:
    prompt = go_prompt(template)
    made = Noted(**{part.name: getattr(prompt, part.name) for part in dataclasses.fields(prompt)})
    inline: list[bool] = []
    object.__setattr__(made, "inline", inline)
    messages = [Message(role=("user", "assistant")[index % 2], content="x") for index in range(turns)]
    call = RenderedCall(template=made, messages=messages, tools=None, think=None, today=NOON.date())
    return call, inline


EACH = "{{ range $.Messages }}"


async def test_t107_template_that_takes_many_steps_for_few_messages_is_run_where_nobody_waits_for_it() -> None:
    quick, inline = noted(go_templates.QWEN_TOOLS_THINKING)
    assert (await quick.prompt()).count("<|im_start|>") == 20
    assert inline == [True]
    slow, inline = noted(EACH * 3 + "{{ .Content }}" + "{{ end }}" * 3)
    assert await slow.prompt() == "x" * 20**3
    assert inline == [True, False]


async def test_t107_template_that_takes_too_many_steps_is_refused_by_the_thread() -> None:
    endless, inline = noted(EACH * 5 + "{{ .Content }}" + "{{ end }}" * 5)
    with pytest.raises(CorralError, match="takes too many steps"):
        await endless.prompt()
    assert inline == [True, False]


async def test_template_that_fails_within_few_steps_fails_at_once() -> None:
    wrong, inline = noted("{{ .Messages.x }}")
    with pytest.raises(CorralError):
        await wrong.prompt()
    assert inline == [True]


async def test_old_thoughts_are_not_sent_back_by_models_that_once_kept_them() -> None:
    kitchen = Kitchen(model_with(go_templates.CHATML, name="deepseek-r1"))
    await kitchen.chat("q", "<think>\nhm</think>\n\nold", "next")
    assert "assistant\nold<|im_end|>" in kitchen.prompt


async def test_rendered_prompt_is_shown_without_running_anything() -> None:
    kitchen = Kitchen(model_with(go_templates.CHATML))
    await kitchen.chat("hi", debug_render_only=True)
    shown = msgspec.json.encode(kitchen.events[0]).decode()
    assert (
        '"done":false,"_debug_info":{"rendered_template":"<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n"}' in shown
    )
    (event,) = await kitchen.generate("hi", debug_render_only=True)
    assert event.debug_info.rendered_template.startswith("<|im_start|>user")
    kitchen.model = a_model()
    (event,) = await kitchen.generate("hi", debug_render_only=True, images=[b"x"])
    assert (event.debug_info.rendered_template, event.debug_info.image_count) == ("user: hi ", 1)
    assert (kitchen.runner.calls, kitchen.pool.lent) == ([], 0)


@pytest.fixture
async def real_runner(small_model: Path) -> AsyncIterator[LlamaRunner]:
    engine = LlamaCppEngine(SeededEntropy())
    runner = await engine.load(a_model(weights=str(small_model)), LoadOptions(num_ctx=512, parallel=1))
    yield runner
    await runner.close()


async def test_small_models_own_template_in_go_gives_the_prompt_and_answer_of_its_jinja(real_runner: LlamaRunner) -> None:
    """Its Jinja template adds a system message of its own, so one is given."""
    turns = [Message(role="system", content="Be brief."), Message(role="user", content="Name a colour.")]
    request = {"options": {"temperature": 0, "num_predict": 12, "stop": ["<|im_end|>"]}}
    kitchen = Kitchen(model_with(go_templates.CHATML, chat_template="{{ messages }}"), prefers_go=False)
    kitchen.pool.runner = real_runner  # type: ignore[assignment]  # the real thing in place of the fake
    shown, said = [], []
    for prefers_go in (False, True):
        kitchen.inference = Inference(kitchen.pool, FakeClock(), prefers_go=prefers_go)
        await kitchen.chat(*turns, debug_render_only=True)
        (event,) = kitchen.events
        shown.append(event.debug_info.rendered_template)
        said.append((await kitchen.chat(*turns, **request)).content)
    assert shown[0] == shown[1]
    assert said[0] == said[1]
    assert said[0].strip()


# ── Filling in the middle ────────────────────────────────────────────────────────────────────────────────────────────


async def test_suffix_goes_through_the_template_when_the_engine_knows_no_markers() -> None:
    class WithoutMarkers(FakeRunner):
        def complete(self, call: CompletionCall) -> Any:
            if call.suffix:
                raise CorralError("bad_request", "no markers", status=501)
            return super().complete(call)

    kitchen = Kitchen(model_with(go_templates.INFILL, Capability.INSERT))
    kitchen.pool.runner = kitchen.runner = WithoutMarkers()
    events = await kitchen.generate("def f(", suffix="return")
    assert kitchen.prompt == "<|fim_prefix|>def f(<|fim_suffix|>return<|fim_middle|>"
    assert "".join(event.response for event in events) == "Hello"


async def test_suffix_with_a_template_in_the_request_goes_through_that() -> None:
    kitchen = Kitchen(model_with(""))
    await kitchen.generate("a", suffix="b", template=go_templates.INFILL)
    assert (kitchen.prompt, kitchen.calls[0].suffix) == ("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "")


# ── The answer ───────────────────────────────────────────────────────────────────────────────────────────────────────

THINKS = (Capability.TOOLS, Capability.THINKING)


async def test_tool_whose_function_is_null_is_no_failure() -> None:
    kitchen = Kitchen(model_with(go_templates.QWEN_TOOLS_THINKING, *THINKS), *pieces("hi", 2))
    assert (await kitchen.chat("weather?", tools=[{"type": "function", "function": None}])).content == "hi"


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_thoughts_and_calls_are_told_apart(size: int) -> None:
    said = (
        "<think>\nOslo, then.</think>\n\nLet me see.<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Oslo {}"}}\n</tool_call>'
    )
    kitchen = Kitchen(model_with(go_templates.QWEN_TOOLS_THINKING, *THINKS), *pieces(said, size))
    answer = await kitchen.chat("weather?", tools=[WEATHER])
    assert (answer.thinking, answer.content) == ("Oslo, then.", "Let me see.")
    (call,) = answer.tool_calls
    assert (call.function.name, call.function.arguments, len(call.id)) == ("get_weather", {"city": "Oslo {}"}, 13)
    assert '{"type": "function", "function": {"name":"get_weather"' in kitchen.prompt
    assert kitchen.prompt.endswith("weather? /think<|im_end|>\n<|im_start|>assistant\n")
    assert kitchen.calls[0].preserved_tokens == ("<tool_call>", "<think>", "</think>")


async def test_thinking_that_is_not_wanted_is_not_looked_for() -> None:
    kitchen = Kitchen(model_with(go_templates.DEEPSEEK, Capability.THINKING), *pieces("<think>x</think>y"))
    answer = await kitchen.chat("q", think=False)
    assert (answer.thinking, answer.content) == ("", "<think>x</think>y")
    assert kitchen.prompt.endswith("<think>\n\n</think>\n\n")


async def test_thoughts_that_the_prompt_opened_are_told_apart() -> None:
    template = "{{ range .Messages }}{{ .Content }}{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ end }}<think>\n"
    kitchen = Kitchen(model_with(template, Capability.THINKING), *pieces("\nhm</think>\n42"))
    answer = await kitchen.chat("q")
    assert (answer.thinking, answer.content) == ("hm", "42")


async def test_what_looked_like_a_tag_is_content_in_the_end() -> None:
    kitchen = Kitchen(model_with(go_templates.QWEN_TOOLS_THINKING, *THINKS), *pieces("<thi"))
    assert (await kitchen.chat("q", tools=[WEATHER])).content == "<thi"


async def test_schema_is_held_to_only_after_thinking() -> None:
    class Obeys(FakeRunner):
        def complete(self, call: CompletionCall) -> Any:
            self.answer = tuple(pieces('{"a":1}' if call.grammar_schema else "<think>\nhm</think>\n\nWell, it is"))
            return super().complete(call)

    kitchen = Kitchen(model_with(go_templates.QWEN_TOOLS_THINKING, *THINKS))
    kitchen.pool.runner = kitchen.runner = Obeys()
    answer = await kitchen.chat("q", format={"type": "object"})
    assert (answer.thinking, answer.content) == ("hm", '{"a":1}')
    first, second = kitchen.calls
    assert (first.grammar_schema, second.grammar_schema) == (None, {"type": "object"})
    assert second.prompt.endswith("<|im_start|>assistant\n<think>\nhm</think>\n\n")
    assert kitchen.runner.open_answers == 0


async def test_schema_without_thinking_is_held_to_at_once() -> None:
    kitchen = Kitchen(model_with(go_templates.QWEN_TOOLS_THINKING, *THINKS))
    await kitchen.chat("q", think=False, format="json")
    assert kitchen.calls[0].grammar_schema == {"type": "object"}


async def test_calls_and_answers_of_tools_are_shown_to_the_model() -> None:
    kitchen = Kitchen(model_with(go_templates.MISTRAL_TOOLS, Capability.TOOLS), *pieces("[TOOL_CALLS] [", 20))
    call = ToolCall(function=ToolCallFunction(name="get_weather", arguments={"city": "Oslo", "b": 2}))
    answer = await kitchen.chat(
        Message(role="user", content="q"),
        Message(role="assistant", content="", tool_calls=[call]),
        Message(role="tool", content='"5" <b>', tool_name="get_weather"),
        tools=[WEATHER],
    )
    assert kitchen.prompt == (
        '[INST] q[/INST][TOOL_CALLS] [{"name": "get_weather", "arguments": {"b":2,"city":"Oslo"}}]</s>'
        '[TOOL_RESULTS] {"content": "\\"5\\" \\u003cb\\u003e"}[/TOOL_RESULTS]'
    )
    assert kitchen.calls[0].preserved_tokens == ("[TOOL_CALLS]",)
    # A tag without a call behind it is what the model said.
    assert answer.content == "[TOOL_CALLS] ["


async def test_answer_that_breaks_off_is_an_error() -> None:
    kitchen = Kitchen(model_with(go_templates.CHATML), Chunk(content="x"))
    with pytest.raises(CorralError, match="ended early"):
        await kitchen.chat()


async def test_tokens_of_a_rendered_chat_are_counted() -> None:
    kitchen = Kitchen(model_with("one {{ .Prompt }}"))
    request = ChatRequest(model="m", messages=[Message(role="user", content="two three")])
    assert await kitchen.inference.count_tokens(kitchen.model, request) == 3


async def test_tokens_of_both_passes_are_counted_as_said() -> None:
    end = Finish(reason="stop", timings=Timings(prompt_tokens=20, eval_tokens=2))
    kitchen = Kitchen(model_with(go_templates.DEEPSEEK, Capability.THINKING), Chunk(content="<think>a</think>b"), end)
    await kitchen.chat("q", format="json")
    final = kitchen.events[-1]
    assert (final.prompt_eval_count, final.eval_count) == (19, 3)


# ── Long chats ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("count", "size", "is_aside"), [(3, 10, False), (400, 10, True), (2, 200_000, True)])
async def test_prompt_of_a_long_chat_is_made_beside_everything_else(count: int, size: int, is_aside: bool) -> None:
    messages = [Message(role="user" if index % 2 else "assistant", content="x" * size) for index in range(count)]
    call = rendered_call(
        model_with(go_templates.CHATML),
        go_templates.CHATML,
        messages,
        tools=None,
        think=None,
        today=NOON.date(),
        sampling=Sampling(),
    )
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    others = asyncio.create_task(turn())
    try:
        assert (await call.prompt()).count("<|im_start|>") == count + 1
    finally:
        others.cancel()
    assert (turns > 0) is is_aside
