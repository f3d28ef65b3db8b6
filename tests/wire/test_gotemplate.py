"""Go's text/template: what is accepted, what it makes, and what stops it. The expected texts are what Go 1.26 gives."""

import json
import time
from contextlib import suppress
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import go_templates
from corral.wire.errors import CorralError
from corral.wire.gosyntax import MAX_NESTING, MAX_TEMPLATE_CHARACTERS, parse
from corral.wire.gotemplate import MAX_STEPS, execute
from corral.wire.govalues import Ordered, Shown, Struct

TODAY = date(2026, 3, 1)
DATA: dict[str, Any] = {
    "s": "hello",
    "uni": "héllo",
    "n": 3,
    "f": 2.5,
    "t": True,
    "l": ["a", "b", "c"],
    "e": [],
    "m": {"b": {"c": "deep"}, "a": 1, "null": None},
    "st": Struct(kind="T", members={"Name": "x", "N": 1}, methods={"Loud": lambda: "X!"}),
    "sh": Shown(["p", "q"], lambda: "<p,q>"),
}


def run(template: str, data: Any = DATA) -> str:
    return execute(parse(template), data, today=TODAY)


@pytest.mark.parametrize(
    ("template", "made"),
    [
        # text, trimming, comments
        ("a {{ .s }} b", "a hello b"),
        ("a \n{{- .s -}}\t b", "ahellob"),
        ("a {{- /* {{ */ -}} b{{/* x */}}c", "abc"),
        ('{{ `a\r\n{{` }}{{ "}}\\u00e9\\x41\\102\\n" }}', "a\n{{}}éAB\n"),
        ("{{ 3 -}} x", "3x"),
        # constants
        (
            "{{ 0x1F }} {{ 1_0 }} {{ -7 }} {{ 017 }} {{ 'a' }} {{ '\\n' }} {{ 2.50 }} {{ 1e3 }} {{ true }}",
            "31 10 -7 15 97 10 2.5 1000 true",
        ),
        (
            "{{ 1e21 }} {{ 1e-5 }} {{ 0.0001 }} {{ 1e20 }} {{ -0.5 }} {{ 1e5 }} {{ 1e6 }}",
            "1e+21 1e-05 0.0001 1e+20 -0.5 100000 1e+06",
        ),
        # fields
        ("{{ .m.b.c }} {{ $.n }} {{ (index .l 1) }} {{ .missing }} {{ .st.Name }} {{ .st.Loud }}", "deep 3 b <no value> x X!"),
        ("{{ .m }} {{ .l }} {{ .st }} {{ .sh }} {{ .sh.String }}", "map[a:1 b:map[c:deep] null:<nil>] [a b c] {x 1} <p,q> <p,q>"),
        ('{{ (index .m "b").c }}', "deep"),
        # variables
        ("{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ $x }}{{ end }}{{ $x }}", "21"),
        ("{{ $x := 1 }}{{ if true }}{{ $x = 2 }}{{ end }}{{ $x }}", "2"),
        ("{{ with $x := .s }}{{ $x }}{{ . }}{{ end }}", "hellohello"),
        ("{{ $x := .m }}{{ $x.b.c }}{{ $y := .missing }}[{{ $y.deep }}]", "deep[<no value>]"),
        # if, with
        ("{{ if .e }}1{{ else if .missing }}2{{ else if .f }}3{{ else }}4{{ end }}", "3"),
        ("{{ with .e }}x{{ else with .s }}{{ . }}{{ end }}", "hello"),
        ("{{ if .st }}struct{{ end }}{{ if .sh }}shown{{ end }}{{ if 0.0 }}zero{{ end }}", "structshown"),
        # range
        ("{{ range .l }}{{ . }}{{ end }}", "abc"),
        ("{{ range $i, $v := .l }}{{ $i }}{{ $v }}{{ end }}", "0a1b2c"),
        ("{{ range $v := .sh }}{{ $v }},{{ end }}", "p,q,"),
        ("{{ range $k, $v := .m }}{{ $k }}={{ $v }};{{ end }}", "a=1;b=map[c:deep];null=<no value>;"),
        ("{{ range .e }}x{{ else }}none{{ end }}{{ range .missing }}x{{ else }}nil{{ end }}", "nonenil"),
        ("{{ range 3 }}{{ . }}{{ end }}{{ range $i := 2 }}{{ $i }}{{ end }}", "01201"),
        ('{{ range .l }}{{ if eq . "b" }}{{ continue }}{{ end }}{{ . }}{{ end }}', "ac"),
        ('{{ range .l }}{{ if eq . "b" }}{{ break }}{{ end }}{{ . }}{{ end }}!', "a!"),
        ("{{ $v := 0 }}{{ range $v = .l }}{{ end }}{{ $v }}", "c"),
        ("{{ range .l }}{{ range $.l }}{{ break }}{{ end }}{{ . }}{{ end }}", "abc"),
        # templates
        (
            '{{ define "x" }}[{{ . }}{{ $ }}]{{ end }}{{ template "x" .s }}{{ template "x" }}',
            "[hellohello][<no value><no value>]",
        ),
        ('{{ block "x" .n }}<{{ . }}>{{ end }}{{ template "x" 4 }}', "<3><4>"),
        ('{{ define "x" }} {{ end }}{{ define "x" }}y{{ end }}{{ template "x" . }}', "y"),
        # functions
        ('{{ and 1 0 .missing }} {{ and 1 2 }} {{ or 0 .s }} {{ or 0 "" }}| {{ not .e }}', "0 2 hello | true"),
        ("{{ and false (index .l 99) }}{{ or true (index .l 99) }}", "falsetrue"),
        (
            '{{ eq .s "x" "hello" }} {{ ne 1 2 }} {{ lt 1 2 }} {{ le 2 2 }} {{ gt "b" "a" }} {{ ge 1.5 2.5 }}',
            "true true true true true false",
        ),
        ("{{ eq .missing nil }} {{ eq .missing .s }} {{ eq .m.null nil }}", "true false true"),
        ("{{ len .uni }} {{ len .l }} {{ len .m }} {{ len .sh }}", "6 3 3 2"),
        (
            "{{ index .uni 1 }} {{ slice .uni 0 1 }} {{ slice .l 1 }} {{ slice .l 0 2 }} {{ slice .l 1 2 3 }}",
            "195 h [b c] [a b] [b]",
        ),
        ('{{ print 1 2 "a" "b" 3 .missing }}', "1 2ab3 <nil>"),
        ('{{ println 1 "a" }}{{ .s | print "x" }}', "1 a\nxhello"),
        (
            '{{ printf "%s|%5d|%-4s|%05.2f|%q|%v|%t|%%|%x|%c" .s 3 "a" 2.5 "\\n" .l true 255 65 }}',
            'hello|    3|a   |02.50|"\\n"|[a b c]|true|%|ff|A',
        ),
        (
            '{{ printf "%d %s" .s }} {{ printf "x" 1 "a" }} {{ printf "%" }}',
            "%!d(string=hello) %!s(MISSING) x%!(EXTRA int=1, string=a) %!(NOVERB)",
        ),
        (
            '{{ html "<a href=\'x\'>&" }} {{ js "\'<é\\n" }} {{ urlquery "a b/é" }}',
            "&lt;a href=&#39;x&#39;&gt;&amp; \\'\\u003Cé\\u000A a+b%2F%C3%A9",
        ),
        (
            '{{ json .m }} {{ json .sh }} {{ json "<é\\u2028\\"\\n&>" }} {{ json 1e21 }} {{ json 1e-7 }} {{ json 2.0 }}',
            '{"a":1,"b":{"c":"deep"},"null":null} ["p","q"] "\\u003cé\\u2028\\"\\n\\u0026\\u003e" 1e+21 1e-7 2',
        ),
        ("{{ json .st }} {{ .st | json | len }}", '{"Name":"x","N":1} 18'),
        (
            '{{ currentDate }} {{ currentDate "x" }} {{ yesterdayDate }} {{ toTypeScriptType .s }}',
            "2026-03-01 2026-03-01 2026-02-28 any",
        ),
        ('{{ (len (slice .l 1)) | printf "%d-%d" 1 }}', "1-2"),
    ],
)
def test_template_makes_what_go_makes(template: str, made: str) -> None:
    assert run(template) == made


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{", ":1: unclosed action"),
        ("\n{{ .s", ":2: unclosed action"),
        ("{{/* x", ":1: unclosed comment"),
        ("{{/* x */ }}", ":1: comment ends before closing delimiter"),
        ('{{ "x }}', ":1: unterminated quoted string"),
        ("{{ `x }}", ":1: unterminated raw quoted string"),
        ("{{ 'x }}", ":1: unterminated character constant"),
        ("{{ 'ab' }}", ":1: malformed character constant: 'ab'"),
        ('{{ "\\q" }}', ":1: invalid syntax"),
        ('{{ "\\ud800" }}', ":1: invalid syntax"),
        ("{{ 1a }}", ":1: bad number syntax: '1a'"),
        ("{{ 9223372036854775808 }}", ":1: 9223372036854775808 overflows int"),
        ("{{ .a$ }}", ":1: bad character '$'"),
        ("{{ ; }}", ":1: unexpected ';' in action"),
        ("{{ (1 }}", ":1: unclosed left paren"),
        ("{{ 1) }}", ":1: unexpected right paren"),
        ("{{ }}", ":1: missing value for command"),
        ("{{ if }}x{{ end }}", ":1: missing value for if"),
        ("{{ .s | }}", ":1: missing value for command"),
        ("{{ .s | 3 }}", ":1: non executable command in pipeline stage 2"),
        ("{{ nofunction 1 }}", ':1: function "nofunction" not defined'),
        ("{{ $x }}", ':1: undefined variable "$x"'),
        ("{{ if $x := 1 }}{{ end }}{{ $x }}", ':1: undefined variable "$x"'),
        ("{{ $x, $y := .l }}", ":1: too many declarations in command"),
        ("{{ range $x, 3 }}{{ end }}", ":1: range can only initialize variables"),
        ("{{ 1.a }}", ":1: bad number syntax: '1.a'"),
        ('{{ "a".b }}', ":1: unexpected . after term"),
        ('{{ "a""b" }}', ":1: unexpected '\"b\"' in operand"),
        ("{{ end }}", ":1: unexpected {{end}}"),
        ("{{ else }}", ":1: unexpected {{else}}"),
        ("{{ if 1 }}a", ":1: unexpected EOF"),
        ("{{ if 1 }}{{ else }}{{ else }}{{ end }}", ":1: expected end; found {{else}}"),
        ("{{ if 1 }}{{ else with 1 }}{{ end }}", ":1: unexpected 'with' in else"),
        ("{{ range .l }}{{ else if 1 }}{{ end }}", ":1: unexpected 'if' in else"),
        ("{{ break }}", ":1: {{break}} outside {{range}}"),
        ('{{ range .l }}{{ block "x" . }}{{ continue }}{{ end }}{{ end }}', ":1: {{continue}} outside {{range}}"),
        ('{{ if 1 }}{{ define "x" }}{{ end }}{{ end }}', ":1: unexpected 'define' in command"),
        ('{{ define "x" }}a{{ else }}{{ end }}', ":1: unexpected 'else' in define clause"),
        ('{{ define "x" }}a{{ end }}{{ define "x" }}b{{ end }}', ':1: template: multiple definition of template "x"'),
        ("{{ template x }}", ":1: unexpected 'x' in template clause"),
    ],
)
def test_template_that_cannot_be_read_is_refused_with_its_line(template: str, fault: str) -> None:
    with pytest.raises(CorralError) as refused:
        parse(template)
    assert (refused.value.code, refused.value.message) == ("bad_request", f"template: {fault}")


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("\n{{ .missing.deep }}", ":2: nil pointer evaluating interface {}.deep"),
        ("{{ .s.deep }}", ":1: can't evaluate field deep in type string"),
        ("{{ .st.Other }}", ":1: can't evaluate field Other in type T"),
        ("{{ .s 1 }}", ":1: can't give argument to non-function"),
        ("{{ nil }}", ":1: nil is not a command"),
        ("{{ range .s }}{{ end }}", ":1: range can't iterate over hello"),
        ("{{ range $i, $v := 3 }}{{ end }}", ":1: range can't iterate over 3"),
        ('{{ template "x" }}', ':1: template "x" not defined'),
        ("{{ len 3 }}", ":1: error calling len: len of type int"),
        ("{{ len .missing }}", ":1: error calling len: len of nil pointer"),
        ("{{ len }}", ":1: wrong number of args for len: got 0"),
        ("{{ and }}", ":1: wrong number of args for and: want at least 1 got 0"),
        ("{{ index .l 3 }}", ":1: error calling index: index out of range: 3"),
        ('{{ index .l "a" }}', ":1: error calling index: cannot index slice/array with type string"),
        ("{{ index .l nil }}", ":1: error calling index: cannot index slice/array with nil"),
        ("{{ index .m 1 }}", ":1: error calling index: value has type int; should be string"),
        ("{{ index 3 1 }}", ":1: error calling index: can't index item of type int"),
        ("{{ index .missing 1 }}", ":1: error calling index: index of untyped nil"),
        ("{{ slice .l 2 1 }}", ":1: error calling slice: invalid slice index: 2 > 1"),
        ("{{ slice .s 0 1 1 }}", ":1: error calling slice: cannot 3-index slice a string"),
        ("{{ slice 3 }}", ":1: error calling slice: can't slice item of type int"),
        ("{{ slice .missing }}", ":1: error calling slice: slice of untyped nil"),
        ("{{ eq 1 }}", ":1: error calling eq: missing argument for comparison"),
        ('{{ eq 1 "1" }}', ":1: error calling eq: incompatible types for comparison: int and string"),
        ("{{ eq .l .l }}", ":1: error calling eq: non-comparable type []interface {}"),
        ("{{ lt 1 1.5 }}", ":1: error calling lt: incompatible types for comparison: int and float64"),
        ("{{ lt true false }}", ":1: error calling lt: invalid type for comparison"),
        ("{{ call .s }}", ":1: error calling call: non-function of type string"),
        ("{{ call .missing }}", ":1: error calling call: call of nil"),
        ("{{ printf 3 }}", ":1: error calling printf: the format is no string"),
        ('{{ printf "%z" .l }}', " printf cannot show this value with %z"),
    ],
)
def test_template_that_goes_wrong_says_where(template: str, fault: str) -> None:
    with pytest.raises(CorralError) as refused:
        run(template)
    assert (refused.value.code, refused.value.message) == ("bad_request", f"template:{' ' if fault[0] == ':' else ''}{fault}")


