"""The nouns: a story, its frames, what happens to it. Frozen values, made from protobuf; they know no connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from fabula.story.v1 import story_pb2 as pb
from fabula.warning.v1 import warning_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


class State(StrEnum):
    """Where a story stands."""

    UNKNOWN = "unknown"  # a state newer than this client
    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"  # something it needs is away; it goes on by itself
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


# How much time a frame is worth: draft is fastest, best takes longest.
Quality = Literal["draft", "standard", "best"]


@dataclass(frozen=True, kw_only=True)
class StorySettings:
    """What a story was asked for, defaults filled in."""

    frame_count: int
    seed: int
    pack: str
    steps: int
    text_guidance: float
    image_guidance: float
    temperature: float
    quality: str = "standard"  # one of Quality; "unknown" is one newer than this client


@dataclass(frozen=True, kw_only=True)
class FrameTimings:
    """Where a frame's time went, in seconds."""

    caption_s: float
    description_s: float
    queue_s: float
    render_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.caption_s + self.description_s + self.queue_s + self.render_s


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame: its texts, its picture, how it was made."""

    index: int  # 0 is the given frame
    caption: str
    description: str
    image_sha256: str  # empty while the frame is not drawn
    width_px: int
    height_px: int
    image_seed: int
    caption_seed: int
    description_seed: int
    timings: FrameTimings | None  # None for the given frame
    pack_digest: str
    created: datetime | None
    engine_fingerprint: str = ""  # of what its pixels depend on besides pack, texts, pictures and seed
    version: int = 1  # one more with each edit
    stale: bool = False  # an earlier frame was edited since: the two may no longer agree
    edit_strength: float = 0.0  # how much of the version before was drawn anew; 0: it was made of noise

    @property
    def given(self) -> bool:
        """Whether this is the frame the story was started from."""
        return self.index == 0


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a story failed or waits."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class StoryWarning:
    """What the pack does not know of the given picture or caption. The story goes on all the same."""

    reason: str  # stable: WORDS_UNFAMILIAR, NAME_UNFAMILIAR or PICTURE_UNFAMILIAR; more may come
    message: str  # for a person: what the pack does not know, and what it does know
    field: str  # "caption" or "image"
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class StoryCharacter:
    """Somebody who was learned, as a story has them."""

    name: str
    phrase: str  # what they look like
    version_id: str  # the published version that is drawn


@dataclass(frozen=True, kw_only=True)
class Story:
    """A story as it stood when it was read."""

    story_id: str
    state: State
    settings: StorySettings
    frames: tuple[Frame, ...]
    created: datetime | None
    updated: datetime | None
    error: Reason | None
    last_sequence: int
    warnings: tuple[StoryWarning, ...] = ()  # at most one for each reason and field; none in lists
    earlier_versions: tuple[Frame, ...] = ()  # frames before they were edited, by index, then version; none in lists
    characters: tuple[StoryCharacter, ...] = ()  # who was learned and is told of, in the order asked for

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state.ended


@dataclass(frozen=True, kw_only=True)
class StoryEvent:
    """Something that happened. One of the classes below; this one itself only for an event newer than this client."""

    sequence: int  # place in the story's log; 0 for passing events, which are not replayed
    story_id: str
    time: datetime | None


@dataclass(frozen=True, kw_only=True)
class StateChanged(StoryEvent):
    """The story's state changed."""

    state: State
    error: Reason | None


@dataclass(frozen=True, kw_only=True)
class CaptionWritten(StoryEvent):
    """A frame's caption was written."""

    frame_index: int
    caption: str


@dataclass(frozen=True, kw_only=True)
class DescriptionWritten(StoryEvent):
    """A frame's description was written."""

    frame_index: int
    description: str


@dataclass(frozen=True, kw_only=True)
class FrameFinished(StoryEvent):
    """A frame was committed; its picture can be read."""

    frame: Frame


@dataclass(frozen=True, kw_only=True)
class FrameEdited(StoryEvent):
    """A frame was drawn again, after the story had ended."""

    frame: Frame
    stale_frame_indexes: tuple[int, ...]  # all that follow


@dataclass(frozen=True, kw_only=True)
class FrameInserted(StoryEvent):
    """A frame was put between two, after the story had ended. Those from its index on have moved up by one."""

    frame: Frame


@dataclass(frozen=True, kw_only=True)
class WarningGiven(StoryEvent):
    """Something about the given picture or caption is beyond the pack; the story goes on."""

    warning: StoryWarning


@dataclass(frozen=True, kw_only=True)
class FrameQueued(StoryEvent):
    """Passing: a frame waits for room."""

    frame_index: int
    ahead_count: int


@dataclass(frozen=True, kw_only=True)
class FrameProgress(StoryEvent):
    """Passing: a denoising step was taken."""

    frame_index: int
    step: int
    step_count: int
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class FramePreview(StoryEvent):
    """Passing: how a frame looks so far."""

    frame_index: int
    step: int
    image: bytes  # a small WebP


