"""Reads and writes stories. Each method is one transaction, so a crash leaves a story before it or after it.

Durable events are written in the transaction of what they report, with the story's next sequence number: the number
comes from updating the story's row, which only one transaction can do at a time, so the sequence has no gap and no
duplicate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.runtime.database import RequestKeys, now_us, reading, writing
from services.runtime.errors import QueueFull, StaleParent, StoryNotFound
from services.story.records import (
    ACTIVE,
    CaptionWritten,
    DescriptionWritten,
    Durable,
    Event,
    Frame,
    FrameEdited,
    FrameFinished,
    FrameInserted,
    Options,
    State,
    StateChanged,
    Story,
    StoryWarning,
    WarningGiven,
    characters_from_json,
    characters_to_json,
    durable_from_json,
    durable_to_json,
    kind_of,
)
from services.story.schema import events, executors, frame_versions, frames, request_keys, stories, warnings

_KEYS = RequestKeys(request_keys, "story_id")
_ACTIVE = [state.value for state in ACTIVE]
_FRAME_FIELDS = tuple(Frame.__dataclass_fields__)


class Repository:
    """The stories of one database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    # -- making and reading ------------------------------------------------------------------------------------------

    async def create(
        self,
        *,
        story_id: str,
        options: Options,
        given: Frame,
        request_id: str,
        body_sha256: str,
        max_queued: int,
        traceparent: str = "",
        call_id: str = "",
    ) -> tuple[Story, bool]:
        """Makes a story with its key, its first frame and its first event; says whether it is new.

        The same request id with the same body answers with the story it made before. Raises IdempotencyKeyReused,
        QueueFull.
        """
        at = now_us()
        try:
            async with writing(self._engine) as connection:
                row = _story_row(story_id, options, at)
                await connection.execute(insert(stories).values(**row, traceparent=traceparent, request_id=call_id))
                await _KEYS.use(connection, request_id, body_sha256=body_sha256, made=story_id, at_us=at)
                await _check_room(connection, max_queued=max_queued)
                await connection.execute(insert(frames).values(story_id=story_id, **_frame_row(given), create_us=at))
                await _append(connection, story_id, StateChanged(state=State.QUEUED), at)
                return await _story(connection, story_id), True
        except IntegrityError:
            # Somebody else used this request id between the caller's look and now: theirs is the story.
            found = await self.find_by_request(request_id, body_sha256)
            if found is None:
                raise
            return found, False

    async def find_by_request(self, request_id: str, body_sha256: str) -> Story | None:
        """The story this request id made, if any. Raises IdempotencyKeyReused, StoryNotFound if it is deleted."""
        async with reading(self._engine) as connection:
            made = await _KEYS.find(connection, request_id, body_sha256)
            return None if made is None else await _story(connection, made)

    async def check_room(self, *, max_queued: int) -> None:
        """Raises QueueFull while no further story would be taken."""
        async with reading(self._engine) as connection:
            await _check_room(connection, max_queued=max_queued, coming=1)

    async def get(self, story_id: str) -> Story:
        """A story with its frames. Raises StoryNotFound."""
        async with reading(self._engine) as connection:
            return await _story(connection, story_id)

    async def state(self, story_id: str) -> State:
        """Where it stands. Raises StoryNotFound."""
        return (await self.position(story_id))[0]

    async def position(self, story_id: str) -> tuple[State, int]:
        """Where it stands, and the sequence number of its last event. Raises StoryNotFound."""
        async with reading(self._engine) as connection:
            row = (
                await connection.execute(
                    select(stories.c.state, stories.c.last_sequence).where(
                        stories.c.story_id == story_id, stories.c.delete_us.is_(None)
                    )
                )
            ).one_or_none()
        if row is None:
            raise StoryNotFound(metadata={"story_id": story_id[:64]})
        return State(row.state), int(row.last_sequence)

    async def origin(self, story_id: str) -> tuple[str, str]:
        """Traceparent and request id of the call that made the story; empty if it is gone."""
        async with reading(self._engine) as connection:
            row = (
                await connection.execute(
                    select(stories.c.traceparent, stories.c.request_id).where(stories.c.story_id == story_id)
                )
            ).one_or_none()
        return (row.traceparent, row.request_id) if row else ("", "")

    async def page(self, *, limit: int, before: str = "") -> list[Story]:
        """Stories without frames and warnings, newest first, older than the id `before` if one is given."""
        statement = (
            select(stories).where(stories.c.delete_us.is_(None)).order_by(stories.c.story_id.desc()).limit(limit)
        )
        if before:
            statement = statement.where(stories.c.story_id < before)
        async with reading(self._engine) as connection:
            return [_story_from(row, ()) for row in await connection.execute(statement)]

    async def has_image(self, story_id: str, sha256: str) -> bool:
        """Whether a picture belongs to a story. Raises StoryNotFound."""
        async with reading(self._engine) as connection:
            await _exists(connection, story_id)
            for table in (frames, frame_versions):
                count = await connection.scalar(
                    select(func.count())
                    .select_from(table)
                    .where(table.c.story_id == story_id, table.c.image_sha256 == sha256)
                )
                if count:
                    return True
        return False

    async def events(self, story_id: str, *, after: int, limit: int = 500) -> list[Event]:
        """Durable events above a sequence number, oldest first. Raises StoryNotFound."""
        async with reading(self._engine) as connection:
            await _exists(connection, story_id)
            rows = await connection.execute(
                select(events)
                .where(events.c.story_id == story_id, events.c.sequence > after)
                .order_by(events.c.sequence)
                .limit(limit)
            )
            return [
                Event(
                    story_id=story_id,
                    sequence=row.sequence,
                    time_us=row.time_us,
                    what=durable_from_json(row.kind, row.payload),
                )
                for row in rows
            ]

    # -- what a running story does -----------------------------------------------------------------------------------

    async def change_state(
        self,
        story_id: str,
        to: State,
        *,
        only_from: Collection[State],
        reason: str = "",
        message: str = "",
    ) -> bool:
        """Moves a story to a state, with its event, if it is in one of `only_from`; says whether it did."""
        at = now_us()
        async with writing(self._engine) as connection:
            moved = await connection.execute(
                update(stories)
                .where(
                    stories.c.story_id == story_id,
                    stories.c.state.in_([state.value for state in only_from]),
                    stories.c.delete_us.is_(None),
                )
                .values(state=to.value, reason=reason, message=message)
            )
            if moved.rowcount == 0:
                return False
            await _append(connection, story_id, StateChanged(state=to, reason=reason, message=message), at)
            return True

    async def frame(self, story_id: str, index: int) -> Frame | None:
        """One frame, as far as it is made."""
        async with reading(self._engine) as connection:
            row = await _frame(connection, story_id, index)
            return None if row is None else _frame_from(row)

    async def write_caption(
        self, story_id: str, index: int, *, caption: str, seed: int, duration_s: float
    ) -> str | None:
        """Adds a frame by its caption. What was written first stays and is returned; None means the story has ended."""
        async with writing(self._engine) as connection:
            if not await _is_active(connection, story_id):
                return None
            row = await _frame(connection, story_id, index)
            if row is not None:
                return str(row.caption)
            await connection.execute(
                insert(frames).values(
                    story_id=story_id, index=index, caption=caption, caption_seed=seed, caption_s=duration_s
                )
            )
            await _append(connection, story_id, CaptionWritten(frame_index=index, caption=caption), now_us())
            return caption

    async def write_description(
        self, story_id: str, index: int, *, description: str, seed: int, duration_s: float
    ) -> str | None:
        """Gives a frame its description. What was written first stays and is returned; None: the story has ended."""
        async with writing(self._engine) as connection:
            if not await _is_active(connection, story_id):
                return None
            row = await _frame(connection, story_id, index)
            if row is not None and row.description is not None:
                return str(row.description)
            await connection.execute(
                update(frames)
                .where(frames.c.story_id == story_id, frames.c.index == index)
                .values(description=description, description_seed=seed, description_s=duration_s)
            )
            await _append(
                connection, story_id, DescriptionWritten(frame_index=index, description=description), now_us()
            )
            return description

    async def warn(self, story_id: str, given: Iterable[StoryWarning]) -> bool:
        """Adds warnings with their events; says whether any was new. Of a reason and a field the first one stays."""
        at = now_us()
        is_new = False
        async with writing(self._engine) as connection:
            if not await _is_active(connection, story_id):
                return False
            told = {(each.reason, each.field) for each in await _warnings(connection, story_id)}
            for each in given:
                if (each.reason, each.field) in told:
                    continue
                told.add((each.reason, each.field))
                sequence = await _append(connection, story_id, WarningGiven(warning=each), at)
                await connection.execute(
                    insert(warnings).values(
                        story_id=story_id,
                        reason=each.reason,
                        field=each.field,
                        sequence=sequence,
                        message=each.message,
                        metadata=dict(each.metadata),
                    )
                )
                is_new = True
        return is_new

    async def commit_frame(
        self, story_id: str, index: int, drawn: dict[str, Any], defaults: dict[str, Any]
    ) -> str | None:
        """Gives a frame its picture, with its event. The first picture stays; its SHA-256 is returned, None: ended.

        `drawn` are columns of the frame; `defaults` are options the story left to the pack, now known.
        """
        at = now_us()
        async with writing(self._engine) as connection:
            if not await _is_active(connection, story_id):
                return None
            row = await _frame(connection, story_id, index)
            if row is not None and row.image_sha256 is not None:
                return str(row.image_sha256)
            await connection.execute(
                update(frames)
                .where(frames.c.story_id == story_id, frames.c.index == index)
                .values(**drawn, create_us=at)
            )
            for name, value in defaults.items():
                column = stories.c[name]
                await connection.execute(
                    update(stories).where(stories.c.story_id == story_id, column.is_(None)).values({name: value})
                )
            row = await _frame(connection, story_id, index)
            await _append(connection, story_id, FrameFinished(frame=_frame_from(row)), at)
            return str(drawn["image_sha256"])

    # -- what is changed in a story that has ended --------------------------------------------------------------------

    async def replace_frame(self, story_id: str, old: Frame, new: Frame, *, request_id: str, body_sha256: str) -> Story:
        """Puts `new` in the place of `old`, which is kept as a version; frames that follow become stale.

        A request id that was used meanwhile answers with the story, unchanged. Raises StaleParent when the frame is no
        longer `old`, IdempotencyKeyReused, StoryNotFound.
        """
        at = now_us()
        new = replace(new, create_us=at)
        try:
            async with writing(self._engine) as connection:
                await _lock_ended(connection, story_id)
                await _KEYS.use(connection, request_id, body_sha256=body_sha256, made=story_id, at_us=at)
                row = await _frame(connection, story_id, old.index)
                if row is None or (row.version, row.image_sha256) != (old.version, old.image_sha256):
                    raise StaleParent(metadata={"story_id": story_id, "frame_index": str(old.index)})
                was = asdict(_frame_from(row))
                del was["index"]
                await connection.execute(
                    insert(frame_versions).values(
                        story_id=story_id,
                        index=old.index,
                        version=old.version,
                        image_sha256=row.image_sha256,
                        payload=was,
                    )
                )
                here = frames.c.story_id == story_id
                await connection.execute(
                    update(frames).where(here, frames.c.index == new.index).values(**_frame_row(new), create_us=at)
                )
                await connection.execute(update(frames).where(here, frames.c.index > new.index).values(stale=True))
                later = await connection.scalars(
                    select(frames.c.index).where(here, frames.c.index > new.index).order_by(frames.c.index)
                )
                await _append(connection, story_id, FrameEdited(frame=new, stale_frame_indexes=tuple(later)), at)
                return await _story(connection, story_id)
        except IntegrityError:
            return await self._answered(request_id, body_sha256)

    async def insert_frame(
        self, story_id: str, new: Frame, *, last_sequence: int, request_id: str, body_sha256: str
    ) -> Story:
        """Puts a frame at `new.index`; those from there on, with their versions, move up by one.

        `last_sequence` is the story's as the caller saw it. Raises and answers as `replace_frame`.
        """
        at = now_us()
        new = replace(new, create_us=at)
        try:
            async with writing(self._engine) as connection:
                if await _lock_ended(connection, story_id) != last_sequence:
                    raise StaleParent(metadata={"story_id": story_id})
                await _KEYS.use(connection, request_id, body_sha256=body_sha256, made=story_id, at_us=at)
                newest = await connection.scalar(select(func.max(frames.c.index)).where(frames.c.story_id == story_id))
                for index in range(newest or 0, new.index - 1, -1):  # from above: no two may ever have the same
                    for table in (frames, frame_versions):
                        await connection.execute(
                            update(table)
                            .where(table.c.story_id == story_id, table.c.index == index)
                            .values(index=index + 1)
                        )
                await connection.execute(insert(frames).values(story_id=story_id, **_frame_row(new), create_us=at))
                await _append(connection, story_id, FrameInserted(frame=new), at)
                return await _story(connection, story_id)
        except IntegrityError:
            return await self._answered(request_id, body_sha256)

    async def _answered(self, request_id: str, body_sha256: str) -> Story:
        """What the call that used this request id first was answered."""
        found = await self.find_by_request(request_id, body_sha256)
        if found is None:
            raise StaleParent()
        return found

    async def delete(self, story_id: str) -> None:
        """Removes a story's texts, frames, warnings and events.

        Its row stays, empty, so that its request id is not used again. Raises StoryNotFound. Call it when the story has
        ended.
        """
        async with writing(self._engine) as connection:
            await _exists(connection, story_id)
            await connection.execute(delete(events).where(events.c.story_id == story_id))
            await connection.execute(delete(frames).where(frames.c.story_id == story_id))
            await connection.execute(delete(frame_versions).where(frame_versions.c.story_id == story_id))
            await connection.execute(delete(warnings).where(warnings.c.story_id == story_id))
            await connection.execute(
                update(stories)
                .where(stories.c.story_id == story_id)
                .values(delete_us=now_us(), message="", characters=None)
            )

    # -- keeping house -----------------------------------------------------------------------------------------------

    async def not_enqueued(self, *, older_than_us: int) -> list[str]:
        """Stories that were acknowledged but not yet handed to the workflow engine."""
        async with reading(self._engine) as connection:
            rows = await connection.execute(
                select(stories.c.story_id)
                .where(stories.c.enqueued.is_(False), stories.c.create_us <= older_than_us)
                .order_by(stories.c.story_id)
            )
            return [row.story_id for row in rows]

    async def mark_enqueued(self, story_id: str) -> None:
        """The workflow engine has it."""
        async with writing(self._engine) as connection:
            await connection.execute(update(stories).where(stories.c.story_id == story_id).values(enqueued=True))

    async def active(self) -> list[str]:
        """Stories that have not ended and that the workflow engine has."""
        async with reading(self._engine) as connection:
            rows = await connection.execute(
                select(stories.c.story_id).where(stories.c.state.in_(_ACTIVE), stories.c.enqueued.is_(True))
            )
            return [row.story_id for row in rows]

    async def oldest_active_us(self) -> int | None:
        """When the oldest story that has not ended was made; None when there is none."""
        async with reading(self._engine) as connection:
            oldest = await connection.scalar(select(func.min(stories.c.create_us)).where(stories.c.state.in_(_ACTIVE)))
        return None if oldest is None else int(oldest)

    async def count_by_state(self) -> dict[State, int]:
        """How many stories are in each state."""
        async with reading(self._engine) as connection:
            rows = await connection.execute(
                select(stories.c.state, func.count()).where(stories.c.delete_us.is_(None)).group_by(stories.c.state)
            )
            return {State(state): int(count) for state, count in rows}

    async def referenced(self, sha256s: Iterable[str]) -> set[str]:
        """Those of the given pictures that some story has."""
        wanted = list(sha256s)
        async with reading(self._engine) as connection:
            found: set[str] = set()
            for table in (frames, frame_versions):
                rows = await connection.execute(
                    select(table.c.image_sha256).where(table.c.image_sha256.in_(wanted)).distinct()
                )
                found |= {row.image_sha256 for row in rows}
            return found

    async def forget_requests(self, *, older_than_us: int) -> None:
        """Lets go of old request ids, and of the rows of deleted stories that nothing refers to any more."""
        async with writing(self._engine) as connection:
            await _KEYS.forget(connection, older_than_us=older_than_us)
            kept = select(request_keys.c.story_id)
            await connection.execute(
                delete(stories).where(stories.c.delete_us < older_than_us, stories.c.story_id.not_in(kept))
            )

    async def heartbeat(self, *, executor_id: str, host: str, pid: int, process_start_us: int) -> None:
        """Says that this process lives."""
        at = now_us()
        async with writing(self._engine) as connection:
            beat = await connection.execute(
                update(executors).where(executors.c.executor_id == executor_id).values(heartbeat_us=at)
            )
            if beat.rowcount == 0:
                await connection.execute(
                    insert(executors).values(
                        executor_id=executor_id, host=host, pid=pid, process_start_us=process_start_us, heartbeat_us=at
                    )
                )

    async def executors(self) -> list[Any]:
        """Every process that has not signed off: rows of executor_id, host, pid, process_start_us, heartbeat_us."""
        async with reading(self._engine) as connection:
            return list(await connection.execute(select(executors)))

    async def release(self, executor_id: str) -> None:
        """This process stops by its own will: its lease ends now."""
        async with writing(self._engine) as connection:
            await connection.execute(
                update(executors).where(executors.c.executor_id == executor_id).values(heartbeat_us=0)
            )

    async def sign_off(self, executor_id: str) -> None:
        """This process is gone, and whatever it had has been taken over."""
        async with writing(self._engine) as connection:
            await connection.execute(delete(executors).where(executors.c.executor_id == executor_id))


