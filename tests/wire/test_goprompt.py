"""Prompts out of Go templates. The expected prompts are what Ollama fb30760 makes of the same templates and messages."""

import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import go_templates
from corral.wire.errors import CorralError
from corral.wire.goprompt import check_template, go_prompt, with_places
from corral.wire.gotemplate import MAX_STEPS, Allowance
from corral.wire.native import ChatRequest, Message, decode
from corral.wire.options import Think

TODAY = date(2026, 3, 1)
U, A, S, T = "user", "assistant", "system", "tool"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather <now>",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "unit": {"type": ["string", "null"], "enum": ["C", 1, 2.5], "description": "u"},
                "city": {"type": "string", "description": "c"},
                "at": {"anyOf": [{"type": "integer"}, {"type": "array"}]},
                "any": {},
            },
        },
    },
}
WEATHER_JSON = (
    '{"type":"function","function":{"name":"get_weather","description":"Weather \\u003cnow\\u003e","parameters":{"type":"object",'
    '"required":["city"],"properties":{"any":{},"at":{"anyOf":[{"type":"integer"},{"type":"array"}]},'
    '"city":{"type":"string","description":"c"},"unit":{"type":["string","null"],"description":"u","enum":["C",1,2.5]}}}}}'
)


def chat(template: str, *turns: tuple[str, str] | Message, tools: Any = None, think: Think = None) -> str:
    messages = [turn if isinstance(turn, Message) else Message(role=turn[0], content=turn[1]) for turn in turns]
    return go_prompt(template).chat(messages, tools, think, today=TODAY)


# ── Turns ────────────────────────────────────────────────────────────────────────────────────────────────────────────


CHATML_PROMPT = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "turns", "prompt"),
    [
        (go_templates.CHATML, [(S, "s"), (U, "a")], CHATML_PROMPT),
        (go_templates.CHATML_TURNS, [(S, "s"), (U, "a")], CHATML_PROMPT),
        (go_templates.LLAMA2, [(S, "s"), (U, "a"), (A, "b"), (U, "c")],
         "[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b</s>[INST] c [/INST] "),
        (go_templates.LLAMA2, [(U, "a"), (A, "begun")], "[INST] a [/INST] begun"),
        (go_templates.ALPACA, [(U, "a"), (A, "b"), (S, "s"), (U, "c")],
         "### Instruction:\na\n\n### Response:\nbs\n\n### Instruction:\nc\n\n### Response:\n"),
        (go_templates.PHI, [(U, "a"), (U, "b"), (T, "x"), (A, "")], "<|user|>\na\n\nb<|end|>\n<|assistant|>\n"),
        (go_templates.GEMMA, [(S, "s"), (U, "a"), (A, "b"), (U, "c")],
         "<start_of_turn>user\ns<end_of_turn>\n<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
         "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"),
        ("{{ .Prompt }}", [(S, "s"), (U, "a"), (A, "b"), (U, "c")], "abc"),
        ("{{ .System }}|", [(S, "a"), (S, "b")], "a\n\nb|"),
        ("{{ range .Messages }}{{ .Content }};{{ end }}", [(T, "a"), (T, "b"), (U, "c"), (U, "d")], "a;b;c\n\nd;"),
        ("{{ if .Prompt }}{{ .Prompt }}{{ .Response }}after{{ else }}none{{ end }}end", [(U, "a"), (A, "b"), (U, "c")],
         "abafterendc"),
        ("{{ .Prompt }}", [], ""),
    ],
)  # fmt: skip
def test_chat_becomes_the_prompt_that_ollama_makes(template: str, turns: list[tuple[str, str]], prompt: str) -> None:
    assert chat(template, *turns) == prompt


@pytest.mark.parametrize(
    ("think", "shown"),
    [(None, "false||false"), (False, "false||true"), (True, "true|medium|true"), ("high", "true|high|true")],
)
def test_thinking_is_told_to_the_template(think: Think, shown: str) -> None:
    for ending in ("{{ range .Messages }}{{ end }}", "{{ .Prompt }}"):
        assert chat("{{ .Think }}|{{ .ThinkLevel }}|{{ .IsThinkSet }}" + ending, (U, ""), think=think) == shown


def test_t107_turns_share_what_a_template_may_do() -> None:
    turns = [Message(role=(U, A)[index % 2], content="x" * 100) for index in range(40)]
    prompt = go_prompt("{{ .Prompt }}" * 20 + "{{ .Response }}")
    whole = Allowance()
    prompt.chat(turns, None, None, today=TODAY, allowance=whole)
    assert MAX_STEPS - whole.steps > 20 * 20
    with pytest.raises(CorralError, match="too many steps"):
        prompt.chat(turns, None, None, today=TODAY, allowance=Allowance(steps=200))


