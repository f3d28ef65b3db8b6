"""The log of revocations: what was taken away stays so in a database that is older than it (R13)."""

import errno
import os
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from corral.core.records import ApiKey, BrowserSession, Device, Scope
from corral.core.registry import Repository, Right, Visibility
from corral.storage.revocations import Kind, Revocation, RevocationLog, parse_revocation
from corral.storage.sql.accounts import SqlAccounts
from corral.storage.sql.audit import SqlAudit
from corral.storage.sql.credentials import SqlCredentials
from corral.storage.sql.engine import Database, open_database
from corral.storage.sql.registry import SqlRegistry
from corral.storage.sql.revocations import catch_up
from corral.storage.sql.sessions import SqlSessions
from corral.wire.errors import CorralError
from corral.wire.signing import DevicePublicKey
from fakes import NOON, FakeClock
from identity_stores import account
from registry_faults import Disk, Step

LATER = NOON + timedelta(hours=1)
ADA, BOB = account("Ada", is_admin=True), account("Bob")
KEY = ApiKey(id="k1", account_id=BOB.id, name="ci", prefix="crlk_k", scopes=frozenset({Scope.INFERENCE}), created_at=NOON)
NEW = replace(KEY, id="k2", created_at=LATER)
DEVICE = Device(
    id="d1",
    account_id=BOB.id,
    name="x",
    key=DevicePublicKey(bytes(32)),
    scopes=frozenset({Scope.INFERENCE, Scope.PUSH}),
    created_at=NOON,
)
TINY = Repository(id="r1", namespace="Bob", name="tiny", visibility=Visibility.PUBLIC, created_at=NOON, updated_at=NOON)
SESSION = BrowserSession(
    id="s1",
    account_id=BOB.id,
    csrf="c",
    created_at=NOON,
    authenticated_at=NOON,
    last_used_at=NOON,
    expires_at=NOON + timedelta(days=1),
    user_agent="",
    network="",
)


@dataclass(frozen=True)
class Hub:
    """The stores of one database."""

    database: Database

    @property
    def accounts(self) -> SqlAccounts:
        return SqlAccounts(self.database)

    @property
    def credentials(self) -> SqlCredentials:
        return SqlCredentials(self.database)

    @property
    def registry(self) -> SqlRegistry:
        return SqlRegistry(self.database, clock=FakeClock())

    @property
    def log(self) -> list[str]:
        return list(self.database.log.read())

    async def state(self) -> dict[str, Any]:
        """What somebody may, as far as a revocation can change it."""
        bob = await self.accounts.by_id(BOB.id)
        key, device = await self.credentials.api_key(KEY.id), await self.credentials.device(DEVICE.key)
        tiny = await self.registry.repository("bob", "tiny")
        return {
            "account": bob and (bob.is_active, bob.is_admin, await self.accounts.password_hash(BOB.id)),
            "key": key and (key.key.revoked_at, key.key.expires_at),
            "device": device and sorted(device[0].scopes),
            "repository": tiny and (str(tiny.visibility), await self.registry.right_of(TINY.id, ADA.id)),
        }


@contextmanager
def opened(path: Path) -> Iterator[Hub]:
    database = open_database(path)
    try:
        yield Hub(database)
    finally:
        database.close_now()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "home" / "hub.db"
    open_database(path).close_now()
    return path


@pytest.fixture
async def backup(template: Path, tmp_path: Path) -> Path:
    """A database with all that can be taken away, from before anything was."""
    (tmp_path / "backup").mkdir(mode=0o700)
    path = Path(shutil.copy(template, tmp_path / "backup" / "hub.db"))
    with opened(path) as hub:
        for one in (ADA, replace(BOB, is_admin=True)):
            await hub.accounts.add(one, "hash")
        await hub.credentials.add_api_key(KEY, hmac=b"x", pepper_id="p1")
        await hub.credentials.add_device(DEVICE)
        await hub.registry.add_repository(TINY)
        await hub.registry.set_collaborator(TINY.id, ADA.id, Right.PUSH)
        await SqlSessions(hub.database).add(SESSION)
        assert hub.log == []
    return path


