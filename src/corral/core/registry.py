"""The registry's vocabulary: repositories, uploads and manifests, and what its services need from a database and a disk.

A *repository* is a namespace and a name; content is global and addressed by digest, the right to it is a *link* per repository.
An *upload* is content on its way. A *lease* keeps content that no manifest names yet from being collected.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from corral.core.records import Account
from corral.wire.names import Digest


class Visibility(StrEnum):
    """Who may pull from a repository: its own people, or anybody."""

    PRIVATE = "private"
    PUBLIC = "public"


class Right(StrEnum):
    """What somebody may do in a repository, in the words of token scopes. Each implies those before it."""

    PULL = "pull"
    PUSH = "push"
    #: Removing content, and changing who may do what.
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository. namespace, name: as first written; name may hold slashes (OCI tools nest as they like). quota_bytes: None
    where only the account's counts. mirrored_from: the URL of the repository elsewhere that a mirror keeps this one from, else
    empty. Its README is not here: read with every request, it would make a private repository answer later than one that does not
    exist (T29)."""

    id: str
    namespace: str
    name: str
    visibility: Visibility
    created_at: datetime
    updated_at: datetime
    quota_bytes: int | None = None
    mirrored_from: str = ""

    @property
    def path(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collaborator:
    """Somebody whom a repository's owner let in."""

    account: Account
    right: Right


@dataclass(frozen=True, slots=True)
class Grant:
    """What a registry token is good for in one repository. actions: words of `Right`."""

    repository: str
    actions: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An open upload, or one that was finished lately. offset_bytes: what is durable of it. expected: the digest announced at its
    start. finished_as: set once it is a blob, so that a repeated commit can be answered again."""

    id: str
    repository_id: str
    account_id: str
    offset_bytes: int
    created_at: datetime
    touched_at: datetime
    expected: Digest | None = None
    finished_as: Digest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredManifest:
    """A manifest as it was pushed: its digest is over body. is_stub: nobody pushed it, it stands for a model that is hosted."""

    digest: Digest
    media_type: str
    body: bytes
    is_stub: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NewManifest:
    """A manifest to be stored, with what it refers to. blobs, children: must be in the repository. subject: need not exist.
    artifact_type, annotations: what a referrers listing repeats; annotations as a JSON object."""

    manifest: StoredManifest
    blobs: tuple[tuple[Digest, int], ...] = ()
    children: tuple[Digest, ...] = ()
    subject: Digest | None = None
    artifact_type: str = ""
    annotations: bytes = b"{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Referrer:
    """A manifest that names another as its subject."""

    digest: Digest
    media_type: str
    size_bytes: int
    artifact_type: str
    annotations: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A tag and what it points at. size_bytes: all blobs of the manifest, each once."""

    name: str
    digest: Digest
    media_type: str
    size_bytes: int
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What could be collected. links: of blobs that no manifest of their repository names. blobs: which then nobody has any more,
    with those that are being deleted. size_bytes: of those blobs."""

    links: int = 0
    blobs: int = 0
    size_bytes: int = 0


class RegistryStore(Protocol):
    """Repositories, links, manifests, tags and uploads. Every verb that changes something is one durable transaction. Names
    compare without regard to case."""

    # ── Repositories ─────────────────────────────────────────────────────────────────────────────────────────────────
    async def repository(self, namespace: str, name: str) -> Repository | None:
        """One indexed read; on the path of every request."""
        ...

    async def add_repository(self, repository: Repository, *, at_most: int | None = None) -> Repository:
        """Store it; of two who create one at once, both get the one that is there afterwards. Raises: forbidden when its
        namespace has that many others."""
        ...

    async def change_repository(
        self, repository_id: str, *, visibility: Visibility | None = None, readme: str | None = None
    ) -> None: ...

    async def readme(self, repository_id: str) -> str:
        """Markdown, as its owner wrote it."""
        ...

    async def set_repository_quota(self, repository_id: str, quota_bytes: int | None) -> None: ...

    async def remove_repository(self, repository_id: str) -> None:
        """With its links, tags, uploads and collaborators, and what was hosted from it. Blobs stay until they are collected."""
        ...

    async def remove_unused_repositories(self, *, created_before: datetime, limit: int, repository_id: str = "") -> int:
        """Remove repositories that hold nothing, never held a manifest, and of which nobody decided anything; how many those
        were. repository_id: only that one."""
        ...

    async def repositories_of(self, namespace: str) -> Sequence[Repository]:
        """By name."""
        ...

    async def right_of(self, repository_id: str, account_id: str) -> Right | None:
        """A collaborator's right: one indexed read."""
        ...

    async def collaborators(self, repository_id: str) -> Sequence[Collaborator]:
        """By account name."""
        ...

    async def set_collaborator(self, repository_id: str, account_id: str, right: Right | None) -> None:
        """None takes the right away."""
        ...

    # ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────
    async def blob_size(self, repository_id: str, digest: Digest) -> int | None:
        """Bytes of a blob that this repository links; None for any other, whatever the store holds. One indexed read."""
        ...

    async def lease_blob(self, digest: Digest, size_bytes: int, *, until: datetime) -> None:
        """Announce that a file of that digest is about to be placed or linked; it is not collected before `until`. Raises: busy
        while that very digest is being deleted (milliseconds; try again)."""
        ...

    async def link_blob(self, repository_id: str, digest: Digest, *, until: datetime, size_bytes: int | None = None) -> bool:
        """Let the repository have a blob, and renew its lease. False when no such blob is known, or it is being deleted.

        size_bytes: of content that was verified just now; None takes what is known of a blob that others have. Raises:
        name_unknown when the repository is gone."""
        ...

    async def unlink_blob(self, repository_id: str, digest: Digest) -> bool:
        """False when it was not linked. Raises: unsupported when a manifest of this repository names it."""
        ...

    async def sources_of(self, digest: Digest) -> Sequence[Repository]:
        """Some repositories that link the blob, for mounting without naming a source."""
        ...

    async def stored_bytes(self, namespace: str, *, repository_id: str = "") -> int:
        """What a namespace (or one of its repositories) takes up: linked blobs and manifests, each once; uploads under way."""
        ...

    # ── Uploads ──────────────────────────────────────────────────────────────────────────────────────────────────────
    async def add_upload(self, upload: Upload, *, max_open: int) -> None:
        """Raises: rate_limited when the account has that many open ones, name_unknown when the repository is gone."""
        ...

    async def upload(self, upload_id: str) -> Upload | None: ...

    async def advance_upload(self, upload_id: str, *, offset_bytes: int, now: datetime) -> None:
        """Survives a killed process, as the bytes themselves do until they are committed. Raises: blob_upload_unknown when it is
        not open any more."""
        ...

    async def finish_upload(self, upload_id: str, digest: Digest, *, until: datetime, now: datetime) -> None:
        """Link the blob (leased before) to the upload's repository and keep the upload as a tombstone, both or neither.

        The upload's offset, advanced before, is the blob's size: a lease is taken before content is verified, so what it says of
        the size is not trusted. Finishing again as the same digest changes nothing. Raises: blob_upload_unknown,
        blob_upload_invalid when it was finished as another digest, busy when the blob was deleted meanwhile (commit again)."""
        ...

    async def remove_upload(self, upload_id: str) -> bool: ...

    async def idle_uploads(self, *, open_before: datetime, finished_before: datetime) -> Sequence[str]:
        """Open ones that were last touched before the one time, tombstones older than the other."""
        ...

    # ── Manifests and tags ───────────────────────────────────────────────────────────────────────────────────────────
    async def put_manifest(self, repository_id: str, new: NewManifest, tags: Sequence[str], *, now: datetime) -> None:
        """Store, link and tag in one transaction. Raises: manifest_blob_unknown when a blob or child is not in this repository,
        manifest_invalid when a blob has another size than stated, name_unknown when the repository is gone."""
        ...

    async def manifest(self, repository_id: str, reference: str | Digest) -> StoredManifest | None:
        """By digest, or by tag: exactly as written first, then the only one that differs by case."""
        ...

    async def tags(self, repository_id: str, *, after: str = "", limit: int | None = None) -> Sequence[Tag]:
        """In the order of (lower case, as written), behind `after`."""
        ...

    async def remove_tag(self, repository_id: str, tag: str) -> bool:
        """Exactly as written. What is hosted by it is withdrawn."""
        ...

    async def remove_manifest(self, repository_id: str, digest: Digest) -> bool:
        """With every tag that points at it. Its blobs stay linked until `unnamed_links`."""
        ...

    async def referrers(
        self, repository_id: str, subject: Digest, *, artifact_type: str = "", after: str = "", limit: int, max_bytes: int
    ) -> tuple[Sequence[Referrer], bool]:
        """Some, by digest, and whether there are more. artifact_type: only of that type. after: the digest of the last one that
        was told of. limit, max_bytes: how many at most, and of how many bytes their manifests together, but one always: what is
        told of them can be as long as they are."""
        ...

    # ── Collecting ───────────────────────────────────────────────────────────────────────────────────────────────────
    async def garbage(self, *, now: datetime) -> Garbage:
        """What `unnamed_links` and `condemn_blobs` would find. Changes nothing."""
        ...

    async def unnamed_links(self, *, now: datetime, limit: int) -> int:
        """Remove links of blobs that no manifest of their repository names and whose lease is past; how many those were."""
        ...

    async def condemn_blobs(self, *, now: datetime, limit: int) -> Sequence[tuple[Digest, int]]:
        """Mark blobs that nobody links and whose lease is past as being deleted, and return them with those marked before. From
        now on they cannot be linked or leased."""
        ...

    async def forget_blob(self, digest: Digest) -> None:
        """The file of a condemned blob is gone."""
        ...

    async def is_known_blob(self, digest: Digest) -> bool:
        """Whether any row tells of it."""
        ...


class RegistryFiles(Protocol):
    """The hub's blobs on disk, and content on its way there: one growing file per upload, hashed while it grows."""

    def size_of(self, digest: Digest) -> int | None:
        """Bytes, or None when there is no such file."""
        ...

    def path_of(self, digest: Digest) -> str:
        """Where the blob's file is, for sending it."""
        ...

    async def append(self, upload_id: str, offset_bytes: int, chunks: AsyncIterator[bytes], *, max_bytes: int) -> int:
        """Write what arrives at that offset; the new end, durable enough to survive a killed process. What lay behind offset is
        cut off first. When anything goes wrong, canceling included, the file is cut back to offset. Of two writers of one upload,
        the later one wins and the earlier gets conflict.

        max_bytes: how long the whole upload may become. Raises: too_large beyond that, storage_full, unavailable,
        blob_upload_unknown when less than offset is there."""
        ...

    async def commit(self, upload_id: str, size_bytes: int, expected: Digest) -> None:
        """Verify, sync and place under its digest; a blob that is there already stays. The upload's file is gone afterwards; the
        same commit again is answered the same until `discard`, also by the next process. A writer that is at it gets conflict.

        Raises: digest_invalid (the file stays, for a retry), storage_full, unavailable, blob_upload_unknown when less than
        size_bytes is there (what lies behind is cut off)."""
        ...

    async def discard(self, upload_id: str) -> None:
        """Forget the upload and remove its file. A writer that is at it gets conflict."""
        ...

    async def put_bytes(self, content: bytes) -> Digest:
        """Place a small blob."""
        ...

    async def remove_blob(self, digest: Digest) -> None:
        """Gone already is as well. Raises: unavailable."""
        ...

    async def remove_strays(self, known_uploads: Sequence[str], *, now: datetime) -> int:
        """Remove upload files that no upload row names and temporary files of killed processes; how many those were. Younger than
        an hour they stay: their row may be newer than the list."""
        ...

    def blobs_on_disk(self) -> AsyncIterator[tuple[Digest, datetime]]:
        """Every blob file with its last change, for finding those that no row tells of."""
        ...

    async def free_bytes(self) -> int: ...
