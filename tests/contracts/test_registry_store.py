"""What every RegistryStore promises: the one in the database, and the fake that the services' tests rely on."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from corral.core.ports import AccountStore
from corral.core.registry import (
    Garbage,
    NewManifest,
    RegistryStore,
    Repository,
    Right,
    StoredManifest,
    Upload,
    Visibility,
)
from corral.storage.sql.accounts import SqlAccounts
from corral.storage.sql.engine import open_database
from corral.storage.sql.registry import SqlRegistry
from corral.wire.errors import CorralError
from corral.wire.names import Digest
from fakes import NOON, FakeClock, MemoryAccounts
from fakes_registry import FakeRegistryStore, digest_of
from identity_hub import error_of
from identity_stores import account

LATER = NOON + timedelta(hours=1)
ADA, BOB = account("Ada"), account("Bob")
WEIGHTS, CONFIG, OTHER = digest_of(b"weights"), digest_of(b"config"), digest_of(b"other", "sha512")
IMAGE = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True)
class Registry:
    """A store and the accounts it joins with; Ada and Bob are there."""

    store: RegistryStore
    accounts: AccountStore


@pytest.fixture(params=["memory", "sqlite"])
async def registry(request: pytest.FixtureRequest, empty_database: Path, tmp_path: Path) -> AsyncIterator[Registry]:
    """An empty registry of one kind."""
    if request.param == "memory":
        memory = MemoryAccounts()
        await _add_people(memory)
        yield Registry(FakeRegistryStore(memory), memory)
        return
    (tmp_path / "home").mkdir(mode=0o700)
    database = open_database(Path(shutil.copy(empty_database, tmp_path / "home" / "hub.db")))
    await _add_people(SqlAccounts(database))
    yield Registry(SqlRegistry(database, clock=FakeClock()), SqlAccounts(database))
    await database.close()


async def _add_people(accounts: AccountStore) -> None:
    for somebody in (ADA, BOB):
        await accounts.add(somebody, "hash")


@pytest.fixture
def store(registry: Registry) -> RegistryStore:
    return registry.store


@pytest.fixture
async def tiny(store: RegistryStore) -> Repository:
    """Ada's repository."""
    return await store.add_repository(repository())


@pytest.fixture
async def foreign(store: RegistryStore) -> Repository:
    """Bob's."""
    return await store.add_repository(repository("bob/big"))


def repository(path: str = "Ada/Tiny", **changes: object) -> Repository:
    namespace, _, name = path.partition("/")
    values = {"id": f"r-{path.lower()}", "visibility": Visibility.PRIVATE, "created_at": NOON, "updated_at": NOON, **changes}
    return Repository(namespace=namespace, name=name, **values)  # type: ignore[arg-type]


def upload(upload_id: str = "u1", *, to: str = "r-ada/tiny", **changes: object) -> Upload:
    values = {"repository_id": to, "account_id": ADA.id, "offset_bytes": 0, "created_at": NOON, "touched_at": NOON, **changes}
    return Upload(id=upload_id, **values)  # type: ignore[arg-type]


async def give(store: RegistryStore, to: Repository, *blobs: tuple[Digest, int], until: datetime = NOON) -> None:
    """Blobs that are in the repository, as if they had been pushed."""
    for digest, size_bytes in blobs:
        await store.lease_blob(digest, size_bytes, until=until)
        assert await store.link_blob(to.id, digest, until=until)


def manifest(body: bytes = b"{}", *blobs: tuple[Digest, int], media_type: str = IMAGE, **changes: object) -> NewManifest:
    stored = StoredManifest(digest=digest_of(body), media_type=media_type, body=body)
    return NewManifest(manifest=stored, blobs=blobs, **changes)  # type: ignore[arg-type]


async def names(store: RegistryStore, of: Repository, **page: object) -> list[str]:
    return [tag.name for tag in await store.tags(of.id, **page)]  # type: ignore[arg-type]


# ── Repositories ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_repository_is_found_in_any_case_as_first_written(store: RegistryStore, tiny: Repository) -> None:
    assert await store.repository("aDA", "tINY") == tiny == repository()
    assert tiny.path == "Ada/Tiny"


@pytest.mark.parametrize("path", ["ada/other", "other/tiny", "ada/tin_", "ada/tin%", "/", "ada/tiny/x", "\udcff/x"])
async def test_repository_unknown_is_none(store: RegistryStore, tiny: Repository, path: str) -> None:
    namespace, _, name = path.partition("/")
    assert await store.repository(namespace, name) is None


async def test_repository_name_may_nest(store: RegistryStore) -> None:
    nested = await store.add_repository(repository("ada/blobs/uploads/tags"))
    assert await store.repository("ada", "blobs/uploads/tags") == nested


async def test_repository_of_a_mirror_tells_where_it_is_from(store: RegistryStore) -> None:
    asked = replace(repository("library/tiny"), mirrored_from="https://registry.example/library/tiny")
    assert await store.add_repository(asked) == asked
    assert await store.repository("Library", "Tiny") == asked
    assert list(await store.repositories_of("library")) == [asked]


