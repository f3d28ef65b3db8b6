"""The child process that reads the header of one GGUF file. Run as a file, never imported by the rest.

The file comes as standard input, opened by the parent; the answer goes to standard output as one JSON object, `{"facts": …}` or
`{"refused": "…"}`. Nothing else comes in: no arguments, no environment, no packages beyond the standard library. Limits are set
before the first byte is looked at, so that a header made to be expensive ends this process and nothing else (T105).
"""

import contextlib
import json
import os
import sys

_MEMORY_BYTES = 512 << 20
_CPU_S = 5
#: Whatever more a header says, nobody is shown.
_ANSWER_BYTES = 16 << 20


def main() -> None:
    """Set the limits, read, answer."""
    _limit_this_process()
    # -I leaves the path without our package; this very file says where it is.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120
    answer = json.dumps(_answer(), allow_nan=False).encode()
    if len(answer) > _ANSWER_BYTES:
        answer = json.dumps({"refused": "its header holds too much text to be described"}).encode()
    sys.stdout.buffer.write(answer)


def _answer() -> dict[str, object]:
    from corral.wire.errors import CorralError
    from corral.wire.gguf import facts_of, read_header

    size_bytes = os.fstat(0).st_size
    try:
        return {"facts": facts_of(read_header(lambda offset, count: os.pread(0, count, offset), size_bytes), size_bytes)}
    except CorralError as error:
        return {"refused": error.message}


def _limit_this_process() -> None:
    with contextlib.suppress(ImportError):
        import resource

        limits = {
            resource.RLIMIT_AS: _MEMORY_BYTES,
            resource.RLIMIT_CPU: _CPU_S,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_CORE: 0,
        }
        for limit, value in limits.items():
            # A system may know a limit and refuse to set it; the parent's clock is there as well.
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    main()
