"""The nouns of the story service as plain data: a story, its frames, its events. Knows no database and no wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args


class State(StrEnum):
    """Where a story stands; the same words as in the proto, without its prefix."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    WAITING = "WAITING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self in ENDED


ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
ACTIVE = frozenset(State) - ENDED

# How much time a frame is worth; the same words as in the proto, without its prefix.
Quality = Literal["draft", "standard", "best"]
QUALITIES: tuple[Quality, ...] = get_args(Quality)
DEFAULT_QUALITY: Quality = "standard"


@dataclass(frozen=True, kw_only=True)
class StoryCharacter:
    """Somebody who was learned: the published version that a story was begun with."""

    name: str
    phrase: str  # "a pink pig with a teal top hat"
    version_id: str
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a story was asked for. None means the pack's default, which the first drawn frame reveals.

    A new option needs a default: what stories did whose record has not got it.
    """

    frame_count: int
    seed: int  # below 2^53; every other seed derives from it
    pack: str
    temperature: float
    steps: int | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    quality: Quality = DEFAULT_QUALITY
    characters: tuple[StoryCharacter, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame. Texts and picture come one after the other: what is not there yet is None."""

    index: int
    caption: str
    description: str | None = None
    image_sha256: str | None = None
    width_px: int = 0
    height_px: int = 0
    caption_seed: int = 0
    description_seed: int = 0
    image_seed: int = 0
    caption_s: float | None = None
    description_s: float | None = None
    queue_s: float | None = None
    render_s: float | None = None
    pack_digest: str = ""
    engine_fingerprint: str = ""
    create_us: int | None = None  # when its picture was committed, microseconds since 1970 UTC
    version: int = 1  # one more with each edit
    stale: bool = False  # an earlier frame was edited since
    edit_strength: float = 0.0  # how much of the version before was drawn anew; 0: it was made of noise


@dataclass(frozen=True, kw_only=True)
class StoryWarning:
    """What the pack does not know of what the story was given. The story goes on."""

    reason: str  # stable; a story has at most one for each reason and field
    message: str
    field: str  # of CreateStory: "caption" or "image"
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Story:
    """One story as it stands."""

    story_id: str
    state: State
    options: Options
    frames: tuple[Frame, ...]
    create_us: int
    update_us: int
    last_sequence: int
    reason: str = ""
    message: str = ""
    warnings: tuple[StoryWarning, ...] = ()  # in the order they were given
    earlier_versions: tuple[Frame, ...] = ()  # by index, then by version


@dataclass(frozen=True, kw_only=True)
class StateChanged:
    """The story's state changed."""

    state: State
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class CaptionWritten:
    """A frame's caption was written."""

    frame_index: int
    caption: str


@dataclass(frozen=True, kw_only=True)
class DescriptionWritten:
    """A frame's description was written."""

    frame_index: int
    description: str


@dataclass(frozen=True, kw_only=True)
class FrameFinished:
    """A frame was committed."""

    frame: Frame


@dataclass(frozen=True, kw_only=True)
class WarningGiven:
    """Something about what was given is beyond the pack."""

    warning: StoryWarning


@dataclass(frozen=True, kw_only=True)
class FrameEdited:
    """A frame was drawn again."""

    frame: Frame
    stale_frame_indexes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FrameInserted:
    """A frame was put between two."""

    frame: Frame


@dataclass(frozen=True, kw_only=True)
class FrameQueued:
    """Passing: a frame waits for room in the frame engine."""

    frame_index: int
    ahead_count: int


@dataclass(frozen=True, kw_only=True)
class FrameProgress:
    """Passing: a denoising step was taken."""

    frame_index: int
    step: int
    step_count: int
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class FramePreview:
    """Passing: how a frame looks so far, as a small WebP."""

    frame_index: int
    image: bytes
    step: int


Durable = (
    StateChanged | CaptionWritten | DescriptionWritten | FrameFinished | WarningGiven | FrameEdited | FrameInserted
)
Passing = FrameQueued | FrameProgress | FramePreview


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened. Durable ones have gapless sequence numbers from 1, passing ones have 0."""

    story_id: str
    sequence: int
    time_us: int
    what: Durable | Passing


KINDS: dict[str, type[Any]] = {
    "state_changed": StateChanged,
    "caption_written": CaptionWritten,
    "description_written": DescriptionWritten,
    "frame_finished": FrameFinished,
    "warning_given": WarningGiven,
    "frame_edited": FrameEdited,
    "frame_inserted": FrameInserted,
    "frame_queued": FrameQueued,
    "frame_progress": FrameProgress,
    "frame_preview": FramePreview,
}
_LATER = ("version", "stale", "edit_strength")
_NAMES = {cls: name for name, cls in KINDS.items()}


def options_to_json(options: Options) -> dict[str, Any]:
    """What a workflow keeps.

    Without what has its default, so that a process of the version before an option was added can take over a story that
    does not use it.
    """
    fields = Options.__dataclass_fields__
    payload = {name: value for name in fields if (value := getattr(options, name)) != fields[name].default}
    if options.characters:
        payload["characters"] = characters_to_json(options.characters)
    return payload


def options_from_json(payload: dict[str, Any]) -> Options:
    """The options behind a workflow's record."""
    return Options(**{**payload, "characters": characters_from_json(payload.get("characters"))})


def characters_to_json(characters: Iterable[StoryCharacter]) -> list[dict[str, str]]:
    """What is kept of them."""
    return [dataclasses.asdict(one) for one in characters]


def characters_from_json(payload: list[dict[str, str]] | None) -> tuple[StoryCharacter, ...]:
    """Who was kept; None is nobody."""
    return tuple(StoryCharacter(**one) for one in payload or ())


def kind_of(what: Durable | Passing) -> str:
    """The event's name, as in the proto's oneof."""
    return _NAMES[type(what)]


def durable_to_json(what: Durable) -> dict[str, Any]:
    """What the event log keeps.

    Frames without what came later and has its default, so that a process of the version before reads them.
    """
    payload = dataclasses.asdict(what)
    for name in _LATER if "frame" in payload else ():
        if payload["frame"][name] == Frame.__dataclass_fields__[name].default:
            del payload["frame"][name]
    return payload


def durable_from_json(kind: str, payload: dict[str, Any]) -> Durable:
    """The event behind a row of the log."""
    if kind == "frame_finished":
        return FrameFinished(frame=Frame(**payload["frame"]))
    if kind == "frame_edited":
        return FrameEdited(frame=Frame(**payload["frame"]), stale_frame_indexes=tuple(payload["stale_frame_indexes"]))
    if kind == "frame_inserted":
        return FrameInserted(frame=Frame(**payload["frame"]))
    if kind == "warning_given":
        return WarningGiven(warning=StoryWarning(**payload["warning"]))
    if kind == "state_changed":
        return StateChanged(**{**payload, "state": State(payload["state"])})
    what: Durable = KINDS[kind](**payload)
    return what
