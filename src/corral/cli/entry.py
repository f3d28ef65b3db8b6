"""Where the `corral` command begins: `--version` needs next to nothing, everything else begins with click."""

import os
import sys
from collections.abc import Mapping, Sequence


def main() -> None:
    """The console command."""
    sys.exit(begin(sys.argv[1:], os.environ))


def begin(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Carry out one command line. Returns the exit status."""
    if arguments in (["-v"], ["--version"]):
        from corral.cli.version import version_text
        from corral.wire.errors import CorralError

        try:
            print(version_text(environ), end="", flush=True)
            return 0
        except (CorralError, OSError):
            pass  # told below, as every error is
    from corral.cli.app import run

    return run(arguments, environ)
