"""Reads and writes jobs. Each method is one transaction, so a crash leaves a job before it or after it.

Durable events are written in the transaction of what they report, with the job's next sequence number: the number comes
from updating the job's row, which only one transaction can do at a time, so the sequence has no gap and no duplicate.
What the runner reads of a progress file is recorded together with how far it has read, so nothing is told twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, insert, not_, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.customization.checks import Finding
from services.customization.records import (
    CharacterVersion,
    Checkpoint,
    CheckpointSaved,
    Durable,
    Estimate,
    Event,
    Following,
    Job,
    NewCharacter,
    ProbeDrawn,
    Progress,
    StateChanged,
    StoredFrame,
    TrainingSettings,
    VersionPublished,
    durable_from_json,
    kind_of,
    to_json,
    version_from_json,
)
from services.customization.schema import checkpoints, events, images, jobs, request_keys, versions
from services.customization.states import State
from services.runtime.database import RequestKeys, now_us, reading, writing
from services.runtime.errors import (
    CharacterVersionNotFound,
    CheckpointNotFound,
    CustomizationJobNotFound,
    JobStateUnsuitable,
    QueueFull,
)

_KEYS = RequestKeys(request_keys, "job_id")
_WAITING = [State.VALIDATING.value, State.QUEUED.value]


class Repository:
    """The jobs of one database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    # -- making and reading ------------------------------------------------------------------------------------------

    async def create(
        self,
        *,
        job_id: str,
        character: NewCharacter,
        frames: Sequence[StoredFrame],
        settings: TrainingSettings,
        findings: Sequence[Finding],
        estimate: Estimate,
        request_id: str,
        body_sha256: str,
        max_queued: int,
    ) -> tuple[Job, bool]:
        """Makes a job with its key and its first event; says whether it is new.

        The same request id with the same body answers with the job it made before. Raises IdempotencyKeyReused,
        QueueFull.
        """
        at = now_us()
        try:
            async with writing(self._engine) as connection:
                await connection.execute(
                    insert(jobs).values(
                        job_id=job_id,
                        state=State.VALIDATING.value,
                        character=to_json(character),
                        frames=[to_json(frame) for frame in frames],
                        settings=to_json(settings),
                        findings=[to_json(finding) for finding in findings],
                        estimate=to_json(estimate),
                        following=to_json(Following()),
                        last_sequence=0,
                        create_us=at,
                        update_us=at,
                    )
                )
                await _KEYS.use(connection, request_id, body_sha256=body_sha256, made=job_id, at_us=at)
                await _check_room(connection, max_queued=max_queued)
                for sha256 in dict.fromkeys(frame.image_sha256 for frame in frames):
                    await connection.execute(insert(images).values(job_id=job_id, sha256=sha256))
                await _append(connection, job_id, StateChanged(state=State.VALIDATING, attempt=0), at)
                return await _job(connection, job_id), True
        except IntegrityError:
            # Somebody else used this request id between the caller's look and now: theirs is the job.
            found = await self.find_by_request(request_id, body_sha256)
            if found is None:
                raise
            return found, False

    async def find_by_request(self, request_id: str, body_sha256: str) -> Job | None:
        """The job this request id made, if any. Raises IdempotencyKeyReused."""
        async with reading(self._engine) as connection:
            made = await _KEYS.find(connection, request_id, body_sha256)
            return None if made is None else await _job(connection, made)

    async def check_room(self, *, max_queued: int) -> None:
        """Raises QueueFull while no further job would be taken."""
        async with reading(self._engine) as connection:
            await _check_room(connection, max_queued=max_queued, coming=1)

    async def get(self, job_id: str) -> Job:
        """A job, deleted ones that are not purged included. Raises CustomizationJobNotFound."""
        async with reading(self._engine) as connection:
            return await _job(connection, job_id)

    async def position(self, job_id: str) -> tuple[State, int, int]:
        """Where it stands, the sequence number of its last event, jobs before it. Raises CustomizationJobNotFound."""
        async with reading(self._engine) as connection:
            row = await _row(connection, job_id)
            return State(row.state), int(row.last_sequence), await _ahead(connection, row)

    async def page(self, *, limit: int, before: str = "", show_deleted: bool = False) -> list[Job]:
        """Jobs without findings and versions, newest first, older than the id `before` if one is given."""
        statement = select(jobs).order_by(jobs.c.job_id.desc()).limit(limit)
        if not show_deleted:
            statement = statement.where(jobs.c.delete_us.is_(None))
        if before:
            statement = statement.where(jobs.c.job_id < before)
        async with reading(self._engine) as connection:
            found = list(await connection.execute(statement))
            return [replace(_job_from(row), ahead_count=await _ahead(connection, row), findings=()) for row in found]

    async def events(self, job_id: str, *, after: int, limit: int = 500) -> list[Event]:
        """Durable events above a sequence number, oldest first. Raises CustomizationJobNotFound."""
        async with reading(self._engine) as connection:
            await _row(connection, job_id)
            rows = await connection.execute(
                select(events)
                .where(events.c.job_id == job_id, events.c.sequence > after)
                .order_by(events.c.sequence)
                .limit(limit)
            )
            return [
                Event(
                    job_id=job_id,
                    sequence=row.sequence,
                    time_us=row.time_us,
                    what=durable_from_json(row.kind, row.payload),
                )
                for row in rows
            ]

    async def has_image(self, job_id: str, sha256: str) -> bool:
        """Whether a picture belongs to a job. Raises CustomizationJobNotFound."""
        async with reading(self._engine) as connection:
            await _row(connection, job_id)
            found = await connection.scalar(
                select(images.c.sha256).where(images.c.job_id == job_id, images.c.sha256 == sha256)
            )
        return found is not None

    # -- what happens to a job ---------------------------------------------------------------------------------------

    async def change_state(
        self,
        job_id: str,
        to: State,
        *,
        only_from: Collection[State],
        reason: str = "",
        message: str = "",
        following: Following | None = None,
    ) -> bool:
        """Moves a job to a state, with its event, if it is in one of `only_from`; says whether it did."""
        at = now_us()
        async with writing(self._engine) as connection:
            return await _move(connection, job_id, to, only_from, at, reason, message, following)

    async def begin_attempt(self, job_id: str, *, in_state: State, following: Following) -> int | None:
        """Counts a job's next attempt, with its event; None when it is no longer in `in_state`, or about to be purged.

        A job that is queued is provisioned by that; one that is running goes on running.
        """
        at = now_us()
        to = State.PROVISIONING if in_state is State.QUEUED else in_state
        async with writing(self._engine) as connection:
            attempt = await connection.scalar(
                update(jobs)
                .where(jobs.c.job_id == job_id, jobs.c.state == in_state.value, not_(_due(at)))
                .values(
                    state=to.value,
                    attempt=jobs.c.attempt + 1,
                    following=to_json(following),
                    start_us=func.coalesce(jobs.c.start_us, at),
                )
                .returning(jobs.c.attempt)
            )
            if attempt is None:
                return None
            await _append(connection, job_id, StateChanged(state=to, attempt=int(attempt)), at)
            return int(attempt)

    async def following(self, job_id: str) -> Following:
        """What the runner has seen of a job. Raises CustomizationJobNotFound."""
        async with reading(self._engine) as connection:
            return Following(**(await _row(connection, job_id)).following)

    async def set_following(self, job_id: str, following: Following) -> None:
        """Keeps what the runner has seen of a job, where nothing else changed."""
        async with writing(self._engine) as connection:
            await connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(following=to_json(following)))

    async def record(
        self,
        job_id: str,
        *,
        following: Following,
        happened: Iterable[Durable],
        steps: int | None = None,
        running: bool = False,
        progress: Progress | None = None,
        cards: Mapping[int, tuple[str, Mapping[str, Any]]] | None = None,
        baseline: Mapping[str, float] | None = None,
    ) -> None:
        """What was read of a job's training process: events in order, and how far it was read.

        `steps` is the number that was measured, `running` says that the process began its work, `cards` are file and
        card of the checkpoints among the events, by step, `baseline` is what was measured before the first step.
        """
        at = now_us()
        async with writing(self._engine) as connection:
            row = await _row(connection, job_id, lock=True)
            changed: dict[str, Any] = {"following": to_json(following)}
            if steps is not None:
                changed["settings"] = {**row.settings, "steps": steps}
            if progress is not None:
                changed["progress"] = to_json(progress)
            if baseline is not None:
                changed["baseline"] = dict(baseline)
            await connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(**changed))
            if running:
                await _move(connection, job_id, State.RUNNING, {State.PROVISIONING}, at)
            for what in happened:
                if isinstance(what, CheckpointSaved) and not await _keep_checkpoint(
                    connection, job_id, what.checkpoint, cards or {}
                ):
                    continue
                if isinstance(what, ProbeDrawn):
                    if await _is_told(connection, job_id, what):
                        continue  # by an attempt that had to go back
                    await _keep_image(connection, job_id, what.image_sha256)
                await _append(connection, job_id, what, at)

    # -- checkpoints and versions ------------------------------------------------------------------------------------

    async def checkpoints(self, job_id: str, *, after_step: int = -1, limit: int = 10_000) -> list[Checkpoint]:
        """A job's checkpoints above a step, oldest first. Raises CustomizationJobNotFound."""
        async with reading(self._engine) as connection:
            await _row(connection, job_id)
            rows = await connection.execute(
                select(checkpoints)
                .where(checkpoints.c.job_id == job_id, checkpoints.c.step > after_step)
                .order_by(checkpoints.c.step)
                .limit(limit)
            )
            return [Checkpoint(**row.payload) for row in rows]

    async def newest_step(self, job_id: str) -> int:
        """The step of a job's newest checkpoint; 0 when there is none."""
        async with reading(self._engine) as connection:
            step = await connection.scalar(select(func.max(checkpoints.c.step)).where(checkpoints.c.job_id == job_id))
        return int(step or 0)

    async def checkpoint(self, job_id: str, step: int) -> tuple[Checkpoint, str, Mapping[str, Any]]:
        """A checkpoint, where its file lies and its card.

        Raises CustomizationJobNotFound, CheckpointNotFound.
        """
        async with reading(self._engine) as connection:
            await _row(connection, job_id)
            row = (
                await connection.execute(
                    select(checkpoints).where(checkpoints.c.job_id == job_id, checkpoints.c.step == step)
                )
            ).one_or_none()
        if row is None:
            raise CheckpointNotFound(metadata={"job_id": job_id, "step": str(step)})
        return Checkpoint(**row.payload), row.file, row.card

    async def publish(self, version: CharacterVersion, manifest: str) -> tuple[CharacterVersion, bool]:
        """Adds a version, with its job's event; says whether it is new.

        One that is there already stays as it is, and is back if it was deleted. Raises CustomizationJobNotFound.
        """
        at = now_us()
        try:
            async with writing(self._engine) as connection:
                found = await connection.execute(
                    update(versions)
                    .where(versions.c.version_id == version.version_id)
                    .values(delete_us=None, purge_us=None)
                    .returning(*versions.c)
                )
                if (row := found.one_or_none()) is not None:
                    return _version_from(row), False
                await connection.execute(
                    insert(versions).values(
                        version_id=version.version_id,
                        name=version.character.name,
                        job_id=version.job_id,
                        publish_us=version.publish_us,
                        payload=to_json(version),
                        manifest=manifest,
                    )
                )
                if version.job_id:
                    await _append(connection, version.job_id, VersionPublished(version=version), at)
                return version, True
        except IntegrityError:
            # Somebody else published it between the look and the insert.
            return await self.version(version.version_id), False

    async def version(self, version_id: str) -> CharacterVersion:
        """One version, deleted ones that are not purged included. Raises CharacterVersionNotFound."""
        async with reading(self._engine) as connection:
            return _version_from(await _version_row(connection, version_id))

    async def versions(
        self, *, limit: int, before: tuple[int, str] | None = None, name: str = "", show_deleted: bool = False
    ) -> list[CharacterVersion]:
        """Versions, newest first, older than `before` (publish time, id) if it is given."""
        statement = select(versions).order_by(versions.c.publish_us.desc(), versions.c.version_id.desc()).limit(limit)
        if not show_deleted:
            statement = statement.where(versions.c.delete_us.is_(None))
        if name:
            statement = statement.where(versions.c.name == name)
        if before is not None:
            at, version_id = before
            same_time = and_(versions.c.publish_us == at, versions.c.version_id < version_id)
            statement = statement.where(or_(versions.c.publish_us < at, same_time))
        async with reading(self._engine) as connection:
            return [_version_from(row) for row in await connection.execute(statement)]

    async def delete_version(self, version_id: str, *, purge_us: int) -> CharacterVersion:
        """Marks a version as deleted until it is purged, and as unsettled. One that is deleted already stays as it is.

        Raises CharacterVersionNotFound.
        """
        at = now_us()
        async with writing(self._engine) as connection:
            await connection.execute(
                update(versions)
                .where(versions.c.version_id == version_id, versions.c.delete_us.is_(None))
                .values(delete_us=at, purge_us=purge_us, unsettled_us=at)
            )
            return _version_from(await _version_row(connection, version_id))

    async def undelete_version(self, version_id: str) -> CharacterVersion:
        """Takes a deletion back. Raises CharacterVersionNotFound."""
        async with writing(self._engine) as connection:
            await connection.execute(
                update(versions).where(versions.c.version_id == version_id).values(delete_us=None, purge_us=None)
            )
            return _version_from(await _version_row(connection, version_id))

    async def unsettle_deleted(self, version_id: str) -> None:
        """Marks a version that is about to come back; one that is not deleted, or not there, is left alone."""
        async with writing(self._engine) as connection:
            await connection.execute(
                update(versions)
                .where(versions.c.version_id == version_id, versions.c.delete_us.is_not(None))
                .values(unsettled_us=now_us())
            )

    async def unsettled(self, version_id: str) -> tuple[CharacterVersion, str] | None:
        """A version and its manifest if the stores may not be as it says; None when they are, or there is none."""
        async with reading(self._engine) as connection:
            row = (
                await connection.execute(
                    select(versions).where(versions.c.version_id == version_id, versions.c.unsettled_us.is_not(None))
                )
            ).one_or_none()
        return None if row is None else (_version_from(row), str(row.manifest))

    async def unsettled_versions(self) -> list[str]:
        """Versions whose files may not lie where they belong, who has waited longest being first."""
        async with reading(self._engine) as connection:
            rows = await connection.execute(
                select(versions.c.version_id)
                .where(versions.c.unsettled_us.is_not(None))
                .order_by(versions.c.unsettled_us)
            )
            return [row.version_id for row in rows]

    async def settle(self, version_id: str) -> None:
        """Its files lie where they belong."""
        async with writing(self._engine) as connection:
            await connection.execute(
                update(versions).where(versions.c.version_id == version_id).values(unsettled_us=None)
            )

    async def has_weights(self, weights_sha256: str, *, deleted: bool, beside: str = "") -> bool:
        """Whether a version has these weights, of those that are deleted or of those that are not, `beside` one."""
        async with reading(self._engine) as connection:
            found = await connection.scalar(
                select(versions.c.version_id)
                .where(
                    versions.c.payload["weights_sha256"].as_string() == weights_sha256,
                    versions.c.delete_us.is_not(None) if deleted else versions.c.delete_us.is_(None),
                    versions.c.version_id != beside,
                )
                .limit(1)
            )
        return found is not None

    async def purgeable_versions(self, *, at_us: int) -> list[str]:
        """Deleted versions whose time is over."""
        async with reading(self._engine) as connection:
            rows = await connection.execute(select(versions.c.version_id).where(versions.c.purge_us <= at_us))
            return [row.version_id for row in rows]

    async def own_pictures(self, version: CharacterVersion) -> list[str]:
        """Its pictures that no job and no other version has."""
        own = set(version.reference_sha256s)
        async with reading(self._engine) as connection:
            shared = set(await connection.scalars(select(images.c.sha256).where(images.c.sha256.in_(own))))
            shared |= await _version_pictures(connection, beside=version.version_id)
        return sorted(own - shared)

    async def purge_version(self, version_id: str) -> None:
        """Removes a version for good."""
        async with writing(self._engine) as connection:
            await connection.execute(delete(versions).where(versions.c.version_id == version_id))

    # -- pages -------------------------------------------------------------------------------------------------------

    async def kept_report(self, job_id: str) -> str:
        """SHA-256 of the page of a job that has ended; empty without one. Raises CustomizationJobNotFound."""
        async with reading(self._engine) as connection:
            row = await _row(connection, job_id)
        is_kept = State(row.state).ended and row.report_us is not None and row.report_us >= row.end_us
        return str(row.report_sha256) if is_kept else ""

    async def unreported(self) -> list[str]:
        """Jobs that have ended and whose page is not kept, or is of an earlier end."""
        async with reading(self._engine) as connection:
            rows = await connection.execute(
                select(jobs.c.job_id)
                .where(
                    jobs.c.state.in_([state.value for state in State if state.ended]),
                    or_(jobs.c.report_us.is_(None), jobs.c.report_us < jobs.c.end_us),
                )
                .order_by(jobs.c.end_us)
            )
            return [row.job_id for row in rows]

    async def keep_report(self, job_id: str, sha256: str, *, at_us: int) -> list[str]:
        """Keeps a page. Returns the pages that nobody has any more: the one before, or this one of a purged job."""
        async with writing(self._engine) as connection:
            row = (await connection.execute(select(jobs).where(jobs.c.job_id == job_id))).one_or_none()
            if row is None:
                return [sha256]
            await connection.execute(
                update(jobs).where(jobs.c.job_id == job_id).values(report_sha256=sha256, report_us=at_us)
            )
            return [row.report_sha256] if row.report_sha256 not in (None, sha256) else []

    # -- deleting ----------------------------------------------------------------------------------------------------

    async def delete(self, job_id: str, *, purge_us: int) -> Job:
        """Marks a job as deleted until it is purged. Raises CustomizationJobNotFound."""
        async with writing(self._engine) as connection:
            await _row(connection, job_id)
            await connection.execute(
                update(jobs)
                .where(jobs.c.job_id == job_id, jobs.c.delete_us.is_(None))
                .values(delete_us=now_us(), purge_us=purge_us)
            )
            return await _job(connection, job_id)

    async def undelete(self, job_id: str) -> Job:
        """Takes a deletion back. Raises CustomizationJobNotFound, also once its time is over: its files may be gone."""
        at = now_us()
        async with writing(self._engine) as connection:
            row = await _row(connection, job_id, lock=True)
            if row.purge_us is not None and row.purge_us <= at:
                raise CustomizationJobNotFound(
                    "the time in which this job could be undeleted is over", metadata={"job_id": job_id}
                )
            await connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(delete_us=None, purge_us=None))
            return await _job(connection, job_id)

    async def purgeable(self, *, at_us: int) -> list[str]:
        """Deleted jobs whose time is over and that have no training process."""
        async with reading(self._engine) as connection:
            rows = await connection.execute(select(jobs.c.job_id).where(_due(at_us)))
            return [row.job_id for row in rows]

    async def own_objects(self, job_id: str, *, at_us: int) -> list[str] | None:
        """The objects of a job that is to be purged which nobody else has: its pictures, and its page last.

        Versions keep theirs, deleted ones too. None for a job whose time is not over: it was undeleted since somebody
        looked, or is gone. One whose time is over can neither come back nor be trained any more.
        """
        async with reading(self._engine) as connection:
            return await _own_objects(connection, job_id, at_us)

    async def purge(self, job_id: str, *, at_us: int, removed: Collection[str]) -> bool:
        """Removes a job for good whose time is over and whose own objects are `removed`; says whether it did.

        It stays when it has others since: the next look removes those, too.
        """
        async with writing(self._engine) as connection:
            own = await _own_objects(connection, job_id, at_us, lock=True)
            if own is None or not set(own) <= set(removed):
                return False
            for table in (events, checkpoints, images, request_keys):
                await connection.execute(delete(table).where(table.c.job_id == job_id))
            await connection.execute(delete(jobs).where(jobs.c.job_id == job_id))
            return True

    # -- what the runner asks ----------------------------------------------------------------------------------------

    async def in_states(self, states: Collection[State]) -> list[str]:
        """Jobs in one of these states, who came first being first."""
        async with reading(self._engine) as connection:
            rows = await connection.execute(
                select(jobs.c.job_id)
                .where(jobs.c.state.in_([state.value for state in states]))
                .order_by(jobs.c.queue_us, jobs.c.job_id)
            )
            return [row.job_id for row in rows]

    async def measured(
        self, *, pack_digest: str, method: str, learns: str, workers: int, limit: int = 20
    ) -> list[float]:
        """Seconds a step of the newest jobs like this one, newest first. One of other workers is not like it: they
        wait for each other at every step, and may share a machine.
        """
        async with reading(self._engine) as connection:
            rows = await connection.execute(
                select(jobs.c.settings, jobs.c.following).order_by(jobs.c.job_id.desc()).limit(500)
            )
            told = [
                float(row.following["seconds_a_step"])
                for row in rows
                if row.following.get("seconds_a_step")
                and (row.settings["pack_digest"], row.settings["method"], row.settings["learns"])
                == (pack_digest, method, learns)
                and row.settings.get("workers", 0) == workers
            ]
        return told[:limit]

    async def waiting(self) -> list[Job]:
        """Every job that waits for its turn or has it, who came first being first."""
        wanted = [State.VALIDATING, State.QUEUED, *sorted(state for state in State if state.occupies)]
        async with reading(self._engine) as connection:
            rows = await connection.execute(
                select(jobs)
                .where(jobs.c.state.in_([state.value for state in wanted]))
                .order_by(jobs.c.queue_us, jobs.c.job_id)
            )
            return [_job_from(row) for row in rows]


