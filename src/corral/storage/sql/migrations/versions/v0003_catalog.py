"""The catalog: descriptions of manifests, counters of pulls, and the index behind search.

The search index is SQLite's own (FTS5) over the text in `catalog_entries`. Triggers keep it, and the notes of what is to be
described and indexed anew, in step with the registry's rows: those are changed by several services and by the administration
commands, and an index that each of them had to remember would sooner or later show what nobody may see. On another database the
same tables stand without the index.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

#: What a search is narrowed to: `public`, and the namespace as a word that no tokenizer takes apart.
_SCOPE = "CASE r.visibility WHEN 'public' THEN 'public ' ELSE '' END || 'n' || lower(hex(r.namespace_key))"
_TRIGGERS = (
    # Every manifest waits to be described from the moment it is there.
    """CREATE TRIGGER tr_manifests_waiting AFTER INSERT ON manifests BEGIN
        INSERT INTO descriptions (digest, version, kind, size_bytes, family, parameter_size, quantization, capabilities, texts)
        VALUES (new.digest, 0, 'waiting', 0, '', '', '', '', '{}');
    END""",
    f"""CREATE TRIGGER tr_repositories_entered AFTER INSERT ON repositories BEGIN
        INSERT INTO catalog_entries (repository_id, scope, words, is_stale)
        SELECT r.id, {_SCOPE}, r.namespace || ' ' || r.name, 1 FROM repositories r WHERE r.id = new.id;
    END""",  # noqa: S608 - made of constants
    f"""CREATE TRIGGER tr_repositories_shown AFTER UPDATE OF visibility ON repositories BEGIN
        UPDATE catalog_entries SET scope = (SELECT {_SCOPE} FROM repositories r WHERE r.id = new.id)
        WHERE repository_id = new.id;
    END""",  # noqa: S608 - made of constants
    """CREATE TRIGGER tr_tags_added AFTER INSERT ON tags BEGIN
        UPDATE catalog_entries SET is_stale = 1 WHERE repository_id = new.repository_id;
    END""",
    """CREATE TRIGGER tr_tags_moved AFTER UPDATE OF manifest_digest ON tags BEGIN
        UPDATE catalog_entries SET is_stale = 1 WHERE repository_id = new.repository_id;
    END""",
    """CREATE TRIGGER tr_tags_removed AFTER DELETE ON tags BEGIN
        UPDATE catalog_entries SET is_stale = 1 WHERE repository_id = old.repository_id;
    END""",
    """CREATE TRIGGER tr_catalog_entries_added AFTER INSERT ON catalog_entries BEGIN
        INSERT INTO catalog_search (rowid, scope, words) VALUES (new.id, new.scope, new.words);
    END""",
    """CREATE TRIGGER tr_catalog_entries_changed AFTER UPDATE OF scope, words ON catalog_entries BEGIN
        INSERT INTO catalog_search (catalog_search, rowid, scope, words) VALUES ('delete', old.id, old.scope, old.words);
        INSERT INTO catalog_search (rowid, scope, words) VALUES (new.id, new.scope, new.words);
    END""",
    """CREATE TRIGGER tr_catalog_entries_removed AFTER DELETE ON catalog_entries BEGIN
        INSERT INTO catalog_search (catalog_search, rowid, scope, words) VALUES ('delete', old.id, old.scope, old.words);
    END""",
)


def upgrade() -> None:
    """Add the tables and enter what is there already."""
    op.add_column("repositories", sa.Column("pulls", sa.BigInteger(), nullable=False, server_default="0"))
    for name, column in (("newest", "updated_at"), ("most_pulled", "pulls")):
        op.create_index(f"ix_repositories_{name}", "repositories", ["visibility", column, "id"])
        op.create_index(f"ix_repositories_{name}_of", "repositories", ["namespace_key", "visibility", column, "id"])
    op.create_index("ix_tags_repository_id_updated_at", "tags", ["repository_id", "updated_at"])
    _descriptions()
    _entries()
    if op.get_bind().dialect.name == "sqlite":
        _search()
    op.execute(
        "INSERT INTO descriptions (digest, version, kind, size_bytes, family, parameter_size, quantization, capabilities, texts)"
        " SELECT digest, 0, 'waiting', 0, '', '', '', '', '{}' FROM manifests"
    )
    op.execute(
        "INSERT INTO catalog_entries (repository_id, scope, words, is_stale)"  # noqa: S608 - made of constants
        f" SELECT r.id, {_SCOPE}, r.namespace || ' ' || r.name, 1 FROM repositories r ORDER BY r.updated_at"
    )


def _descriptions() -> None:
    op.create_table(
        "descriptions",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("family", sa.Text(), nullable=False),
        sa.Column("parameter_size", sa.Text(), nullable=False),
        sa.Column("quantization", sa.Text(), nullable=False),
        sa.Column("context_length", sa.BigInteger()),
        sa.Column("capabilities", sa.Text(), nullable=False),
        sa.Column("texts", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["manifests.digest"], name="fk_descriptions_digest", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("digest", name="pk_descriptions"),
    )
    op.create_index("ix_descriptions_version", "descriptions", ["version"])


def _entries() -> None:
    op.create_table(
        "catalog_entries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("repository_id", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("words", sa.Text(), nullable=False),
        sa.Column("is_stale", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["repository_id"], ["repositories.id"], name="fk_catalog_entries_repository_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_catalog_entries"),
        sa.UniqueConstraint("repository_id", name="uq_catalog_entries_repository_id"),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_catalog_entries_stale",
        "catalog_entries",
        ["id"],
        sqlite_where=sa.text("is_stale IS 1"),
        postgresql_where=sa.text("is_stale IS true"),
    )


def _search() -> None:
    # Prefixes of these lengths have lists of their own, in the order of rows: a search that finds everything can stop at the
    # first page instead of collecting it all.
    op.execute(
        "CREATE VIRTUAL TABLE catalog_search USING fts5("
        "scope, words, content='catalog_entries', content_rowid='id', prefix='1 2 3 4 5 6 8', tokenize='unicode61')"
    )
    for trigger in _TRIGGERS:
        op.execute(trigger)
