"""Stories find somebody who runs them, and pictures that somebody counts on stay."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.runtime.errors import StorageFull
from services.runtime.store import ObjectStore
from services.story import caretaker as caretaker_module
from services.story.caretaker import MOST_REWINDS, Caretaker
from services.story.config import StorySettings
from services.story.events import Broadcaster
from services.story.process import StoryProcess
from services.story.records import State


class Tables:
    """The part of the repository that keeping house reads and writes, in memory."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.stories: list[str] = []
        self.known: list[str] = []
        self.frames: set[str] = set()
        self.beats = asyncio.Semaphore(0)
        self.looked: Callable[[], Any] | None = None  # happens right after the first look at references

    async def heartbeat(self, *, executor_id: str, **_: Any) -> None:
        self.log.append("beat")
        self.beats.release()
        self.known = [*{*self.known, executor_id}]

    async def executors(self) -> list[Any]:
        at = caretaker_module.now_us()
        return [SimpleNamespace(executor_id=name, host="elsewhere", heartbeat_us=at) for name in self.known]

    async def active(self) -> list[str]:
        return self.stories

    async def change_state(self, story_id: str, to: State, **_: Any) -> bool:
        self.log.append(f"{to.value} {story_id}")
        self.stories.remove(story_id)
        return True

    async def not_enqueued(self, **_: Any) -> list[str]:
        return []

    async def count_by_state(self) -> dict[State, int]:
        return {}

    async def forget_requests(self, **_: Any) -> None:
        return None

    async def oldest_active_us(self) -> None:
        return None

    async def referenced(self, sha256s: Iterable[str]) -> set[str]:
        found = self.frames & set(sha256s)
        looked, self.looked = self.looked, None
        if looked is not None:
            await looked()
        return found


class Workflows:
    """An engine that says what it is told to."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.records: dict[str, tuple[str, str]] = {}
        self.running: set[str] = set()

    async def launch(self, **_: Any) -> None:
        self.log.append("launch")

    async def engine_records(self, story_ids: list[str]) -> dict[str, tuple[str, str]]:
        return {story_id: self.records[story_id] for story_id in story_ids}

    async def recover(self, executor_id: str) -> None:
        self.log.append(f"recover {executor_id}")

    async def rewind(self, story_id: str) -> None:
        self.log.append(f"rewind {story_id}")


class House:
    def __init__(self, store: Any = None) -> None:
        self.log: list[str] = []
        self.tables = Tables(self.log)
        self.workflows = Workflows(self.log)
        self.caretaker = Caretaker(
            repository=self.tables,  # type: ignore[arg-type]
            workflows=self.workflows,  # type: ignore[arg-type]
            store=store,
            broadcaster=Broadcaster(),
            settings=StorySettings(orphan_age_s=60),
        )


async def test_a_process_is_known_before_it_takes_a_story() -> None:
    house = House()
    process = StoryProcess.__new__(StoryProcess)
    process._caretaker = house.caretaker
    process._workflows = house.workflows  # type: ignore[assignment]
    process._urls = SimpleNamespace(workflows="", is_sqlite=True)  # type: ignore[assignment]
    await process._launch()
    assert house.log == ["beat", "launch"]


async def test_stories_of_a_process_nobody_knows_are_taken_over() -> None:
    house = House()
    house.tables.stories = ["lost", "fine", "waiting"]
    house.tables.known = ["other"]
    house.workflows.records = {"lost": ("PENDING", "ghost"), "fine": ("PENDING", "other"), "waiting": ("ENQUEUED", "")}
    await house.caretaker._mend()
    assert house.log == []  # it may have been signing on again just now
    await house.caretaker._mend()
    assert house.log == ["recover ghost"]


async def test_a_run_that_ended_with_an_error_gets_a_few_more_and_then_fails_openly() -> None:
    house = House()
    house.tables.stories = ["s"]
    house.workflows.records = {"s": ("ERROR", "other")}
    for _ in range(10):
        await house.caretaker._mend()
    assert house.log == ["rewind s"] * MOST_REWINDS + ["FAILED s"]


async def test_what_the_engine_gave_up_for_good_fails_openly() -> None:
    house = House()
    house.tables.stories = ["s"]
    house.workflows.records = {"s": ("MAX_RECOVERY_ATTEMPTS_EXCEEDED", "other")}
    for _ in range(2):
        await house.caretaker._mend()
    assert house.log == ["FAILED s"]


async def test_a_long_sweep_delays_no_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "BEAT_S", 0.001)
    sweeping = asyncio.Event()

    class Endless:
        async def every(self) -> AsyncIterator[Any]:
            sweeping.set()
            await asyncio.Event().wait()
            yield

    house = House(store=Endless())
    running = asyncio.create_task(house.caretaker.run())
    try:
        await asyncio.wait_for(sweeping.wait(), 30)
        for _ in range(5):
            await asyncio.wait_for(house.tables.beats.acquire(), 30)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def put_long_ago(store: ObjectStore, folder: Path, data: bytes) -> str:
    sha256 = await store.put(data)
    (path,) = [path for path in files(folder) if path.name == sha256]
    os.utime(path, (0, 0))
    return sha256


async def test_a_sweep_takes_only_what_nobody_has(folder: Path) -> None:
    store = ObjectStore.open("", folder)
    house = House(store)
    gone, kept = [await put_long_ago(store, folder, data) for data in (b"gone", b"kept")]
    new = await store.put(b"new")
    house.tables.frames = {kept}
    assert await house.caretaker.sweep(datetime.now(UTC)) == 1
    assert {item.sha256 async for item in store.every()} == {kept, new}
    assert await store.modified_time(gone) is None


@pytest.mark.parametrize("meanwhile", ["put again", "committed"])
async def test_a_sweep_leaves_what_somebody_came_to_need_while_it_ran(folder: Path, meanwhile: str) -> None:
    store = ObjectStore.open("", folder)
    house = House(store)
    sha256 = await put_long_ago(store, folder, b"wanted")

    async def happens() -> None:
        if meanwhile == "put again":
            await store.put(b"wanted")
        else:
            house.tables.frames = {sha256}

    house.tables.looked = happens
    assert await house.caretaker.sweep(datetime.now(UTC)) == 0
    assert await store.get(sha256) == b"wanted"


async def test_a_picture_is_on_the_disk_before_it_has_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def told_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append(f"fsync {path.relative_to(folder.parent)}" if path.is_dir() else "fsync file")
        fsync(handle)

    def told_replace(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", told_fsync)
    monkeypatch.setattr(os, "replace", told_replace)
    sha256 = await ObjectStore.open("", folder).put(b"abc")
    folders = [f"fsync objects/sha256/{sha256[:2]}", "fsync objects/sha256", "fsync objects"]
    assert done == ["fsync file", "rename", *folders]


async def test_a_disk_that_refuses_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore.open("", folder)
    await store.put(b"abc")
    (path,) = files(folder)
    before = path.stat()

    def refuse(_handle: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageFull):
        await store.put(b"abc")
    assert path.stat() == before
    assert files(folder) == [path]
