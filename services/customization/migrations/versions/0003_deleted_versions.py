"""Character versions that are deleted."""

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"


def upgrade() -> None:
    for name in ("delete_us", "purge_us", "unsettled_us"):
        op.add_column("customization_versions", sa.Column(name, sa.BigInteger()))
