"""Frames that are drawn again keep what they were. Frames of before are at their first version."""

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"


def upgrade() -> None:
    op.add_column("frames", sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("frames", sa.Column("stale", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("frames", sa.Column("edit_strength", sa.Float(), nullable=False, server_default="0"))
    op.create_table(
        "frame_versions",
        sa.Column("story_id", sa.String(36), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("image_sha256", sa.String(64), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("story_id", "index", "version", name="pk_frame_versions"),
        sa.ForeignKeyConstraint(["story_id"], ["stories.story_id"], name="fk_frame_versions_story_id"),
    )
    op.create_index("ix_frame_versions_image_sha256", "frame_versions", ["image_sha256"])
