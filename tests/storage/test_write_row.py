"""Single statements past SQLAlchemy: they wait as the others do, and no longer."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from corral.storage.sql import engine
from corral.storage.sql.engine import Database, open_database
from identity_hub import error_of

_INSERT = "INSERT INTO nonces (nonce, expires_at) VALUES (?, ?) ON CONFLICT DO NOTHING"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    found = open_database(tmp_path / "home" / "hub.db")
    yield found
    await found.close()


@pytest.fixture
def other(database: Database, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of another process, which holds the lock."""
    with closing(sqlite3.connect(tmp_path / "home" / "hub.db", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


async def test_rows_that_were_changed_are_counted(database: Database) -> None:
    assert await database.write_row(_INSERT, "n", 1) == 1
    assert await database.write_row(_INSERT, "n", 2) == 0
    assert database.row("SELECT expires_at FROM nonces WHERE nonce = 'n'") == (1,)


async def test_lock_of_another_process_is_waited_for(database: Database, other: sqlite3.Connection) -> None:
    waiting = asyncio.ensure_future(database.write_row(_INSERT, "n", 1))
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    assert not done
    other.execute("COMMIT")
    assert await waiting == 1


async def test_t065_lock_that_is_never_let_go_makes_it_unavailable(
    database: Database, other: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.05)
    error = await error_of(database.write_row(_INSERT, "n", 1))
    assert (error.code, error.retry_after_s) == ("unavailable", 1)
    other.execute("COMMIT")
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 5.0)
    assert await database.write_row(_INSERT, "n", 1) == 1
