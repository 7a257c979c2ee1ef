"""The tables, their migrations, and what one transaction promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect
from sqlalchemy import text as sql

from services.runtime.config import ConfigInvalid
from services.runtime.errors import IdempotencyKeyReused, QueueFull, StoryNotFound
from services.story.database import database_urls, open_database, open_for_migrations, prepare_sqlite
from services.story.events import Broadcaster, watch
from services.story.migrate import _config, is_current, upgrade
from services.story.records import Frame, Options, State, StoryCharacter, StoryWarning, WarningGiven
from services.story.repository import Repository
from services.story.schema import metadata

OPTIONS = Options(frame_count=2, seed=1, pack="toon", temperature=0.2)
GIVEN = Frame(index=0, caption="c", description="c", image_sha256="0" * 64, width_px=8, height_px=8)


STRANGE = StoryWarning(
    reason="WORDS_UNFAMILIAR", message="never drawn: robot", field="caption", metadata={"words": "robot"}
)


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[Repository]:
    urls = database_urls("", tmp_path)
    await asyncio.to_thread(upgrade, urls)
    engine = open_database(urls)
    yield Repository(engine)
    await engine.dispose()


async def create(repository: Repository, story_id: str, key: str = "", body: str = "b", most: int = 10) -> bool:
    _, is_new = await repository.create(
        story_id=story_id, options=OPTIONS, given=GIVEN, request_id=key, body_sha256=body, max_queued=most
    )
    return is_new


def test_migrations_make_the_tables_of_the_schema(tmp_path: Path) -> None:
    urls = database_urls("", tmp_path)
    upgrade(urls)
    upgrade(urls)  # again is harmless
    assert is_current(urls)
    engine = open_for_migrations(urls)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()


@pytest.mark.parametrize("revision", ["0001", "0002", "0003"])
async def test_an_older_database_is_brought_up_to_date_with_its_stories(tmp_path: Path, revision: str) -> None:
    urls = database_urls("", tmp_path)
    prepare_sqlite(urls)
    old = open_for_migrations(urls)
    with old.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        tables = inspect(connection)
        assert ("warnings" in tables.get_table_names()) == (revision > "0001")
        assert "quality" not in [column["name"] for column in tables.get_columns("stories")]
        times = {"create_us": 1, "update_us": 1, "last_sequence": 1}
        options = {"frame_count": 2, "seed": 1, "pack": "toon", "temperature": 0.2}
        call = {"traceparent": "", "request_id": "", "reason": "", "message": "", "enqueued": True}
        _insert(connection, "stories", {"story_id": "s", "state": "RUNNING", **call, **times, **options})
        given = {"width_px": 0, "height_px": 0, "caption_seed": 0, "description_seed": 0, "image_seed": 0}
        _insert(connection, "frames", {"story_id": "s", "index": 0, "caption": "c", "pack_digest": "", **given})
    old.dispose()
    assert not is_current(urls)
    await asyncio.to_thread(upgrade, urls)
    assert is_current(urls)
    engine = open_database(urls)
    repository = Repository(engine)
    assert (await repository.get("s")).warnings == ()
    assert await repository.warn("s", [STRANGE])
    story = await repository.get("s")
    assert (story.frames[0].caption, story.warnings, story.last_sequence) == ("c", (STRANGE,), 2)
    assert story.frames[0].engine_fingerprint == ""
    assert story.options.quality == "standard"
    await engine.dispose()


def _insert(connection: Connection, table: str, columns: dict[str, object]) -> None:
    """A row of an older table, in words: today's table has columns that it had not."""
    names, places = (", ".join(f"{mark}{name}{end}" for name in columns) for mark, end in (('"', '"'), (":", "")))
    connection.execute(sql(f"INSERT INTO {table} ({names}) VALUES ({places})"), columns)


def test_an_empty_database_is_not_current(tmp_path: Path) -> None:
    assert not is_current(database_urls("", tmp_path))


def test_urls_of_both_databases(tmp_path: Path) -> None:
    sqlite = database_urls("", tmp_path)
    assert sqlite.resources == f"sqlite+aiosqlite:///{tmp_path}/fabula.db"
    assert sqlite.workflows == f"sqlite:///{tmp_path}/dbos.db"
    postgres = database_urls("postgresql://u:p%40ss@h:5/d", tmp_path)
    assert postgres.resources == postgres.workflows == "postgresql+psycopg://u:p%40ss@h:5/d"
    for bad in ("mysql://h/d", "sqlite://", "sqlite:///:memory:"):
        with pytest.raises(ConfigInvalid, match="FABULA_DATABASE_URL"):
            database_urls(bad, tmp_path)


