"""Collecting never races a push: every order in which their steps can come is tried, on the database and real files."""

import asyncio
import itertools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import sqlalchemy as sa

from corral.core.registry import NewManifest, Repository, StoredManifest, Upload, Visibility
from corral.storage.revocations import RevocationLog
from corral.storage.sql.accounts import SqlAccounts
from corral.storage.sql.engine import Database, open_database
from corral.storage.sql.registry import SqlRegistry
from corral.storage.uploads import UploadFiles
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from fakes import NOON, FakeClock
from fakes_registry import digest_of
from identity_hub import error_of
from identity_stores import account

T = TypeVar("T")

ADA = account("Ada")
LATER = NOON + timedelta(days=1)
#: Bytes of every blob here.
SIZE = 7

Step = Callable[[], Awaitable[object]]


class Gated(Database):
    """A database that does something between one read and the write that comes of it."""

    between: Callable[[], Awaitable[object]] | None = None

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        found = await super().read(work)
        between, self.between = self.between, None
        if between is not None:
            await between()
        return found


class Registry:
    """A store and its files, and the steps of those who work on them: on one blob at a time."""

    def __init__(self, directory: Path, template: Path) -> None:
        self.database = Gated(Path(shutil.copy(template, directory / "hub.db")), RevocationLog(directory / "revocations.log"))
        self.store = SqlRegistry(self.database, clock=FakeClock())
        self.files = UploadFiles(directory / "blobs", directory / "cache")
        self._path = directory / "hub.db"
        self._round = 0

    @property
    def content(self) -> bytes:
        return f"{self._round:07}".encode()

    @property
    def digest(self) -> Digest:
        return digest_of(self.content)

    @property
    def manifest(self) -> NewManifest:
        model = StoredManifest(digest=self.digest, media_type="application/json", body=self.content)
        return NewManifest(manifest=model, blobs=((self.digest, SIZE),))

    async def next_round(self) -> None:
        """Leave nothing, and go on to another blob."""
        for repository in await self.store.repositories_of("Ada"):
            await self.store.remove_repository(repository.id)
        for digest, _ in await self.store.condemn_blobs(now=LATER, limit=9):
            await self.store.forget_blob(digest)
        self._round += 1

    async def repository(self, name: str) -> Repository:
        new = Repository(id=name, namespace="Ada", name=name, visibility=Visibility.PRIVATE, created_at=NOON, updated_at=NOON)
        return await self.store.add_repository(new)

    async def receive(self, name: str) -> list[Step]:
        """An upload whose bytes are there. The steps of its commit and of the manifest behind it."""
        await self.repository(name)
        upload_id = f"{name}-{self._round}"
        upload = Upload(id=upload_id, repository_id=name, account_id=ADA.id, offset_bytes=0, created_at=NOON, touched_at=NOON)
        await self.store.add_upload(upload, max_open=9)
        await self.files.append(upload_id, 0, _stream(self.content), max_bytes=SIZE)
        await self.store.advance_upload(upload_id, offset_bytes=SIZE, now=NOON)
        return [
            partial(self.store.lease_blob, self.digest, SIZE, until=LATER),
            partial(self.files.commit, upload_id, SIZE, self.digest),
            partial(self.store.finish_upload, upload_id, self.digest, until=LATER, now=NOON),
            partial(self.store.put_manifest, name, self.manifest, ["latest"], now=NOON),
        ]

    async def leave_behind(self) -> None:
        """The blob as somebody left it who deleted his model: a file and a row that nobody needs."""
        await self.files.put_bytes(self.content)
        await self.store.lease_blob(self.digest, SIZE, until=NOON)

    def collecting(self, *, now: datetime = NOON) -> list[Step]:
        """The steps of a collector."""
        condemned: list[Digest] = []

        async def condemn() -> None:
            condemned.extend([digest for digest, _ in await self.store.condemn_blobs(now=now, limit=9)])

        async def remove() -> None:
            for digest in condemned:
                await self.files.remove_blob(digest)

        async def forget() -> None:
            for digest in condemned:
                await self.store.forget_blob(digest)

        return [partial(self.store.unnamed_links, now=now, limit=9), condemn, remove, forget]

    def check(self) -> None:
        """No link without a file, no manifest without its blobs."""
        with closing(sqlite3.connect(self._path)) as connection:
            linked = connection.execute("SELECT digest, condemned FROM repository_blobs JOIN blobs USING (digest)").fetchall()
            named = connection.execute("SELECT digest FROM manifest_blobs").fetchall()
        assert all(digest == str(self.digest) and not condemned for digest, condemned in linked)
        assert not linked or Path(self.files.path_of(self.digest)).read_bytes() == self.content
        assert {digest for (digest,) in named} <= {digest for digest, _ in linked}


