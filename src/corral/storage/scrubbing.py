"""Reading blobs again, and setting aside those that are not what they should be.

```
<blobs>/sha256-<64 hex>, sha512-<128 hex>   see uploads.py
<blobs>/damaged/<the same name>             what was found to be something else; nobody reads it but us
```

Theory of operation. A damaged blob has the right name and length, so nothing but reading it tells. Once it is moved away it is
missing, and everything that knows what to do about a missing blob does it: it is not found, not mounted, not loaded, and whoever
pushes it heals it. It is kept, because it may be all there is left; put back by a repair, it is found right and served again.

The kernel would answer from memory what it read last month, so it is told to forget a file before it is read; pages that an
engine has mapped stay. A wrong result is read once more before it is believed: memory and cables fail as well.

Somebody may push the blob while it is read. What is moved away is therefore looked at: if it is not the file that was read, it
goes back under its name.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
from functools import partial
from pathlib import Path

from corral.core.scrubbing import Condition, Pace
from corral.storage.blobs import disk_errors, in_thread, sync_dir
from corral.wire.names import Digest

_BLOCK = 4 << 20
_STORE = "the model store"


class BlobChecks:
    """A `ScrubFiles` on a hub's blobs."""

    def __init__(self, blobs_dir: Path) -> None:
        self._root = blobs_dir
        self._aside = blobs_dir / "damaged"

    async def check(self, digest: Digest, size_bytes: int, pace: Pace) -> Condition:
        """See the theory of operation above."""
        place, aside = self._root / digest.file_name, self._aside / digest.file_name
        descriptor = _open(place)
        if descriptor is not None:
            return await self._check_placed(descriptor, digest, size_bytes, pace)
        descriptor = _open(aside)
        if descriptor is None:
            return Condition.MISSING
        try:
            if not await _is_right(descriptor, digest, size_bytes, pace):
                return Condition.DAMAGED
        finally:
            os.close(descriptor)
        with disk_errors(_STORE):
            await asyncio.to_thread(_put_back, aside, place)
        return Condition.INTACT

    async def _check_placed(self, descriptor: int, digest: Digest, size_bytes: int, pace: Pace) -> Condition:
        try:
            for _ in range(2):
                if await _is_right(descriptor, digest, size_bytes, pace):
                    return Condition.INTACT
            inode = os.fstat(descriptor).st_ino
        finally:
            os.close(descriptor)
        with disk_errors(_STORE):
            is_aside = await asyncio.to_thread(self._set_aside, self._root / digest.file_name, inode)
        # Another one took its place, which was verified just now.
        return Condition.DAMAGED if is_aside else Condition.INTACT

    def _set_aside(self, place: Path, inode: int) -> bool:
        """Whether the blob's file was that one, and is away now; also when somebody removed it meanwhile."""
        self._aside.mkdir(mode=0o700, exist_ok=True)
        aside, is_other = self._aside / place.name, False
        try:
            place.replace(aside)
        except FileNotFoundError:
            return True
        with contextlib.suppress(FileNotFoundError):
            is_other = aside.stat().st_ino != inode
        if is_other:
            _put_back(aside, place)
            return False
        for directory in (self._aside, self._root):
            sync_dir(directory)
        return True

    async def forget_aside(self, digest: Digest) -> None:
        """One unlink."""
        with disk_errors(_STORE):
            await asyncio.to_thread((self._aside / digest.file_name).unlink, missing_ok=True)


def _open(path: Path) -> int | None:
    with disk_errors(_STORE):
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None


def _put_back(aside: Path, place: Path) -> None:
    # Not in the place of one that came meanwhile; and somebody else may be at the same.
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.link(aside, place)
    aside.unlink(missing_ok=True)
    sync_dir(place.parent)


async def _is_right(descriptor: int, digest: Digest, size_bytes: int, pace: Pace) -> bool:
    """Whether the file has that digest. One of another length is not read."""
    if os.fstat(descriptor).st_size != size_bytes:
        return False
    state, position = hashlib.new(digest.algorithm), 0
    _forget_pages(descriptor)
    while position < size_bytes:
        block = await in_thread(partial(_read, descriptor, position))
        if not block:
            return False
        await in_thread(partial(state.update, block))
        position += len(block)
        await pace(len(block))
    return state.hexdigest() == digest.hex


def _read(descriptor: int, position: int) -> bytes:
    """The bytes there; none where the disk cannot read its own."""
    with disk_errors(_STORE):
        try:
            block = os.pread(descriptor, _BLOCK, position)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""
    _forget_pages(descriptor, position, len(block))
    return block


def _forget_pages(descriptor: int, position: int = 0, count: int = 0) -> None:
    """What is read here once shall not drive out what others read often. count: 0 stands for all behind."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
