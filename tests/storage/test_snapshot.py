"""The copy of a database for a backup: one moment of it, and no more than it should hold."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from corral.storage.sql.accounts import SqlAccounts
from corral.storage.sql.engine import open_database
from corral.storage.sql.snapshot import Snapshot, check_copy, check_revision, count_accounts
from corral.wire.errors import CorralError
from identity_stores import account


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub.db"


async def test_copy_is_one_moment_though_somebody_writes(path: Path, tmp_path: Path) -> None:
    database = open_database(path)
    try:
        for name in ("Ada", "Bob"):
            await SqlAccounts(database).add(account(name), "hash")
        taking = asyncio.create_task(asyncio.to_thread(Snapshot(path).take, tmp_path / "copy.db"))
        for number in range(20):
            await SqlAccounts(database).add(account(f"more-{number}"), "hash")
        await taking
    finally:
        await database.close()
    check_copy(tmp_path / "copy.db")
    assert 2 <= count_accounts(tmp_path / "copy.db") <= 22
    assert [one.name for one in tmp_path.glob("copy.db*")] == ["copy.db"]


def test_copy_holds_nothing_of_what_was_deleted(path: Path, tmp_path: Path) -> None:
    open_database(path).close_now()
    words = "what was said long ago "
    for statement in ("INSERT INTO codes VALUES ('x', ?, 0)", "DELETE FROM codes WHERE digest = ?"):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA secure_delete=OFF")
            connection.execute(statement, [words * 500])
    assert words.encode() in path.read_bytes()
    Snapshot(path).take(tmp_path / "copy.db")
    assert words.encode() not in (tmp_path / "copy.db").read_bytes()


def test_short_lived_things_leave_nothing_in_the_copy(path: Path, tmp_path: Path) -> None:
    open_database(path).close_now()
    words = "a code that is good for half an hour "
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO codes VALUES ('x', ?, 0)", [words * 500])
    Snapshot(path).take(tmp_path / "copy.db")
    assert words.encode() not in (tmp_path / "copy.db").read_bytes()


def test_copying_of_much_that_is_stopped_ends_at_once(path: Path, tmp_path: Path) -> None:
    open_database(path).close_now()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany("INSERT INTO nonces VALUES (?, 0)", ((f"{number:040}",) for number in range(20_000)))
    snapshot = Snapshot(path)
    snapshot.stop()
    with pytest.raises(CorralError) as error:
        snapshot.take(tmp_path / "copy.db")
    assert error.value.code == "canceled"
    assert (tmp_path / "copy.db").stat().st_size < path.stat().st_size / 2


def test_copying_that_is_stopped_ends_though_it_had_not_begun(path: Path, tmp_path: Path) -> None:
    open_database(path).close_now()
    snapshot = Snapshot(path)
    snapshot.stop()
    with pytest.raises(CorralError) as error:
        snapshot.take(tmp_path / "copy.db")
    assert error.value.code == "canceled"


def test_database_that_cannot_be_copied_is_said_not_to_be(path: Path, tmp_path: Path) -> None:
    open_database(path).close_now()
    with pytest.raises(CorralError, match="cannot be copied") as error:
        Snapshot(path).take(tmp_path / "no" / "copy.db")
    assert error.value.code == "unavailable"


def test_copy_of_something_else_is_no_hub(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
    with pytest.raises(CorralError, match="not that of a hub"):
        check_copy(tmp_path / "x.db")


@pytest.mark.parametrize("revision", ["", "0000", "one", "00010", "9999", "١٢٣٤"])
def test_revision_that_is_not_known_is_refused(revision: str) -> None:
    with pytest.raises(CorralError) as error:
        check_revision(revision)
    assert error.value.code == "invalid"
