"""Content-addressed files, for a home directory and for the hub alike.

```
<root>/sha256-<64 hex>          0644, a hub's 0600; whole, durable and named after its content, or absent
<root>/sha256-….tmp             being written; removed when that fails, or by `remove_stale` after a killed process
<cache>/sources/<dev>-<inode>   which digest a file outside the store had when it was taken in
```

Theory of operation. Content is written or linked under a temporary name while it is hashed, synced, renamed to its digest, and
the directory is synced: a crash leaves the whole blob or none. A file that is already on this file system is taken over without
copying: by a clone where the file system has them, else by a hard link. A hard link shares the file with its owner, who could
write into it later; so only files that we own and nobody else may write are linked, and a file that is taken in again after it
changed takes the blob that it spoiled out of the store. The link has its origin's mode, which is not ours to change: a hub, whose
blobs are closed, copies a file that others may read. Everything here blocks; async callers use threads.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

import msgspec

from corral.wire.errors import CorralError
from corral.wire.names import Digest, parse_digest

T = TypeVar("T")

#: (bytes done, bytes in all); called from whatever thread does the work.
Progress = Callable[[int, int], None]

_BLOCK = 1 << 20
_TEMPORARY = ".tmp"
#: Linux: make a file a copy-on-write clone of another.
_FICLONE = 0x40049409
#: How old something must be to be taken for left behind. A younger one may be somebody's work.
STALE_AFTER = timedelta(hours=1)
#: Modes of files: as Ollama makes them in a home directory, which programs of other users may read, and as a hub makes them.
OPEN, CLOSED = 0o644, 0o600


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob of the store."""

    digest: Digest
    size_bytes: int


