"""A hub's blobs, and content on its way there.

```
<blobs>/sha256-<64 hex>, sha512-<128 hex>   0600; whole, durable and named after its content, or absent (see blobs.py)
<blobs>/damaged/<name of a blob>            set aside by scrubbing.py
<blobs>/uploads/<upload id>                 0600; what has arrived of an open upload
<blobs>/uploads/<upload id>.placed          symbolic link to the blob that the upload was verified to be; made before its file
                                            takes that name, removed with the upload
```

Theory of operation. What arrives is handed in blocks to two threads, of which one writes and the other hashes, while the next is
received: nothing waits for the other two, and memory holds two blocks per upload, however long the blob is. A block of 1 MiB is
still in the cache of the second thread that comes to it; with 4 MiB both cost half as much again.

An accepted part lies in the kernel's page cache: it survives a killed process, and a power cut costs the client its upload.
While a part arrives the disk is told every now and then to write what it has, which takes a fifth off the whole and most of the
wait at the end. A disk that fails to do so has forgotten which blocks those were, and would call the next attempt a success: the
upload is given up.

A committed blob is synced, renamed and its directory synced before anybody is told. Between the rename and the transaction that
finishes the upload the process may be killed; then the link tells what became of the file, and the same commit is answered the
same. Nobody gets at a blob in this way that he did not send.

For every part that was accepted lately the state of the hash at its end is kept in memory, so that a part can be taken back or
sent again without reading the file. After a restart the file is read once.

Whoever comes later to an upload wins: a client that sends a part again does so because it believes its first connection dead,
which may hang here half-open for a long time.
"""

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Protocol, Self

from corral.storage.blobs import CLOSED, STALE_AFTER, BlobFiles, disk_errors, entries_of, in_thread, sync_dir
from corral.wire.errors import CorralError
from corral.wire.names import Digest, parse_content_digest

_BLOCK = 1 << 20
_SYNCED_AT_ONCE = 32 << 20
#: Ends of parts whose hash is remembered, per upload.
_REMEMBERED = 64
_SCANNED_AT_ONCE = 1000
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PLACED, _NEW = ".placed", ".new"
_STORE = "the model store"


class _Hash(Protocol):
    def update(self, content: bytes, /) -> None: ...
    def copy(self) -> Self: ...
    def hexdigest(self) -> str: ...


@dataclass
class _Upload:
    """What is known of one upload besides its file. users: how many are at it or wait to be. turns: how many ever were. hashes:
    by algorithm and number of bytes. scope: ends the writer that is at it."""

    path: Path
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    turns: int = 0
    hashes: dict[tuple[str, int], _Hash] = field(default_factory=dict)
    scope: asyncio.Timeout | None = None

    @property
    def mark(self) -> Path:
        """The link to what it was placed as."""
        return self.path.with_name(f"{self.path.name}{_PLACED}")

    def placed_as(self) -> Digest | None:
        """What it was placed as, if it was."""
        try:
            return parse_content_digest(self.mark.readlink().name.replace("-", ":", 1))
        except (OSError, CorralError):
            return None

    def check(self, turn: int) -> None:
        """Raises: conflict when somebody came later."""
        if turn != self.turns:
            raise _superseded()

    def interrupt(self) -> None:
        """End the writer that is at it. Once: a scope that ends already cannot be told to again."""
        if self.scope is not None:
            self.scope.reschedule(asyncio.get_running_loop().time())
            self.scope = None

    @contextlib.asynccontextmanager
    async def interruptible(self, turn: int) -> AsyncIterator[None]:
        """A block that the next one who comes may end, or has before it began. Raises: conflict."""
        self.check(turn)
        try:
            async with asyncio.timeout(None) as scope:
                self.scope = scope
                try:
                    yield
                finally:
                    self.scope = None
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise _superseded() from error

    def hash_at(self, algorithm: str, offset_bytes: int, descriptor: int, stop: Event) -> _Hash:
        """The state of the hash over the first bytes of the file, read as far as it is not known. Raises: blob_upload_unknown
        when there are fewer, canceled."""
        known = [end for name, end in self.hashes if name == algorithm and end <= offset_bytes]
        position = max(known, default=0)
        state = self.hashes[algorithm, position].copy() if position else hashlib.new(algorithm)
        while position < offset_bytes:
            if stop.is_set():
                raise CorralError("canceled")
            block = os.pread(descriptor, min(_BLOCK, offset_bytes - position), position)
            if not block:
                raise CorralError("blob_upload_unknown")
            state.update(block)
            position += len(block)
        return state

    def remember(self, algorithm: str, offset_bytes: int, state: _Hash) -> None:
        """Keep the state of a hash, and forget the oldest."""
        self.hashes[algorithm, offset_bytes] = state
        while len(self.hashes) > _REMEMBERED:
            del self.hashes[next(iter(self.hashes))]

    def cut(self, descriptor: int, offset_bytes: int) -> None:
        """Cut the file off there. Raises: blob_upload_unknown when it is shorter."""
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes < offset_bytes:
            raise CorralError("blob_upload_unknown")
        self.hashes = {key: state for key, state in self.hashes.items() if key[1] <= offset_bytes}
        if size_bytes > offset_bytes:
            os.ftruncate(descriptor, offset_bytes)

    def sync(self, descriptor: int) -> None:
        """Have the file on the disk. When that fails the upload is gone."""
        try:
            os.fsync(descriptor)
        except OSError:
            self.hashes.clear()
            self.path.unlink(missing_ok=True)
            raise