def test_json_keeps_the_order_it_is_told_to() -> None:
    struct = Struct(kind="T", members={}, json=lambda: Ordered([("z", 1), ("a", b"\x00\xff")]))
    assert run("{{ json . }}", struct) == '{"z":1,"a":"AP8="}'


@pytest.mark.parametrize("name", ["__class__", "__init__", "members", "methods", "text", "format", "keys", "_steps"])
def test_t107_nothing_of_python_can_be_reached(name: str) -> None:
    for value in ("s", "l", "st", "sh", "n"):
        with pytest.raises(CorralError, match="can't evaluate field"):
            run(f"{{{{ .{value}.{name} }}}}")
    assert run(f"{{{{ .{name} }}}}") == "<no value>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ range 1000000000 }}{{ end }}",
        "{{ range 9999 }}{{ range 9999 }}x{{ end }}{{ end }}",
        '{{ define "x" }}{{ template "x" . }}{{ end }}{{ template "x" . }}',
        '{{ define "x" }}{{ template "y" }}{{ end }}{{ define "y" }}{{ range 2 }}{{ template "x" }}{{ end }}{{ end }}'
        '{{ template "x" }}',
        '{{ $x := "aaaaaaaaaaaaaaaa" }}{{ range 99 }}{{ $x = print $x $x }}{{ end }}',
        '{{ $x := "aaaaaaaa" }}{{ range 20 }}{{ $x = print $x $x }}{{ end }}{{ range 99999 }}{{ if eq $x $x }}{{ end }}{{ end }}',
        '{{ $x := "&&&&&&&&&&&&&&&&" }}{{ range 99 }}{{ $x = html $x $x }}{{ end }}',
        "{{ range 999999 }}{{ range $.big }}{{ break }}{{ end }}{{ end }}",
        "{{ range 999999 }}{{ $x := json $.big }}{{ end }}",
        '{{ $x := "aaaaaaaaaaaaaaaa" }}{{ range 8 }}{{ $x = print $x $x }}{{ end }}'
        '{{ range 99999 }}{{ $y := printf "%q" $x }}{{ end }}',
        '{{ printf "%99999d" 1 }}',
        '{{ printf "%099999999999999999d" 1 }}',
        "{{ range 99999 }}{{ .deep }}{{ $.deep }}{{ json $.deep }}{{ end }}",
    ],
)
def test_t107_hostile_template_is_stopped_soon(template: str) -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    data = {"big": {str(number): number for number in range(20_000)}, "deep": deep}
    started = time.process_time()
    with pytest.raises(CorralError) as refused:
        run(template, data)
    assert refused.value.code == "bad_request"
    assert time.process_time() - started < 5  # about half a second; a busy machine is given more


