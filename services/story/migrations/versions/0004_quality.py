"""How much time a story's frames are worth. Stories of before are what the pack does by default."""

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"


def upgrade() -> None:
    op.add_column("stories", sa.Column("quality", sa.String(16), nullable=False, server_default="standard"))
