"""The tables of the hub's database, as SQLAlchemy Core sees them. Only storage/sql speaks SQL.

```
accounts ─┬─ sessions        browser sessions; id = SHA-256 of the cookie
          ├─ devices         one live row per device key (partial unique index)
          ├─ api_keys        id = the public part of the key's text; the secret is kept as an HMAC only
          └─ (usage, audit_log hold ids without a foreign key: they outlive what they tell of)
codes                        one-time codes, one per purpose
nonces                       strong signatures already used
revocations                  what was taken away for good, as the log beside the database has it (storage/revocations.py)
repositories ─┬─ repository_blobs ─── blobs          content is global, the right to it is per repository
              ├─ repository_manifests ─── manifests ─┬─ manifest_blobs   what each manifest refers to
              │                                      └─ descriptions     what it turned out to be
              ├─ tags
              ├─ collaborators ─── accounts
              ├─ uploads ───────── accounts          content on its way; its bytes are files
              ├─ catalog_entries     what search looks at, kept by triggers, as is the index over it (migration 0003)
              └─ hosted_models       what the hub offers for inference
```

Times are whole microseconds since the epoch: exact for Python's datetimes, ordered, the same in SQLite and PostgreSQL. Names
that are unique without regard to case have a `*_key` column in lower case that carries the constraint. Ids are random text and
never reused. A change here needs a migration beside it; a test compares the two. A column that was added later has a default,
because the release before must still be able to insert rows.
"""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