async def _append(connection: AsyncConnection, story_id: str, what: Durable, at: int) -> int:
    sequence = await connection.scalar(
        update(stories)
        .where(stories.c.story_id == story_id)
        .values(last_sequence=stories.c.last_sequence + 1, update_us=at)
        .returning(stories.c.last_sequence)
    )
    if sequence is None:
        raise StoryNotFound(metadata={"story_id": story_id[:64]})
    await connection.execute(
        insert(events).values(
            story_id=story_id, sequence=sequence, time_us=at, kind=kind_of(what), payload=durable_to_json(what)
        )
    )
    return int(sequence)


async def _check_room(connection: AsyncConnection, *, max_queued: int, coming: int = 0) -> None:
    queued = await connection.scalar(
        select(func.count()).select_from(stories).where(stories.c.state == State.QUEUED.value)
    )
    if (queued or 0) + coming > max_queued:
        raise QueueFull(
            f"{max_queued} stories wait already; try again when some have started",
            metadata={"queued_count": str(max_queued)},
            retry_after_s=5.0,
        )


async def _exists(connection: AsyncConnection, story_id: str) -> None:
    found = await connection.scalar(
        select(stories.c.story_id).where(stories.c.story_id == story_id, stories.c.delete_us.is_(None))
    )
    if found is None:
        raise StoryNotFound(metadata={"story_id": story_id[:64]})


