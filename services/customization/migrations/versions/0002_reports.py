"""The page that is kept of a job that has ended."""

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    op.add_column("customization_jobs", sa.Column("report_sha256", sa.String(64)))
    op.add_column("customization_jobs", sa.Column("report_us", sa.BigInteger()))