class BlobFiles:
    """The blobs under one directory. It is made when something is first written. cache_dir: may be deleted at any time. mode: of
    the files that are made; a hard link has that of its origin, which lets the same people read it."""

    def __init__(self, root: Path, cache_dir: Path, *, mode: int = OPEN) -> None:
        self._root = root
        self._mode = mode
        self._sources = _Sources(cache_dir / "sources")

    def path(self, digest: Digest) -> Path:
        """Where the blob is or would be."""
        return self._root / digest.file_name

    def size_of(self, digest: Digest) -> int | None:
        """Bytes, or None when the store does not hold the blob."""
        try:
            found = self.path(digest).stat()
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, digest: Digest, *, max_bytes: int) -> bytes:
        """A small blob. Raises: not_found, too_large."""
        return read_regular(self.path(digest), shown_as=f"blob {digest}", max_bytes=max_bytes)

    def writer(self) -> "BlobWriter":
        """A blob to be written piece by piece; use it in a `with` block."""
        return BlobWriter(self._root, self._mode)

    def put_bytes(self, content: bytes) -> Blob:
        """Store a small blob. Raises: storage_full, unavailable."""
        with self.writer() as writer:
            writer.write(content)
            return writer.commit()

    async def put_stream(self, chunks: AsyncIterator[bytes], *, expected: Digest | None, max_bytes: int) -> Blob:
        """Store what arrives. Hashing and writing happen in a thread, in blocks. Raises: bad_request on another digest than
        expected, too_large, storage_full, unavailable; nothing is stored then."""
        with self.writer() as writer:
            block = bytearray()
            async for chunk in chunks:
                block += chunk
                if writer.size_bytes + len(block) > max_bytes:
                    raise CorralError("too_large", f"the blob is longer than {max_bytes} bytes")
                if len(block) >= _BLOCK:
                    await in_thread(partial(writer.write, bytes(block)))
                    block.clear()
            writer.write(bytes(block))
            return await in_thread(partial(writer.commit, expected))

    def place(self, temporary: Path, blob: Blob) -> None:
        """Give a synced, verified file of the store's directory its name, durably; it may be left when the blob was there
        already. Raises: OSError."""
        _place(temporary, self.path(blob.digest), blob.size_bytes)

    def known(self, path: Path) -> Digest | None:
        """The digest the file had when it was taken in, if it has not been touched since and the blob is still there."""
        try:
            found = path.stat()
        except OSError:
            return None
        digest = self._sources.digest_of(found)
        return digest if digest is not None and self.size_of(digest) == found.st_size else None

    def put_file(self, path: Path, progress: Progress) -> Blob:
        """Take in a file of this machine. It is hashed once and not again until its size, time or inode changes.

        Raises: not_found, bad_request (not a regular file), conflict (it changed meanwhile), storage_full, unavailable; nothing
        is stored then.
        """
        with open_regular(path, shown_as=path.name) as source:
            found = os.fstat(source.fileno())
            digest = self.known(path)
            if digest is None:
                digest = self._take_in(path, source, found, progress)
                self._sources.remember(found, digest)
        progress(found.st_size, found.st_size)
        return Blob(digest, found.st_size)

    def remove_stale(self, now: datetime) -> int:
        """Remove what processes left that were killed while writing; how many files that were."""
        limit = (now - STALE_AFTER).timestamp()
        removed = 0
        for entry in entries_of(self._root):
            # ctime, because a hard link has the mtime of its origin. Others may be done with theirs meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(_TEMPORARY) and entry.stat(follow_symlinks=False).st_ctime < limit:
                    Path(entry).unlink()
                    removed += 1
        return removed

    def remove(self, digest: Digest) -> bool:
        """Remove a blob; False when it was not there. Raises: unavailable."""
        with disk_errors("the model store"):
            try:
                self.path(digest).unlink()
            except FileNotFoundError:
                return False
        return True

    def older_than(self, now: datetime) -> Iterator[Digest]:
        """Blobs that were placed more than an hour ago; a younger one may be about to be named by a manifest."""
        limit = (now - STALE_AFTER).timestamp()
        for entry in entries_of(self._root):
            with contextlib.suppress(CorralError, FileNotFoundError):
                digest = parse_digest(entry.name.replace("-", ":", 1))
                # Both, because a hard link has the mtime of its origin, and Ollama counts on touching a blob to keep it.
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and max(found.st_ctime, found.st_mtime) < limit:
                    yield digest

    def lay_out(self, digest: Digest, directory: Path, name: str) -> None:
        """Let a blob appear under a relative name below a directory. Raises: not_found, bad_request for a name that leads out of
        it or that is taken, unavailable."""
        source, target = self.path(digest), directory / name
        if not target.is_relative_to(directory) or ".." in target.parts:
            raise CorralError("bad_request", "file path must be relative")
        with disk_errors("the model store"):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                # No second name of the blob's file: a tool that writes into it would spoil the blob.
                target.symlink_to(source.resolve(strict=True))
            except (FileExistsError, NotADirectoryError) as error:
                raise CorralError("bad_request", f"the file {name} is given twice, or as a directory") from error
            except FileNotFoundError as error:
                raise CorralError("not_found", f"blob {digest}: no such file") from error

    def rename_old(self) -> None:
        """Give blobs the names they have today: early releases of Ollama wrote `sha256:<hex>`. Raises: unavailable."""
        for entry in entries_of(self._root):
            with contextlib.suppress(CorralError), disk_errors("the model store"):
                digest = parse_digest(entry.name)
                Path(entry).replace(self.path(digest))

    def _take_in(self, path: Path, source: BinaryIO, found: os.stat_result, progress: Progress) -> Digest:
        with disk_errors("the model store"), _temporary(self._root, self._mode) as (temporary, target):
            if _clone(source, target) or _link(path, temporary, found, self._mode):
                digest = _hash(source, found.st_size, progress)
                os.fsync(source.fileno())
            else:
                digest = _copy(source, target, found.st_size, progress)
            os.fsync(target)
            if _identity(os.fstat(source.fileno())) != _identity(found):
                raise CorralError("conflict", f"{path.name} changed while it was read; try again when it is complete")
            self._remove_spoiled(found, digest)
            _place(temporary, self.path(digest), found.st_size)
        return digest

    def _remove_spoiled(self, found: os.stat_result, digest: Digest) -> None:
        """Remove blobs that are the very file just hashed under another digest: somebody wrote into it after it was linked."""
        for entry in entries_of(self._root):
            is_other = entry.name != digest.file_name and not entry.name.endswith(_TEMPORARY)
            with contextlib.suppress(FileNotFoundError):
                if is_other and entry.inode() == found.st_ino and entry.stat(follow_symlinks=False).st_dev == found.st_dev:
                    Path(entry).unlink()


