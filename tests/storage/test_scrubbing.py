"""Blobs that a disk has changed: found, set aside, put back, and what the database knows of them."""

import os
import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from corral.core.registry import NewManifest, Repository, StoredManifest, Visibility
from corral.core.scrubbing import BlobToCheck, Condition
from corral.storage import scrubbing
from corral.storage.scrubbing import BlobChecks
from corral.storage.sql.engine import Database, open_database
from corral.storage.sql.registry import SqlRegistry
from corral.storage.sql.scrubbing import SqlScrubbing
from corral.storage.uploads import UploadFiles
from corral.wire.names import Digest
from fakes import NOON, FakeClock
from fakes_registry import digest_of

CONTENT = bytes(range(256)) * 64
LATER = NOON + timedelta(hours=1)


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    (tmp_path / "blobs").mkdir()
    return tmp_path / "blobs"


@pytest.fixture
def checks(blobs: Path, monkeypatch: pytest.MonkeyPatch) -> BlobChecks:
    monkeypatch.setattr(scrubbing, "_BLOCK", 4096)
    return BlobChecks(blobs)


async def check(checks: BlobChecks, digest: Digest, size_bytes: int = len(CONTENT)) -> tuple[Condition, int]:
    """What it is found to be, and how many bytes were read for that."""
    read = 0

    async def pace(count: int) -> None:
        nonlocal read
        read += count

    return await checks.check(digest, size_bytes, pace), read


def placed(blobs: Path, content: bytes = CONTENT, *, algorithm: str = "sha256") -> tuple[Digest, Path]:
    digest = digest_of(CONTENT, algorithm)
    path = blobs / digest.file_name
    path.write_bytes(content)
    return digest, path


def rotten(content: bytes = CONTENT) -> bytes:
    """One bit of it is another."""
    return content[:9000] + bytes([content[9000] ^ 1]) + content[9001:]


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_whole_blob_stays_where_it_is(checks: BlobChecks, blobs: Path, algorithm: str) -> None:
    digest, path = placed(blobs, algorithm=algorithm)
    assert await check(checks, digest) == (Condition.INTACT, len(CONTENT))
    assert [entry.name for entry in blobs.iterdir()] == [path.name]


async def test_empty_blob_is_whole(checks: BlobChecks, blobs: Path) -> None:
    (blobs / digest_of(b"").file_name).touch()
    assert await check(checks, digest_of(b""), 0) == (Condition.INTACT, 0)


@pytest.mark.parametrize(("content", "read"), [(rotten(), 2 * len(CONTENT)), (CONTENT[:-1], 0), (CONTENT + b"x", 0), (b"", 0)])
async def test_f24_blob_that_is_another_is_set_aside(checks: BlobChecks, blobs: Path, content: bytes, read: int) -> None:
    digest, path = placed(blobs, content)
    # What has another digest is read once more before that is believed.
    assert await check(checks, digest) == (Condition.DAMAGED, read)
    assert not path.exists()
    assert (blobs / "damaged" / path.name).read_bytes() == content
    assert (blobs / "damaged").stat().st_mode & 0o777 == 0o700
    assert (await check(checks, digest))[0] is Condition.DAMAGED


async def test_blob_without_a_file_is_missing(checks: BlobChecks) -> None:
    assert await check(checks, digest_of(CONTENT)) == (Condition.MISSING, 0)


