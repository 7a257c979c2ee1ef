"""Brings the database up to date, and says whether it is. Also makes the workflow engine's own tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from dbos import DBOS
from sqlalchemy import Engine, text

from services.runtime.database import migrating_alone
from services.story.database import DatabaseUrls, open_for_migrations, prepare_sqlite

MIGRATIONS = Path(__file__).parent / "migrations"
ADVISORY_LOCK = 0x66616275  # "fabu": one migration at a time in a PostgreSQL database


def upgrade(urls: DatabaseUrls) -> None:
    """Applies every migration that is missing. Of several processes that start together, one does and the rest wait."""
    if urls.is_sqlite:
        prepare_sqlite(urls)
    engine = open_for_migrations(urls)
    try:
        with _alone(urls, engine), engine.begin() as connection:
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        DBOS.migrate(urls.workflows)
    finally:
        engine.dispose()


def newest() -> str:
    """The revision this code wants."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    return head or ""


def is_current(urls: DatabaseUrls) -> bool:
    """Whether every migration this code knows is applied."""
    engine = open_for_migrations(urls)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision() == newest()
    finally:
        engine.dispose()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


@contextmanager
def _alone(urls: DatabaseUrls, engine: Engine) -> Iterator[None]:
    if urls.is_sqlite:
        with migrating_alone(urls.migrations):
            yield
        return
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": ADVISORY_LOCK})
        connection.commit()
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": ADVISORY_LOCK})
            connection.commit()
