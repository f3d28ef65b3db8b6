"""Blobs on their way in, in the form that Ollama keeps them in, so that either program goes on with what the other began.

```
<blobs>/sha256-<64 hex>-partial        the blob's bytes, each at its own place; as long as the blob from the start
<blobs>/sha256-<64 hex>-partial-<n>    {"N":n,"Offset":…,"Size":…,"Completed":…}: how much of the n-th part is there
```

Theory of operation. Parts are written by `pwrite` from threads, several at a time. SHA-256 wants the bytes in order, so whichever
thread has just written takes the hash on over what now adjoins its beginning; what is left when the last byte has come is hashed
then. A part's note is renewed behind its bytes, so after a killed process it names less than is there, never more. After a power
failure it may name more, and so the digest is checked over all bytes before the file gets its name: nothing that is not whole and
right is ever seen under it (T94). Source: ollama server/download.go, fb30760.
"""

import contextlib
import fcntl
import os
import stat
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from corral.core.transfer_ports import MissingPart
from corral.storage.blobs import Blob, BlobFiles, disk_errors, in_thread, open_regular
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.registry import parts

_BLOCK: Final = 2 << 20
#: How much one thread takes the hash on at a time: some 30 ms.
_HASH_AT_ONCE: Final = 64 << 20
#: How much of a part a killed process may have to fetch again.
_NOTE_EVERY: Final = 8 << 20
#: Longer than any note, for the numbers of a part have 19 digits at most.
_NOTE_BYTES: Final = 160
_MAX_PARTS: Final = 10_000


class _Note(msgspec.Struct):
    """One part, as Ollama writes it down."""

    N: int
    Offset: int
    Size: int
    Completed: int


@dataclass(slots=True)
class _Part:
    """completed: bytes that are written. noted: of these, how many its note tells of. waiting: bytes that are not written yet."""

    number: int
    offset: int
    size: int
    completed: int = 0
    noted: int = 0
    waiting: bytearray = field(default_factory=bytearray)

    @property
    def end(self) -> int:
        """Up to where its bytes are written."""
        return self.offset + self.completed


class BlobInbox:
    """A `BlobShelf` over the blobs of a home directory. At most one process receives a blob at a time."""

    def __init__(self, blobs: BlobFiles) -> None:
        self._blobs = blobs

    def blob_size(self, digest: Digest) -> int | None:
        """Bytes of a whole blob, None when it is not there."""
        return self._blobs.size_of(digest)

    async def receive(self, digest: Digest, size_bytes: int) -> "PartialFile":
        """Begin or go on with a blob that is not there. What is there of it and belongs to a blob of another size, or cannot be
        read, is dropped. Raises: conflict when another process is receiving it, storage_full, unavailable."""
        return await in_thread(partial(_open, self._blobs, Blob(digest, size_bytes)))

    async def read_blob(self, digest: Digest, first: int, count: int) -> AsyncIterator[bytes]:
        """Bytes of a whole blob, in blocks. Raises: not_found."""
        with open_regular(self._blobs.path(digest), shown_as=f"blob {digest}") as file:
            descriptor, end = file.fileno(), first + count
            while first < end:
                block = await in_thread(partial(os.pread, descriptor, min(_BLOCK, end - first), first))
                if not block:
                    raise CorralError("not_found", f"blob {digest} is shorter than its manifest says")
                first += len(block)
                yield block


