"""The registry: uploads, collaborators, quotas, leases, and what each manifest refers to."""

import json
from collections.abc import Mapping

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns and tables, and fill them from what is there."""
    _repositories()
    _blobs()
    _manifests()
    _tags()
    _collaborators_and_uploads()


def _repositories() -> None:
    op.add_column("accounts", sa.Column("quota_bytes", sa.BigInteger()))
    op.add_column("repositories", sa.Column("updated_at", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("repositories", sa.Column("quota_bytes", sa.BigInteger()))
    op.add_column("repositories", sa.Column("readme", sa.Text(), nullable=False, server_default=""))
    op.add_column("repositories", sa.Column("mirrored_from", sa.Text(), nullable=False, server_default=""))
    op.execute(
        "UPDATE repositories SET updated_at = coalesce("
        "(SELECT max(tags.updated_at) FROM tags WHERE tags.repository_id = repositories.id), created_at)"
    )


def _blobs() -> None:
    op.add_column("blobs", sa.Column("lease_until", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("blobs", sa.Column("condemned", sa.Boolean(), nullable=False, server_default=sa.false()))


def _manifests() -> None:
    op.add_column("manifests", sa.Column("size_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("manifests", sa.Column("artifact_type", sa.Text(), nullable=False, server_default=""))
    op.add_column("manifests", sa.Column("annotations", sa.Text(), nullable=False, server_default="{}"))
    op.add_column("manifests", sa.Column("subject", sa.Text()))
    op.create_index("ix_manifests_subject", "manifests", ["subject"], unique=False)
    op.add_column("repository_manifests", sa.Column("media_type", sa.Text(), nullable=False, server_default=""))
    op.execute(
        "UPDATE repository_manifests SET media_type ="
        " (SELECT manifests.media_type FROM manifests WHERE manifests.digest = repository_manifests.digest)"
    )
    manifest_blobs = op.create_table(
        "manifest_blobs",
        sa.Column("manifest_digest", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('blob', 'child')", name="ck_manifest_blobs_kind"),
        sa.ForeignKeyConstraint(["manifest_digest"], ["manifests.digest"], name="fk_manifest_blobs_manifest_digest"),
        sa.PrimaryKeyConstraint("manifest_digest", "kind", "digest", name="pk_manifest_blobs"),
    )
    op.create_index("ix_manifest_blobs_digest", "manifest_blobs", ["digest"], unique=False)
    _fill(manifest_blobs)


def _fill(manifest_blobs: sa.Table) -> None:
    """Rows for the manifests that are there: of models that this hub published itself."""
    manifests = sa.table("manifests", sa.column("digest"), sa.column("body"), sa.column("size_bytes"))
    connection = op.get_bind()
    for digest, body in connection.execute(sa.select(manifests.c.digest, manifests.c.body)).all():
        named = _named_blobs(body)
        rows = [{"manifest_digest": digest, "kind": "blob", "digest": blob, "size_bytes": size} for blob, size in named.items()]
        if rows:
            connection.execute(manifest_blobs.insert(), rows)
        connection.execute(manifests.update().where(manifests.c.digest == digest).values(size_bytes=sum(named.values())))


def _named_blobs(body: bytes) -> Mapping[str, int]:
    """Digest -> bytes of the config and the layers; nothing for a body that cannot be read, which nobody could run either."""
    try:
        document = json.loads(body)
        named = [*(document.get("layers") or []), document.get("config") or {}]
        return {entry["digest"]: int(entry["size"]) for entry in named if entry.get("digest")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _tags() -> None:
    """Two tags may differ by case from now on. A hosted model names its tag exactly."""
    op.execute(
        "UPDATE hosted_models SET tag = coalesce((SELECT tags.tag FROM tags WHERE tags.repository_id ="
        " hosted_models.repository_id AND tags.tag_key = lower(hosted_models.tag)), tag) WHERE tag IS NOT NULL"
    )
    op.create_table(
        "new_tags",
        sa.Column("repository_id", sa.Text(), nullable=False),
        sa.Column("tag_key", sa.Text(), nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column("manifest_digest", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["manifest_digest"], ["manifests.digest"], name="fk_tags_manifest_digest"),
        sa.ForeignKeyConstraint(["repository_id"], ["repositories.id"], name="fk_tags_repository_id"),
        sa.PrimaryKeyConstraint("repository_id", "tag", name="pk_tags"),
    )
    op.execute(
        "INSERT INTO new_tags (repository_id, tag_key, tag, manifest_digest, updated_at)"
        " SELECT repository_id, tag_key, tag, manifest_digest, updated_at FROM tags"
    )
    op.drop_table("tags")
    op.rename_table("new_tags", "tags")
    op.create_index("ix_tags_manifest_digest", "tags", ["manifest_digest"], unique=False)
    op.create_index("ix_tags_repository_id_tag_key", "tags", ["repository_id", "tag_key", "tag"], unique=False)


def _collaborators_and_uploads() -> None:
    op.create_table(
        "collaborators",
        sa.Column("repository_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("right", sa.Text(), nullable=False),
        sa.CheckConstraint("\"right\" IN ('pull', 'push')", name="ck_collaborators_right"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_collaborators_account_id"),
        sa.ForeignKeyConstraint(["repository_id"], ["repositories.id"], name="fk_collaborators_repository_id"),
        sa.PrimaryKeyConstraint("repository_id", "account_id", name="pk_collaborators"),
    )
    op.create_index("ix_collaborators_account_id", "collaborators", ["account_id"], unique=False)
    op.create_table(
        "uploads",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("repository_id", sa.Text(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("offset_bytes", sa.BigInteger(), nullable=False),
        sa.Column("expected", sa.Text()),
        sa.Column("finished_as", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("touched_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_uploads_account_id"),
        sa.ForeignKeyConstraint(["repository_id"], ["repositories.id"], name="fk_uploads_repository_id"),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
    )
    op.create_index("ix_uploads_account_id", "uploads", ["account_id"], unique=False)
    op.create_index("ix_uploads_repository_id", "uploads", ["repository_id"], unique=False)
    op.create_index("ix_uploads_touched_at", "uploads", ["touched_at"], unique=False)
