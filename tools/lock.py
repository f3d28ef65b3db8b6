"""Renews the hash-pinned locks. Needs `uv` on the PATH; the locks it writes need only pip."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# No annotation, header or index: a lock that says the same on every machine shows only real changes in review.
COMMAND = ["uv", "pip", "compile", "--quiet", "--upgrade", "--universal", "--python-version=3.11"]
COMMAND += ["--generate-hashes", "--no-emit-index-url", "--no-header", "--no-annotate"]
LOCKS = (
    ("requirements/uv.lock", ["requirements/uv.in"]),
    ("requirements/run.lock", ["pyproject.toml", "requirements/build.in"]),
    ("requirements/dev.lock", ["-c", "requirements/run.lock", "pyproject.toml", "requirements/build.in", "requirements/dev.in"]),
    ("tests/compat/requirements.lock", ["tests/compat/requirements.in"]),
    ("tests/compat/frameworks.lock", ["tests/compat/frameworks.in"]),
)


def main() -> int:
    """Write every lock. Returns the exit status."""
    for output, sources in LOCKS:
        print(output, file=sys.stderr)
        subprocess.run([*COMMAND, *sources, "-o", output], check=True, cwd=ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
