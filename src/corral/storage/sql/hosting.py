"""The models a hub offers, and the manifests and blobs behind them.

Blobs are files (blobs.py), everything else are rows. A blob is durable before a row names it, and all rows of one model appear in
one transaction: a crash leaves at most a blob that nobody names.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from corral.core.ports import Clock, Entropy
from corral.core.records import HostedModel, Model
from corral.storage.blobs import CLOSED, BlobFiles, Progress, disk_errors, in_thread_reporting
from corral.storage.models import ModelBlobs
from corral.storage.sql.engine import Database
from corral.storage.sql.schema import (
    blobs,
    from_micros,
    hosted_models,
    manifests,
    repositories,
    repository_blobs,
    repository_manifests,
    tags,
)
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE, Manifest, parse_manifest
from corral.wire.names import DEFAULT_HOST, Digest, ModelName, parse_digest, parse_name

_ID_BYTES = 16

#: A hosted model with the tag it stands for; nothing in the columns of the tag for an upstream.
_HOSTED = (
    sa.select(
        hosted_models.c.shown_name,
        hosted_models.c.upstream_url,
        hosted_models.c.upstream_model,
        hosted_models.c.is_public,
        hosted_models.c.created_at,
        repositories.c.namespace,
        repositories.c.name.label("model"),
        tags.c.tag,
        tags.c.updated_at,
        tags.c.manifest_digest,
    )
    .select_from(hosted_models)
    .outerjoin(repositories, repositories.c.id == hosted_models.c.repository_id)
    .outerjoin(tags, (tags.c.repository_id == repositories.c.id) & (tags.c.tag == hosted_models.c.tag))
)
#: The same for one name, as `Database.row` takes it: what it finds is as the file has it, times in microseconds.
_HOSTED_BY_NAME = str(_HOSTED.where(hosted_models.c.name == sa.bindparam("name")).compile(dialect=sqlite.dialect()))


class _Hosted(NamedTuple):
    """A row of `_HOSTED`."""

    shown_name: str
    upstream_url: str
    upstream_model: str
    is_public: bool
    created_at: datetime
    namespace: str | None
    model: str | None
    tag: str | None
    updated_at: datetime
    manifest_digest: str


class SqlHosting:
    """A HostedStore, and the way to put models of this machine into it. cache_dir: may be deleted at any time."""

    def __init__(self, database: Database, blobs_dir: Path, cache_dir: Path, *, clock: Clock, entropy: Entropy) -> None:
        self._database = database
        self._blobs = BlobFiles(blobs_dir, cache_dir, mode=CLOSED)
        self._models = ModelBlobs(self._blobs, cache_dir)
        self._clock = clock
        self._entropy = entropy

    async def list(self) -> Sequence[HostedModel]:
        """By name. A model whose manifest cannot be read is skipped."""
        hosted = []
        query = _HOSTED.order_by(hosted_models.c.name)
        for row in await self._database.read(lambda connection: connection.execute(query).all()):
            with contextlib.suppress(CorralError):
                hosted.append(await self._hosted_of(_Hosted._make(row)))
        return hosted

    async def get(self, name: str) -> HostedModel | None:
        """One inline read by primary key. Raises: unavailable when the model is offered but its manifest cannot be read."""
        try:
            key = _key_of(name)
        except CorralError:
            return None
        raw = self._database.row(_HOSTED_BY_NAME, key)
        if raw is None:
            return None
        *head, is_public, created_at, namespace, model, tag, updated_at, digest = raw
        times = from_micros(created_at), from_micros(updated_at or 0)
        row = _Hosted._make((*head, bool(is_public), times[0], namespace, model, tag, times[1], digest))
        return await self._hosted_of(row)

    async def offer(self, model: HostedModel) -> None:
        """Raises: bad_request for a name that is none, not_found when the model is in no repository of this hub."""
        await self._database.write(partial(_offer, hosted=model))

    async def withdraw(self, name: str) -> bool:
        """Offer it no longer. What is in the repository stays."""
        query = sa.delete(hosted_models).where(hosted_models.c.name == _key_of(name))
        return await self._database.write(lambda connection: connection.execute(query).rowcount > 0)

    async def publish_gguf(self, name: ModelName, path: Path, progress: Progress, *, is_public: bool) -> HostedModel:
        """Have the GGUF file at that path in a repository of this hub and offered under that name; at once when it already is.

        The host of the name does not matter. A tag with other weights is moved. progress is called from a thread. Raises: as
        `ModelBlobs.import_gguf`, and unavailable.
        """
        name = dataclasses.replace(name, host=DEFAULT_HOST)
        current = await self._database.read(partial(_manifest_of, name=name))
        if current is not None and not await asyncio.to_thread(self._is_readable, name, current):
            current = None
        body = await in_thread_reporting(partial(self._models.import_gguf, path, current=current), progress)
        hosted = await self.get(name.short)
        if body != current or hosted is None or hosted.model is None or hosted.is_public != is_public:
            repository_id = self._entropy.bytes(_ID_BYTES).hex()
            new = _New(name, body, parse_manifest(body), is_public, repository_id, self._clock.now())
            await self._database.write(partial(_publish, new=new))
            hosted = await self.get(name.short)
        if hosted is None:
            raise CorralError("conflict", f"model '{name.short}' was withdrawn while it was being published")
        return hosted

    async def remove_stale(self) -> None:
        """Remove what killed processes left behind. For the start of a server."""
        with disk_errors("the model store"):
            await asyncio.to_thread(self._blobs.remove_stale, self._clock.now())

    def _is_readable(self, name: ModelName, body: bytes) -> bool:
        try:
            self._models.read(name, body, self._clock.now())
        except CorralError:
            return False
        return True

    async def _hosted_of(self, row: _Hosted) -> HostedModel:
        model = None if row.upstream_url else await self._model_of(row)
        return HostedModel(
            name=row.shown_name,
            model=model,
            upstream_url=row.upstream_url,
            upstream_model=row.upstream_model,
            is_public=row.is_public,
            created_at=row.created_at,
        )

    async def _model_of(self, row: _Hosted) -> Model:
        if row.namespace is None or row.model is None or row.tag is None:
            raise CorralError("unavailable", f"model '{row.shown_name}' is offered but its tag is gone")
        name = ModelName(DEFAULT_HOST, row.namespace, row.model, row.tag)
        # In memory after the first time: this is on the path of every request for a hosted model.
        known = self._models.known(name, parse_digest(row.manifest_digest), row.updated_at)
        if known is not None:
            return known
        query = sa.select(manifests.c.body).where(manifests.c.digest == row.manifest_digest)
        body = await self._database.read(lambda connection: connection.execute(query).scalar_one())
        try:
            return await asyncio.to_thread(self._models.read, name, body, row.updated_at)
        except CorralError as error:
            raise CorralError("unavailable", f"model '{name.short}' is damaged: {error.message}") from error


def _key_of(name: str) -> str:
    """How a hosted model's name is compared. Raises: bad_request."""
    return parse_name(name).key.short


