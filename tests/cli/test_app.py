"""The command itself: what it imports, its exit status, and what becomes of errors."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import corral
from corral.cli.app import LazyGroup, root, run

SOURCE = str(Path(corral.__file__).parent.parent)


def process(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A real `python -m corral`."""
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": SOURCE, **environ}
    return subprocess.run(
        [sys.executable, "-m", "corral", *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_version_and_help_import_nothing_heavy() -> None:
    code = "import sys; from corral.cli.app import run; run(['--version'], {}); run(['--help'], {}); print(*sys.modules)"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": SOURCE}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    heavy = {
        "aiohttp",
        "sqlalchemy",
        "rich",
        "starlette",
        "granian",
        "msgspec",
        "prompt_toolkit",
        "nacl",
        "asyncio",
        "corral.settings",
    }
    assert heavy & loaded == set()
    assert "corral version" in done.stdout


def test_list_imports_no_asynchronous_client() -> None:
    code = "import sys; from corral.cli.app import run; run(['list'], {'OLLAMA_HOST': '127.0.0.1:9'}); print(*sys.modules)"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": SOURCE}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    heavy = {"aiohttp", "sqlalchemy", "rich", "starlette", "granian", "msgspec", "prompt_toolkit", "nacl"}
    assert heavy & set(done.stdout.split()) == set()


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
    assert not {"doctor", "install"} & set(root.list_commands(click.Context(root)))


@pytest.mark.parametrize("arguments", [["nope"], ["list", "--nope"], ["show"], ["hub", "nope"], ["stop", "a", "b"]])
def test_wrong_usage_is_status_2_with_an_arrow(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments, {}) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ")
    assert "\n→ corral" in err


def test_group_without_a_command_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([], {}) == 0
    assert run(["hub", "user"], {}) == 0
    assert "Commands:" in capsys.readouterr().out


def test_bad_setting_is_status_2_and_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"], {"HOME": "/x", "OLLAMA_MAX_QUEUE": "many"}) == 2
    assert capsys.readouterr().err == "Error: OLLAMA_MAX_QUEUE is 'many'; it takes a whole number, 0 or more\n"


def test_python_m_corral_is_the_command() -> None:
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"corral version {corral.__version__}\n")


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
