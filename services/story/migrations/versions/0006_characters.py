"""Who was learned and is told of. Stories of before have nobody."""

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"


def upgrade() -> None:
    op.add_column("stories", sa.Column("characters", sa.JSON(none_as_null=True)))
