"""Takes jobs from where they stand to where they go: lays them out, starts them in turn, follows and ends them.

One process of an installation runs jobs, the one that holds the lock of the jobs' folder; the others answer calls. It
looks at every job again and again and remembers nothing that is not in the database, the job's folder or the backend,
so the next process goes on where a killed one was. What a training process told is read after it was looked whether it
lives: of one that ended, nothing is missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from services.customization.backends import (
    PROGRESS_FILE,
    STORY_FOLDER,
    Backend,
    Ended,
    Run,
    arguments_of,
    end_of,
    read_lines,
)
from services.customization.config import CustomizationSettings
from services.customization.events import Broadcaster
from services.customization.intake import lay_out, taught_pack
from services.customization.metrics import ATTEMPTS, ENDED, JOBS, LOOK_SECONDS
from services.customization.records import (
    Checkpoint,
    CheckpointSaved,
    Durable,
    Following,
    Job,
    ProbeDrawn,
    Progress,
)
from services.customization.reporting import Reporter
from services.customization.repository import Repository
from services.customization.shelf import Shelf
from services.customization.states import OCCUPYING, State, after, before
from services.runtime.database import now_us
from services.runtime.errors import FabulaError, StorageFull, Unavailable
from services.runtime.store import ObjectStore

LOCK_FILE = "runner.lock"
_MOST_PROGRESS_EVENTS = 1000  # of a job: a long one tells of every so many steps
_ASK_AGAIN_S = 10.0  # before a process that was told to stop is told again

log = structlog.get_logger("fabula.customization.runner")


@dataclass
class Seen:
    """What was read of a job's progress file at once."""

    following: Following
    happened: list[Durable] = field(default_factory=list)
    steps: int | None = None
    running: bool = False
    progress: Progress | None = None
    cards: dict[int, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    baseline: Mapping[str, float] | None = None


class Runner:
    """Runs the jobs of one folder."""

    def __init__(
        self,
        *,
        repository: Repository,
        objects: ObjectStore,
        shelf: Shelf,
        backend: Backend,
        broadcaster: Broadcaster,
        settings: CustomizationSettings,
        folder: Path,
        pack_folders: tuple[Path, ...],
    ) -> None:
        self._repository, self._objects, self._shelf, self._backend = repository, objects, shelf, backend
        self._broadcaster, self._settings = broadcaster, settings
        self._folder, self._pack_folders = folder, pack_folders
        self._reporter = Reporter(repository, objects)
        self._asked: dict[tuple[str, int], int] = {}  # when an attempt was told to stop, by this process
        self._lock: int | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Has `run` end after the look in progress."""
        self._stopping.set()

    async def run(self) -> None:
        """Until it is told to stop."""
        try:
            while not self._stopping.is_set():
                if self._has_lock():
                    await self._looked(self.tick)
                if self._tidying is None or self._tidying.done():
                    self._tidying = asyncio.create_task(self._looked(self._tidy), name="tidying")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._settings.poll_s)
        finally:
            if self._tidying is not None:
                # It may wait long for its turn, and what it has not moved the next process does.
                self._tidying.cancel()
                await asyncio.wait((self._tidying,))
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    async def _looked(self, look: Callable[[], Awaitable[None]]) -> None:
        """What fails in it, the next look tries again."""
        try:
            await look()
        except FabulaError as error:  # the database or a store is away; it comes back
            log.warning("look_failed", reason=error.reason, message=error.message)
        except Exception as error:
            log.error("look_failed", exc_info=error)

    def _has_lock(self) -> bool:
        if self._lock is not None:
            return True
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._lock = handle
        return True

    async def tick(self) -> None:
        """One look at every job that something may have to be done about."""
        with LOOK_SECONDS.time():
            for job_id in await self._repository.in_states({State.VALIDATING}):
                await self._guarded(self._lay_out, job_id)
            occupying = await self._repository.in_states(OCCUPYING)
            for job_id in occupying:
                await self._guarded(self._follow, job_id)
            occupying = await self._repository.in_states(OCCUPYING)
            queued = await self._repository.in_states({State.QUEUED})
            JOBS.labels(state="queued").set(len(queued))
            JOBS.labels(state="running").set(len(occupying))
            for job_id in queued[: max(0, self._settings.max_running - len(occupying))]:
                await self._guarded(self._begin, job_id)
            for job_id in await self._repository.unreported():
                await self._guarded(self._reporter.keep, job_id)

    async def _tidy(self) -> None:
        """One look at the files: removes what nobody has any more, and brings the rest where the database says.

        Beside the looks at jobs: it waits for whoever is publishing, and moves gigabytes.
        """
        await self._shelf.sweep()  # what this process left itself, whether it runs jobs or not
        if self._lock is None:
            return
        await self._each(self._purge, await self._repository.purgeable(at_us=now_us()))
        await self._each(self._shelf.settle, await self._repository.unsettled_versions(), "version")
        await self._each(self._shelf.purge, await self._repository.purgeable_versions(at_us=now_us()), "version")

    async def _each(self, what: Callable[[str], Awaitable[None]], every: Sequence[str], kind: str = "job") -> None:
        for one in every:
            await self._guarded(what, one, kind)

    async def _guarded(self, what: Callable[[str], Awaitable[Any]], one: str, kind: str = "job") -> None:
        """One job's or version's trouble is not the others'."""
        told = {f"{kind}_id": one}
        try:
            await what(one)
        except Unavailable as error:
            log.warning(f"{kind}_waits", reason=error.reason, message=error.message, **told)
        except FabulaError as error:  # a full disk, a damaged file: it says what it is, and again at every look
            log.warning(f"{kind}_look_failed", reason=error.reason, message=error.message, **told)
        except Exception as error:
            log.error(f"{kind}_look_failed", exc_info=error, **told)

    # -- one job -----------------------------------------------------------------------------------------------------

    async def _lay_out(self, job_id: str) -> None:
        """From a story in the object store to one that training reads."""
        job = await self._repository.get(job_id)
        try:
            pictures = [await self._objects.get(frame.image_sha256) for frame in job.frames]
            await asyncio.to_thread(lay_out, self._folder / job_id / STORY_FOLDER, job.character, job.frames, pictures)
        except Unavailable:
            raise
        except FabulaError as error:
            await self._end(job_id, State.FAILED, error.reason, error.message)
            return
        except OSError as error:
            await self._end(job_id, State.FAILED, *_disk_trouble(error))
            return
        if await self._repository.change_state(job_id, State.QUEUED, only_from={State.VALIDATING}):
            self._broadcaster.note(job_id)

    async def _begin(self, job_id: str) -> None:
        """Starts a queued job's next attempt."""
        job = await self._repository.get(job_id)
        following = await self._repository.following(job_id)
        fresh = replace(_fresh(following), crashes=0)
        if await self._repository.begin_attempt(job_id, in_state=State.QUEUED, following=fresh) is not None:
            await self._start(await self._repository.get(job.job_id))

    async def _again(self, job: Job, following: Following) -> None:
        """The next attempt of a job whose process is gone."""
        fresh = _fresh(following)
        if await self._repository.begin_attempt(job.job_id, in_state=job.state, following=fresh) is not None:
            await self._start(await self._repository.get(job.job_id))

    async def _start(self, job: Job) -> None:
        """Raises Unavailable when the backend is away: the next look finds no process and tries the next attempt."""
        ATTEMPTS.inc()
        self._broadcaster.note(job.job_id)
        try:
            pack = await asyncio.to_thread(taught_pack, job.settings.pack, self._pack_folders)
            if pack.manifest.digest != job.settings.pack_digest:
                message = f"the pack {job.settings.pack} is another one than when the job was made; make a new job"
                await self._end(job.job_id, State.FAILED, "PACK_CHANGED", message)
                return
            run = self._run(job, pack.folder)
            log.info("attempt_started", job_id=job.job_id, attempt=job.attempt)
            await self._backend.start(run)
        except Unavailable:
            raise
        except FabulaError as error:
            reason = "DISK_FULL" if isinstance(error, StorageFull) else "TRAINING_NOT_STARTED"
            await self._end(job.job_id, State.FAILED, reason, error.message)
        except OSError as error:
            await self._end(job.job_id, State.FAILED, *_disk_trouble(error))

    def _run(self, job: Job, pack_folder: Path = Path()) -> Run:
        folder = self._folder / job.job_id
        return Run(
            job_id=job.job_id,
            attempt=job.attempt,
            folder=folder,
            arguments=arguments_of(
                job.settings,
                pack_folder=pack_folder,
                folder=folder,
                known=self._settings.known_of(job.settings.pack),
                stop_file=self._settings.backend == "kuberay",
                worker_cpus=self._settings.cpus_of_a_worker(job.settings.threads),
                worker_gpus=self._settings.gpus,
            ),
            threads=job.settings.threads,
            workers=job.settings.workers,
        )

    async def _follow(self, job_id: str) -> None:
        """Records what a job's process told, and acts on its end or on somebody's wish for one."""
        job = await self._repository.get(job_id)
        run = self._run(job)
        ended = await self._backend.look(run)
        following = await self._read(job)
        job = await self._repository.get(job_id)  # a wish may have come meanwhile, and reading may have moved it
        read_bytes = -1
        while ended is not None and following.offset_bytes != read_bytes:  # how it ended stands at the very end
            read_bytes = following.offset_bytes
            following = await self._read(job)
            job = await self._repository.get(job_id)
        if ended is not None:
            await self._ended(job, following, ended)
        elif job.state in (State.PAUSING, State.CANCELLING):
            await self._ask_to_stop(job, run, following)

    async def _ask_to_stop(self, job: Job, run: Run, following: Following) -> None:
        at = now_us()
        if following.stop_us is None:
            await self._repository.set_following(job.job_id, replace(following, stop_us=at))
        elif at - following.stop_us > self._settings.stop_grace_s * 1e6:
            log.warning("attempt_killed", job_id=job.job_id, attempt=job.attempt)
            await self._backend.kill(run)
            return
        key = (job.job_id, job.attempt)
        if at - self._asked.get(key, 0) > _ASK_AGAIN_S * 1e6:
            self._asked[key] = at
            await self._backend.stop(run)

    async def _ended(self, job: Job, following: Following, ended: Ended) -> None:
        end = end_of(following.outcome, ended)
        crashes = following.crashes + 1 if end.outcome == "lost" else following.crashes
        decision = after(job.state, end, crashes=crashes, crashes_max=self._settings.crashes_max)
        log.info("attempt_ended", job_id=job.job_id, attempt=job.attempt, outcome=end.outcome, message=end.message)
        self._asked.pop((job.job_id, job.attempt), None)
        if decision.to is None:
            await self._again(job, replace(following, crashes=crashes))
        else:
            await self._end(job.job_id, decision.to, decision.reason, decision.message)

    async def _end(self, job_id: str, to: State, reason: str = "", message: str = "") -> None:
        if await self._repository.change_state(job_id, to, only_from=before(to), reason=reason, message=message):
            if to.ended:
                ENDED.labels(state=to.value).inc()
            self._broadcaster.note(job_id)

    async def _purge(self, job_id: str) -> None:
        """Its files first: one who is killed before the rows go has the next look do it all again."""
        if await self._repository.own_objects(job_id, at_us=now_us()) is None:
            return  # others were purged before it, which takes its time, and it was undeleted meanwhile
        await asyncio.to_thread(_remove, self._folder / job_id)
        async with self._shelf.alone():  # nobody puts or publishes meanwhile what is found unused here
            at_us = now_us()
            own = await self._repository.own_objects(job_id, at_us=at_us)
            for sha256 in own or ():
                await self._objects.delete(sha256)
            if await self._repository.purge(job_id, at_us=at_us, removed=own or ()):
                log.info("job_purged", job_id=job_id)

    # -- what a process told -----------------------------------------------------------------------------------------

    async def _read(self, job: Job) -> Following:
        """Records every line that is new. Returns what is known of the attempt then."""
        following = await self._repository.following(job.job_id)
        path = self._folder / job.job_id / PROGRESS_FILE
        lines, offset = await asyncio.to_thread(read_lines, path, following.offset_bytes)
        if offset == following.offset_bytes:
            return following
        async with AsyncExitStack() as turn:
            if any(line["event"] == "probe" for line in lines):
                # A picture that is put is not found unused by somebody who purges, before it is known whose it is.
                await turn.enter_async_context(self._shelf.putting())
            seen = Seen(following=replace(following, offset_bytes=offset))
            for line in lines:
                try:
                    await self._fold(job, seen, line)
                except (KeyError, TypeError, ValueError) as error:
                    log.warning("line_unreadable", job_id=job.job_id, event=str(line)[:200], exc_info=error)
            await self._repository.record(
                job.job_id,
                following=seen.following,
                happened=seen.happened,
                steps=seen.steps,
                running=seen.running,
                progress=seen.progress,
                cards=seen.cards,
                baseline=seen.baseline,
            )
        self._broadcaster.note(job.job_id)
        return seen.following

    async def _fold(self, job: Job, seen: Seen, line: Mapping[str, Any]) -> None:
        """One line into what is to be recorded. Raises KeyError, TypeError or ValueError for what is none of ours."""
        match line["event"]:
            case "began":
                seen.running = True
                seen.steps = int(line["steps"])
                seen.following = replace(seen.following, begin_at=float(line["at"]), outcome=None)
            case "step":
                self._step(job, seen, line)
            case "snapshot":
                await self._snapshot(job, seen, line)
            case "probe":
                picture = await asyncio.to_thread(self._own(job, line["file"]).read_bytes)
                seen.happened.append(
                    ProbeDrawn(
                        step=int(line["step"]),
                        probe=str(line["probe"]),
                        description=str(line["description"]),
                        image_sha256=await self._objects.put(picture),
                    )
                )
            case "probed" if int(line["step"]) == 0:  # of later steps the card of the weights says it
                seen.baseline = {str(name): float(value) for name, value in line["figures"].items()}
            case "ended":
                told = {key: str(line.get(key, "")) for key in ("outcome", "reason", "message")}
                seen.following = replace(seen.following, outcome=told)

    def _step(self, job: Job, seen: Seen, line: Mapping[str, Any]) -> None:
        step, at = int(line["step"]), float(line["at"])
        following = seen.following
        if step > following.top_step:  # taking the same steps again and again, and dying of them, is no progress
            following = replace(following, top_step=step, crashes=0)
        if following.first_step is None or following.first_at is None:
            following = replace(following, first_step=step, first_at=at)
        elif step > following.first_step and at > following.first_at:
            speed = (at - following.first_at) / (step - following.first_step)
            following = replace(following, seconds_a_step=round(speed, 4))
        seen.following = following
        count = seen.steps or job.settings.steps
        known = seen.progress or job.progress
        told = known.step if known is not None else 0
        stride = max(1, count // _MOST_PROGRESS_EVENTS)
        if step <= told or (step - told < stride and step != count):
            return  # an attempt that goes on from before takes these steps again, and finds the same
        seen.progress = Progress(
            step=step,
            step_count=count,
            losses={str(name): float(value) for name, value in line["losses"].items()},
            eta_s=round((count - step) * (following.seconds_a_step or 0.0), 1),
        )
        seen.happened.append(seen.progress)

    async def _snapshot(self, job: Job, seen: Seen, line: Mapping[str, Any]) -> None:
        path = self._own(job, line["file"])
        card = json.loads(await asyncio.to_thread(path.with_suffix(".json").read_text, encoding="utf-8"))
        weights = card["weights"]
        checkpoint = Checkpoint(
            step=int(line["step"]),
            weights_sha256=str(weights["sha256"]),
            size_bytes=int(weights["size_bytes"]),
            rank=int(weights["rank"]),
            create_us=round(float(line["at"]) * 1e6),
            figures={str(name): float(value) for name, value in card.get("figures", {}).items()},
        )
        seen.cards[checkpoint.step] = (str(path.relative_to(self._folder / job.job_id)), card)
        seen.happened.append(CheckpointSaved(checkpoint=checkpoint))

    def _own(self, job: Job, file: str) -> Path:
        """A file that a process named. Raises ValueError for one outside the job's folder."""
        folder = (self._folder / job.job_id).resolve()
        path = Path(file).resolve()
        if not path.is_relative_to(folder):
            raise ValueError(f"{path} is not in {folder}")
        return folder.parent / job.job_id / path.relative_to(folder)


def _fresh(following: Following) -> Following:
    """What is kept of what was seen when the next attempt begins."""
    return replace(following, outcome=None, stop_us=None, first_step=None, first_at=None, begin_at=None)


def _remove(folder: Path) -> None:
    """A folder with all that is in it, if it is there. Raises OSError."""
    if folder.exists():
        shutil.rmtree(folder)


def _disk_trouble(error: OSError) -> tuple[str, str]:
    with contextlib.suppress(ValueError):
        if error.errno in (27, 28, 122):
            return "DISK_FULL", "there is no room for the job's folder; make room and resume the job"
    return "TRAINING_NOT_STARTED", f"the job's folder cannot be written: {error.strerror or error}"
