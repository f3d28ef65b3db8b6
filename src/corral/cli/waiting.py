"""A sign of life while nothing has come yet: something that turns on standard error, on a terminal only."""

import itertools
import sys
import threading
from types import TracebackType
from typing import Self

TURNS = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_TURN_EVERY_S = 0.1
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
_CLEAR = "\r\x1b[K"


class Waiting:
    """Turns from the beginning of a `with` block to its end, or to `stop`, and leaves the line empty. An answer that comes at
    once is not preceded by a flicker."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._turn, daemon=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Make room for what comes; once is enough."""
        if self._thread and not self._is_over.is_set():
            self._is_over.set()
            self._thread.join()

    def _turn(self) -> None:
        is_shown = False
        for char in itertools.cycle(TURNS):
            if self._is_over.wait(_TURN_EVERY_S):
                break
            sys.stderr.write(f"{'' if is_shown else HIDE}\r{char} ")
            sys.stderr.flush()
            is_shown = True
        if is_shown:
            sys.stderr.write(_CLEAR + SHOW)
            sys.stderr.flush()
