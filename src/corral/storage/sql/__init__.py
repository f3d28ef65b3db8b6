"""The only SQL of the project: SQLAlchemy Core, one module per store. Alembic migrations live in `migrations`."""
