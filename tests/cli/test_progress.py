"""The bars of a pull: what they measure, and what is drawn where."""

import io
import itertools
import os
import re
import threading

import pytest

from corral.cli.progress import Bar, TransferView, follow, time_left

DIGEST = "sha256:" + "ab" * 32


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def event(completed: int, total: int = 4_000_000) -> dict[str, object]:
    return {"status": "pulling abababababab", "digest": DIGEST, "total": total, "completed": completed}


def test_bar_shows_share_size_speed_and_time_left_in_the_width() -> None:
    bar = Bar("pulling abababababab:", 4_000_000, 0, 0.0)
    bar.update(1_000_000, 1.0)
    bar.update(2_000_000, 2.0)
    line = bar.line(100, 2.0)
    assert len(line) == 100
    assert line.startswith("pulling abababababab:  50% ▕█")
    assert line.endswith("  2 MB/  4 MB    1 MB/s      2s")


def test_bar_that_is_full_shows_the_size_alone() -> None:
    bar = Bar("pulling x:", 4_000_000, 4_000_000, 0.0)
    assert bar.line(80, 0.0).split("▏")[1].strip() == "4 MB"
    assert bar.line(80, 0.0).startswith("pulling x: 100%")


def test_bar_does_not_know_its_speed_at_once() -> None:
    bar = Bar("pulling x:", 100, 0, 0.0)
    bar.update(10, 0.2)
    assert "/s" not in bar.line(100, 0.2)


def test_bar_that_goes_back_has_no_negative_speed() -> None:
    bar = Bar("pushing x:", 100, 50, 0.0)
    bar.update(0, 2.0)
    assert bar.speed(2.0) == 0


@pytest.mark.parametrize("width", [1, 20, 40, 60])
def test_bar_fits_narrow_terminals(width: int) -> None:
    bar = Bar("pulling abababababab:", 10**12, 10**11, 0.0)
    assert len(bar.line(width, 5.0)) <= width


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (8.4, "8s"), (125, "2m5s"), (4800, "1h20m"), (10**9, "99h+"), (59.6, "1m0s")]
)
def test_time_left_has_two_units(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


def test_terminal_gets_bars_that_are_redrawn_in_place_and_its_cursor_back() -> None:
    out, clock = Terminal(), iter(range(100))
    view = TransferView("pulling", monotonic=lambda: float(next(clock)), out=out)
    assert follow([{"status": "pulling manifest"}, event(0), event(10), event(4_000_000), {"status": "success"}], view)
    text = out.getvalue()
    assert text.startswith("\x1b[?25l")
    assert text.endswith("\x1b[?25h")
    assert "\x1b[A" in text
    assert "100%" in text


class Watched(Terminal):
    """Tells when something has been written often enough."""

    def __init__(self, text: str, times: int) -> None:
        super().__init__()
        self.is_seen = threading.Event()
        self._text, self._times = text, times

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.getvalue().count(self._text) >= self._times:
            self.is_seen.set()
        return written


def test_terminal_sees_that_something_turns_while_nothing_comes() -> None:
    out, clock = Watched("verifying sha256 digest", 4), itertools.count()
    with TransferView("pulling", monotonic=lambda: next(clock) / 10, out=out) as view:
        view.show(event(4_000_000))
        view.show({"status": "verifying sha256 digest"})
        assert out.is_seen.wait(60)
    drawn = re.findall("verifying sha256 digest (.)", out.getvalue())
    assert len(set(drawn)) > 1
    # What is done turns no longer.
    assert out.getvalue().endswith("verifying sha256 digest\n\x1b[?25h")


@pytest.mark.parametrize(("verb", "title"), [("pulling", "pulling abababababab:"), ("pushing", "pushing abababababab")])
def test_bar_on_a_terminal_is_titled_as_ollamas(verb: str, title: str) -> None:
    out = Terminal()
    follow([{**event(10), "status": f"{verb} abababababab"}], TransferView(verb, monotonic=lambda: 0.0, out=out))
    assert f"{title}   0% ▕" in out.getvalue()


def test_terminal_gets_its_cursor_back_after_an_error() -> None:
    out = Terminal()
    view = TransferView("pulling", monotonic=lambda: 0.0, out=out)

    def broken() -> object:
        yield {"status": "pulling manifest"}
        raise ConnectionError

    with pytest.raises(ConnectionError):
        follow(broken(), view)  # type: ignore[arg-type]
    assert out.getvalue().endswith("\x1b[?25h")


def test_terminal_that_nobody_told_its_size_gets_lines_all_the_same() -> None:
    class Sizeless(Terminal):
        def fileno(self) -> int:
            return theirs

    ours, theirs = os.openpty()
    try:
        assert tuple(os.get_terminal_size(theirs)) == (0, 0)
        out = Sizeless()
        follow([{"status": "pulling manifest"}, event(4_000_000)], TransferView("pulling", monotonic=lambda: 0.0, out=out))
        assert "pulling manifest" in out.getvalue()
    finally:
        os.close(ours)
        os.close(theirs)


def test_pipe_gets_plain_lines() -> None:
    out = io.StringIO()
    view = TransferView("pulling", monotonic=lambda: 0.0, out=out)
    assert not follow([{"status": "pulling manifest"}, event(0), event(5), event(4_000_000), event(4_000_000)], view)
    assert out.getvalue() == "pulling manifest\npulling abababababab: 4 MB\n"


def test_blob_without_bytes_is_told_too() -> None:
    out = io.StringIO()
    follow([event(0, total=0)], TransferView("pushing", monotonic=lambda: 0.0, out=out))
    assert out.getvalue() == "pushing abababababab: 0 B\n"
