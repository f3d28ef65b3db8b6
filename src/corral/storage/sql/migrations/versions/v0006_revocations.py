"""The lines of the log of revocations, so that it can be told which ones this database has not seen."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Empty at first: what was revoked until now is revoked in this database and in every backup of it that has this table."""
    op.create_table(
        "revocations",
        sa.Column("line", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("line", name="pk_revocations"),
        sqlite_with_rowid=False,
    )