async def test_a_story_is_whole_or_absent(repository: Repository) -> None:
    assert await create(repository, "s1", key="k")
    assert not await create(repository, "s2", key="k")
    with pytest.raises(StoryNotFound):
        await repository.get("s2")
    with pytest.raises(IdempotencyKeyReused):
        await create(repository, "s3", key="k", body="other")
    with pytest.raises(QueueFull):
        await create(repository, "s4", key="k4", most=1)
    assert await repository.find_by_request("k4", "b") is None
    with pytest.raises(QueueFull):
        await repository.check_room(max_queued=1)
    await repository.check_room(max_queued=2)
    story = await repository.get("s1")
    assert (story.state, story.last_sequence, len(story.frames)) == (State.QUEUED, 1, 1)


async def test_options_are_kept_as_they_were_asked_for(repository: Repository) -> None:
    rosa = StoryCharacter(name="Rosa", phrase="a pink pig", version_id="a" * 64, weights_sha256="b" * 64)
    asked = replace(OPTIONS, steps=3, text_guidance=0.0, image_guidance=1.5, quality="draft", characters=(rosa,))
    made, _ = await repository.create(
        story_id="s", options=asked, given=GIVEN, request_id="", body_sha256="b", max_queued=10
    )
    assert made.options == (await repository.get("s")).options == asked
    assert [story.options for story in await repository.page(limit=5)] == [asked]


async def test_events_stay_gapless_under_concurrent_writers(repository: Repository) -> None:
    await create(repository, "s")
    await repository.change_state("s", State.RUNNING, only_from={State.QUEUED})
    flips = [
        repository.change_state("s", to, only_from={State.RUNNING, State.WAITING})
        for _ in range(20)
        for to in (State.WAITING, State.RUNNING)
    ]
    assert all(await asyncio.gather(*flips))
    events = await repository.events("s", after=0)
    assert [event.sequence for event in events] == list(range(1, 43))
    assert [event.sequence for event in await repository.events("s", after=40)] == [41, 42]


async def test_what_is_written_first_stays(repository: Repository) -> None:
    await create(repository, "s")
    for caption in ("first", "second"):
        assert await repository.write_caption("s", 1, caption=caption, seed=1, duration_s=0.1) == "first"
    for text in ("first", "second"):
        assert await repository.write_description("s", 1, description=text, seed=1, duration_s=0.1) == "first"
    for digit in ("1", "2"):
        drawn = {"image_sha256": digit * 64, "width_px": 8, "height_px": 8}
        assert await repository.commit_frame("s", 1, drawn, {"steps": 9}) == "1" * 64
    story = await repository.get("s")
    assert (story.last_sequence, story.options.steps) == (4, 9)
    assert story.frames[1].caption == story.frames[1].description == "first"


async def test_nothing_is_written_to_a_story_that_has_ended(repository: Repository) -> None:
    await create(repository, "s")
    assert await repository.change_state("s", State.CANCELLED, only_from={State.QUEUED})
    assert not await repository.change_state("s", State.SUCCEEDED, only_from={State.RUNNING})
    assert await repository.write_caption("s", 1, caption="late", seed=1, duration_s=0.1) is None
    assert await repository.commit_frame("s", 1, {"image_sha256": "1" * 64}, {}) is None
    assert (await repository.get("s")).last_sequence == 2
    beyond = watch(repository, Broadcaster(), "s", after=2**63, poll_s=0.01)  # no number the database could hold
    assert [event async for event in beyond] == []


async def test_of_a_reason_and_a_field_the_first_warning_stays_and_each_has_its_event(repository: Repository) -> None:
    await create(repository, "s")
    again = replace(STRANGE, message="said otherwise")
    picture = replace(STRANGE, reason="PICTURE_UNFAMILIAR", field="image")
    other = replace(STRANGE, reason="NAME_UNFAMILIAR")
    assert await repository.warn("s", [STRANGE, again, picture])
    assert not await repository.warn("s", [again])
    assert await repository.warn("s", [again, other])
    story = await repository.get("s")
    assert story.warnings == (STRANGE, picture, other)
    assert [event.what for event in await repository.events("s", after=1)] == [
        WarningGiven(warning=each) for each in (STRANGE, picture, other)
    ]
    assert story.last_sequence == 4
    assert [each.warnings for each in await repository.page(limit=5)] == [()]
    await repository.change_state("s", State.CANCELLED, only_from={State.QUEUED})
    assert not await repository.warn("s", [replace(STRANGE, field="late")])
    await repository.delete("s")
    await repository.forget_requests(older_than_us=2**62)  # its row can go: no warning holds on to it
    with pytest.raises(StoryNotFound):
        await repository.get("s")


async def test_a_deleted_story_leaves_only_its_request_id(repository: Repository) -> None:
    await create(repository, "s", key="k")
    await repository.change_state("s", State.CANCELLED, only_from={State.QUEUED})
    await repository.delete("s")
    with pytest.raises(StoryNotFound):
        await repository.get("s")
    with pytest.raises(StoryNotFound):
        await repository.find_by_request("k", "b")
    assert await repository.referenced(["0" * 64]) == set()
    await repository.forget_requests(older_than_us=2**62)
    assert await repository.find_by_request("k", "b") is None
    assert await create(repository, "s", key="k")
