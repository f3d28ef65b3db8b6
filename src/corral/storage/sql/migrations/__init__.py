"""Numbered, forward-only steps of the schema, run by Alembic. The previous release must still run on the result of a step.

A step spells its tables out instead of borrowing them from `schema`, which tells how the database looks today: a step that
changes when the schema does would build different databases at different times.
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config


def config_for(engine: sa.Engine) -> Config:
    """Alembic's configuration, without a file. The engine is handed to env.py as it is."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["engine"] = engine
    return config


def upgrade(engine: sa.Engine) -> None:
    """Run every step the database lacks, all in one transaction."""
    command.upgrade(config_for(engine), "head")
