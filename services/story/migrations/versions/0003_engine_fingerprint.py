"""With what a frame was drawn, besides the pack."""

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"


def upgrade() -> None:
    op.add_column("frames", sa.Column("engine_fingerprint", sa.String(64), nullable=False, server_default=""))
