"""Rows that are remembered: never one that was written over, whoever wrote."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from corral.core.records import Account, Device, Scope
from corral.storage.sql import engine
from corral.storage.sql.accounts import SqlAccounts
from corral.storage.sql.credentials import SqlCredentials
from corral.storage.sql.engine import Database, open_database
from corral.wire.signing import DevicePublicKey
from fakes import NOON

ADA = Account(id="a1", name="Ada", email="ada@example.org", is_admin=False, created_at=NOON)
KEY = DevicePublicKey(bytes(range(32)))
DEVICE = Device(id="d1", account_id="a1", name="laptop", key=KEY, scopes=frozenset({Scope.INFERENCE}), created_at=NOON)
_NAME = "SELECT name FROM devices WHERE id = ?"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    found = open_database(tmp_path / "home" / "hub.db")
    await SqlAccounts(found).add(ADA, password_hash="")
    await SqlCredentials(found).add_device(DEVICE)
    yield found
    await found.close()


def name(database: Database) -> list[Any] | None:
    return database.look_up(_NAME, list, "d1")


async def test_row_is_made_once_while_nothing_is_written(database: Database) -> None:
    first = name(database)
    assert first == ["laptop"]
    assert name(database) is first


async def test_t060_whatever_is_written_is_seen_by_the_next_look_up(database: Database, tmp_path: Path) -> None:
    def renamed(text: str) -> sa.TextClause:
        return sa.text("UPDATE devices SET name = :name").bindparams(name=text)

    assert name(database) == ["laptop"]
    await database.write(lambda connection: connection.execute(renamed("durable")))
    assert name(database) == ["durable"]
    await database.write_relaxed(lambda connection: connection.execute(renamed("relaxed")))
    assert name(database) == ["relaxed"]
    # As a command of the administrator's does, in a process of its own.
    with closing(sqlite3.connect(tmp_path / "home" / "hub.db")) as other, other:
        other.execute("UPDATE devices SET name = 'elsewhere'")
        assert name(database) == ["relaxed"]
        other.commit()
        assert name(database) == ["elsewhere"]


async def test_t062_revoked_device_is_gone_at_once_and_another_one_is_not_remembered_as_absent(database: Database) -> None:
    store = SqlCredentials(database)
    found = await store.device(KEY)
    assert found == (DEVICE, ADA)
    assert await store.device(KEY) is found
    assert await store.device(DevicePublicKey(bytes(32))) is None
    await store.revoke_device("a1", "d1", now=NOON + timedelta(hours=1))
    assert await store.device(KEY) is None


async def test_rows_that_are_remembered_are_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_MAX_KNOWN", 3)
    for number in range(10):
        assert database.look_up("SELECT ? + ?", list, number, 1) == [number + 1]
        assert len(database._known) <= 3


async def test_row_that_cannot_be_is_none(database: Database) -> None:
    assert database.look_up(_NAME, list, "\ud800") is None
    assert database.look_up(_NAME, list, "nobody") is None
    assert database._known == {}
