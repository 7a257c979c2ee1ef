"""Tells watchers what happens to a job.

Events come from the database alone, after the last one a watcher has; a note from this process merely wakes it early,
and a poll finds what other processes wrote. So there is no seam between "replayed" and "live" at which an event could
be lost or doubled. Only the place in the queue passes by without being kept.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator

from services.customization.records import Event, QueueMoved
from services.customization.repository import Repository
from services.customization.states import State
from services.runtime.database import now_us
from services.runtime.errors import ShuttingDown


class Broadcaster:
    """Wakes the watchers of this process."""

    def __init__(self) -> None:
        self._watchers: dict[str, set[asyncio.Event]] = defaultdict(set)
        self.closed = False

    def note(self, job_id: str) -> None:
        """Something was committed about this job."""
        for woken in self._watchers.get(job_id, ()):
            woken.set()

    def close(self) -> None:
        """Ends every watch: this process is stopping."""
        self.closed = True
        for watchers in self._watchers.values():
            for woken in watchers:
                woken.set()

    async def wait(self, job_id: str, woken: asyncio.Event, timeout_s: float) -> None:
        """Returns when the job's watchers are woken, or the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await woken.wait()
        except TimeoutError:
            return

    def enter(self, job_id: str) -> asyncio.Event:
        """A new watcher's bell."""
        woken = asyncio.Event()
        self._watchers[job_id].add(woken)
        return woken

    def leave(self, job_id: str, woken: asyncio.Event) -> None:
        """It rings no more."""
        watchers = self._watchers[job_id]
        watchers.discard(woken)
        if not watchers:
            del self._watchers[job_id]


async def watch(
    repository: Repository, broadcaster: Broadcaster, job_id: str, *, after: int, poll_s: float
) -> AsyncGenerator[Event, None]:
    """Durable events above `after`, then whatever happens, until the job has ended.

    An `after` that the job has not reached counts as where it is now: no later event is held back for it. A job that
    failed and was resumed has not ended. Raises CustomizationJobNotFound (also when it is purged meanwhile) and
    ShuttingDown.
    """
    woken = broadcaster.enter(job_id)
    told_ahead: int | None = None
    try:
        state, last_sequence, ahead = await repository.position(job_id)
        last = min(after, last_sequence)
        while True:
            woken.clear()
            # Asked before the events are read: if the job had ended by then, there is nothing to wait for after them.
            state, _, ahead = await repository.position(job_id)
            while batch := await repository.events(job_id, after=last):
                for event in batch:
                    last = event.sequence
                    yield event
            if state.ended:
                return
            if state is State.QUEUED and ahead != told_ahead:
                told_ahead = ahead
                yield Event(job_id=job_id, sequence=0, time_us=now_us(), what=QueueMoved(ahead_count=ahead))
            if broadcaster.closed:
                raise ShuttingDown()
            await broadcaster.wait(job_id, woken, poll_s)
    finally:
        broadcaster.leave(job_id, woken)
