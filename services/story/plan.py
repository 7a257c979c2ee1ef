"""Decides what a story needs next. Pure: no clock, no I/O, no randomness but the seeds derived here.

The workflow folds results into a `Plan` and asks `next_command` again, so the same results always lead to the same
commands: that is what lets a crashed story be replayed up to its first missing step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

MAX_REFERENCES = 4  # what AR-LDM reads before its last frame; a pack that takes fewer is shown the newest of them
SEED_LIMIT = 2**53  # exact in every JSON reader


def derive_seed(story_seed: int, frame_index: int, purpose: str) -> int:
    """The seed of one purpose (`caption`, `description`, `image`) of one frame; below 2^53."""
    digest = hashlib.sha256(f"fabula/seed/1/{story_seed}/{frame_index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % SEED_LIMIT


@dataclass(frozen=True, kw_only=True)
class PlannedFrame:
    """A frame as far as it is made: caption, then description, then picture, then committed."""

    caption: str
    description: str | None = None
    image_sha256: str | None = None
    committed: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A story as the planner sees it. Frame 0 is the given one: its description is its caption, and it is committed."""

    seed: int
    frame_count: int
    frames: tuple[PlannedFrame, ...]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An earlier frame that the new one must agree with."""

    image_sha256: str
    description: str
    given: bool = False  # a user's own picture


@dataclass(frozen=True, kw_only=True)
class WriteCaption:
    """Continue the story: from the newest picture and every caption so far, oldest first."""

    frame_index: int
    seed: int
    image_sha256: str
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Describe:
    """Describe the picture a new caption asks for, given the frame before it."""

    frame_index: int
    seed: int
    image_sha256: str
    previous_caption: str
    caption: str
    earlier_captions: tuple[str, ...] = ()  # before the previous one, oldest first
    earlier_descriptions: tuple[str, ...] = ()  # of all frames so far, oldest first


@dataclass(frozen=True, kw_only=True)
class Render:
    """Draw a frame from its description and earlier frames, oldest first, as many as any pack takes."""

    frame_index: int
    seed: int
    description: str
    references: tuple[Reference, ...]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Make a drawn frame part of the story."""

    frame_index: int
    image_sha256: str


Command = WriteCaption | Describe | Render | Commit


def begin(*, seed: int, frame_count: int, caption: str, image_sha256: str) -> Plan:
    """The plan of a new story: only the given frame."""
    given = PlannedFrame(caption=caption, description=caption, image_sha256=image_sha256, committed=True)
    return Plan(seed=seed, frame_count=frame_count, frames=(given,))


def next_command(plan: Plan) -> Command | None:
    """What to do next; None when every frame is there."""
    newest = plan.frames[-1]
    index = len(plan.frames) - 1
    if newest.committed:
        if index == plan.frame_count:
            return None
        return WriteCaption(
            frame_index=index + 1,
            seed=derive_seed(plan.seed, index + 1, "caption"),
            image_sha256=_drawn(newest),
            captions=tuple(frame.caption for frame in plan.frames),
        )
    previous = plan.frames[-2]
    if newest.description is None:
        return Describe(
            frame_index=index,
            seed=derive_seed(plan.seed, index, "description"),
            image_sha256=_drawn(previous),
            previous_caption=previous.caption,
            caption=newest.caption,
            earlier_captions=tuple(frame.caption for frame in plan.frames[:-2]),
            earlier_descriptions=tuple(frame.description for frame in plan.frames[:-1] if frame.description),
        )
    if newest.image_sha256 is None:
        return Render(
            frame_index=index,
            seed=derive_seed(plan.seed, index, "image"),
            description=newest.description,
            references=tuple(
                Reference(image_sha256=_drawn(frame), description=frame.description or frame.caption, given=number == 0)
                for number, frame in list(enumerate(plan.frames[:-1]))[-MAX_REFERENCES:]
            ),
        )
    return Commit(frame_index=index, image_sha256=newest.image_sha256)


def apply(plan: Plan, command: Command, result: str) -> Plan:
    """The plan after a command: `result` is the caption, the description, or the picture's SHA-256.

    Raises ValueError when the command is not the one that was due.
    """
    if command != next_command(plan):
        raise ValueError(f"{type(command).__name__} of frame {command.frame_index} was not due")
    if isinstance(command, WriteCaption):
        return replace(plan, frames=(*plan.frames, PlannedFrame(caption=result)))
    newest = plan.frames[-1]
    match command:
        case Describe():
            newest = replace(newest, description=result)
        case Render():
            newest = replace(newest, image_sha256=result)
        case Commit():
            # Another process may have committed its own drawing first: the story goes on from what was committed.
            newest = replace(newest, image_sha256=result, committed=True)
    return replace(plan, frames=(*plan.frames[:-1], newest))


def _drawn(frame: PlannedFrame) -> str:
    if frame.image_sha256 is None:
        raise ValueError("a frame was used before it was drawn")
    return frame.image_sha256
