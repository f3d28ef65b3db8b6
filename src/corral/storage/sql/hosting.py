"""The models a hub offers, and the manifests and blobs behind them.

Blobs are files (blobs.py), everything else are rows. A blob is durable before a row links it, and all rows of one model appear in
one transaction, made of the same functions as a push: a crash leaves at most a blob that nobody links, which is collected.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from corral.core.ports import Clock, Entropy
from corral.core.records import HostedModel, Model
from corral.core.registry import NewManifest, Repository, StoredManifest, Visibility
from corral.storage.blobs import CLOSED, BlobFiles, Progress, disk_errors, in_thread_reporting
from corral.storage.models import ModelBlobs, ReadFacts
from corral.storage.sql import content
from corral.storage.sql.engine import Database
from corral.storage.sql.schema import from_micros, hosted_models, manifests, repositories, tags
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE, parse_manifest
from corral.wire.names import DEFAULT_HOST, Digest, ModelName, parse_digest, parse_name

_ID_BYTES = 16
#: How long blobs wait for the transaction that names them.
_LEASE = timedelta(hours=1)
#: Deleting a blob takes the milliseconds of one file's removal.
_TRIES, _PAUSE_S = 20, 0.05

#: Spelled out in the statement, so that `row` has one parameter.
_PUBLIC: sa.ColumnElement[str] = sa.literal_column(f"'{Visibility.PUBLIC}'")

#: A hosted model with the tag it stands for; nothing in the columns of the tag for an upstream.
_HOSTED = (
    sa.select(
        hosted_models.c.shown_name,
        hosted_models.c.upstream_url,
        hosted_models.c.upstream_model,
        # What is in a private repository is not shown to more people by being offered, whenever it became private.
        (hosted_models.c.is_public & (sa.func.coalesce(repositories.c.visibility, _PUBLIC) == _PUBLIC)).label("is_public"),
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


def _hosted_row(raw: tuple[Any, ...]) -> _Hosted:
    """A row as the file has it."""
    *head, is_public, created_at, namespace, model, tag, updated_at, digest = raw
    times = from_micros(created_at), from_micros(updated_at or 0)
    return _Hosted._make((*head, bool(is_public), times[0], namespace, model, tag, times[1], digest))


class SqlHosting:
    """A HostedStore, and the way to put models of this machine into it. cache_dir: may be deleted at any time. read_facts: how
    the headers of weights are read, which strangers may have pushed."""

    def __init__(
        self,
        database: Database,
        blobs_dir: Path,
        cache_dir: Path,
        *,
        clock: Clock,
        entropy: Entropy,
        read_facts: ReadFacts | None = None,
    ) -> None:
        self._database = database
        self._blobs = BlobFiles(blobs_dir, cache_dir, mode=CLOSED)
        self._models = ModelBlobs(self._blobs, cache_dir, read_facts)
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
        """By primary key. Raises: unavailable when the model is offered but its manifest cannot be read."""
        try:
            key = _key_of(name)
        except CorralError:
            return None
        row = self._database.look_up(_HOSTED_BY_NAME, _hosted_row, key)
        return None if row is None else await self._hosted_of(row)

    async def upstream_urls(self) -> Set[str]:
        """Of the servers that run a model for this hub."""
        query = sa.select(hosted_models.c.upstream_url).distinct()
        return set(await self._database.read(lambda connection: connection.execute(query).scalars().all()))

    async def offer(self, model: HostedModel) -> None:
        """Raises: bad_request for a name that is none, not_found when the model is in no repository of this hub."""
        await self._database.write(partial(_offer, hosted=model))

    async def offer_stored(self, name: ModelName, *, is_public: bool, now: datetime) -> None:
        """Looked up and offered in one transaction."""
        await self._database.write(partial(_offer_stored, name=name, is_public=is_public, now=now))

    async def withdraw(self, name: str) -> bool:
        """Offer it no longer. What is in the repository stays."""
        query = sa.delete(hosted_models).where(hosted_models.c.name == _key_of(name))
        return await self._database.write(lambda connection: connection.execute(query).rowcount > 0)

    async def publish_gguf(
        self,
        name: ModelName,
        path: Path,
        progress: Progress,
        *,
        is_public: bool,
        parameters: Mapping[str, object] | None = None,
    ) -> HostedModel:
        """Have the GGUF file at that path in a repository of this hub and offered under that name; at once when it already is.

        The host of the name does not matter. A tag with other weights is moved. is_public: for what is new here; who may see a
        repository that exists, and who may run what is offered, stays as it is. parameters: PARAMETERs of a model that is new.
        progress is called from a thread. Raises: as `ModelBlobs.import_gguf`, and unavailable.
        """
        name = dataclasses.replace(name, host=DEFAULT_HOST)
        current = await self._database.read(partial(_manifest_of, name=name))
        if current is not None and not await asyncio.to_thread(self._is_readable, name, current):
            current = None
        body = await self._place(path, current, parameters, progress)
        hosted = await self.get(name.short)
        if body != current or hosted is None or hosted.model is None:
            await self._database.write(partial(_publish, new=self._new(name, body, is_public=is_public)))
            hosted = await self.get(name.short)
        if hosted is None:
            raise CorralError("conflict", f"model '{name.short}' was withdrawn while it was being published")
        return hosted

    async def _place(
        self, path: Path, current: bytes | None, parameters: Mapping[str, object] | None, progress: Progress
    ) -> bytes:
        """Have the file's blobs in the store, leased; the manifest.

        Their digests are known only when they are there, so they are leased then, and put there once more if they were collected
        just before. Raises: as publish_gguf.
        """
        for _ in range(_TRIES):
            work = partial(self._models.import_gguf, path, current=current, parameters=parameters)
            body = await in_thread_reporting(work, progress)
            sizes = {blob.digest: blob.size_bytes for blob in parse_manifest(body).blobs}
            if await self._lease(sizes) and await asyncio.to_thread(self._has, sizes):
                return body
            await asyncio.sleep(_PAUSE_S)
        raise CorralError("unavailable", "the model's files are being removed; try again", retry_after_s=1)

    async def _lease(self, sizes: Mapping[Digest, int]) -> bool:
        """False while one of them is being deleted."""
        now = self._clock.now()

        def work(connection: sa.Connection) -> None:
            for digest, size_bytes in sizes.items():
                content.lease_blob(connection, digest, size_bytes, until=now + _LEASE, now=now)

        try:
            await self._database.write_relaxed(work)
        except CorralError as error:
            if error.code != "busy":
                raise
            return False
        return True

    def _has(self, sizes: Mapping[Digest, int]) -> bool:
        return all(self._blobs.size_of(digest) == size_bytes for digest, size_bytes in sizes.items())

    def _new(self, name: ModelName, body: bytes, *, is_public: bool) -> "_New":
        now = self._clock.now()
        visibility = Visibility.PUBLIC if is_public else Visibility.PRIVATE
        repository = Repository(
            id=self._entropy.bytes(_ID_BYTES).hex(),
            namespace=name.namespace,
            name=name.model,
            visibility=visibility,
            created_at=now,
            updated_at=now,
        )
        stored = StoredManifest(digest=Digest(sha256(body).hexdigest()), media_type=MANIFEST_TYPE, body=body)
        named = tuple((blob.digest, blob.size_bytes) for blob in parse_manifest(body).blobs)
        return _New(name, repository, NewManifest(manifest=stored, blobs=named), is_public, now)

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
    """A model about to be published. repository: stored if it is the first of its name."""

    name: ModelName
    repository: Repository
    manifest: NewManifest
    is_public: bool
    now: datetime


def _manifest_of(connection: sa.Connection, *, name: ModelName) -> bytes | None:
    found = _tag_of(connection, name)
    if found is None:
        return None
    query = sa.select(manifests.c.body).where(manifests.c.digest == found.manifest_digest)
    return bytes(connection.execute(query).scalar_one())


class _Tag(NamedTuple):
    """A tag of a repository, spelled as it is there."""

    repository_id: str
    tag: str
    manifest_digest: str


def _tag_of(connection: sa.Connection, name: ModelName) -> _Tag | None:
    repository = content.repository_named(connection, name.namespace, name.model)
    found = content.tag_named(connection, repository.id, name.tag) if repository else None
    return _Tag(repository.id, *found) if repository and found else None


def _offer(connection: sa.Connection, *, hosted: HostedModel) -> None:
    if (hosted.model is None) == (not hosted.upstream_url):
        raise CorralError("invalid", f"model '{hosted.name}' needs either weights of this hub or an upstream")
    _put_hosted(connection, hosted, _require_tag(connection, hosted.model.name) if hosted.model else None)


def _offer_stored(connection: sa.Connection, *, name: ModelName, is_public: bool, now: datetime) -> None:
    tag = _require_tag(connection, name)
    _put_hosted(connection, HostedModel(name=name.short, is_public=is_public, created_at=now), tag)


def _require_tag(connection: sa.Connection, name: ModelName) -> _Tag:
    tag = _tag_of(connection, name)
    if tag is None:
        raise CorralError("not_found", f"model '{name.short}' is in no repository of this hub")
    return tag


def _put_hosted(connection: sa.Connection, hosted: HostedModel, tag: _Tag | None) -> None:
    row = {
        "shown_name": parse_name(hosted.name).short,
        "repository_id": tag.repository_id if tag else None,
        "tag": tag.tag if tag else None,
        "upstream_url": hosted.upstream_url,
        "upstream_model": hosted.upstream_model,
        "upstream_key_id": "",
        "is_public": hosted.is_public,
        "created_at": hosted.created_at,
    }
    content.put_row(connection, hosted_models, {"name": _key_of(hosted.name)}, row)


def _publish(connection: sa.Connection, *, new: _New) -> None:
    repository = content.add_repository(connection, new.repository)
    for digest, size_bytes in new.manifest.blobs:
        if not content.link_blob(connection, repository.id, digest, until=new.now + _LEASE, size_bytes=size_bytes):
            raise CorralError("unavailable", "the model's files were removed meanwhile; try again", retry_after_s=1)
    found = content.tag_named(connection, repository.id, new.name.tag)
    # Another spelling of a tag that is there is that tag: Ollama's names have no case.
    tag = found[0] if found else new.name.tag
    content.put_manifest(connection, repository.id, new.manifest, [tag], now=new.now)
    # Its owner may have closed what an earlier start of this very command published.
    query = sa.select(hosted_models.c.is_public).where(hosted_models.c.name == _key_of(new.name.short))
    before = connection.execute(query).scalar_one_or_none()
    hosted = HostedModel(name=new.name.short, is_public=new.is_public if before is None else before, created_at=new.now)
    _put_hosted(connection, hosted, _Tag(repository.id, tag, str(new.manifest.manifest.digest)))
