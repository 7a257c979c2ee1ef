"""Runs migrations on the connection that `services.customization.database` hands over."""

from alembic import context

from services.customization.database import VERSION_TABLE
from services.customization.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
