"""Keeps house: shows that this process lives, takes over from dead ones, hands over what was left behind, cleans up.

Everything here is safe to do twice and from several processes at once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import structlog

from services.runtime.errors import FabulaError
from services.runtime.store import ObjectStore, StoredObject
from services.story.config import StorySettings
from services.story.events import Broadcaster
from services.story.metrics import ENDED, ORPHANS, RECOVERED, STORIES
from services.story.records import ACTIVE, State
from services.story.repository import Repository, now_us
from services.story.workflow import StoryWorkflows

BEAT_S = 3.0  # a fraction of the lease
HOUSEKEEPING_S = 300.0
REQUEST_MEMORY_US = 7 * 24 * 3600 * 1_000_000  # how long a request id is remembered
OUTBOX_AGE_US = 2_000_000  # a story not handed over after so long was left behind by a crash

log = structlog.get_logger("fabula.story.caretaker")


class Caretaker:
    """One background task of the story process."""

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
        # A new name for every process: two that share a database are never taken for each other.
        self.executor_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"[-64:]

    async def start(self) -> None:
        """Signs on and takes over at once what a dead process on this machine left. Raises FabulaError."""
        await self._beat()
        await self._take_over()
        await self._hand_over(older_than_us=now_us())

    async def run(self) -> None:
        """Goes on until cancelled. A database that does not answer is waited for."""
        housekeeping_due = 0.0
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._beat()
                await self._take_over()
                await self._hand_over(older_than_us=now_us() - OUTBOX_AGE_US)
                await self._mend()
                await self._count()
                if loop.time() >= housekeeping_due:
                    await self._repository.forget_requests(older_than_us=now_us() - REQUEST_MEMORY_US)
                    await self.sweep(datetime.now(UTC))
                    housekeeping_due = loop.time() + HOUSEKEEPING_S
            except FabulaError as error:
                log.warning("housekeeping_failed", reason=error.reason, message=error.message)
            except Exception as error:
                log.error("housekeeping_broken", exc_info=error)
            await asyncio.sleep(BEAT_S)

    async def sign_off(self) -> None:
        """Leaves: the next process need not wait for this one's lease to take over its stories."""
        await self._repository.release(self.executor_id)

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
        """Stories that look active but that the engine has given up: seen so twice, they fail openly."""
        active = await self._repository.active()
        records = await self._workflows.engine_records(active) if active else {}
        over, stuck = set(), set()
        for story_id in active:
            state, executor_id = records.get(story_id, ("", ""))
            if state not in ("PENDING", "ENQUEUED", "DELAYED"):
                over.add(story_id)
            elif state == "PENDING" and executor_id == self.executor_id and story_id not in self._workflows.running:
                stuck.add(story_id)
        for story_id in stuck & self._stuck:
            # The engine could not even record how its run ended (its disk was full, say): it has to run again.
            log.warning("story_run_again", story_id=story_id)
            await self._workflows.run_again(story_id)
        self._stuck = stuck
        for story_id in over & self._over:
            log.error("story_abandoned_by_engine", story_id=story_id, engine_state=records.get(story_id, ("", ""))[0])
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
                removed += await self._remove_orphans(batch)
                batch = []
        return removed + await self._remove_orphans(batch)

    async def _remove_orphans(self, batch: list[StoredObject]) -> int:
        if not batch:
            return 0
        kept = await self._repository.referenced(item.sha256 for item in batch)
        orphans = [item for item in batch if item.sha256 not in kept]
        for item in orphans:
            await self._store.delete(item.sha256)
            ORPHANS.inc()
        return len(orphans)


def _lives(pid: int, process_start_us: int) -> bool:
    """Whether the very process still runs: another one may have its number by now, and a zombie has only the number."""
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() * 1e6 - process_start_us) < 2e6
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
