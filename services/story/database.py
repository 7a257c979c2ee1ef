"""Opens the database: one URL for resources and for the workflow engine, SQLite or PostgreSQL. Knows no table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from services.runtime.config import ConfigInvalid
from services.runtime.database import open_async, prepare_file


@dataclass(frozen=True)
class DatabaseUrls:
    """The same place for three readers: our async code, migrations, and the workflow engine."""

    resources: str
    migrations: str
    workflows: str

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a file of this machine."""
        return self.resources.startswith("sqlite")


def database_urls(setting: str, home: Path) -> DatabaseUrls:
    """What `FABULA_DATABASE_URL` means; empty: SQLite files in `home`. Raises ConfigInvalid for another database."""
    url = make_url(setting or f"sqlite:///{home / 'fabula.db'}")
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigInvalid(
                "FABULA_DATABASE_URL: SQLite needs a file; an in-memory database would lose every story"
            )
        # A file of its own for the workflow engine: two writers that need not wait for each other.
        workflows = url.set(database=str(Path(url.database).with_name("dbos.db")), drivername="sqlite")
        drivers = ("sqlite+aiosqlite", "sqlite")
    elif backend == "postgresql":
        workflows = url.set(drivername="postgresql+psycopg")
        drivers = ("postgresql+psycopg", "postgresql+psycopg")
    else:
        raise ConfigInvalid(f"FABULA_DATABASE_URL: {backend} is not supported; use sqlite:/// or postgresql://")
    return DatabaseUrls(
        resources=url.set(drivername=drivers[0]).render_as_string(hide_password=False),
        migrations=url.set(drivername=drivers[1]).render_as_string(hide_password=False),
        workflows=workflows.render_as_string(hide_password=False),
    )


def prepare_sqlite(urls: DatabaseUrls) -> None:
    """Makes both files."""
    for url in (urls.migrations, urls.workflows):
        prepare_file(url)


def open_database(urls: DatabaseUrls) -> AsyncEngine:
    """The engine for resources."""
    return open_async(urls.resources)


def open_for_migrations(urls: DatabaseUrls) -> Engine:
    """A plain synchronous engine."""
    return create_engine(urls.migrations)
