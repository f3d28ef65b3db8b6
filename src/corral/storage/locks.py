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
    with _held(path, fcntl.LOCK_EX, CorralError("conflict", otherwise)):
        yield


@contextlib.contextmanager
def held_together(path: Path, *, otherwise: str) -> Iterator[None]:
    """The same lock, held by any number of others who want no more than that nobody holds it alone. Raises: unavailable."""
    with _held(path, fcntl.LOCK_SH, CorralError("unavailable", otherwise)):
        yield


@contextlib.contextmanager
def _held(path: Path, how: int, otherwise: CorralError) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CorralError("unavailable", f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        _take(descriptor, how, otherwise)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, how: int, otherwise: CorralError) -> None:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise otherwise from error
