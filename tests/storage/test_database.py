"""The database file: created closed, migrated once, durable, and honest when it cannot be used."""

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from io import StringIO
from pathlib import Path
from time import perf_counter

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql

from corral.core.records import Account, ApiKey, AuditEvent, BrowserSession, Device, Scope
from corral.storage.sql import credentials, schema, sessions
from corral.storage.sql import engine as engine_module
from corral.storage.sql.accounts import SqlAccounts
from corral.storage.sql.audit import SqlAudit
from corral.storage.sql.credentials import SqlCredentials, format_scopes, parse_scopes
from corral.storage.sql.engine import Database, open_database
from corral.storage.sql.migrations import config_for
from corral.storage.sql.sessions import SqlSessions
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePublicKey
from fakes import NOON
from identity_hub import error_of

ADA = Account(id="a1", name="Ada", email="ada@example.org", is_admin=False, created_at=NOON)
KEY = ApiKey(id="k1", account_id="a1", name="ci", prefix="crlk_k", scopes=frozenset({Scope.INFERENCE}), created_at=NOON)
DEVICE = Device(
    id="d1", account_id="a1", name="x", key=DevicePublicKey(bytes(32)), scopes=frozenset({Scope.INFERENCE}), created_at=NOON
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "home" / "hub.db"
    open_database(path).close_now()
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    """A migrated database file."""
    (tmp_path / "home").mkdir(mode=0o700)
    return Path(shutil.copy(template, tmp_path / "home" / "hub.db"))


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = open_database(path)
    yield opened
    opened.close_now()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ── Opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_database_made_under_any_umask_is_closed_to_others(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    before = os.umask(0)
    try:
        database = open_database(home / "hub.db")
    finally:
        os.umask(before)
    await SqlAccounts(database).add(ADA, "hash")
    assert mode_of(home) == 0o700
    modes = {file.name: mode_of(file) for file in home.iterdir()}
    assert modes == {"hub.db": 0o600, "hub.db-wal": 0o600, "hub.db-shm": 0o600, "hub.db.lock": 0o600}
    await database.close()
    await database.close()


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o750, 0o710])
def test_t091_home_that_others_may_enter_is_refused_with_the_command_that_closes_it(path: Path, mode: int) -> None:
    path.parent.chmod(mode)
    with pytest.raises(CorralError, match=r"chmod (700|go-w)") as error:
        open_database(path)
    assert error.value.code == "invalid"


@pytest.mark.parametrize("name", ["hub.db", "hub.db-wal", "hub.db-shm", "hub.db.lock"])
@pytest.mark.parametrize("mode", [0o666, 0o644, 0o640])
def test_t091_database_file_that_others_may_read_is_refused_with_the_command_that_closes_it(
    path: Path, name: str, mode: int
) -> None:
    file = path.with_name(name)
    file.touch()
    file.chmod(mode)
    with pytest.raises(CorralError, match=f"chmod 600 {file}$") as error:
        open_database(path)
    assert error.value.code == "invalid"


def test_tables_after_all_migrations_are_those_of_the_schema(path: Path) -> None:
    with sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool).connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_name": schema.is_table_of_ours})
        assert compare_metadata(context, schema.metadata) == []


def test_head_is_that_of_the_migration_scripts(path: Path) -> None:
    scripts = ScriptDirectory.from_config(config_for(sa.create_engine("sqlite://", poolclass=sa.NullPool)))
    assert scripts.get_current_head() == schema.HEAD
    assert len(list(scripts.walk_revisions())) == int(schema.HEAD)


def test_schema_also_suits_postgresql() -> None:
    # Compiled, not run: no PostgreSQL is at hand. It shows that no type or clause of SQLite alone has crept in.
    text = StringIO()
    for table in schema.metadata.sorted_tables:
        text.write(str(sa.schema.CreateTable(table).compile(dialect=postgresql.dialect())))
        for index in table.indexes:
            text.write(str(sa.schema.CreateIndex(index).compile(dialect=postgresql.dialect())))
    assert "BIGSERIAL" in text.getvalue()
    assert "WHERE revoked_at IS NULL" in text.getvalue()


