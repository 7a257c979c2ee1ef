"""What the probes of a job showed before its first step."""

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"


def upgrade() -> None:
    op.add_column("customization_jobs", sa.Column("baseline", sa.JSON()))
