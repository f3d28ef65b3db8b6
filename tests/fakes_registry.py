"""A registry's rows and files in memory, for the tests of its services. They pass the suites in tests/contracts.

Every verb of the store runs without waiting for anything, so each is a transaction on its own.
"""

import asyncio
import contextlib
import hashlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from corral.core.ports import Clock
from corral.core.registry import (
    Collaborator,
    Garbage,
    NewManifest,
    Referrer,
    Repository,
    Right,
    StoredManifest,
    Tag,
    Upload,
    Visibility,
)
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from fakes import FakeClock, MemoryAccounts

_LARGEST = 2**63 - 1


def digest_of(content: bytes, algorithm: str = "sha256") -> Digest:
    """The digest of some bytes."""
    return Digest(hashlib.new(algorithm, content).hexdigest(), algorithm)


@dataclass
class _Blob:
    size_bytes: int
    lease_until: datetime
    is_condemned: bool = False


@dataclass
class _Content:
    """What one repository holds. manifests: with the media type they have here. tags: name -> manifest, when set."""

    blobs: set[Digest] = field(default_factory=set)
    manifests: dict[Digest, NewManifest] = field(default_factory=dict)
    tags: dict[str, tuple[Digest, datetime]] = field(default_factory=dict)
    rights: dict[str, Right] = field(default_factory=dict)
    readme: str = ""

    def names(self, digest: Digest) -> bool:
        """Whether a manifest of the repository names the blob."""
        return any(digest == blob for new in self.manifests.values() for blob, _ in new.blobs)


