"""The `corral` command without the second that Python takes to read the program: one process has read it, each command is a copy.

What runs is the program's own entry in a process of its own, with its own directory, environment, streams and exit status. Only
reading modules is not repeated, and as they import each other without cycles (tests/test_rooms.py) the order in which they were
read cannot matter. What a cold start shows (servers, what a signal ends, the console script) is for `Stack.begin`.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory

import corral

_STREAMS = ("stdin", "stdout", "stderr")
#: Not read beforehand: what runs when it is imported, and packages, which their modules bring along.
_NOT_MODULES = {"__main__", "llama_child", "migrations", "__init__"}


def run(
    arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, given: str, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """A command's exit status and output. given: its standard input."""
    with TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in _STREAMS]
        for stream in streams:
            stream.touch()
        streams[0].write_text(given, encoding="utf-8")
        process = _context().Process(target=_become, args=(list(arguments), dict(env), cwd, streams))
        process.start()
        process.join(timeout_s)
        is_stuck = process.exitcode is None
        process.kill()
        process.join()
        status = process.exitcode
        process.close()
        stdout, stderr = (stream.read_text(encoding="utf-8") for stream in streams[1:])
    assert not is_stuck, f"corral {' '.join(arguments)} did not end within {timeout_s:.0f} s:\n{stdout}\n{stderr}"
    assert status is not None
    return subprocess.CompletedProcess(["corral", *arguments], status, stdout, stderr)


@cache
def _context() -> ForkServerContext:
    """The process that has read the program: started by the first command, ended with the tests."""
    context = multiprocessing.get_context("forkserver")
    root = Path(corral.__path__[0])
    paths = [path.relative_to(root).with_suffix("") for path in sorted(root.rglob("*.py"))]
    context.set_forkserver_preload([".".join(("corral", *path.parts)) for path in paths if _NOT_MODULES.isdisjoint(path.parts)])
    return context


def _become(arguments: list[str], env: dict[str, str], cwd: Path, streams: list[Path]) -> None:
    """Be a command from here on, in a process that was made for it."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, stream in enumerate(streams):
        opened = os.open(stream, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = ["corral", *arguments]

    from corral.cli.entry import main

    main()
