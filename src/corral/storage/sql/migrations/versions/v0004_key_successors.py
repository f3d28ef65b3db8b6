"""API keys remember which key they were rotated into."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Nothing is known of the successors of keys that were rotated before: those can be rotated once more."""
    op.add_column("api_keys", sa.Column("successor_id", sa.Text(), nullable=False, server_default=""))
