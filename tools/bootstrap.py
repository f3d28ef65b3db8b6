"""Makes `.venv` and installs a hash-pinned lock into it; run by the Makefile with any Python 3.11+, before anything is installed.

Usage: bootstrap.py run|dev|compat. `run` is what `make up` needs, `dev` what `make test` needs (a superset), `compat` builds the
environments of the unmodified clients in `.cache/`. Each leaves a stamp that names what it was made from, so the next run is a
file read. Only the standard library may be imported here.

uv installs, in seconds where pip takes a minute. pip fetches it, and takes its place where it fails: uv knows nothing of pip's
settings, so it may not find the way to an index that pip finds.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
LOCKS = {name: ROOT / f"requirements/{name}.lock" for name in ("uv", "run", "dev")}
COMPAT = ROOT / "tests/compat"


def main(what: str) -> int:
    """Bring one environment up to date. Returns the exit status."""
    try:
        if what == "compat":
            _compat()
        else:
            _project(what)
    except subprocess.CalledProcessError as error:
        print(
            f"\n{error.output or ''}\nError: {' '.join(map(str, error.cmd[:6]))} … failed\n→ the lines above say why",
            file=sys.stderr,
        )
        return 1
    return 0


def _project(what: str) -> None:
    made_from = _digest(LOCKS[what], ROOT / "pyproject.toml")
    # The dev lock holds everything of the run lock at the same versions, so `make up` after `make test` has nothing to do.
    wanted = {"run": ("run", "dev"), "dev": ("dev",)}[what]
    if any(_is_stamped(VENV / f".corral-{name}", _digest(LOCKS[name], ROOT / "pyproject.toml")) for name in wanted):
        return
    # The first start of a command shall not compile. Tests compile what they use while they wait, a third of what there is.
    _install(VENV, _locked(LOCKS[what]), title="installing", compiled=what == "run")
    # The build backend is in the lock; isolation would download an unpinned one.
    _install(VENV, ["--no-deps", "--no-build-isolation", "-e", str(ROOT)], title="installing corral")
    # Our own code would be compiled at every start where Python may not write beside it.
    _run([str(_python(VENV)), "-m", "compileall", "-q", str(ROOT / "src")])
    (VENV / f".corral-{what}").write_text(made_from)


def _compat() -> None:
    names = ("requirements.lock", "frameworks.lock", "package.json", "package-lock.json")
    lock, frameworks, package, package_lock = (COMPAT / name for name in names)
    made_from = _digest(lock, frameworks, package, package_lock)
    stamp = CACHE / "compat/.stamp"
    if _is_stamped(stamp, made_from):
        return
    _install(CACHE / "compat/venv", _locked(lock), title="unmodified clients")
    _install(CACHE / "compat/frameworks", _locked(frameworks), title="frameworks")
    if not shutil.which("npm"):
        print("npm is not installed: the tests of the npm client will be skipped", file=sys.stderr)
        return
    node = CACHE / "compat/node"
    node.mkdir(parents=True, exist_ok=True)
    for file in (package, package_lock):
        shutil.copy(file, node)
    _run(["npm", "ci", "--loglevel=error", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(node)])
    stamp.write_text(made_from)


def _install(venv: Path, arguments: list[str], *, title: str, compiled: bool = False) -> None:
    """By uv; where that fails by pip, whose words then say why. arguments: words that both understand."""
    _make_venv(venv)
    # The one compiles when it is told to, the other unless it is told not to.
    for_uv, for_pip = (["--compile-bytecode"], []) if compiled else ([], ["--no-compile"])
    try:
        _install_by_uv(venv, [*for_uv, *arguments], title=title)
    except (OSError, subprocess.CalledProcessError):
        _install_by_pip(venv, [*for_pip, *arguments], title=title)


def _install_by_uv(venv: Path, arguments: list[str], *, title: str) -> None:
    command = [str(_uv()), "pip", "install", "--python", str(_python(venv))]
    print(title, file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        subprocess.run([*command, *arguments], check=True)
    else:
        _run([*command, "-q", *arguments])


def _uv() -> Path:
    """The program, which pip fetches unless it is there."""
    venv, lock = CACHE / "uv", LOCKS["uv"]
    if not _is_stamped(venv / ".stamp", _digest(lock)):
        _make_venv(venv)
        # Where no wheel fits this machine, building one would take longer than pip takes for all the rest.
        _run(_pip(venv, ["install", "-q", "--no-compile", "--only-binary=:all:", *_locked(lock)]))
        (venv / ".stamp").write_text(_digest(lock))
    return _python(venv).with_name("uv")


def _install_by_pip(venv: Path, arguments: list[str], *, title: str) -> None:
    """Told as one line that is redrawn on a terminal and printed now and then elsewhere."""
    command = _pip(venv, ["install", "--progress-bar=off", *arguments])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    seen: list[str] = []
    with _one_line(title) as show:
        for line in process.stdout:
            seen.append(line)
            if match := re.match(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)", line):
                fetched = sum(1 for old in seen if old.startswith(("Collecting", "Requirement already")))
                show(f"{fetched} {match[1]}", fetched)
            elif line.startswith("Installing collected"):
                show("unpacking", 0)
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(seen[-15:]))


@contextlib.contextmanager
def _one_line(title: str) -> Iterator[Callable[[str, int], None]]:
    is_terminal = sys.stderr.isatty()

    def show(text: str, step: int) -> None:
        if is_terminal:
            print(f"\r\x1b[2K{title}  {text}", end="", file=sys.stderr, flush=True)
        elif step % 10 == 0:
            print(f"{title}  {text}", file=sys.stderr, flush=True)

    yield show
    if is_terminal:
        print(f"\r\x1b[2K{title}  done", file=sys.stderr)


def _make_venv(venv: Path) -> None:
    if _python(venv).exists() and _runs(_python(venv)):
        return
    print(f"creating {venv.relative_to(ROOT)} with Python {sys.version.split()[0]}", file=sys.stderr)
    shutil.rmtree(venv, ignore_errors=True)
    # An environment needs a pip of its own, which takes seconds to put there, only where this Python has none.
    options = ["--without-pip"] if importlib.util.find_spec("pip") else []
    _run([sys.executable, "-m", "venv", *options, str(venv)])


def _pip(venv: Path, arguments: list[str]) -> list[str]:
    quiet = ["--disable-pip-version-check", "--no-input"]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--python", str(_python(venv)), *quiet, *arguments]
    return [str(_python(venv)), "-m", "pip", *quiet, *arguments]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _runs(python: Path) -> bool:
    check = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    return subprocess.run(check, check=False, capture_output=True).returncode == 0


def _python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _locked(lock: Path) -> list[str]:
    return ["--require-hashes", "-r", str(lock)]


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _is_stamped(stamp: Path, made_from: str) -> bool:
    return stamp.exists() and stamp.read_text() == made_from


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
