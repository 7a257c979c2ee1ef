"""Jobs, their events, checkpoints and pictures, character versions, request ids."""

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None


def upgrade() -> None:
    op.create_table(
        "customization_jobs",
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(64), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("character", sa.JSON(), nullable=False),
        sa.Column("frames", sa.JSON(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("findings", sa.JSON(), nullable=False),
        sa.Column("estimate", sa.JSON(), nullable=False),
        sa.Column("progress", sa.JSON()),
        sa.Column("following", sa.JSON(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.Column("update_us", sa.BigInteger(), nullable=False),
        sa.Column("queue_us", sa.BigInteger()),
        sa.Column("start_us", sa.BigInteger()),
        sa.Column("end_us", sa.BigInteger()),
        sa.Column("delete_us", sa.BigInteger()),
        sa.Column("purge_us", sa.BigInteger()),
        sa.PrimaryKeyConstraint("job_id", name="pk_customization_jobs"),
    )
    op.create_index("ix_customization_jobs_state", "customization_jobs", ["state"])
    op.create_table(
        "customization_events",
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("time_us", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "sequence", name="pk_customization_events"),
        sa.ForeignKeyConstraint(["job_id"], ["customization_jobs.job_id"], name="fk_customization_events_job_id"),
    )
    op.create_table(
        "customization_checkpoints",
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("card", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "step", name="pk_customization_checkpoints"),
        sa.ForeignKeyConstraint(["job_id"], ["customization_jobs.job_id"], name="fk_customization_checkpoints_job_id"),
    )
    op.create_table(
        "customization_images",
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "sha256", name="pk_customization_images"),
        sa.ForeignKeyConstraint(["job_id"], ["customization_jobs.job_id"], name="fk_customization_images_job_id"),
    )
    op.create_index("ix_customization_images_sha256", "customization_images", ["sha256"])
    op.create_table(
        "customization_versions",
        sa.Column("version_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("publish_us", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("version_id", name="pk_customization_versions"),
    )
    op.create_index("ix_customization_versions_name", "customization_versions", ["name"])
    op.create_index("ix_customization_versions_job_id", "customization_versions", ["job_id"])
    op.create_table(
        "customization_request_keys",
        sa.Column("request_id", sa.String(255), nullable=False),
        sa.Column("body_sha256", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_customization_request_keys"),
        sa.ForeignKeyConstraint(["job_id"], ["customization_jobs.job_id"], name="fk_customization_request_keys_job_id"),
    )