class FakeRegistryStore:
    """A RegistryStore. accounts: where collaborators are looked up."""

    def __init__(self, accounts: MemoryAccounts | None = None) -> None:
        self._accounts = accounts or MemoryAccounts()
        self._repositories: dict[str, Repository] = {}
        self._contents: dict[str, _Content] = {}
        self._blobs: dict[Digest, _Blob] = {}
        self._uploads: dict[str, Upload] = {}

    # ── Repositories ─────────────────────────────────────────────────────────────────────────────────────────────────
    async def repository(self, namespace: str, name: str) -> Repository | None:
        wanted = (namespace.lower(), name.lower())
        return next((found for found in self._repositories.values() if _key_of(found) == wanted), None)

    async def add_repository(self, repository: Repository, *, at_most: int | None = None) -> Repository:
        there = await self.repository(repository.namespace, repository.name)
        if there is not None:
            return there
        if at_most is not None and len(await self.repositories_of(repository.namespace)) >= at_most:
            text = f"{repository.namespace} has {at_most} repositories, which is as many as an account may have on this hub"
            raise CorralError("forbidden", f"{text}; delete one first")
        self._repositories[repository.id] = repository
        self._contents[repository.id] = _Content()
        return repository

    async def change_repository(
        self, repository_id: str, *, visibility: Visibility | None = None, readme: str | None = None
    ) -> None:
        found = self._repositories.get(repository_id)
        if found is not None:
            kept = self._contents[repository_id]
            self._repositories[repository_id] = replace(found, visibility=visibility or found.visibility)
            kept.readme = kept.readme if readme is None else readme

    async def readme(self, repository_id: str) -> str:
        return self._contents[repository_id].readme if repository_id in self._contents else ""

    async def set_repository_quota(self, repository_id: str, quota_bytes: int | None) -> None:
        if repository_id in self._repositories:
            self._repositories[repository_id] = replace(self._repositories[repository_id], quota_bytes=quota_bytes)

    async def remove_repository(self, repository_id: str) -> None:
        self._repositories.pop(repository_id, None)
        self._contents.pop(repository_id, None)
        self._uploads = {key: upload for key, upload in self._uploads.items() if upload.repository_id != repository_id}

    async def remove_unused_repositories(self, *, created_before: datetime, limit: int, repository_id: str = "") -> int:
        unused = [
            found.id
            for found in self._repositories.values()
            if found.created_at < created_before
            and found.id.startswith(repository_id)
            and found == replace(found, visibility=Visibility.PRIVATE, quota_bytes=None, mirrored_from="")
            and found.updated_at == found.created_at
            and self._contents[found.id] == _Content()
            and not any(upload.repository_id == found.id for upload in self._uploads.values())
        ][:limit]
        for found_id in unused:
            await self.remove_repository(found_id)
        return len(unused)

    async def repositories_of(self, namespace: str) -> Sequence[Repository]:
        return sorted((found for found in self._repositories.values() if _key_of(found)[0] == namespace.lower()), key=_key_of)

    async def right_of(self, repository_id: str, account_id: str) -> Right | None:
        content = self._contents.get(repository_id)
        return content.rights.get(account_id) if content else None

    async def collaborators(self, repository_id: str) -> Sequence[Collaborator]:
        content = self._contents.get(repository_id, _Content())
        people = [(self._accounts.live(account_id), right) for account_id, right in content.rights.items()]
        found = [Collaborator(account=account, right=right) for account, right in people if account is not None]
        return sorted(found, key=lambda collaborator: collaborator.account.name.lower())

    async def set_collaborator(self, repository_id: str, account_id: str, right: Right | None) -> None:
        rights = self._content(repository_id).rights
        rights.pop(account_id, None)
        if right is not None:
            rights[account_id] = right

    def _content(self, repository_id: str) -> _Content:
        if repository_id not in self._contents:
            raise CorralError("name_unknown")
        return self._contents[repository_id]

    # ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────
    async def blob_size(self, repository_id: str, digest: Digest) -> int | None:
        content = self._contents.get(repository_id)
        return self._blobs[digest].size_bytes if content and digest in content.blobs else None

    async def lease_blob(self, digest: Digest, size_bytes: int, *, until: datetime) -> None:
        blob = self._blobs.setdefault(digest, _Blob(size_bytes, until))
        if blob.is_condemned:
            raise CorralError("busy", "that content is being deleted; try again")
        blob.lease_until = max(blob.lease_until, until)

    async def link_blob(self, repository_id: str, digest: Digest, *, until: datetime, size_bytes: int | None = None) -> bool:
        content, blob = self._content(repository_id), self._blobs.get(digest)
        if blob is None or blob.is_condemned:
            return False
        blob.lease_until = max(blob.lease_until, until)
        blob.size_bytes = blob.size_bytes if size_bytes is None else size_bytes
        content.blobs.add(digest)
        return True

    async def unlink_blob(self, repository_id: str, digest: Digest) -> bool:
        content = self._contents.get(repository_id, _Content())
        if digest not in content.blobs:
            return False
        if content.names(digest):
            raise CorralError("unsupported", "a manifest of this repository names that blob; delete the manifest first")
        content.blobs.remove(digest)
        return True

    async def sources_of(self, digest: Digest) -> Sequence[Repository]:
        found = (self._repositories[key] for key, content in self._contents.items() if digest in content.blobs)
        return sorted(found, key=lambda repository: (repository.visibility is not Visibility.PUBLIC, repository.id))

    async def stored_bytes(self, namespace: str, *, repository_id: str = "") -> int:
        repositories = {found.id for found in await self.repositories_of(namespace)}
        if repository_id:
            repositories &= {repository_id}
        linked = {digest for key in repositories for digest in self._contents[key].blobs}
        under_way = [
            upload.offset_bytes
            for upload in self._uploads.values()
            if upload.repository_id in repositories and upload.finished_as is None
        ]
        kept = {digest: new for key in repositories for digest, new in self._contents[key].manifests.items()}
        bodies = sum(len(new.manifest.body) for new in kept.values())
        return sum(self._blobs[digest].size_bytes for digest in linked) + bodies + sum(under_way)

    # ── Uploads ──────────────────────────────────────────────────────────────────────────────────────────────────────
    async def add_upload(self, upload: Upload, *, max_open: int) -> None:
        self._content(upload.repository_id)
        held = (other for other in self._uploads.values() if other.account_id == upload.account_id)
        if sum(1 for other in held if other.finished_as is None) >= max_open:
            raise CorralError("rate_limited", f"{max_open} uploads are open already; finish or cancel one")
        self._uploads[upload.id] = upload

    async def upload(self, upload_id: str) -> Upload | None:
        return self._uploads.get(upload_id)

    async def advance_upload(self, upload_id: str, *, offset_bytes: int, now: datetime) -> None:
        upload = self._uploads.get(upload_id)
        if upload is None or upload.finished_as is not None:
            raise CorralError("blob_upload_unknown")
        self._uploads[upload_id] = replace(upload, offset_bytes=offset_bytes, touched_at=now)

    async def finish_upload(self, upload_id: str, digest: Digest, *, until: datetime, now: datetime) -> None:
        upload = self._uploads.get(upload_id)
        if upload is None:
            raise CorralError("blob_upload_unknown")
        if upload.finished_as is not None:
            if upload.finished_as != digest:
                raise CorralError("blob_upload_invalid", "the upload was finished as another blob")
            return
        if not await self.link_blob(upload.repository_id, digest, until=until, size_bytes=upload.offset_bytes):
            raise CorralError("busy", "that content was deleted meanwhile; try again")
        self._uploads[upload_id] = replace(upload, finished_as=digest, touched_at=now)

    async def remove_upload(self, upload_id: str) -> bool:
        return self._uploads.pop(upload_id, None) is not None

    async def idle_uploads(self, *, open_before: datetime, finished_before: datetime) -> Sequence[str]:
        idle = (
            upload
            for upload in self._uploads.values()
            if upload.touched_at < (open_before if upload.finished_as is None else finished_before)
        )
        return [upload.id for upload in sorted(idle, key=lambda upload: (upload.touched_at, upload.id))]

    # ── Manifests and tags ───────────────────────────────────────────────────────────────────────────────────────────
    async def put_manifest(self, repository_id: str, new: NewManifest, tags: Sequence[str], *, now: datetime) -> None:
        content = self._content(repository_id)
        for digest, size_bytes in new.blobs:
            if digest not in content.blobs:
                raise _missing(digest)
            if self._blobs[digest].size_bytes != size_bytes:
                raise CorralError("manifest_invalid", f"blob {digest} has {self._blobs[digest].size_bytes} bytes")
        for child in new.children:
            if child not in content.manifests:
                raise _missing(child)
        content.manifests.setdefault(new.manifest.digest, new)
        for tag in tags:
            if content.tags.get(tag, (None,))[0] != new.manifest.digest:
                content.tags[tag] = (new.manifest.digest, now)
        self._repositories[repository_id] = replace(self._repositories[repository_id], updated_at=now)

    async def manifest(self, repository_id: str, reference: str | Digest) -> StoredManifest | None:
        content = self._contents.get(repository_id, _Content())
        digest: Digest | None
        if isinstance(reference, Digest):
            digest = reference
        else:
            alike = [tag for tag in content.tags if tag.lower() == reference.lower()]
            name = reference if reference in alike else alike[0] if len(alike) == 1 else ""
            digest = content.tags[name][0] if name else None
        found = content.manifests.get(digest) if digest else None
        return found.manifest if found else None

    async def tags(self, repository_id: str, *, after: str = "", limit: int | None = None) -> Sequence[Tag]:
        content = self._contents.get(repository_id, _Content())
        names = sorted((name for name in content.tags if _tag_order(name) > _tag_order(after)), key=_tag_order)
        return [self._tag(content, name) for name in names[:limit]]

    def _tag(self, content: _Content, name: str) -> Tag:
        digest, updated_at = content.tags[name]
        media_type = content.manifests[digest].manifest.media_type
        size_bytes = self._size_of(digest)
        return Tag(name=name, digest=digest, media_type=media_type, size_bytes=size_bytes, updated_at=updated_at)

    def _size_of(self, digest: Digest) -> int:
        known = (content.manifests.get(digest) for content in self._contents.values())
        new = next((found for found in known if found is not None), None)
        if new is None:  # a child that was deleted behind its index
            return 0
        own = sum(size_bytes for _, size_bytes in set(new.blobs))
        return min(own + sum(self._size_of(child) for child in set(new.children)), _LARGEST)

    async def remove_tag(self, repository_id: str, tag: str) -> bool:
        return self._contents.get(repository_id, _Content()).tags.pop(tag, None) is not None

    async def remove_manifest(self, repository_id: str, digest: Digest) -> bool:
        content = self._contents.get(repository_id, _Content())
        content.tags = {tag: target for tag, target in content.tags.items() if target[0] != digest}
        return content.manifests.pop(digest, None) is not None

    async def referrers(
        self, repository_id: str, subject: Digest, *, artifact_type: str = "", after: str = "", limit: int, max_bytes: int
    ) -> tuple[Sequence[Referrer], bool]:
        manifests = self._contents.get(repository_id, _Content()).manifests
        named = [
            new
            for digest, new in sorted(manifests.items(), key=lambda item: str(item[0]))
            if new.subject == subject and str(digest) > after and artifact_type in ("", new.artifact_type)
        ]
        ends = itertools.accumulate(len(new.manifest.body) for new in named[:limit])
        found = named[: sum(end <= max_bytes for end in ends) or 1]
        told = [
            Referrer(
                digest=new.manifest.digest,
                media_type=new.manifest.media_type,
                size_bytes=len(new.manifest.body),
                artifact_type=new.artifact_type,
                annotations=new.annotations,
            )
            for new in found
        ]
        return told, len(named) > len(told)

    # ── Collecting ───────────────────────────────────────────────────────────────────────────────────────────────────
    async def garbage(self, *, now: datetime) -> Garbage:
        kept = {digest for content in self._contents.values() for digest in content.blobs if content.names(digest)}
        free = {digest: blob for digest, blob in self._blobs.items() if blob.lease_until <= now}
        links = [digest for content in self._contents.values() for digest in content.blobs if not content.names(digest)]
        gone = [blob.size_bytes for digest, blob in free.items() if digest not in kept]
        return Garbage(links=sum(digest in free for digest in links), blobs=len(gone), size_bytes=sum(gone))

    async def unnamed_links(self, *, now: datetime, limit: int) -> int:
        links = [
            (content, digest)
            for content in self._contents.values()
            for digest in content.blobs
            if self._blobs[digest].lease_until <= now and not content.names(digest)
        ][:limit]
        for content, digest in links:
            content.blobs.remove(digest)
        return len(links)

    async def condemn_blobs(self, *, now: datetime, limit: int) -> Sequence[tuple[Digest, int]]:
        linked = {digest for content in self._contents.values() for digest in content.blobs}
        free = [digest for digest, blob in self._blobs.items() if digest not in linked and not blob.is_condemned]
        for digest in [digest for digest in free if self._blobs[digest].lease_until <= now][:limit]:
            self._blobs[digest].is_condemned = True
        condemned = [(digest, blob.size_bytes) for digest, blob in self._blobs.items() if blob.is_condemned]
        return sorted(condemned, key=lambda item: str(item[0]))

    async def forget_blob(self, digest: Digest) -> None:
        if digest in self._blobs and self._blobs[digest].is_condemned:
            del self._blobs[digest]

    async def is_known_blob(self, digest: Digest) -> bool:
        return digest in self._blobs


