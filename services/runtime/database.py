"""Opens a database, SQLite or PostgreSQL, and gives its failures their names. Knows no service.

Of tables it knows one kind: that of request ids, which every service that makes something keeps (`RequestKeys`).
"""

from __future__ import annotations

import fcntl
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Table, delete, event, insert, make_url, select
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from services.runtime.errors import IdempotencyKeyReused, StorageFull, Unavailable


def now_us() -> int:
    """Microseconds since 1970 UTC."""
    return time.time_ns() // 1000


def prepare_file(url: str) -> None:
    """Makes a SQLite file with a write-ahead log: readers then never wait for a writer. The setting stays in it."""
    path = Path(make_url(url).database or "")
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


@contextmanager
def migrating_alone(url: str) -> Iterator[None]:
    """Of several processes that would migrate the same SQLite file, one at a time."""
    database = Path(make_url(url).database or "")
    with database.with_name(database.name + ".migrate").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_async(url: str) -> AsyncEngine:
    """The engine of an async URL. Writing transactions are opened with `writing`, reading ones with `reading`."""
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=10)
    engine = create_async_engine(url, pool_size=8, max_overflow=8)

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions on its own
        cursor = connection.cursor()
        # synchronous stays FULL: a power cut must not undo what was acknowledged.
        for pragma in ("busy_timeout=30000", "foreign_keys=ON", "synchronous=FULL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        # A writer takes the lock at once: one that starts as a reader could fail when it turns into a writer.
        kind = "IMMEDIATE" if connection.get_execution_options().get("writes") else "DEFERRED"
        connection.exec_driver_sql(f"BEGIN {kind}")

    return engine


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


class RequestKeys:
    """Which body a request id came with first, and what was made for it. An empty id is none.

    The table has `request_id` as its primary key, `body_sha256`, `create_us`, and a column with what was made. Used in
    the transaction that makes it: of two calls with one id, one inserts and the other one gets an IntegrityError, looks
    again, and finds what the first one made.
    """

    def __init__(self, table: Table, made: str) -> None:
        """`made` names the column of what was made."""
        self._table, self._made = table, made

    async def use(
        self, connection: AsyncConnection, request_id: str, *, body_sha256: str, made: str, at_us: int
    ) -> None:
        """Keeps an id. Raises IntegrityError for one that is used."""
        if request_id:
            kept = {"request_id": request_id, "body_sha256": body_sha256, self._made: made, "create_us": at_us}
            await connection.execute(insert(self._table).values(**kept))

    async def find(self, connection: AsyncConnection, request_id: str, body_sha256: str) -> str | None:
        """What was made for an id, if anything. Raises IdempotencyKeyReused for another body than it came with."""
        if not request_id:
            return None
        statement = select(self._table).where(self._table.c.request_id == request_id)
        row = (await connection.execute(statement)).one_or_none()
        if row is None:
            return None
        if row.body_sha256 != body_sha256:
            raise IdempotencyKeyReused(metadata={"request_id": request_id})
        return str(row._mapping[self._made])

    async def forget(self, connection: AsyncConnection, *, older_than_us: int) -> None:
        """Lets go of ids that were used before a time."""
        await connection.execute(delete(self._table).where(self._table.c.create_us < older_than_us))


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