async def _stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _try(step: Step) -> str:
    try:
        await step()
    except CorralError as error:
        return error.code
    return ""


def orders(*lengths: int) -> Iterator[tuple[int, ...]]:
    """Every way in which so many steps of several can follow one another: whose turn it is."""
    everybody = [who for who, length in enumerate(lengths) for _ in range(length)]
    return iter(sorted(set(itertools.permutations(everybody))))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file with an account, to copy."""
    path = tmp_path_factory.mktemp("database") / "home" / "hub.db"
    database = open_database(path)
    asyncio.run(SqlAccounts(database).add(ADA, "hash"))
    database.close_now()
    return path


@pytest.fixture
async def registry(template: Path) -> AsyncIterator[Registry]:
    """In memory where there is such a directory: what is tested is order, not the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        opened = Registry(Path(directory), template)
        yield opened
        await opened.database.close()


# ── Every order ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f12_push_and_collector_in_every_order(registry: Registry) -> None:
    """Of a blob that somebody left behind, whose lease is past, while it is pushed anew."""
    outcomes = set()
    for order in orders(4, 4):
        await registry.next_round()
        await registry.leave_behind()
        outcomes.add(await _in_order(registry, order))
    # Pushed at once, or once the collector was done with the blob.
    assert outcomes == {False, True}


async def _in_order(registry: Registry, order: Sequence[int]) -> bool:
    """Whether the pusher had to wait. It does so as the service does: it leases again until it is let."""
    push, collect, is_busy = await registry.receive("tiny"), registry.collecting(), False
    for who in order:
        if who == 1:
            await collect.pop(0)()
        elif await _try(push[0]) == "busy":
            is_busy = True
        else:
            push.pop(0)
        registry.check()
    for step in push:
        await step()
    registry.check()
    assert await registry.store.manifest("tiny", "latest") == registry.manifest.manifest
    # A collector that comes when all leases are past finds nothing to do.
    assert await registry.store.unnamed_links(now=LATER, limit=9) == 0
    assert list(await registry.store.condemn_blobs(now=LATER, limit=9)) == []
    return is_busy


async def test_f12_push_that_outlasts_its_lease_is_never_told_that_it_succeeded_without_a_file(registry: Registry) -> None:
    """The collector's clock is ahead of every lease, as if the push had stood still for a day."""
    outcomes = set()
    for order in orders(4, 4):
        await registry.next_round()
        steps = await registry.receive("tiny"), registry.collecting(now=LATER)
        codes = {await _try(steps[who].pop(0)) for who in order}
        registry.check()
        is_whole = await registry.store.manifest("tiny", "latest") is not None
        assert is_whole == (codes == {""})
        outcomes.add(is_whole)
    assert outcomes == {True, False}


async def test_f12_mount_and_collector_in_every_order(registry: Registry) -> None:
    """Of a blob that its one repository has without a manifest, and whose lease is past."""
    outcomes: set[bool] = set()
    for order in orders(2, 4):
        await registry.next_round()
        for name in ("source", "tiny"):
            await registry.repository(name)
        await registry.leave_behind()
        assert await registry.store.link_blob("source", registry.digest, until=NOON)
        mounted: list[bool] = []
        steps = _mounting(registry, mounted), registry.collecting()
        for who in order:
            await steps[who].pop(0)()
            registry.check()
        outcomes.update(mounted)
    assert outcomes == {True, False}