def _due(at_us: int) -> ColumnElement[bool]:
    """Jobs that are to be purged: deleted, their time is over, and they have no training process."""
    idle = jobs.c.state.in_([state.value for state in State if not state.occupies])
    return and_(jobs.c.purge_us.is_not(None), jobs.c.purge_us <= at_us, idle)


async def _own_objects(connection: AsyncConnection, job_id: str, at_us: int, *, lock: bool = False) -> list[str] | None:
    statement = select(jobs).where(jobs.c.job_id == job_id, _due(at_us))
    row = (await connection.execute(statement.with_for_update() if lock else statement)).one_or_none()
    if row is None:
        return None
    own = list(await connection.scalars(select(images.c.sha256).where(images.c.job_id == job_id)))
    others = select(images.c.sha256).where(images.c.sha256.in_(own), images.c.job_id != job_id)
    shared = set(await connection.scalars(others)) | await _version_pictures(connection)
    return [sha256 for sha256 in (*own, *([row.report_sha256] if row.report_sha256 else ())) if sha256 not in shared]


async def _append(connection: AsyncConnection, job_id: str, what: Durable, at: int) -> None:
    sequence = await connection.scalar(
        update(jobs)
        .where(jobs.c.job_id == job_id)
        .values(last_sequence=jobs.c.last_sequence + 1, update_us=at)
        .returning(jobs.c.last_sequence)
    )
    if sequence is None:
        raise CustomizationJobNotFound(metadata={"job_id": job_id[:64]})
    await connection.execute(
        insert(events).values(job_id=job_id, sequence=sequence, time_us=at, kind=kind_of(what), payload=to_json(what))
    )


