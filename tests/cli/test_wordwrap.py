"""Lines that break between words, however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.cli.wordwrap import WordWrap, char_width, width_of


def wrapped(text: str, columns: int, *, piece: int = 1) -> str:
    wrap = WordWrap()
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)]
    return "".join(wrap.feed(one, columns) for one in pieces) + wrap.rest()


# The last five columns stay free, so 15 columns hold ten characters.
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("one two", "one two"),
        ("0123456789 next", "0123456789\nnext"),
        ("one two three", "one two\nthree"),
        ("one two\nthree four five", "one two\nthree four\nfive"),
        ("one   two   three", "one   two\nthree"),
        ("end of line  \nnext", "end of\nline  \nnext"),
        ("    indented words", "    indented\nwords"),
        ("\tx\ty", "\tx\ny"),
        ("see http://example.org/a/long/path now", "see\nhttp://example.org/a/long/path\nnow"),
        ("ein Wörterbuch", "ein\nWörterbuch"),
        ("你好世界你好世界", "你好世界你\n好世界"),
        ("你好世界你。好", "你好世界你。\n好"),
        ("say 你好世界", "say 你好世\n界"),
        ("e\u0301e\u0301e\u0301 e\u0301e\u0301e\u0301e\u0301 x", "e\u0301e\u0301e\u0301 e\u0301e\u0301e\u0301e\u0301 x"),
        ("ab cde 👩\u200d👩\u200d👧 z", "ab cde 👩\u200d👩\u200d👧\nz"),
        ("a b\n```\nx = some_function(1, 2, 3)\n```\none two three", "a b\n```\nx = some_function(1, 2, 3)\n```\none two\nthree"),
    ],
)
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_text_is_broken_between_words_whatever_its_pieces(text: str, shown: str, piece: int) -> None:
    assert wrapped(text, 15, piece=piece) == shown


def test_word_is_held_back_until_it_is_whole() -> None:
    wrap = WordWrap()
    assert wrap.feed("Hel", 80) == ""
    assert wrap.feed("lo wor", 80) == "Hello"
    assert wrap.rest() == " wor"
    assert wrap.feed("ld ", 80) == "ld"


def test_terminal_too_narrow_for_lines_gets_the_text_as_it_is() -> None:
    assert wrapped("one two three four", 9) == "one two three four"


def test_terminal_that_grows_is_used_at_once() -> None:
    wrap = WordWrap()
    assert wrap.feed("one two three ", 15) + wrap.feed("four five six seven", 80) == "one two\nthree four five six"


@given(st.text(alphabet="ab 你é\n\t`\u200d,", max_size=60), st.integers(10, 30), st.integers(1, 7))
def test_only_blanks_between_words_are_changed(text: str, columns: int, piece: int) -> None:
    shown = wrapped(text, columns, piece=piece)
    assert shown == wrapped(text, columns, piece=60)
    assert "".join(shown.split()) == "".join(text.split())
    assert shown.count("\n") >= text.count("\n")


@given(st.lists(st.text(alphabet="abc你", min_size=1, max_size=6), max_size=20), st.integers(17, 40))
def test_no_line_is_longer_than_the_column(words: list[str], columns: int) -> None:
    assert all(width_of(line) <= columns - 5 for line in wrapped(" ".join(words), columns).split("\n"))


@pytest.mark.parametrize(("char", "width"), [("a", 1), ("é", 1), ("你", 2), ("\u0301", 0), ("\u200d", 0), ("👧", 2)])
def test_width_of_a_character(char: str, width: int) -> None:
    assert char_width(char) == width