@pytest.mark.parametrize(
    "template",
    [
        "{{" * 50_000,
        "{{ '" * 50_000,
        "{{/*" * 50_000,
        "{{ /*" * 50_000,
        '{{"' * 50_000,
        '{{"\\"' * 30_000,
        "{{ (" + "(" * 50_000,
        "{{ if 1 }}" * 20_000,
        "{{ if 1 }}{{ else " * 9_000,
        "x" * (MAX_TEMPLATE_CHARACTERS + 1),
        "{{ 1" + "1" * 100_000 + " }}",
    ],
)
def test_t107_hostile_text_is_refused_without_much_work(template: str) -> None:
    started = time.process_time()
    with pytest.raises(CorralError):
        parse(template)
    assert time.process_time() - started < 2


def test_deepest_nesting_that_is_allowed_runs() -> None:
    depth = MAX_NESTING // 2
    assert run("{{ if 1 }}" * depth + "x" + "{{ end }}" * depth) == "x"
    assert run("{{ " + "(" * depth + "3" + ")" * depth + " }}") == "3"


def test_steps_suffice_for_a_long_chat() -> None:
    messages = [{"Role": "user", "Content": "x"}] * 4000
    template = "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ .Content }}{{ end }}"
    assert 60 * len(messages) < MAX_STEPS
    made = run(template, {"Messages": messages})
    assert len(made) == 4000


