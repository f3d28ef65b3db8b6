"""How the terminal shows things: tables, sizes, times, numbers, state colours and one-line progress.

Results go to standard output, everything said about them to standard error, and escape codes only to a terminal. The forms of
tables, sizes and times are Ollama's. Source: ollama format/, cmd/cmd.go, progress/.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO

from corral.cli.wordwrap import width_of

_GREEN, _YELLOW, _RED, _GREY, _RESET = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[90m", "\x1b[0m"
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
#: Beyond this a time to come is as good as never: `keep_alive: -1` is shown as 292 years ahead.
_FOREVER_S = 20 * 365 * _DAY
#: C0, DEL and C1; the marks that order writing of both directions; two line ends.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: What JSON lets stand as it is, although it is a control character.
_ESCAPED = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}


def say(text: str = "") -> None:
    """Talk: one line on standard error."""
    print(text, file=sys.stderr, flush=True)


def done(text: str, *, out: TextIO | None = None) -> str:
    """text as something finished, in green on a terminal."""
    return _coloured(text, _GREEN, out)


def needs_you(text: str, *, out: TextIO | None = None) -> str:
    """text as something that waits for the reader, in yellow on a terminal."""
    return _coloured(text, _YELLOW, out)


def failed(text: str, *, out: TextIO | None = None) -> str:
    """text as something that went wrong, in red on a terminal."""
    return _coloured(text, _RED, out)


def quiet(text: str, *, out: TextIO | None = None) -> str:
    """text as an aside, in grey on a terminal."""
    return _coloured(text, _GREY, out)


def _coloured(text: str, code: str, out: TextIO | None) -> str:
    return f"{code}{text}{_RESET}" if (out or sys.stdout).isatty() else text


def error_text(message: str, advice: str = "") -> str:
    """`Error: …`, and below it what to do about it."""
    text = f"{failed('Error:', out=sys.stderr)} {plain(message)}"
    return f"{text}\n→ {plain(advice)}" if advice else text


def plain(text: str) -> str:
    """text from elsewhere (a hub, a model name) with its control characters replaced: it may neither move our cursor nor turn the
    line around, so that it reads as another name."""
    return _CONTROLS.sub("�", text)


def plain_text(text: str) -> str:
    """Text of several lines from elsewhere (a model's words) without its control characters: it is no command for a terminal."""
    return "".join(char for char in text if char in "\n\t" or not (char < " " or "\x7f" <= char <= "\x9f"))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, four spaces apart, every row followed by four spaces as in Ollama's own tables; ends in a newline."""
    head, *lines = columns([headings, *rows])
    # The heading's own padding ends in one space.
    return "\n".join([head[:-3], *lines]) + "\n"


def fitting_table(headings: Sequence[str], rows: Sequence[Sequence[str]], shorter: Sequence[Sequence[str]], *, width: int) -> str:
    """A table of rows, or of the same in fewer words where they are wider than width, which 0 leaves open."""
    full = table(headings, rows)
    widest = max(width_of(line.rstrip()) for line in full.splitlines())
    return table(headings, shorter) if 0 < width < widest else full


def terminal_width() -> int:
    """Columns of the terminal that standard output is; 0 where it is none, as a pipe gets everything."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return 0


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines, each column as wide as its widest cell and four spaces."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(width_of(cell) for cell in column) for column in zip(*cells, strict=True)]
    return ["".join(cell + " " * (width - width_of(cell) + 4) for cell, width in zip(row, widths, strict=True)) for row in cells]


def facts(pairs: Sequence[tuple[str, str]], *, indent: str = "") -> str:
    """`name  value` lines with the values in one column; ends in a newline."""
    width = max((len(name) for name, _ in pairs), default=0)
    return "".join(f"{indent}{name.ljust(width)}  {plain(value)}".rstrip() + "\n" for name, value in pairs)


def as_json(value: Any) -> str:
    """value as indented JSON with a newline, for `--json`, without a character that a terminal would obey."""
    return json.dumps(value, indent=2, ensure_ascii=False).translate(_ESCAPED) + "\n"


def size(count: int) -> str:
    """Bytes in powers of 1000: `999 B`, `1.5 KB`, `2.0 GB` → `2.0 GB`, `98 MB`. Source: ollama format/bytes.go HumanBytes."""
    for unit, divisor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= divisor:
            value = count / divisor
            if value >= 10:
                return f"{int(value)} {unit}"
            return f"{int(value)} {unit}" if value == int(value) else f"{value:.1f} {unit}"
    return f"{count} B"


def number(count: int) -> str:
    """A count of parameters: `1.5B`, `134.52M`, `7B`, `812K`. Source: ollama format/format.go HumanNumber."""
    for unit, divisor, digits in (("B", 10**9, 1), ("M", 10**6, 2)):
        if count >= divisor:
            value = count / divisor
            return f"{int(value)}{unit}" if value == int(value) else f"{value:.{digits}f}{unit}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)


def relative_time(when: datetime | None, now: datetime) -> str:
    """`3 minutes ago`, `4 minutes from now`, `Never`, `Forever`. Source: ollama format/time.go HumanTime."""
    if when is None or when.year <= 1:
        return "Never"
    delta = (now - when).total_seconds()
    if delta < -_FOREVER_S:
        return "Forever"
    return f"{_span(abs(delta))} {'ago' if delta >= 0 else 'from now'}"


def _span(seconds: float) -> str:
    whole = int(seconds)
    if whole < 1:
        return "Less than a second"
    if whole < _MINUTE:
        return "1 second" if whole == 1 else f"{whole} seconds"
    if whole < _HOUR:
        minutes = whole // _MINUTE
        return "About a minute" if minutes == 1 else f"{minutes} minutes"
    hours = round(seconds / _HOUR)
    if hours < 48:
        return "About an hour" if hours == 1 else f"{hours} hours"
    days = hours // 24
    if days < 14:
        return f"{days} days"
    if days < 60:
        return f"{days // 7} weeks"
    if days < 730:
        return f"{days // 30} months"
    return f"{days // 365} years"


def parse_time(text: str) -> datetime | None:
    """An RFC 3339 time of the API, with any number of fractional digits; None for the zero time and for what is no time."""
    if not text or text.startswith("0001-"):
        return None
    head, dot, rest = text.partition(".")
    if dot:
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        text = f"{head}.{digits[:6].ljust(6, '0')}{rest[len(digits) :]}"
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


class Progress(Protocol):
    """Reports how far a piece of work has come."""

    def __call__(self, completed: int, total: int) -> None:
        """completed, total: bytes."""
        ...


@contextlib.contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A bar that is redrawn in place on a terminal, and one line at the end elsewhere; on standard error. Work that turns out to
    be done already, so that the first report is the last, shows nothing."""
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        last = 0

        def show(completed: int, total: int) -> None:
            nonlocal bar, last
            if completed < total and sys.stderr.isatty() and bar is None:
                bar = stack.enter_context(_rich_bar(title))
            if completed < total or last:
                last = max(last, completed)
            if bar is not None:
                bar(completed, total)

        yield show
        if last and bar is None:
            say(f"{title}  {size(last)}")


@contextlib.contextmanager
def _rich_bar(title: str) -> Iterator[Progress]:
    # Imported here: a bar is rare, and importing rich takes longer than most commands.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(24), DownloadColumn(), TransferSpeedColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(title, total=None)

        def show(completed: int, total: int) -> None:
            bar.update(task, completed=completed, total=total)

        yield show