@pytest.fixture
def path(backup: Path, tmp_path: Path) -> Path:
    """The hub's database, as in the backup."""
    (tmp_path / "home").mkdir(mode=0o700)
    return Path(shutil.copy(backup, tmp_path / "home" / "hub.db"))


@pytest.fixture
def hub(path: Path) -> Iterator[Hub]:
    with opened(path) as hub:
        yield hub


#: What is done at the hub -> how it is taken away again in a database from before.
TAKEN: dict[str, Callable[[Hub], Awaitable[object]]] = {
    "key": lambda hub: hub.credentials.revoke_api_key(BOB.id, KEY.id, now=LATER),
    "rotated key": lambda hub: hub.credentials.replace_api_key(KEY, NEW, hmac=b"y", pepper_id="p1", old_ends_at=LATER),
    "key rotated with an overlap": lambda hub: hub.credentials.replace_api_key(
        KEY, NEW, hmac=b"y", pepper_id="p1", old_ends_at=LATER + timedelta(days=1)
    ),
    "device": lambda hub: hub.credentials.revoke_device(BOB.id, DEVICE.id, now=LATER),
    "scopes": lambda hub: hub.credentials.set_device_scopes(BOB.id, DEVICE.id, frozenset({Scope.INFERENCE}), now=LATER),
    "account": lambda hub: hub.accounts.set_disabled(BOB.id, LATER),
    "deleted account": lambda hub: hub.accounts.remove(BOB.id, now=LATER),
    "administrator": lambda hub: hub.accounts.set_admin(BOB.id, False, now=LATER),
    "collaborator": lambda hub: hub.registry.set_collaborator(TINY.id, ADA.id, None),
    "right to push": lambda hub: hub.registry.set_collaborator(TINY.id, ADA.id, Right.PULL),
    "visibility": lambda hub: hub.registry.change_repository(TINY.id, visibility=Visibility.PRIVATE),
}


@pytest.mark.parametrize("what", TAKEN)
async def test_r013_what_was_taken_away_is_taken_away_in_an_older_database(what: str, path: Path, backup: Path) -> None:
    with opened(path) as hub:
        before = await hub.state()
        await TAKEN[what](hub)
        after = await hub.state()
        assert after != before
        (line,) = hub.log
    shutil.copy(backup, path)
    with opened(path) as hub:
        assert await hub.state() == before
        (taken,) = await catch_up(hub.database, now=LATER)
        assert taken == parse_revocation(line)
        assert await hub.state() == after
        (event,) = [event for event in await SqlAudit(hub.database).recent() if event.actor == "revocations.log"]
        assert (event.action, event.subject) == ("revocation.repeated", taken.subject)
        assert await catch_up(hub.database, now=LATER) == ()


async def test_r013_password_that_was_replaced_signs_nobody_in(path: Path, backup: Path) -> None:
    with opened(path) as hub:
        await hub.accounts.set_password_hash(BOB.id, "new hash", now=LATER)
    shutil.copy(backup, path)
    with opened(path) as hub:
        (taken,) = await catch_up(hub.database, now=LATER)
        assert taken.kind is Kind.PASSWORD
        assert await hub.accounts.password_hash(BOB.id) == ""
        assert await SqlSessions(hub.database).get(SESSION.id) is None
        # What is set afterwards is not taken away once more.
        await hub.accounts.set_password_hash(BOB.id, "newest hash", now=LATER + timedelta(minutes=1))
    with opened(path) as hub:
        assert await catch_up(hub.database, now=LATER) == ()
        assert await hub.accounts.password_hash(BOB.id) == "newest hash"


async def test_r013_successor_of_a_rotated_key_is_not_missed_by_the_key_that_is_left(path: Path, backup: Path) -> None:
    ends_at = LATER + timedelta(days=1)
    with opened(path) as hub:
        await hub.credentials.replace_api_key(KEY, NEW, hmac=b"y", pepper_id="p1", old_ends_at=ends_at)
    shutil.copy(backup, path)
    with opened(path) as hub:
        await catch_up(hub.database, now=LATER)
        stored = await hub.credentials.api_key(KEY.id)
        assert stored is not None
        # It names no successor that does not exist, so that its owner can rotate it while it lives.
        assert (stored.key.expires_at, stored.key.revoked_at, stored.key.successor_id) == (ends_at, None, "")