async def test_repository_created_by_two_at_once_is_one(store: RegistryStore) -> None:
    asked = [repository(path, id=path) for path in ("ada/tiny", "ADA/Tiny", "Ada/TINY")]
    found = await asyncio.gather(*(store.add_repository(one) for one in asked))
    assert len({one.id for one in found}) == 1
    assert list(await store.repositories_of("ada")) == [found[0]]


async def test_repository_is_changed_in_what_is_given_only(store: RegistryStore, tiny: Repository) -> None:
    await store.change_repository(tiny.id, visibility=Visibility.PUBLIC)
    await store.change_repository(tiny.id, readme="# Tiny")
    await store.set_repository_quota(tiny.id, 2**40)
    await store.change_repository(tiny.id)
    changed = replace(tiny, visibility=Visibility.PUBLIC, quota_bytes=2**40)
    assert await store.repository("ada", "tiny") == changed
    assert await store.readme(tiny.id) == "# Tiny"
    await store.set_repository_quota(tiny.id, None)
    await store.change_repository(tiny.id, readme="", visibility=Visibility.PRIVATE)
    assert await store.repository("ada", "tiny") == tiny
    assert [await store.readme(name) for name in (tiny.id, "nothing")] == ["", ""]


async def test_repository_unknown_is_changed_without_effect(store: RegistryStore) -> None:
    await store.change_repository("nothing", readme="x")
    await store.set_repository_quota("nothing", 1)
    await store.remove_repository("nothing")
    assert await store.repositories_of("ada") == []


async def test_repositories_of_a_namespace_are_listed_by_name(store: RegistryStore, foreign: Repository) -> None:
    for path in ("ada/b", "ada/A", "Ada/c/d", "adam/x"):
        await store.add_repository(repository(path))
    assert [found.name for found in await store.repositories_of("ADA")] == ["A", "b", "c/d"]


async def test_repository_removed_takes_everything_of_it_along(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7))
    await store.put_manifest(tiny.id, manifest(b"m", (WEIGHTS, 7)), ["latest"], now=NOON)
    await store.set_collaborator(tiny.id, BOB.id, Right.PUSH)
    await store.add_upload(upload(), max_open=1)
    await store.remove_repository(tiny.id)
    assert await store.repository("ada", "tiny") is None
    again = await store.add_repository(repository())
    assert again == tiny
    assert await store.blob_size(again.id, WEIGHTS) is None
    assert await store.manifest(again.id, "latest") is None
    assert await store.manifest(again.id, digest_of(b"m")) is None
    assert await store.right_of(again.id, BOB.id) is None
    assert await store.upload("u1") is None
    assert await store.stored_bytes("ada") == 0
    assert await store.is_known_blob(WEIGHTS)


async def test_repository_removed_leaves_what_another_one_has(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    for one in (tiny, foreign):
        await give(store, one, (WEIGHTS, 7))
        await store.put_manifest(one.id, manifest(b"m", (WEIGHTS, 7)), ["latest"], now=NOON)
    await store.remove_repository(tiny.id)
    assert await store.blob_size(foreign.id, WEIGHTS) == 7
    assert await store.manifest(foreign.id, "latest") == manifest(b"m").manifest


async def test_collaborators_are_listed_by_name_and_taken_away(store: RegistryStore, tiny: Repository) -> None:
    await store.set_collaborator(tiny.id, BOB.id, Right.PUSH)
    await store.set_collaborator(tiny.id, ADA.id, Right.PULL)
    await store.set_collaborator(tiny.id, BOB.id, Right.PULL)
    listed = [(found.account, found.right) for found in await store.collaborators(tiny.id)]
    assert listed == [(ADA, Right.PULL), (BOB, Right.PULL)]
    assert await store.right_of(tiny.id, BOB.id) is Right.PULL
    await store.set_collaborator(tiny.id, BOB.id, None)
    await store.set_collaborator(tiny.id, BOB.id, None)
    assert await store.right_of(tiny.id, BOB.id) is None
    assert await store.right_of("nothing", ADA.id) is None
    assert await store.collaborators("nothing") == []


async def test_t119_collaborator_whose_account_is_gone_is_not_listed(registry: Registry, tiny: Repository) -> None:
    await registry.store.set_collaborator(tiny.id, BOB.id, Right.PUSH)
    await registry.accounts.remove(BOB.id, now=NOON)
    assert await registry.store.collaborators(tiny.id) == []


# ── Blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_t030_blob_is_there_only_for_the_repository_that_links_it(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    await give(store, foreign, (WEIGHTS, 7))
    assert await store.blob_size(foreign.id, WEIGHTS) == 7
    assert await store.blob_size(tiny.id, WEIGHTS) is None
    assert await store.blob_size("nothing", WEIGHTS) is None


async def test_blobs_of_both_algorithms_are_told_apart(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (OTHER, 5))
    assert await store.blob_size(tiny.id, OTHER) == 5
    assert await store.blob_size(tiny.id, digest_of(b"other")) is None


async def test_blob_leased_is_known_and_nobody_has_it(store: RegistryStore, tiny: Repository) -> None:
    assert not await store.is_known_blob(WEIGHTS)
    await store.lease_blob(WEIGHTS, 7, until=LATER)
    assert await store.is_known_blob(WEIGHTS)
    assert await store.blob_size(tiny.id, WEIGHTS) is None
    assert await store.sources_of(WEIGHTS) == []


async def test_blob_nobody_knows_cannot_be_linked(store: RegistryStore, tiny: Repository) -> None:
    assert not await store.link_blob(tiny.id, WEIGHTS, until=LATER)
    assert await store.blob_size(tiny.id, WEIGHTS) is None


async def test_blob_linked_twice_is_linked(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7), (WEIGHTS, 7))
    assert await store.blob_size(tiny.id, WEIGHTS) == 7
    assert await store.stored_bytes("ada") == 7


