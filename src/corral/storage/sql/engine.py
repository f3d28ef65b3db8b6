"""The database file: how it is opened, migrated, read and written.

Theory of operation. SQLite in WAL mode lets any number of readers run beside one writer, so there are several ways in:

- `write` and `write_relaxed` run a function in a transaction on the one writer thread, in order of arrival. `write` waits for the
  disk (synchronous=FULL): what it answered survives a power cut. `write_relaxed` (synchronous=NORMAL) survives a killed process
  but may lose its last moments in a power cut; it is for nonces, usage and last-used times.
- `write_row` runs one prepared statement on that thread, relaxed, past SQLAlchemy: 0.1 ms where a transaction takes 0.5 ms, for
  the one write that requests wait for, the nonce's.
- `read` runs a function on a reader thread: lists and sums.
- `row` runs one prepared, indexed statement right here on the event loop. A hop to a thread costs some 100 µs, the read itself
  about 10 µs, and authentication is on every request's path. `look_up` remembers what was made of a row until anything is
  written, by whatever process: SQLite says so itself, of the very snapshot that would be read, so nothing old is ever given.

A transaction is cancelled only while it waits for its turn; once begun it ends by itself, even if nobody waits for it any more.
Other processes (the administration commands) may write as well; what has not begun five seconds after it was asked for, because
of a lock or of what stands before it, is `unavailable`.
"""

import asyncio
import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from corral.storage.revocations import Revocation, RevocationLog
from corral.storage.secretfile import ensure_private_dir, refuse_exposed
from corral.storage.sql import schema
from corral.wire.errors import CorralError

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
_READER_THREADS = 2
#: To tell SQLite of every millisecond that was waited before would cost more than the write.
_PATIENCE_GRAIN_MS = 250
#: Rows that `look_up` remembers, each a kilobyte or two.
_MAX_KNOWN = 4096


