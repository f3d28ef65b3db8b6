"""An answer on its way to the terminal or a pipe."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest

from corral.cli.answers import Answer, explained, figures, show_answer, show_stored
from corral.cli.api import ApiError
from corral.cli.context import Failed

CALL = {"function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}}
FINAL = {
    "done": True,
    "total_duration": 2_047_759_287,
    "load_duration": 3_276_377,
    "prompt_eval_count": 31,
    "prompt_eval_duration": 1_176_429_000,
    "eval_count": 10,
    "eval_duration": 860_085_000,
}


class FakeTerminal(io.StringIO):
    """Says that it is a terminal, of 80 columns because it has no descriptor to ask."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal() -> Iterator[FakeTerminal]:
    """What is printed goes to the process's own standard output, and only a terminal gets lines and colours."""
    with contextlib.redirect_stdout(FakeTerminal()) as shown:
        assert isinstance(shown, FakeTerminal)
        yield shown


def show(*events: dict[str, Any], is_wrapped: bool = True, hides_thinking: bool = False) -> Answer:
    return show_answer(iter(events), is_wrapped=is_wrapped, hides_thinking=hides_thinking)


def said(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


def thought(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": "", "thinking": text}}


def test_answer_is_put_together_from_its_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    answer = show(said("Hel"), said("lo"), {**said(""), **FINAL})
    assert answer == Answer(content="Hello", thinking="", final={**said(""), **FINAL}, is_cut=False)
    assert answer.message == {"role": "assistant", "content": "Hello"}
    assert capsys.readouterr().out == "Hello"


@pytest.mark.parametrize(
    ("events", "out"),
    [
        ([thought("hm"), said("Yes")], "Thinking...\nhm\n...done thinking.\n\nYes"),
        ([thought("hm\n"), said("Yes")], "Thinking...\nhm\n...done thinking.\n\nYes"),
        ([thought("h"), thought("m")], "Thinking...\nhm\n...done thinking.\n\n"),
        ([{"thinking": "hm"}, {"response": "Yes"}], "Thinking...\nhm\n...done thinking.\n\nYes"),
        ([said("A"), thought("hm"), said("B")], "AThinking...\nhm\n...done thinking.\n\nB"),
    ],
)
def test_thinking_stands_between_two_lines(events: list[dict[str, Any]], out: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(*events)
    assert capsys.readouterr().out == out


def test_thinking_can_be_hidden_and_is_not_kept_then(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(thought("hm"), said("Yes"), hides_thinking=True).message == {"role": "assistant", "content": "Yes"}
    assert capsys.readouterr().out == "Yes"


def test_thinking_is_part_of_the_message() -> None:
    assert show(thought("hm"), said("Yes")).message == {"role": "assistant", "content": "Yes", "thinking": "hm"}


def test_call_of_a_tool_is_told_and_is_no_part_of_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    answer = show(said("Let me see."), {"message": {"content": "", "tool_calls": [CALL, CALL]}, "done": True})
    line = '  Model called a non-existent function \'get_weather()\' with arguments: {"city":"Oslo","days":2}'
    assert capsys.readouterr().out == f"Let me see.{line}\n{line}"
    assert answer.content == "Let me see."


def test_call_of_generate_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    show({"response": "", "tool_calls": [CALL], "done": True})
    assert "'get_weather()'" in capsys.readouterr().out


def test_terminal_gets_lines_broken_between_words() -> None:
    with terminal() as shown:
        show(said("word " * 20 + "end"))
    assert shown.getvalue() == ("word " * 15).rstrip() + "\n" + "word " * 5 + "end"


def test_terminal_gets_them_whole_when_that_is_wanted() -> None:
    with terminal() as shown:
        show(said("word " * 20 + "end"), is_wrapped=False)
    assert shown.getvalue() == "word " * 20 + "end"


def test_pipe_gets_what_the_model_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = "word " * 20 + "\x1b[31mend\r\n"
    show(said(text))
    assert capsys.readouterr().out == text


def test_terminal_is_not_commanded_by_a_model() -> None:
    with terminal() as shown:
        show(said("a\x1b]0;title\x07b\x9b31mc\rd"))
    assert shown.getvalue() == "a]0;titleb31mcd"


def test_terminal_shows_thinking_in_grey() -> None:
    with terminal() as shown:
        show(thought("hm "), said("Yes"))
    assert shown.getvalue() == (
        "\x1b[90mThinking...\x1b[0m\n\x1b[90mhm\x1b[0m\x1b[90m \x1b[0m\n\x1b[90m...done thinking.\x1b[0m\n\nYes"
    )


def test_answer_that_is_interrupted_is_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    def events() -> Iterator[dict[str, Any]]:
        yield said("Hel")
        raise KeyboardInterrupt

    answer = show_answer(events(), is_wrapped=True, hides_thinking=False)
    assert (answer.content, answer.is_cut) == ("Hel", True)
    assert capsys.readouterr().out == "Hel"


def test_answer_that_fails_leaves_the_line_it_was_on(capsys: pytest.CaptureFixture[str]) -> None:
    def events(*begun: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from begun
        raise Failed("gone")

    for begun, out in (([said("Hel")], "Hel\n"), ([], "")):
        with pytest.raises(Failed):
            show_answer(events(*begun), is_wrapped=True, hides_thinking=False)
        assert capsys.readouterr().out == out


def test_stored_answer_looks_like_a_new_one() -> None:
    with terminal() as shown:
        show_stored("word " * 16 + "end", is_wrapped=True)
    assert shown.getvalue() == ("word " * 15).rstrip() + "\nword end\n\n"


def test_figures_are_ollamas_to_the_byte() -> None:
    # Recorded from ollama's own command against a server that sent these counts.
    assert figures(FINAL) == (
        "total duration:       2.047759287s\n"
        "load duration:        3.276377ms\n"
        "prompt eval count:    31 token(s)\n"
        "prompt eval duration: 1.176429s\n"
        "prompt eval rate:     26.35 tokens/s\n"
        "eval count:           10 token(s)\n"
        "eval duration:        860.085ms\n"
        "eval rate:            11.63 tokens/s\n"
    )


@pytest.mark.parametrize(
    ("final", "labels"),
    [
        ({}, []),
        ({"total_duration": 61_000_000_000}, ["total duration:       1m1s"]),
        ({"eval_count": 3}, ["eval count:           3 token(s)"]),
        ({"prompt_eval_duration": 500}, ["prompt eval duration: 500ns", "prompt eval rate:     0.00 tokens/s"]),
    ],
)
def test_figure_that_is_missing_has_no_line(final: dict[str, int], labels: list[str]) -> None:
    assert figures(final).splitlines() == labels


@pytest.mark.parametrize(
    ("code", "body", "advice"),
    [
        (
            401,
            {"error": "unauthorized", "signin_url": "https://h.test/connect?x"},
            "corral signin, or open https://h.test/connect?x",
        ),
        (401, {"error": "unauthorized", "signin_url": "javascript:alert(1)"}, "corral signin"),
        (401, {"error": "unauthorized", "signin_url": "https://h.test/a b"}, "corral signin"),
        (429, {"error": "too many requests"}, "wait a little and ask again"),
        (500, {"error": "broken"}, ""),
    ],
)
def test_error_of_inference_says_what_to_do(code: int, body: dict[str, str], advice: str) -> None:
    assert explained(ApiError(code, body, "")).advice == advice


def test_error_of_our_own_stays_as_it_is() -> None:
    error = Failed("no server", "start it")
    assert explained(error) is error
