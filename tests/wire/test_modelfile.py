"""Modelfiles: what is read out of them, what is refused and where, and that what is written can be read back."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.errors import CorralError
from corral.wire.modelfile import (
    COMMANDS,
    MAX_MODELFILE_BYTES,
    Instruction,
    format_instruction,
    format_modelfile,
    parse_modelfile,
    parse_parameter,
    recipe_of,
)

FROM = Instruction("from", "tiny")


def read(text: str) -> tuple[Instruction, ...]:
    return parse_modelfile(text.encode())


def value_of(text: str) -> str:
    """The value of the one instruction behind FROM."""
    _, second = read(f"FROM tiny\n{text}")
    return second.value


def refusal(text: str) -> str:
    with pytest.raises(CorralError) as caught:
        recipe_of(read(text))
    assert caught.value.code == "bad_request"
    return caught.value.message


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_instruction_is_read_in_any_case_and_order() -> None:
    text = (
        "# how it is made\n\n  system You are brief.\nFrom ./tiny.gguf\nADAPTER lora.gguf\nDRAFT small.gguf\n"
        "Template {{ .Prompt }}\n\tPARAMETER temperature 0.5\nPARAMETER\tstop\t<|end|>\nLICENSE MIT\n"
        "MESSAGE user hi there\nRENDERER r\nPARSER p\n"
        "REQUIRES v0.14.0"
    )
    assert read(text) == (
        Instruction("system", "You are brief."),
        Instruction("from", "./tiny.gguf"),
        Instruction("adapter", "lora.gguf"),
        Instruction("draft", "small.gguf"),
        Instruction("template", "{{ .Prompt }}"),
        Instruction("parameter", "0.5", "temperature"),
        Instruction("parameter", "<|end|>", "stop"),
        Instruction("license", "MIT"),
        Instruction("message", "hi there", "user"),
        Instruction("renderer", "r"),
        Instruction("parser", "p"),
        Instruction("requires", "v0.14.0"),
    )
    assert [one.line for one in read(text)] == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfFROM tiny\r\nSYSTEM gr\xc3\xbc\xc3\x9fe\r\n",
        "\ufeffFROM tiny\nSYSTEM grüße\n".encode("utf-16-le"),
        "\ufeffFROM tiny\nSYSTEM grüße\n".encode("utf-16-be"),
    ],
)
def test_text_is_utf8_or_utf16_with_its_mark(data: bytes) -> None:
    assert parse_modelfile(data) == (FROM, Instruction("system", "grüße"))


def test_text_that_is_not_utf8_is_read_with_replacements() -> None:
    assert parse_modelfile(b"FROM tiny\nSYSTEM a\xffb") == (FROM, Instruction("system", "a\ufffdb"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("SYSTEM  plain  # no comment  ", "plain  # no comment"),
        ('SYSTEM "  kept  "  ', "  kept  "),
        ('SYSTEM """one\n  two\n"""', "one\n  two\n"),
        ('SYSTEM """\nsays "hi"\n"""\n', '\nsays "hi"\n'),
        ('SYSTEM "spans\nlines"', "spans\nlines"),
        ('SYSTEM "crlf\r\nlines"', "crlf\r\nlines"),
        ('SYSTEM ""', ""),
        ('SYSTEM """"""', ""),
        ('SYSTEM """ends in a quote""""', 'ends in a quote"'),
        ('SYSTEM """a""" b\nc"""', 'a""" b\nc'),
        ("SYSTEM 'single'", "'single'"),
        ("SYSTEM ", ""),
        ("SYSTEM a\u200db", "a\u200db"),
    ],
)
def test_value_is_what_stands_between_its_quotes(text: str, value: str) -> None:
    assert value_of(text) == value


def test_a_value_in_quotes_may_hold_what_looks_like_an_instruction() -> None:
    assert value_of('SYSTEM """\nFROM other\n# no comment\n"""') == "\nFROM other\n# no comment\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no FROM line"),
        ("SYSTEM x", "no FROM line"),
        ("FROM", "(line 1): unexpected EOF: FROM"),
        ("FROM \n", "(line 1): FROM needs a value"),
        ("FROM a\nDRAFT ", "(line 2): DRAFT needs a value"),
        ("FROM a\n\nSYSTEM", "(line 3): unexpected EOF: SYSTEM"),
        ("FROM a\nPARAMETER temperature", "(line 2): unexpected EOF: temperature"),
        ("FROM a\nPARAMETER ", "(line 2): unexpected EOF: PARAMETER"),
        ('FROM a\nSYSTEM "open\nFROM b', '(line 2): unexpected EOF: the value that begins here with " does not end'),
        ('FROM a\nSYSTEM """open"\n""', '(line 2): unexpected EOF: the value that begins here with """ does not end'),
        ('FROM a\nSYSTEM "hello" she said', '(line 2): unexpected EOF: the value that begins here with " does not end'),
        ('FROM"a"', "(line 1): a space must follow FROM"),
        ("FROM a\r\nMESSAGE User hi", '(line 2): message role must be one of "system", "user", or "assistant"'),
        ("FROM a\nPARAMETER nope 1", "(line 2): unknown parameter 'nope'"),
        ("FROM a\nPARAMETER temperature warm", "(line 2): invalid float value [warm]"),
        ("FROM a\nPARAMETER temperature 1e99", "(line 2): invalid float value [1e99]"),
        ("FROM a\nPARAMETER top_p nan", "(line 2): invalid float value [nan]"),
        ("FROM a\nPARAMETER num_ctx 4k", "(line 2): invalid int value [4k]"),
        ("FROM a\nPARAMETER seed 9999999999999999999", "(line 2): invalid int value [9999999999999999999]"),
        ("FROM a\nPARAMETER use_mmap yes", "(line 2): invalid bool value [yes]"),
        ("FROM a\nREQUIRES latest", "(line 2): requires must be a valid semver (e.g. 0.14.0)"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize("text", ["FROMM a", "FROM a\nFOO_BAR x", "FROM a\n?", "FROM a\n12 x"])
def test_a_word_that_is_no_instruction_is_told_what_there_is(text: str) -> None:
    message = refusal(text)
    assert message.startswith(f'(line {len(text.splitlines())}): command must be one of "from", "license", "template",')
    assert message.endswith('"message", or "requires"')


def test_a_file_that_is_no_modelfile_is_refused_before_it_is_read() -> None:
    with pytest.raises(CorralError, match="at most"):
        parse_modelfile(b" " * (MAX_MODELFILE_BYTES + 1))


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain", "SYSTEM plain"),
        ('says "hi"', 'SYSTEM says "hi"'),
        ("", "SYSTEM "),
        (" blank ", 'SYSTEM " blank "'),
        ("two\nlines", 'SYSTEM "two\nlines"'),
        ('two\n"lines"', 'SYSTEM """two\n"lines""""'),
        ('"begins" so', 'SYSTEM """"begins" so"""'),
        ("tab\t", 'SYSTEM "tab\t"'),
    ],
)
def test_quotes_are_written_where_the_value_needs_them(value: str, written: str) -> None:
    assert format_instruction(Instruction("system", value)) == written


