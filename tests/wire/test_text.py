"""Foreign text made fit to be shown or logged."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.text import MAX_NAME, one_line, shown_name

any_text = st.text(st.characters(exclude_categories=[]), max_size=100)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain text", "plain text"),
        ("Zoë 模型", "Zoë 模型"),
        ("a\r\nb", r"a\u000d\u000ab"),
        ("\x1b[31mred", r"\u001b[31mred"),
        ("\x9b2K", r"\u009b2K"),
        ("abc\u202ecba", r"abc\u202ecba"),
        ("\ud800", r"\ud800"),
        ("", ""),
    ],
)
def test_t114_control_characters_are_written_out(text: str, line: str) -> None:
    assert one_line(text) == line


@given(any_text)
def test_t114_any_text_becomes_one_line_that_utf8_takes(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert not {unicodedata.category(character) for character in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    line.encode()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Ada's MacBook (work)", "Ada's MacBook (work)"),
        ("  ci-runner_3.example.org  ", "ci-runner_3.example.org"),
        ("<script>alert(1)</script>", "scriptalert(1)/script"),
        ("a\r\nb\tc", "a b c"),
        ("gnp\u202etxt", "gnptxt"),
        ("Zoë 模型 हिन्दी", "Zoë 模型 हिन्दी"),
        ("", ""),
        ("\x00\x1b", ""),
        ('"`$;', ""),
    ],
)
def test_t048_name_keeps_what_can_be_shown(text: str, name: str) -> None:
    assert shown_name(text) == name


def test_t048_name_of_ten_kilobytes_is_cut() -> None:
    assert shown_name("x" * 10_240) == "x" * MAX_NAME


def test_t048_marks_that_pile_up_are_cut() -> None:
    assert shown_name("Z" + "\u0335" * 50 + "algo") == "Z\u0335algo"


@given(any_text)
def test_t048_any_name_is_short_and_safe_in_markup(text: str) -> None:
    name = shown_name(text)
    assert len(name) <= MAX_NAME
    assert not set(name) & set('<>"`\\\r\n\t\x1b')
    assert name == name.strip()
    name.encode()