async def _is_active(connection: AsyncConnection, story_id: str) -> bool:
    # Locks the row, so that no cancel slips in between this look and what is written after it (SQLite has locked all).
    state = await connection.scalar(select(stories.c.state).where(stories.c.story_id == story_id).with_for_update())
    return state in _ACTIVE


async def _lock_ended(connection: AsyncConnection, story_id: str) -> int:
    """The last sequence number of a story that has ended, its row locked. Raises StoryNotFound, StaleParent."""
    row = (
        await connection.execute(
            select(stories.c.state, stories.c.last_sequence)
            .where(stories.c.story_id == story_id, stories.c.delete_us.is_(None))
            .with_for_update()
        )
    ).one_or_none()
    if row is None:
        raise StoryNotFound(metadata={"story_id": story_id[:64]})
    if row.state in _ACTIVE:
        raise StaleParent(metadata={"story_id": story_id})
    return int(row.last_sequence)


async def _frame(connection: AsyncConnection, story_id: str, index: int) -> Any:
    statement = select(frames).where(frames.c.story_id == story_id, frames.c.index == index)
    return (await connection.execute(statement)).one_or_none()


async def _story(connection: AsyncConnection, story_id: str) -> Story:
    row = (
        await connection.execute(select(stories).where(stories.c.story_id == story_id, stories.c.delete_us.is_(None)))
    ).one_or_none()
    if row is None:
        raise StoryNotFound(metadata={"story_id": story_id[:64]})
    found = await connection.execute(select(frames).where(frames.c.story_id == story_id).order_by(frames.c.index))
    earlier = await connection.execute(
        select(frame_versions)
        .where(frame_versions.c.story_id == story_id)
        .order_by(frame_versions.c.index, frame_versions.c.version)
    )
    story = _story_from(row, tuple(_frame_from(frame) for frame in found), await _warnings(connection, story_id))
    versions = tuple(Frame(index=version._mapping["index"], **version.payload) for version in earlier)
    return replace(story, earlier_versions=versions)


