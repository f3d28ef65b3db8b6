"""The command itself: what it imports, its exit status, and what becomes of errors."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import corral
from corral.cli.app import LazyGroup, root, run
from corral.wire.errors import CorralError
from tooling import tool_module

SOURCE = str(Path(corral.__file__).parent.parent)


def process(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A real `python -m corral`."""
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": SOURCE, **environ}
    return subprocess.run(
        [sys.executable, "-m", "corral", *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )


#: What a command that asks the local server one thing has no use for; each costs more than the whole of `corral --version` may.
HEAVY = (
    "aiohttp",
    "sqlalchemy",
    "rich",
    "starlette",
    "uvicorn",
    "httptools",
    "msgspec",
    "prompt_toolkit",
    "nacl",
    "jinja2",
    "uvloop",
    "numpy",
)
NO_SERVER = "127.0.0.1:9"


def modules_after(*statements: str) -> set[str]:
    """What an interpreter of its own has imported after those statements."""
    code = "; ".join(["import sys", *statements, "print(*sys.modules, file=sys.stderr)"])
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": SOURCE, "HOME": "/nonexistent", "OLLAMA_HOST": NO_SERVER}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def run_statement(*arguments: str) -> str:
    return f"from corral.cli.app import run; run({list(arguments)}, {{'HOME': '/x', 'OLLAMA_HOST': '{NO_SERVER}'}})"


@pytest.mark.parametrize(
    ("statements", "unneeded"),
    [
        # P13: `--version` costs at most six times an empty Python, `list` at most 1.2 times what importing aiohttp does.
        (
            ("from corral.cli import entry", "entry.begin(['--version'], {'HOME': '/x', 'OLLAMA_HOST': '127.0.0.1:9'})"),
            (*HEAVY, "asyncio", "click", "http.client", "ssl", "email", "corral.cli.api"),
        ),
        (
            (run_statement("--help"),),
            (*HEAVY, "asyncio", "http.client", "socket", "corral.settings", "corral.cli.commands_models"),
        ),
        ((run_statement("list"),), (*HEAVY, "asyncio", "corral.main", "corral.hub", "corral.wire.native")),
        ((run_statement("ps"),), (*HEAVY, "asyncio")),
        ((run_statement("show", "x"),), (*HEAVY, "asyncio")),
        ((run_statement("stop", "x"),), (*HEAVY, "asyncio")),
        ((run_statement("cp", "a", "b"),), (*HEAVY, "asyncio")),
        ((run_statement("rm", "a"),), (*HEAVY, "asyncio")),
        ((run_statement("pull", "a"),), (*HEAVY, "asyncio")),
        ((run_statement("__complete", "--", "show", ""),), (*HEAVY, "asyncio")),
    ],
    ids=("--version", "--help", "list", "ps", "show", "stop", "cp", "rm", "pull", "Tab"),
)
def test_command_imports_nothing_that_it_does_not_need(statements: tuple[str, ...], unneeded: tuple[str, ...]) -> None:
    assert set(unneeded) & modules_after(*statements) == set()


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize("path", commands(root), ids=" ".join)
def test_every_command_of_the_table_exists_and_has_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path, "--help"], {}) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: corral {' '.join(path)}")
    assert len(out.split("\n\n")[1].strip()) > 10


@pytest.mark.parametrize(("alias", "name"), [("login", "signin"), ("logout", "signout"), ("ls", "list"), ("start", "serve")])
def test_aliases_are_understood_and_not_listed(alias: str, name: str) -> None:
    assert isinstance(root, LazyGroup)
    context = click.Context(root)
    assert root.get_command(context, alias) is root.get_command(context, name)
    assert alias not in root.list_commands(context)


def test_unbuilt_commands_are_not_listed() -> None:
    assert "install" not in root.list_commands(click.Context(root))


def test_group_without_a_command_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([], {}) == 0
    assert run(["hub", "user"], {}) == 0
    assert "Commands:" in capsys.readouterr().out


def test_bad_setting_is_status_2_and_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"], {"HOME": "/x", "OLLAMA_MAX_QUEUE": "many"}) == 2
    assert capsys.readouterr().err == "Error: OLLAMA_MAX_QUEUE is 'many'; it takes a whole number, 0 or more\n"


def test_failure_in_a_task_group_is_told_as_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two hubs that start at the same moment both find the port free. The second learns of it among its tasks.
    refused = CorralError("conflict", "something already listens on 127.0.0.1:1")

    def fail(ctx: click.Context, cmd_name: str) -> click.Command:
        def serve() -> None:
            raise ExceptionGroup("tasks", [ExceptionGroup("tasks", [refused])])

        return click.Command(cmd_name, callback=serve)

    # No command can be made to fail there without a race, so one that does stands in.
    monkeypatch.setattr(root, "get_command", fail)
    assert run(["serve"], {}) == 1
    assert capsys.readouterr().err == "Error: something already listens on 127.0.0.1:1\n"


def test_python_m_corral_is_the_command() -> None:
    done = process("completion", "fish")
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete -c corral" in done.stdout


@pytest.mark.parametrize("path", [(), *commands(root)], ids=" ".join)
def test_help_of_every_command_fits_a_screen(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # what click takes the terminal's width from
    assert run([*path, "--help"], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24, "the prompt that follows takes a line"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("path", commands(root), ids=" ".join)
def test_help_lists_variables_that_settings_read(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    run([*path, "--help"], {})
    _, _, listed = capsys.readouterr().out.partition("\nEnvironment Variables:\n")
    names = [line.split()[0] for line in listed.splitlines()]
    assert set(names) <= tool_module("make_reference").variables()
    is_group = any(longer[:-1] == path for longer in commands(root))
    is_without = path[0] in ("completion",) or is_group
    assert bool(names) is not is_without


def test_reader_that_leaves_early_is_no_error() -> None:
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": SOURCE}
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "corral", "--help"], env=env, stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 0
    assert done.stderr == ""


def test_secrets_are_no_options_of_any_command() -> None:
    for path in commands(root):
        command: click.Command | None = root
        for name in path:
            assert isinstance(command, click.Group)
            command = command.get_command(click.Context(command), name)
        assert command is not None
        spellings = {spelling for option in command.params for spelling in option.opts}
        assert not {"--password", "--api-key", "--token", "--secret"} & spellings, path


@pytest.mark.parametrize(("arguments", "same"), [(["help"], ["--help"]), (["help", "hub", "user"], ["hub", "user", "--help"])])
def test_help_command_is_the_help_option(arguments: list[str], same: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments, {}) == 0
    shown = capsys.readouterr().out
    assert run(same, {}) == 0
    assert shown == capsys.readouterr().out
