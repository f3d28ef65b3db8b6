"""tools/find_python: which interpreter `make` takes."""

import os
import subprocess
import sys

from tooling import TOOLS


def found(**environ: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    return subprocess.run([TOOLS / "find_python", "up"], capture_output=True, text=True, env=kept | environ, check=False)


def test_find_python_of_one_that_is_named_gives_that_one() -> None:
    assert found(PYTHON=sys.executable).stdout.strip() == sys.executable


def test_find_python_of_one_that_is_not_there_names_it_and_takes_no_other() -> None:
    answer = found(PYTHON="/nosuch")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "PYTHON=/nosuch" in answer.stderr
    assert "make up PYTHON=" in answer.stderr
