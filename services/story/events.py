"""Tells watchers what happens. Durable events come from the database, passing ones from this process's memory.

A watcher only ever reads durable events from the database, after the last one it has; a note from a workflow in this
process merely wakes it early, and a poll finds what other processes wrote. So there is no seam between "replayed" and
"live" at which an event could be lost or doubled. Passing events wait in a short buffer per watcher; a durable event
empties it, because what passed before it is out of date.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from services.runtime.database import now_us
from services.runtime.errors import ShuttingDown
from services.story.metrics import WATCHERS
from services.story.records import Event, Passing, StateChanged
from services.story.repository import Repository

BUFFER = 64  # passing events a slow watcher may fall behind before it misses the oldest


class Watcher:
    """What one watcher has not seen yet."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self.passing: deque[Event] = deque(maxlen=BUFFER)


class Broadcaster:
    """Passes news from the workflows of this process to its watchers."""

    def __init__(self) -> None:
        self._watchers: dict[str, set[Watcher]] = defaultdict(set)
        self.closed = False

    @contextmanager
    def watcher(self, story_id: str) -> Iterator[Watcher]:
        """A registered watcher, as long as the block runs."""
        watcher = Watcher()
        self._watchers[story_id].add(watcher)
        WATCHERS.inc()
        try:
            yield watcher
        finally:
            WATCHERS.dec()
            self._watchers[story_id].discard(watcher)
            if not self._watchers[story_id]:
                del self._watchers[story_id]

    def durable(self, story_id: str) -> None:
        """Something was committed about this story."""
        for watcher in self._watchers.get(story_id, ()):
            watcher.passing.clear()
            watcher.woken.set()

    def passing(self, story_id: str, what: Passing) -> None:
        """Something happened that only those who watch now will see."""
        watchers = self._watchers.get(story_id)
        if not watchers:
            return
        event = Event(story_id=story_id, sequence=0, time_us=now_us(), what=what)
        for watcher in watchers:
            watcher.passing.append(event)
            watcher.woken.set()

    def close(self) -> None:
        """Ends every watch: this process is stopping."""
        self.closed = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.woken.set()


async def watch(
    repository: Repository, broadcaster: Broadcaster, story_id: str, *, after: int, poll_s: float
) -> AsyncGenerator[Event, None]:
    """Durable events above `after`, then whatever happens, until the story has ended.

    An `after` that the story has not reached counts as where it is now: no later event is held back for it.
    Raises StoryNotFound (also when the story is deleted meanwhile) and ShuttingDown.
    """
    with broadcaster.watcher(story_id) as watcher:
        # Asked first: if the story had ended before we read its events, there is nothing to wait for after them.
        state, last_sequence = await repository.position(story_id)
        ended, last = state.ended, min(after, last_sequence)
        while True:
            watcher.woken.clear()
            while batch := await repository.events(story_id, after=last):
                for event in batch:
                    last = event.sequence
                    yield event
                    if isinstance(event.what, StateChanged) and event.what.state.ended:
                        return
            if ended:
                return
            while watcher.passing:
                yield watcher.passing.popleft()
            if broadcaster.closed:
                raise ShuttingDown()
            try:
                async with asyncio.timeout(poll_s):
                    await watcher.woken.wait()
            except TimeoutError:
                ended = (await repository.state(story_id)).ended
