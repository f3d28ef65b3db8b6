"""The condition of blobs in the database: two times in each blob's row, and the models that a damaged one belongs to."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from corral.core.scrubbing import BlobToCheck, HurtBlob
from corral.storage.sql.engine import Database
from corral.storage.sql.schema import blobs, manifest_blobs, repositories, repository_blobs, repository_manifests, tags
from corral.wire.names import Digest, parse_content_digest


class SqlScrubbing:
    """A ScrubStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def blobs_to_check(self, *, checked_before: datetime, limit: int, after: str = "") -> Sequence[BlobToCheck]:
        """By primary key."""
        query = (
            sa.select(blobs.c.digest, blobs.c.size_bytes, blobs.c.damaged_at)
            .where(_is_due(checked_before), blobs.c.digest > after)
            .order_by(blobs.c.digest)
            .limit(limit)
        )
        return [
            BlobToCheck(digest=parse_content_digest(row.digest), size_bytes=row.size_bytes, is_damaged=row.damaged_at is not None)
            for row in await self._read(query)
        ]

    async def bytes_to_check(self, *, checked_before: datetime) -> int:
        """One sum."""
        query = sa.select(sa.func.coalesce(sa.func.sum(blobs.c.size_bytes), 0)).where(_is_due(checked_before))
        return int((await self._read(query))[0][0])

    async def note_check(self, digest: Digest, *, at: datetime, is_damaged: bool) -> None:
        """Relaxed: what a power cut takes away is found out again. The time that a damage was first seen stays."""
        since = sa.func.coalesce(blobs.c.damaged_at, sa.literal(at, blobs.c.damaged_at.type)) if is_damaged else None
        change = sa.update(blobs).where(blobs.c.digest == str(digest)).values(checked_at=at, damaged_at=since)
        await self._database.write_relaxed(lambda connection: connection.execute(change))

    async def hurt_blobs(self) -> Sequence[HurtBlob]:
        """One read for the blobs, and one for each: there are few, or the disk is worth no more."""
        query = sa.select(blobs.c.digest, blobs.c.size_bytes, blobs.c.damaged_at)
        rows = await self._read(
            query.where(blobs.c.damaged_at.is_not(None), _is_linked(), ~blobs.c.condemned).order_by(blobs.c.digest)
        )
        return [
            HurtBlob(
                digest=parse_content_digest(row.digest),
                size_bytes=row.size_bytes,
                since=row.damaged_at,
                models=await self._models_of(row.digest),
            )
            for row in rows
        ]

    async def _models_of(self, digest: str) -> tuple[str, ...]:
        here = (repository_manifests.c.repository_id == repository_blobs.c.repository_id) & repository_manifests.c.digest.in_(
            sa.select(manifest_blobs.c.manifest_digest).where(manifest_blobs.c.kind == "blob", manifest_blobs.c.digest == digest)
        )
        tagged = (tags.c.repository_id == repository_manifests.c.repository_id) & (
            tags.c.manifest_digest == repository_manifests.c.digest
        )
        query = (
            sa.select(repositories.c.namespace, repositories.c.name, repository_manifests.c.digest, tags.c.tag)
            .select_from(repository_blobs)
            .join(repositories, repositories.c.id == repository_blobs.c.repository_id)
            .outerjoin(repository_manifests, here)
            .outerjoin(tags, tagged)
            .where(repository_blobs.c.digest == digest)
        )
        return tuple(sorted(_shown(row.namespace, row.name, row.digest, row.tag) for row in await self._read(query)))

    async def _read(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        return await self._database.read(lambda connection: connection.execute(query).all())


def _is_linked() -> sa.Exists:
    return sa.select(sa.literal(1)).where(repository_blobs.c.digest == blobs.c.digest).exists()


def _is_due(checked_before: datetime) -> sa.ColumnElement[bool]:
    """Of a blob without a link nobody verified the size, and it goes away by itself."""
    is_old = sa.func.coalesce(blobs.c.checked_at, blobs.c.created_at) < checked_before
    return (is_old | blobs.c.damaged_at.is_not(None)) & _is_linked() & ~blobs.c.condemned


def _shown(namespace: str, name: str, manifest: str | None, tag: str | None) -> str:
    if tag is not None:
        return f"{namespace}/{name}:{tag}"
    return f"{namespace}/{name}@{manifest}" if manifest is not None else f"{namespace}/{name}"
