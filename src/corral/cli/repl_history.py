"""What was asked before: Ollama's history file, one question a line, the newest last.

A file that cannot be read or written costs the history and nothing else. Every write begins with what the file holds by then, so
that two conversations at a time do not take each other's questions away.
Source: ollama readline/history.go, fb30760.
"""

import contextlib
import os
import tempfile
from pathlib import Path

KEPT = 100


class HistoryFile:
    """is_kept: whether questions are written down; what is there can be recalled either way."""

    def __init__(self, path: Path, *, is_kept: bool) -> None:
        self._path = path
        self.is_kept = is_kept

    def questions(self) -> list[str]:
        """The oldest first."""
        try:
            lines = self._path.read_text("utf-8", "replace").splitlines()
        except OSError:
            return []
        return [line.strip() for line in lines if line.strip()][-KEPT:]

    def add(self, question: str) -> None:
        """Write one down. A question of several lines would come back as several, so it is not kept."""
        if not self.is_kept or "\n" in question or not question.strip():
            return
        with contextlib.suppress(OSError):
            # The device key will lie there as well.
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            self._replace("".join(f"{line}\n" for line in [*self.questions(), question][-KEPT:]))

    def _replace(self, text: str) -> None:
        # mkstemp gives 0600: what was asked is for nobody else to read. A reader sees the old file or the new one.
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=".history-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            Path(name).replace(self._path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