def story_from_pb(message: pb.Story) -> Story:
    """A story from the wire."""
    return Story(
        story_id=message.story_id,
        state=state_from_pb(message.state),
        settings=StorySettings(
            frame_count=message.settings.frame_count,
            seed=message.settings.seed,
            pack=message.settings.pack,
            steps=message.settings.steps,
            text_guidance=message.settings.text_guidance,
            image_guidance=message.settings.image_guidance,
            temperature=message.settings.temperature,
            quality=quality_from_pb(message.settings.quality),
        ),
        frames=tuple(frame_from_pb(frame) for frame in message.frames),
        created=_time(message.create_time),
        updated=_time(message.update_time),
        error=_reason(message.error) if message.HasField("error") else None,
        last_sequence=message.last_sequence,
        warnings=tuple(warning_from_pb(each) for each in message.warnings),
        earlier_versions=tuple(frame_from_pb(frame) for frame in message.earlier_versions),
        characters=tuple(
            StoryCharacter(name=one.name, phrase=one.phrase, version_id=one.version_id) for one in message.characters
        ),
    )


def warning_from_pb(message: warning_pb2.Warning) -> StoryWarning:
    """A warning from the wire."""
    return StoryWarning(
        reason=message.reason, message=message.message, field=message.field, metadata=dict(message.metadata)
    )


def frame_from_pb(message: pb.Frame) -> Frame:
    """A frame from the wire."""
    timings = None
    if message.HasField("timings"):
        timings = FrameTimings(
            caption_s=_seconds(message.timings.caption_duration),
            description_s=_seconds(message.timings.description_duration),
            queue_s=_seconds(message.timings.queue_duration),
            render_s=_seconds(message.timings.render_duration),
        )
    return Frame(
        index=message.index,
        caption=message.caption,
        description=message.description,
        image_sha256=message.image_sha256,
        width_px=message.width_px,
        height_px=message.height_px,
        image_seed=message.image_seed,
        caption_seed=message.caption_seed,
        description_seed=message.description_seed,
        timings=timings,
        pack_digest=message.pack_digest,
        created=_time(message.create_time),
        engine_fingerprint=message.engine_fingerprint,
        version=message.version or 1,  # a service of before there were versions says none
        stale=message.stale,
        edit_strength=message.edit_strength,
    )


def state_from_pb(number: pb.Story.State) -> State:
    """A state from the wire; one that this client does not know is UNKNOWN."""
    try:
        return State(pb.Story.State.Name(number).removeprefix("STATE_").lower())
    except ValueError:
        return State.UNKNOWN


def quality_from_pb(number: pb.Quality) -> str:
    """A quality from the wire; a service of before there was a choice says none and means standard."""
    if number == pb.QUALITY_UNSPECIFIED:
        return "standard"
    try:
        return str(pb.Quality.Name(number)).removeprefix("QUALITY_").lower()
    except ValueError:
        return "unknown"


def event_from_pb(message: pb.StoryEvent) -> StoryEvent:
    """An event from the wire."""
    kind = message.WhichOneof("event")
    build = _EVENTS.get(kind) if kind else None
    return build(message) if build else StoryEvent(**_common(message))


def _common(message: pb.StoryEvent) -> dict[str, Any]:
    return {"sequence": message.sequence, "story_id": message.story_id, "time": _time(message.event_time)}


def _state_changed(message: pb.StoryEvent) -> StoryEvent:
    body = message.state_changed
    error = _reason(body.error) if body.HasField("error") else None
    return StateChanged(**_common(message), state=state_from_pb(body.state), error=error)


def _frame_progress(message: pb.StoryEvent) -> StoryEvent:
    body = message.frame_progress
    return FrameProgress(
        **_common(message),
        frame_index=body.frame_index,
        step=body.step,
        step_count=body.step_count,
        eta_s=_seconds(body.eta),
    )


_EVENTS: dict[str, Callable[[pb.StoryEvent], StoryEvent]] = {
    "state_changed": _state_changed,
    "caption_written": lambda message: CaptionWritten(
        **_common(message), frame_index=message.caption_written.frame_index, caption=message.caption_written.caption
    ),
    "description_written": lambda message: DescriptionWritten(
        **_common(message),
        frame_index=message.description_written.frame_index,
        description=message.description_written.description,
    ),
    "frame_finished": lambda message: FrameFinished(
        **_common(message), frame=frame_from_pb(message.frame_finished.frame)
    ),
    "warning_given": lambda message: WarningGiven(
        **_common(message), warning=warning_from_pb(message.warning_given.warning)
    ),
    "frame_edited": lambda message: FrameEdited(
        **_common(message),
        frame=frame_from_pb(message.frame_edited.frame),
        stale_frame_indexes=tuple(message.frame_edited.stale_frame_indexes),
    ),
    "frame_inserted": lambda message: FrameInserted(
        **_common(message), frame=frame_from_pb(message.frame_inserted.frame)
    ),
    "frame_queued": lambda message: FrameQueued(
        **_common(message), frame_index=message.frame_queued.frame_index, ahead_count=message.frame_queued.ahead_count
    ),
    "frame_progress": _frame_progress,
    "frame_preview": lambda message: FramePreview(
        **_common(message),
        frame_index=message.frame_preview.frame_index,
        step=message.frame_preview.step,
        image=message.frame_preview.image,
    ),
}


def _reason(message: pb.StoryError) -> Reason:
    return Reason(reason=message.reason, message=message.message)


def _seconds(duration: Duration) -> float:
    return float(duration.ToNanoseconds() / 1e9)


def _time(stamp: Timestamp) -> datetime | None:
    """UTC; None for a time that was never set."""
    return stamp.ToDatetime(tzinfo=UTC) if stamp.seconds or stamp.nanos else None
