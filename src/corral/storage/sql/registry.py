"""Repositories, links, manifests, tags and uploads in the database.

What every request asks (which repository, which right, how long a blob is, which upload) is read inline; see `Database.row`. What
changes something is one transaction, made of the functions of `content`. Looking for things to collect reads a snapshot and
decides again inside the transaction, so that a large registry does not hold up those who push to it.
"""

import itertools
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

import sqlalchemy as sa

from corral.core.ports import Clock
from corral.core.records import Account
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
from corral.storage.revocations import Kind, Revocation
from corral.storage.sql import content
from corral.storage.sql.accounts import ACCOUNT_FIELDS
from corral.storage.sql.engine import Database
from corral.storage.sql.schema import (
    accounts,
    blobs,
    collaborators,
    from_micros,
    manifests,
    repositories,
    repository_blobs,
    repository_manifests,
    tags,
    uploads,
)
from corral.wire.errors import CorralError
from corral.wire.names import Digest, parse_content_digest

#: A blob that everybody has is in thousands of repositories, and one that may be read is enough. Public ones come first.
_MAX_SOURCES = 50
_REPOSITORY = (
    "SELECT r.id, r.namespace, r.name, r.visibility, r.created_at, r.updated_at, r.quota_bytes, r.mirrored_from"
    " FROM repositories r"
    " WHERE r.namespace_key = ? AND r.name_key = ?"
)
_RIGHT = 'SELECT c."right" FROM collaborators c WHERE c.repository_id = ? AND c.account_id = ?'
_BLOB_SIZE = (
    "SELECT b.size_bytes FROM repository_blobs l JOIN blobs b ON b.digest = l.digest WHERE l.repository_id = ? AND l.digest = ?"
)
_UPLOAD = (
    "SELECT u.id, u.repository_id, u.account_id, u.offset_bytes, u.created_at, u.touched_at, u.expected, u.finished_as"
    " FROM uploads u WHERE u.id = ?"
)

# A manifest of a model has a kilobyte or three; a longer one is read in a thread. Its length is in the row's head, so that
# nothing of a long one is touched.
_MANIFEST_COLUMNS = (
    "SELECT m.digest, l.media_type, CASE WHEN length(m.body) <= 65536 THEN m.body END FROM repository_manifests l"
    " JOIN manifests m ON m.digest = l.digest"
)
_MANIFEST = f"{_MANIFEST_COLUMNS} WHERE l.repository_id = ? AND l.digest = ?"
_TAGGED = (
    f"{_MANIFEST_COLUMNS} JOIN tags t ON t.repository_id = l.repository_id AND t.manifest_digest = l.digest"
    " WHERE t.repository_id = ? AND t.tag = ?"
)