async def test_r013_last_administrator_of_an_older_database_is_one_no_more(path: Path, backup: Path) -> None:
    with closing(sqlite3.connect(backup)) as connection, connection:
        connection.execute("UPDATE accounts SET is_admin = 0 WHERE id = ?", [ADA.id])
    with opened(path) as hub:
        await hub.accounts.set_admin(BOB.id, False, now=LATER)
    shutil.copy(backup, path)
    with opened(path) as hub:
        await catch_up(hub.database, now=LATER)
        assert not any(one.is_admin for one in await hub.accounts.list())


async def test_what_gives_or_changes_nothing_is_not_logged(hub: Hub) -> None:
    await hub.accounts.set_disabled(BOB.id, None)
    await hub.accounts.set_admin(BOB.id, True, now=LATER)
    await hub.accounts.renew_password_hash(BOB.id, "same password, other cost")
    await hub.credentials.set_device_scopes(BOB.id, DEVICE.id, DEVICE.scopes | {Scope.PULL}, now=LATER)
    await hub.registry.set_collaborator(TINY.id, ADA.id, Right.PUSH)
    await hub.registry.change_repository(TINY.id, readme="hello", visibility=Visibility.PUBLIC)
    assert not await hub.credentials.revoke_api_key(ADA.id, KEY.id, now=LATER)
    assert not await hub.credentials.revoke_device(ADA.id, DEVICE.id, now=LATER)
    assert not await hub.accounts.remove("nobody", now=LATER)
    with pytest.raises(CorralError, match="at most 1"):
        await hub.credentials.replace_api_key(
            KEY, NEW, hmac=b"y", pepper_id="p1", old_ends_at=LATER + timedelta(days=1), max_live=1
        )
    assert hub.log == []


async def test_log_is_closed_to_others_and_holds_ids_alone(hub: Hub, path: Path) -> None:
    await hub.credentials.revoke_api_key(BOB.id, KEY.id, now=LATER)
    log = path.with_name("revocations.log")
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.read_text() == f'{{"at":"{LATER:%Y-%m-%dT%H:%M:%S}Z","kind":"key","subject":"k1"}}\n'


async def test_log_that_was_lost_is_written_anew_by_what_the_database_knows(path: Path) -> None:
    with opened(path) as hub:
        await hub.credentials.revoke_api_key(BOB.id, KEY.id, now=LATER)
        await hub.accounts.set_disabled(BOB.id, NOON)
        lines = hub.log
    path.with_name("revocations.log").unlink()
    with opened(path) as hub:
        assert not await catch_up(hub.database, now=LATER)
        assert hub.log == sorted(lines)


async def test_two_logs_are_joined(path: Path, backup: Path) -> None:
    with opened(path) as hub:
        await hub.credentials.revoke_api_key(BOB.id, KEY.id, now=LATER)
    with opened(backup) as other:
        await other.credentials.revoke_device(BOB.id, DEVICE.id, now=LATER)
    shutil.copy(backup, path)
    with opened(path) as hub:
        assert [one.kind for one in await catch_up(hub.database, now=LATER)] == [Kind.KEY]
        assert {parse_revocation(line).kind for line in hub.log} == {Kind.KEY, Kind.DEVICE}


# ── Disks, crashes, damage ───────────────────────────────────────────────────────────────────────────────────────────


def failing_at(operation: str) -> Step:
    """Whatever is called so does not work."""

    def step(number: int, name: str, call: Callable[..., Any]) -> Any:
        if name != operation:
            return call()
        raise sqlite3.OperationalError("disk I/O error") if name == "commit" else OSError(errno.EIO, os.strerror(errno.EIO))

    return step


@pytest.mark.parametrize("operation", ["write", "fsync", "commit"])
async def test_r003_r018_revocation_that_fails_did_not_happen_and_is_in_no_log(hub: Hub, operation: str) -> None:
    await hub.credentials.revoke_api_key(BOB.id, KEY.id, now=LATER)
    before, lines = await hub.state(), hub.log
    with Disk(failing_at(operation)).installed():
        for revoke in (
            hub.credentials.revoke_device(BOB.id, DEVICE.id, now=LATER),
            hub.accounts.set_password_hash(BOB.id, "new hash", now=LATER),
        ):
            with pytest.raises(CorralError) as error:
                await revoke
            assert error.value.code == "unavailable"
    assert (await hub.state(), hub.log) == (before, lines)
    assert await catch_up(hub.database, now=LATER) == ()
    # And it does when it is asked for again.
    assert await hub.credentials.revoke_device(BOB.id, DEVICE.id, now=LATER)
    assert len(hub.log) == 2


