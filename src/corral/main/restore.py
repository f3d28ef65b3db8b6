"""Putting a backup in the place of a hub's data.

Nothing of a backup is where a hub would find it before all of it was read, checked and brought up to date beside. What was taken
away since, as far as the home's own log of revocations knows, is taken away again before anybody can use it (R13).
"""

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from corral.main.services import HUB_LOCK, REVOCATION_LOG, UNFINISHED, database_path
from corral.main.shared import SystemClock, SystemEntropy
from corral.settings import Settings
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    from corral.storage.archive import Manifest, Member
    from corral.storage.blobs import Progress
    from corral.storage.sql.engine import Database

#: What an empty home may hold nevertheless: locks, the root of a file system, what was not finished, and a log of revocations
#: that was brought here so that the backup does not undo them.
_NOTHING = (".lock", "lost+found", REVOCATION_LOG)
_UNFINISHED_PREFIX = ".corral-"
#: What stands behind the name of a file that was replaced.
_FORMER = re.compile(r"\.before-[0-9]{8}-[0-9]{6}(-[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenAgain:
    """Something that the backup still had, and that was taken away since. kind, subject: as the log of revocations has them.
    name: of the account or the API key, where that is the subject. owner: of a key, the account's name: what the key was rotated
    into, if it was, is in no backup."""

    kind: str
    subject: str
    name: str
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What became of a backup. created_at, version: of the backup. blobs, blob_bytes: that came from it. missing_blobs: that
    models have, and that are neither in the backup nor here. former: where the database is that was there before, if any.
    is_forgetful: there was neither a hub nor a log of revocations, so nobody knows what was revoked since.
    """

    created_at: datetime
    version: str
    accounts: int
    administrators: int
    blobs: int
    blob_bytes: int
    missing_blobs: int
    former: str
    is_forgetful: bool
    taken_again: Sequence[TakenAgain]


async def restore(
    settings: Settings, source: BinaryIO, *, may_replace: bool, announce: Callable[[datetime, int], None], report: "Progress"
) -> Restored:
    """Put a backup in the place of this machine's hub. source: read once, to its end. may_replace: whether there may be a hub;
    its database then stays beside. announce: told when the backup was made and how long it is. report: of the bytes read, from a
    thread.

    Raises: invalid for a backup that is none, damaged or of a newer Corral, conflict while a hub runs or when the home is not
    empty, storage_full, unavailable; nothing has changed then.
    """
    from corral.storage.archive import read_manifest
    from corral.storage.locks import held_alone
    from corral.storage.secretfile import ensure_private_dir
    from corral.storage.sql.snapshot import check_revision
    from corral.storage.workplace import workplace

    home, database = settings.corral_home, database_path(settings)
    manifest = await asyncio.to_thread(read_manifest, source)
    check_revision(manifest.revision)
    for directory in (home, database.parent):
        ensure_private_dir(directory, is_closed=True)
    running = f"a hub runs on {home}, or a command works on its data → stop it, and restore again"
    with held_alone(home / HUB_LOCK, otherwise=running), workplace(database.parent) as place:
        _check_home(home, database, may_replace=may_replace)
        _check_room(home, manifest)
        announce(manifest.created_at, manifest.size_bytes)
        incoming = _Incoming(home / "blobs", place)
        with incoming.cleared():
            await _read(source, manifest, incoming, report)
            return await _put_in_place(settings, manifest, incoming, place)


def _check_home(home: Path, database: Path, *, may_replace: bool) -> None:
    """Raises: conflict."""
    from corral.storage.sql.snapshot import refuse_open

    found = [entry.name for entry in home.iterdir() if not _is_nothing(entry)]
    if (found or database.exists()) and not may_replace and UNFINISHED not in found:
        advice = "set CORRAL_HOME to another one, or add --replace"
        if database.exists():
            advice += ", which keeps its database beside"
        raise CorralError("conflict", f"{home} is not empty → {advice}")
    if database.exists():
        # A hub of a release that knows nothing of our lock has it open all the same.
        refuse_open(database)


def _is_nothing(entry: Path) -> bool:
    """Whether a home that holds it may be called empty."""
    if entry.name == "blobs" and entry.is_dir():
        # As a restore leaves it that was killed.
        return all(inner.name.endswith(".tmp") for inner in entry.iterdir())
    return entry.name.endswith(_NOTHING) or entry.name.startswith(_UNFINISHED_PREFIX)


def _check_room(home: Path, manifest: "Manifest") -> None:
    needed = sum(member.size_bytes for member in manifest.members if not _is_there(home, member))
    blobs = home / "blobs"
    free = shutil.disk_usage(blobs if blobs.is_dir() else home).free
    if needed > free:
        text = f"the backup takes {needed:,} bytes, and {home} has room for {free:,}"
        raise CorralError("storage_full", f"{text} → free some, or set CORRAL_HOME to another disk")


def _is_there(home: Path, member: "Member") -> bool:
    """Whether it is a blob that the home has: content under that name is the same content."""
    try:
        return member.blob is not None and (home / member.name).stat().st_size == member.size_bytes
    except OSError:
        return False


class _Incoming:
    """What has been read of a backup, under names that no hub takes for content."""

    def __init__(self, blobs: Path, place: Path) -> None:
        self.blobs = blobs
        self._place = place
        #: Where a blob is, where it belongs, and how long it is.
        self.waiting: list[tuple[Path, Path, int]] = []

    @contextlib.contextmanager
    def place(self, member: "Member") -> Iterator[BinaryIO | None]:
        """A file for its content; None for a blob that is there."""
        from corral.storage.blobs import disk_errors
        from corral.storage.workplace import new_file

        if member.blob is None:
            path = self._place / member.name
        elif _is_there(self.blobs.parent, member):
            yield None
            return
        else:
            # What the hub's collector removes after an hour, should this process be killed.
            target = self.blobs / member.blob.file_name
            path = target.with_name(f"{target.name}.tmp")
            with disk_errors("the model store"):
                path.unlink(missing_ok=True)
            self.waiting.append((path, target, member.size_bytes))
        with new_file(path, what="the hub") as file:
            yield file

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """A block after which nothing is left that did not come to its place; nor the directory, if it ends badly."""
        was_there = self.blobs.exists()
        is_done = False
        try:
            yield
            is_done = True
        finally:
            for path, _, _ in self.waiting:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            if not (is_done or was_there):
                with contextlib.suppress(OSError):
                    self.blobs.rmdir()

    def settle(self) -> None:
        """Give the blobs their names. Raises: unavailable."""
        from corral.storage.blobs import disk_errors, sync_dir

        with disk_errors("the model store"):
            for path, target, _ in self.waiting:
                path.replace(target)
            if self.waiting:
                sync_dir(self.blobs)


async def _read(source: BinaryIO, manifest: "Manifest", incoming: _Incoming, report: "Progress") -> None:
    from corral.storage.archive import read_members
    from corral.storage.blobs import in_thread_reporting

    if manifest.blobs:
        from corral.storage.secretfile import ensure_private_dir

        ensure_private_dir(incoming.blobs, is_closed=True)
    await in_thread_reporting(lambda progress: read_members(source, manifest, incoming.place, progress), report)


async def _put_in_place(settings: Settings, manifest: "Manifest", incoming: _Incoming, place: Path) -> Restored:
    from corral.storage.archive import DATABASE, PEPPERS
    from corral.storage.blobs import in_thread
    from corral.storage.secretfile import load_or_create_peppers
    from corral.storage.sql.snapshot import check_copy, count_accounts, kept_blobs, make_whole, open_copy

    home, copy, clock = settings.corral_home, place / DATABASE, SystemClock()
    # Asked before the log is made of what the backup knows.
    is_forgetful = not ((home / REVOCATION_LOG).exists() or database_path(settings).exists())
    # Read, so that damaged ones do not come to their place.
    load_or_create_peppers(place / PEPPERS, SystemEntropy())
    await asyncio.to_thread(check_copy, copy)
    database = await asyncio.to_thread(partial(open_copy, copy, log=home / REVOCATION_LOG))
    try:
        taken, administrators = await _bring_up_to_date(database, manifest, clock.now())
    finally:
        await database.close()
    await asyncio.to_thread(make_whole, copy)
    kept, accounts = kept_blobs(copy), count_accounts(copy)
    former = _former(home, database_path(settings), clock.now())
    # Not to be stopped half-way by Ctrl-C.
    had_one = await in_thread(partial(_exchange, home, database_path(settings), place, incoming, former))
    return Restored(
        created_at=manifest.created_at,
        version=manifest.version,
        accounts=accounts,
        administrators=administrators,
        blobs=len(incoming.waiting),
        blob_bytes=sum(size for _, _, size in incoming.waiting),
        missing_blobs=sum(not (home / "blobs" / blob.digest.file_name).is_file() for blob in kept),
        former=f"{database_path(settings)}{former}" if had_one else "",
        is_forgetful=is_forgetful,
        taken_again=taken,
    )


async def _bring_up_to_date(database: "Database", manifest: "Manifest", now: datetime) -> tuple[Sequence[TakenAgain], int]:
    """Take away again what was taken away since, and say in the audit log what this is. How many administrators are left, too."""
    from corral.core.records import AuditEvent
    from corral.hub.accounts import CONSOLE
    from corral.storage.revocations import Kind
    from corral.storage.sql.accounts import SqlAccounts
    from corral.storage.sql.audit import SqlAudit
    from corral.storage.sql.credentials import SqlCredentials
    from corral.storage.sql.revocations import catch_up

    taken = await catch_up(database, now=now)
    note = f"of {manifest.created_at:%Y-%m-%d %H:%M:%S} UTC, Corral {manifest.version}"
    await SqlAudit(database).append(AuditEvent(at=now, actor=CONSOLE, action="hub.restore", subject="", note=note))
    accounts, credentials = await SqlAccounts(database).list(), SqlCredentials(database)
    names = {account.id: account.name for account in accounts}
    again = []
    for one in taken:
        name, owner = names.get(one.subject, ""), ""
        if one.kind is Kind.KEY and (stored := await credentials.api_key(one.subject)):
            name, owner = stored.key.name, stored.owner.name
        again.append(TakenAgain(kind=one.kind, subject=one.subject, name=name, owner=owner))
    return again, sum(account.is_admin and account.is_active for account in accounts)


def _exchange(home: Path, database: Path, place: Path, incoming: _Incoming, former: str) -> bool:
    """Put the new data where the old ones are, which stay beside; whether there was a database. A hub that starts while this is
    not finished says so instead: it might find an old database with new peppers."""
    from corral.storage.archive import DATABASE, PEPPERS
    from corral.storage.blobs import disk_errors, sync_dir
    from corral.storage.secretfile import write_private

    incoming.settle()
    had_one = database.exists()
    with disk_errors("the hub"):
        write_private(home / UNFINISHED, former.encode())
        # SQLite finds a log by the name of its database.
        for suffix in ("", "-wal"):
            _keep(Path(f"{database}{suffix}"), Path(f"{database}{former}{suffix}"))
        _keep(home / PEPPERS, home / f"{PEPPERS}{former}")
        for directory in {home, database.parent}:
            sync_dir(directory)
        # One that a killed process left would be taken for that of the new database.
        for suffix in ("-wal", "-shm"):
            Path(f"{database}{suffix}").unlink(missing_ok=True)
        write_private(home / PEPPERS, (place / PEPPERS).read_bytes())
        # Made anew at the next start, so that no token or link of before is good any more, by whatever copy of the keys.
        (home / "registry-keys.json").unlink(missing_ok=True)
        _sync(place / DATABASE)
        (place / DATABASE).replace(database)
        sync_dir(database.parent)
        (home / UNFINISHED).unlink()
        sync_dir(home)
    return had_one


def _former(home: Path, database: Path, now: datetime) -> str:
    """What is put behind the names of files that are replaced: of a restore that was not finished the same, as some of what it
    would have replaced may be new already."""
    from corral.storage.secretfile import read_private

    noted = (read_private(home / UNFINISHED) or b"").decode("ascii", "replace")
    if _FORMER.fullmatch(noted):
        return noted
    former = stamp = f".before-{now:%Y%m%d-%H%M%S}"
    number = 1
    while Path(f"{database}{former}").exists() or (home / f"peppers.json{former}").exists():
        number += 1
        former = f"{stamp}-{number}"
    return former


def _keep(path: Path, kept: Path) -> None:
    """Give a file that will be replaced a second name, unless it has it since the first attempt."""
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        os.link(path, kept)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