class PartialFile:
    """A `PartialBlob`. Holds a lock on its file until it is closed."""

    def __init__(self, blobs: BlobFiles, blob: Blob, descriptor: int, parts: Sequence[_Part]) -> None:
        self._blobs = blobs
        self._blob = blob
        self._path = blobs.path(blob.digest)
        self.size_bytes = blob.size_bytes
        self._descriptor: int | None = descriptor
        self._parts = parts
        self._hash = sha256()
        self._hashed = 0
        self._hashing = threading.Lock()

    @property
    def completed_bytes(self) -> int:
        """What arrived, written or about to be."""
        return sum(part.completed + len(part.waiting) for part in self._parts)

    def missing(self) -> list[MissingPart]:
        """What is still to be fetched, in order."""
        return [
            MissingPart(part.number, part.end, part.size - part.completed) for part in self._parts if part.completed < part.size
        ]

    async def write(self, number: int, chunk: bytes) -> None:
        """Append to a part. Raises: storage_full, unavailable."""
        part = self._parts[number]
        if part.completed + len(part.waiting) + len(chunk) > part.size:
            raise ValueError("more bytes than the part has")
        part.waiting += chunk
        if len(part.waiting) >= _BLOCK or part.completed + len(part.waiting) == part.size:
            await in_thread(partial(self._write, part))

    async def finish(self) -> None:
        """Verify, sync, and give the blob its name. Raises: digest_invalid, and what was there is gone."""
        await in_thread(self._finish)

    async def keep(self) -> None:
        """Close it; what is there is kept for the next attempt. Safe after `finish`."""
        await in_thread(self._keep)

    async def drop(self) -> None:
        """Close it and remove what is there. Safe after `finish`."""
        await in_thread(self._drop)

    def _drop(self) -> None:
        if self._descriptor is None:
            return
        try:
            # What cannot be removed now is, after a while, by the prune at a start.
            with contextlib.suppress(OSError):
                # Notes before the file, as always: without it they would tell of bytes that are not there.
                _remove_notes(self._path)
                _partial_path(self._path).unlink(missing_ok=True)
        finally:
            self._close()

    def _write(self, part: _Part) -> None:
        descriptor = self._open_descriptor()
        with disk_errors("the model store"):
            _pwrite_all(descriptor, part.waiting, part.end)
            part.completed += len(part.waiting)
            part.waiting = bytearray()
            if part.completed - part.noted >= _NOTE_EVERY or part.completed == part.size:
                self._note(part)
            # Without waiting: whoever holds it hashes this block too, or the next writer does, or `finish`.
            if self._hashing.acquire(blocking=False):
                try:
                    self._hash_on(descriptor, at_most=_HASH_AT_ONCE)
                finally:
                    self._hashing.release()

    def _hash_on(self, descriptor: int, *, at_most: int) -> None:
        end = min(self._frontier(), self._hashed + at_most)
        while self._hashed < end:
            block = os.pread(descriptor, min(_BLOCK, end - self._hashed), self._hashed)
            if not block:
                return
            self._hash.update(block)
            self._hashed += len(block)

    def _frontier(self) -> int:
        """Up to where all bytes are written."""
        for part in self._parts:
            if part.completed < part.size:
                return part.end
        return self.size_bytes

    def _finish(self) -> None:
        descriptor = self._open_descriptor()
        with disk_errors("the model store"):
            self._hash_on(descriptor, at_most=self.size_bytes)
            found = Digest(self._hash.hexdigest())
            is_right = self._hashed == self.size_bytes and found == self._blob.digest
            if is_right:
                os.fsync(descriptor)
            # Notes before the name: beside a blob that was removed later, they would tell of bytes that are not there.
            _remove_notes(self._path)
            if is_right:
                self._blobs.place(_partial_path(self._path), self._blob)
            _partial_path(self._path).unlink(missing_ok=True)
        self._close()
        if not is_right:
            raise CorralError(
                "digest_invalid", f"digest mismatch, file must be downloaded again: want {self._blob.digest}, got {found}"
            )

    def _keep(self) -> None:
        if self._descriptor is None:
            return
        try:
            # On a full disk: what the notes tell of is there all the same.
            with contextlib.suppress(CorralError), disk_errors("the model store"):
                for part in self._parts:
                    if part.waiting:
                        self._write(part)
                    if part.noted < part.completed:
                        self._note(part)
        finally:
            self._close()

    def _note(self, part: _Part) -> None:
        _write_note(self._path, part)
        part.noted = part.completed

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ValueError("the blob is closed")
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open(blobs: BlobFiles, blob: Blob) -> PartialFile:
    path = blobs.path(blob.digest)
    with disk_errors("the model store"):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(_partial_path(path), flags, 0o644)
    try:
        _lock(descriptor, blob.digest)
        with disk_errors("the model store"):
            try:
                parts = _prepare(path, descriptor, blob.size_bytes)
            except CorralError:
                # No room for it: an empty file would tell of a pull that never was.
                if not os.fstat(descriptor).st_size:
                    _partial_path(path).unlink(missing_ok=True)
                raise
    except BaseException:
        os.close(descriptor)
        raise
    return PartialFile(blobs, blob, descriptor, parts)