async def test_r002_process_that_dies_before_the_commit_has_revoked(path: Path) -> None:
    log = RevocationLog(path.with_name("revocations.log"))
    with log.transaction():
        log.append(Revocation(at=LATER, kind=Kind.KEY, subject=KEY.id).line)
    with opened(path) as hub:
        assert [one.subject for one in await catch_up(hub.database, now=LATER)] == [KEY.id]


async def test_r001_line_that_a_power_cut_tore_does_not_count_and_swallows_nothing(path: Path) -> None:
    with opened(path) as hub:
        await hub.credentials.revoke_api_key(BOB.id, KEY.id, now=LATER)
        whole = hub.log
        with path.with_name("revocations.log").open("a") as file:
            file.write('{"at":"2026-01-01T13:00')
        assert hub.log == whole
        await hub.credentials.revoke_device(BOB.id, DEVICE.id, now=LATER)
        assert len(hub.log) == 2
        assert hub.log[0] == whole[0]
        assert await catch_up(hub.database, now=LATER) == ()


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        '{"at":"2026-01-01T13:00:00Z","kind":"something-new","subject":"k1"}',
        '{"at":"2026-01-01T13:00:00Z","kind":"key","subject":"k1","more":1}',
        '{"kind":"key","subject":"k1"}',
        "\udcff",
        "[" * 5000,
    ],
)
async def test_r013_log_that_cannot_be_read_opens_nothing(hub: Hub, path: Path, line: str) -> None:
    good = Revocation(at=NOON, kind=Kind.DEVICE, subject=DEVICE.id).line
    path.with_name("revocations.log").write_bytes(f"{good}\n{line}\n".encode("utf-8", "surrogateescape"))
    path.with_name("revocations.log").chmod(0o600)
    with pytest.raises(CorralError, match="a line that this Corral cannot read") as error:
        await catch_up(hub.database, now=LATER)
    assert error.value.code == "invalid"
    assert await hub.credentials.device(DEVICE.key)


@pytest.mark.parametrize("value", ["soon", "2026-13-01T00:00:00+00:00", "2026-01-01T00:00:00"])
async def test_line_with_a_time_that_is_none_is_refused(hub: Hub, path: Path, value: str) -> None:
    path.with_name("revocations.log").write_text(Revocation(at=NOON, kind=Kind.KEY, subject=KEY.id, value=value).line + "\n")
    path.with_name("revocations.log").chmod(0o600)
    with pytest.raises(CorralError) as error:
        await catch_up(hub.database, now=LATER)
    assert error.value.code == "invalid"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o666])
async def test_t091_log_that_others_may_read_is_refused_with_the_command_that_closes_it(hub: Hub, path: Path, mode: int) -> None:
    log = path.with_name("revocations.log")
    log.touch()
    log.chmod(mode)
    with pytest.raises(CorralError, match=f"chmod 600 {log}"):
        await catch_up(hub.database, now=LATER)
    with pytest.raises(CorralError, match=f"chmod 600 {log}"):
        await hub.credentials.revoke_api_key(BOB.id, KEY.id, now=LATER)


@pytest.mark.parametrize("make", ["directory", "link", "fifo"])
async def test_log_that_is_no_file_is_refused(hub: Hub, path: Path, make: str) -> None:
    log = path.with_name("revocations.log")
    {"directory": log.mkdir, "link": lambda: log.symlink_to("/dev/null"), "fifo": lambda: os.mkfifo(log, 0o600)}[make]()
    with pytest.raises(CorralError):
        await catch_up(hub.database, now=LATER)
    with pytest.raises(CorralError):
        await hub.credentials.revoke_api_key(BOB.id, KEY.id, now=LATER)


def test_line_is_read_as_it_was_written() -> None:
    revocation = Revocation(at=NOON, kind=Kind.COLLABORATOR, subject="a1", value="r1 pull")
    assert parse_revocation(revocation.line) == revocation
