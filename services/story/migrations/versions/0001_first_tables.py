"""Stories, frames, events, request ids and the processes that work on them."""

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None


def upgrade() -> None:
    op.create_table(
        "stories",
        sa.Column("story_id", sa.String(36), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(64), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("frame_count", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("pack", sa.String(100), nullable=False),
        sa.Column("temperature", sa.Float(), nullable=False),
        sa.Column("steps", sa.Integer()),
        sa.Column("text_guidance", sa.Float()),
        sa.Column("image_guidance", sa.Float()),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.Column("update_us", sa.BigInteger(), nullable=False),
        sa.Column("enqueued", sa.Boolean(), nullable=False),
        sa.Column("traceparent", sa.String(55), nullable=False),
        sa.Column("request_id", sa.String(255), nullable=False),
        sa.Column("delete_us", sa.BigInteger()),
        sa.PrimaryKeyConstraint("story_id", name="pk_stories"),
    )
    op.create_index("ix_stories_state", "stories", ["state"])
    op.create_index("ix_stories_enqueued", "stories", ["enqueued"])
    op.create_table(
        "frames",
        sa.Column("story_id", sa.String(36), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("caption", sa.Text(), nullable=False),
        sa.Column("description", sa.Text()),
        sa.Column("image_sha256", sa.String(64)),
        sa.Column("width_px", sa.Integer(), nullable=False),
        sa.Column("height_px", sa.Integer(), nullable=False),
        sa.Column("caption_seed", sa.BigInteger(), nullable=False),
        sa.Column("description_seed", sa.BigInteger(), nullable=False),
        sa.Column("image_seed", sa.BigInteger(), nullable=False),
        sa.Column("caption_s", sa.Float()),
        sa.Column("description_s", sa.Float()),
        sa.Column("queue_s", sa.Float()),
        sa.Column("render_s", sa.Float()),
        sa.Column("pack_digest", sa.String(128), nullable=False),
        sa.Column("create_us", sa.BigInteger()),
        sa.PrimaryKeyConstraint("story_id", "index", name="pk_frames"),
        sa.ForeignKeyConstraint(["story_id"], ["stories.story_id"], name="fk_frames_story_id"),
    )
    op.create_index("ix_frames_image_sha256", "frames", ["image_sha256"])
    op.create_table(
        "events",
        sa.Column("story_id", sa.String(36), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("time_us", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("story_id", "sequence", name="pk_events"),
        sa.ForeignKeyConstraint(["story_id"], ["stories.story_id"], name="fk_events_story_id"),
    )
    op.create_table(
        "request_keys",
        sa.Column("request_id", sa.String(255), nullable=False),
        sa.Column("body_sha256", sa.String(64), nullable=False),
        sa.Column("story_id", sa.String(36), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_request_keys"),
        sa.ForeignKeyConstraint(["story_id"], ["stories.story_id"], name="fk_request_keys_story_id"),
    )
    op.create_table(
        "executors",
        sa.Column("executor_id", sa.String(64), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("process_start_us", sa.BigInteger(), nullable=False),
        sa.Column("heartbeat_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("executor_id", name="pk_executors"),
    )