async def _move(
    connection: AsyncConnection,
    job_id: str,
    to: State,
    only_from: Collection[State],
    at: int,
    reason: str = "",
    message: str = "",
    following: Following | None = None,
) -> bool:
    changed: dict[str, Any] = {"state": to.value, "reason": reason, "message": message}
    changed["end_us"] = at if to.ended else None
    if to is State.QUEUED:
        changed["queue_us"] = at
    if following is not None:
        changed["following"] = to_json(following)
    attempt = await connection.scalar(
        update(jobs)
        .where(jobs.c.job_id == job_id, jobs.c.state.in_([state.value for state in only_from]))
        .values(**changed)
        .returning(jobs.c.attempt)
    )
    if attempt is None:
        return False
    what = StateChanged(state=to, attempt=int(attempt), reason=reason, message=message)
    await _append(connection, job_id, what, at)
    return True


async def _keep_checkpoint(
    connection: AsyncConnection,
    job_id: str,
    checkpoint: Checkpoint,
    cards: Mapping[int, tuple[str, Mapping[str, Any]]],
) -> bool:
    """Says whether it is new: an attempt that goes on from before it tells of it again."""
    found = await connection.scalar(
        select(checkpoints.c.step).where(checkpoints.c.job_id == job_id, checkpoints.c.step == checkpoint.step)
    )
    if found is not None:
        return False
    file, card = cards[checkpoint.step]
    await connection.execute(
        insert(checkpoints).values(
            job_id=job_id, step=checkpoint.step, file=file, payload=to_json(checkpoint), card=dict(card)
        )
    )
    return True


