"""Running a client's script in the client's own environment and reading what it reports."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Runs a client script: (script, base URL, model, key) -> its report.
Client = Callable[[str, str, str, str], dict[str, Any]]


def report_by(command: list[str], env: dict[str, str], folder: Path) -> dict[str, Any]:
    base = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    done = subprocess.run(command, env={**base, **env}, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report