def _superseded() -> CorralError:
    return CorralError("conflict", "another request writes to this upload")


class _Part:
    """What is being appended to an upload. size_bytes: of the file, once all blocks are written."""

    def __init__(self, upload: _Upload, descriptor: int, offset_bytes: int) -> None:
        self._upload = upload
        self._descriptor = descriptor
        self._offset_bytes = offset_bytes
        self._stop = Event()
        self._hash: _Hash = hashlib.sha256()
        self._block: asyncio.Task[None] | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._synced_bytes = offset_bytes
        self.size_bytes = offset_bytes

    async def begin(self) -> None:
        """Cut off what lies behind the part."""
        await in_thread(self._begin, on_cancel=self._stop.set)

    def _begin(self) -> None:
        with disk_errors(_STORE):
            self._upload.cut(self._descriptor, self._offset_bytes)
            self._hash = self._upload.hash_at("sha256", self._offset_bytes, self._descriptor, self._stop)

    async def put(self, pieces: Sequence[bytes]) -> None:
        """Have a block written and hashed, once the one before it is."""
        await self._written()
        self._block = asyncio.create_task(self._take_in(b"".join(pieces)))
        if self._syncing is not None and self._syncing.done():
            await self._synced()
        if self._syncing is None and self.size_bytes - self._synced_bytes >= _SYNCED_AT_ONCE:
            self._synced_bytes = self.size_bytes
            self._syncing = asyncio.create_task(in_thread(self._sync))

    async def _take_in(self, block: bytes) -> None:
        """Write and hash at once, in two threads."""
        hashing = asyncio.create_task(in_thread(partial(self._hash.update, block)))
        try:
            await in_thread(partial(self._write, block))
        finally:
            await hashing

    def _write(self, block: bytes) -> None:
        rest = memoryview(block)
        with disk_errors(_STORE):
            while rest:
                written = os.pwrite(self._descriptor, rest, self.size_bytes)
                self.size_bytes += written
                rest = rest[written:]

    def _sync(self) -> None:
        with disk_errors(_STORE):
            self._upload.sync(self._descriptor)

    async def settle(self) -> None:
        """Wait for what is being done in threads, also when canceled meanwhile. Raises: storage_full, unavailable."""
        try:
            await self._written()
        finally:
            await self._synced()

    async def _written(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            await block

    async def _synced(self) -> None:
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            await syncing

    def accept(self) -> None:
        """Keep what was written."""
        self._upload.remember("sha256", self.size_bytes, self._hash)

    async def take_back(self) -> None:
        """Leave the file as it was before the part."""
        try:
            with contextlib.suppress(CorralError):
                await self.settle()
        finally:
            await in_thread(self._take_back)

    def _take_back(self) -> None:
        # A file that cannot be cut now is cut by whoever writes to it next: what counts is the offset that was acknowledged.
        with contextlib.suppress(OSError, CorralError):
            self._upload.cut(self._descriptor, self._offset_bytes)


class UploadFiles:
    """RegistryFiles on a hub's blobs. cache_dir: as for `BlobFiles`."""

    def __init__(self, blobs_dir: Path, cache_dir: Path) -> None:
        self._root = blobs_dir
        self._blobs = BlobFiles(blobs_dir, cache_dir, mode=CLOSED)
        self._directory = blobs_dir / "uploads"
        self._uploads: dict[str, _Upload] = {}

    def size_of(self, digest: Digest) -> int | None:
        """One `stat`."""
        return self._blobs.size_of(digest)

    def path_of(self, digest: Digest) -> str:
        """Made of a digest, which is hexadecimal."""
        return str(self._blobs.path(digest))

    # ── Uploads ──────────────────────────────────────────────────────────────────────────────────────────────────────
    async def append(self, upload_id: str, offset_bytes: int, chunks: AsyncIterator[bytes], *, max_bytes: int) -> int:
        """See the theory of operation above."""
        async with self._turn(upload_id) as (upload, turn):
            upload.check(turn)
            await in_thread(partial(self._bring_back, upload, offset_bytes))
            with self._opened(upload.path, is_new=offset_bytes == 0) as descriptor:
                part, is_whole = _Part(upload, descriptor, offset_bytes), False
                try:
                    async with upload.interruptible(turn):
                        await part.begin()
                        await _receive(part, offset_bytes, chunks, max_bytes)
                    part.accept()
                    is_whole = True
                finally:
                    if not is_whole:
                        await part.take_back()
        return part.size_bytes

    async def commit(self, upload_id: str, size_bytes: int, expected: Digest) -> None:
        """Other algorithms than SHA-256 are rare, and so the file is read for them here."""
        async with self._turn(upload_id) as (upload, turn):
            upload.check(turn)
            stop = Event()
            await in_thread(partial(self._commit, upload, size_bytes, expected, stop), on_cancel=stop.set)

    def _commit(self, upload: _Upload, size_bytes: int, expected: Digest, stop: Event) -> None:
        with disk_errors(_STORE):
            if upload.path.exists() or upload.placed_as() != expected or self.size_of(expected) != size_bytes:
                self._bring_back(upload, size_bytes)
                with self._opened(upload.path, is_new=size_bytes == 0) as descriptor:
                    self._verify(upload, descriptor, size_bytes, expected, stop)
                    upload.sync(descriptor)
                upload.mark.unlink(missing_ok=True)
                upload.mark.symlink_to(Path("..") / expected.file_name)
                # Also over one that is there: that was verified when it came, and this one now.
                upload.path.replace(self._blobs.path(expected))
                upload.hashes.clear()
            # Also for a blob that was there: whoever placed it may not have come to this yet.
            sync_dir(self._root)

    def _verify(self, upload: _Upload, descriptor: int, size_bytes: int, expected: Digest, stop: Event) -> None:
        upload.cut(descriptor, size_bytes)
        state = upload.hash_at(expected.algorithm, size_bytes, descriptor, stop)
        # Kept for the client that commits what does not match again and again.
        upload.remember(expected.algorithm, size_bytes, state)
        found = Digest(state.hexdigest(), expected.algorithm)
        if found != expected:
            raise CorralError("digest_invalid", f"the content has the digest {found}, not {expected}")

    def _bring_back(self, upload: _Upload, size_bytes: int) -> None:
        """Have the upload's file again if it was placed but the upload goes on: its beginning is that of the blob."""
        placed = None if upload.path.exists() else upload.placed_as()
        if placed is None or not size_bytes:
            return
        new = upload.path.with_name(f"{upload.path.name}{_NEW}")
        with disk_errors(_STORE), contextlib.suppress(FileNotFoundError), self._blobs.path(placed).open("rb") as blob:
            with self._opened(new, is_new=True) as descriptor:
                os.ftruncate(descriptor, 0)
                for start in range(0, size_bytes, _BLOCK):
                    os.pwrite(descriptor, blob.read(min(_BLOCK, size_bytes - start)), start)
            new.replace(upload.path)

    async def discard(self, upload_id: str) -> None:
        """Does not give way to who comes later."""
        async with self._turn(upload_id) as (upload, _):
            upload.hashes.clear()
            with disk_errors(_STORE):
                await asyncio.to_thread(upload.path.unlink, missing_ok=True)
                await asyncio.to_thread(upload.mark.unlink, missing_ok=True)

    @contextlib.asynccontextmanager
    async def _turn(self, upload_id: str) -> AsyncIterator[tuple[_Upload, int]]:
        """Have an upload for oneself. Whoever writes to it gets conflict; so does whoever waits, once he looks at his number."""
        # An id is random text of our own; what else somebody puts into a URL must not become a path.
        if not _ID.fullmatch(upload_id):
            raise CorralError("blob_upload_unknown")
        upload = self._uploads.setdefault(upload_id, _Upload(self._directory / upload_id))
        upload.users += 1
        upload.turns = turn = upload.turns + 1
        upload.interrupt()
        try:
            async with upload.lock:
                yield upload, turn
        finally:
            upload.users -= 1
            if not (upload.users or upload.hashes):
                del self._uploads[upload_id]

    @contextlib.contextmanager
    def _opened(self, path: Path, *, is_new: bool) -> Iterator[int]:
        """The upload's file, which may have to be made. Raises: blob_upload_unknown."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if is_new else 0)
        with disk_errors(_STORE):
            if is_new:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, flags, CLOSED)
            except FileNotFoundError as error:
                raise CorralError("blob_upload_unknown") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    # ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────
    async def put_bytes(self, content: bytes) -> Digest:
        """In a thread."""
        return (await in_thread(partial(self._blobs.put_bytes, content))).digest

    async def remove_blob(self, digest: Digest) -> None:
        """Not synced: a blob that comes back after a power cut is collected again. What was set aside of it goes as well."""
        await asyncio.to_thread(self._blobs.remove, digest)
        with disk_errors(_STORE):
            await asyncio.to_thread((self._root / "damaged" / digest.file_name).unlink, missing_ok=True)

    async def remove_strays(self, known_uploads: Sequence[str], *, now: datetime) -> int:
        """In a thread."""
        with disk_errors(_STORE):
            removed = await asyncio.to_thread(self._remove_uploads, set(known_uploads), now - STALE_AFTER)
            temporary = await asyncio.to_thread(self._blobs.remove_stale, now)
        for upload in (self._uploads.get(upload_id) for upload_id in removed):
            if upload is not None and not upload.users:
                del self._uploads[upload.path.name]
        return len(removed) + temporary

    def _remove_uploads(self, known: Collection[str], before: datetime) -> list[str]:
        removed = []
        for entry in entries_of(self._directory):
            upload_id = entry.name.partition(".")[0]
            upload = self._uploads.get(upload_id)
            if upload_id in known or (upload is not None and upload.users):
                continue
            with contextlib.suppress(FileNotFoundError):
                if _changed_at(entry) < before:
                    Path(entry).unlink()
                    removed.append(upload_id)
        return removed

    async def blobs_on_disk(self) -> AsyncIterator[tuple[Digest, datetime]]:
        """Read in a thread, some at a time: there may be millions."""
        found = self._scan()
        while batch := await asyncio.to_thread(list, islice(found, _SCANNED_AT_ONCE)):
            for blob in batch:
                yield blob

    def _scan(self) -> Iterator[tuple[Digest, datetime]]:
        for entry in entries_of(self._root):
            with contextlib.suppress(CorralError, FileNotFoundError):
                yield parse_content_digest(entry.name.replace("-", ":", 1)), _changed_at(entry)

    async def free_bytes(self) -> int:
        """What an ordinary user may still write."""
        there = next(path for path in (self._root, *self._root.parents) if path.exists())
        found = os.statvfs(there)
        return found.f_bavail * found.f_frsize


async def _receive(part: _Part, offset_bytes: int, chunks: AsyncIterator[bytes], max_bytes: int) -> None:
    """Pass on what arrives, in blocks."""
    pieces: list[bytes] = []
    waiting, end = 0, offset_bytes
    async for chunk in chunks:
        end += len(chunk)
        if end > max_bytes:
            raise CorralError("too_large", f"the upload is longer than {max_bytes} bytes")
        pieces.append(chunk)
        waiting += len(chunk)
        if waiting >= _BLOCK:
            await part.put(pieces)
            pieces, waiting = [], 0
    if pieces:
        await part.put(pieces)
    await part.settle()


def _changed_at(entry: os.DirEntry[str]) -> datetime:
    found = entry.stat(follow_symlinks=False)
    # A hard link has the time of its origin; the other one is when it came here.
    return datetime.fromtimestamp(max(found.st_mtime, found.st_ctime), UTC)