@given(st.text("{}-/*.`\"\\ \n\t$|()=:,x1'%", max_size=80))
def test_any_text_is_a_template_or_refused(text: str) -> None:
    with suppress(CorralError):
        assert isinstance(run(text), str)


_PIECES = st.sampled_from(
    [
        "{{ if .s }}", "{{ else }}", "{{ end }}", "{{ range .l }}", "{{ with .m }}", "{{ .s }}", "{{- . -}}", " text ",
        "{{ break }}", "{{ $x := .n }}", "{{ $x }}", "{{ $x = 2 }}", '{{ block "b" . }}', '{{ template "b" . }}', "{{ json . }}",
        "{{ else if .missing }}", "{{ index .l 1 }}", "{{ slice .uni 1 2 }}", "{{ eq .n 3 }}", "{{ .m.b.c | print }}",
    ]
)  # fmt: skip


@given(st.lists(_PIECES, max_size=12))
def test_any_row_of_actions_is_run_or_refused(pieces: list[str]) -> None:
    with suppress(CorralError):
        assert isinstance(run("".join(pieces)), str)


@given(st.text(max_size=30))
def test_text_without_actions_is_itself(text: str) -> None:
    if "{{" not in text:
        assert run(text) == text


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_json_that_is_made_can_be_read(value: Any) -> None:
    made = run("{{ json .v }}", {"v": value})
    # Go writes whole floats as integers.
    assert json.loads(made, parse_int=_number) == json.loads(json.dumps(value), parse_int=_number)
    assert not set("<>&\u2028\u2029") & set(made)


def _number(text: str) -> float | int:
    return float(text) if len(text) < 300 else int(text)


@pytest.mark.parametrize("name", sorted(go_templates.ALL))
def test_template_of_a_well_known_shape_is_read(name: str) -> None:
    assert parse(go_templates.ALL[name]).root