async def test_blob_linked_with_its_verified_size_has_that_whatever_was_leased(store: RegistryStore, tiny: Repository) -> None:
    await store.lease_blob(WEIGHTS, 1, until=LATER)  # somebody who lies, and whose upload fails
    await store.lease_blob(WEIGHTS, 7, until=LATER)
    assert await store.link_blob(tiny.id, WEIGHTS, until=LATER, size_bytes=7)
    assert await store.blob_size(tiny.id, WEIGHTS) == 7


async def test_link_in_a_repository_that_is_gone_is_refused(store: RegistryStore) -> None:
    await store.lease_blob(WEIGHTS, 7, until=LATER)
    assert (await error_of(store.link_blob("nothing", WEIGHTS, until=LATER))).code == "name_unknown"


async def test_t038_blob_unlinked_here_stays_there(store: RegistryStore, tiny: Repository, foreign: Repository) -> None:
    for one in (tiny, foreign):
        await give(store, one, (WEIGHTS, 7))
    assert await store.unlink_blob(tiny.id, WEIGHTS)
    assert not await store.unlink_blob(tiny.id, WEIGHTS)
    assert await store.blob_size(tiny.id, WEIGHTS) is None
    assert await store.blob_size(foreign.id, WEIGHTS) == 7


async def test_end10_blob_that_a_manifest_names_is_not_unlinked(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    for one in (tiny, foreign):
        await give(store, one, (WEIGHTS, 7))
    await store.put_manifest(tiny.id, manifest(b"m", (WEIGHTS, 7)), [], now=NOON)
    assert (await error_of(store.unlink_blob(tiny.id, WEIGHTS))).code == "unsupported"
    assert await store.blob_size(tiny.id, WEIGHTS) == 7
    # What another repository's manifests name is no matter here.
    assert await store.unlink_blob(foreign.id, WEIGHTS)
    await store.remove_manifest(tiny.id, digest_of(b"m"))
    assert await store.unlink_blob(tiny.id, WEIGHTS)


async def test_sources_of_a_blob_are_public_ones_first(store: RegistryStore, tiny: Repository, foreign: Repository) -> None:
    public = await store.add_repository(repository("zoe/open", visibility=Visibility.PUBLIC))
    for one in (tiny, foreign, public):
        await give(store, one, (WEIGHTS, 7))
    assert list(await store.sources_of(WEIGHTS)) == [public, tiny, foreign]
    assert await store.sources_of(CONFIG) == []


async def test_t040_stored_bytes_count_each_blob_once_and_uploads_under_way(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    second = await store.add_repository(repository("ada/second"))
    await give(store, tiny, (WEIGHTS, 7), (CONFIG, 2**40))
    await give(store, second, (WEIGHTS, 7), (OTHER, 5))
    await give(store, foreign, (digest_of(b"x"), 1000))
    await store.add_upload(upload(offset_bytes=100), max_open=9)
    await store.add_upload(upload("u2", to=second.id, offset_bytes=10), max_open=9)
    await store.add_upload(upload("u3", offset_bytes=1, finished_as=WEIGHTS), max_open=9)
    await store.put_manifest(tiny.id, manifest(b"twelve bytes"), ["a"], now=NOON)
    await store.put_manifest(second.id, manifest(b"twelve bytes"), ["b"], now=NOON)
    assert await store.stored_bytes("ADA") == 7 + 2**40 + 5 + 110 + 12
    assert await store.stored_bytes("ada", repository_id=second.id) == 7 + 5 + 10 + 12
    assert await store.stored_bytes("ada", repository_id=foreign.id) == 0
    assert await store.stored_bytes("nobody") == 0


# ── Uploads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_upload_is_found_as_it_was_added_and_advanced(store: RegistryStore, tiny: Repository) -> None:
    await store.add_upload(upload(expected=OTHER), max_open=1)
    assert await store.upload("u1") == upload(expected=OTHER)
    await store.advance_upload("u1", offset_bytes=2**40, now=LATER)
    assert await store.upload("u1") == upload(expected=OTHER, offset_bytes=2**40, touched_at=LATER)
    await store.advance_upload("u1", offset_bytes=5, now=LATER)
    assert await store.upload("u1") == upload(expected=OTHER, offset_bytes=5, touched_at=LATER)
    assert await store.upload("u2") is None


async def test_upload_to_a_repository_that_is_gone_is_refused(store: RegistryStore) -> None:
    assert (await error_of(store.add_upload(upload(), max_open=1))).code == "name_unknown"


async def test_f18_uploads_of_an_account_are_as_many_as_may_be_open(store: RegistryStore, tiny: Repository) -> None:
    results = await asyncio.gather(
        *(store.add_upload(upload(f"u{number}"), max_open=3) for number in range(5)), return_exceptions=True
    )
    refused = [error for error in results if isinstance(error, CorralError)]
    assert [error.code for error in refused] == ["rate_limited"] * 2
    await store.add_upload(upload("bobs", account_id=BOB.id), max_open=1)
    await store.remove_upload("u0")
    await store.lease_blob(WEIGHTS, 0, until=LATER)
    await store.finish_upload("u1", WEIGHTS, until=LATER, now=NOON)
    for number in (7, 8):
        await store.add_upload(upload(f"u{number}"), max_open=3)
    assert (await error_of(store.add_upload(upload("u9"), max_open=3))).code == "rate_limited"


async def test_upload_finished_is_a_linked_blob_of_its_length_and_a_tombstone(store: RegistryStore, tiny: Repository) -> None:
    await store.add_upload(upload(), max_open=1)
    await store.advance_upload("u1", offset_bytes=7, now=NOON)
    await store.lease_blob(WEIGHTS, 7, until=LATER)
    # Somebody announces the same content with another length and will fail to deliver it.
    await store.lease_blob(WEIGHTS, 99, until=LATER)
    await store.finish_upload("u1", WEIGHTS, until=LATER, now=LATER)
    assert await store.blob_size(tiny.id, WEIGHTS) == 7
    assert await store.upload("u1") == upload(offset_bytes=7, finished_as=WEIGHTS, touched_at=LATER)


async def test_f03_upload_finished_again_as_the_same_changes_nothing(store: RegistryStore, tiny: Repository) -> None:
    await store.add_upload(upload(), max_open=1)
    await store.lease_blob(WEIGHTS, 0, until=LATER)
    await store.finish_upload("u1", WEIGHTS, until=LATER, now=NOON)
    await store.finish_upload("u1", WEIGHTS, until=LATER, now=LATER)
    assert await store.upload("u1") == upload(finished_as=WEIGHTS)
    await store.lease_blob(CONFIG, 0, until=LATER)
    assert (await error_of(store.finish_upload("u1", CONFIG, until=LATER, now=NOON))).code == "blob_upload_invalid"
    assert await store.blob_size(tiny.id, CONFIG) is None
    assert (await error_of(store.advance_upload("u1", offset_bytes=1, now=NOON))).code == "blob_upload_unknown"


async def test_upload_of_a_blob_that_is_not_leased_is_not_finished(store: RegistryStore, tiny: Repository) -> None:
    await store.add_upload(upload(), max_open=1)
    assert (await error_of(store.finish_upload("u1", WEIGHTS, until=LATER, now=NOON))).code == "busy"
    assert await store.upload("u1") == upload()
    assert await store.blob_size(tiny.id, WEIGHTS) is None


async def test_f05_two_uploads_of_one_blob_are_both_finished(store: RegistryStore, tiny: Repository, foreign: Repository) -> None:
    await store.add_upload(upload(), max_open=1)
    await store.add_upload(upload("u2", to=foreign.id, account_id=BOB.id), max_open=1)
    await store.lease_blob(WEIGHTS, 0, until=LATER)
    await asyncio.gather(*(store.finish_upload(one, WEIGHTS, until=LATER, now=NOON) for one in ("u1", "u2")))
    assert await store.blob_size(tiny.id, WEIGHTS) == await store.blob_size(foreign.id, WEIGHTS) == 0


async def test_upload_removed_is_unknown(store: RegistryStore, tiny: Repository) -> None:
    await store.add_upload(upload(), max_open=1)
    assert await store.remove_upload("u1")
    assert not await store.remove_upload("u1")
    assert await store.upload("u1") is None
    for change in (
        store.advance_upload("u1", offset_bytes=1, now=NOON),
        store.finish_upload("u1", WEIGHTS, until=LATER, now=NOON),
    ):
        assert (await error_of(change)).code == "blob_upload_unknown"


async def test_idle_uploads_are_told_by_when_they_were_last_touched(store: RegistryStore, tiny: Repository) -> None:
    for number in range(4):
        touched_at = NOON + timedelta(minutes=10 * number)
        finished = {"finished_as": WEIGHTS} if number % 2 else {}
        await store.add_upload(upload(f"u{number}", touched_at=touched_at, **finished), max_open=9)
    minutes = [NOON + timedelta(minutes=count) for count in range(60)]
    assert await store.idle_uploads(open_before=minutes[0], finished_before=minutes[0]) == []
    assert await store.idle_uploads(open_before=minutes[20], finished_before=minutes[11]) == ["u0", "u1"]
    assert await store.idle_uploads(open_before=minutes[59], finished_before=minutes[10]) == ["u0", "u2"]
    assert await store.idle_uploads(open_before=minutes[59], finished_before=minutes[59]) == ["u0", "u1", "u2", "u3"]


# ── Manifests and tags ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_manifest_put_is_found_by_digest_and_tag_byte_for_byte(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7), (CONFIG, 6))
    body = b'{ "as": "pushed" }\n'
    await store.put_manifest(tiny.id, manifest(body, (WEIGHTS, 7), (CONFIG, 6)), ["latest", "v1"], now=LATER)
    for reference in (digest_of(body), "latest", "v1"):
        assert await store.manifest(tiny.id, reference) == StoredManifest(digest=digest_of(body), media_type=IMAGE, body=body)
    changed = await store.repository("ada", "tiny")
    assert changed is not None
    assert (changed.created_at, changed.updated_at) == (NOON, LATER)


@pytest.mark.parametrize("size", [65_536, 65_537, 4 << 20])
async def test_manifest_of_any_length_is_found_byte_for_byte(store: RegistryStore, tiny: Repository, size: int) -> None:
    new = manifest(b"x" * size)
    await store.put_manifest(tiny.id, new, ["Latest"], now=NOON)
    for reference in (new.manifest.digest, "Latest", "latest"):
        assert await store.manifest(tiny.id, reference) == new.manifest


async def test_manifest_is_found_only_in_the_repository_it_was_put_into(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    await store.put_manifest(tiny.id, manifest(b"m"), ["latest"], now=NOON)
    for reference in (digest_of(b"m"), "latest"):
        assert await store.manifest(foreign.id, reference) is None
        assert await store.manifest("nothing", reference) is None
    assert await store.manifest(tiny.id, digest_of(b"other")) is None
    assert await store.manifest(tiny.id, "other") is None


async def test_t031_manifest_naming_a_blob_of_another_repository_is_refused(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    await give(store, foreign, (WEIGHTS, 7))
    await give(store, tiny, (CONFIG, 6))
    new = manifest(b"m", (CONFIG, 6), (WEIGHTS, 7))
    error = await error_of(store.put_manifest(tiny.id, new, ["latest"], now=LATER))
    assert (error.code, error.detail) == ("manifest_blob_unknown", {"digest": str(WEIGHTS)})
    assert await store.manifest(tiny.id, digest_of(b"m")) is None
    assert await store.tags(tiny.id) == []
    assert await store.repository("ada", "tiny") == tiny
    await give(store, tiny, (WEIGHTS, 7))
    await store.put_manifest(tiny.id, new, ["latest"], now=NOON)
    assert await names(store, tiny) == ["latest"]


async def test_f16_manifest_that_states_another_size_is_refused(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7))
    for blobs in ([(WEIGHTS, 8)], [(WEIGHTS, 7), (WEIGHTS, 0)]):
        error = await error_of(store.put_manifest(tiny.id, manifest(b"m", *blobs), [], now=NOON))
        assert error.code == "manifest_invalid"
    assert await store.manifest(tiny.id, digest_of(b"m")) is None


async def test_index_whose_manifest_is_not_in_the_repository_is_refused(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    child = digest_of(b"m")
    await store.put_manifest(foreign.id, manifest(b"m"), [], now=NOON)
    index = manifest(b"index", media_type=INDEX, children=(child,))
    error = await error_of(store.put_manifest(tiny.id, index, [], now=NOON))
    assert (error.code, error.detail) == ("manifest_blob_unknown", {"digest": str(child)})
    await store.put_manifest(tiny.id, manifest(b"m"), [], now=NOON)
    await store.put_manifest(tiny.id, index, ["all"], now=NOON)
    assert await store.manifest(tiny.id, "all") == index.manifest


async def test_manifest_into_a_repository_that_is_gone_is_refused(store: RegistryStore) -> None:
    assert (await error_of(store.put_manifest("nothing", manifest(), ["a"], now=NOON))).code == "name_unknown"


async def test_manifest_of_ten_thousand_blobs_is_stored(store: RegistryStore, tiny: Repository) -> None:
    blobs = [(Digest(f"{number:064x}"), number) for number in range(1, 3)]
    await give(store, tiny, *blobs)
    many = [blobs[number % 2] for number in range(10_000)]
    await store.put_manifest(tiny.id, manifest(b"m", *many), ["latest"], now=NOON)
    (tag,) = await store.tags(tiny.id)
    assert tag.size_bytes == 3


async def test_manifest_keeps_the_media_type_it_was_pushed_with_here(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    await store.put_manifest(foreign.id, manifest(b"m", media_type="application/spoilt"), ["latest"], now=NOON)
    await store.put_manifest(tiny.id, manifest(b"m"), ["latest"], now=NOON)
    found = await store.manifest(tiny.id, "latest")
    assert found is not None
    assert found.media_type == IMAGE
    assert [tag.media_type for tag in await store.tags(tiny.id)] == [IMAGE]


async def test_manifest_pushed_elsewhere_as_something_that_names_less_keeps_its_blobs_here(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    await store.put_manifest(foreign.id, manifest(b"m", media_type=INDEX), [], now=NOON)
    await give(store, tiny, (WEIGHTS, 7))
    await store.put_manifest(tiny.id, manifest(b"m", (WEIGHTS, 7)), [], now=NOON)
    assert await store.unnamed_links(now=LATER, limit=9) == 0
    assert await store.blob_size(tiny.id, WEIGHTS) == 7


@pytest.mark.parametrize(
    ("there", "reference", "means"),
    [
        (["Foo"], "Foo", "Foo"),
        (["Foo"], "foo", "Foo"),
        (["foo"], "FOO", "foo"),
        (["Foo", "foo"], "foo", "foo"),
        (["Foo", "foo"], "Foo", "Foo"),
        (["Foo", "foo"], "FOO", None),
        (["foo"], "fo", None),
        (["f_o"], "foo", None),
        (["foo"], "f_o", None),
        (["foo"], "", None),
    ],
)
async def test_tag_means_what_is_written_exactly_so_then_the_only_one_that_differs_by_case(
    store: RegistryStore, tiny: Repository, there: Sequence[str], reference: str, means: str | None
) -> None:
    for tag in there:
        await store.put_manifest(tiny.id, manifest(tag.encode()), [tag], now=NOON)
    found = await store.manifest(tiny.id, reference)
    assert (found.body.decode() if found else None) == means


async def test_tags_are_listed_without_regard_to_case_and_paged(store: RegistryStore, tiny: Repository) -> None:
    written = ["b", "A", "a", "_x", "C", "v1.10", "v1.9", "B"]
    await store.put_manifest(tiny.id, manifest(b"m"), written, now=NOON)
    ordered = sorted(written, key=lambda tag: (tag.lower(), tag))
    assert await names(store, tiny) == ordered
    for size in (1, 3):
        paged: list[str] = []
        while page := await names(store, tiny, after=paged[-1] if paged else "", limit=size):
            paged += page
        assert paged == ordered
    assert await names(store, tiny, limit=0) == []
    assert await names(store, tiny, after="AB") == ["B", "b", "C", "v1.10", "v1.9"]
    assert await names(store, tiny, after="zzz") == []
    assert await store.tags("nothing") == []


async def test_tag_tells_size_and_when_it_was_moved(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7), (CONFIG, 6))
    await store.put_manifest(tiny.id, manifest(b"one", (WEIGHTS, 7), (WEIGHTS, 7)), ["latest"], now=NOON)
    await store.put_manifest(tiny.id, manifest(b"one", (WEIGHTS, 7), (WEIGHTS, 7)), ["latest"], now=LATER)
    (tag,) = await store.tags(tiny.id)
    assert (tag.digest, tag.size_bytes, tag.media_type, tag.updated_at) == (digest_of(b"one"), 7, IMAGE, NOON)
    await store.put_manifest(tiny.id, manifest(b"two", (WEIGHTS, 7), (CONFIG, 6)), ["latest"], now=LATER)
    (tag,) = await store.tags(tiny.id)
    assert (tag.digest, tag.size_bytes, tag.updated_at) == (digest_of(b"two"), 13, LATER)


async def test_tag_of_an_index_tells_the_size_of_its_manifests(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7), (CONFIG, 2**62))
    for body, blob in ((b"one", (WEIGHTS, 7)), (b"two", (CONFIG, 2**62))):
        await store.put_manifest(tiny.id, manifest(body, blob), [], now=NOON)
    children = (digest_of(b"one"), digest_of(b"two"), digest_of(b"two"))
    await store.put_manifest(tiny.id, manifest(b"index", media_type=INDEX, children=children), ["all"], now=NOON)
    (tag,) = await store.tags(tiny.id)
    assert tag.size_bytes == 7 + 2**62
    # An index of indexes cannot claim more than a number can hold.
    second = manifest(b"second", media_type=INDEX, children=(digest_of(b"two"), digest_of(b"index")))
    await store.put_manifest(tiny.id, second, ["all"], now=NOON)
    (tag,) = await store.tags(tiny.id)
    assert tag.size_bytes == 2**63 - 1


async def test_f13_of_two_manifests_for_one_tag_one_wins_whole_and_both_stay(store: RegistryStore, tiny: Repository) -> None:
    await asyncio.gather(*(store.put_manifest(tiny.id, manifest(f"{n}".encode()), ["latest"], now=NOON) for n in range(5)))
    found = await store.manifest(tiny.id, "latest")
    assert found is not None
    assert found.digest == digest_of(found.body)
    assert await names(store, tiny) == ["latest"]
    for number in range(5):
        assert await store.manifest(tiny.id, digest_of(f"{number}".encode())) is not None


async def test_tag_removed_leaves_the_manifest_and_other_tags(store: RegistryStore, tiny: Repository) -> None:
    await store.put_manifest(tiny.id, manifest(b"m"), ["a", "A", "b"], now=NOON)
    assert await store.remove_tag(tiny.id, "a")
    assert not await store.remove_tag(tiny.id, "a")
    assert not await store.remove_tag(tiny.id, "B")
    assert not await store.remove_tag("nothing", "b")
    assert await names(store, tiny) == ["A", "b"]
    assert await store.manifest(tiny.id, digest_of(b"m")) is not None


async def test_manifest_removed_takes_its_tags_along_here_only(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    for one in (tiny, foreign):
        await store.put_manifest(one.id, manifest(b"m"), ["a", "b"], now=NOON)
    await store.put_manifest(tiny.id, manifest(b"n"), ["c"], now=NOON)
    assert await store.remove_manifest(tiny.id, digest_of(b"m"))
    assert not await store.remove_manifest(tiny.id, digest_of(b"m"))
    assert await names(store, tiny) == ["c"]
    assert await store.manifest(tiny.id, digest_of(b"m")) is None
    assert await names(store, foreign) == ["a", "b"]
    assert await store.manifest(foreign.id, "a") == manifest(b"m").manifest
    # Once nobody has it, the same bytes come in as new.
    await store.remove_manifest(foreign.id, digest_of(b"m"))
    await store.put_manifest(tiny.id, manifest(b"m", media_type="application/json"), ["a"], now=NOON)
    assert [tag.media_type for tag in await store.tags(tiny.id)] == ["application/json", IMAGE]


async def test_end12_referrers_are_those_of_this_repository(store: RegistryStore, tiny: Repository, foreign: Repository) -> None:
    subject = digest_of(b"not pushed yet")
    for body in (b"b", b"a"):
        new = manifest(body, subject=subject, artifact_type=f"text/{body.decode()}", annotations=b'{"k":"\xc3\xa4"}')
        await store.put_manifest(tiny.id, new, [], now=NOON)
    await store.put_manifest(tiny.id, manifest(b"c", subject=digest_of(b"else")), [], now=NOON)
    await store.put_manifest(foreign.id, manifest(b"d", subject=subject), [], now=NOON)
    found, has_more = await store.referrers(tiny.id, subject, limit=9, max_bytes=99)
    assert not has_more
    assert [one.digest for one in found] == sorted((digest_of(b"a"), digest_of(b"b")), key=str)
    (first,) = (one for one in found if one.digest == digest_of(b"a"))
    assert (first.media_type, first.size_bytes, first.artifact_type) == (IMAGE, 1, "text/a")
    assert first.annotations == b'{"k":"\xc3\xa4"}'
    await store.remove_manifest(tiny.id, digest_of(b"a"))
    assert [one.digest for one in (await store.referrers(tiny.id, subject, limit=9, max_bytes=99))[0]] == [digest_of(b"b")]
    found, has_more = await store.referrers("nothing", subject, limit=9, max_bytes=99)
    assert (list(found), has_more) == ([], False)


async def test_t037_referrers_come_in_pieces_of_so_many_and_so_long(store: RegistryStore, tiny: Repository) -> None:
    subject = digest_of(b"subject")
    for number in range(5):
        new = manifest(b"%d" % number * 10, subject=subject, artifact_type="a/b" if number < 3 else "c/d")
        await store.put_manifest(tiny.id, new, [], now=NOON)
    every, has_more = await store.referrers(tiny.id, subject, limit=5, max_bytes=50)
    assert (len(every), has_more) == (5, False)
    for limit, max_bytes, count in ((2, 1000, 2), (9, 39, 3), (9, 1, 1)):
        some, has_more = await store.referrers(tiny.id, subject, limit=limit, max_bytes=max_bytes)
        assert (list(some), has_more) == (list(every[:count]), True)
        rest, has_more = await store.referrers(tiny.id, subject, after=str(some[-1].digest), limit=9, max_bytes=1000)
        assert (list(rest), has_more) == (list(every[count:]), False)
    typed, has_more = await store.referrers(tiny.id, subject, artifact_type="a/b", limit=3, max_bytes=1000)
    assert ({one.artifact_type for one in typed}, len(typed), has_more) == ({"a/b"}, 3, False)


async def test_namespace_holds_so_many_repositories_and_no_more(store: RegistryStore, tiny: Repository) -> None:
    second = await store.add_repository(repository("ADA/second"), at_most=2)
    refused = await error_of(store.add_repository(repository("ada/third"), at_most=2))
    assert (refused.code, await store.repository("ada", "third")) == ("forbidden", None)
    # Those that are there are, and others have their own.
    assert await store.add_repository(repository("ada/second"), at_most=2) == second
    assert await store.add_repository(repository("bob/first"), at_most=2)
    await store.remove_repository(tiny.id)
    assert await store.add_repository(repository("ada/third"), at_most=2)


async def test_unused_repository_is_one_that_nothing_ever_was_in(store: RegistryStore) -> None:
    used = {name: await store.add_repository(repository(f"ada/{name}")) for name in ("blob", "upload", "manifest", "readme")}
    used |= {name: await store.add_repository(repository(f"ada/{name}")) for name in ("public", "quota", "shared")}
    used["mirror"] = await store.add_repository(repository("reg.example/x", mirrored_from="https://reg.example/x"))
    used["young"] = await store.add_repository(repository("ada/young", created_at=LATER, updated_at=LATER))
    await give(store, used["blob"], (WEIGHTS, 7))
    await store.add_upload(upload(to=used["upload"].id), max_open=9)
    await store.put_manifest(used["manifest"].id, manifest(), [], now=LATER)
    await store.remove_manifest(used["manifest"].id, manifest().manifest.digest)
    await store.change_repository(used["readme"].id, readme="# x")
    await store.change_repository(used["public"].id, visibility=Visibility.PUBLIC)
    await store.set_repository_quota(used["quota"].id, 1)
    await store.set_collaborator(used["shared"].id, BOB.id, Right.PULL)
    for number in range(3):
        await store.add_repository(repository(f"bob/unused{number}"))
    assert await store.remove_unused_repositories(created_before=LATER, limit=1, repository_id="r-bob/unused1") == 1
    assert await store.remove_unused_repositories(created_before=LATER, limit=1, repository_id="r-ada/blob") == 0
    assert await store.remove_unused_repositories(created_before=NOON, limit=9) == 0
    assert await store.remove_unused_repositories(created_before=LATER, limit=1) == 1
    assert await store.remove_unused_repositories(created_before=LATER, limit=9) == 1
    assert [found for found in used.values() if await store.repository(found.namespace, found.name) is None] == []


# ── Collecting ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_f12_link_is_kept_while_leased_or_named_and_removed_after(
    store: RegistryStore, tiny: Repository, foreign: Repository
) -> None:
    await give(store, tiny, (WEIGHTS, 7), (CONFIG, 6), until=LATER)
    await give(store, foreign, (WEIGHTS, 7), until=LATER)
    await store.put_manifest(tiny.id, manifest(b"m", (WEIGHTS, 7)), [], now=NOON)
    assert await store.unnamed_links(now=LATER - timedelta(microseconds=1), limit=9) == 0
    assert await store.unnamed_links(now=LATER, limit=1) == 1
    assert await store.unnamed_links(now=LATER, limit=9) == 1
    assert await store.unnamed_links(now=LATER, limit=9) == 0
    assert await store.blob_size(tiny.id, WEIGHTS) == 7
    assert await store.blob_size(tiny.id, CONFIG) is None
    assert await store.blob_size(foreign.id, WEIGHTS) is None


async def test_f12_lease_is_only_ever_prolonged(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7), until=LATER)
    await give(store, tiny, (WEIGHTS, 7), until=NOON)
    assert await store.unnamed_links(now=NOON, limit=9) == 0
    assert await store.unnamed_links(now=LATER, limit=9) == 1


async def test_f12_blob_is_condemned_when_nobody_links_it_and_its_lease_is_past(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7))
    await store.lease_blob(CONFIG, 6, until=LATER)
    await store.lease_blob(OTHER, 5, until=NOON)
    assert list(await store.condemn_blobs(now=NOON, limit=9)) == [(OTHER, 5)]
    assert list(await store.condemn_blobs(now=LATER, limit=9)) == sorted([(OTHER, 5), (CONFIG, 6)], key=lambda one: str(one[0]))


async def test_garbage_is_what_collecting_would_find(store: RegistryStore, tiny: Repository, foreign: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7), (CONFIG, 6), (OTHER, 5), until=NOON)
    await give(store, foreign, (WEIGHTS, 7), (CONFIG, 6), until=NOON)
    await store.lease_blob(digest_of(b"leased"), 50, until=LATER)
    await store.lease_blob(digest_of(b"loose"), 3, until=NOON)
    await store.put_manifest(tiny.id, manifest(b"m", (WEIGHTS, 7)), [], now=NOON)
    found = await store.garbage(now=NOON)
    assert (found.links, found.blobs, found.size_bytes) == (4, 3, 14)
    assert await store.unnamed_links(now=NOON, limit=99) == found.links
    assert sum(size for _, size in await store.condemn_blobs(now=NOON, limit=99)) == found.size_bytes
    # What is being deleted counts until it is.
    assert await store.garbage(now=NOON) == Garbage(blobs=3, size_bytes=14)


async def test_blobs_are_condemned_so_many_at_once(store: RegistryStore) -> None:
    for number in range(5):
        await store.lease_blob(digest_of(bytes([number])), 1, until=NOON)
    assert [len(await store.condemn_blobs(now=NOON, limit=2)) for _ in range(4)] == [2, 4, 5, 5]


async def test_f12_blob_condemned_can_be_neither_leased_nor_linked_until_it_is_forgotten(
    store: RegistryStore, tiny: Repository
) -> None:
    await store.add_upload(upload(offset_bytes=7), max_open=1)
    await store.lease_blob(WEIGHTS, 7, until=NOON)
    await store.condemn_blobs(now=NOON, limit=9)
    assert (await error_of(store.lease_blob(WEIGHTS, 7, until=LATER))).code == "busy"
    assert not await store.link_blob(tiny.id, WEIGHTS, until=LATER)
    assert (await error_of(store.finish_upload("u1", WEIGHTS, until=LATER, now=NOON))).code == "busy"
    assert await store.is_known_blob(WEIGHTS)
    await store.forget_blob(WEIGHTS)
    assert not await store.is_known_blob(WEIGHTS)
    assert list(await store.condemn_blobs(now=LATER, limit=9)) == []
    await store.lease_blob(WEIGHTS, 7, until=LATER)
    await store.finish_upload("u1", WEIGHTS, until=LATER, now=NOON)
    assert await store.blob_size(tiny.id, WEIGHTS) == 7


async def test_f12_blob_that_is_not_condemned_is_not_forgotten(store: RegistryStore, tiny: Repository) -> None:
    await give(store, tiny, (WEIGHTS, 7))
    for digest in (WEIGHTS, CONFIG):
        await store.forget_blob(digest)
    assert await store.blob_size(tiny.id, WEIGHTS) == 7


async def test_f14_manifest_whose_blob_is_unlinked_at_once_is_refused_or_keeps_it(store: RegistryStore, tiny: Repository) -> None:
    for number in range(6):
        body = f"m{number}".encode()
        await give(store, tiny, (WEIGHTS, 7))
        doing = [store.put_manifest(tiny.id, manifest(body, (WEIGHTS, 7)), [], now=NOON), store.unlink_blob(tiny.id, WEIGHTS)]
        put, unlinked = await asyncio.gather(*doing, return_exceptions=True)
        is_stored = await store.manifest(tiny.id, digest_of(body)) is not None
        assert is_stored == (await store.blob_size(tiny.id, WEIGHTS) is not None)
        assert getattr(put if not is_stored else unlinked, "code", "") in ("manifest_blob_unknown", "unsupported")
        await store.remove_manifest(tiny.id, digest_of(body))