async def _warnings(connection: AsyncConnection, story_id: str) -> tuple[StoryWarning, ...]:
    statement = select(warnings).where(warnings.c.story_id == story_id).order_by(warnings.c.sequence)
    return tuple(
        StoryWarning(reason=row.reason, message=row.message, field=row.field, metadata=row.metadata)
        for row in await connection.execute(statement)
    )


def _story_row(story_id: str, options: Options, at: int) -> dict[str, Any]:
    return {
        "story_id": story_id,
        "state": State.QUEUED.value,
        "frame_count": options.frame_count,
        "seed": options.seed,
        "pack": options.pack,
        "temperature": options.temperature,
        "steps": options.steps,
        "text_guidance": options.text_guidance,
        "image_guidance": options.image_guidance,
        "quality": options.quality,
        "characters": characters_to_json(options.characters) or None,
        "last_sequence": 0,
        "create_us": at,
        "update_us": at,
        "enqueued": False,
    }


def _story_from(row: Any, found: tuple[Frame, ...], told: tuple[StoryWarning, ...] = ()) -> Story:
    return Story(
        story_id=row.story_id,
        state=State(row.state),
        options=Options(
            frame_count=row.frame_count,
            seed=row.seed,
            pack=row.pack,
            temperature=row.temperature,
            steps=row.steps,
            text_guidance=row.text_guidance,
            image_guidance=row.image_guidance,
            quality=row.quality,
            characters=characters_from_json(row.characters),
        ),
        frames=found,
        create_us=row.create_us,
        update_us=row.update_us,
        last_sequence=row.last_sequence,
        reason=row.reason,
        message=row.message,
        warnings=told,
    )


def _frame_row(frame: Frame) -> dict[str, Any]:
    return {name: getattr(frame, name) for name in _FRAME_FIELDS if name != "create_us"}


def _frame_from(row: Any) -> Frame:
    return Frame(**{name: getattr(row, name) for name in _FRAME_FIELDS})
