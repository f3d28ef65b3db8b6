"""Places for what is not finished: nobody takes it for something whole, and it goes away however its maker ends.

```
<directory>/.corral-<8 letters>/    0700, locked while its maker lives; removed by the next one who works there otherwise
```
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from corral.storage.archive import MANIFEST
from corral.storage.blobs import disk_errors, entries_of, sync_dir
from corral.wire.errors import CorralError

_PREFIX = ".corral-"


@contextlib.contextmanager
def workplace(directory: Path) -> Iterator[Path]:
    """A closed directory below an existing one, on the same file system; gone after the block. What a killed process left there
    goes first. Raises: storage_full, unavailable."""
    _remove_left(directory)
    with disk_errors(str(directory)):
        place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network file systems have no locks: there nobody takes it for left behind before it is gone.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(descriptor)


def _remove_left(directory: Path) -> None:
    for entry in entries_of(directory):
        if not entry.name.startswith(_PREFIX) or not entry.is_dir(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
            finally:
                os.close(descriptor)


def check_target(path: Path) -> None:
    """Whether a backup may be written there: where nothing is, or in the place of another one. Raises: invalid."""
    if not path.parent.is_dir():
        raise CorralError("invalid", f"there is no directory {path.parent}")
    try:
        # Opening a FIFO that somebody put there must not wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if not path.is_symlink():
            return
        raise CorralError("invalid", f"{path} leads nowhere → choose another name") from None
    except OSError as error:
        raise CorralError("invalid", f"{path} cannot be replaced: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        if path.is_symlink() or not path.is_file() or not file.read(len(MANIFEST) + 1).startswith(MANIFEST.encode() + b"\0"):
            raise CorralError("invalid", f"{path} is there already and is no backup → choose another name, or remove it")


@contextlib.contextmanager
def new_file(path: Path, *, what: str) -> Iterator[BinaryIO]:
    """A new file that only its owner can read, durable when the block ends well. what: is said to have no space. Raises:
    storage_full, unavailable."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with disk_errors(what), os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        yield file
        os.fsync(file.fileno())


def put_in_place(finished: Path, path: Path) -> None:
    """Give a durable file its name, in the place of what has it. Raises: storage_full, unavailable."""
    with disk_errors("the backup"):
        finished.replace(path)
        sync_dir(path.parent)
