"""Having database and log of revocations agree: what either knows, both do afterwards. See storage/revocations.py."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import sqlalchemy as sa

from corral.core.registry import Right, Visibility
from corral.storage.revocations import Kind, Revocation, parse_revocation
from corral.storage.sql.accounts import delete_account
from corral.storage.sql.credentials import format_scopes, parse_scopes
from corral.storage.sql.engine import Database
from corral.storage.sql.schema import accounts, api_keys, audit_log, collaborators, devices, repositories, revocations, sessions
from corral.wire.errors import CorralError

#: Of the audit log, for what nobody does just now.
_ACTOR = "revocations.log"


async def catch_up(database: Database, *, now: datetime) -> Sequence[Revocation]:
    """Take away what the log says was taken away and this database does not know of, because it is older than the log; returns
    what it still had of that. What the log lacks of the database's is appended to it. Raises: invalid for a log that cannot be
    read, unavailable."""
    if set(database.log.read()) == set(await database.read(_known)):
        return ()

    def work(connection: sa.Connection) -> Sequence[Revocation]:
        known, logged = set(_known(connection)), set(database.log.read())
        # All are read before the first is done: with a line that nobody can read, nobody knows what else is missing.
        missing = [parse_revocation(line) for line in sorted(logged - known)]
        taken = [revocation for revocation in missing if _TAKE[revocation.kind](connection, revocation)]
        if missing:
            connection.execute(revocations.insert(), [{"line": line} for line in sorted(logged - known)])
        if taken:
            connection.execute(audit_log.insert(), [_event(revocation, now) for revocation in taken])
        if known - logged:
            database.log.append(*sorted(known - logged))
        return taken

    return await database.write(work)


def _known(connection: sa.Connection) -> Sequence[str]:
    return connection.execute(sa.select(revocations.c.line)).scalars().all()


def _event(revocation: Revocation, now: datetime) -> Mapping[str, object]:
    note = f"{revocation.kind}, as of {revocation.at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return {
        "at": now,
        "actor": _ACTOR,
        "action": "revocation.repeated",
        "subject": revocation.subject[:100],
        "network": "",
        "note": note,
    }


# ── Taking away once more ────────────────────────────────────────────────────────────────────────────────────────────
# Each returns whether there was anything left to be taken.


def _key(connection: sa.Connection, revocation: Revocation) -> bool:
    row, is_live = api_keys.c, (api_keys.c.id == revocation.subject) & api_keys.c.revoked_at.is_(None)
    if not revocation.value:
        return _changes(connection, api_keys.update().where(is_live).values(revoked_at=revocation.at))
    # It was rotated, and its successor is in none of the two: what is left of it may be rotated once more.
    ends_at = _time_of(revocation)
    is_longer = row.expires_at.is_(None) | (row.expires_at > ends_at)
    return _changes(connection, api_keys.update().where(is_live & is_longer).values(expires_at=ends_at))


def _device(connection: sa.Connection, revocation: Revocation) -> bool:
    is_live = (devices.c.id == revocation.subject) & devices.c.revoked_at.is_(None)
    return _changes(connection, devices.update().where(is_live).values(revoked_at=revocation.at))


def _device_scopes(connection: sa.Connection, revocation: Revocation) -> bool:
    is_live = (devices.c.id == revocation.subject) & devices.c.revoked_at.is_(None)
    had = parse_scopes(connection.execute(sa.select(devices.c.scopes).where(is_live)).scalar_one_or_none() or "")
    left = had & parse_scopes(revocation.value)
    return left != had and _changes(connection, devices.update().where(is_live).values(scopes=format_scopes(left)))


def _account(connection: sa.Connection, revocation: Revocation) -> bool:
    return _changes_account(connection, revocation, accounts.c.disabled_at.is_(None), disabled_at=revocation.at)


def _account_deleted(connection: sa.Connection, revocation: Revocation) -> bool:
    _end_sessions(connection, revocation.subject)
    return delete_account(connection, revocation.subject, now=revocation.at)


def _administrator(connection: sa.Connection, revocation: Revocation) -> bool:
    return _changes_account(connection, revocation, accounts.c.is_admin, is_admin=False)


def _password(connection: sa.Connection, revocation: Revocation) -> bool:
    # The new one is in no log, and the old one may have been replaced because somebody else knows it.
    return _changes_account(connection, revocation, accounts.c.password_hash != "", password_hash="")


def _collaborator(connection: sa.Connection, revocation: Revocation) -> bool:
    repository_id, _, right = revocation.value.partition(" ")
    row = collaborators.c
    is_it = (row.account_id == revocation.subject) & (row.repository_id == repository_id)
    if right == Right.PULL:
        return _changes(connection, collaborators.update().where(is_it & (row.right != Right.PULL)).values(right=Right.PULL))
    return _changes(connection, collaborators.delete().where(is_it))


def _public(connection: sa.Connection, revocation: Revocation) -> bool:
    was_public = (repositories.c.id == revocation.subject) & (repositories.c.visibility == Visibility.PUBLIC)
    return _changes(connection, repositories.update().where(was_public).values(visibility=Visibility.PRIVATE))


_TAKE: Mapping[Kind, Callable[[sa.Connection, Revocation], bool]] = {
    Kind.KEY: _key,
    Kind.DEVICE: _device,
    Kind.DEVICE_SCOPES: _device_scopes,
    Kind.ACCOUNT: _account,
    Kind.ACCOUNT_DELETED: _account_deleted,
    Kind.ADMINISTRATOR: _administrator,
    Kind.PASSWORD: _password,
    Kind.COLLABORATOR: _collaborator,
    Kind.PUBLIC: _public,
}


def _changes_account(
    connection: sa.Connection, revocation: Revocation, condition: sa.ColumnElement[bool], **values: object
) -> bool:
    # Also of the last administrator: a hub without one is mended on its console, a stranger who is one is not.
    _end_sessions(connection, revocation.subject)
    is_it = (accounts.c.id == revocation.subject) & accounts.c.deleted_at.is_(None) & condition
    return _changes(connection, accounts.update().where(is_it).values(**values))


def _end_sessions(connection: sa.Connection, account_id: str) -> None:
    connection.execute(sessions.delete().where(sessions.c.account_id == account_id))


def _changes(connection: sa.Connection, change: sa.Update | sa.Delete) -> bool:
    return connection.execute(change).rowcount > 0


def _time_of(revocation: Revocation) -> datetime:
    try:
        moment: datetime = msgspec.convert(revocation.value, Annotated[datetime, msgspec.Meta(tz=True)])
    except msgspec.ValidationError as error:
        raise CorralError("invalid", f"revocations.log says {revocation.value!r} where a time belongs") from error
    return moment