def _mounting(registry: Registry, mounted: list[bool]) -> list[Step]:
    """The steps of a mount and of the manifest behind it. mounted: told whether the blob could be had."""

    async def mount() -> None:
        is_there = await registry.store.blob_size("source", registry.digest) is not None
        mounted.append(is_there and await registry.store.link_blob("tiny", registry.digest, until=LATER))

    async def put() -> None:
        code = await _try(lambda: registry.store.put_manifest("tiny", registry.manifest, ["latest"], now=NOON))
        assert code == ("" if mounted[0] else "manifest_blob_unknown")

    return [mount, put]


# ── Between looking and deciding ─────────────────────────────────────────────────────────────────────────────────────


async def test_f12_blob_leased_between_looking_and_condemning_is_kept(registry: Registry) -> None:
    await registry.leave_behind()
    registry.database.between = lambda: registry.store.lease_blob(registry.digest, SIZE, until=LATER)
    assert list(await registry.store.condemn_blobs(now=NOON, limit=9)) == []
    await registry.store.lease_blob(registry.digest, SIZE, until=LATER)


async def test_f12_blob_linked_between_looking_and_condemning_is_kept(registry: Registry) -> None:
    await registry.repository("tiny")
    await registry.leave_behind()
    registry.database.between = lambda: registry.store.link_blob("tiny", registry.digest, until=NOON)
    assert list(await registry.store.condemn_blobs(now=NOON, limit=9)) == []
    assert await registry.store.blob_size("tiny", registry.digest) == SIZE


@pytest.mark.parametrize("doing", ["manifest", "lease"])
async def test_f12_link_that_is_needed_between_looking_and_removing_is_kept(registry: Registry, doing: str) -> None:
    await registry.repository("tiny")
    await registry.leave_behind()
    await registry.store.link_blob("tiny", registry.digest, until=NOON)
    registry.database.between = {
        "manifest": lambda: registry.store.put_manifest("tiny", registry.manifest, [], now=NOON),
        "lease": lambda: registry.store.link_blob("tiny", registry.digest, until=LATER),
    }[doing]
    assert await registry.store.unnamed_links(now=NOON, limit=9) == 0
    assert await registry.store.blob_size("tiny", registry.digest) == SIZE


# ── At once ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f05_f12_many_pushers_and_the_collector_at_once(registry: Registry) -> None:
    """Whoever is refused tries again, and then has what he was told he has."""
    names = [f"r{number}" for number in range(6)]
    pushes = [await registry.receive(name) for name in names]
    await registry.leave_behind()
    together = asyncio.Barrier(len(names) + 1)

    async def push(steps: list[Step]) -> None:
        await together.wait()
        while await _try(steps[0]) == "busy":
            await asyncio.sleep(0)
        for step in steps[1:]:
            await step()

    async def collect() -> None:
        await together.wait()
        for step in registry.collecting():
            await step()

    await asyncio.wait_for(asyncio.gather(*(push(steps) for steps in pushes), collect()), 30)
    registry.check()
    for name in names:
        assert await registry.store.manifest(name, "latest") == registry.manifest.manifest


async def test_f14_manifest_and_deletion_of_its_blob_at_once(registry: Registry) -> None:
    outcomes = set()
    for turn in range(20):
        await registry.next_round()
        await registry.repository("tiny")
        await registry.leave_behind()
        assert await registry.store.link_blob("tiny", registry.digest, until=LATER)
        put = registry.store.put_manifest("tiny", registry.manifest, ["latest"], now=NOON)
        unlink = registry.store.unlink_blob("tiny", registry.digest)
        await asyncio.gather(*((put, unlink) if turn % 2 else (unlink, put)), return_exceptions=True)
        registry.check()
        outcomes.add(await registry.store.manifest("tiny", "latest") is not None)
    assert outcomes == {True, False}


async def test_collector_that_was_killed_goes_on_where_it_was(registry: Registry) -> None:
    await registry.leave_behind()
    for step in registry.collecting()[:3]:
        await step()
    # Killed here. Nobody gets a lease before the next one is through.
    assert (await error_of(registry.store.lease_blob(registry.digest, SIZE, until=LATER))).code == "busy"
    for step in registry.collecting():
        await step()
    assert not await registry.store.is_known_blob(registry.digest)
    await registry.store.lease_blob(registry.digest, SIZE, until=LATER)
