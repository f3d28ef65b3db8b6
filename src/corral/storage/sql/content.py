"""What repositories hold, inside a transaction: links, manifests, tags, leases, and their removal. For the stores of this room.

The rules that keep pushing and collecting apart are all here. A *lease* says until when a blob is kept although nobody links it;
a *condemned* blob is being deleted and can be neither leased nor linked. Writers take turns (`Database.write` begins with the
write lock), so that nothing comes between two statements of one function.

A table of another module that refers to repositories or manifests declares its foreign key with ON DELETE CASCADE.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa

from corral.core.registry import NewManifest, Repository, Visibility
from corral.storage.sql.schema import (
    accounts,
    blobs,
    collaborators,
    hosted_models,
    manifest_blobs,
    manifests,
    repositories,
    repository_blobs,
    repository_manifests,
    tags,
    uploads,
)
from corral.wire.errors import CorralError
from corral.wire.names import Digest

#: Of values in one statement: SQLite takes 32,766 of them, and each number of them is a statement to be prepared.
_AT_ONCE = 500
_LARGEST = 2**63 - 1


def put_row(connection: sa.Connection, table: sa.Table, key: Mapping[str, object], row: Mapping[str, object]) -> None:
    """Replace the row of that key, or add it."""
    if not connection.execute(sa.update(table).filter_by(**key).values(row)).rowcount:
        connection.execute(sa.insert(table).values({**key, **row}))


def add_row(connection: sa.Connection, table: sa.Table, key: Mapping[str, object], row: Mapping[str, object]) -> None:
    """Add the row unless its key is there."""
    if connection.execute(sa.select(sa.literal(1)).select_from(table).filter_by(**key)).first() is None:
        connection.execute(sa.insert(table).values({**key, **row}))


def require_repository(connection: sa.Connection, repository_id: str) -> None:
    """Raises: name_unknown when it was removed while somebody worked in it."""
    if connection.execute(sa.select(sa.literal(1)).where(repositories.c.id == repository_id)).first() is None:
        raise CorralError("name_unknown")


# ── Repositories ─────────────────────────────────────────────────────────────────────────────────────────────────────

#: The columns of a repository, in the order `repository_of` reads them.
REPOSITORY_FIELDS = [
    getattr(repositories.c, name)
    for name in ("id", "namespace", "name", "visibility", "created_at", "updated_at", "quota_bytes", "mirrored_from")
]


def repository_of(row: Sequence[Any]) -> Repository:
    """The repository of a row of `REPOSITORY_FIELDS`."""
    repository_id, namespace, name, visibility, created_at, updated_at, quota_bytes, mirrored_from = row
    return Repository(
        id=repository_id,
        namespace=namespace,
        name=name,
        visibility=Visibility(visibility),
        created_at=created_at,
        updated_at=updated_at,
        quota_bytes=quota_bytes,
        mirrored_from=mirrored_from,
    )


def repository_named(connection: sa.Connection, namespace: str, name: str) -> Repository | None:
    """By the unique index of names."""
    is_named = (repositories.c.namespace_key == namespace.lower()) & (repositories.c.name_key == name.lower())
    row = connection.execute(sa.select(*REPOSITORY_FIELDS).where(is_named)).one_or_none()
    return repository_of(row) if row else None


def add_repository(connection: sa.Connection, repository: Repository, *, at_most: int | None = None) -> Repository:
    """Store it unless one of that name is there; which one it is now. Raises: forbidden when its namespace has that many, and in
    that of a deleted account: one that was asked for just before would stay for ever (T119)."""
    there = repository_named(connection, repository.namespace, repository.name)
    if there is None:
        _check_owner(connection, repository.namespace)
        _check_count(connection, repository.namespace, at_most)
        shown = {column.name: getattr(repository, column.name) for column in REPOSITORY_FIELDS}
        keys = {"namespace_key": repository.namespace.lower(), "name_key": repository.name.lower()}
        connection.execute(sa.insert(repositories).values({**shown, **keys}))
    return there or repository


def _check_owner(connection: sa.Connection, namespace: str) -> None:
    row = accounts.c
    gone = sa.select(sa.literal(1)).where(row.name_key == namespace.lower(), row.deleted_at.is_not(None))
    if connection.execute(gone).first() is not None:
        raise CorralError("forbidden", f"the account {namespace} is deleted")


def _check_count(connection: sa.Connection, namespace: str, at_most: int | None) -> None:
    others = sa.select(sa.func.count()).where(repositories.c.namespace_key == namespace.lower())
    if at_most is not None and connection.execute(others).scalar_one() >= at_most:
        text = f"{namespace} has {at_most} repositories, which is as many as an account may have on this hub; delete one first"
        raise CorralError("forbidden", text)


def unused_repositories(*, created_before: datetime) -> sa.Select[tuple[str]]:
    """Those that hold nothing, never held a manifest, and of which nobody decided anything."""
    row = repositories.c
    is_untouched = (row.visibility == Visibility.PRIVATE) & (row.readme == "") & row.quota_bytes.is_(None)
    # A push of a manifest is what moves the one time.
    never_pushed = (row.updated_at == row.created_at) & (row.created_at < created_before) & (row.mirrored_from == "")
    query = sa.select(row.id).where(is_untouched, never_pushed)
    for table in (repository_blobs, repository_manifests, uploads, collaborators):
        query = query.where(~sa.select(sa.literal(1)).where(table.c.repository_id == row.id).exists())
    return query


# ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lease_blob(connection: sa.Connection, digest: Digest, size_bytes: int, *, until: datetime, now: datetime) -> None:
    """Keep the blob from being collected until then. size_bytes counts only for a blob that was not known. Raises: busy."""
    kept = _renew(connection, digest, until)
    if kept is None:
        row = {"digest": str(digest), "size_bytes": size_bytes, "created_at": now, "lease_until": until, "condemned": False}
        connection.execute(sa.insert(blobs).values(row))
    elif not kept:
        raise CorralError("busy", "that content is being deleted; try again", retry_after_s=1)


def link_blob(
    connection: sa.Connection, repository_id: str, digest: Digest, *, until: datetime, size_bytes: int | None = None
) -> bool:
    """Let the repository have a blob and renew its lease. size_bytes: of content that was verified, else None. False when it is
    unknown or being deleted."""
    if not _renew(connection, digest, until):
        return False
    if size_bytes is not None:
        connection.execute(sa.update(blobs).where(blobs.c.digest == str(digest)).values(size_bytes=size_bytes))
    add_row(connection, repository_blobs, {"repository_id": repository_id, "digest": str(digest)}, {})
    return True


def _renew(connection: sa.Connection, digest: Digest, until: datetime) -> bool | None:
    """Whether the lease was renewed: False for a condemned blob, None for an unknown one."""
    query = sa.select(blobs.c.condemned, blobs.c.lease_until).where(blobs.c.digest == str(digest))
    row = connection.execute(query).one_or_none()
    if row is None or row.condemned:
        return None if row is None else False
    if row.lease_until < until:
        connection.execute(sa.update(blobs).where(blobs.c.digest == str(digest)).values(lease_until=until))
    return True


def is_named(repository_id: sa.ColumnElement[str] | str, digest: sa.ColumnElement[str] | str) -> sa.Exists:
    """Whether a manifest of that repository names the blob."""
    named = (
        sa.select(sa.literal(1))
        .select_from(manifest_blobs)
        .join(repository_manifests, repository_manifests.c.digest == manifest_blobs.c.manifest_digest)
    )
    return named.where(
        manifest_blobs.c.kind == "blob",
        manifest_blobs.c.digest == digest,
        repository_manifests.c.repository_id == repository_id,
    ).exists()


# ── Manifests and tags ───────────────────────────────────────────────────────────────────────────────────────────────


def put_manifest(
    connection: sa.Connection, repository_id: str, new: NewManifest, tag_names: Sequence[str], *, now: datetime
) -> None:
    """Store, link and tag it. Raises: name_unknown, manifest_blob_unknown, manifest_invalid."""
    touched = sa.update(repositories).where(repositories.c.id == repository_id).values(updated_at=now)
    if not connection.execute(touched).rowcount:
        raise CorralError("name_unknown")
    _check_blobs(connection, repository_id, new)
    _check_children(connection, repository_id, new)
    digest, media_type = str(new.manifest.digest), new.manifest.media_type
    described = {
        "media_type": media_type,
        "body": new.manifest.body,
        "created_at": now,
        "size_bytes": _size_of(connection, new),
        "artifact_type": new.artifact_type,
        "annotations": new.annotations.decode(),
        "subject": str(new.subject) if new.subject else None,
    }
    add_row(connection, manifests, {"digest": digest}, described)
    _name_references(connection, new)
    add_row(connection, repository_manifests, {"repository_id": repository_id, "digest": digest}, {"media_type": media_type})
    for tag in tag_names:
        _put_tag(connection, repository_id, tag, digest, now)


def _check_blobs(connection: sa.Connection, repository_id: str, new: NewManifest) -> None:
    linked = sa.select(blobs.c.digest, blobs.c.size_bytes).join(repository_blobs, repository_blobs.c.digest == blobs.c.digest)
    linked = linked.where(repository_blobs.c.repository_id == repository_id)
    wanted = {str(digest) for digest, _ in new.blobs}
    sizes = {row.digest: row.size_bytes for row in _where_in(connection, linked, blobs.c.digest, wanted)}
    for digest, size_bytes in new.blobs:
        found = sizes.get(str(digest))
        if found is None:
            raise _missing(digest)
        if found != size_bytes:
            raise CorralError("manifest_invalid", f"blob {digest} has {found} bytes, the manifest says {size_bytes}")


def _check_children(connection: sa.Connection, repository_id: str, new: NewManifest) -> None:
    there = sa.select(repository_manifests.c.digest).where(repository_manifests.c.repository_id == repository_id)
    wanted = {str(digest) for digest in new.children}
    found = {row.digest for row in _where_in(connection, there, repository_manifests.c.digest, wanted)}
    for digest in new.children:
        if str(digest) not in found:
            raise _missing(digest)


def _missing(digest: Digest) -> CorralError:
    return CorralError("manifest_blob_unknown", f"{digest} is not in this repository", detail={"digest": str(digest)})


def _size_of(connection: sa.Connection, new: NewManifest) -> int:
    children = {str(digest) for digest in new.children}
    sizes = _where_in(connection, sa.select(manifests.c.size_bytes), manifests.c.digest, children)
    # An index of indexes of … may name one large manifest over and over.
    return min(sum(size for _, size in set(new.blobs)) + sum(int(row.size_bytes) for row in sizes), _LARGEST)


def _name_references(connection: sa.Connection, new: NewManifest) -> None:
    """Note what the manifest refers to. Added to what is there: bytes that do not say what they are may have been pushed before
    as something that refers to less, and what is not named is collected."""
    digest = str(new.manifest.digest)
    wanted = {("blob", str(blob)): size_bytes for blob, size_bytes in new.blobs}
    wanted.update({("child", str(child)): 0 for child in new.children})
    query = sa.select(manifest_blobs.c.kind, manifest_blobs.c.digest).where(manifest_blobs.c.manifest_digest == digest)
    there = {(row.kind, row.digest) for row in connection.execute(query)}
    rows = [
        {"manifest_digest": digest, "kind": kind, "digest": named, "size_bytes": size_bytes}
        for (kind, named), size_bytes in wanted.items()
        if (kind, named) not in there
    ]
    if rows:
        connection.execute(sa.insert(manifest_blobs), rows)


def tag_named(connection: sa.Connection, repository_id: str, reference: str) -> tuple[str, str] | None:
    """The tag a reference means and the manifest it points at: exactly as written first, then the only one that differs by
    case."""
    query = sa.select(tags.c.tag, tags.c.manifest_digest).where(
        tags.c.repository_id == repository_id, tags.c.tag_key == reference.lower()
    )
    alike = {row.tag: row.manifest_digest for row in connection.execute(query)}
    name = reference if reference in alike else next(iter(alike)) if len(alike) == 1 else None
    return None if name is None else (name, alike[name])


def _put_tag(connection: sa.Connection, repository_id: str, tag: str, digest: str, now: datetime) -> None:
    """Point the tag at the manifest. A tag that does so already keeps its time."""
    key = {"repository_id": repository_id, "tag": tag}
    query = sa.select(tags.c.manifest_digest).filter_by(**key)
    if connection.execute(query).scalar_one_or_none() != digest:
        put_row(connection, tags, key, {"tag_key": tag.lower(), "manifest_digest": digest, "updated_at": now})


def remove_tag(connection: sa.Connection, repository_id: str, tag: str) -> bool:
    """Take a tag away, and withdraw what is hosted by it."""
    here = {"repository_id": repository_id, "tag": tag}
    connection.execute(sa.delete(hosted_models).filter_by(**here))
    return connection.execute(sa.delete(tags).filter_by(**here)).rowcount > 0


def remove_manifest(connection: sa.Connection, repository_id: str, digest: Digest) -> bool:
    """Take a manifest, and the tags that point at it, out of one repository."""
    here = {"repository_id": repository_id}
    for tag in connection.execute(sa.select(tags.c.tag).filter_by(**here, manifest_digest=str(digest))).scalars().all():
        remove_tag(connection, repository_id, tag)
    removed = connection.execute(sa.delete(repository_manifests).filter_by(**here, digest=str(digest))).rowcount
    _remove_orphans(connection, {str(digest)})
    return removed > 0


def _remove_orphans(connection: sa.Connection, digests: Collection[str]) -> None:
    """Remove those manifests that no repository has any more."""
    kept = sa.select(repository_manifests.c.digest)
    kept_ones = {row.digest for row in _where_in(connection, kept, repository_manifests.c.digest, digests)}
    for orphans in _batches(sorted(set(digests) - kept_ones)):
        connection.execute(sa.delete(manifest_blobs).where(manifest_blobs.c.manifest_digest.in_(orphans)))
        connection.execute(sa.delete(manifests).where(manifests.c.digest.in_(orphans)))


# ── Removal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def remove_repository(connection: sa.Connection, repository_id: str) -> None:
    """Remove the repository and everything that is in it and of it. Its blobs are left for collecting."""
    had = sa.select(repository_manifests.c.digest).where(repository_manifests.c.repository_id == repository_id)
    digests = connection.execute(had).scalars().all()
    for table in (tags, repository_manifests, repository_blobs, collaborators, uploads, hosted_models):
        connection.execute(sa.delete(table).where(table.c.repository_id == repository_id))
    connection.execute(sa.delete(repositories).where(repositories.c.id == repository_id))
    _remove_orphans(connection, digests)


def remove_belongings(connection: sa.Connection, account_id: str) -> None:
    """Remove the repositories in an account's namespace, what is hosted under its name, what it was let into, and its uploads
    (T119)."""
    owned = sa.select(repositories.c.id).join(accounts, accounts.c.name_key == repositories.c.namespace_key)
    for repository_id in connection.execute(owned.where(accounts.c.id == account_id)).scalars().all():
        remove_repository(connection, repository_id)
    for table in (collaborators, uploads):
        connection.execute(sa.delete(table).where(table.c.account_id == account_id))
    # What an upstream runs under the account's name is in none of its repositories.
    name = connection.execute(sa.select(accounts.c.name_key).where(accounts.c.id == account_id)).scalar_one()
    connection.execute(sa.delete(hosted_models).where(hosted_models.c.name.startswith(f"{name}/", autoescape=True)))


# ── Many at once ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _where_in(
    connection: sa.Connection, query: sa.Select[*tuple[object, ...]], column: sa.ColumnElement[str], values: Collection[str]
) -> Iterator[sa.Row[*tuple[object, ...]]]:
    for batch in _batches(values):
        # All at once: fetching row by row takes twice as long, and a manifest may name fifty thousand.
        yield from connection.execute(query.where(column.in_(batch))).all()


def _batches(values: Collection[str]) -> Iterator[list[str]]:
    rest = iter(values)
    while batch := list(islice(rest, _AT_ONCE)):
        yield batch
