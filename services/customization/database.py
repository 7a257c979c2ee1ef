"""Where the service keeps its jobs: a SQLite file of its own, or the installation's PostgreSQL. And its migrations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, make_url, text

from services.runtime.config import ConfigInvalid
from services.runtime.database import migrating_alone, prepare_file

MIGRATIONS = Path(__file__).parent / "migrations"
VERSION_TABLE = "customization_alembic_version"  # the story service's tables in the same database have their own
FILE_NAME = "customization.db"
ADVISORY_LOCK = 0x66616263  # "fabc": one migration at a time in a PostgreSQL database


def database_url(setting: str, home: Path) -> str:
    """The URL, without a driver, that `FABULA_DATABASE_URL` means to this service. Raises ConfigInvalid."""
    url = make_url(setting or f"sqlite:///{home / FILE_NAME}")
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigInvalid("FABULA_DATABASE_URL: SQLite needs a file; an in-memory database would lose every job")
        # A file of its own: two services that need not wait for each other's writes.
        return url.set(database=str(Path(url.database).with_name(FILE_NAME)), drivername="sqlite").render_as_string()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    raise ConfigInvalid(f"FABULA_DATABASE_URL: {backend} is not supported; use sqlite:/// or postgresql://")


def async_url(url: str) -> str:
    """The same with the driver that our code uses."""
    return url.replace("sqlite:", "sqlite+aiosqlite:", 1)


def upgrade(url: str) -> None:
    """Applies every migration that is missing. Of several processes that start together, one does and the rest wait."""
    if url.startswith("sqlite"):
        prepare_file(url)
    engine = create_engine(url)
    try:
        with _alone(url, engine), engine.begin() as connection:
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def is_current(url: str) -> bool:
    """Whether every migration that this code knows is applied."""
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            newest = ScriptDirectory.from_config(_config()).get_current_head()
            return context.get_current_revision() == newest
    finally:
        engine.dispose()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


@contextmanager
def _alone(url: str, engine: Engine) -> Iterator[None]:
    if url.startswith("sqlite"):
        with migrating_alone(url):
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
