"""Uploads: content on its way into a repository, in order, by one writer at a time.

Theory of operation. An upload is a row and a file of the same id. The row says how much was acknowledged; the file may be longer,
by what a broken request or a killed process left behind, and is cut to that before anything is added. So a chunk counts whole or
not at all. Requests about one upload take turns at its row; while a chunk arrives nobody holds a turn, so that the retry of a
client whose connection broke is not kept waiting by the connection that is still half open. The later writer wins: the earlier
one finds that the turn has passed on and ends with conflict.

A finished upload stays as a tombstone for a while, because the 201 may have been lost and the commit is then sent again.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from corral.core.ports import Clock, Entropy
from corral.core.records import Account, Principal
from corral.core.registry import RegistryFiles, RegistryStore, Repository, Right, Upload
from corral.hub.links import LEASE, BlobLinks
from corral.hub.quotas import Quotas
from corral.hub.repositories import Caller, Repositories
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.registry import ByteRange
from corral.wire.repositories import RepositoryName

T = TypeVar("T")

#: An upload that nobody touched for this long is given up.
IDLE_AFTER = timedelta(hours=24)
#: How long a finished upload answers a commit that is sent again; stock clients try for a minute.
TOMBSTONE_LIFE = timedelta(minutes=15)
#: Open uploads of one account. Stock clients have 64 on the way at once, and a broken push leaves its own behind.
MAX_OPEN_UPLOADS = 500
_RETRY_AFTER_S = 60
#: What is about to be placed is kept for so long, however long its verification takes; afterwards it has its own lease.
_PLACING = timedelta(hours=1)
#: A blob of the same digest that is just being deleted is gone within milliseconds.
_LEASE_TRIES, _LEASE_PAUSE_S = 20, 0.05
_NO_LIMIT = 2**62
_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Mounted:
    """The answer to a start that needs no upload: the repository has the blob."""

    digest: Digest


class _Turn:
    """Whose turn it is to write to one upload. epoch: grows with each writer that begins."""

    __slots__ = ("__weakref__", "epoch", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.epoch = 0

    def begin(self) -> int:
        """A new writer's epoch, which ends those before."""
        self.epoch += 1
        return self.epoch

    def check(self, epoch: int) -> None:
        """Raises: conflict when a later writer began."""
        if epoch != self.epoch:
            raise CorralError("conflict", "another request writes to this upload")


