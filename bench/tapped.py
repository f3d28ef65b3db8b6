"""Runs a corral server as it is, and notes where its engines listen and what secret they were started with.

`python -m bench.tapped FILE serve`. P1 to P4 ask the very engine process that the server uses. Its secret is told to nobody
else, so the bench listens where it is made. FILE holds one JSON object per engine, the newest last, readable by its owner alone.
"""

import json
import os
import sys
from typing import Any

from corral.cli.app import run
from corral.engines.llamacpp import LlamaRunner


def main(file: str, arguments: list[str]) -> int:
    """The server's exit status."""
    make = LlamaRunner.__init__

    def noting(runner: LlamaRunner, process: Any, url: str, key: Any, *rest: Any, **named: Any) -> None:
        make(runner, process, url, key, *rest, **named)
        with os.fdopen(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "w") as notes:
            notes.write(json.dumps({"pid": process.pid, "url": url, "key": key.reveal()}) + "\n")

    LlamaRunner.__init__ = noting  # type: ignore[method-assign]
    return run(arguments, os.environ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
