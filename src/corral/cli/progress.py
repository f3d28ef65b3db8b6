"""What a pull or push shows while it runs: on a terminal a bar for each blob, redrawn in place; elsewhere one line for each thing
that is done, without escape codes. All of it on standard error.

The bars' measures are Ollama's (ollama-surface 5.6): the title, how much in percent, a bar as wide as the terminal allows, bytes
of bytes, bytes a second, and the time that is left. Source: ollama progress/{bar,progress}.go, fb30760.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self, TextIO

from corral.cli import render
from corral.cli.waiting import HIDE, SHOW, TURNS

_REDRAW_EVERY_S: Final = 0.1
#: How far back speed is measured, and how often it is noted.
_SPEED_OVER, _SPEED_EVERY_S = 10, 1.0
_NARROWEST_BAR = 4
_UP, _CLEAR = "\x1b[A", "\r\x1b[2K"


@dataclass(slots=True)
class Bar:
    """One blob. started_s, and every time it is told of: seconds of one steady clock."""

    title: str
    total: int
    completed: int
    started_s: float
    #: (when, how much was there), the oldest first.
    notes: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_SPEED_OVER))

    def __post_init__(self) -> None:
        self.notes.append((self.started_s, self.completed))

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing."""
        return self.completed >= self.total

    def update(self, completed: int, now_s: float) -> None:
        """What is there now; never more than all."""
        self.completed = min(completed, self.total)
        if now_s - self.notes[-1][0] >= _SPEED_EVERY_S:
            self.notes.append((now_s, self.completed))

    def speed(self, now_s: float) -> float:
        """Bytes a second of late; 0 while nobody can say."""
        then_s, then = self.notes[0]
        passed_s = now_s - then_s
        return max(0.0, (self.completed - then) / passed_s) if passed_s >= _SPEED_EVERY_S else 0.0

    def line(self, width: int, now_s: float) -> str:
        """The bar in that many columns."""
        percent = self.completed / self.total * 100 if self.total else 100.0
        before, behind = f"{self.title} {percent:3.0f}%", self._figures(now_s)
        room = width - len(before) - len(behind) - 4
        if room < _NARROWEST_BAR:
            return f"{before}  {behind.strip()}"[:width]
        filled = int(room * percent / 100)
        return f"{before} ▕{'█' * filled}{' ' * (room - filled)}▏ {behind}"

    def _figures(self, now_s: float) -> str:
        if self.is_done:
            return render.size(self.total).rjust(6) + " " * 25
        figures = f"{render.size(self.completed):>6}/{render.size(self.total):>6}"
        speed = self.speed(now_s)
        if speed <= 0:
            return figures + " " * 18
        left = time_left((self.total - self.completed) / speed)
        return f"{figures}  {render.size(int(speed)):>6}/s  {left:>6}"


def time_left(seconds: float) -> str:
    """`8s`, `2m5s`, `1h20m`, `99h+`."""
    whole = round(seconds)
    if whole >= 100 * 3600:
        return "99h+"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60}m"
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"


class TransferView:
    """Shows the events of one pull, push or create; use it in a `with` block. verb: `pulling` or `pushing`; where it is empty, a
    bar is called what its event says. monotonic: a steady clock in seconds."""

    def __init__(self, verb: str, *, monotonic: Callable[[], float], out: TextIO | None = None) -> None:
        self._verb = verb
        self._monotonic = monotonic
        self._out = out or sys.stderr
        self._is_terminal = self._out.isatty()
        #: Statuses as they are, bars by their digest; in the order of their first event.
        self._rows: dict[str, Bar | str] = {}
        self._drawn = 0
        #: Guards the rows and the terminal: a thread redraws them while no event comes.
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._redrawing: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._out.write(HIDE)
            self._redrawing = threading.Thread(target=self._redraw, daemon=True)
            self._redrawing.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._redrawing is None:
            return
        self._is_over.set()
        self._redrawing.join()
        with self._lock:
            self._draw()
            self._out.write(SHOW)
            self._out.flush()

    def _redraw(self) -> None:
        while not self._is_over.wait(_REDRAW_EVERY_S):
            with self._lock:
                self._draw()

    def show(self, event: Mapping[str, Any]) -> None:
        """One event of the server."""
        digest, status = str(event.get("digest") or ""), render.plain(str(event.get("status") or ""))
        with self._lock:
            is_new = self._blob(digest, event) if digest else self._status(status)
            if is_new and self._is_terminal:
                self._draw()

    def forget(self) -> None:
        """Take what is on the terminal away, for somebody who goes on with something else; also after the block."""
        if self._is_terminal:
            with self._lock:
                self._out.write((_CLEAR + _UP) * self._drawn + _CLEAR)
                self._rows.clear()
                self._drawn = 0

    def _status(self, status: str) -> bool:
        if not status or status in self._rows:
            return False
        self._rows[status] = status
        if not self._is_terminal:
            self._say(status)
        return True

    def _blob(self, digest: str, event: Mapping[str, Any]) -> bool:
        total, completed = _count(event.get("total")), _count(event.get("completed"))
        bar = self._rows.get(digest)
        if isinstance(bar, Bar):
            was_done = bar.is_done
            bar.update(completed, self._monotonic())
            if not self._is_terminal and bar.is_done and not was_done:
                self._say_done(bar)
            return bar.is_done and not was_done
        # Of one that is only announced, nothing is shown yet, as in ollama.
        if not completed and total:
            return False
        shown = f"{self._verb} {digest.removeprefix('sha256:')[:12]}" if self._verb else str(event.get("status") or "")
        # Ollama's pulls have a colon there, its pushes none.
        bar = Bar(f"{render.plain(shown)}{':' if self._verb == 'pulling' else ''}", total, completed, self._monotonic())
        self._rows[digest] = bar
        if not self._is_terminal and bar.is_done:
            self._say_done(bar)
        return True

    def _say_done(self, bar: Bar) -> None:
        self._say(f"{bar.title.removesuffix(':')}: {render.size(bar.total)}")

    def _say(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()

    def _size(self) -> os.terminal_size:
        # Asked of standard error: standard output may be a file. A terminal that nobody told its size says 0.
        try:
            found = os.get_terminal_size(self._out.fileno())
        except OSError:
            found = os.terminal_size((0, 0))
        return os.terminal_size((found.columns or 80, found.lines or 24))

    def _draw(self) -> None:
        size = self._size()
        now_s = self._monotonic()
        lines = [
            row.line(size.columns - 1, now_s) if isinstance(row, Bar) else row[: size.columns - 3] for row in self._rows.values()
        ]
        if lines and not self._is_over.is_set() and not isinstance(list(self._rows.values())[-1], Bar):
            lines[-1] += f" {TURNS[int(now_s / _REDRAW_EVERY_S) % len(TURNS)]}"
        # What has scrolled out cannot be redrawn.
        lines = lines[-(size.lines - 1) :]
        self._out.write(_UP * self._drawn + "".join(f"{_CLEAR}{line}\n" for line in lines))
        self._out.flush()
        self._drawn = len(lines)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def follow(events: Iterable[Mapping[str, Any]], view: TransferView) -> bool:
    """Show all events; whether the last one told of success."""
    with view:
        return show_all(events, view)


def show_all(events: Iterable[Mapping[str, Any]], view: TransferView) -> bool:
    """As `follow`, in a view that is open already."""
    last = ""
    for event in events:
        view.show(event)
        last = str(event.get("status") or "")
    return last == "success"
