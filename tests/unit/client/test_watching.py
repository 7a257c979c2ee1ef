"""How long a watch looks for a service that is gone: a scripted connection, and a clock that only the script moves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fabula.story.v1 import story_pb2 as pb
from fabula.story.v1 import story_service_pb2 as service_pb
from fabula_client import RetryPolicy, StateChanged, Unavailable, aio
from fabula_client.aio import AsyncStory
from fabula_client.calls import Connection
from fabula_client.story import story_from_pb

END = pb.StoryEvent(
    sequence=1, story_id="s1", state_changed=pb.StateChanged(state=pb.Story.STATE_SUCCEEDED)
)  # after it a watch is over
GONE = Unavailable("connection refused")


class Clock:
    """Time that passes only when somebody sleeps or a stream is silent."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class Scripted(Connection):
    """Each stream is silent for so many seconds, then gives its event, or breaks or closes."""

    def __init__(self, clock: Clock, streams: Sequence[tuple[float, pb.StoryEvent | Unavailable | None]]) -> None:
        policy = RetryPolicy(first_pause_s=0.2, longest_pause_s=5.0)
        super().__init__("127.0.0.1:1", timeout_s=1.0, retry=policy)
        self._clock = clock
        self._streams = list(streams)
        self.opened = 0

    async def stream(self, method: Any, request: Any) -> AsyncIterator[Any]:
        silent_s, end = self._streams[min(self.opened, len(self._streams) - 1)]  # the last one again and again
        self.opened += 1
        self._clock.now_s += silent_s
        if isinstance(end, Unavailable):
            raise end
        if end is not None:
            yield service_pb.WatchStoryResponse(event=end)

    async def call(self, method: Any, request: Any, **_: Any) -> Any:
        return service_pb.GetStoryResponse(story=pb.Story(story_id="s1", state=pb.Story.STATE_WAITING))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(aio, "time", made)
    monkeypatch.setattr(aio, "asyncio", SimpleNamespace(sleep=made.sleep))
    return made


async def watch(connection: Scripted, patience_s: float) -> list[Any]:
    story = AsyncStory(connection, story_from_pb(pb.Story(story_id="s1")))
    try:
        return [event async for event in story.watch(patience_s=patience_s)]
    finally:
        await connection.close()


async def test_a_long_silence_is_no_absence(clock: Clock) -> None:
    connection = Scripted(clock, [(3600.0, GONE), (0.0, GONE), (0.0, END)])
    events = await watch(connection, patience_s=120.0)
    assert [type(event) for event in events] == [StateChanged]
    assert connection.opened == 3


async def test_a_silent_stream_that_stood_starts_the_patience_anew(clock: Clock) -> None:
    # Three restarts, each within the patience, and together beyond it: a story waits through all of them.
    away = [(0.0, GONE)] * 10
    connection = Scripted(clock, [(600.0, GONE), *away, (600.0, GONE), *away, (600.0, GONE), *away, (0.0, END)])
    assert len(await watch(connection, patience_s=60.0)) == 1


@pytest.mark.parametrize("end", [GONE, None])
async def test_patience_ends_where_nobody_answers(clock: Clock, end: Unavailable | None) -> None:
    connection = Scripted(clock, [(3600.0, GONE), (0.0, end)])
    with pytest.raises(Unavailable):
        await watch(connection, patience_s=120.0)
    assert 100.0 < clock.now_s - 1000.0 - 3600.0 <= 120.0
    assert connection.opened > 20
