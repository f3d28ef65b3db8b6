"""What was taken away for good, in a file of its own beside the database, so that no older database can give it back (R13).

```
<home>/revocations.log   0600; one JSON object per line, only ever appended to: {"at":…,"kind":…,"subject":…,"value":…}
```

Theory of operation. The database has the same lines in a table (`revocations`). A line is appended and synced as the last thing
inside the transaction that takes something away, just before its commit; the database's one writer thus puts the lines of all
processes into the order of the commits. When the commit fails the line is taken back; when the process dies between the two, the
file has a line that the table lacks, as it has after an older database was put in its place. `storage.sql.revocations` then does
what the line says.

Every kind only takes away and never gives, so that the order does not matter, nothing is lost by doing it again, and two logs are
joined by putting their lines together. Whoever is given back what was taken (an account enabled again) has to be given it once
more after a restore. Lines hold ids, times, scopes and rights, and no secret.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec

from corral.storage.blobs import disk_errors, sync_dir
from corral.storage.secretfile import refuse_exposed
from corral.wire.errors import CorralError

_WHAT = "the log of revocations"


class Kind(StrEnum):
    """What was taken away. Each says what the subject is and, where there is one, the value."""

    #: An API key. value: when it ends, empty for at once.
    KEY = "key"
    #: A device.
    DEVICE = "device"
    #: A device. value: the scopes that it kept at most.
    DEVICE_SCOPES = "device-scopes"
    #: An account, that was locked out.
    ACCOUNT = "account"
    #: An account, that is gone for good.
    ACCOUNT_DELETED = "account-deleted"
    #: An account, that is no administrator any more.
    ADMINISTRATOR = "administrator"
    #: An account, whose password was replaced.
    PASSWORD = "password"  # noqa: S105 - a word, and no password
    #: An account. value: the repository's id, and the right that was left, if any.
    COLLABORATOR = "collaborator"
    #: A repository, that is public no more.
    PUBLIC = "public"


class Revocation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line. at: when it was taken away, first so that lines sort by it."""

    at: Annotated[datetime, msgspec.Meta(tz=True)]
    kind: Kind
    subject: str
    value: str = ""

    @property
    def line(self) -> str:
        """As it is kept."""
        return msgspec.json.encode(self).decode()


def parse_revocation(line: str) -> Revocation:
    """The revocation of a line. Raises: invalid."""
    try:
        return msgspec.json.decode(line, type=Revocation)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise CorralError(
            "invalid",
            "revocations.log has a line that this Corral cannot read: it is damaged, or a newer Corral wrote it → install that "
            "version again, or move the file away: what the database knows is written anew",
        ) from error


class RevocationLog:
    """The file. Whoever appends holds the write lock of the database, so there is one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        #: Open between an append and the end of its transaction, and how long the file was before.
        self._open: tuple[int, int] | None = None

    def read(self) -> Sequence[str]:
        """Its lines; none where there is no file. What a power cut tore was never acknowledged and does not count. Raises:
        invalid for a file that others can read."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise CorralError("invalid", f"{self._path} cannot be read: {error.strerror}") from error
        try:
            refuse_exposed(self._path, os.fstat(descriptor))
        except CorralError:
            os.close(descriptor)
            raise
        with os.fdopen(descriptor, "rb") as file:
            whole, _, _ = file.read().rpartition(b"\n")
        return whole.decode("utf-8", "surrogateescape").split("\n") if whole else ()

    def append(self, *lines: str) -> None:
        """Have them on the disk, inside a block of `transaction`. Raises: storage_full, unavailable, invalid."""
        with disk_errors(_WHAT):
            if self._open is None:
                self._open = self._opened()
            descriptor, _ = self._open
            rest = memoryview("".join(f"{line}\n" for line in lines).encode())
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)

    def _opened(self) -> tuple[int, int]:
        is_new = not self._path.exists()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, 0o600)
        try:
            refuse_exposed(self._path, os.fstat(descriptor))
            # Somebody whose commit failed may not have taken his line back yet.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = _end_of_last_line(descriptor)
            os.ftruncate(descriptor, size)
            if is_new:
                sync_dir(self._path.parent)
        except (OSError, CorralError):
            os.close(descriptor)
            raise
        return descriptor, size

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """A block around a transaction of the database. What is appended in it stays when the block ends well."""
        try:
            yield
        except BaseException:
            if self._open is not None:
                # Where that fails too, the line is carried out at the next start: more is taken away than was, never less.
                with contextlib.suppress(OSError):
                    os.ftruncate(*self._open)
                    os.fsync(self._open[0])
            raise
        finally:
            if self._open is not None:
                os.close(self._open[0])
                self._open = None


def _end_of_last_line(descriptor: int) -> int:
    """Where the last whole line ends."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 4096)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
