"""The tables. Migrations (`migrations/versions`) make them; a test holds the two together.

Times are microseconds since 1970 UTC, so that SQLite and PostgreSQL agree to the bit.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    false,
)

from services.story.records import DEFAULT_QUALITY

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

stories = Table(
    "stories",
    metadata,
    Column("story_id", String(36), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", String(64), nullable=False, default=""),
    Column("message", Text, nullable=False, default=""),
    Column("frame_count", Integer, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("pack", String(100), nullable=False),
    Column("temperature", Float, nullable=False),
    Column("steps", Integer),
    Column("text_guidance", Float),
    Column("image_guidance", Float),
    Column("quality", String(16), nullable=False, default=DEFAULT_QUALITY, server_default=DEFAULT_QUALITY),
    Column("characters", JSON(none_as_null=True)),  # a list of those who were learned; null: nobody
    Column("last_sequence", BigInteger, nullable=False),
    Column("create_us", BigInteger, nullable=False),
    Column("update_us", BigInteger, nullable=False),
    Column("enqueued", Boolean, nullable=False),  # false until the workflow engine has it: the outbox of CreateStory
    Column(
        "traceparent", String(55), nullable=False, default=""
    ),  # of the call that made it; its frames join that trace
    Column("request_id", String(255), nullable=False, default=""),
    Column("delete_us", BigInteger),  # a deleted story keeps this row only, without its texts, for its request id
    Index(None, "state"),
    Index(None, "enqueued"),
)

frames = Table(
    "frames",
    metadata,
    Column("story_id", String(36), ForeignKey("stories.story_id"), primary_key=True),
    Column("index", Integer, primary_key=True),
    Column("caption", Text, nullable=False),
    Column("description", Text),
    Column("image_sha256", String(64)),
    Column("width_px", Integer, nullable=False, default=0),
    Column("height_px", Integer, nullable=False, default=0),
    Column("caption_seed", BigInteger, nullable=False, default=0),
    Column("description_seed", BigInteger, nullable=False, default=0),
    Column("image_seed", BigInteger, nullable=False, default=0),
    Column("caption_s", Float),
    Column("description_s", Float),
    Column("queue_s", Float),
    Column("render_s", Float),
    Column("pack_digest", String(128), nullable=False, default=""),
    Column("create_us", BigInteger),
    Column("engine_fingerprint", String(64), nullable=False, default="", server_default=""),
    Column("version", Integer, nullable=False, default=1, server_default="1"),
    Column("stale", Boolean, nullable=False, default=False, server_default=false()),
    Column("edit_strength", Float, nullable=False, default=0.0, server_default="0"),
    Index(None, "image_sha256"),
)

frame_versions = Table(
    "frame_versions",
    metadata,
    Column("story_id", String(36), ForeignKey("stories.story_id"), primary_key=True),
    Column("index", Integer, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("image_sha256", String(64), nullable=False),
    Column("payload", JSON, nullable=False),  # the frame as it was, but for its index, which an insertion moves
    Index(None, "image_sha256"),
)

events = Table(
    "events",
    metadata,
    Column("story_id", String(36), ForeignKey("stories.story_id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("time_us", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("payload", JSON, nullable=False),
)

warnings = Table(
    "warnings",
    metadata,
    Column("story_id", String(36), ForeignKey("stories.story_id"), primary_key=True),
    Column("reason", String(64), primary_key=True),  # at most one for each reason and field
    Column("field", String(64), primary_key=True),
    Column("sequence", BigInteger, nullable=False),  # of its event: the order they were given in
    Column("message", Text, nullable=False),
    Column("metadata", JSON, nullable=False),
)

request_keys = Table(
    "request_keys",
    metadata,
    Column("request_id", String(255), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("story_id", String(36), ForeignKey("stories.story_id"), nullable=False),
    Column("create_us", BigInteger, nullable=False),
)

executors = Table(
    "executors",
    metadata,
    Column("executor_id", String(64), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_start_us", BigInteger, nullable=False),
    Column("heartbeat_us", BigInteger, nullable=False),
)
