"""Both families of identity stores, so that each suite runs on the database and on the fakes that unit tests rely on."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from corral.core.records import Account
from corral.storage.sql.engine import open_database
from fakes import MemoryAccounts, MemoryAudit, MemoryCredentials, MemorySessions, MemoryUsage
from identity_stores import Stores, account, sql_stores


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file to copy: running the migrations takes a fifth of a second."""
    path = tmp_path_factory.mktemp("database") / "home" / "hub.db"
    open_database(path).close_now()
    return path


@pytest.fixture(params=["memory", "sqlite"])
async def stores(request: pytest.FixtureRequest, empty_database: Path, tmp_path: Path) -> AsyncIterator[Stores]:
    """Empty stores of one family."""
    if request.param == "memory":
        accounts = MemoryAccounts()
        yield Stores(accounts, MemorySessions(accounts), MemoryCredentials(accounts), MemoryUsage(), MemoryAudit())
        return
    path = tmp_path / "home" / "hub.db"
    path.parent.mkdir(mode=0o700)
    shutil.copy(empty_database, path)
    database = open_database(path)
    yield sql_stores(database)
    await database.close()


@pytest.fixture
async def ada(stores: Stores) -> Account:
    """An account that is in the store."""
    await stores.accounts.add(account(), "hash-of-ada")
    return account()


@pytest.fixture
async def bob(stores: Stores) -> Account:
    """Another one."""
    await stores.accounts.add(account("Bob"), "hash-of-bob")
    return account("Bob")
