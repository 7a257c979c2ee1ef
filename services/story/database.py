"""Opens the database: one URL for resources and for the workflow engine, SQLite or PostgreSQL. Knows no table."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from services.runtime.config import ConfigInvalid
from services.runtime.errors import StorageFull, Unavailable


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
    """Makes both files, with write-ahead logs: readers then never wait for a writer. The setting stays in the file."""
    for url in (urls.migrations, urls.workflows):
        path = Path(make_url(url).database or "")
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=30)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()


def open_database(urls: DatabaseUrls) -> AsyncEngine:
    """The engine for resources. Writing transactions are opened with `writing`, reading ones with `reading`."""
    if not urls.is_sqlite:
        return create_async_engine(urls.resources, pool_pre_ping=True, pool_size=10, max_overflow=10)
    engine = create_async_engine(urls.resources, pool_size=8, max_overflow=8)

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions on its own
        cursor = connection.cursor()
        # synchronous stays FULL: a power cut must not undo a story that was acknowledged.
        for pragma in ("busy_timeout=30000", "foreign_keys=ON", "synchronous=FULL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        # A writer takes the lock at once: one that starts as a reader could fail when it turns into a writer.
        kind = "IMMEDIATE" if connection.get_execution_options().get("writes") else "DEFERRED"
        connection.exec_driver_sql(f"BEGIN {kind}")

    return engine


def open_for_migrations(urls: DatabaseUrls) -> Engine:
    """A plain synchronous engine."""
    return create_engine(urls.migrations)


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction that changes something; all of it happens or nothing. Raises StorageFull or Unavailable."""
    with _named_failures():
        async with engine.execution_options(writes=True).begin() as connection:
            yield connection


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One consistent view. Raises Unavailable."""
    with _named_failures():
        async with engine.connect() as connection, connection.begin():
            yield connection


class _named_failures:
    """Gives a database's own failures their name in our tree; a mistake of ours (a bad statement) stays what it is."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, PoolTimeout):
            raise Unavailable("the database has no free connection", metadata={"service": "database"}) from error
        if isinstance(error, DBAPIError):
            text = str(error.orig)
            if "disk is full" in text or "No space left" in text:
                raise StorageFull("the database has no room on its disk") from error
            if isinstance(error, OperationalError) or error.connection_invalidated:
                raise Unavailable("the database does not answer", metadata={"service": "database"}) from error