def test_r020_database_of_a_newer_release_is_not_opened(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(CorralError, match=r"newer Corral \(schema 9999") as error:
        open_database(path)
    assert error.value.code == "invalid"
    assert path.read_bytes() == before


def test_r020_two_starters_make_one_database(tmp_path: Path) -> None:
    path, together = tmp_path / "home" / "hub.db", threading.Barrier(4)

    def start(_: int) -> None:
        together.wait()
        open_database(path).close_now()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(start, range(4)))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(schema.HEAD,)]


def test_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    path.touch(0o600)
    path.write_bytes(b"my novel, chapter one. " * 100)
    with pytest.raises(CorralError, match=r"hub\.db is not a database") as error:
        open_database(path)
    assert error.value.code == "invalid"
    assert path.read_bytes().startswith(b"my novel")


def test_database_locked_at_start_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Patched because the real time-out is five seconds.
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "hub.db"
    path.touch(0o600)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(CorralError) as error:
            open_database(path)
    assert error.value.code == "unavailable"
    open_database(path).close_now()


def test_database_path_that_is_a_link_is_refused(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    with pytest.raises(CorralError) as error:
        open_database(link)
    assert error.value.code == "invalid"


# ── Reading and writing ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_write_of_another_connection_is_seen_by_the_next_inline_read(database: Database, path: Path) -> None:
    await SqlAccounts(database).add(ADA, "hash")
    await SqlCredentials(database).add_api_key(KEY, hmac=bytes(32), pepper_id="p1")
    assert await SqlCredentials(database).api_key("k1") is not None
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE api_keys SET revoked_at = 1")
    found = await SqlCredentials(database).api_key("k1")
    assert found is not None
    assert found.key.revoked_at is not None


async def test_credential_writes_wait_for_the_disk_and_nonces_do_not(database: Database) -> None:
    def synchronous(connection: sa.Connection) -> object:
        return connection.exec_driver_sql("PRAGMA synchronous").scalar()

    assert await database.write(synchronous) == 2
    assert await database.write_relaxed(synchronous) == 1


async def test_foreign_keys_are_enforced(database: Database) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        await SqlCredentials(database).add_api_key(KEY, hmac=bytes(32), pepper_id="p1")
    with pytest.raises(sa.exc.IntegrityError):
        await SqlCredentials(database).add_device(DEVICE)


async def test_transaction_that_fails_leaves_nothing(database: Database) -> None:
    def half(connection: sa.Connection) -> None:
        connection.execute(schema.codes.insert().values(purpose="setup", digest="d", expires_at=NOON))
        raise CorralError("internal")

    with pytest.raises(CorralError):
        await database.write(half)
    assert not await SqlSessions(database).has_code("setup", "d", now=NOON.replace(year=2000))


async def test_write_nobody_waits_for_any_more_still_ends(database: Database) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(connection: sa.Connection) -> None:
        started.set()
        go_on.wait(10)
        connection.execute(schema.codes.insert().values(purpose="setup", digest="d", expires_at=NOON))

    waiting = asyncio.create_task(database.write(slow))
    await asyncio.to_thread(started.wait, 10)
    waiting.cancel()
    go_on.set()
    # The next write comes behind it on the one writer thread and sees what it did.
    count = sa.select(sa.func.count()).select_from(schema.codes)
    assert await database.write(lambda connection: connection.execute(count).scalar_one()) == 1
    assert waiting.cancelled()


@pytest.mark.parametrize("store", ["credentials", "accounts", "sessions", "audit", "nonce"])
async def test_r004_database_locked_by_another_process_is_unavailable(
    path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    # Patched because the real time-out is five seconds; what is tested is what comes of it.
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_S", 0.05)
    database = open_database(path)
    await SqlAccounts(database).add(ADA, "hash")
    await SqlCredentials(database).add_api_key(KEY, hmac=bytes(32), pepper_id="p1")
    session = BrowserSession(
        id="s", account_id="a1", csrf="", created_at=NOON, authenticated_at=NOON, last_used_at=NOON, expires_at=NOON
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = {
            "credentials": lambda: SqlCredentials(database).revoke_api_key("a1", "k1", now=NOON),
            "accounts": lambda: SqlAccounts(database).set_password_hash("a1", "x", now=NOON),
            "sessions": lambda: SqlSessions(database).add(session),
            "audit": lambda: SqlAudit(database).append(AuditEvent(at=NOON, actor="a", action="b", subject="c")),
            "nonce": lambda: SqlCredentials(database).use_nonce("n", now=NOON, expires_at=NOON),
        }[store]
        error = await error_of(writing())
        assert (error.code, error.status, error.retry_after_s) == ("unavailable", 503, 1)
        assert "sqlite" not in error.message.lower()
        # Reading goes on meanwhile, and shows no half of what was refused.
        found = await SqlCredentials(database).api_key("k1")
        assert found is not None
        assert found.key.revoked_at is None
        other.execute("ROLLBACK")
    await writing()
    await database.close()


@pytest.mark.parametrize("verb", ["write", "write_relaxed"])
async def test_r004_writes_that_wait_behind_one_lock_are_all_answered_in_one_wait(
    path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    # Patched because the real time-out is five seconds; what is tested is that five of them do not add up.
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_S", 0.2)
    database = open_database(path)
    write = getattr(database, verb)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        started = perf_counter()
        errors = [error_of(write(lambda connection: connection.exec_driver_sql("SELECT 1"))) for _ in range(5)]
        assert {error.code for error in await asyncio.gather(*errors)} == {"unavailable"}
        assert perf_counter() - started < 0.8
        other.execute("ROLLBACK")
    # Whoever comes afterwards has the whole wait for himself.
    await write(lambda connection: connection.exec_driver_sql("SELECT 1"))
    timeout = await write(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout").scalar())
    assert 120 <= timeout <= 200
    await database.close()


async def test_r004_read_that_waited_too_long_for_a_thread_is_unavailable(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_S", 0.05)
    started, go_on = threading.Barrier(3), threading.Event()

    def slow(connection: sa.Connection) -> None:
        started.wait(10)
        go_on.wait(10)

    slow_ones = [asyncio.create_task(database.read(slow)) for _ in range(2)]
    await asyncio.to_thread(started.wait, 10)
    waiting = asyncio.create_task(error_of(database.read(lambda connection: None)))
    await asyncio.to_thread(go_on.wait, 0.1)
    go_on.set()
    assert (await waiting).code == "unavailable"
    await asyncio.gather(*slow_ones)


@pytest.mark.parametrize("verb", ["write", "write_relaxed", "read"])
async def test_error_of_a_statement_does_not_tell_its_parameters(database: Database, verb: str) -> None:
    failing = sa.text("SELECT 1 FROM nowhere WHERE x = :secret").bindparams(secret="top-secret")
    error = await error_of(getattr(database, verb)(lambda connection: connection.execute(failing)))
    assert "nowhere" in str(error.__cause__)
    assert "top-secret" not in str(error.__cause__)


async def test_r003_full_disk_refuses_writes_and_serves_reads(database: Database) -> None:
    await SqlAccounts(database).add(ADA, "hash")
    pages = await database.write(lambda connection: connection.exec_driver_sql("PRAGMA page_count").scalar())
    await database.write(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={pages}"))
    audit = SqlAudit(database)
    event = AuditEvent(at=NOON, actor="a", action="b", subject="c", note="x" * 100_000)
    assert (await error_of(audit.append(event))).code == "unavailable"
    assert await SqlAccounts(database).by_id("a1") == ADA


async def test_t059_inline_read_of_a_damaged_file_is_unavailable(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    database = open_database(path)
    path.write_bytes(content)
    for reading in (SqlCredentials(database).api_key("k1"), SqlSessions(database).get("s"), SqlAccounts(database).by_name("Ada")):
        assert (await error_of(reading)).code == "unavailable"
    await database.close()


async def test_t057_text_of_every_kind_is_only_ever_a_parameter(database: Database) -> None:
    attack = "'; DROP TABLE accounts; --"
    await SqlAccounts(database).add(ADA, attack)
    assert await SqlAccounts(database).by_name(attack) is None
    assert await SqlCredentials(database).api_key(attack) is None
    assert await SqlSessions(database).get(attack) is None
    assert not await SqlCredentials(database).rename_device(attack, attack, attack)
    assert await SqlAccounts(database).password_hash("a1") == attack


@pytest.mark.parametrize("statement", ["device", "api_key", "session"])
def test_inline_reads_use_an_index_for_every_step(path: Path, statement: str) -> None:
    text = {
        "device": credentials._DEVICE_BY_KEY,
        "api_key": credentials._API_KEY_BY_ID,
        "session": sessions._BY_ID,
    }[statement]
    with closing(sqlite3.connect(path)) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", ("x",))]
    assert len(plan) == 2
    assert all(step.startswith("SEARCH") and "INDEX" in step for step in plan)


@pytest.mark.parametrize("micros", [2**63 - 1, -(2**63), 253_402_387_139_999_999])
async def test_t062_time_that_no_calendar_holds_hides_no_key_and_keeps_none_from_being_revoked(
    database: Database, path: Path, micros: int
) -> None:
    store = SqlCredentials(database)
    await SqlAccounts(database).add(ADA, "hash")
    await store.add_api_key(KEY, hmac=bytes(32), pepper_id="p1")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE api_keys SET expires_at = ?", (micros,))
    (listed,) = await store.api_keys_of("a1")
    found = await store.api_key("k1")
    assert found is not None
    assert found.key == listed
    assert listed.expires_at is not None
    assert (listed.expires_at > NOON) is (micros > 0)
    assert await store.revoke_api_key("a1", "k1", now=NOON)


def test_scopes_of_a_newer_release_give_nothing() -> None:
    assert parse_scopes("inference models:delete") == {Scope.INFERENCE}
    assert parse_scopes("") == frozenset()
    assert parse_scopes(format_scopes(Scope)) == frozenset(Scope)


# ── Killed in the middle ─────────────────────────────────────────────────────────────────────────────────────────────

_CHURN = """
import asyncio, os, signal, sys
from pathlib import Path
from corral.core.records import ApiKey, Scope
from corral.storage.sql.credentials import SqlCredentials
from corral.storage.sql.engine import open_database
from fakes import NOON

async def churn(path, round_number, said):
    store = SqlCredentials(open_database(Path(path)))
    for number in range(100_000):
        key_id = f"{round_number}-{number}"
        key = ApiKey(id=key_id, account_id="a1", name="n", prefix="p", scopes=frozenset(Scope), created_at=NOON)
        await store.add_api_key(key, hmac=bytes(32), pepper_id="p1")
        print("created", key.id, file=said, flush=True)
        await store.revoke_api_key("a1", key.id, now=NOON)
        print("revoked", key.id, file=said, flush=True)

for round_number in range(10):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        asyncio.run(churn(sys.argv[1], round_number, os.fdopen(writer, "w")))
    os.close(writer)
    with os.fdopen(reader) as said:
        # After more answers in each round.
        lines = [said.readline() for _ in range(2 + 3 * round_number)]
        os.kill(child, signal.SIGKILL)
        lines += said.readlines()
    os.waitpid(child, 0)
    # A line cut off by the kill was not answered.
    print("".join(line for line in lines if line.endswith("\\n")), end="", flush=True)
"""


@pytest.mark.flow
def test_r002_kill_in_create_and_revoke_keeps_what_was_answered(path: Path) -> None:
    database = open_database(path)
    asyncio.run(SqlAccounts(database).add(ADA, "hash"))
    database.close_now()
    environment = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "PATH": os.environ["PATH"]}
    # Forked by one process that imports once, and not by this one, which may have threads.
    command = [sys.executable, "-c", _CHURN, str(path)]
    answered = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, timeout=120
    ).stdout.splitlines()
    created = {line.split()[1] for line in answered if line.startswith("created")}
    revoked = {line.split()[1] for line in answered if line.startswith("revoked")}
    assert len(revoked) > 10

    database = open_database(path)
    keys = {key.id: key for key in asyncio.run(SqlCredentials(database).api_keys_of("a1"))}
    assert created <= keys.keys()
    assert [key_id for key_id in revoked if keys[key_id].revoked_at is None] == []
    # What was not answered is absent or whole, and can be revoked; nothing else is there.
    for key_id in keys.keys() - revoked:
        if keys[key_id].revoked_at is None:
            assert asyncio.run(SqlCredentials(database).revoke_api_key("a1", key_id, now=NOON))
    assert len(keys) <= len(created) + 10
    database.close_now()
