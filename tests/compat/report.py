"""A client's script as a running process: it imports its package while the servers start, then does one job after the other."""

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: How long one job may take before its process is ended: minutes, where the machine is busy with other work.
PATIENCE_S = 300.0


class Client:
    """One script in its own environment. Close it."""

    def __init__(self, command: Sequence[str], folder: Path, **env: str) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        base = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(folder)}
        self._process = subprocess.Popen(
            command, env={**base, **env}, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )

    def report(self, url: str, model: str, key: str = "", **more: Any) -> dict[str, Any]:
        """What its checks saw at a server: check -> result. Fails with the process's last words when it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limit = threading.Timer(PATIENCE_S, self._process.kill)
        limit.start()
        try:
            self._process.stdin.write(json.dumps({"url": url, "model": model, "key": key, **more}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        assert line, f"{self._process.args!r} ended:\n{self.last_words()}"
        report: dict[str, Any] = json.loads(line)
        return report

    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        self._said.seek(0)
        return self._said.read()[-4000:].decode(errors="replace")

    def close(self) -> None:
        """End it: it has nothing to tidy up."""
        self._process.kill()
        self._process.communicate()
        self._said.close()