async def test_block_that_the_disk_cannot_read_is_damage(
    checks: BlobChecks, blobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, path = placed(blobs)
    pread = os.pread

    def failing(descriptor: int, count: int, position: int) -> bytes:
        # Only a broken disk answers like this.
        if position == 8192:
            raise OSError(5, "Input/output error")
        return pread(descriptor, count, position)

    monkeypatch.setattr(os, "pread", failing)
    assert (await check(checks, digest))[0] is Condition.DAMAGED
    assert not path.exists()


async def test_blob_that_was_read_wrongly_once_stays(checks: BlobChecks, blobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, path = placed(blobs)
    pread, wrong = os.pread, [b"\xff" * 4096]
    monkeypatch.setattr(os, "pread", lambda *arguments: wrong.pop() if wrong else pread(*arguments))
    assert (await check(checks, digest))[0] is Condition.INTACT
    assert path.read_bytes() == CONTENT


async def test_blob_that_was_repaired_is_put_back(checks: BlobChecks, blobs: Path) -> None:
    digest, path = placed(blobs, rotten())
    await check(checks, digest)
    (blobs / "damaged" / path.name).write_bytes(CONTENT)
    assert (await check(checks, digest))[0] is Condition.INTACT
    assert path.read_bytes() == CONTENT
    assert list((blobs / "damaged").iterdir()) == []


async def test_blob_that_was_pushed_while_it_was_read_stays(checks: BlobChecks, blobs: Path) -> None:
    digest, path = placed(blobs, rotten())
    pushed = blobs / "pushed"
    pushed.write_bytes(CONTENT)

    async def pace(_: int) -> None:
        if pushed.exists():
            pushed.replace(path)

    assert await checks.check(digest, len(CONTENT), pace) is Condition.INTACT
    assert path.read_bytes() == CONTENT
    assert list((blobs / "damaged").iterdir()) == []


async def test_what_was_set_aside_goes_with_the_blob_or_when_it_is_whole(checks: BlobChecks, blobs: Path, tmp_path: Path) -> None:
    for remove in (checks.forget_aside, UploadFiles(blobs, tmp_path / "cache").remove_blob):
        digest, _ = placed(blobs, rotten())
        await check(checks, digest)
        await remove(digest)
        await remove(digest)
        assert list((blobs / "damaged").iterdir()) == []


async def test_set_aside_blobs_are_nobodys_orphans(checks: BlobChecks, blobs: Path, tmp_path: Path) -> None:
    digest, _ = placed(blobs, rotten())
    await check(checks, digest)
    files = UploadFiles(blobs, tmp_path / "cache")
    assert [found async for found in files.blobs_on_disk()] == []
    assert await files.remove_strays([], now=NOON + timedelta(days=9999)) == 0
    assert files.size_of(digest) is None


# ── The database ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "hub.db"
    path.parent.chmod(0o700)
    open_database(path).close_now()
    return path


@pytest.fixture
async def database(empty_database: Path, tmp_path: Path) -> AsyncIterator[Database]:
    (tmp_path / "home").mkdir(mode=0o700)
    opened = open_database(Path(shutil.copy(empty_database, tmp_path / "home" / "hub.db")))
    yield opened
    await opened.close()


async def give(database: Database, path: str, *contents: bytes, tags: tuple[str, ...] | None = ("latest",)) -> None:
    """Blobs of a repository, and a manifest that names them where tags are given."""
    namespace, _, name = path.partition("/")
    store = SqlRegistry(database, clock=FakeClock())
    made = Repository(id=path, namespace=namespace, name=name, visibility=Visibility.PRIVATE, created_at=NOON, updated_at=NOON)
    await store.add_repository(made)
    for content in contents:
        await store.lease_blob(digest_of(content), len(content), until=NOON)
        assert await store.link_blob(path, digest_of(content), until=NOON)
    if tags is not None:
        body = f"{path} {tags}".encode()
        named = tuple((digest_of(content), len(content)) for content in contents)
        stored = StoredManifest(digest=digest_of(body), media_type="x/y", body=body)
        await store.put_manifest(path, NewManifest(manifest=stored, blobs=named), tags, now=NOON)


async def due(database: Database, **options: object) -> list[Digest]:
    found = await SqlScrubbing(database).blobs_to_check(**{"checked_before": LATER, "limit": 9, **options})  # type: ignore[arg-type]
    return [blob.digest for blob in found]


async def test_blobs_are_due_that_came_or_were_read_long_ago(database: Database) -> None:
    scrub, (first, second) = SqlScrubbing(database), sorted([digest_of(b"one"), digest_of(b"three")], key=str)
    await give(database, "alice/tiny", b"one", b"three")
    store = SqlRegistry(database, clock=FakeClock())
    await store.lease_blob(digest_of(b"on its way"), 10, until=LATER)
    assert await due(database) == [first, second]
    assert await due(database, limit=1) == [first]
    assert await due(database, after=str(first)) == [second]
    assert await due(database, checked_before=NOON) == []
    assert await scrub.bytes_to_check(checked_before=LATER) == 8
    await scrub.note_check(first, at=LATER, is_damaged=False)
    assert await due(database) == [second]
    assert await due(database, checked_before=LATER + timedelta(seconds=1)) == [first, second]


async def test_damaged_blob_is_due_until_it_is_whole_and_keeps_its_time(database: Database) -> None:
    scrub, digest = SqlScrubbing(database), digest_of(b"one")
    await give(database, "alice/tiny", b"one")
    for hours in (1, 2):
        await scrub.note_check(digest, at=NOON + timedelta(hours=hours), is_damaged=True)
    assert await scrub.blobs_to_check(checked_before=NOON, limit=9) == [BlobToCheck(digest=digest, size_bytes=3, is_damaged=True)]
    assert [(blob.digest, blob.since) for blob in await scrub.hurt_blobs()] == [(digest, LATER)]
    await scrub.note_check(digest, at=LATER, is_damaged=False)
    assert list(await scrub.hurt_blobs()) == []
    assert await due(database, checked_before=NOON) == []


async def test_hurt_blob_names_every_model_it_belongs_to(database: Database) -> None:
    scrub, digest = SqlScrubbing(database), digest_of(b"shared")
    await give(database, "alice/tiny", b"shared", b"config", tags=("v1", "latest"))
    await give(database, "bob/untagged", b"shared", tags=())
    await give(database, "bob/loose", b"shared", tags=None)
    await give(database, "bob/other", b"config")
    await scrub.note_check(digest, at=LATER, is_damaged=True)
    (hurt,) = await scrub.hurt_blobs()
    untagged = f"bob/untagged@{digest_of(b'bob/untagged ()')}"
    assert hurt.models == ("alice/tiny:latest", "alice/tiny:v1", "bob/loose", untagged)
    assert hurt.size_bytes == 6


async def test_blob_that_nobody_has_any_more_is_nobodys_damage(database: Database) -> None:
    scrub, store = SqlScrubbing(database), SqlRegistry(database, clock=FakeClock())
    await give(database, "alice/tiny", b"one")
    await scrub.note_check(digest_of(b"one"), at=LATER, is_damaged=True)
    await store.remove_repository("alice/tiny")
    assert list(await scrub.hurt_blobs()) == []
    assert await due(database) == []