class SqlRegistry:
    """A RegistryStore."""

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    # ── Repositories ─────────────────────────────────────────────────────────────────────────────────────────────────
    async def repository(self, namespace: str, name: str) -> Repository | None:
        """One inline read by the unique index of names."""
        row = self._database.row(_REPOSITORY, namespace.lower(), name.lower())
        if row is None:
            return None
        *head, created_at, updated_at, quota_bytes, mirrored_from = row
        times = (from_micros(created_at), from_micros(updated_at))
        return content.repository_of((*head, *times, quota_bytes, mirrored_from))

    async def add_repository(self, repository: Repository, *, at_most: int | None = None) -> Repository:
        """The unique index of names decides between two who create one at once."""
        return await self._database.write(partial(content.add_repository, repository=repository, at_most=at_most))

    async def remove_unused_repositories(self, *, created_before: datetime, limit: int, repository_id: str = "") -> int:
        """Looked for on a snapshot, decided again in the transaction, where nobody can begin an upload meanwhile."""
        unused = content.unused_repositories(created_before=created_before)
        if repository_id:
            unused = unused.where(repositories.c.id == repository_id)
        found = [row.id for row in await self._read(unused.limit(limit))]
        gone = sa.delete(repositories).where(repositories.c.id.in_(unused.where(repositories.c.id.in_(found))))
        return await self._database.write(lambda connection: connection.execute(gone).rowcount) if found else 0

    async def change_repository(
        self, repository_id: str, *, visibility: Visibility | None = None, readme: str | None = None
    ) -> None:
        """One transaction."""
        changes = {"visibility": visibility, "readme": readme}
        values = {name: value for name, value in changes.items() if value is not None}
        was_public = (repositories.c.id == repository_id) & (repositories.c.visibility == Visibility.PUBLIC)
        hidden = Revocation(at=self._clock.now(), kind=Kind.PUBLIC, subject=repository_id)

        def work(connection: sa.Connection) -> None:
            hides = visibility is Visibility.PRIVATE and connection.execute(sa.select(sa.literal(1)).where(was_public)).first()
            connection.execute(sa.update(repositories).where(repositories.c.id == repository_id).values(**values))
            if hides:
                self._database.revoke(connection, hidden)

        if values:
            await self._database.write(work)

    async def readme(self, repository_id: str) -> str:
        """One inline read."""
        row = self._database.row("SELECT readme FROM repositories WHERE id = ?", repository_id)
        return str(row[0]) if row else ""

    async def set_repository_quota(self, repository_id: str, quota_bytes: int | None) -> None:
        """One column."""
        change = sa.update(repositories).where(repositories.c.id == repository_id).values(quota_bytes=quota_bytes)
        await self._database.write(lambda connection: connection.execute(change))

    async def remove_repository(self, repository_id: str) -> None:
        """One transaction."""
        await self._database.write(partial(content.remove_repository, repository_id=repository_id))

    async def repositories_of(self, namespace: str) -> Sequence[Repository]:
        """By the unique index of names."""
        query = (
            sa.select(*content.REPOSITORY_FIELDS)
            .where(repositories.c.namespace_key == namespace.lower())
            .order_by(repositories.c.name_key)
        )
        return [content.repository_of(row) for row in await self._read(query)]

    async def right_of(self, repository_id: str, account_id: str) -> Right | None:
        """One inline read by primary key."""
        row = self._database.row(_RIGHT, repository_id, account_id)
        return Right(row[0]) if row else None

    async def collaborators(self, repository_id: str) -> Sequence[Collaborator]:
        """By account name."""
        query = (
            sa.select(*ACCOUNT_FIELDS, collaborators.c.right)
            .join(accounts, accounts.c.id == collaborators.c.account_id)
            .where(collaborators.c.repository_id == repository_id, accounts.c.deleted_at.is_(None))
            .order_by(accounts.c.name_key)
        )
        rows = [dict(row._mapping) for row in await self._read(query)]
        return [Collaborator(right=Right(row.pop("right")), account=Account(**row)) for row in rows]

    async def set_collaborator(self, repository_id: str, account_id: str, right: Right | None) -> None:
        """One transaction, which also sees that the repository is still there."""
        key = {"repository_id": repository_id, "account_id": account_id}
        left = f"{repository_id} {right or ''}".strip()
        narrowed = Revocation(at=self._clock.now(), kind=Kind.COLLABORATOR, subject=account_id, value=left)

        def work(connection: sa.Connection) -> None:
            content.require_repository(connection, repository_id)
            had = connection.execute(sa.select(collaborators.c.right).filter_by(**key)).scalar_one_or_none()
            if right is None:
                connection.execute(sa.delete(collaborators).filter_by(**key))
            else:
                content.put_row(connection, collaborators, key, {"right": right})
            if had is not None and right != had and right is not Right.PUSH:
                self._database.revoke(connection, narrowed)

        await self._database.write(work)

    # ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────
    async def blob_size(self, repository_id: str, digest: Digest) -> int | None:
        """One inline read by primary keys."""
        row = self._database.row(_BLOB_SIZE, repository_id, str(digest))
        return int(row[0]) if row else None

    async def lease_blob(self, digest: Digest, size_bytes: int, *, until: datetime) -> None:
        """Relaxed: what a power cut takes away is a lease whose file nobody linked yet."""
        lease = partial(content.lease_blob, digest=digest, size_bytes=size_bytes, until=until, now=self._clock.now())
        await self._database.write_relaxed(lease)

    async def link_blob(self, repository_id: str, digest: Digest, *, until: datetime, size_bytes: int | None = None) -> bool:
        """One transaction."""

        def work(connection: sa.Connection) -> bool:
            content.require_repository(connection, repository_id)
            return content.link_blob(connection, repository_id, digest, until=until, size_bytes=size_bytes)

        return await self._database.write(work)

    async def unlink_blob(self, repository_id: str, digest: Digest) -> bool:
        """Whether a manifest names it is looked at in the same transaction (case 14)."""
        link = {"repository_id": repository_id, "digest": str(digest)}

        def work(connection: sa.Connection) -> bool:
            removed = connection.execute(sa.delete(repository_blobs).filter_by(**link)).rowcount > 0
            if removed and connection.execute(sa.select(content.is_named(repository_id, str(digest)))).scalar_one():
                raise CorralError("unsupported", "a manifest of this repository names that blob; delete the manifest first")
            return removed

        return await self._database.write(work)

    async def sources_of(self, digest: Digest) -> Sequence[Repository]:
        """Public ones first, which anybody may mount from."""
        query = (
            sa.select(*content.REPOSITORY_FIELDS)
            .join(repository_blobs, repository_blobs.c.repository_id == repositories.c.id)
            .where(repository_blobs.c.digest == str(digest))
            .order_by(repositories.c.visibility != Visibility.PUBLIC, repositories.c.id)
            .limit(_MAX_SOURCES)
        )
        return [content.repository_of(row) for row in await self._read(query)]

    async def stored_bytes(self, namespace: str, *, repository_id: str = "") -> int:
        """Three sums on one snapshot."""
        among = repositories.c.namespace_key == namespace.lower()
        if repository_id:
            among &= repositories.c.id == repository_id
        linked = (
            sa.select(blobs.c.digest, blobs.c.size_bytes)
            .join(repository_blobs, repository_blobs.c.digest == blobs.c.digest)
            .join(repositories, repositories.c.id == repository_blobs.c.repository_id)
            .where(among)
            .distinct()
            .subquery()
        )
        under_way = (
            sa.select(sa.func.coalesce(sa.func.sum(uploads.c.offset_bytes), 0))
            .join(repositories, repositories.c.id == uploads.c.repository_id)
            .where(among, uploads.c.finished_as.is_(None))
        )
        kept = (
            sa.select(manifests.c.digest, sa.func.length(manifests.c.body).label("size_bytes"))
            .join(repository_manifests, repository_manifests.c.digest == manifests.c.digest)
            .join(repositories, repositories.c.id == repository_manifests.c.repository_id)
            .where(among)
            .distinct()
            .subquery()
        )
        bodies = sa.select(sa.func.coalesce(sa.func.sum(kept.c.size_bytes), 0)).scalar_subquery()
        every = sa.select(sa.func.coalesce(sa.func.sum(linked.c.size_bytes), 0) + bodies + under_way.scalar_subquery())
        return int((await self._read(every))[0][0])

    # ── Uploads ──────────────────────────────────────────────────────────────────────────────────────────────────────
    async def add_upload(self, upload: Upload, *, max_open: int) -> None:
        """Count and insert in one transaction."""
        row = {
            "id": upload.id,
            "repository_id": upload.repository_id,
            "account_id": upload.account_id,
            "offset_bytes": upload.offset_bytes,
            "expected": str(upload.expected) if upload.expected else None,
            "finished_as": str(upload.finished_as) if upload.finished_as else None,
            "created_at": upload.created_at,
            "touched_at": upload.touched_at,
        }
        open_ones = sa.select(sa.func.count()).where(uploads.c.account_id == upload.account_id, uploads.c.finished_as.is_(None))

        def work(connection: sa.Connection) -> None:
            content.require_repository(connection, upload.repository_id)
            if connection.execute(open_ones).scalar_one() >= max_open:
                raise CorralError("rate_limited", f"{max_open} uploads are open already; finish or cancel one", retry_after_s=60)
            connection.execute(sa.insert(uploads).values(row))

        # Relaxed: an upload whose start a power cut takes away is begun again.
        await self._database.write_relaxed(work)

    async def upload(self, upload_id: str) -> Upload | None:
        """One inline read by primary key."""
        row = self._database.row(_UPLOAD, upload_id)
        if row is None:
            return None
        upload_id, repository_id, account_id, offset_bytes, created_at, touched_at, expected, finished_as = row
        return Upload(
            id=upload_id,
            repository_id=repository_id,
            account_id=account_id,
            offset_bytes=offset_bytes,
            created_at=from_micros(created_at),
            touched_at=from_micros(touched_at),
            expected=parse_content_digest(expected) if expected else None,
            finished_as=parse_content_digest(finished_as) if finished_as else None,
        )

    async def advance_upload(self, upload_id: str, *, offset_bytes: int, now: datetime) -> None:
        """Relaxed, as the bytes are that it tells of: both are in the kernel's hands, and a killed process does not lose them."""
        is_open = (uploads.c.id == upload_id) & uploads.c.finished_as.is_(None)
        change = sa.update(uploads).where(is_open).values(offset_bytes=offset_bytes, touched_at=now)
        if not await self._database.write_relaxed(lambda connection: connection.execute(change).rowcount):
            raise CorralError("blob_upload_unknown")

    async def finish_upload(self, upload_id: str, digest: Digest, *, until: datetime, now: datetime) -> None:
        """Link and tombstone in one transaction."""
        query = sa.select(uploads.c.repository_id, uploads.c.offset_bytes, uploads.c.finished_as).where(uploads.c.id == upload_id)
        finish = sa.update(uploads).where(uploads.c.id == upload_id).values(finished_as=str(digest), touched_at=now)

        def work(connection: sa.Connection) -> None:
            row = connection.execute(query).one_or_none()
            if row is None:
                raise CorralError("blob_upload_unknown")
            if row.finished_as is not None:
                if row.finished_as != str(digest):
                    raise CorralError("blob_upload_invalid", "the upload was finished as another blob")
                return
            if not content.link_blob(connection, row.repository_id, digest, until=until, size_bytes=row.offset_bytes):
                raise CorralError("busy", "that content was deleted meanwhile; try again", retry_after_s=1)
            connection.execute(finish)

        await self._database.write(work)

    async def remove_upload(self, upload_id: str) -> bool:
        """By primary key."""
        query = sa.delete(uploads).where(uploads.c.id == upload_id)
        return await self._database.write_relaxed(lambda connection: connection.execute(query).rowcount > 0)

    async def idle_uploads(self, *, open_before: datetime, finished_before: datetime) -> Sequence[str]:
        """By the index of times."""
        is_open = uploads.c.finished_as.is_(None)
        is_idle = (is_open & (uploads.c.touched_at < open_before)) | (~is_open & (uploads.c.touched_at < finished_before))
        query = sa.select(uploads.c.id).where(is_idle).order_by(uploads.c.touched_at, uploads.c.id)
        return [row.id for row in await self._read(query)]

    # ── Manifests and tags ───────────────────────────────────────────────────────────────────────────────────────────
    async def put_manifest(self, repository_id: str, new: NewManifest, tags: Sequence[str], *, now: datetime) -> None:
        """One transaction."""
        work = partial(content.put_manifest, repository_id=repository_id, new=new, tag_names=tags, now=now)
        await self._database.write(work)

    async def manifest(self, repository_id: str, reference: str | Digest) -> StoredManifest | None:
        """Tag and body from one snapshot: what is served is always what one push put there (T41). Inline where it is short and
        named exactly."""
        is_digest = isinstance(reference, Digest)
        row = self._database.row(_MANIFEST if is_digest else _TAGGED, repository_id, str(reference))
        if row is not None and row[2] is not None:
            return StoredManifest(digest=parse_content_digest(row[0]), media_type=row[1], body=row[2])
        if row is None and is_digest:
            return None
        return await self._database.read(partial(_manifest, repository_id=repository_id, reference=reference))

    async def tags(self, repository_id: str, *, after: str = "", limit: int | None = None) -> Sequence[Tag]:
        """By the index of tags."""
        query = (
            sa.select(tags.c.tag, tags.c.manifest_digest, repository_manifests.c.media_type, manifests.c.size_bytes)
            .add_columns(tags.c.updated_at)
            .join(manifests, manifests.c.digest == tags.c.manifest_digest)
            .join(
                repository_manifests,
                (repository_manifests.c.digest == tags.c.manifest_digest)
                & (repository_manifests.c.repository_id == tags.c.repository_id),
            )
            .where(tags.c.repository_id == repository_id)
            .order_by(tags.c.tag_key, tags.c.tag)
            .limit(limit)
        )
        if after:
            query = query.where(sa.tuple_(tags.c.tag_key, tags.c.tag) > sa.tuple_(after.lower(), after))
        return [
            Tag(
                name=row.tag,
                digest=parse_content_digest(row.manifest_digest),
                media_type=row.media_type,
                size_bytes=row.size_bytes,
                updated_at=row.updated_at,
            )
            for row in await self._read(query)
        ]

    async def remove_tag(self, repository_id: str, tag: str) -> bool:
        """One transaction."""
        return await self._database.write(partial(content.remove_tag, repository_id=repository_id, tag=tag))

    async def remove_manifest(self, repository_id: str, digest: Digest) -> bool:
        """One transaction."""
        return await self._database.write(partial(content.remove_manifest, repository_id=repository_id, digest=digest))

    async def referrers(
        self, repository_id: str, subject: Digest, *, artifact_type: str = "", after: str = "", limit: int, max_bytes: int
    ) -> tuple[Sequence[Referrer], bool]:
        """By the index of subjects. How long each is stands before it in the file, so only what is told of is read."""
        size_bytes = sa.func.length(manifests.c.body).label("size_bytes")
        query = (
            sa.select(manifests.c.digest, size_bytes)
            .join(repository_manifests, repository_manifests.c.digest == manifests.c.digest)
            .where(repository_manifests.c.repository_id == repository_id, manifests.c.subject == str(subject))
            .where(manifests.c.digest > after)
            .order_by(manifests.c.digest)
        )
        if artifact_type:
            query = query.where(manifests.c.artifact_type == artifact_type)
        found = await self._read(query.limit(limit + 1))
        ends = itertools.accumulate(row.size_bytes for row in found[:limit])
        count = sum(end <= max_bytes for end in ends) or min(len(found), 1)
        told = query.add_columns(repository_manifests.c.media_type, manifests.c.artifact_type, manifests.c.annotations)
        return await self._referrers(told.limit(count)) if count else (), len(found) > count

    async def _referrers(self, query: sa.Select[Any]) -> Sequence[Referrer]:
        return [
            Referrer(
                digest=parse_content_digest(row.digest),
                media_type=row.media_type,
                size_bytes=row.size_bytes,
                artifact_type=row.artifact_type,
                annotations=row.annotations.encode(),
            )
            for row in await self._read(query)
        ]

    # ── Collecting ───────────────────────────────────────────────────────────────────────────────────────────────────
    async def garbage(self, *, now: datetime) -> Garbage:
        """Two counts, each on a snapshot of its own: nothing is decided by them."""
        link = repository_blobs.c
        named = content.is_named(link.repository_id, link.digest)
        is_free = sa.select(sa.literal(1)).where(blobs.c.digest == link.digest, blobs.c.lease_until <= now).exists()
        links = sa.select(sa.func.count()).select_from(repository_blobs).where(is_free, ~named)
        is_kept = sa.select(sa.literal(1)).select_from(repository_blobs).where(link.digest == blobs.c.digest, named).exists()
        gone = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(blobs.c.size_bytes), 0)).select_from(blobs)
        count, size_bytes = tuple((await self._read(gone.where(blobs.c.lease_until <= now, ~is_kept)))[0])
        return Garbage(links=(await self._read(links))[0][0], blobs=count, size_bytes=int(size_bytes))

    async def unnamed_links(self, *, now: datetime, limit: int) -> int:
        """Looked for on a snapshot, decided again in the transaction: a manifest may have come in between."""
        link = repository_blobs.c
        is_free = sa.select(sa.literal(1)).where(blobs.c.digest == link.digest, blobs.c.lease_until <= now).exists()
        may_go = is_free & ~content.is_named(link.repository_id, link.digest)
        found = await self._read(sa.select(link.repository_id, link.digest).where(may_go).limit(limit))

        def work(connection: sa.Connection) -> int:
            return sum(
                connection.execute(sa.delete(repository_blobs).where(may_go).filter_by(**row._mapping)).rowcount for row in found
            )

        return await self._database.write(work) if found else 0

    async def condemn_blobs(self, *, now: datetime, limit: int) -> Sequence[tuple[Digest, int]]:
        """The same: the condition is checked again where nobody can link or lease meanwhile."""
        is_linked = sa.select(sa.literal(1)).where(repository_blobs.c.digest == blobs.c.digest).exists()
        may_go = ~is_linked & (blobs.c.lease_until <= now) & ~blobs.c.condemned
        found = await self._read(sa.select(blobs.c.digest).where(may_go).limit(limit))

        def work(connection: sa.Connection) -> None:
            for row in found:
                connection.execute(sa.update(blobs).where(may_go, blobs.c.digest == row.digest).values(condemned=True))

        if found:
            await self._database.write(work)
        condemned = sa.select(blobs.c.digest, blobs.c.size_bytes).where(blobs.c.condemned).order_by(blobs.c.digest)
        return [(parse_content_digest(row.digest), row.size_bytes) for row in await self._read(condemned)]

    async def forget_blob(self, digest: Digest) -> None:
        """Only a condemned one."""
        query = sa.delete(blobs).where(blobs.c.digest == str(digest), blobs.c.condemned)
        await self._database.write(lambda connection: connection.execute(query))

    async def is_known_blob(self, digest: Digest) -> bool:
        """Inline, by primary key."""
        return self._database.row("SELECT 1 FROM blobs WHERE digest = ?", str(digest)) is not None

    async def _read(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        return await self._database.read(lambda connection: connection.execute(query).all())


def _manifest(connection: sa.Connection, *, repository_id: str, reference: str | Digest) -> StoredManifest | None:
    if isinstance(reference, Digest):
        digest = str(reference)
    elif found := content.tag_named(connection, repository_id, reference):
        digest = found[1]
    else:
        return None
    query = (
        sa.select(repository_manifests.c.media_type, manifests.c.body)
        .join(manifests, manifests.c.digest == repository_manifests.c.digest)
        .where(repository_manifests.c.repository_id == repository_id, repository_manifests.c.digest == digest)
    )
    row = connection.execute(query).one_or_none()
    return StoredManifest(digest=parse_content_digest(digest), media_type=row.media_type, body=row.body) if row else None
