"""Browser sessions and one-time codes in the database."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from corral.core.records import Account, BrowserSession
from corral.storage.sql.accounts import ACCOUNT_COLUMNS, ACCOUNT_WIDTH, account_of
from corral.storage.sql.engine import Database
from corral.storage.sql.schema import codes, from_micros, sessions

_BY_ID = (
    f"SELECT {ACCOUNT_COLUMNS}, s.id, s.csrf, s.created_at, s.authenticated_at, s.last_used_at, s.expires_at, s.user_agent,"  # noqa: S608
    " s.network FROM sessions s JOIN accounts a ON a.id = s.account_id WHERE s.id = ? AND a.deleted_at IS NULL"
)


class SqlSessions:
    """A SessionStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, session: BrowserSession) -> None:
        """Insert, and clear away those that expired: sessions are opened rarely enough to pay for it."""

        def work(connection: sa.Connection) -> None:
            connection.execute(sessions.delete().where(sessions.c.expires_at <= session.created_at))
            connection.execute(
                sessions.insert().values(
                    id=session.id,
                    account_id=session.account_id,
                    csrf=session.csrf,
                    created_at=session.created_at,
                    user_agent=session.user_agent,
                    network=session.network,
                    **_changing(session),
                )
            )

        await self._database.write(work)

    async def get(self, session_id: str) -> tuple[BrowserSession, Account] | None:
        """One inline read: it is on the path of every page."""
        row = self._database.row(_BY_ID, session_id)
        return (_session_of(row), account_of(row)) if row else None

    async def update(self, session: BrowserSession) -> None:
        """Without waiting for the disk: what a power cut can lose here is how lately a session was used."""
        change = sessions.update().where(sessions.c.id == session.id).values(**_changing(session))
        await self._database.write_relaxed(lambda connection: connection.execute(change))

    async def remove(self, session_id: str) -> None:
        """Durable: a browser that signed out stays signed out."""
        await self._database.write(lambda connection: connection.execute(sessions.delete().where(sessions.c.id == session_id)))

    async def remove_all(self, account_id: str, *, except_id: str = "") -> None:
        """Durable as well."""
        gone = sessions.delete().where(sessions.c.account_id == account_id, sessions.c.id != except_id)
        await self._database.write(lambda connection: connection.execute(gone))

    async def of_account(self, account_id: str, *, now: datetime) -> Sequence[BrowserSession]:
        """For the owner's settings page."""
        query = (
            sa.select(sessions)
            .where(sessions.c.account_id == account_id, sessions.c.expires_at > now)
            .order_by(sessions.c.last_used_at.desc(), sessions.c.id)
        )
        rows = await self._database.read(lambda connection: connection.execute(query).mappings().all())
        return [BrowserSession(**row) for row in rows]

    async def put_code(self, purpose: str, digest: str, *, expires_at: datetime) -> None:
        """Replace in one transaction."""

        def work(connection: sa.Connection) -> None:
            connection.execute(codes.delete().where(codes.c.purpose == purpose))
            connection.execute(codes.insert().values(purpose=purpose, digest=digest, expires_at=expires_at))

        await self._database.write(work)

    async def has_code(self, purpose: str, digest: str, *, now: datetime) -> bool:
        """Digests are compared by the database: that of a guess tells nothing about the code."""
        query = sa.select(sa.func.count()).select_from(codes).where(*_is_code(purpose, digest, now))
        return bool(await self._database.read(lambda connection: connection.execute(query).scalar_one()))

    async def take_code(self, purpose: str, digest: str, *, now: datetime) -> bool:
        """Delete and look whether something was deleted: one statement, so two callers cannot both take it."""
        gone = codes.delete().where(*_is_code(purpose, digest, now))
        return await self._database.write(lambda connection: connection.execute(gone).rowcount) == 1


def _is_code(purpose: str, digest: str, now: datetime) -> Sequence[sa.ColumnElement[bool]]:
    return codes.c.purpose == purpose, codes.c.digest == digest, codes.c.expires_at > now


def _changing(session: BrowserSession) -> dict[str, datetime]:
    return {
        "authenticated_at": session.authenticated_at,
        "last_used_at": session.last_used_at,
        "expires_at": session.expires_at,
    }


def _session_of(row: Sequence[Any]) -> BrowserSession:
    session_id, csrf, created_at, authenticated_at, last_used_at, expires_at, user_agent, network = row[ACCOUNT_WIDTH:]
    return BrowserSession(
        id=session_id,
        account_id=row[0],
        csrf=csrf,
        created_at=from_micros(created_at),
        authenticated_at=from_micros(authenticated_at),
        last_used_at=from_micros(last_used_at),
        expires_at=from_micros(expires_at),
        user_agent=user_agent,
        network=network,
    )
