"""Request ids: the same with the same body gives what was made, with another body it is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import BigInteger, Column, MetaData, String, Table
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from services.runtime.database import RequestKeys, open_async, prepare_file, reading, writing
from services.runtime.errors import IdempotencyKeyReused

TABLE = Table(
    "keys",
    MetaData(),
    Column("request_id", String(255), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("pot_id", String(36), nullable=False),
    Column("create_us", BigInteger, nullable=False),
)
KEYS = RequestKeys(TABLE, "pot_id")


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    prepare_file(f"sqlite:///{tmp_path / 'pots.db'}")
    made = open_async(f"sqlite+aiosqlite:///{tmp_path / 'pots.db'}")
    async with writing(made) as connection:
        await connection.run_sync(TABLE.metadata.create_all)
    yield made
    await made.dispose()


async def used(engine: AsyncEngine, request_id: str, made: str = "pot", body: str = "b", at_us: int = 1) -> None:
    async with writing(engine) as connection:
        await KEYS.use(connection, request_id, body_sha256=body, made=made, at_us=at_us)


async def found(engine: AsyncEngine, request_id: str, body: str = "b") -> str | None:
    async with reading(engine) as connection:
        return await KEYS.find(connection, request_id, body)


async def test_an_id_names_what_was_made_for_its_body(engine: AsyncEngine) -> None:
    assert await found(engine, "one") is None
    await used(engine, "one")
    assert await found(engine, "one") == "pot"
    with pytest.raises(IdempotencyKeyReused) as raised:
        await found(engine, "one", body="other")
    assert raised.value.metadata == {"request_id": "one"}


async def test_an_id_is_used_once_and_what_came_second_leaves_nothing(engine: AsyncEngine) -> None:
    await used(engine, "one")
    with pytest.raises(IntegrityError):
        await used(engine, "one", made="another pot")
    assert await found(engine, "one") == "pot"


async def test_no_id_is_kept_for_nobody(engine: AsyncEngine) -> None:
    for _ in range(2):
        await used(engine, "")
    assert await found(engine, "") is None


async def test_old_ids_are_forgotten(engine: AsyncEngine) -> None:
    await used(engine, "old", at_us=1)
    await used(engine, "new", at_us=10)
    async with writing(engine) as connection:
        await KEYS.forget(connection, older_than_us=10)
    assert (await found(engine, "old"), await found(engine, "new")) == (None, "pot")