class Uploads:
    """Content on its way in. An upload exists for the account that started it and in its repository alone (F10)."""

    def __init__(
        self,
        *,
        repositories: Repositories,
        links: BlobLinks,
        quotas: Quotas,
        store: RegistryStore,
        files: RegistryFiles,
        clock: Clock,
        entropy: Entropy,
        max_open: int = MAX_OPEN_UPLOADS,
    ) -> None:
        self._repositories = repositories
        self._links = links
        self._quotas = quotas
        self._store = store
        self._files = files
        self._clock = clock
        self._entropy = entropy
        self._max_open = max_open
        self._turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()

    # ── Beginning ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start_upload(
        self,
        name: RepositoryName,
        caller: Caller,
        *,
        mount: Digest | None = None,
        source: str | None = None,
        expected: Digest | None = None,
        declared_bytes: int | None = None,
    ) -> Mounted | Upload:
        """An upload, or that none is needed.

        mount, source: a blob that another repository may have; without a source, any that the caller may pull from. expected:
        the digest of what will come, which is skipped when the repository has it or can have it from elsewhere. declared_bytes:
        how long it will be. Raises: as `Repositories.find` for a push; rate_limited, storage_full, forbidden for a quota.
        """
        repository = await self._repositories.find(name, Right.PUSH, caller)
        wanted = mount or expected
        if wanted is not None and await self._have(repository, wanted, source if mount else None, caller):
            return Mounted(wanted)
        await self._quotas.check(repository, declared_bytes or 0)
        return await self._add(repository, _account(caller), expected)

    async def _have(self, repository: Repository, digest: Digest, source: str | None, caller: Caller) -> bool:
        if await self._links.size_of(repository, digest) is not None:
            return await self._links.renew(repository, digest)
        if source is not None:
            return await self._links.mount(repository, digest, source, caller)
        return await self._links.borrow(repository, digest, caller)

    async def _add(self, repository: Repository, account: Account, expected: Digest | None) -> Upload:
        now = self._clock.now()
        upload = Upload(
            id=self._entropy.bytes(_ID_BYTES).hex(),
            repository_id=repository.id,
            account_id=account.id,
            offset_bytes=0,
            created_at=now,
            touched_at=now,
            expected=expected,
        )
        try:
            await self._store.add_upload(upload, max_open=self._max_open)
        except CorralError as error:
            if error.code != "rate_limited":
                raise
            raise CorralError("rate_limited", error.message, retry_after_s=_RETRY_AFTER_S) from error
        return upload

    async def put_blob(
        self, name: RepositoryName, caller: Caller, expected: Digest, chunks: AsyncIterator[bytes], *, length: int | None = None
    ) -> Digest:
        """Store a blob that comes with its one request. length: of the body, where it is known. Raises: as `start_upload` and
        `commit`."""
        repository = await self._repositories.find(name, Right.PUSH, caller)
        await self._quotas.check(repository, length or 0)
        upload = await self._add(repository, _account(caller), expected)
        try:
            return await self.commit(upload.id, name, caller, expected, chunks, length=length)
        except BaseException:
            # Nobody was told its id, so nobody can go on with it.
            await _unbroken(self._drop(upload.id))
            raise

    # ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def append(
        self,
        upload_id: str,
        name: RepositoryName,
        caller: Caller,
        chunks: AsyncIterator[bytes],
        *,
        byte_range: ByteRange | None = None,
        length: int | None = None,
        may_repeat: bool = False,
    ) -> Upload:
        """The upload with the chunk behind it. The chunk counts whole or not at all.

        byte_range: where it belongs; None appends it. length: of the body, where it is known. may_repeat: a chunk that was
        accepted just before may come again, because stock clients send it again when our answer was lost. Raises:
        blob_upload_unknown; range_invalid with what is there in `Range`; size_invalid for a body of another length; conflict
        when a later request writes; storage_full; forbidden for a quota.
        """
        repository = await self._repositories.find_existing(name, Right.PUSH, caller)
        turn = self._turn(upload_id)
        async with turn.lock:
            upload = await self._open(upload_id, repository, caller)
            start = _start_of(upload, byte_range, may_repeat=may_repeat)
            if start < upload.offset_bytes:
                # First in the row: it must never tell of more than the file has.
                upload = await _unbroken(self._advance(upload, start))
            epoch = turn.begin()
        async with self._quotas.reserved(repository, _expected_length(byte_range, length) or 0) as room:
            end = await self._receive(upload, start, room.counted(chunks), _expected_length(byte_range, length))
            # The body may have taken hours, in which the owner took the right to push from whoever sends it.
            await self._repositories.find_existing(name, Right.PUSH, caller)
            async with turn.lock:
                turn.check(epoch)
                upload = await _unbroken(self._advance(upload, end))
            room.keep()
        return upload

    async def commit(
        self,
        upload_id: str,
        name: RepositoryName,
        caller: Caller,
        expected: Digest,
        chunks: AsyncIterator[bytes] | None = None,
        *,
        byte_range: ByteRange | None = None,
        length: int | None = None,
    ) -> Digest:
        """Make a blob of the upload and link it; again and again with the same answer. chunks: the last of it, if any is left.

        Raises: digest_invalid for content of another digest, and everything is as before; otherwise as `append`.
        """
        repository = await self._repositories.find_existing(name, Right.PUSH, caller)
        turn = self._turn(upload_id)
        async with turn.lock:
            upload = await self._own(upload_id, repository, caller)
            if upload.finished_as is not None:
                return await self._finished(upload, repository, expected)
            if upload.expected is not None and upload.expected != expected:
                raise CorralError("digest_invalid", f"the upload was started for {upload.expected}")
            _start_of(upload, byte_range, may_repeat=False)
            epoch = turn.begin()
            if chunks is None:
                return await _unbroken(self._finish(upload, upload.offset_bytes, expected))
        async with self._quotas.reserved(repository, _expected_length(byte_range, length) or 0) as room:
            end = await self._receive(upload, upload.offset_bytes, room.counted(chunks), _expected_length(byte_range, length))
            await self._repositories.find_existing(name, Right.PUSH, caller)
            async with turn.lock:
                turn.check(epoch)
                digest = await _unbroken(self._finish(upload, end, expected))
            room.keep()
        return digest

    async def _receive(self, upload: Upload, start: int, chunks: AsyncIterator[bytes], length: int | None) -> int:
        body = chunks if length is None else _exactly(chunks, length)
        return await self._files.append(upload.id, start, body, max_bytes=_NO_LIMIT if length is None else start + length)

    async def _advance(self, upload: Upload, offset_bytes: int) -> Upload:
        now = self._clock.now()
        await self._store.advance_upload(upload.id, offset_bytes=offset_bytes, now=now)
        return replace(upload, offset_bytes=offset_bytes, touched_at=now)

    async def _finish(self, upload: Upload, size_bytes: int, expected: Digest) -> Digest:
        # Leased before the file is placed: a collector that deletes a blob of this digest would take ours for it.
        await self._lease(expected, size_bytes)
        await self._files.commit(upload.id, size_bytes, expected)
        now = self._clock.now()
        if size_bytes != upload.offset_bytes:
            await self._advance(upload, size_bytes)
        await self._store.finish_upload(upload.id, expected, until=now + LEASE, now=now)
        return expected

    async def _lease(self, digest: Digest, size_bytes: int) -> None:
        for _ in range(_LEASE_TRIES):
            try:
                return await self._store.lease_blob(digest, size_bytes, until=self._clock.now() + _PLACING)
            except CorralError as error:
                if error.code != "busy":
                    raise
                await asyncio.sleep(_LEASE_PAUSE_S)
        raise CorralError("busy", "that content is being deleted; try again", retry_after_s=1)

    async def _finished(self, upload: Upload, repository: Repository, expected: Digest) -> Digest:
        """The answer to a commit that was answered before."""
        if upload.finished_as != expected or await self._links.size_of(repository, expected) is None:
            raise CorralError("blob_upload_unknown")
        return expected

    # ── Looking, and giving up ───────────────────────────────────────────────────────────────────────────────────────

    async def status(self, upload_id: str, name: RepositoryName, caller: Caller) -> Upload:
        """Raises: blob_upload_unknown."""
        repository = await self._repositories.find_existing(name, Right.PUSH, caller)
        return await self._open(upload_id, repository, caller)

    async def cancel(self, upload_id: str, name: RepositoryName, caller: Caller) -> None:
        """Raises: blob_upload_unknown."""
        repository = await self._repositories.find_existing(name, Right.PUSH, caller)
        turn = self._turn(upload_id)
        async with turn.lock:
            await self._open(upload_id, repository, caller)
            turn.begin()
            await _unbroken(self._drop(upload_id))

    async def purge(self) -> int:
        """Give up what nobody touched for a day, and old tombstones; how many those were."""
        now = self._clock.now()
        limits = {"open_before": now - IDLE_AFTER, "finished_before": now - TOMBSTONE_LIFE}
        purged = 0
        for upload_id in await self._store.idle_uploads(**limits):
            turn = self._turn(upload_id)
            async with turn.lock:
                upload = await self._store.upload(upload_id)
                # Looked at again: its client may have come back meanwhile.
                limit = limits["open_before" if upload is None or upload.finished_as is None else "finished_before"]
                if upload is not None and upload.touched_at < limit:
                    turn.begin()
                    await _unbroken(self._drop(upload_id))
                    purged += 1
        return purged

    async def _drop(self, upload_id: str) -> None:
        # The row first: a file without a row is collected, a row without its file would fail whoever goes on with it.
        await self._store.remove_upload(upload_id)
        await self._files.discard(upload_id)

    def _turn(self, upload_id: str) -> _Turn:
        """Kept for as long as any request holds it."""
        return self._turns.setdefault(upload_id, _Turn())

    async def _open(self, upload_id: str, repository: Repository, caller: Caller) -> Upload:
        upload = await self._own(upload_id, repository, caller)
        if upload.finished_as is not None:
            raise CorralError("blob_upload_unknown")
        return upload

    async def _own(self, upload_id: str, repository: Repository, caller: Caller) -> Upload:
        upload = await self._store.upload(upload_id)
        if upload is None or (upload.repository_id, upload.account_id) != (repository.id, _account(caller).id):
            raise CorralError("blob_upload_unknown")
        return upload