async def _is_told(connection: AsyncConnection, job_id: str, probe: ProbeDrawn) -> bool:
    kind = kind_of(probe)
    rows = await connection.scalars(select(events.c.payload).where(events.c.job_id == job_id, events.c.kind == kind))
    return any((told["step"], told["probe"]) == (probe.step, probe.probe) for told in rows)


async def _keep_image(connection: AsyncConnection, job_id: str, sha256: str) -> None:
    found = await connection.scalar(select(images.c.sha256).where(images.c.job_id == job_id, images.c.sha256 == sha256))
    if found is None:
        await connection.execute(insert(images).values(job_id=job_id, sha256=sha256))


async def _check_room(connection: AsyncConnection, *, max_queued: int, coming: int = 0) -> None:
    queued = await connection.scalar(select(func.count()).select_from(jobs).where(jobs.c.state.in_(_WAITING)))
    if (queued or 0) + coming > max_queued:
        raise QueueFull(
            f"{max_queued} jobs wait already; try again when some have ended",
            metadata={"queued_count": str(max_queued)},
            retry_after_s=60.0,
        )


async def _row(connection: AsyncConnection, job_id: str, *, lock: bool = False) -> Any:
    statement = select(jobs).where(jobs.c.job_id == job_id)
    row = (await connection.execute(statement.with_for_update() if lock else statement)).one_or_none()
    if row is None:
        raise CustomizationJobNotFound(metadata={"job_id": job_id[:64]})
    return row


