"""The registry's rows: brought along from the release before, found by an index, and gone with their account."""

import dataclasses
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import pytest
import sqlalchemy as sa
from alembic import command

from corral.core.records import HostedModel
from corral.core.registry import NewManifest, Repository, Right, StoredManifest, Upload, Visibility
from corral.storage.sql import registry as registry_module
from corral.storage.sql.accounts import SqlAccounts
from corral.storage.sql.engine import Database, open_database
from corral.storage.sql.hosting import SqlHosting
from corral.storage.sql.migrations import config_for
from corral.storage.sql.registry import SqlRegistry
from corral.wire.errors import CorralError
from corral.wire.names import parse_digest, parse_name
from fakes import NOON, FakeClock, SeededEntropy
from fakes_models import gguf_bytes
from fakes_registry import digest_of
from identity_stores import account

LATER = NOON + timedelta(hours=1)
ADA, BOB = account("Ada"), account("Bob")
WEIGHTS = digest_of(b"weights")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir(mode=0o700)
    return tmp_path / "home" / "hub.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = open_database(path)
    yield opened
    opened.close_now()


# ── What the first release left ──────────────────────────────────────────────────────────────────────────────────────

_LAYER = f'{{"digest":"sha256:{2:064}","size":100}}'
_BODY = f'{{"schemaVersion":2,"config":{{"digest":"sha256:{1:064}","size":5}},"layers":[{_LAYER},{_LAYER}]}}'
_FIRST_RELEASE = f"""
INSERT INTO repositories VALUES ('r1', 'library', 'Tiny', 'library', 'tiny', 'public', 1000);
INSERT INTO repositories VALUES ('r2', 'library', 'empty', 'library', 'empty', 'private', 2000);
INSERT INTO blobs VALUES ('sha256:{1:064}', 5, 1000), ('sha256:{2:064}', 100, 1000);
INSERT INTO manifests VALUES ('sha256:{3:064}', 'application/x', CAST('{_BODY}' AS BLOB), 1000);
INSERT INTO manifests VALUES ('sha256:{4:064}', 'application/x', CAST('no JSON' AS BLOB), 1000);
INSERT INTO repository_blobs VALUES ('r1', 'sha256:{1:064}'), ('r1', 'sha256:{2:064}');
INSERT INTO repository_manifests VALUES ('r1', 'sha256:{3:064}'), ('r1', 'sha256:{4:064}');
INSERT INTO tags VALUES ('r1', '1b', '1B', 'sha256:{3:064}', 5000), ('r1', 'old', 'old', 'sha256:{4:064}', 3000);
INSERT INTO hosted_models VALUES ('tiny:1b', 'tiny:1b', 'r1', '1b', '', '', '', 1, 1000);
INSERT INTO hosted_models VALUES ('big:1b', 'big:1b', NULL, NULL, 'http://x', 'm', '', 1, 1000);
"""


@pytest.fixture
def first_release(path: Path) -> Path:
    """A database as the first release wrote it."""
    path.touch(0o600)
    engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool)
    command.upgrade(config_for(engine), "0001")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(_FIRST_RELEASE)
    return path


async def test_repositories_of_the_first_release_are_there_with_all_that_is_new(first_release: Path) -> None:
    database = open_database(first_release)
    store = SqlRegistry(database, clock=FakeClock())
    tiny = await store.repository("library", "tiny")
    assert tiny is not None
    assert (tiny.name, tiny.visibility, tiny.quota_bytes, await store.readme(tiny.id)) == ("Tiny", Visibility.PUBLIC, None, "")
    assert (tiny.updated_at - tiny.created_at) // timedelta(microseconds=1) == 4000
    empty = await store.repository("library", "empty")
    assert empty is not None
    assert empty.updated_at == empty.created_at
    tags = await store.tags("r1")
    assert [(tag.name, tag.size_bytes, tag.media_type) for tag in tags] == [
        ("1B", 105, "application/x"),
        ("old", 0, "application/x"),
    ]
    assert await store.manifest("r1", "1b") == await store.manifest("r1", parse_digest(f"sha256:{3:064}"))
    await database.close()


async def test_blobs_of_models_of_the_first_release_are_not_collected(first_release: Path) -> None:
    database = open_database(first_release)
    store = SqlRegistry(database, clock=FakeClock())
    assert await store.unnamed_links(now=LATER, limit=9) == 0
    assert list(await store.condemn_blobs(now=LATER, limit=9)) == []
    assert await store.blob_size("r1", parse_digest(f"sha256:{2:064}")) == 100
    await database.close()


