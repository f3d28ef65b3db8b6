"""Completion: what is offered for a line, and whether bash offers it when somebody presses Tab."""

import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import corral
from corral.cli.app import run
from fakes_cli import FakeServer, fake_server

SOURCE = str(Path(corral.__file__).parent.parent)
TAGS = {"models": [{"name": "smollm2:135m"}, {"name": "smollm2:360m"}, {"name": "Qwen:1b"}]}
PATIENCE_S = 60.0


@pytest.fixture
def server() -> Iterator[FakeServer]:
    answers = {"GET /api/tags": (200, TAGS), "GET /api/ps": (200, {"models": [{"name": "qwen:1b"}]})}
    with fake_server(answers) as made:
        yield made


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["sh"], ["show"]),
        (["hub", "us"], ["user"]),
        (["hub", "user", "dis"], ["disable"]),
        (["show", "--l"], ["--license"]),
        (["show", "smol"], ["smollm2:135m", "smollm2:360m"]),
        (["show", "SMOLLM2:1"], ["smollm2:135m"]),
        (["show", "--modelfile", "q"], ["Qwen:1b"]),
        (["run", "q"], ["Qwen:1b"]),
        (["rm", "a", "b", "q"], ["Qwen:1b"]),
        (["cp", "q"], ["Qwen:1b"]),
        (["stop", ""], ["qwen:1b"]),
        (["ps", "s"], []),
        (["keys", "create", "ci", "--scope", ""], ["inference", "models:pull", "models:push", "keys"]),
        (["keys", "create", "ci", "--scope", "p"], ["pull", "push"]),
        (["keys", "create", "ci", "--scope", "m"], ["models:pull", "models:push"]),
        (["hub", "device", "scope", "alice", "box", "k"], ["keys"]),
        (["create", "m", "-f", ""], [":"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["doctor", ""], ["auth"]),
        (["show", "--nope", ""], ["smollm2:135m", "smollm2:360m", "Qwen:1b"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_last_word_is_completed(
    words: list[str], values: list[str], server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["__complete", "--", *words], {"HOME": "/nonexistent", "OLLAMA_HOST": server.host}) == 0
    captured = capsys.readouterr()
    assert [line.split("\t")[0] for line in captured.out.splitlines()] == values
    assert captured.err == ""


def test_t096_name_that_a_shell_would_run_is_not_completed(capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "good:1b",
        "hf.co/a/b-c_d:Q4_K_M",
        "$(id)",
        "a`id`",
        "a;id",
        "a b",
        "a\n:",
        "a\tb",
        "-x",
        "a\x1b]0;t\x07",
        "a'b",
        "~/x",
    ]
    answers = {"GET /api/tags": (200, {"models": [{"name": name} for name in names]})}
    with fake_server(answers) as server:
        assert run(["__complete", "--", "run", ""], {"HOME": "/nonexistent", "OLLAMA_HOST": server.host}) == 0
    assert capsys.readouterr().out == "good:1b\t\nhf.co/a/b-c_d:Q4_K_M\t\n"


def test_names_are_not_completed_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("127.0.0.1:9", "no:such:host"):
        assert run(["__complete", "--", "show", ""], {"HOME": "/nonexistent", "OLLAMA_HOST": host}) == 0
    assert capsys.readouterr() == ("", "")


def test_what_completion_calls_is_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--help"], {})
    assert "__complete" not in capsys.readouterr().out


# ── In a shell ───────────────────────────────────────────────────────────────────────────────────────────────────────


def environment(folder: Path, server: FakeServer) -> dict[str, str]:
    """Where `corral` is a program on the PATH, as somebody has it who installed it."""
    program = folder / "corral"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m corral "$@"\n')
    program.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(folder), "PYTHONPATH": SOURCE, "OLLAMA_HOST": server.host, "PS1": "$ ", "TERM": "dumb"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("corral sh\t", "corral show "),
        ("corral show smollm2:1\t", "corral show smollm2:135m "),
        ("corral show Q\t", "corral show Qwen:1b "),
        ("corral show --lic\t", "corral show --license "),
        ("corral create x -f Model\t", "corral create x -f Modelfile "),
    ],
)
def test_bash_completes_when_tab_is_pressed(typed: str, becomes: str, server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text("FROM x\n")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execve(shutil.which("bash") or "", ["bash", "--norc", "--noprofile", "-i"], environment(tmp_path, server))
    try:
        read_until(terminal, "$ ")
        os.write(terminal, b"source <(corral completion bash); echo is-$((40+2))\n")
        read_until(terminal, "is-42\r\n$ ")
        os.write(terminal, typed.encode())
        read_until(terminal, becomes)
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def read_until(terminal: int, text: str) -> None:
    """Read what the terminal shows until it shows that."""
    shown, deadline = "", time.monotonic() + PATIENCE_S
    os.set_blocking(terminal, False)
    while text not in shown:
        assert time.monotonic() < deadline, f"{text!r} was not shown: {shown!r}"
        try:
            shown += os.read(terminal, 4096).decode()
        except BlockingIOError:
            time.sleep(0.02)  # a terminal cannot be waited for together with a deadline in one call that every system has


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_of_every_shell_can_be_read_by_it(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["completion", shell], {}) == 0
    script = capsys.readouterr().out
    assert "__complete -- " in script
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    (tmp_path / "script").write_text(script)
    assert subprocess.run([shell, "-n", str(tmp_path / "script")], check=False).returncode == 0
