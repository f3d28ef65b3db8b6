"""Makes `.venv` and installs a hash-pinned lock into it; run by the Makefile with any Python 3.11+, before anything is installed.

Usage: bootstrap.py run|dev|compat. `run` is what `make up` needs, `dev` what `make test` needs (a superset), `compat` builds the
environments of the unmodified clients in `.cache/`. Each leaves a stamp that names what it was made from, so the next run is a
file read. Only the standard library may be imported here.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
LOCKS = {"run": ROOT / "requirements/run.lock", "dev": ROOT / "requirements/dev.lock"}
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
    _make_venv(VENV)
    _install(VENV, ["--require-hashes", "-r", str(LOCKS[what])], title="installing", total=_count(LOCKS[what]))
    # The build backend is in the lock; isolation would download an unpinned one.
    _run(_pip(VENV, ["install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]))
    # pip compiles what it installs; our own code would be compiled at every start where Python may not write beside it.
    _run([str(_python(VENV)), "-m", "compileall", "-q", str(ROOT / "src")])
    (VENV / f".corral-{what}").write_text(made_from)


def _compat() -> None:
    names = ("requirements.lock", "frameworks.lock", "package.json", "package-lock.json")
    lock, frameworks, package, package_lock = (COMPAT / name for name in names)
    made_from = _digest(lock, frameworks, package, package_lock)
    stamp = CACHE / "compat/.stamp"
    if _is_stamped(stamp, made_from):
        return
    venv, node = CACHE / "compat/venv", CACHE / "compat/node"
    _make_venv(venv)
    # Each client is imported once or twice, and most of its modules never: Python compiles what is.
    _install(venv, ["--no-compile", "--require-hashes", "-r", str(lock)], title="unmodified clients", total=_count(lock))
    _install_frameworks(CACHE / "compat/frameworks", frameworks, uv=_python(venv).with_name("uv"))
    if not shutil.which("npm"):
        print("npm is not installed: the tests of the npm client will be skipped", file=sys.stderr)
        return
    node.mkdir(parents=True, exist_ok=True)
    for file in (package, package_lock):
        shutil.copy(file, node)
    _run(["npm", "ci", "--loglevel=error", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(node)])
    stamp.write_text(made_from)


def _install_frameworks(venv: Path, lock: Path, *, uv: Path) -> None:
    """More than a hundred packages, which take pip a minute and uv, where it finds its way to the index, seconds."""
    _make_venv(venv)
    command = [str(uv), "pip", "install", "-q", "--python", str(_python(venv)), "--require-hashes", "-r", str(lock)]
    try:
        _run(command)
    except (OSError, subprocess.CalledProcessError):
        _install(venv, ["--no-compile", "--require-hashes", "-r", str(lock)], title="frameworks", total=_count(lock))


def _make_venv(venv: Path) -> None:
    if _python(venv).exists() and _runs(_python(venv)):
        return
    print(f"creating {venv.relative_to(ROOT)} with Python {sys.version.split()[0]}", file=sys.stderr)
    shutil.rmtree(venv, ignore_errors=True)
    # Debian ships ensurepip apart from Python; pip itself can install into an environment that has none.
    options = [] if importlib.util.find_spec("ensurepip") else ["--without-pip"]
    _run([sys.executable, "-m", "venv", *options, str(venv)])


def _pip(venv: Path, arguments: list[str]) -> list[str]:
    quiet = ["--disable-pip-version-check", "--no-input"]
    if importlib.util.find_spec("ensurepip"):
        return [str(_python(venv)), "-m", "pip", *quiet, *arguments]
    return [sys.executable, "-m", "pip", "--python", str(_python(venv)), *quiet, *arguments]


def _install(venv: Path, arguments: list[str], *, title: str, total: int) -> None:
    """pip install, told as one line that is redrawn on a terminal and printed now and then elsewhere."""
    command = _pip(venv, ["install", "--progress-bar=off", *arguments])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    seen: list[str] = []
    with _one_line(title) as show:
        for line in process.stdout:
            seen.append(line)
            if match := re.match(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)", line):
                fetched = sum(1 for old in seen if old.startswith(("Collecting", "Requirement already")))
                show(f"{min(fetched, total)}/{total} {match[1]}", fetched)
            elif line.startswith("Installing collected"):
                show("unpacking", 0)
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(seen[-15:]))


@contextlib.contextmanager
def _one_line(title: str) -> Iterator[object]:
    is_terminal = sys.stderr.isatty()

    def show(text: str, step: int) -> None:
        if is_terminal:
            print(f"\r\x1b[2K{title}  {text}", end="", file=sys.stderr, flush=True)
        elif step % 10 == 0:
            print(f"{title}  {text}", file=sys.stderr, flush=True)

    yield show
    if is_terminal:
        print(f"\r\x1b[2K{title}  done", file=sys.stderr)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _runs(python: Path) -> bool:
    check = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    return subprocess.run(check, check=False, capture_output=True).returncode == 0


def _python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _count(lock: Path) -> int:
    return len(re.findall(r"^[\w.-]+==", lock.read_text(), flags=re.MULTILINE))


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _is_stamped(stamp: Path, made_from: str) -> bool:
    return stamp.exists() and stamp.read_text() == made_from


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
