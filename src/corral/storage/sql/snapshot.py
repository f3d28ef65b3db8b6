"""A copy of the database for a backup, and what has to be true of one before it is put into a hub's place.

The copy is made by `VACUUM INTO`: one consistent state, read beside writers in WAL mode without holding them up, and unlike a
copy page by page without the remains of rows that were deleted. What is good for minutes is then taken out of it: browser
sessions, one-time codes, nonces, and uploads whose bytes are in no backup.
"""

import contextlib
import fcntl
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.storage.sql.engine import BUSY_TIMEOUT_S, Database, open_database
from corral.storage.sql.schema import HEAD, metadata
from corral.wire.errors import CorralError
from corral.wire.names import Digest, parse_content_digest

_REVISION, _FIRST = re.compile(r"[0-9]{4}"), "0001"
#: Which bytes of a database its readers lock. Source: SQLite src/os.h, SHARED_FIRST and SHARED_SIZE.
_SHARED_FIRST, _SHARED_SIZE = 0x40000000 + 2, 510
#: Steps of SQLite's machine: some microseconds each.
_ASKED_EVERY = 1000
_SHORT_LIVED = (
    "DELETE FROM sessions",
    "DELETE FROM codes",
    "DELETE FROM nonces",
    "DELETE FROM uploads WHERE finished_as IS NULL",
)
#: Each blob that somebody has, once.
_BLOBS = (
    "SELECT digest, size_bytes, damaged_at IS NOT NULL FROM blobs"
    " WHERE digest IN (SELECT digest FROM repository_blobs) AND NOT condemned ORDER BY digest"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBlob:
    """A blob that a repository has. is_damaged: what was read of it last was something else, so that it was set aside."""

    digest: Digest
    size_bytes: int
    is_damaged: bool


class Snapshot:
    """The taking of one copy, which another thread may stop."""

    def __init__(self, database: Path) -> None:
        self._connection = _connect(database)
        self._is_stopped = False
        # Asked now and then by SQLite itself; an interrupt that comes before there is anything to interrupt would be lost.
        self._connection.set_progress_handler(lambda: self._is_stopped, _ASKED_EVERY)

    def stop(self) -> None:
        """Have `take` end with canceled. Safe in any thread."""
        self._is_stopped = True

    def _check(self) -> None:
        if self._is_stopped:
            raise CorralError("canceled")

    def take(self, target: Path) -> None:
        """Write it into a file that does not exist. Raises: storage_full, unavailable, canceled."""
        try:
            with contextlib.closing(self._connection):
                self._connection.execute("VACUUM INTO ?", (str(target),))
            remove_short_lived(target)
        except sqlite3.Error as error:
            self._check()
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise CorralError("storage_full", "no space left for a copy of the database; free some and try again") from error
            raise CorralError("unavailable", f"the database cannot be copied: {error}") from error
        self._check()


def remove_short_lived(path: Path) -> None:
    """Take out of a closed database what ends with the time it was copied at. Raises: sqlite3.Error."""
    with contextlib.closing(_connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA secure_delete=ON")
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SHORT_LIVED:
            connection.execute(statement)
        connection.execute("COMMIT")


def kept_blobs(path: Path) -> Sequence[KeptBlob]:
    """Every blob that the repositories of a copy have, by digest."""
    with contextlib.closing(_connect(path)) as connection:
        return [
            KeptBlob(digest=parse_content_digest(digest), size_bytes=size_bytes, is_damaged=bool(is_damaged))
            for digest, size_bytes, is_damaged in connection.execute(_BLOBS)
        ]


def count_accounts(path: Path) -> int:
    """How many people have an account there."""
    with contextlib.closing(_connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM accounts WHERE deleted_at IS NULL").fetchone()[0])


def check_revision(revision: str) -> None:
    """Raises: invalid for a schema that this Corral does not know."""
    if not _REVISION.fullmatch(revision) or revision < _FIRST:
        raise CorralError("invalid", "the backup does not say which schema its database has")
    if revision > HEAD:
        text = f"the backup was made by a newer Corral (schema {revision}, this one knows {HEAD})"
        raise CorralError("invalid", f"{text} → install that version and restore with it")


def check_copy(path: Path) -> None:
    """Whether it is the sound database of a hub, of a schema that this Corral can bring up to date. Raises: invalid."""
    with _not_a_hubs(), contextlib.closing(_connect(path)) as connection:
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise CorralError("invalid", f"the database in the backup is damaged: {found}")
        check_revision(str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]))


def open_copy(path: Path, *, log: Path) -> Database:
    """Open a checked copy as the database of this hub: brought up to date, and without what is short-lived. Raises: invalid."""
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    with _not_a_hubs(SQLAlchemyError, CommandError):
        open_database(path).close_now()
        with contextlib.closing(_connect(path)) as connection:
            for table in metadata.sorted_tables:
                found = {row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")}
                if not set(table.columns.keys()) <= found:
                    raise CorralError("invalid", f"the database in the backup is not that of a hub: {table.name} is not right")
        remove_short_lived(path)
        return open_database(path, log=log)


def make_whole(path: Path) -> None:
    """Have a database that nobody has open in its one file, without a log beside it. Raises: unavailable."""
    with contextlib.closing(_connect(path)) as connection:
        try:
            mode = connection.execute("PRAGMA journal_mode=DELETE").fetchone()[0]
        except sqlite3.Error as error:
            raise CorralError("unavailable", f"the database cannot be written: {error}") from error
    if mode != "delete":
        raise CorralError("unavailable", "the database cannot be written: it stays in two files")


def refuse_open(path: Path) -> None:
    """Whether no other process has a database open. It is not opened for that: SQLite would at once set about mending a damaged
    one, and do away with its log. Raises: conflict, unavailable."""
    try:
        with path.open("r+b", buffering=0) as file:
            # Held by every connection in WAL mode for as long as it is open.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, _SHARED_SIZE, _SHARED_FIRST)
    except (BlockingIOError, PermissionError) as error:
        text = f"something has {path} open → stop the hub, and whatever else works on its data"
        raise CorralError("conflict", text) from error
    except OSError as error:
        raise CorralError("unavailable", f"{path} cannot be opened: {error.strerror}") from error


@contextlib.contextmanager
def _not_a_hubs(*more: type[Exception]) -> Iterator[None]:
    errors: tuple[type[Exception], ...] = (sqlite3.Error, TypeError, *more)
    try:
        yield
    except errors as error:
        raise CorralError("invalid", "the database in the backup is not that of a hub, or it is damaged") from error


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