async def _version_row(connection: AsyncConnection, version_id: str) -> Any:
    row = (await connection.execute(select(versions).where(versions.c.version_id == version_id))).one_or_none()
    if row is None:
        raise CharacterVersionNotFound(metadata={"version_id": version_id[:64]})
    return row


async def _version_pictures(connection: AsyncConnection, *, beside: str = "") -> set[str]:
    """Reference pictures of every version, deleted ones included, `beside` one."""
    rows = await connection.execute(select(versions.c.payload).where(versions.c.version_id != beside))
    return {sha256 for row in rows for sha256 in row.payload["reference_sha256s"]}


def _version_from(row: Any) -> CharacterVersion:
    return replace(version_from_json(row.payload), delete_us=row.delete_us, purge_us=row.purge_us)


async def _ahead(connection: AsyncConnection, row: Any) -> int:
    """Jobs that are trained before this one, those that are being trained included."""
    if row.state not in _WAITING:
        return 0
    occupying = jobs.c.state.in_([state.value for state in State if state.occupies])
    queued = jobs.c.state == State.QUEUED.value
    if row.state == State.QUEUED.value:
        same_time = and_(jobs.c.queue_us == row.queue_us, jobs.c.job_id < row.job_id)
        queued = and_(queued, or_(jobs.c.queue_us < row.queue_us, same_time))
    return int(await connection.scalar(select(func.count()).select_from(jobs).where(or_(occupying, queued))) or 0)


