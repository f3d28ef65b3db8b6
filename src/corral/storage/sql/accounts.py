"""Accounts in the database."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from corral.core.records import Account
from corral.storage.revocations import Kind, Revocation
from corral.storage.sql import content
from corral.storage.sql.engine import Database, is_conflict
from corral.storage.sql.schema import accounts, from_micros
from corral.wire.errors import CorralError

#: The columns of an account in every inline look-up, in the order `account_of` reads them.
ACCOUNT_COLUMNS = "a.id, a.name, a.email, a.is_admin, a.created_at, a.disabled_at, a.quota_bytes"
ACCOUNT_WIDTH = 7
#: The same as columns of the table, labelled as `Account` has them.
ACCOUNT_FIELDS = [
    getattr(accounts.c, name) for name in ("id", "name", "email", "is_admin", "created_at", "disabled_at", "quota_bytes")
]

_LIVE = accounts.c.deleted_at.is_(None)


def account_of(row: Sequence[Any]) -> Account:
    """The account at the start of a raw row of `ACCOUNT_COLUMNS`."""
    return Account(
        id=row[0],
        name=row[1],
        email=row[2],
        is_admin=bool(row[3]),
        created_at=from_micros(row[4]),
        disabled_at=None if row[5] is None else from_micros(row[5]),
        quota_bytes=row[6],
    )


class SqlAccounts:
    """An AccountStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, account: Account, password_hash: str) -> None:
        """Insert; the unique indexes decide between two who ask for one name at once."""
        row = accounts.insert().values(
            id=account.id,
            name=account.name,
            name_key=account.name.lower(),
            email=account.email,
            email_key=_email_key(account.email),
            password_hash=password_hash,
            is_admin=account.is_admin,
            created_at=account.created_at,
            disabled_at=account.disabled_at,
        )
        try:
            await self._database.write(lambda connection: connection.execute(row))
        except IntegrityError as error:
            raise _taken(error) from error

    async def by_id(self, account_id: str) -> Account | None:
        """By primary key."""
        return self._find("a.id = ?", account_id)

    async def by_name(self, name: str) -> Account | None:
        """By the unique index on the lower-case name."""
        return self._find("a.name_key = ?", name.lower())

    async def by_email(self, email: str) -> Account | None:
        """By the unique index on the lower-case address; an empty one finds nobody."""
        return self._find("a.email_key = ?", email.lower())

    def _find(self, condition: str, value: str) -> Account | None:
        row = self._database.row(
            f"SELECT {ACCOUNT_COLUMNS} FROM accounts a WHERE {condition} AND a.deleted_at IS NULL",  # noqa: S608 - constants
            value,
        )
        return account_of(row) if row else None

    async def list(self) -> Sequence[Account]:
        """All live ones, oldest first."""
        query = sa.select(*ACCOUNT_FIELDS).where(_LIVE).order_by(accounts.c.created_at, accounts.c.id)
        rows = await self._database.read(lambda connection: connection.execute(query).mappings().all())
        return [Account(**row) for row in rows]

    async def password_hash(self, account_id: str) -> str:
        """Inline as well, so that an unknown name costs the same as a known one."""
        row = self._database.row("SELECT password_hash FROM accounts WHERE id = ? AND deleted_at IS NULL", account_id)
        return str(row[0]) if row else ""

    async def set_password_hash(self, account_id: str, password_hash: str, *, now: datetime) -> None:
        """One column."""
        await self._change(account_id, Revocation(at=now, kind=Kind.PASSWORD, subject=account_id), password_hash=password_hash)

    async def renew_password_hash(self, account_id: str, password_hash: str) -> None:
        """One column."""
        await self._change(account_id, password_hash=password_hash)

    async def set_disabled(self, account_id: str, disabled_at: datetime | None) -> None:
        """One column."""
        taken = Revocation(at=disabled_at, kind=Kind.ACCOUNT, subject=account_id) if disabled_at else None
        await self._change(account_id, taken, disabled_at=disabled_at)

    async def set_admin(self, account_id: str, is_admin: bool, *, now: datetime) -> None:
        """One column."""
        taken = None if is_admin else Revocation(at=now, kind=Kind.ADMINISTRATOR, subject=account_id)
        await self._change(account_id, taken, is_admin=is_admin)

    async def set_quota(self, account_id: str, quota_bytes: int | None) -> None:
        """One column."""
        await self._change(account_id, quota_bytes=quota_bytes)

    async def _change(self, account_id: str, taken: Revocation | None = None, **values: object) -> None:
        def work(connection: sa.Connection) -> None:
            if _change(connection, account_id=account_id, values=values) and taken is not None:
                self._database.revoke(connection, taken)

        await self._database.write(work)

    async def remove(self, account_id: str, *, now: datetime) -> bool:
        """Keep the row with nothing in it but the name: credentials point to it, and the name stays taken (T62, T119). What the
        account had in the registry goes with it."""

        def work(connection: sa.Connection) -> bool:
            removed = _change(connection, account_id=account_id, values=_nothing_left(now)) == 1
            if removed:
                content.remove_belongings(connection, account_id)
                self._database.revoke(connection, Revocation(at=now, kind=Kind.ACCOUNT_DELETED, subject=account_id))
            return removed

        return await self._database.write(work)


def delete_account(connection: sa.Connection, account_id: str, *, now: datetime) -> bool:
    """As `SqlAccounts.remove`, of one that was deleted before: also of the last administrator. False when it is not there."""
    removed = connection.execute(_live(account_id).values(**_nothing_left(now))).rowcount == 1
    if removed:
        content.remove_belongings(connection, account_id)
    return removed


def _nothing_left(now: datetime) -> Mapping[str, object]:
    return {"deleted_at": now, "email": "", "email_key": None, "password_hash": "", "is_admin": False}


def _live(account_id: str) -> sa.Update:
    return accounts.update().where(accounts.c.id == account_id, _LIVE)


def _change(connection: sa.Connection, *, account_id: str, values: Mapping[str, object]) -> int:
    """Change one account; how many that were. Raises: conflict when the last administrator would go."""
    had_one = _has_administrator(connection)
    changed = connection.execute(_live(account_id).values(**values)).rowcount
    # Looked at behind the change and in its transaction, where nobody else can take the last one away meanwhile.
    if had_one and not _has_administrator(connection):
        raise CorralError("conflict", "that is the only administrator; make another one first")
    return changed


def _has_administrator(connection: sa.Connection) -> bool:
    query = sa.select(sa.literal(1)).where(accounts.c.is_admin, accounts.c.disabled_at.is_(None), _LIVE).limit(1)
    return connection.execute(query).first() is not None


def _email_key(email: str) -> str | None:
    # NULLs are distinct to a unique index, so accounts without an address do not collide.
    return email.lower() or None


def _taken(error: IntegrityError) -> CorralError:
    assert is_conflict(error), "accounts has no other rule that a row can break"
    return CorralError("conflict", "that name or e-mail address is already in use")