def _lock(descriptor: int, digest: Digest) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise CorralError("unavailable", f"what is in the place of blob {digest} is not a regular file")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CorralError("conflict", f"another process is receiving blob {digest}; try again when it is done") from error


def _prepare(path: Path, descriptor: int, size_bytes: int) -> list[_Part]:
    """The parts of the blob as their notes tell, or new ones with their notes."""
    known = _read_notes(path)
    if known is not None and (not _tile(known, size_bytes) or os.fstat(descriptor).st_size != size_bytes):
        known = None
    missing = size_bytes - sum(part.completed for part in known or ())
    disk = os.fstatvfs(descriptor)
    # The file is sparse, so a disk that is too small would be found out at the very end.
    if disk.f_bavail * disk.f_frsize < missing:
        raise CorralError("storage_full", f"no space left for the model store: {missing} more bytes are to come; free some")
    return known if known is not None else _begin(path, descriptor, size_bytes)


def _begin(path: Path, descriptor: int, size_bytes: int) -> list[_Part]:
    """New parts with their notes; whatever was there before is dropped."""
    _remove_notes(path)
    os.ftruncate(descriptor, 0)
    begun = _new_parts(size_bytes)
    for part in begun:
        _write_note(path, part)
    os.ftruncate(descriptor, size_bytes)
    return begun


def _new_parts(size_bytes: int) -> list[_Part]:
    ranges = parts(size_bytes)
    return [_Part(number, span.first, span.last - span.first + 1) for number, span in enumerate(ranges)]


def _tile(parts: Sequence[_Part], size_bytes: int) -> bool:
    """Whether the parts are numbered through and cover the blob without gap or overlap."""
    offset = 0
    for number, part in enumerate(parts):
        if (part.number, part.offset) != (number, offset) or not 0 <= part.completed <= part.size:
            return False
        offset += part.size
    return offset == size_bytes


def _read_notes(path: Path) -> list[_Part] | None:
    """The noted parts by number; None when there are none or one of them cannot be read."""
    known = []
    for note_path in _note_paths(path):
        try:
            with open_regular(note_path, shown_as="a note", flags=os.O_NOFOLLOW) as file:
                note = msgspec.json.decode(file.read(_NOTE_BYTES), type=_Note)
        except (CorralError, OSError, msgspec.DecodeError):
            return None
        known.append(_Part(note.N, note.Offset, note.Size, note.Completed, note.Completed))
    return sorted(known, key=lambda part: part.number) if 0 < len(known) <= _MAX_PARTS else None


def _note_paths(path: Path) -> Iterator[Path]:
    prefix = f"{path.name}-partial-"
    with os.scandir(path.parent) as entries:
        yield from (Path(entry) for entry in entries if entry.name.startswith(prefix))


def _remove_notes(path: Path) -> None:
    for note_path in list(_note_paths(path)):
        with contextlib.suppress(FileNotFoundError):
            note_path.unlink()


def _write_note(path: Path, part: _Part) -> None:
    """Overwritten in place by one write of always the same length, so that no reader and no crash finds half of one."""
    note = msgspec.json.encode(_Note(part.number, part.offset, part.size, part.completed)).ljust(_NOTE_BYTES - 1) + b"\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path.with_name(f"{path.name}-partial-{part.number}"), flags, 0o644)
    try:
        os.pwrite(descriptor, note, 0)
    finally:
        os.close(descriptor)


def _partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-partial")


def _pwrite_all(descriptor: int, block: bytearray, offset: int) -> None:
    rest = memoryview(block)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
