"""Finding the engine process that a server runs, to ask it directly: the other side of P1 to P4.

Only /proc is read: the address of its listening socket, and the secret it was started with, which its own user may see.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from flows.stack import descendants, listening_ports


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Where an engine listens, and what it wants to hear."""

    pid: int
    port: int
    key: str


def engine_below(pid: int) -> Engine:
    """The one engine among a process's descendants. Raises: LookupError when there is none yet."""
    for child, command in descendants(pid).items():
        if "llama" in command and (ports := listening_ports(child)):
            return Engine(pid=child, port=ports[0][1], key=_key_of(child))
    raise LookupError(f"no engine below {pid}")


def _key_of(pid: int) -> str:
    values = dict(item.partition("=")[::2] for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if item)
    return next((value for name, value in values.items() if "KEY" in name), os.environ.get("CORRAL_BENCH_ENGINE_KEY", ""))
