"""When a blob was last read again, and since when it is known to be damaged."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Nothing was read again before: those that came first are due first."""
    op.add_column("blobs", sa.Column("checked_at", sa.BigInteger()))
    op.add_column("blobs", sa.Column("damaged_at", sa.BigInteger()))
