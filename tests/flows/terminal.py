"""A terminal for a test: a command on a pseudo-terminal, keys for it, and what a person would see.

The screen understands what prompt_toolkit and our own output send, and nothing else: text, line ends, moves, erasing. It has no
lower end, so that all of a conversation stays readable.
"""

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from flows.stack import PATIENCE_S

COLUMNS, LINES = 80, 60
_SEQUENCE = re.compile(
    r"\x1b\[(?P<private>[?>=]?)(?P<numbers>[0-9;]*)(?P<end>[@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()][A-Z0-9]|\x1b[=>78]"
)
_UNFINISHED = re.compile(r"\x1b(?:\[[?>=]?[0-9;]*|\][^\x07\x1b]*\x1b?|[()])?\Z")


class Screen:
    """Rows of characters and a cursor."""

    def __init__(self, columns: int = COLUMNS) -> None:
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self._columns = columns
        self._pending = ""

    @property
    def text(self) -> str:
        """All rows, without blanks at their ends."""
        return "\n".join("".join(row).rstrip() for row in self.rows)

    def feed(self, text: str) -> None:
        text = self._pending + text
        unfinished = _UNFINISHED.search(text)
        self._pending = unfinished[0] if unfinished else ""
        text = text.removesuffix(self._pending) if self._pending else text
        at = 0
        while at < len(text):
            found = _SEQUENCE.match(text, at)
            if found:
                self._obey(found)
                at = found.end()
            else:
                self._put(text[at])
                at += 1

    def _put(self, char: str) -> None:
        match char:
            case "\n":
                self.row += 1
            case "\r":
                self.column = 0
            case "\b":
                self.column = max(0, self.column - 1)
            case "\x07":
                return
            case _:
                if self.column >= self._columns:
                    self.row, self.column = self.row + 1, 0
                width = 2 if unicodedata.east_asian_width(char) in "WF" else 1
                self._row()[self.column : self.column + width] = [char, *[""] * (width - 1)]
                self.column += width
        self._row()

    def _row(self) -> list[str]:
        while len(self.rows) <= self.row:
            self.rows.append([])
        row = self.rows[self.row]
        row.extend(" " * (self.column - len(row)))
        return row

    def _obey(self, found: re.Match[str]) -> None:
        if found["end"] is None or found["private"]:
            return
        numbers = [int(number) for number in found["numbers"].split(";") if number]
        count = numbers[0] if numbers else 1
        match found["end"]:
            case "A":
                self.row = max(0, self.row - count)
            case "B":
                self.row += count
            case "C":
                self.column = min(self._columns - 1, self.column + count)
            case "D":
                self.column = max(0, min(self.column, self._columns) - count)
            case "G":
                self.column = count - 1
            case "J" if not numbers or count == 0:
                del self._row()[self.column :]
                del self.rows[self.row + 1 :]
            case "K" if not numbers or count == 0:
                del self._row()[self.column :]
            case "K" if count == 2:
                self._row().clear()
            case "m" | "n" | "q":
                pass
            case _:
                raise AssertionError(f"this screen does not know {found[0]!r}")
        self._row()


class Terminal:
    """A command on a terminal of its own. Use it in a `with` block; what still runs at its end is ended."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str], cwd: Path) -> None:
        self.screen = Screen()
        self.raw = ""
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        # It has to be the terminal that controls the command, or Ctrl-C would reach nobody.
        self.process = subprocess.Popen(
            arguments, env=env, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lambda: os.login_tty(theirs)
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGHUP)
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)

    def keys(self, text: str) -> None:
        """Press keys; `\\r` is Enter."""
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str, *, after: int = 0) -> re.Match[str]:
        """The first match in what is on the screen, from that place in its text on, now or soon."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = re.compile(pattern).search(self.screen.text, after)
            if found:
                return found
            assert time.monotonic() < deadline, f"{pattern!r} did not come:\n{self.screen.text}"
            assert self._read(), f"{pattern!r} did not come before the command ended:\n{self.screen.text}"

    def prompt(self) -> None:
        """Wait until the cursor stands behind an empty prompt."""
        deadline = time.monotonic() + PATIENCE_S
        while not self._is_at_prompt():
            assert time.monotonic() < deadline, f"no prompt came:\n{self.screen.text}"
            assert self._read(), f"the command ended:\n{self.screen.text}"

    def _is_at_prompt(self) -> bool:
        line = "".join(self.screen.rows[self.screen.row]).rstrip()
        # Being there is not enough: while the editor is set up, keys would be taken by the plain terminal.
        is_reading = self.raw.rpartition("\x1b[?2004")[2].startswith("h")
        return is_reading and line in (">>> Send a message (/? for help)", ">>>") and self.screen.column == 4

    def say(self, text: str, *, wait: bool = True) -> str:
        """Type a line at the prompt. Returns what was shown until the next prompt."""
        self.prompt()
        return self.say_on(text, wait=wait)

    def say_on(self, text: str, *, wait: bool = True) -> str:
        """As say, where a line has been begun."""
        first = self.screen.row
        self.keys(text + "\r")
        if not wait:
            return ""
        self.moved(first)
        self.prompt()
        return "\n".join(self.screen.text.split("\n")[first : self.screen.row])

    def moved(self, row: int) -> None:
        """Wait until the cursor is below a row."""
        deadline = time.monotonic() + PATIENCE_S
        while self.screen.row <= row:
            assert time.monotonic() < deadline, f"nothing happened:\n{self.screen.text}"
            assert self._read(), f"the command ended:\n{self.screen.text}"

    def finish(self) -> int:
        """Its exit status, when it ends by itself."""
        while self._read():
            pass
        return self.process.wait(PATIENCE_S)

    def _read(self) -> bool:
        """Show what has come, waiting for it for a while; whether there can be more."""
        ready, _, _ = select.select([self._ours], [], [], 0.2)
        if not ready:
            return self.process.poll() is None
        with contextlib.suppress(OSError):  # how Linux tells that nobody has the other end any more
            data = os.read(self._ours, 65536)
            text = data.decode("utf-8", "replace")
            self.raw += text
            self.screen.feed(text)
            if "\x1b[6n" in text:  # where is the cursor? Ollama waits for an answer
                self.keys(f"\x1b[{min(self.screen.row, LINES - 1) + 1};{self.screen.column + 1}R")
            return bool(data)
        return False
