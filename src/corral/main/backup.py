"""Backing a hub up into one archive, whether or not it runs; see storage/archive.py for what is in it."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import corral
from corral.main.services import HubServices, database_path, open_existing_hub
from corral.settings import Settings
from corral.wire.errors import CorralError

if TYPE_CHECKING:
    from corral.storage.archive import Manifest, Member
    from corral.storage.blobs import Progress
    from corral.storage.sql.snapshot import KeptBlob

#: How long a backup waits for a collection that is under way, and how often it looks. One takes seconds.
_PATIENCE_S, _LOOK_EVERY_S = 60.0, 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupPlan:
    """What a backup will be. database_bytes, blob_bytes: what is to be copied. size_bytes: of the whole archive. damaged: blobs
    that are known to be, and therefore are no part of it."""

    created_at: datetime
    version: str
    revision: str
    accounts: int
    has_blobs: bool
    blobs: int
    blob_bytes: int
    database_bytes: int
    size_bytes: int
    damaged: Sequence[str]


async def back_up(
    settings: Settings,
    target: Path | BinaryIO,
    *,
    with_blobs: bool,
    announce: Callable[[BackupPlan], None],
    report: "Progress",
) -> BackupPlan:
    """Write one archive of this machine's hub. target: a file, which appears when it is whole, or a stream. announce: told before
    anything large is copied. report: of the bytes copied, from a thread.

    Raises: not_found where there is no hub; conflict while a collection goes on for very long, and when a blob is damaged;
    invalid for a target that may not be written, storage_full, unavailable.
    """
    from corral.storage.workplace import check_target, workplace

    # As late as possible it would be found out after hours.
    if isinstance(target, Path):
        await asyncio.to_thread(check_target, target)
    async with open_existing_hub(settings) as services, _no_collection(settings, is_needed=with_blobs):
        with workplace(target.parent if isinstance(target, Path) else settings.corral_home) as place:
            await _note(services, with_blobs=with_blobs)
            manifest, plan = await _prepare(settings, services, place / "hub.db", with_blobs=with_blobs)
            if isinstance(target, Path):
                _check_room(target.parent, plan.size_bytes)
            announce(plan)
            await _write(settings, place, manifest, target, report)
    return plan


@contextlib.asynccontextmanager
async def _no_collection(settings: Settings, *, is_needed: bool) -> AsyncIterator[None]:
    """Hold off the removal of blobs, from before the database is copied until the last of its blobs is. A hub that would collect
    meanwhile does so an hour later. Raises: conflict."""
    from corral.storage.locks import held_alone

    if not is_needed:
        yield
        return
    path, loop = settings.corral_home / "collect.lock", asyncio.get_running_loop()
    text = "content is being collected and that does not end; try again later"
    deadline = loop.time() + _PATIENCE_S
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(held_alone(path, otherwise=text))
                break
            except CorralError as error:
                if error.code != "conflict" or loop.time() > deadline:
                    raise
            await asyncio.sleep(_LOOK_EVERY_S)
        yield


async def _note(services: HubServices, *, with_blobs: bool) -> None:
    """Say in the audit log that everything was read. A database that cannot be written must be backed up all the same."""
    from corral.core.records import AuditEvent
    from corral.hub.accounts import CONSOLE

    note = "with blobs" if with_blobs else "without blobs"
    try:
        await services.audit.append(
            AuditEvent(at=services.clock.now(), actor=CONSOLE, action="hub.backup", subject="", note=note)
        )
    except CorralError as error:
        if error.code not in ("unavailable", "storage_full"):
            raise


async def _prepare(settings: Settings, services: HubServices, copy: Path, *, with_blobs: bool) -> "tuple[Manifest, BackupPlan]":
    from corral.storage.blobs import in_thread
    from corral.storage.sql.snapshot import Snapshot

    now = services.clock.now()
    snapshot = Snapshot(database_path(settings))
    await in_thread(partial(snapshot.take, copy), on_cancel=snapshot.stop)
    return await in_thread(partial(_describe, settings, copy, now=now, with_blobs=with_blobs))


def _describe(settings: Settings, copy: Path, *, now: datetime, with_blobs: bool) -> "tuple[Manifest, BackupPlan]":
    from corral.storage.archive import DATABASE, PEPPERS, Manifest, archive_size, blob_member, file_member
    from corral.storage.blobs import open_regular
    from corral.storage.sql.schema import HEAD
    from corral.storage.sql.snapshot import count_accounts, kept_blobs

    with open_regular(copy, shown_as=DATABASE) as file:
        members = [file_member(DATABASE, file)]
    with open_regular(settings.corral_home / PEPPERS, shown_as=PEPPERS) as file:
        members.append(file_member(PEPPERS, file))
    kept = kept_blobs(copy) if with_blobs else ()
    damaged = [str(blob.digest) for blob in kept if not _is_there(settings, blob)]
    members += [blob_member(blob.digest, blob.size_bytes) for blob in kept if str(blob.digest) not in damaged]
    manifest = Manifest(version=corral.__version__, revision=HEAD, created_at=now, has_blobs=with_blobs, members=members)
    return manifest, BackupPlan(
        created_at=now,
        version=manifest.version,
        revision=HEAD,
        accounts=count_accounts(copy),
        has_blobs=with_blobs,
        blobs=len(manifest.blobs),
        blob_bytes=sum(member.size_bytes for member in manifest.blobs),
        database_bytes=members[0].size_bytes,
        size_bytes=archive_size(manifest),
        damaged=damaged,
    )


def _is_there(settings: Settings, blob: "KeptBlob") -> bool:
    """False for a blob that is known to be damaged and was set aside. Raises: unavailable when it is gone otherwise."""
    if (settings.corral_home / "blobs" / blob.digest.file_name).is_file():
        return True
    if blob.is_damaged:
        return False
    text = f"blob {str(blob.digest)[:19]} belongs to a model and is not there"
    raise CorralError("unavailable", f"{text} → corral hub scrub names the models, or back up --without-blobs")


def _check_room(directory: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if size_bytes > free:
        text = f"the backup takes {size_bytes:,} bytes, and {directory} has room for {free:,}"
        raise CorralError("storage_full", f"{text} → free some, or give a file on another disk")


async def _write(settings: Settings, place: Path, manifest: "Manifest", target: Path | BinaryIO, report: "Progress") -> None:
    from corral.storage.archive import DATABASE, PEPPERS, write_archive
    from corral.storage.blobs import in_thread_reporting, open_regular
    from corral.storage.workplace import check_target, new_file, put_in_place

    def open_member(member: "Member") -> BinaryIO:
        where = {DATABASE: place / "hub.db", PEPPERS: settings.corral_home / PEPPERS}
        path = where.get(member.name) or settings.corral_home / member.name
        try:
            return open_regular(path, shown_as=member.name, flags=os.O_NOFOLLOW)
        except CorralError as error:
            # What a scrub finds damaged meanwhile it sets aside; the next backup knows.
            text = f"{member.name[:25]} went away while the backup was made"
            raise CorralError("conflict", f"{text} → back up again") from error

    def write(progress: "Progress") -> None:
        if not isinstance(target, Path):
            write_archive(target, manifest, open_member, progress)
            return
        with new_file(place / "archive", what="the backup") as file:
            write_archive(file, manifest, open_member, progress)
        check_target(target)
        put_in_place(place / "archive", target)

    await in_thread_reporting(write, report)