def test_infill_knows_prompt_and_suffix_only() -> None:
    prompt = go_prompt(go_templates.INFILL + "{{ .Messages }}").infill("a", "b", None, today=TODAY)
    assert prompt == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|><no value>"


# ── Tools ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tools_are_written_as_json() -> None:
    assert chat("{{ .Tools }}{{ range .Messages }}{{ end }}", (U, ""), tools=[WEATHER]) == f"[{WEATHER_JSON}]"
    assert chat("{{ range .Tools }}{{ . }}{{ end }}{{ .Messages | len }}", (U, ""), tools=[WEATHER]) == WEATHER_JSON + "1"
    assert chat(
        "{{ range .Tools }}{{ json .Function }}{{ .Function }}{{ end }}{{ len .Messages }}", (U, ""), tools=[WEATHER]
    ) == (2 * WEATHER_JSON.removeprefix('{"type":"function","function":').removesuffix("}") + "1")


@pytest.mark.parametrize(("tools", "shown"), [(None, "null|0"), ([], "[]|0")])
def test_tools_that_are_none_are_empty(tools: Any, shown: str) -> None:
    assert chat("{{ .Tools }}|{{ len .Tools }}{{ range .Messages }}{{ end }}", (U, ""), tools=tools) == shown


def test_keywords_that_ollama_drops_are_kept_behind_the_others() -> None:
    tool = {"strict": True, "type": "function", "function": {"x": 1, "name": "f", "parameters": {"additionalProperties": False}}}
    assert chat("{{ .Tools }}{{ range .Messages }}{{ end }}", (U, ""), tools=[tool]) == (
        '[{"type":"function","function":{"name":"f","description":"","parameters":{"type":"","properties":null,'
        '"additionalProperties":false},"x":1},"strict":true}]'
    )


@pytest.mark.parametrize(
    "tool", [{}, {"function": 3}, {"function": {"parameters": {"properties": {"a": 1, "b": {"type": 3, "enum": 4}}}}}]
)
def test_tool_of_another_shape_is_shown_as_far_as_it_goes(tool: Any) -> None:
    assert chat("{{ .Tools }}{{ range .Messages }}{{ end }}", (U, ""), tools=[tool]).startswith('[{"type":')


def test_types_of_properties_are_told_in_typescript() -> None:
    made = chat(go_templates.TYPESCRIPT_TOOLS, (U, "hi"), tools=[WEATHER])
    assert made == (
        "Today is 2026-03-01, yesterday was 2026-02-28.\n"
        "type get_weather = (_: {\n  // \n  any: any,\n  // \n  at: number | any[],\n  // c\n  city: string,\n"
        '  // u\n  unit: "C" | 1 | 2.5, }) => any;\n// required: city\nuser     |hi\n'
    )


def test_calls_are_shown_with_sorted_arguments() -> None:
    call = b'{"id":"c","function":{"name":"f","arguments":{"z":1000000,"a":[1.5,true]}}}'
    body = b'{"messages":[{"role":"assistant","content":"","tool_calls":[%s]}]}' % call
    template = (
        "{{ range .Messages }}{{ range .ToolCalls }}"
        "{{ .ID }} {{ .Function.Index }} {{ .Function.Name }} {{ .Function.Arguments }}"
        "{{ range $k, $v := .Function.Arguments }} {{ $k }}={{ $v }}{{ end }}{{ end }}{{ end }}"
    )
    messages = decode(body, ChatRequest).messages
    assert chat(template, *messages) == 'c 0 f {"a":[1.5,true],"z":1000000} a=[1.5 true] z=1e+06'
    assert chat("{{ range .Messages }}{{ json . }}{{ end }}", Message(role=U, content="<")) == (
        '{"Role":"user","Content":"\\u003c","Thinking":"","Images":null,"ToolCalls":null,"ToolName":"","ToolCallID":""}'
    )


def test_t107_values_that_are_nested_deeply_are_refused() -> None:
    deep: Any = {"type": "object"}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(CorralError, match="nested too deeply"):
        chat("{{ .Tools }}{{ .Messages }}", (U, ""), tools=[{"function": {"parameters": deep}}])