def _key_of(repository: Repository) -> tuple[str, str]:
    return repository.namespace.lower(), repository.name.lower()


def _tag_order(tag: str) -> tuple[str, str]:
    return tag.lower(), tag


def _missing(digest: Digest) -> CorralError:
    return CorralError("manifest_blob_unknown", f"{digest} is not in this repository", detail={"digest": str(digest)})


@dataclass
class _Writing:
    """An upload. turns: how many ever wanted it to themselves. scope: of the writer that is at it."""

    content: bytearray = field(default_factory=bytearray)
    scope: asyncio.Timeout | None = None
    turns: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    placed: Digest | None = None

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """The later wins: whoever is at it, or waits, gets conflict."""
        self.turns += 1
        turn = self.turns
        self.interrupt()
        async with self.lock:
            if turn != self.turns:
                raise _superseded()
            yield

    def interrupt(self) -> None:
        """End the writer that is at it, with conflict."""
        if self.scope is not None:
            self.scope.reschedule(asyncio.get_running_loop().time())
            self.scope = None


def _superseded() -> CorralError:
    return CorralError("conflict", "another request writes to this upload")


class FakeRegistryFiles:
    """RegistryFiles. free: bytes left; blobs: what is placed, to look at or to spoil."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or FakeClock()
        self._uploads: dict[str, _Writing] = {}
        self._touched: dict[str, datetime] = {}
        self.free = 1 << 40
        self.blobs: dict[Digest, bytes] = {}
        self.changed_at: dict[Digest, datetime] = {}

    def size_of(self, digest: Digest) -> int | None:
        content = self.blobs.get(digest)
        return None if content is None else len(content)

    def path_of(self, digest: Digest) -> str:
        return f"/nowhere/blobs/{digest.file_name}"

    def upload_bytes(self, upload_id: str) -> bytes | None:
        """What is there of an upload; None when there is no such file."""
        writing = self._uploads.get(upload_id)
        return None if writing is None or writing.placed else bytes(writing.content)

    async def append(self, upload_id: str, offset_bytes: int, chunks: AsyncIterator[bytes], *, max_bytes: int) -> int:
        writing = self._uploads.get(upload_id)
        if writing is None:
            if offset_bytes:
                raise CorralError("blob_upload_unknown")
            writing = self._uploads[upload_id] = _Writing()
        async with writing.alone():
            if len(writing.content) < offset_bytes:
                raise CorralError("blob_upload_unknown")
            writing.placed = None
            del writing.content[offset_bytes:]
            is_whole = False
            try:
                await self._receive(writing, chunks, max_bytes)
                is_whole = True
            finally:
                writing.scope = None
                if not is_whole:
                    self.free += len(writing.content) - offset_bytes
                    del writing.content[offset_bytes:]
            self._touched[upload_id] = self._clock.now()
            return len(writing.content)

    async def _receive(self, writing: _Writing, chunks: AsyncIterator[bytes], max_bytes: int) -> None:
        try:
            async with asyncio.timeout(None) as scope:
                writing.scope = scope
                async for chunk in chunks:
                    if len(writing.content) + len(chunk) > max_bytes:
                        raise CorralError("too_large", f"the upload is longer than {max_bytes} bytes")
                    if len(chunk) > self.free:
                        raise CorralError("storage_full")
                    self.free -= len(chunk)
                    writing.content += chunk
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise _superseded() from error

    async def commit(self, upload_id: str, size_bytes: int, expected: Digest) -> None:
        writing = self._uploads.get(upload_id)
        if writing is None and not size_bytes:
            writing = self._uploads[upload_id] = _Writing()
        if writing is None:
            raise CorralError("blob_upload_unknown")
        async with writing.alone():
            if writing.placed is not None and writing.placed == expected and expected in self.blobs:
                return
            if len(writing.content) < size_bytes:
                raise CorralError("blob_upload_unknown")
            del writing.content[size_bytes:]
            found = digest_of(bytes(writing.content), expected.algorithm)
            if found != expected:
                raise CorralError("digest_invalid", f"the content has the digest {found}, not {expected}")
            self._place(expected, bytes(writing.content))
            writing.placed = expected

    async def discard(self, upload_id: str) -> None:
        writing = self._uploads.pop(upload_id, None)
        self._touched.pop(upload_id, None)
        if writing is not None:
            writing.interrupt()

    async def put_bytes(self, content: bytes) -> Digest:
        if len(content) > self.free:
            raise CorralError("storage_full")
        digest = digest_of(content)
        self._place(digest, content)
        return digest

    def _place(self, digest: Digest, content: bytes) -> None:
        self.blobs.setdefault(digest, content)
        self.changed_at[digest] = self._clock.now()

    async def remove_blob(self, digest: Digest) -> None:
        self.free += len(self.blobs.pop(digest, b""))

    async def remove_strays(self, known_uploads: Sequence[str], *, now: datetime) -> int:
        limit = now - timedelta(hours=1)
        old = (key for key, touched_at in self._touched.items() if touched_at < limit and key not in known_uploads)
        strays = [key for key in old if self.upload_bytes(key) is not None]
        for upload_id in strays:
            await self.discard(upload_id)
        return len(strays)

    async def blobs_on_disk(self) -> AsyncIterator[tuple[Digest, datetime]]:
        for digest in list(self.blobs):
            yield digest, self.changed_at[digest]

    async def free_bytes(self) -> int:
        return self.free
