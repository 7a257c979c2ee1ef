"""What a pack does not know of what a story was given."""

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    op.create_table(
        "warnings",
        sa.Column("story_id", sa.String(36), nullable=False),
        sa.Column("reason", sa.String(64), nullable=False),
        sa.Column("field", sa.String(64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("story_id", "reason", "field", name="pk_warnings"),
        sa.ForeignKeyConstraint(["story_id"], ["stories.story_id"], name="fk_warnings_story_id"),
    )