#: The newest migration. Read at start without loading Alembic when there is nothing to migrate; a test holds it to the scripts.
HEAD = "0006"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST, _LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def to_micros(moment: datetime) -> int:
    """Whole microseconds since the epoch. Exact, unlike a detour over float seconds."""
    return (moment - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The aware UTC time of `to_micros`; the nearest there is for a number that no calendar reaches. One such number must not
    keep a whole listing from being read (T62)."""
    try:
        return _EPOCH + timedelta(microseconds=micros)
    except OverflowError:
        return _LATEST if micros > 0 else _EARLIEST


class UtcTime(sa.types.TypeDecorator[datetime]):
    """An aware datetime kept as microseconds since the epoch."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """datetime -> integer."""
        return None if value is None else to_micros(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """integer -> datetime."""
        return None if value is None else from_micros(value)


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: SQLite numbers rows by itself only for the type name INTEGER.
_row_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _account_id() -> sa.Column[str]:
    return sa.Column("account_id", sa.Text, sa.ForeignKey("accounts.id"), nullable=False, index=True)


# A deleted account stays as a row, without password and e-mail, so that its name can never be taken again (T62, T119).
accounts = sa.Table(
    "accounts",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("name_key", sa.Text, nullable=False, unique=True),
    sa.Column("email", sa.Text, nullable=False),
    sa.Column("email_key", sa.Text, nullable=True, unique=True),
    sa.Column("password_hash", sa.Text, nullable=False),
    sa.Column("is_admin", sa.Boolean, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("disabled_at", UtcTime),
    sa.Column("deleted_at", UtcTime),
    sa.Column("quota_bytes", sa.BigInteger),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _account_id(),
    sa.Column("csrf", sa.Text, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("authenticated_at", UtcTime, nullable=False),
    sa.Column("last_used_at", UtcTime, nullable=False),
    sa.Column("expires_at", UtcTime, nullable=False, index=True),
    sa.Column("user_agent", sa.Text, nullable=False),
    sa.Column("network", sa.Text, nullable=False),
)

codes = sa.Table(
    "codes",
    metadata,
    sa.Column("purpose", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("expires_at", UtcTime, nullable=False),
)

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _account_id(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("key", sa.LargeBinary, nullable=False),
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("last_used_at", UtcTime),
    sa.Column("last_network", sa.Text, nullable=False),
    sa.Column("revoked_at", UtcTime),
)
# One live device per key, whoever owns it: two accounts connecting one key at once cannot both win (W8).
sa.Index(
    "uq_devices_live_key",
    devices.c.key,
    unique=True,
    sqlite_where=devices.c.revoked_at.is_(None),
    postgresql_where=devices.c.revoked_at.is_(None),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _account_id(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("prefix", sa.Text, nullable=False),
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("hmac", sa.LargeBinary, nullable=False),
    sa.Column("pepper_id", sa.Text, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("expires_at", UtcTime),
    sa.Column("last_used_at", UtcTime),
    sa.Column("last_network", sa.Text, nullable=False),
    sa.Column("revoked_at", UtcTime),
    sa.Column("successor_id", sa.Text, nullable=False, server_default=""),
)

nonces = sa.Table(
    "nonces",
    metadata,
    sa.Column("nonce", sa.Text, primary_key=True),
    sa.Column("expires_at", UtcTime, nullable=False, index=True),
)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("id", _row_id, primary_key=True, autoincrement=True),
    sa.Column("account_id", sa.Text, nullable=False),
    sa.Column("credential_id", sa.Text, nullable=False),
    sa.Column("proof", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("started_at", UtcTime, nullable=False),
    sa.Column("duration_ns", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("eval_tokens", sa.BigInteger, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Index("ix_usage_account_id_started_at", "account_id", "started_at"),
)

audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", _row_id, primary_key=True, autoincrement=True),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False, index=True),
    sa.Column("network", sa.Text, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)

# line: of the log. The columns' own rows say what became of it; this says that they do.
revocations = sa.Table("revocations", metadata, sa.Column("line", sa.Text, primary_key=True), sqlite_with_rowid=False)

# ── Models ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# namespace and name as first written; visibility: `private` or `public`. quota_bytes: NULL where only the account's counts.
# mirrored_from: where a mirror has it from, else empty.
repositories = sa.Table(
    "repositories",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("namespace", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("namespace_key", sa.Text, nullable=False),
    sa.Column("name_key", sa.Text, nullable=False),
    sa.Column("visibility", sa.Text, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("updated_at", UtcTime, nullable=False, server_default="0"),
    sa.Column("quota_bytes", sa.BigInteger),
    sa.Column("readme", sa.Text, nullable=False, server_default=""),
    sa.Column("mirrored_from", sa.Text, nullable=False, server_default=""),
    sa.Column("pulls", sa.BigInteger, nullable=False, server_default="0"),
    sa.UniqueConstraint("namespace_key", "name_key"),
    sa.CheckConstraint("visibility IN ('private', 'public')", name="ck_repositories_visibility"),
    # Each order in which repositories are listed, of all that is public and of one namespace.
    sa.Index("ix_repositories_newest", "visibility", "updated_at", "id"),
    sa.Index("ix_repositories_most_pulled", "visibility", "pulls", "id"),
    sa.Index("ix_repositories_newest_of", "namespace_key", "visibility", "updated_at", "id"),
    sa.Index("ix_repositories_most_pulled_of", "namespace_key", "visibility", "pulls", "id"),
)

# digest: `sha256:…` or `sha512:…` as text everywhere below. condemned: its file is being deleted, so it can be neither linked nor
# leased. checked_at: when it was read again since it came. damaged_at: when it was first found to be something else.
blobs = sa.Table(
    "blobs",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("lease_until", UtcTime, nullable=False, server_default="0"),
    sa.Column("condemned", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("checked_at", UtcTime),
    sa.Column("damaged_at", UtcTime),
)

# body: the manifest's bytes exactly as pushed; its digest is over them. media_type: as pushed first. size_bytes: what it refers
# to, each blob once; of an index, the sizes of its manifests. annotations: a JSON object.
manifests = sa.Table(
    "manifests",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("media_type", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("artifact_type", sa.Text, nullable=False, server_default=""),
    sa.Column("annotations", sa.Text, nullable=False, server_default="{}"),
    sa.Column("subject", sa.Text, index=True),
)

# kind: `blob`, or `child` for a manifest in an index. size_bytes: as the manifest states it, 0 for a child.
manifest_blobs = sa.Table(
    "manifest_blobs",
    metadata,
    sa.Column("manifest_digest", sa.Text, sa.ForeignKey("manifests.digest"), primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, primary_key=True, index=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.CheckConstraint("kind IN ('blob', 'child')", name="ck_manifest_blobs_kind"),
)


def _repository_id() -> sa.Column[str]:
    return sa.Column("repository_id", sa.Text, sa.ForeignKey("repositories.id"), primary_key=True)


repository_blobs = sa.Table(
    "repository_blobs",
    metadata,
    _repository_id(),
    sa.Column("digest", sa.Text, sa.ForeignKey("blobs.digest"), primary_key=True, index=True),
)

# media_type: as it was pushed to this repository. Where a manifest does not say it itself, whoever pushes the same bytes
# elsewhere under another type must not change what is served here.
repository_manifests = sa.Table(
    "repository_manifests",
    metadata,
    _repository_id(),
    sa.Column("digest", sa.Text, sa.ForeignKey("manifests.digest"), primary_key=True, index=True),
    sa.Column("media_type", sa.Text, nullable=False, server_default=""),
)

# tag: as written; OCI has `A` and `a` as two tags. tag_key: lower case, for Ollama, where they are one.
tags = sa.Table(
    "tags",
    metadata,
    _repository_id(),
    sa.Column("tag_key", sa.Text, nullable=False),
    sa.Column("tag", sa.Text, primary_key=True),
    sa.Column("manifest_digest", sa.Text, sa.ForeignKey("manifests.digest"), nullable=False, index=True),
    sa.Column("updated_at", UtcTime, nullable=False),
    sa.Index("ix_tags_repository_id_tag_key", "repository_id", "tag_key", "tag"),
    sa.Index("ix_tags_repository_id_updated_at", "repository_id", "updated_at"),
)

collaborators = sa.Table(
    "collaborators",
    metadata,
    _repository_id(),
    sa.Column("account_id", sa.Text, sa.ForeignKey("accounts.id"), primary_key=True, index=True),
    sa.Column("right", sa.Text, nullable=False),
    sa.CheckConstraint("\"right\" IN ('pull', 'push')", name="ck_collaborators_right"),
)

# finished_as: NULL while it is open.
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("repository_id", sa.Text, sa.ForeignKey("repositories.id"), nullable=False, index=True),
    _account_id(),
    sa.Column("offset_bytes", sa.BigInteger, nullable=False),
    sa.Column("expected", sa.Text),
    sa.Column("finished_as", sa.Text),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("touched_at", UtcTime, nullable=False, index=True),
)

# name: lower-case short form with tag, without `-cloud`. Set are either repository_id and tag (weights this hub runs) or
# upstream_url.
hosted_models = sa.Table(
    "hosted_models",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("shown_name", sa.Text, nullable=False),
    sa.Column("repository_id", sa.Text, sa.ForeignKey("repositories.id")),
    sa.Column("tag", sa.Text),
    sa.Column("upstream_url", sa.Text, nullable=False),
    sa.Column("upstream_model", sa.Text, nullable=False),
    sa.Column("upstream_key_id", sa.Text, nullable=False),
    sa.Column("is_public", sa.Boolean, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)

# ── The catalog ──────────────────────────────────────────────────────────────────────────────────────────────────────
# A row is there from the moment its manifest is; version 0 until somebody looked into it. capabilities: words. texts: JSON, read
# only for the page of the model.
descriptions = sa.Table(
    "descriptions",
    metadata,
    sa.Column("digest", sa.Text, sa.ForeignKey("manifests.digest", ondelete="CASCADE"), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False, index=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("family", sa.Text, nullable=False),
    sa.Column("parameter_size", sa.Text, nullable=False),
    sa.Column("quantization", sa.Text, nullable=False),
    sa.Column("context_length", sa.BigInteger),
    sa.Column("capabilities", sa.Text, nullable=False),
    sa.Column("texts", sa.Text, nullable=False),
)

# id: grows with each change and is never used twice. scope: what a search is narrowed to; who may see a repository is decided by
# the repository's own row. is_stale: the words are to be collected anew.
catalog_entries = sa.Table(
    "catalog_entries",
    metadata,
    sa.Column("id", _row_id, primary_key=True, autoincrement=True),
    sa.Column("repository_id", sa.Text, sa.ForeignKey("repositories.id", ondelete="CASCADE"), nullable=False, unique=True),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("words", sa.Text, nullable=False),
    sa.Column("is_stale", sa.Boolean, nullable=False),
    sqlite_autoincrement=True,
)
sa.Index(
    "ix_catalog_entries_stale",
    catalog_entries.c.id,
    sqlite_where=catalog_entries.c.is_stale.is_(True),
    postgresql_where=catalog_entries.c.is_stale.is_(True),
)


def is_table_of_ours(name: str | None, kind: str, _parents: object) -> bool:
    """For Alembic, which would take SQLite's full-text index and the tables inside it for tables that nobody knows any more."""
    return not (kind == "table" and name is not None and name.startswith("catalog_search"))
