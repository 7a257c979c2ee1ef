"""A story outlives what goes wrong before its first step, and a run that ended with an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dbos import DBOS

from services.runtime.errors import FabulaError, StoryNotFound, Unavailable
from services.story.backends import DrawnFrame
from services.story.config import StorySettings
from services.story.database import database_urls, prepare_sqlite
from services.story.events import Broadcaster
from services.story.plan import Reference, Render
from services.story.records import Frame, Options, State, Story, StoryCharacter
from services.story.workflow import StoryWorkflows


class Tables:
    """The part of the repository that a run reads before its first step. Fails as often as it is told to."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.running_seen: list[bool] = []
        self.workflows: StoryWorkflows | None = None

    def _enter(self) -> None:
        assert self.workflows is not None
        self.running_seen.append("s" in self.workflows.running)
        if self.failures:
            raise self.failures.pop(0)

    async def origin(self, story_id: str) -> tuple[str, str]:
        self._enter()
        return "", "r"

    async def state(self, story_id: str) -> State:
        self._enter()
        return State.QUEUED

    async def change_state(self, story_id: str, to: State, **_: Any) -> bool:
        return False

    async def mark_enqueued(self, story_id: str) -> None:
        return None


def workflows_over(tables: Tables) -> StoryWorkflows:
    nobody: Any = None
    tables.workflows = StoryWorkflows(
        repository=tables,  # type: ignore[arg-type]
        store=nobody,
        caption=nobody,
        frame=nobody,
        broadcaster=Broadcaster(),
        settings=StorySettings(retry_first_s=0.001, retry_most_s=0.002, poll_s=60),
    )
    return tables.workflows


@pytest.mark.parametrize("error", [Unavailable("the database does not answer"), RuntimeError("a hiccup")])
async def test_a_database_that_hiccups_at_the_start_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tables = Tables()
    tables.failures = [error, error]
    workflows = workflows_over(tables)

    async def make(story_id: str) -> str:
        return "SUCCEEDED"

    monkeypatch.setattr(workflows, "_make", make)
    assert await workflows._run("s") == "SUCCEEDED"
    # All the while it counted as running, so nobody had it run again beside itself.
    assert tables.running_seen == [True] * 4
    assert not workflows.running


async def test_a_story_deleted_before_it_starts_just_stops() -> None:
    tables = Tables()
    gone: FabulaError = StoryNotFound()
    tables.failures = [gone]
    assert await workflows_over(tables)._run("s") == "STOPPED"


class Easel:
    """A frame service that notes how it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def render(self, **asked: Any) -> DrawnFrame:
        self.asked.append(asked)
        return DrawnFrame(
            image=b"p",
            width_px=8,
            height_px=8,
            steps=2,
            text_guidance=0.0,
            image_guidance=0.0,
            pack_digest="d",
            engine_fingerprint="f",
            queue_s=0.0,
            render_s=0.1,
            warnings=(),
        )


class Shelf:
    """An object store."""

    async def get(self, sha256: str) -> bytes:
        return b"p"

    async def put(self, image: bytes) -> str:
        return "1" * 64


RENDER = Render(
    frame_index=1,
    description="d",
    references=(Reference(image_sha256="0" * 64, description="c", given=True),),
    seed=5,
)


@pytest.mark.parametrize("options", [{"quality": "draft", "steps": 3}, {"quality": "best"}, {}])
async def test_a_frame_is_asked_for_in_the_storys_quality(options: dict[str, Any]) -> None:
    workflows, easel = workflows_over(Tables()), Easel()
    workflows._frame, workflows._store = easel, Shelf()  # type: ignore[assignment]
    await workflows._render("s", Options(frame_count=1, seed=1, pack="toon", temperature=0.2, **options), RENDER)
    (asked,) = easel.asked
    assert (asked["quality"], asked["steps"]) == (options.get("quality", "standard"), options.get("steps"))


async def test_a_frame_is_drawn_with_those_whom_its_description_names() -> None:
    workflows, easel = workflows_over(Tables()), Easel()
    workflows._frame, workflows._store = easel, Shelf()  # type: ignore[assignment]
    cast = tuple(
        StoryCharacter(name=name, phrase="a pig", version_id=name, weights_sha256=f"{name}'s")
        for name in ("Rosa", "Otto")
    )
    options = Options(frame_count=1, seed=1, pack="toon", temperature=0.2, characters=cast)
    for description in ("Otto meets Rosa.", "Rosario runs."):
        await workflows._render("s", options, replace(RENDER, description=description))
    assert [asked["characters"] for asked in easel.asked] == [["Otto's", "Rosa's"], []]


@pytest.mark.parametrize("quality", ["draft", "standard"])
async def test_what_has_its_default_is_not_on_record(monkeypatch: pytest.MonkeyPatch, quality: Any) -> None:
    tables = Tables()
    options = Options(frame_count=1, seed=1, pack="toon", temperature=0.2, text_guidance=0.0, quality=quality)
    given = Frame(index=0, caption="c", image_sha256="0" * 64)

    async def get(story_id: str) -> Story:
        return Story(
            story_id=story_id,
            state=State.RUNNING,
            options=options,
            frames=(given,),
            create_us=0,
            update_us=0,
            last_sequence=1,
        )

    monkeypatch.setattr(tables, "get", get, raising=False)
    recorded = (await workflows_over(tables)._begin("s"))["options"]
    assert Options(**recorded) == options
    # The version before knows no quality, and is to take over stories that need none.
    assert ("quality" in recorded) == (quality == "draft")
    assert "steps" not in recorded


async def test_a_story_begun_before_there_was_a_quality_is_finished_as_it_was_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workflows = workflows_over(Tables())
    began = {"frame_count": 1, "seed": 1, "pack": "toon", "temperature": 0.2}
    began |= {"steps": None, "text_guidance": None, "image_guidance": None}
    asked: list[Options] = []

    async def step(name: str, _function: Any, _story_id: str, *arguments: Any) -> Any:
        if name == "begin":
            return {"options": began, "caption": "c", "image_sha256": "0" * 64}
        asked.extend(each for each in arguments if isinstance(each, Options))
        return {"image_sha256": "1" * 64} if name == "render" else "t"

    monkeypatch.setattr(workflows, "_step", step)
    assert await workflows._make("s") == "SUCCEEDED"
    assert [options.quality for options in asked] == ["standard"] * 4


@pytest.fixture
async def launched(tmp_path: Path) -> AsyncIterator[StoryWorkflows]:
    workflows = workflows_over(Tables())
    urls = database_urls("", tmp_path)
    prepare_sqlite(urls)
    await workflows.launch(system_database_url=urls.workflows, executor_id="me", migrate=True)
    yield workflows
    await asyncio.to_thread(DBOS.destroy)


async def test_a_run_that_ended_with_an_error_goes_on_after_its_last_step(
    launched: StoryWorkflows, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    async def make(story_id: str) -> str:
        async def step() -> str:
            steps.append(story_id)
            return "drawn"

        drawn = await DBOS.run_step_async({"name": "render"}, step)
        if len(steps) == 1 and not ended:
            raise RuntimeError("the engine could not record it")
        return f"{drawn} once"

    ended = False
    monkeypatch.setattr(launched, "_make", make)
    await launched.enqueue("s")
    run = await DBOS.retrieve_workflow_async("s")
    with pytest.raises(Exception, match="could not record it"):
        await run.get_result()
    assert (await launched.engine_records(["s"]))["s"][0] == "ERROR"
    ended = True
    await launched.rewind("s")
    assert await run.get_result() == "drawn once"
    assert steps == ["s"]  # the step was not done again
