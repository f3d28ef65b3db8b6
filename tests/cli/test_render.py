"""Tables, sizes and times in the forms that Ollama's users know."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from corral.cli import render

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def test_table_separates_padded_columns_by_four_spaces() -> None:
    text = render.table(("NAME", "ID"), [("smollm2:135m", "3f9a"), ("x", "0")])
    assert text == "NAME            ID   \nsmollm2:135m    3f9a    \nx               0       \n"


def test_table_without_rows_is_its_headings() -> None:
    assert render.table(("NAME", "ID"), []) == "NAME    ID \n"


def test_table_neutralises_what_could_move_the_cursor() -> None:
    assert "\x1b" not in render.table(("NAME",), [("evil\x1b[2J\nname",)])
    assert render.table(("NAME",), [("a\nb",)]).count("\n") == 2


@pytest.mark.parametrize("mark", list("\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\x85\x9b\x1b\x7f\r"))
def test_t114_name_is_not_shown_as_another_one(mark: str) -> None:
    assert render.plain(f"a{mark}b") == "a\ufffdb"
    assert mark not in render.error_text(f"a{mark}b", f"a{mark}b")


def test_t114_names_in_any_writing_stay_as_they_are() -> None:
    assert render.plain("mañana-模型-مثال-🦙") == "mañana-模型-مثال-🦙"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1500, "1.5 KB"),
        (98_362_432, "98 MB"),
        (999_999_999, "999 MB"),
        (1_999_900_000_000, "2.0 TB"),
        (9_960_000_000, "10.0 GB"),
    ],
)
def test_size_is_in_powers_of_a_thousand(count: int, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(7_000_000_000, "7B"), (1_540_000_000, "1.5B"), (134_515_008, "134.52M"), (2_000_000, "2M"), (512_000, "512K"), (12, "12")],
)
def test_number_of_parameters_is_short(count: int, text: str) -> None:
    assert render.number(count) == text


@pytest.mark.parametrize(
    ("delta", "text"),
    [
        (timedelta(seconds=0.4), "Less than a second ago"),
        (timedelta(seconds=1), "1 second ago"),
        (timedelta(seconds=59), "59 seconds ago"),
        (timedelta(minutes=1), "About a minute ago"),
        (timedelta(minutes=59), "59 minutes ago"),
        (timedelta(minutes=60), "About an hour ago"),
        (timedelta(hours=47), "47 hours ago"),
        (timedelta(days=3), "3 days ago"),
        (timedelta(days=20), "2 weeks ago"),
        (timedelta(days=100), "3 months ago"),
        (timedelta(days=800), "2 years ago"),
        (timedelta(minutes=-4, seconds=-30), "4 minutes from now"),
        (timedelta(days=-365 * 21), "Forever"),
    ],
)
def test_time_is_relative(delta: timedelta, text: str) -> None:
    assert render.relative_time(NOW - delta, NOW) == text


def test_time_that_never_was_is_never() -> None:
    assert render.relative_time(render.parse_time("0001-01-01T00:00:00Z"), NOW) == "Never"


@pytest.mark.parametrize(
    "text", ["2026-11-23T12:00:00Z", "2026-11-23T13:00:00+01:00", "2026-11-23T12:00:00.000000000Z", "2026-11-23T12:00:00"]
)
def test_times_of_the_api_are_read_with_any_precision(text: str) -> None:
    assert render.parse_time(text) == NOW


@pytest.mark.parametrize("text", ["", "soon", "2026-13-01T00:00:00Z"])
def test_text_that_is_no_time_is_none(text: str) -> None:
    assert render.parse_time(text) is None


def test_t114_json_holds_no_command_for_the_terminal() -> None:
    value = {"a": "\x1b\x7f\x9b é"}
    text = render.as_json(value)
    assert text == '{\n  "a": "\\u001b\\u007f\\u009b é"\n}\n'
    assert json.loads(text) == value


def test_error_has_its_remedy_on_a_second_line() -> None:
    assert render.error_text("not signed in to h", "corral signin") == "Error: not signed in to h\n→ corral signin"


def test_progress_without_a_terminal_leaves_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with render.progress("importing") as report:
        report(10, 2000)
        report(2000, 2000)
    assert capsys.readouterr().err == "importing  2 KB\n"


def test_progress_of_work_that_was_done_already_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with render.progress("importing") as report:
        report(2000, 2000)
    assert capsys.readouterr().err == ""