async def _job(connection: AsyncConnection, job_id: str) -> Job:
    row = await _row(connection, job_id)
    found = await connection.execute(
        select(versions)
        .where(versions.c.job_id == job_id, versions.c.delete_us.is_(None))
        .order_by(versions.c.publish_us)
    )
    own = tuple(_version_from(each) for each in found)
    return replace(_job_from(row), ahead_count=await _ahead(connection, row), versions=own)


def _job_from(row: Any) -> Job:
    return Job(
        job_id=row.job_id,
        state=State(row.state),
        attempt=row.attempt,
        character=NewCharacter(**row.character),
        frames=tuple(StoredFrame(**frame) for frame in row.frames),
        settings=TrainingSettings(**row.settings),
        findings=tuple(Finding(**finding) for finding in row.findings),
        estimate=Estimate(**row.estimate),
        create_us=row.create_us,
        update_us=row.update_us,
        last_sequence=row.last_sequence,
        progress=Progress(**row.progress) if row.progress else None,
        reason=row.reason,
        message=row.message,
        start_us=row.start_us,
        end_us=row.end_us,
        delete_us=row.delete_us,
        purge_us=row.purge_us,
        baseline=row.baseline or {},
    )


def unsuitable(job: Job, wish: str) -> JobStateUnsuitable:
    """What whoever asked too late, or too early, is told."""
    return JobStateUnsuitable(
        f"a job that is {job.state.value} cannot {wish}",
        metadata={"job_id": job.job_id, "state": job.state.value},
    )