class BlobWriter:
    """A blob being written. Nothing is visible before `commit`; leaving the `with` block without it leaves nothing behind."""

    def __init__(self, root: Path, mode: int = OPEN) -> None:
        self._root = root
        self._mode = mode
        self._hash = sha256()
        self._cleanup = contextlib.ExitStack()
        self.size_bytes = 0

    def __enter__(self) -> Self:
        with disk_errors("the model store"):
            self._path, self._file = self._cleanup.enter_context(_temporary(self._root, self._mode))
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def write(self, content: bytes) -> None:
        """Append. Raises: storage_full, unavailable."""
        with disk_errors("the model store"):
            _write_all(self._file, content)
        self._hash.update(content)
        self.size_bytes += len(content)

    def commit(self, expected: Digest | None = None) -> Blob:
        """Make it durable and visible. Raises: bad_request when the content has another digest than expected."""
        digest = Digest(self._hash.hexdigest())
        if expected is not None and digest != expected:
            raise CorralError("bad_request", f'digest mismatch, expected "{expected}", got "{digest}"')
        with disk_errors("the model store"):
            os.fsync(self._file)
            _place(self._path, self._root / digest.file_name, self.size_bytes)
        return Blob(digest, self.size_bytes)


class _Source(msgspec.Struct, frozen=True):
    size: int
    mtime_ns: int
    digest: str


class _Sources:
    """What files outside the store contained, by device and inode. A lost note costs one hashing, so failures are passed over."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def digest_of(self, found: os.stat_result) -> Digest | None:
        try:
            note = msgspec.json.decode(self._path(found).read_bytes(), type=_Source)
            is_same = (note.size, note.mtime_ns) == (found.st_size, found.st_mtime_ns)
            return parse_digest(note.digest) if is_same else None
        except (OSError, msgspec.DecodeError, CorralError):
            return None

    def remember(self, found: os.stat_result, digest: Digest) -> None:
        note = _Source(found.st_size, found.st_mtime_ns, str(digest))
        write_note(self._path(found), msgspec.json.encode(note))

    def _path(self, found: os.stat_result) -> Path:
        return self._directory / f"{found.st_dev}-{found.st_ino}.json"


async def in_thread(work: Callable[[], T], *, on_cancel: Callable[[], None] = lambda: None) -> T:
    """Run what blocks in a thread. Cancelling calls on_cancel, which may tell the thread to stop, and waits for its end: the
    thread's files must not be closed under it (their numbers would be given to other files)."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        on_cancel()
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # nobody asks any more; unasked for, it would be logged
        raise