# ── What a template tells ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "tags", "call_tag"),
    [
        ("QWEN_TOOLS_THINKING", ("<think>", "</think>"), "<tool_call>"),
        ("DEEPSEEK", ("<think>", "</think>"), "{"),
        ("MISTRAL_TOOLS", ("", ""), "[TOOL_CALLS] ["),
        ("LLAMA3_TOOLS", ("", ""), "{"),
        ("CHATML", ("", ""), "{"),
    ],
)
def test_tags_are_told_from_the_template(name: str, tags: tuple[str, str], call_tag: str) -> None:
    prompt = go_prompt(go_templates.ALL[name])
    assert (prompt.thinking_tags, prompt.call_tag) == (tags, call_tag)


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        ("{{ range .Messages }} <a> {{- .Thinking -}} <b> {{ end }}", ("<a>", "<b>")),
        ("{{ range .Messages }}<a>{{ if (and .Thinking 1) }}{{ .Role }}{{ end }}<b>{{ end }}", ("<a>", "<b>")),
        ("{{ range .Messages }}<a>{{ range .Other }}{{ .Thinking }}{{ end }}<b>{{ end }}", ("", "")),
        ("{{ range $.Messages }}<a>{{ .Thinking }}<b>{{ end }}", ("", "")),
        ("{{ range .Messages }}{{ .Thinking }}<b>{{ end }}", ("", "")),
        ("<a>{{ .Thinking }}<b>", ("", "")),
    ],
)
def test_thinking_tags_stand_around_the_thoughts_of_messages(template: str, tags: tuple[str, str]) -> None:
    assert go_prompt(template).thinking_tags == tags


@pytest.mark.parametrize(
    ("template", "tag"),
    [
        ("{{ if .ToolCalls }}{{ range .ToolCalls }}{{ .Function }}{{ end }}{{ end }}", "{"),
        ('{{ with .A }}{{ else }}{{ if or .B .ToolCalls }} \n {{ if .C }}{{ else }}<x>{"name"{{ end }}{{ end }}{{ end }}', "<x>"),
        ("{{ range .ToolCalls }}<x>{{ end }}", "{"),
        ("{{ if .ToolCalls }}{{ end }}", "{"),
    ],
)
def test_call_tag_is_the_text_before_a_call(template: str, tag: str) -> None:
    assert go_prompt(template).call_tag == tag


def test_template_is_checked_in_ollamas_words() -> None:
    check_template(go_templates.CHATML)
    with pytest.raises(CorralError, match=r'^template error: template: :1: function "oops" not defined$'):
        check_template("{{ oops }}")


# ── Ollama's own templates ───────────────────────────────────────────────────────────────────────────────────────────


def _ollamas() -> list[Path]:
    folder = os.environ.get("CORRAL_TEST_TEMPLATES", "")
    return sorted(Path(folder).glob("*.gotmpl")) if folder else []


@pytest.mark.skipif(not _ollamas(), reason="no ollama templates: name their folder in CORRAL_TEST_TEMPLATES")
def test_ollamas_own_templates_make_what_its_test_data_says() -> None:
    everything = [
        (S, "You are a helpful assistant."),
        (U, "Hello, how are you?"),
        (A, "I'm doing great. How can I help you today?"),
        (U, "I'd like to show off how chat templating works!"),
    ]
    chats = {"user": everything[1:2], "user-assistant-user": everything[1:], "system-user-assistant-user": everything}
    compared = 0
    for path in _ollamas():
        for name, turns in chats.items():
            expected = path.parent / "testdata" / path.name / name
            if expected.exists():
                template = path.read_bytes().decode().replace("\r\n", "\n")
                assert chat(template, *turns) == expected.read_bytes().decode(), f"{path.name}, {name}"
                compared += 1
    assert compared > 40


def test_lists_that_nobody_made_are_null_in_json_and_empty_in_print() -> None:
    template = (
        "{{ range .Messages }}{{ json .ToolCalls }} {{ .ToolCalls }} {{ len .Images }}{{ end }} {{ json .Tools }} {{ .Tools }}"
    )
    prompt = go_prompt(template)
    messages = [Message(role="user", content="x")]
    assert prompt.chat(messages, None, None, today=TODAY) == "null [] 0 null null"
    assert prompt.chat(messages, [], None, today=TODAY) == "null [] 0 [] []"


def test_files_of_messages_have_their_places_in_the_text() -> None:
    messages = [
        Message(role="user", content="a", images=[b"1", b"2"]),
        Message(role="assistant", content="[img] is left alone"),
        Message(role="user", content="x [img] y [img]", images=[b"3"]),
    ]
    marked, media = with_places(messages)
    assert [message.content for message in marked] == ["[img-0][img-1]a", "[img] is left alone", "x [img-2] y [img]"]
    assert media == [b"1", b"2", b"3"]
