"""The README's own commands, word for word but for the ports, given to a shell."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.stack import BRIEF, MODEL, Stack, corral_command

README = Path(__file__).resolve().parents[2] / "README.md"


def shown(stack: Stack) -> list[str]:
    """The commands of the six steps, in order, for this installation's ports; the export of the path and `make` aside."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    text = text.replace("http://localhost:11434", stack.local_url).replace("http://localhost:11435", stack.hub_url)
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("make ", "export "))]


def typed(stack: Stack, line: str, **environment: str) -> str:
    """What a shell prints for one command; `corral` is the one under test."""
    folder = stack.home.parent / "bin"
    folder.mkdir(exist_ok=True)
    script = folder / "corral"
    script.write_text(f'#!/bin/sh\nexec {" ".join(corral_command())} "$@"\n')
    script.chmod(0o755)
    env = {**stack.env, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    done = subprocess.run(["bash", "-c", line], env=env, cwd=stack.home, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def as_make_up_does() -> list[str]:
    """What the Makefile gives `corral up`, but for the file."""
    line = next(
        line for line in (README.parent / "Makefile").read_text().splitlines() if "corral up" in line and "--model" in line
    )
    return shlex.split(line.partition("$(MODEL)")[2])


@pytest.fixture
def newcomer(tmp_path: Path, small_model: Path) -> Iterator[Stack]:
    """What `make up` starts, but for answers of fewer words, and the administrator alice."""
    with Stack(tmp_path) as stack:
        stack.start("--model", f"{MODEL}={small_model}", *as_make_up_does(), *BRIEF)
        stack.add_account("alice")
        yield stack


def test_readme_steps_do_what_they_say(newcomer: Stack) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    here, there, signin, run, with_key, signout = shown(newcomer)
    assert json.loads(typed(newcomer, here).splitlines()[-1])["done"] is True
    refused = json.loads(typed(newcomer, there))
    assert refused["error"] == "unauthorized"
    assert refused["signin_url"].startswith(f"{newcomer.hub_url}/connect?name=")
    assert signin == "corral signin"
    key = newcomer.sign_in()
    assert json.loads(typed(newcomer, there).splitlines()[-1])["done"] is True
    assert typed(newcomer, run).strip()
    assert json.loads(typed(newcomer, with_key, OLLAMA_API_KEY=key))["response"]
    typed(newcomer, signout)
    assert json.loads(typed(newcomer, there))["error"] == "unauthorized"
