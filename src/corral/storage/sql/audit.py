"""The record of who changed what, in the database. Rows are only ever added."""

from collections.abc import Sequence
from dataclasses import asdict

import sqlalchemy as sa

from corral.core.records import AuditEvent
from corral.storage.sql.engine import Database
from corral.storage.sql.schema import audit_log
from corral.wire.text import one_line


class SqlAudit:
    """An AuditLog."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(self, event: AuditEvent) -> None:
        """Durable before it returns. Control characters are written out, so that a chosen name cannot forge a line where the
        record is shown or exported (T114)."""
        row = {name: one_line(value) if isinstance(value, str) else value for name, value in asdict(event).items()}
        await self._database.write(lambda connection: connection.execute(audit_log.insert().values(**row)))

    async def recent(self, *, limit: int = 100) -> Sequence[AuditEvent]:
        """Newest first."""
        columns = [column for column in audit_log.c if column.name != "id"]
        query = sa.select(*columns).order_by(audit_log.c.id.desc()).limit(limit)
        rows = await self._database.read(lambda connection: connection.execute(query).mappings().all())
        return [AuditEvent(**row) for row in rows]