class Database:
    """One open database. Made by `open_database`; whoever opened it calls `close`. log: what was taken away for good."""

    def __init__(self, path: Path, log: RevocationLog) -> None:
        self.log = log
        self._durable = _write_engine(path, "FULL")
        self._relaxed = _write_engine(path, "NORMAL")
        self._readers = _read_engine(path)
        self._hot = _connect_read_only(path)
        self._quick = _QuickWriter(path)
        #: What `look_up` made of rows, as of this version of the database.
        self._known: dict[tuple[str, tuple[object, ...]], Any] = {}
        self._known_version = -1
        self._writer_thread = ThreadPoolExecutor(1, thread_name_prefix="corral-db-write")
        self._reader_threads = ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="corral-db-read")

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run work in a transaction that is on the disk when this returns. Raises: unavailable; IntegrityError passes through."""

        return await self._run(self._writer_thread, self._durable, work, around=self.log.transaction)

    async def write_relaxed(self, work: Callable[[sa.Connection], T]) -> T:
        """Run work in a transaction that may be lost in a power cut, though not when the process is killed."""
        return await self._run(self._writer_thread, self._relaxed, work)

    async def write_row(self, sql: str, *parameters: object) -> int:
        """Run one statement as a transaction of its own, as lasting as `write_relaxed` is. Returns: how many rows it changed."""
        deadline = monotonic() + BUSY_TIMEOUT_S
        work = self._quick.run
        return await asyncio.get_running_loop().run_in_executor(self._writer_thread, work, sql, parameters, deadline)

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run work on one consistent snapshot."""
        return await self._run(self._reader_threads, self._readers, work)

    def revoke(self, connection: sa.Connection, revocation: Revocation) -> None:
        """The last thing that work given to `write` does when it takes something away: have that in the log, where no older
        database can undo it. Raises: storage_full, unavailable; nothing is taken away then."""
        connection.execute(schema.revocations.insert().prefix_with("OR IGNORE").values(line=revocation.line))
        self.log.append(revocation.line)

    def row(self, sql: str, *parameters: object) -> tuple[Any, ...] | None:
        """The row of one indexed look-up, read inline: never for anything that may walk a table.

        A device with its owner takes 9 µs from Python to Python, 17 µs once it is made into records (CPython 3.11, in the cache).
        """
        try:
            # fetchall, not fetchone: an unfinished statement would hold its snapshot open, and the next look-up on this
            # connection would still see a key that was revoked meanwhile.
            rows = self._hot.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise _unavailable() from error
        except UnicodeEncodeError:
            return None  # a lone surrogate: no row can hold it
        return rows[0] if rows else None

    def look_up(self, sql: str, make: Callable[[tuple[Any, ...]], T], *parameters: object) -> T | None:
        """What make makes of the row of one indexed look-up; the same object as last time when nothing was written since, so it
        must be one that nobody changes. Asking for the version takes 5 µs, where a device with its owner takes 17 µs.
        """
        try:
            # Of other connections' commits, which all are: this one only reads. Source: SQLite, PRAGMA data_version.
            ((version,),) = self._hot.execute("PRAGMA data_version").fetchall()
        except sqlite3.Error as error:
            raise _unavailable() from error
        if version != self._known_version or len(self._known) >= _MAX_KNOWN:
            self._known.clear()
            self._known_version = version
        known: T | None = self._known.get((sql, parameters))
        if known is None and (row := self.row(sql, *parameters)) is not None:
            known = self._known[sql, parameters] = make(row)
        return known

    async def close(self) -> None:
        """Finish what was begun and close all files. Safe to call twice."""
        await asyncio.to_thread(self.close_now)

    def close_now(self) -> None:
        """The same for callers without an event loop; waits for what was begun."""
        self._reader_threads.shutdown()
        self._writer_thread.shutdown()
        self._hot.close()
        self._quick.close()
        for engine in (self._readers, self._relaxed, self._durable):
            engine.dispose()

    async def _run(
        self,
        threads: ThreadPoolExecutor,
        engine: sa.Engine,
        work: Callable[[sa.Connection], T],
        *,
        around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> T:
        # Counted from here and not from its turn: else whoever stands behind others that wait for a lock waits for each of them.
        deadline = monotonic() + BUSY_TIMEOUT_S
        return await asyncio.get_running_loop().run_in_executor(threads, _in_transaction, engine, work, deadline, around)


class _QuickWriter:
    """The driver's own connection, for single statements. Used on the writer thread alone."""

    def __init__(self, path: Path) -> None:
        # Without the driver's transactions each statement is one, which waits for the lock as BEGIN IMMEDIATE does.
        self._connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._patience_ms = int(BUSY_TIMEOUT_S * 1000)

    def run(self, sql: str, parameters: tuple[object, ...], deadline: float) -> int:
        """Raises: unavailable."""
        left_ms = _left_ms(deadline)
        try:
            if abs(left_ms - self._patience_ms) > _PATIENCE_GRAIN_MS:
                self._connection.execute(f"PRAGMA busy_timeout={left_ms}")
                self._patience_ms = left_ms
            return self._connection.execute(sql, parameters).rowcount
        except sqlite3.Error as error:
            raise _unavailable() from error

    def close(self) -> None:
        """Safe to call twice."""
        self._connection.close()


def _left_ms(deadline: float) -> int:
    """Raises: unavailable when nothing is left."""
    left_ms = int((deadline - monotonic()) * 1000)
    if left_ms <= 0:
        raise _unavailable()
    return left_ms


def _in_transaction(
    engine: sa.Engine,
    work: Callable[[sa.Connection], T],
    deadline: float,
    around: Callable[[], AbstractContextManager[None]],
) -> T:
    left_ms = _left_ms(deadline)
    try:
        with engine.connect() as connection:
            # Past SQLAlchemy, which would begin the transaction, and with it wait for the lock, before the first statement.
            connection.connection.cursor().execute(f"PRAGMA busy_timeout={left_ms}")
            with around(), connection.begin():
                return work(connection)
    except IntegrityError:
        raise  # the store knows which rule was broken and says so
    except DBAPIError as error:
        raise _unavailable() from error


def _unavailable() -> CorralError:
    return CorralError("unavailable", "the hub's database is busy or cannot be written; try again", retry_after_s=1)


def is_conflict(error: IntegrityError) -> bool:
    """Whether a unique index or primary key refused the row (and not a foreign key or a check)."""
    unique = (sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY)
    return isinstance(error.orig, sqlite3.IntegrityError) and error.orig.sqlite_errorcode in unique


# ── Opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_database(path: Path, *, log: Path | None = None) -> Database:
    """Open the file, creating it (0600, in a 0700 directory) and bringing its tables up to date. log: of revocations, beside it
    unless said otherwise.

    Two processes that start at once take turns: one migrates, the other finds the work done. Raises: invalid when a newer Corral
    wrote the file, when it is no database, or when it or its directory is open to other users; unavailable when another process
    holds it.
    """
    ensure_private_dir(path.parent, is_closed=True)
    with _start_lock(path.with_name(path.name + ".lock")):
        # SQLite would create the file by the umask; its -wal and -shm files take over the mode they find here.
        os.close(_open_private(path))
        _refuse_exposed_logs(path)
        try:
            _migrate(path)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
                raise CorralError("invalid", f"{path.name} is not a database; move it away and start again") from error
            raise _unavailable() from error
        return Database(path, RevocationLog(log or path.with_name("revocations.log")))


@contextlib.contextmanager
def _start_lock(path: Path) -> Iterator[None]:
    descriptor = _open_private(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_private(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CorralError("invalid", f"{path} cannot be opened: {error.strerror}") from error
    try:
        refuse_exposed(path, os.fstat(descriptor))
    except CorralError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_exposed_logs(path: Path) -> None:
    """The files beside the database that were left there, or that another process has open: they hold pages of it."""
    for suffix in ("-wal", "-shm"):
        log = path.with_name(path.name + suffix)
        # Not opened: closing a descriptor would drop the locks that a connection of this process holds.
        with contextlib.suppress(FileNotFoundError):
            refuse_exposed(log, log.lstat())


def _migrate(path: Path) -> None:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        version = _version_of(connection)
    finally:
        connection.close()
    if version == schema.HEAD:
        return
    if version is not None and version > schema.HEAD:
        raise CorralError(
            "invalid",
            f"the database was written by a newer Corral (schema {version}, this one knows {schema.HEAD}); "
            "install that version again or restore a backup",
        )
    # Alembic takes a quarter of a second to import, so it is loaded only when there is something to do.
    from corral.storage.sql.migrations import upgrade

    engine = _write_engine(path, "FULL")
    try:
        upgrade(engine)
    finally:
        engine.dispose()


def _version_of(connection: sqlite3.Connection) -> str | None:
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchall()
    rows = connection.execute("SELECT version_num FROM alembic_version").fetchall() if found else []
    return str(rows[0][0]) if rows else None


def _engine(path: Path, *, pool_size: int) -> sa.Engine:
    return sa.create_engine(
        f"sqlite:///{path}",
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"timeout": BUSY_TIMEOUT_S},
        # Errors end in logs; the values of statements are hashes, addresses and names.
        hide_parameters=True,
    )


def _write_engine(path: Path, synchronous: str) -> sa.Engine:
    # pool_size=1: the writer thread is the only user. BEGIN IMMEDIATE, because a transaction that reads first and writes later
    # would otherwise fail at once when another process wrote in between, without waiting for its turn.
    engine = _engine(path, pool_size=1)
    _take_over_transactions(engine, "BEGIN IMMEDIATE", [f"PRAGMA synchronous={synchronous}", "PRAGMA foreign_keys=ON"])
    return engine


def _read_engine(path: Path) -> sa.Engine:
    engine = _engine(path, pool_size=_READER_THREADS)
    _take_over_transactions(engine, "BEGIN", ["PRAGMA query_only=ON"])
    return engine


def _take_over_transactions(engine: sa.Engine, begin: str, pragmas: list[str]) -> None:
    """Have SQLAlchemy begin transactions with our words; the driver's own guess covers neither DDL nor reads."""

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None
        for pragma in pragmas:
            connection.execute(pragma)

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)


def _connect_read_only(path: Path) -> sqlite3.Connection:
    # In WAL mode a reader waits only while another process recovers or removes the log, so a short time-out is enough here,
    # where waiting holds up the event loop.
    connection = sqlite3.connect(path, timeout=0.25, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA query_only=ON")
    connection.execute("PRAGMA mmap_size=268435456")
    return connection