def range_of(upload: Upload) -> str:
    """What is there of an upload, as its answers say it in `Range`; `0-0` when nothing is, for want of another way."""
    return f"0-{max(upload.offset_bytes - 1, 0)}"


def _start_of(upload: Upload, byte_range: ByteRange | None, *, may_repeat: bool) -> int:
    """Where a chunk is to be written. Raises: range_invalid."""
    if byte_range is None or byte_range.first == upload.offset_bytes:
        return upload.offset_bytes
    # The last chunk and no other: one from further back is a request that was overtaken, and would undo what came after it.
    if may_repeat and byte_range.last == upload.offset_bytes - 1:
        return byte_range.first
    raise CorralError("range_invalid", f"the next byte is number {upload.offset_bytes}", headers={"Range": range_of(upload)})


def _expected_length(byte_range: ByteRange | None, length: int | None) -> int | None:
    return length if byte_range is None else byte_range.length


async def _exactly(chunks: AsyncIterator[bytes], length: int) -> AsyncIterator[bytes]:
    """The chunks, whose sum must be that. Raises: size_invalid."""
    received = 0
    async for chunk in chunks:
        received += len(chunk)
        if received > length:
            break
        yield chunk
    if received != length:
        raise CorralError("size_invalid", f"the body is not {length} bytes long, as was said before it")


def _account(caller: Caller) -> Account:
    if not isinstance(caller, Principal):
        raise CorralError("unauthorized")
    return caller.account


async def _unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Do the work to its end, even when the request is canceled: a row and a file change together or not at all."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody asks any more; unasked for, it would be logged
        raise