async def test_hosted_models_of_the_first_release_find_their_tag_as_it_is_written(first_release: Path) -> None:
    open_database(first_release).close_now()
    with closing(sqlite3.connect(first_release)) as connection:
        found = connection.execute("SELECT name, tag FROM hosted_models ORDER BY name").fetchall()
    assert found == [("big:1b", None), ("tiny:1b", "1B")]


async def test_first_release_can_still_write_after_the_migration(first_release: Path) -> None:
    open_database(first_release).close_now()
    statements = (
        "INSERT INTO repositories (id, namespace, name, namespace_key, name_key, visibility, created_at)"
        " VALUES ('r3', 'a', 'b', 'a', 'b', 'public', 1)",
        "INSERT INTO blobs (digest, size_bytes, created_at) VALUES ('sha256:9', 1, 1)",
        "INSERT INTO manifests (digest, media_type, body, created_at) VALUES ('sha256:8', 'x', x'', 1)",
        "INSERT INTO repository_blobs (repository_id, digest) VALUES ('r3', 'sha256:9')",
        "INSERT INTO repository_manifests (repository_id, digest) VALUES ('r3', 'sha256:8')",
        "INSERT INTO tags (repository_id, tag_key, tag, manifest_digest, updated_at) VALUES ('r3', 'a', 'A', 'sha256:8', 1)",
        "UPDATE tags SET tag = 'a', manifest_digest = 'sha256:8' WHERE repository_id = 'r3' AND tag_key = 'a'",
    )
    with closing(sqlite3.connect(first_release)) as connection, connection:
        connection.execute("PRAGMA foreign_keys=ON")
        for statement in statements:
            connection.execute(statement)


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("statement", ["_REPOSITORY", "_RIGHT", "_BLOB_SIZE", "_UPLOAD", "_MANIFEST", "_TAGGED"])
def test_inline_reads_use_an_index_for_every_step(database: Database, path: Path, statement: str) -> None:
    text = getattr(registry_module, statement)
    with closing(sqlite3.connect(path)) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", ["x"] * text.count("?"))]
    assert all(step.startswith("SEARCH") and "INDEX" in step for step in plan), plan


async def test_t057_names_and_tags_are_only_ever_parameters(database: Database) -> None:
    attack = "'; DROP TABLE repositories; --"
    store = SqlRegistry(database, clock=FakeClock())
    tiny = await store.add_repository(_repository("Ada", attack))
    await store.put_manifest(tiny.id, _manifest(), [attack], now=NOON)
    assert await store.manifest(tiny.id, attack) is not None
    assert await store.repository("ada", attack) == tiny


# ── Accounts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _repository(namespace: str, name: str) -> Repository:
    return Repository(
        id=f"{namespace}-{name}", namespace=namespace, name=name, visibility=Visibility.PRIVATE, created_at=NOON, updated_at=NOON
    )


def _manifest(*blobs: tuple[object, int]) -> NewManifest:
    stored = StoredManifest(digest=digest_of(b"m"), media_type="application/json", body=b"m")
    return NewManifest(manifest=stored, blobs=blobs)  # type: ignore[arg-type]


async def test_t119_nothing_is_stored_any_more_for_an_account_that_is_removed(database: Database) -> None:
    accounts, store = SqlAccounts(database), SqlRegistry(database, clock=FakeClock())
    await accounts.add(ADA, "hash")
    own = await store.add_repository(_repository("Ada", "tiny"))
    await store.lease_blob(WEIGHTS, 7, until=NOON)
    await accounts.remove(ADA.id, now=NOON)
    # What was let in before, and comes to its end now.
    late = Upload(id="u", repository_id=own.id, account_id=ADA.id, offset_bytes=0, created_at=NOON, touched_at=NOON)
    for refused in (
        store.add_repository(_repository("ADA", "late")),
        store.add_upload(late, max_open=9),
        store.link_blob(own.id, WEIGHTS, until=NOON),
        store.put_manifest(own.id, _manifest((WEIGHTS, 7)), ["latest"], now=NOON),
    ):
        with pytest.raises(CorralError):
            await refused
    for table in ("repositories", "uploads", "repository_blobs", "repository_manifests", "tags"):
        assert (
            await database.read(lambda connection, table=table: connection.scalar(sa.text(f"SELECT count(*) FROM {table}"))) == 0
        )


