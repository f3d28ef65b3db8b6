"""Who used how much, in the database."""

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime

import sqlalchemy as sa

from corral.core.records import UsageEntry
from corral.storage.sql.engine import Database
from corral.storage.sql.schema import usage

_COLUMNS = tuple(field.name for field in fields(UsageEntry))


class SqlUsage:
    """A UsageStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, entries: Sequence[UsageEntry]) -> None:
        """One relaxed transaction for the whole batch."""
        # Not asdict(): it copies deeply, which showed in the profile of a busy hub.
        rows = [{name: getattr(entry, name) for name in _COLUMNS} for entry in entries]
        if rows:
            await self._database.write_relaxed(lambda connection: connection.execute(usage.insert(), rows))

    async def totals(self, account_id: str, *, since: datetime) -> Sequence[tuple[str, str, int, int, int]]:
        """Summed by the database over the index of account and time; largest users of tokens first."""
        tokens = sa.func.sum(usage.c.prompt_tokens), sa.func.sum(usage.c.eval_tokens)
        query = (
            sa.select(usage.c.credential_id, usage.c.model, sa.func.count(), *tokens)
            .where(usage.c.account_id == account_id, usage.c.started_at >= since)
            .group_by(usage.c.credential_id, usage.c.model)
            .order_by(sa.desc(tokens[0] + tokens[1]), usage.c.credential_id, usage.c.model)
        )
        rows = await self._database.read(lambda connection: connection.execute(query).all())
        return [(row[0], row[1], int(row[2]), int(row[3]), int(row[4])) for row in rows]
