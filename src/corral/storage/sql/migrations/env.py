"""Run by Alembic itself: connects the steps with the engine that `migrations.upgrade` was given."""

from alembic import context

from corral.storage.sql.schema import is_table_of_ours, metadata

with context.config.attributes["engine"].connect() as connection:
    # SQLite can roll DDL back, so a step that fails leaves the database as it was; render_as_batch lets later steps alter
    # tables, which SQLite does by copying them.
    context.configure(
        connection=connection,
        target_metadata=metadata,
        transactional_ddl=True,
        render_as_batch=True,
        include_name=is_table_of_ours,
    )
    with context.begin_transaction():
        context.run_migrations()
