"""Keeps house: shows that this process lives, takes over from dead ones, hands over what was left behind, cleans up.

Everything here is safe to do twice and from several processes at once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import structlog

from services.runtime.database import now_us
from services.runtime.errors import FabulaError
from services.runtime.store import ObjectStore, StoredObject
from services.story.config import StorySettings
from services.story.events import Broadcaster
from services.story.metrics import ENDED, ORPHANS, RECOVERED, STORIES
from services.story.records import ACTIVE, State
from services.story.repository import Repository
from services.story.workflow import StoryWorkflows

BEAT_S = 3.0  # a fraction of the lease
HOUSEKEEPING_S = 300.0
REQUEST_MEMORY_US = 7 * 24 * 3600 * 1_000_000  # how long a request id is remembered
MOST_REWINDS = 3  # how often this process gives a story another run after the engine recorded an error
OUTBOX_AGE_US = 2_000_000  # a story not handed over after so long was left behind by a crash

log = structlog.get_logger("fabula.story.caretaker")


class Caretaker:
    """The background work of the story process."""

    def __init__(
        self,
        *,
        repository: Repository,
        workflows: StoryWorkflows,
        store: ObjectStore,
        broadcaster: Broadcaster,
        settings: StorySettings,
    ) -> None:
        self._repository = repository
        self._workflows = workflows
        self._store = store
        self._broadcaster = broadcaster
        self._settings = settings
        self._process_start_us = int(psutil.Process().create_time() * 1e6)
        self._over: set[str] = set()
        self._stuck: set[str] = set()
        self._lost: set[str] = set()
        self._rewinds: Counter[str] = Counter()
        # A new name for every process: two that share a database are never taken for each other.
        self.executor_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"[-64:]

    async def sign_on(self) -> None:
        """Says that this process lives. Before it takes its first story: who dies unknown is never taken over from.

        Raises FabulaError.
        """
        await self._beat()

    async def start(self) -> None:
        """Takes over at once what a dead process on this machine left. Raises FabulaError."""
        await self._take_over()
        await self._hand_over(older_than_us=now_us())

    async def run(self) -> None:
        """Goes on until cancelled. A database that does not answer is waited for."""
        # Each for itself: however long the others take, the beat comes before the lease ends.
        await asyncio.gather(
            _every(BEAT_S, self._beat), _every(BEAT_S, self._look_after), _every(HOUSEKEEPING_S, self._clean)
        )

    async def sign_off(self) -> None:
        """Leaves: the next process need not wait for this one's lease to take over its stories."""
        await self._repository.release(self.executor_id)

    async def _look_after(self) -> None:
        await self._take_over()
        await self._hand_over(older_than_us=now_us() - OUTBOX_AGE_US)
        await self._mend()
        await self._count()

    async def _clean(self) -> None:
        await self._repository.forget_requests(older_than_us=now_us() - REQUEST_MEMORY_US)
        await self.sweep(datetime.now(UTC))

    async def _beat(self) -> None:
        await self._repository.heartbeat(
            executor_id=self.executor_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start_us=self._process_start_us,
        )

    async def _take_over(self) -> None:
        for row in await self._repository.executors():
            if row.executor_id == self.executor_id or not self._is_dead(row):
                continue
            log.info("executor_dead", executor=row.executor_id)
            await self._workflows.recover(row.executor_id)
            await self._repository.sign_off(row.executor_id)
            RECOVERED.inc()

    def _is_dead(self, row: Any) -> bool:
        if row.host == socket.gethostname() and not _lives(row.pid, row.process_start_us):
            return True
        return bool(now_us() - row.heartbeat_us > self._settings.lease_s * 1e6)

    async def _hand_over(self, *, older_than_us: int) -> None:
        """Acknowledged stories that a crash kept from the workflow engine."""
        for story_id in await self._repository.not_enqueued(older_than_us=older_than_us):
            log.info("story_handed_over", story_id=story_id)
            await self._workflows.enqueue(story_id)

    async def _mend(self) -> None:
        """Stories that look active but that nobody runs. Each is seen so twice before anything is done about it.

        Those of a process that nobody knows any more are taken over; those that this process should run and does not
        run again; those whose run ended with an error get a few more runs, and what the engine has given up for good
        fails openly.
        """
        active = await self._repository.active()
        records = await self._workflows.engine_records(active) if active else {}
        # Read after the records: who has a story had signed on before.
        known = {row.executor_id for row in await self._repository.executors()} if active else set()
        over, stuck, lost = set(), set(), set()
        for story_id in active:
            state, executor_id = records.get(story_id, ("", ""))
            if state not in ("PENDING", "ENQUEUED", "DELAYED"):
                over.add(story_id)
            elif state == "PENDING" and executor_id == self.executor_id and story_id not in self._workflows.running:
                stuck.add(story_id)
            elif state == "PENDING" and executor_id not in known:
                lost.add(executor_id)
        for executor_id in lost & self._lost:
            log.warning("executor_unknown", executor=executor_id)
            await self._workflows.recover(executor_id)
        self._lost = lost
        for story_id in stuck & self._stuck:
            # The engine could not even record how its run ended (its disk was full, say): it has to run again.
            log.warning("story_run_again", story_id=story_id)
            await self._workflows.run_again(story_id)
        self._stuck = stuck
        for story_id in over & self._over:
            state, _ = records.get(story_id, ("", ""))
            if state == "ERROR" and self._rewinds[story_id] < MOST_REWINDS:
                self._rewinds[story_id] += 1
                log.warning("story_rewound", story_id=story_id, times=self._rewinds[story_id])
                await self._rewind(story_id)
                continue
            log.error("story_abandoned_by_engine", story_id=story_id, engine_state=state)
            if await self._repository.change_state(
                story_id,
                State.FAILED,
                only_from=ACTIVE,
                reason="INTERNAL",
                message="the workflow of this story ended unexpectedly; the log has the details",
            ):
                ENDED.labels(state=State.FAILED.value).inc()
                self._broadcaster.durable(story_id)
        self._over = over
        self._rewinds = Counter({story_id: count for story_id, count in self._rewinds.items() if story_id in active})

    async def _rewind(self, story_id: str) -> None:
        try:
            await self._workflows.rewind(story_id)
        except Exception as error:  # another process may have done it just now: it is no longer over then
            log.warning("rewind_failed", story_id=story_id, exc_info=error)

    async def _count(self) -> None:
        counts = await self._repository.count_by_state()
        for state in State:
            STORIES.labels(state=state.value).set(counts.get(state, 0))

    async def sweep(self, now: datetime) -> int:
        """Removes pictures that no story has, if they are so old that nobody is about to commit them; says how many.

        A story that was interrupted between drawing and committing may come back after a long pause, so nothing newer
        than the oldest unfinished story is touched.
        """
        removed = 0
        limit = now - timedelta(seconds=self._settings.orphan_age_s)
        oldest_us = await self._repository.oldest_active_us()
        if oldest_us is not None:
            limit = min(limit, datetime.fromtimestamp(oldest_us / 1e6, UTC))
        batch: list[StoredObject] = []
        async for item in self._store.every():
            if item.modified_time < limit:
                batch.append(item)
            if len(batch) == 500:
                removed += await self._remove_orphans(batch, limit)
                batch = []
        return removed + await self._remove_orphans(batch, limit)

    async def _remove_orphans(self, batch: list[StoredObject], limit: datetime) -> int:
        if not batch:
            return 0
        kept = await self._repository.referenced(item.sha256 for item in batch)
        removed = 0
        for item in batch:
            # A batch takes a while: what somebody put again or committed meanwhile shows only now. The time is asked
            # last, because putting comes before committing.
            if item.sha256 in kept or await self._repository.referenced([item.sha256]):
                continue
            modified_time = await self._store.modified_time(item.sha256)
            if modified_time is None or modified_time >= limit:
                continue
            await self._store.delete(item.sha256)
            ORPHANS.inc()
            removed += 1
        return removed


async def _every(pause_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Does the work over and over, until cancelled, whatever it raises."""
    while True:
        try:
            await work()
        except FabulaError as error:
            log.warning("housekeeping_failed", reason=error.reason, message=error.message)
        except Exception as error:
            log.error("housekeeping_broken", exc_info=error)
        await asyncio.sleep(pause_s)


def _lives(pid: int, process_start_us: int) -> bool:
    """Whether the very process still runs: another one may have its number by now, and a zombie has only the number."""
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() * 1e6 - process_start_us) < 2e6
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