# ── Work inside a transaction ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _New:
    """A model about to be published. repository_id: used if it is the first of its repository."""

    name: ModelName
    body: bytes
    document: Manifest
    is_public: bool
    repository_id: str
    now: datetime

    @property
    def digest(self) -> str:
        """Of the manifest."""
        return str(Digest(sha256(self.body).hexdigest()))


def _is_repository(name: ModelName) -> sa.ColumnElement[bool]:
    return (repositories.c.namespace_key == name.key.namespace) & (repositories.c.name_key == name.key.model)


def _manifest_of(connection: sa.Connection, *, name: ModelName) -> bytes | None:
    query = (
        sa.select(manifests.c.body)
        .join(tags, tags.c.manifest_digest == manifests.c.digest)
        .join(repositories, repositories.c.id == tags.c.repository_id)
        .where(_is_repository(name), tags.c.tag_key == name.key.tag)
    )
    return connection.execute(query).scalar_one_or_none()


def _offer(connection: sa.Connection, *, hosted: HostedModel) -> None:
    if (hosted.model is None) == (not hosted.upstream_url):
        raise CorralError("invalid", f"model '{hosted.name}' needs either weights of this hub or an upstream")
    repository_id = tag = None
    if hosted.model is not None:
        repository_id, tag = _tag_of(connection, hosted.model.name)
    upstream = {"upstream_url": hosted.upstream_url, "upstream_model": hosted.upstream_model, "upstream_key_id": ""}
    source = {"repository_id": repository_id, "tag": tag, **upstream}
    shown = {"shown_name": parse_name(hosted.name).short, "is_public": hosted.is_public, "created_at": hosted.created_at}
    _put(connection, hosted_models, {"name": _key_of(hosted.name)}, {**source, **shown})


