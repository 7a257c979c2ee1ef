"""Watching: durable events from the database, passing ones from memory, no seam."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.runtime.errors import ShuttingDown, StoryNotFound
from services.story.events import BUFFER, Broadcaster, watch
from services.story.records import (
    CaptionWritten,
    Durable,
    Event,
    Frame,
    FrameFinished,
    FrameProgress,
    State,
    StateChanged,
    durable_from_json,
    durable_to_json,
    kind_of,
)


class Log:
    """The part of the repository a watch reads, in memory."""

    def __init__(self) -> None:
        self.events_so_far: list[Event] = []
        self.reads = 0
        self.silent_end: State | None = None

    def add(self, what: Durable) -> None:
        self.events_so_far.append(Event(story_id="s", sequence=len(self.events_so_far) + 1, time_us=0, what=what))

    async def state(self, story_id: str) -> State:
        return (await self.position(story_id))[0]

    async def position(self, story_id: str) -> tuple[State, int]:
        if not self.events_so_far:
            raise StoryNotFound()
        changes = [event.what.state for event in self.events_so_far if isinstance(event.what, StateChanged)]
        return self.silent_end or changes[-1], len(self.events_so_far)

    async def events(self, story_id: str, *, after: int) -> list[Event]:
        self.reads += 1
        return [event for event in self.events_so_far if event.sequence > after][:2]


def caption(k: int) -> CaptionWritten:
    return CaptionWritten(frame_index=k, caption=str(k))


def follow(log: Log, broadcaster: Broadcaster, after: int = 0, poll_s: float = 10) -> Any:
    return watch(log, broadcaster, "s", after=after, poll_s=poll_s)  # type: ignore[arg-type]


async def test_a_finished_story_is_replayed_whole_from_anywhere() -> None:
    log, broadcaster = Log(), Broadcaster()
    for what in (StateChanged(state=State.QUEUED), caption(1), caption(2), StateChanged(state=State.SUCCEEDED)):
        log.add(what)
    for after in range(5):
        assert [event.sequence async for event in follow(log, broadcaster, after)] == list(range(after + 1, 5))


async def test_news_arrives_at_once_and_in_order() -> None:
    log, broadcaster = Log(), Broadcaster()
    log.add(StateChanged(state=State.RUNNING))
    events = follow(log, broadcaster)
    assert (await anext(events)).sequence == 1
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    for step in (1, 2):
        broadcaster.passing("s", FrameProgress(frame_index=1, step=step, step_count=2, eta_s=0))
    assert (await waiting).what.step == 1
    assert (await anext(events)).what.step == 2
    log.add(caption(1))
    broadcaster.durable("s")
    assert (await anext(events)).sequence == 2
    await events.aclose()


async def test_passing_news_is_dropped_once_something_durable_follows_it() -> None:
    log, broadcaster = Log(), Broadcaster()
    log.add(StateChanged(state=State.RUNNING))
    events = follow(log, broadcaster)
    await anext(events)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    broadcaster.passing("s", FrameProgress(frame_index=1, step=1, step_count=2, eta_s=0))
    log.add(caption(1))
    broadcaster.durable("s")
    assert (await waiting).sequence == 2
    await events.aclose()


async def test_what_another_process_wrote_is_found_without_being_told() -> None:
    log, broadcaster = Log(), Broadcaster()
    log.add(StateChanged(state=State.RUNNING))
    events = follow(log, broadcaster, poll_s=0.01)
    await anext(events)
    log.add(StateChanged(state=State.SUCCEEDED))
    assert [event.sequence async for event in events] == [2]


@pytest.mark.parametrize("after", [2, 2**63, 2**64 - 1])
async def test_a_watcher_ahead_of_the_story_sees_what_comes(after: int) -> None:
    log, broadcaster = Log(), Broadcaster()
    log.add(StateChanged(state=State.RUNNING))
    events = follow(log, broadcaster, after)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    log.add(StateChanged(state=State.SUCCEEDED))
    broadcaster.durable("s")
    assert (await asyncio.wait_for(waiting, 30)).sequence == 2
    assert [event async for event in events] == []


async def test_a_watch_ends_with_its_story_whatever_its_events_say() -> None:
    log, broadcaster = Log(), Broadcaster()
    log.add(StateChanged(state=State.RUNNING))
    events = follow(log, broadcaster, 1, poll_s=0.01)
    waiting = asyncio.ensure_future(anext(events, None))
    await asyncio.sleep(0)
    log.silent_end = State.SUCCEEDED
    assert await asyncio.wait_for(waiting, 30) is None


async def test_a_slow_watcher_misses_passing_news_only() -> None:
    log, broadcaster = Log(), Broadcaster()
    log.add(StateChanged(state=State.RUNNING))
    with broadcaster.watcher("s") as watcher:
        for step in range(BUFFER * 3):
            broadcaster.passing("s", FrameProgress(frame_index=1, step=step, step_count=1000, eta_s=0))
        assert len(watcher.passing) == BUFFER


async def test_watchers_leave_nothing_behind() -> None:
    log, broadcaster = Log(), Broadcaster()
    log.add(StateChanged(state=State.SUCCEEDED))
    assert len([event async for event in follow(log, broadcaster)]) == 1
    assert not broadcaster._watchers


async def test_a_stopping_process_sends_its_watchers_away() -> None:
    log, broadcaster = Log(), Broadcaster()
    log.add(StateChanged(state=State.RUNNING))
    events = follow(log, broadcaster)
    await anext(events)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    broadcaster.close()
    with pytest.raises(ShuttingDown):
        await waiting


async def test_a_story_that_is_not_there() -> None:
    with pytest.raises(StoryNotFound):
        await anext(follow(Log(), Broadcaster()))


@pytest.mark.parametrize(
    "what",
    [
        StateChanged(state=State.WAITING, reason="OBJECT_STORE_FULL", message="m"),
        caption(1),
        FrameFinished(frame=Frame(index=1, caption="c", description="d", image_sha256="0" * 64, render_s=0.5)),
    ],
)
def test_durable_events_survive_the_log(what: Durable) -> None:
    assert durable_from_json(kind_of(what), durable_to_json(what)) == what
