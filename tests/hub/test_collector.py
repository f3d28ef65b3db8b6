"""Collecting: what goes, what stays, and that a push and a collection never meet over one blob."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest

from corral.core.records import Principal
from corral.core.registry import Visibility
from corral.hub.collector import Collected, Collector
from corral.hub.links import LEASE
from corral.hub.uploads import Mounted
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from corral.wire.repositories import RepositoryName
from fakes_registry import digest_of
from identity_hub import error_of
from registry_hub import CONFIG, OTHER, TINY, RegistryHub, chunks

LATER_S = (LEASE + timedelta(hours=1)).total_seconds()


class CollectedHub(RegistryHub):
    """A registry with a collector."""

    def __init__(self) -> None:
        super().__init__()
        self.is_busy = False
        self.collector = Collector(store=self.store, files=self.files, uploads=self.uploads, clock=self.clock, alone=self._alone)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self.is_busy:
            raise CorralError("conflict", "another collection is under way")
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False


@pytest.fixture
def hub() -> CollectedHub:
    return CollectedHub()


@pytest.fixture
async def alice(hub: CollectedHub) -> Principal:
    return await hub.add("alice")


async def test_nothing_to_collect_is_nothing_collected(hub: CollectedHub, alice: Principal) -> None:
    await hub.push(TINY, alice)
    assert (await hub.collector.collect()).is_empty
    hub.clock.advance(LATER_S)
    # Only the tombstones of its two uploads: the model itself is named.
    assert await hub.collector.collect() == Collected(uploads=2)
    assert (await hub.registry.blob(TINY, digest_of(b"weights"), alice)).size_bytes == 7


async def test_blob_that_no_manifest_names_goes_when_its_lease_is_past(hub: CollectedHub, alice: Principal) -> None:
    digest = await hub.push_blob(TINY, alice, b"weights")
    assert (await hub.collector.collect()).is_empty
    hub.clock.advance(LATER_S)
    expected = Collected(uploads=1, links=1, blobs=1, size_bytes=7)
    assert await hub.collector.survey() == expected
    assert await hub.collector.survey() == expected
    assert await hub.collector.collect() == replace(expected, repositories=1)
    assert hub.files.size_of(digest) is None
    assert not await hub.store.is_known_blob(digest)
    assert (await hub.collector.survey()).is_empty


async def test_deleted_manifest_leaves_its_blobs_to_be_collected(hub: CollectedHub, alice: Principal) -> None:
    bob = await hub.add("bob")
    digest = await hub.push(TINY, alice, b"weights")
    await hub.push(OTHER, bob, b"other")
    await hub.registry.remove_manifest(TINY, str(digest), alice)
    hub.clock.advance(LATER_S)
    collected = await hub.collector.collect()
    assert (collected.links, collected.blobs, collected.size_bytes) == (2, 1, 7)
    # The config is the other model's as well.
    assert (await hub.registry.blob(OTHER, digest_of(CONFIG), bob)).size_bytes == len(CONFIG)
    assert set(hub.files.blobs) == {digest_of(CONFIG), digest_of(b"other")}


async def test_removed_repository_leaves_its_blobs_to_be_collected(hub: CollectedHub, alice: Principal) -> None:
    await hub.push(TINY, alice)
    await hub.repositories.remove(TINY, alice)
    hub.clock.advance(LATER_S)
    assert (await hub.collector.collect()).blobs == 2
    assert hub.files.blobs == {}


async def test_many_are_collected_in_steps(hub: CollectedHub, alice: Principal) -> None:
    for number in range(450):
        await hub.push_blob(TINY, alice, str(number).encode())
    hub.clock.advance(LATER_S)
    collected = await hub.collector.collect()
    assert (collected.links, collected.blobs) == (450, 450)


async def test_idle_upload_goes_with_its_bytes(hub: CollectedHub, alice: Principal) -> None:
    upload = await hub.start(TINY, alice)
    await hub.registry.append(upload.id, TINY, alice, chunks(b"abc"), length=3)
    hub.clock.advance(LATER_S)
    assert await hub.collector.collect() == Collected(uploads=1, repositories=1)
    assert hub.files.upload_bytes(upload.id) is None


async def test_repository_that_no_push_came_to_an_end_in_goes_after_a_day(hub: CollectedHub, alice: Principal) -> None:
    await hub.start(TINY, alice)
    await hub.push(RepositoryName("alice", "pushed"), alice)
    for name in ("described", "opened"):
        await hub.start(RepositoryName("alice", name), alice)
    await hub.repositories.set_readme(RepositoryName("alice", "described"), alice, "# To come")
    await hub.repositories.set_visibility(RepositoryName("alice", "opened"), alice, Visibility.PUBLIC)
    hub.clock.advance(LATER_S)
    assert (await hub.collector.collect()).repositories == 1
    assert [found.name for found in await hub.repositories.visible("alice", alice)] == ["described", "opened", "pushed"]


async def test_repository_whose_last_manifest_was_deleted_stays(hub: CollectedHub, alice: Principal) -> None:
    await hub.start(TINY, alice)
    hub.clock.advance(1)
    digest = await hub.push(TINY, alice)
    await hub.registry.remove_manifest(TINY, str(digest), alice)
    hub.clock.advance(LATER_S)
    assert (await hub.collector.collect()).repositories == 0
    assert [found.name for found in await hub.repositories.visible("alice", alice)] == ["tiny"]


async def test_upload_file_without_a_row_goes_and_one_with_a_row_stays(hub: CollectedHub, alice: Principal) -> None:
    upload = await hub.start(TINY, alice)
    await hub.registry.append(upload.id, TINY, alice, chunks(b"abc"), length=3)
    await hub.files.append("stray", 0, chunks(b"left behind"), max_bytes=100)
    assert (await hub.collector.collect()).is_empty
    hub.clock.advance(2 * 3600)
    assert await hub.collector.collect() == Collected(files=1)
    assert hub.files.upload_bytes(upload.id) == b"abc"


async def test_blob_file_without_a_row_goes_when_it_is_a_day_old(hub: CollectedHub, alice: Principal) -> None:
    digest = await hub.files.put_bytes(b"orphan")
    hub.clock.advance(timedelta(hours=23).total_seconds())
    assert (await hub.collector.survey()).is_empty
    assert (await hub.collector.collect()).is_empty
    hub.clock.advance(timedelta(hours=2).total_seconds())
    expected = Collected(blobs=1, size_bytes=6)
    assert await hub.collector.survey() == expected
    assert hub.files.size_of(digest) == 6
    assert await hub.collector.collect() == expected
    assert hub.files.size_of(digest) is None


async def test_only_one_collector_is_at_it(hub: CollectedHub) -> None:
    hub.is_busy = True
    assert (await error_of(hub.collector.collect())).code == "conflict"


# ── Beside a push ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f12_push_of_a_blob_that_is_just_being_deleted_waits_and_brings_it_back(
    hub: CollectedHub, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await hub.push_blob(TINY, alice, b"weights")
    hub.clock.advance(LATER_S)
    removing, go_on, remove = asyncio.Event(), asyncio.Event(), hub.files.remove_blob

    async def pausing(condemned: Digest) -> None:
        removing.set()
        await go_on.wait()
        await remove(condemned)

    monkeypatch.setattr(hub.files, "remove_blob", pausing)
    monkeypatch.setattr("corral.hub.uploads._LEASE_PAUSE_S", 0)
    collecting = asyncio.create_task(hub.collector.collect())
    await removing.wait()
    # Condemned: nobody is told that it is there, nobody can link it.
    assert not isinstance(await hub.registry.start_upload(TINY, alice, expected=digest), Mounted)
    other = RepositoryName("alice", "other")
    assert not isinstance(await hub.registry.start_upload(other, alice, mount=digest, source="alice/tiny"), Mounted)
    pushing = asyncio.create_task(hub.push_blob(TINY, alice, b"weights"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not pushing.done()
    go_on.set()
    assert await pushing == digest
    await collecting
    assert (await hub.registry.blob(TINY, digest, alice)).size_bytes == 7
    assert hub.files.size_of(digest) == 7


async def test_f12_push_that_never_gets_its_turn_is_told_to_come_back(
    hub: CollectedHub, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await hub.push_blob(TINY, alice, b"weights")
    hub.clock.advance(LATER_S)
    await hub.store.unnamed_links(now=hub.clock.now(), limit=9)
    await hub.store.condemn_blobs(now=hub.clock.now(), limit=9)
    monkeypatch.setattr("corral.hub.uploads._LEASE_PAUSE_S", 0)
    error = await error_of(hub.push_blob(TINY, alice, b"weights"))
    assert (error.code, error.retry_after_s) == ("busy", 1)
    await hub.collector.collect()
    assert await hub.push_blob(TINY, alice, b"weights") == digest


async def test_f12_blob_found_by_a_push_outlives_the_collection_before_its_manifest(hub: CollectedHub, alice: Principal) -> None:
    for content in (b"weights", CONFIG):
        await hub.push_blob(TINY, alice, content)
    hub.clock.advance(LEASE.total_seconds() - 60)
    # A new push, a day later, finds both and need not send them.
    for content in (b"weights", CONFIG):
        await hub.registry.blob(TINY, digest_of(content), alice)
    hub.clock.advance(3600)
    await hub.collector.collect()
    await hub.push(TINY, alice)


async def test_f12_orphan_that_is_published_while_it_is_looked_at_stays(
    hub: CollectedHub, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await hub.files.put_bytes(b"weights")
    hub.clock.advance(LATER_S)
    is_known_blob = hub.store.is_known_blob

    async def overtaken(asked: Digest) -> bool:
        found = await is_known_blob(asked)
        await hub.push_blob(TINY, alice, b"weights")
        return found

    monkeypatch.setattr(hub.store, "is_known_blob", overtaken)
    await hub.collector.collect()
    assert (await hub.registry.blob(TINY, digest, alice)).size_bytes == 7


async def test_collection_that_was_interrupted_is_finished_by_the_next(
    hub: CollectedHub, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await hub.push_blob(TINY, alice, b"weights")
    hub.clock.advance(LATER_S)

    async def fails(condemned: Digest) -> None:
        raise CorralError("unavailable")

    monkeypatch.setattr(hub.files, "remove_blob", fails)
    assert (await error_of(hub.collector.collect())).code == "unavailable"
    monkeypatch.undo()
    assert (await hub.collector.survey()).blobs == 1
    assert (await hub.collector.collect()).blobs == 1
    assert hub.files.size_of(digest) is None