def _tag_of(connection: sa.Connection, name: ModelName) -> tuple[str, str]:
    query = (
        sa.select(tags.c.repository_id, tags.c.tag)
        .join(repositories, repositories.c.id == tags.c.repository_id)
        .where(_is_repository(name), tags.c.tag_key == name.key.tag)
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        raise CorralError("not_found", f"model '{name.short}' is in no repository of this hub")
    return row.repository_id, row.tag


def _publish(connection: sa.Connection, *, new: _New) -> None:
    repository_id = _put_repository(connection, new)
    for blob in new.document.blobs:
        digest = str(blob.digest)
        _add(connection, blobs, {"digest": digest}, {"size_bytes": blob.size_bytes, "created_at": new.now})
        _add(connection, repository_blobs, {"repository_id": repository_id, "digest": digest}, {})
    described = {"media_type": MANIFEST_TYPE, "body": new.body, "created_at": new.now}
    _add(connection, manifests, {"digest": new.digest}, described)
    _add(connection, repository_manifests, {"repository_id": repository_id, "digest": new.digest}, {})
    _put_tag(connection, new, repository_id)
    source = {
        "repository_id": repository_id,
        "tag": new.name.tag,
        "upstream_url": "",
        "upstream_model": "",
        "upstream_key_id": "",
    }
    shown = {"shown_name": new.name.short, "is_public": new.is_public, "created_at": new.now}
    _put(connection, hosted_models, {"name": new.name.key.short}, {**source, **shown})


def _put_repository(connection: sa.Connection, new: _New) -> str:
    """The repository's id, made if need be."""
    visibility = "public" if new.is_public else "private"
    changed = connection.execute(sa.update(repositories).where(_is_repository(new.name)).values(visibility=visibility))
    if not changed.rowcount:
        row = {
            "id": new.repository_id,
            "namespace": new.name.namespace,
            "name": new.name.model,
            "namespace_key": new.name.key.namespace,
            "name_key": new.name.key.model,
            "visibility": visibility,
            "created_at": new.now,
        }
        connection.execute(sa.insert(repositories).values(row))
    return str(connection.execute(sa.select(repositories.c.id).where(_is_repository(new.name))).scalar_one())


def _put_tag(connection: sa.Connection, new: _New, repository_id: str) -> None:
    """Point the tag at the manifest. A tag that does so already keeps its time."""
    key = {"repository_id": repository_id, "tag_key": new.name.key.tag}
    query = sa.select(tags.c.manifest_digest).filter_by(**key)
    if connection.execute(query).scalar_one_or_none() != new.digest:
        _put(connection, tags, key, {"tag": new.name.tag, "manifest_digest": new.digest, "updated_at": new.now})


def _put(connection: sa.Connection, table: sa.Table, key: Mapping[str, object], row: Mapping[str, object]) -> None:
    """Replace the row of that key, or add it. Writers take turns, so that nothing comes between the two statements."""
    if not connection.execute(sa.update(table).filter_by(**key).values(row)).rowcount:
        connection.execute(sa.insert(table).values({**key, **row}))


def _add(connection: sa.Connection, table: sa.Table, key: Mapping[str, object], row: Mapping[str, object]) -> None:
    """Add the row unless its key is there."""
    if connection.execute(sa.select(sa.literal(1)).select_from(table).filter_by(**key)).first() is None:
        connection.execute(sa.insert(table).values({**key, **row}))
