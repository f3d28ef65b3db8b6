"""A hub that changed since its backup, the restoring of that, and what must be true afterwards, whatever happened meanwhile.

As a script it is a process that is killed at one step of a restore after the other: `restore_faults.py DIRECTORY`.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sqlite3
import sys
from functools import partial
from pathlib import Path

from corral.core.records import Scope
from corral.main.backup import back_up
from corral.main.restore import restore
from corral.main.services import HubServices, open_hub_services, registry_services, rotate_keys
from corral.settings import Settings
from corral.wire.errors import CorralError
from corral.wire.manifest import MANIFEST_TYPE
from fakes_registry import digest_of
from registry_faults import Disk, in_child, killed_at, live_cheaply, share, untouched
from registry_hub import CONFIG, TINY, a_manifest, chunks, with_key

_PASSWORD = "nine green bottles on a wall"
_WEIGHTS = b"weights" * 1000


def settings_of(home: Path) -> Settings:
    return Settings.from_env({"HOME": str(home), "CORRAL_HOME": str(home)})


async def make(directory: Path) -> None:
    """A hub in `hub`, and in `backup.tar` what it was before a key was revoked, the peppers were changed and a key was made."""
    settings = settings_of(directory / "hub")
    async with open_hub_services(settings) as services:
        alice = await services.accounts.add("alice", email="", password=_PASSWORD, is_admin=True)
        await _new_key(services, "revoked")
        await _new_key(services, "kept")
        registry, caller = registry_services(settings, services).registry, with_key(alice)
        for content in (_WEIGHTS, CONFIG):
            await registry.put_blob(TINY, caller, digest_of(content), chunks(content), length=len(content))
        await registry.put_manifest(TINY, "latest", caller, a_manifest(_WEIGHTS), MANIFEST_TYPE)
    await back_up(
        settings, directory / "backup.tar", with_blobs=True, announce=lambda plan: None, report=lambda done, total: None
    )
    await rotate_keys(settings)
    async with open_hub_services(settings) as services:
        alice = await services.accounts.named("alice")
        (revoked,) = [key for key in await services.credentials.keys_of(alice) if key.name == "revoked"]
        await services.credentials.revoke_key(alice, revoked.id)
        await _new_key(services, "new")
    # So that there is something to be put in its place.
    (directory / "hub/blobs" / digest_of(CONFIG).file_name).unlink()


async def _new_key(services: HubServices, name: str) -> None:
    alice = await services.accounts.named("alice")
    await services.credentials.create_key(alice, name=name, scopes=frozenset({Scope.INFERENCE}), expires_at=None)


async def put_back(home: Path, archive: Path, disk: Disk | None = None) -> None:
    """Restore, on a disk that may fail. Raises: what the command would say."""
    disk = disk or Disk(untouched)
    with archive.open("rb", buffering=0) as source, disk.installed():
        await restore(
            settings_of(home), source, may_replace=True, announce=lambda made, size: None, report=lambda done, total: None
        )


async def condition(home: Path) -> str:
    """`former`, `restored` or `unfinished`: which hub is there, that it is all one or the other, and that nothing came back."""
    if (home / "restore.unfinished").exists():
        with contextlib.suppress(CorralError):
            async with open_hub_services(settings_of(home)):
                raise AssertionError("a hub that was not finished was opened")
        return "unfinished"
    async with open_hub_services(settings_of(home)) as services:
        alice = await services.accounts.named("alice")
        live = {key.name for key in await services.credentials.keys_of(alice) if key.revoked_at is None}
        used = await services.database.read(lambda one: one.exec_driver_sql("SELECT pepper_id FROM api_keys").scalars().all())
    known = json.loads((home / "peppers.json").read_bytes())
    assert set(used) <= known["peppers"].keys()
    assert live in ({"kept", "new"}, {"kept"}), live
    is_former = "new" in live
    assert known["current"] == ("p2" if is_former else "p1")
    blobs = [path for path in (home / "blobs").iterdir() if path.is_file() and not path.name.endswith(".tmp")]
    assert all(digest_of(path.read_bytes()).file_name == path.name for path in blobs)
    assert is_former or len(blobs) == 2
    return "former" if is_former else "restored"


def former_of(home: Path) -> tuple[int, str]:
    """How many API keys the database has that was replaced, and which pepper is the current one beside it."""
    (kept,) = [path for path in home.glob("hub.db.before-*") if not path.name.endswith("-wal")]
    with contextlib.closing(sqlite3.connect(kept)) as connection:
        keys = connection.execute("SELECT count(*) FROM api_keys").fetchone()[0]
    peppers = json.loads((home / kept.name.replace("hub.db", "peppers.json")).read_bytes())
    return keys, peppers["current"]


def _script(directory: Path) -> None:
    """Be killed behind every step of a restore, which is before the next one."""
    template, archive = directory / "hub", directory / "backup.tar"
    # What all children import is imported once, and statements are put together, before the first of them is made.
    shutil.copytree(template, directory / "rehearsal", symlinks=True)
    disk = Disk(untouched)
    asyncio.run(put_back(directory / "rehearsal", archive, disk))
    asyncio.run(condition(directory / "rehearsal"))
    share()
    for point in range(3, 2 * disk.count + 2, 2):
        home = Path(shutil.copytree(template, directory / "home", symlinks=True))
        status = in_child(lambda home=home, point=point: asyncio.run(put_back(home, archive, Disk(killed_at(point)))))
        _must(os.WIFSIGNALED(status), f"{point} was not killed: {status}")
        found = directory / "found"
        _must(in_child(partial(_look, home, found)) == 0, f"killed at {point}")
        again = in_child(lambda home=home: asyncio.run(put_back(home, archive)))
        _must(again == 0 and in_child(partial(_look, home, directory / "again")) == 0, f"again after {point}")
        _must((directory / "again").read_text() == "restored", f"again after {point}")
        left = [path.name for path in home.rglob("*") if path.name.startswith(".corral-") or path.name.endswith(".tmp")]
        _must(not left, f"left after {point}: {left}")
        # Whole as well, and there once: what was killed knew where it was putting it.
        _must(found.read_text() != "unfinished" or former_of(home) == (3, "p2"), f"former after {point}")
        print(point, found.read_text(), flush=True)
        shutil.rmtree(home)


def _look(home: Path, found: Path) -> None:
    found.write_text(asyncio.run(condition(home)))


def _must(is_so: bool, what: str) -> None:
    if not is_so:
        sys.exit(what)


def main() -> None:
    """Make a hub, and be killed."""
    live_cheaply()
    directory = Path(sys.argv[1])
    asyncio.run(make(directory))
    _script(directory)


if __name__ == "__main__":
    main()
