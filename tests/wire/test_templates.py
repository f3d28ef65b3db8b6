"""What a chat template tells of its model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.templates import go_fields, go_has_thinking, jinja_has_thinking, jinja_has_tools, jinja_is_preferred

QWEN3 = """
{{- if or .System .Tools .Thinking }}<|im_start|>system
{{- if .Thinking }}
/think
{{- else }}
/no_think
{{- end }}<|im_end|>
{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if and $last .Thinking }}
<think>{{ .Thinking }}</think>
{{ end }}
{{ if .Content }}{{ .Content }}{{ else if .ToolCalls }}<tool_call>{{ range .ToolCalls }}{{ .Function.Name }}{{ end }}{{- end }}
{{ end }}
{{- end }}
"""


def test_fields_of_a_go_template_are_found() -> None:
    assert go_fields(QWEN3) == {
        "system", "tools", "thinking", "messages", "role", "content", "toolcalls", "function", "name",
    }  # fmt: skip


@pytest.mark.parametrize(
    "template", ['{{ "say .Tools" }}', "{{ `.Tools` }}", "{{/* .Tools */}}", ".Tools", "{{ .Tools", '{{ "{ .Tools', "{{ .tool }}"]
)
def test_fields_are_not_found_in_text_strings_and_comments(template: str) -> None:
    assert "tools" not in go_fields(template)


def test_thinking_is_seen_where_tags_surround_it() -> None:
    assert go_has_thinking(QWEN3)


@pytest.mark.parametrize(
    "template",
    [
        "{{ range .Messages }}{{ .Content }}{{ end }}",
        "{{ if .Thinking }} /think {{ end }}",
        "{{ range .Messages }}{{ range .Other }}<think>{{ .Thinking }}</think>{{ end }}{{ end }}",
        "{{ range .Messages }}{{ .Thinking }}</think>{{ end }}",
        "{{ range .Messages }}<think>{{ .Thinking }}{{ end }}",
        "{{ range .Messages }} {{ .Thinking }} {{ end }}",
        "{{ range .Messages }}<think>{{ $.Thinking }}</think>{{ end }}",
        "{{ range .Messages }}<think>{{/* .Thinking */}}</think>{{ end }}",
        "{{ end }}{{ else }}{{ .Thinking }}",
        "",
    ],
)
def test_thinking_is_not_seen_elsewhere(template: str) -> None:
    assert not go_has_thinking(template)


def test_trim_marks_take_the_space_around_tags() -> None:
    assert go_has_thinking("{{ range .Messages }} <a> {{- .Thinking -}} <b> {{ end }}")
    assert not go_has_thinking("{{ range .Messages }}<a>{{ if .Thinking -}}  {{- .Thinking -}} <b> {{ end }}{{ end }}")


@given(st.text('{}-/*.`"\\ \nTthinkgMesarfdl', max_size=60))
def test_any_text_is_a_template_that_can_be_looked_at(text: str) -> None:
    assert isinstance(go_has_thinking(text), bool)
    assert isinstance(go_fields(text), frozenset)


@pytest.mark.parametrize("evil", ["{{" * 20_000, '{{"\\"' * 10_000 + "}}", "{{/*" * 10_000 + "}}", "{{`" * 10_000 + "}}"])
def test_t106_unclosed_pieces_do_not_take_long(evil: str) -> None:
    """Quadratic search took minutes on these."""
    assert go_fields(evil) == frozenset()
    assert not go_has_thinking(evil)


@pytest.mark.parametrize(
    ("template", "has_tools"), [("{% if tools %}", True), ("message.tool_call_id", True), ("{{ messages }}", False)]
)
def test_tools_of_a_jinja_template(template: str, has_tools: bool) -> None:
    assert jinja_has_tools(template) is has_tools


@pytest.mark.parametrize(
    ("template", "has_thinking"),
    [
        ("<think>{{ x }}</think>", True),
        ("<think>", False),
        ("content.split('</think>')[-1]", True),
        ('content.split("</think>")[-1]', True),
        ("content.split('</think>') message.reasoning_content", False),
        ("content.split('</think>') <SPECIAL_12>", False),
        ("", False),
    ],
)
def test_thinking_of_a_jinja_template(template: str, has_thinking: bool) -> None:
    assert jinja_has_thinking(template) is has_thinking


GO_TOOLS = "{{ range .Messages }}{{ .ToolCalls }}{{ end }}{{ .Tools }}"
GO_ROUND_TRIP = '{{ range .Messages }}{{ if eq .Role "tool" }}{{ end }}{{ .ToolCalls }}{{ end }}{{ .Tools }}'
JINJA_ROUND_TRIP = "{% if tools %}{{ message.tool_calls }}{% elif message['role'] == 'tool' %}{% endif %}"


@pytest.mark.parametrize(
    ("jinja", "go", "is_preferred"),
    [
        ("{{ messages }}", "{{ .Prompt }}", False),
        ("{{ messages }}", "{{ .Prompt", True),
        ("{{ tools }}", "{{ .Prompt }}", True),
        ("{{ tools }}", GO_TOOLS, False),
        (JINJA_ROUND_TRIP, GO_TOOLS, True),
        (JINJA_ROUND_TRIP, GO_ROUND_TRIP, False),
        ("{{ tools }}<think></think>", GO_ROUND_TRIP, False),
        (JINJA_ROUND_TRIP + "<think></think>", GO_ROUND_TRIP, True),
        ("<think></think>", "{{ .Tools }}", False),
        ("{{ tools }}", "{{ .Tools }}{{ .Suffix }}", False),
        ("{{ message.tool_calls }} ipython", "{{ .Tools }}", True),
        ('{{ message.tool_calls }}{% if message.role == "tool" %}', "{{ .Tools }}", True),
    ],
)
def test_jinja_is_preferred_when_more_can_be_done_with_it(jinja: str, go: str, is_preferred: bool) -> None:
    assert jinja_is_preferred(jinja, go) is is_preferred
