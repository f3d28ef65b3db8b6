"""Locks between processes on this machine. The kernel lets go of them when their holder dies, however it dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from corral.wire.errors import CorralError


@contextlib.contextmanager
def held_alone(path: Path, *, otherwise: str) -> Iterator[None]:
    """Hold the lock of a file, which is made 0600 and stays, while the block runs. otherwise: what is said when somebody else,
    here or in another process, holds it. Raises: conflict, unavailable."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CorralError("unavailable", f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        _take(descriptor, otherwise)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, otherwise: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CorralError("conflict", otherwise) from error