async def in_thread_reporting(work: Callable[[Progress], T], progress: Progress) -> T:
    """Run what blocks and reports in a thread. Cancelling ends it at its next report, with the code canceled."""
    stop = threading.Event()

    def report(done: int, total: int) -> None:
        if stop.is_set():
            raise CorralError("canceled")
        progress(done, total)

    return await in_thread(partial(work, report), on_cancel=stop.set)


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_regular(path: Path, *, shown_as: str, flags: int = 0) -> BinaryIO:
    """Open a file for reading that is a regular file: a FIFO would wait for ever, a device might never end.

    flags: further ones for `open`. Raises: not_found, bad_request; the messages name it as shown_as.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except FileNotFoundError as error:
        raise CorralError("not_found", f"{shown_as}: no such file") from error
    except OSError as error:
        raise CorralError("bad_request", f"{shown_as} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorralError("bad_request", f"{shown_as} is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_regular(path: Path, *, shown_as: str, max_bytes: int, flags: int = 0) -> bytes:
    """The content of a small file. Raises: too_large, and as `open_regular`."""
    with open_regular(path, shown_as=shown_as, flags=flags) as file:
        # Asked for by its size: reading up to the limit would set aside that much memory for a few hundred bytes.
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > max_bytes:
            raise CorralError("too_large", f"{shown_as} is longer than {max_bytes} bytes")
        return file.read(size_bytes)


def write_atomically(path: Path, content: bytes, *, beside: Path) -> None:
    """Create or replace a file, 0644, durably, so that a reader sees the old content or the new.

    beside: a directory of the same file system where the temporary file does no harm. Raises: storage_full, unavailable.
    """
    with disk_errors("the model store"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(beside, OPEN) as (temporary, target):
            _write_all(target, content)
            os.fsync(target)
            temporary.replace(path)
            sync_dir(path.parent)


def write_note(path: Path, content: bytes) -> None:
    """Keep something that can be found out again, 0600. Not durable; a directory that cannot be written to is no error."""
    with contextlib.suppress(OSError), _temporary(path.parent, CLOSED) as (temporary, target):
        _write_all(target, content)
        temporary.replace(path)


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn the operating system's refusals to write into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CorralError("storage_full", f"no space left for {what}; free some and try again") from error
        raise CorralError("unavailable", f"{what} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _temporary(directory: Path, mode: int) -> Iterator[tuple[Path, int]]:
    """A new file in the directory and its open descriptor; gone afterwards unless it was renamed."""
    # Who may read the file may enter a directory that is made for it.
    directory.mkdir(mode | (mode & 0o444) >> 2, parents=True, exist_ok=True)
    # Ollama names its temporary files like this too, and removes those that were left behind.
    descriptor, name = tempfile.mkstemp(prefix="sha256-", suffix=_TEMPORARY, dir=directory)
    path = Path(name)
    try:
        os.fchmod(descriptor, mode)
        yield path, descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _place(temporary: Path, path: Path, size_bytes: int) -> None:
    """Give a synced file its name, durably. A blob that is there already and as long stays; a shorter one was cut by a crash."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == size_bytes:
            return
    temporary.replace(path)
    sync_dir(path.parent)


def _clone(source: BinaryIO, target: int) -> bool:
    """Make target a clone of source; False where the file system cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source.fileno())
    except OSError:
        return False
    return True


def _link(path: Path, temporary: Path, found: os.stat_result, mode: int) -> bool:
    """Put a hard link to the file in the place of temporary; False where that is impossible or unwise."""
    readers = mode & 0o444
    unwanted = 0o022 if mode & 0o077 else 0o077
    is_shareable = found.st_uid == os.geteuid() and found.st_mode & (readers | unwanted) == readers
    if not is_shareable:
        return False
    second = temporary.with_name(f"{temporary.name}{_TEMPORARY}")
    try:
        os.link(path.resolve(strict=True), second)
        linked = second.stat()
        # The path may name another file by now than the one that is open and being hashed.
        is_same = (linked.st_dev, linked.st_ino) == (found.st_dev, found.st_ino)
        if is_same:
            second.replace(temporary)
    except OSError:
        return False
    finally:
        second.unlink(missing_ok=True)
    return is_same


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _hash(source: BinaryIO, size_bytes: int, progress: Progress) -> Digest:
    digest, done = sha256(), 0
    while block := source.read(_BLOCK):
        digest.update(block)
        done += len(block)
        progress(done, size_bytes)
    return Digest(digest.hexdigest())


def _copy(source: BinaryIO, target: int, size_bytes: int, progress: Progress) -> Digest:
    digest, done = sha256(), 0
    while block := source.read(_BLOCK):
        _write_all(target, block)
        digest.update(block)
        done += len(block)
        progress(done, size_bytes)
    return Digest(digest.hexdigest())


def _write_all(target: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(target, rest) :]


def entries_of(directory: Path) -> Iterator[os.DirEntry[str]]:
    """What is in the directory; nothing when there is none."""
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except FileNotFoundError:
        return


def sync_dir(path: Path) -> None:
    """Have names that were given or taken in the directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