async def test_t119_account_removed_takes_its_repositories_uploads_and_collaborations_along(
    database: Database, tmp_path: Path
) -> None:
    accounts, store = SqlAccounts(database), SqlRegistry(database, clock=FakeClock())
    for somebody in (ADA, BOB):
        await accounts.add(somebody, "hash")
    own, foreign = [await store.add_repository(_repository(name, "tiny")) for name in ("ADA", "Bob")]
    for repository in (own, foreign):
        await store.lease_blob(WEIGHTS, 7, until=NOON)
        await store.link_blob(repository.id, WEIGHTS, until=NOON)
        await store.put_manifest(repository.id, _manifest((WEIGHTS, 7)), ["latest"], now=NOON)
        upload = Upload(
            id=repository.id, repository_id=repository.id, account_id=ADA.id, offset_bytes=0, created_at=NOON, touched_at=NOON
        )
        await store.add_upload(upload, max_open=9)
    await store.set_collaborator(foreign.id, ADA.id, Right.PUSH)
    await store.set_collaborator(own.id, BOB.id, Right.PULL)

    await accounts.remove(ADA.id, now=NOON)
    assert await store.repositories_of("ada") == []
    assert await store.right_of(foreign.id, ADA.id) is None
    assert await store.upload(own.id) is None
    assert await store.upload(foreign.id) is None
    assert await store.manifest(foreign.id, "latest") == _manifest().manifest
    assert await store.blob_size(foreign.id, WEIGHTS) == 7
    await accounts.remove(BOB.id, now=NOON)
    assert list(await store.condemn_blobs(now=LATER, limit=9)) == [(WEIGHTS, 7)]


async def test_t119_models_of_an_upstream_under_the_name_of_a_removed_account_are_offered_no_more(
    database: Database, tmp_path: Path
) -> None:
    accounts = SqlAccounts(database)
    await accounts.add(dataclasses.replace(ADA, name="a_b"), "hash")
    hosting = SqlHosting(database, tmp_path / "blobs", tmp_path / "cache", clock=FakeClock(), entropy=SeededEntropy())
    for name in ("a_b/far", "acb/far"):
        await hosting.offer(HostedModel(name=name, upstream_url="http://127.0.0.1:1", upstream_model="x", created_at=NOON))
    await accounts.remove(ADA.id, now=NOON)
    assert [hosted.name for hosted in await hosting.list()] == ["acb/far:latest"]


async def test_t119_models_hosted_from_a_removed_repository_are_offered_no_more(database: Database, tmp_path: Path) -> None:
    accounts, store = SqlAccounts(database), SqlRegistry(database, clock=FakeClock())
    await accounts.add(ADA, "hash")
    hosting = SqlHosting(database, tmp_path / "blobs", tmp_path / "cache", clock=FakeClock(), entropy=SeededEntropy())
    (tmp_path / "tiny.gguf").write_bytes(gguf_bytes())
    await hosting.publish_gguf(parse_name("ada/tiny:1b"), tmp_path / "tiny.gguf", lambda done, total: None, is_public=True)
    await accounts.remove(ADA.id, now=NOON)
    assert await hosting.get("ada/tiny:1b") is None
    assert await store.repositories_of("ada") == []
    # Published again by somebody else, it is whole.
    again = await hosting.publish_gguf(
        parse_name("bob/tiny:1b"), tmp_path / "tiny.gguf", lambda done, total: None, is_public=True
    )
    assert again.model is not None


async def test_t029_long_readme_does_not_make_its_repository_answer_later(database: Database) -> None:
    store = SqlRegistry(database, clock=FakeClock())
    for name in ("short", "long"):
        row = Repository(id=name, namespace="ada", name=name, visibility=Visibility.PRIVATE, created_at=NOON, updated_at=NOON)
        await store.add_repository(row)
    await store.change_repository("long", readme="é" * (128 << 10))

    async def seconds(name: str) -> float:
        """Of the fastest of many, which nothing else on the machine came between."""
        best = 1.0
        for _ in range(300):
            started = perf_counter()
            await store.repository("ada", name)
            best = min(best, perf_counter() - started)
        return best

    # Forty times as long when the README came along with every request.
    assert await seconds("long") < 5 * await seconds("short")
