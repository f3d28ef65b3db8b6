"""Publishing a GGUF file on the hub: rows and blobs that belong together, once, and mended when they do not."""

import asyncio
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from corral.core.records import HostedModel
from corral.core.registry import Visibility
from corral.storage.sql.engine import Database, open_database
from corral.storage.sql.hosting import SqlHosting
from corral.storage.sql.registry import SqlRegistry
from corral.wire.errors import CorralError
from corral.wire.names import parse_name
from fakes import NOON, FakeClock, SeededEntropy
from fakes_models import LLAMA, gguf_bytes

TINY = parse_name("library/Tiny:1b")


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


class Hub:
    """A hub's store, a file to publish, and a look at the rows from outside."""

    def __init__(self, directory: Path, database: Database) -> None:
        self.directory, self.database, self.clock = directory, database, FakeClock()
        self.source = directory / "tiny.gguf"
        self.source.write_bytes(gguf_bytes())
        self.store = self.reopened()

    def reopened(self) -> SqlHosting:
        """As the next process has it."""
        entropy = SeededEntropy()
        return SqlHosting(self.database, self.directory / "blobs", self.directory / "cache", clock=self.clock, entropy=entropy)

    async def publish(self, *, is_public: bool = True) -> HostedModel:
        return await self.store.publish_gguf(TINY, self.source, quiet, is_public=is_public)

    def change(self) -> None:
        """Put other weights into the file."""
        self.source.write_bytes(gguf_bytes({**LLAMA, "llama.context_length": 4096}))
        os.utime(self.source, ns=(1, 1))

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with sqlite3.connect(self.directory / "home" / "hub.db") as connection:
            rows = connection.execute(query).fetchall()
        connection.close()
        return rows

    def counts(self) -> dict[str, int]:
        tables = ("repositories", "blobs", "manifests", "repository_blobs", "repository_manifests", "tags", "hosted_models")
        return {table: int(str(self.rows(f"SELECT count(*) FROM {table}")[0][0])) for table in tables}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file to copy: running the migrations takes a fifth of a second."""
    path = tmp_path_factory.mktemp("database") / "home" / "hub.db"
    open_database(path).close_now()
    return path


@pytest.fixture
async def hub(empty_database: Path, tmp_path: Path) -> AsyncIterator[Hub]:
    (tmp_path / "home").mkdir(mode=0o700)
    database = open_database(Path(shutil.copy(empty_database, tmp_path / "home" / "hub.db")))
    yield Hub(tmp_path, database)
    await database.close()


@pytest.mark.parametrize("source_mode", [0o600, 0o640, 0o644, 0o666])
async def test_t091_blobs_and_notes_of_the_hub_are_closed_to_others(hub: Hub, source_mode: int) -> None:
    hub.source.chmod(source_mode)
    before = os.umask(0)
    try:
        await hub.publish()
    finally:
        os.umask(before)
    made = [path for name in ("blobs", "cache") for path in (hub.directory / name).rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {0o600}
    assert (hub.directory / "blobs").stat().st_mode & 0o777 == 0o700
    assert hub.source.stat().st_mode & 0o777 == source_mode


async def test_published_model_is_offered_under_its_short_name(hub: Hub) -> None:
    published = await hub.publish()
    assert (published.name, published.is_public, published.created_at) == ("Tiny:1b", True, NOON)
    assert published.model is not None
    assert Path(published.model.weights or "").read_bytes() == gguf_bytes()
    assert (published.model.name.short, published.model.modified_at) == ("Tiny:1b", NOON)
    assert await hub.reopened().get("tiny:1b") == published
    assert list(await hub.store.list()) == [published]


async def test_publishing_writes_every_row_once(hub: Hub) -> None:
    await hub.publish()
    assert hub.counts() == {
        "repositories": 1,
        "blobs": 2,
        "manifests": 1,
        "repository_blobs": 2,
        "repository_manifests": 1,
        "tags": 1,
        "hosted_models": 1,
    }
    assert hub.rows("SELECT namespace, name, namespace_key, name_key, visibility FROM repositories") == [
        ("library", "Tiny", "library", "tiny", "public")
    ]
    files = {path.name for path in (hub.directory / "blobs").iterdir()}
    assert files == {str(digest).replace(":", "-") for (digest,) in hub.rows("SELECT digest FROM blobs")}


async def test_publishing_again_changes_nothing(hub: Hub) -> None:
    first = await hub.publish()
    dump = [hub.rows("SELECT * FROM tags"), hub.rows("SELECT * FROM hosted_models")]
    hub.clock.advance(60)
    hub.store = hub.reopened()
    assert await hub.publish() == first
    assert [hub.rows("SELECT * FROM tags"), hub.rows("SELECT * FROM hosted_models")] == dump


async def test_publishing_a_changed_file_moves_the_tag(hub: Hub) -> None:
    await hub.publish()
    hub.change()
    hub.clock.advance(60)
    second = await hub.publish()
    assert second.model is not None
    assert (second.model.details.context_length, second.model.modified_at) == (4096, hub.clock.now())
    assert (hub.counts()["tags"], hub.counts()["manifests"], hub.counts()["repositories"]) == (1, 2, 1)


async def test_publishing_again_leaves_a_repository_private_that_its_owner_closed(hub: Hub) -> None:
    await hub.publish()
    registry = SqlRegistry(hub.database, clock=hub.clock)
    await registry.change_repository(str(hub.rows("SELECT id FROM repositories")[0][0]), visibility=Visibility.PRIVATE)
    hub.change()
    for _ in range(2):
        await hub.publish(is_public=True)
        assert hub.rows("SELECT visibility FROM repositories") == [("private",)]


async def test_publishing_again_leaves_an_offer_to_whom_it_was_made(hub: Hub) -> None:
    first = await hub.publish()
    await hub.store.offer_stored(TINY, is_public=False, now=NOON)
    hub.change()
    second = await hub.publish(is_public=True)
    assert (first.is_public, second.is_public) == (True, False)
    assert first.model != second.model


async def test_publishing_again_offers_what_was_withdrawn(hub: Hub) -> None:
    first = await hub.publish()
    await hub.store.withdraw("tiny:1b")
    assert hub.counts()["tags"] == 1
    assert await hub.publish() == first


async def test_two_tags_share_a_repository_and_its_blobs(hub: Hub) -> None:
    await hub.publish()
    await hub.store.publish_gguf(parse_name("hub.example/library/TINY:two"), hub.source, quiet, is_public=True)
    assert [found.name for found in await hub.store.list()] == ["Tiny:1b", "TINY:two"]
    assert (hub.counts()["repositories"], hub.counts()["blobs"], hub.counts()["tags"]) == (1, 2, 2)


async def test_publishing_mends_a_blob_that_went_away(hub: Hub) -> None:
    await hub.publish()
    for path in (hub.directory / "blobs").iterdir():
        path.unlink()
    hub.store = hub.reopened()
    published = await hub.publish()
    assert published.model is not None
    assert Path(published.model.weights or "").exists()


async def test_publishers_that_race_leave_one_model(hub: Hub) -> None:
    published = await asyncio.gather(*(hub.publish() for _ in range(4)))
    assert {found.name for found in published} == {"Tiny:1b"}
    assert (hub.counts()["repositories"], hub.counts()["tags"], hub.counts()["hosted_models"]) == (1, 1, 1)


async def test_file_that_is_not_gguf_leaves_no_trace(hub: Hub) -> None:
    hub.source.write_bytes(b"PK\x03\x04")
    with pytest.raises(CorralError) as caught:
        await hub.publish()
    assert caught.value.code == "bad_request"
    assert set(hub.counts().values()) == {0}
    assert not (hub.directory / "blobs").exists()


async def test_model_whose_manifest_cannot_be_read_is_skipped_and_said(hub: Hub) -> None:
    await hub.publish()
    for path in (hub.directory / "blobs").iterdir():
        path.unlink()
    store = hub.reopened()
    assert list(await store.list()) == []
    with pytest.raises(CorralError) as caught:
        await store.get("tiny:1b")
    assert caught.value.code == "unavailable"


async def test_model_whose_tag_is_gone_is_skipped_and_said(hub: Hub) -> None:
    await hub.publish()
    with sqlite3.connect(hub.directory / "home" / "hub.db") as connection:
        connection.execute("DELETE FROM tags")
    connection.close()
    assert list(await hub.store.list()) == []
    with pytest.raises(CorralError, match="its tag is gone"):
        await hub.store.get("tiny:1b")


async def test_r019_stale_files_are_removed_at_a_start(hub: Hub) -> None:
    await hub.publish()
    left = hub.directory / "blobs" / "sha256-x.tmp"
    left.touch()
    hub.clock.advance(10**9)
    await hub.store.remove_stale()
    assert not left.exists()


async def test_real_model_is_published(hub: Hub, small_model: Path) -> None:
    name = parse_name("library/smollm2:135m")
    published = await hub.store.publish_gguf(name, small_model, quiet, is_public=True, parameters={"num_predict": 9})
    assert published.name == "smollm2:135m"
    assert published.model is not None
    assert (published.model.details.parameter_size, published.model.details.context_length) == ("134.52M", 8192)
    assert published.model.parameters == {"num_predict": 9}