def is_expressible(value: str) -> bool:
    """The format has no escapes: a text of several lines one of which ends in three quotes cannot be written down."""
    return not any(line.rstrip().endswith('"""') for line in value.replace("\r", "\n").split("\n")[:-1])


_texts = st.one_of(
    st.text(st.sampled_from(list('ab" \t\n\r#{}\u00a0\u2003'))), st.text(st.characters(exclude_categories=["Cs"]))
).filter(is_expressible)
_instructions = st.one_of(
    st.builds(Instruction, st.sampled_from([name for name in COMMANDS if name not in ("parameter", "message")]), _texts),
    st.builds(Instruction, st.just("parameter"), _texts, st.sampled_from(["stop", "temperature", "num_ctx"])),
    st.builds(Instruction, st.just("message"), _texts, st.sampled_from(["system", "user", "assistant"])),
)


@given(st.lists(_instructions, max_size=6))
def test_what_is_written_is_read_back(instructions: list[Instruction]) -> None:
    whole = (FROM, *instructions)
    assert parse_modelfile(format_modelfile(whole).encode()) == whole


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(CorralError):
        recipe_of(parse_modelfile(b"FROM a\n" + data))


# ── Recipes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_recipe_holds_what_create_takes() -> None:
    recipe = recipe_of(
        read(
            "FROM a.gguf\nFROM mmproj.gguf\nADAPTER lora\nDRAFT d\nSYSTEM one\nSYSTEM two\nTEMPLATE t\nLICENSE MIT\n"
            "LICENSE Apache\nPARAMETER stop a\nPARAMETER stop b\nPARAMETER temperature 1\nPARAMETER temperature 2\n"
            "PARAMETER num_ctx 4096\n"
            "PARAMETER use_mmap false\nPARAMETER mirostat 1\nMESSAGE user hi\nMESSAGE assistant hello\nREQUIRES v1.2\nRENDERER r"
            "\nPARSER p"
        )
    )
    assert (recipe.sources, recipe.drafts, recipe.adapters) == (("a.gguf", "mmproj.gguf"), ("d",), ("lora",))
    assert recipe.deprecated == ("mirostat",)
    assert recipe.fields == {
        "system": "two",
        "template": "t",
        "license": ["MIT", "Apache"],
        "parameters": {"stop": ["a", "b"], "temperature": 2.0, "num_ctx": 4096, "use_mmap": False},
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        "requires": "1.2",
        "renderer": "r",
        "parser": "p",
    }


@pytest.mark.parametrize(("name", "text", "value"), [("top_k", "-1", -1), ("min_p", ".05", 0.05), ("use_mmap", "T", True)])
def test_parameter_has_its_type(name: str, text: str, value: object) -> None:
    assert parse_parameter(name, text) == value
