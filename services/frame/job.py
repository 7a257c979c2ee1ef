"""The nouns of the frame service: what is asked for, what is told on the way, and what comes out.

Plain data. Knows no transport, queue or network, and costs nothing to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.frame.scheduler import Priority
from services.models.character import CharacterWeights
from services.models.quality import Quality
from services.models.world import Unfamiliar

if TYPE_CHECKING:  # torch comes with it
    from services.models.drawing import Sketch


@dataclass(frozen=True, kw_only=True)
class ReferenceImage:
    """An earlier frame as it came."""

    image: bytes  # PNG, JPEG or WebP
    description: str
    given: bool = False  # somebody's own picture, not one that a pack drew
    distance: int = 0  # in frames, from the one to be drawn; 0: the references are those just before it


@dataclass(frozen=True, kw_only=True)
class EditedImage:
    """A picture that the frame is made of, as it came."""

    image: bytes  # PNG, JPEG or WebP
    strength: float = 0.5  # above 0 and at most 1: how much of it is drawn anew


@dataclass(frozen=True, kw_only=True)
class FrameJob:
    """One frame to be drawn. Zero and None mean the pack's default."""

    description: str
    seed: int
    pack: str = ""
    references: tuple[ReferenceImage, ...] = ()  # oldest first
    width_px: int = 0
    height_px: int = 0
    steps: int = 0
    text_guidance: float | None = None
    image_guidance: float | None = None
    quality: Quality = Quality.STANDARD  # what it leaves to the pack besides
    sampler: str = ""  # one of `services.models.samplers.SAMPLERS`
    edit: EditedImage | None = None  # None: the frame is made of noise
    preview_every_steps: int = 0
    characters: tuple[CharacterWeights, ...] = ()  # those with weights of their own
    tenant: str = ""  # who shares the engine with others; they take turns
    priority: Priority = Priority.STANDARD
    deadline_s: float | None = None  # on the monotonic clock


@dataclass(frozen=True)
class Queued:
    """The job waits for room."""

    ahead_count: int


@dataclass(frozen=True)
class Progress:
    """A step is done."""

    step: int  # from one
    step_count: int
    eta_s: float  # until the picture is ready


@dataclass(frozen=True)
class Preview:
    """How the picture looks so far."""

    image: bytes  # WebP
    step: int


@dataclass(frozen=True, kw_only=True)
class RenderedFrame:
    """The picture and how it came to be."""

    image: bytes  # PNG without metadata
    sha256: str
    sketch: Sketch
    pack_digest: str
    fingerprint: str  # of all that pixels depend on besides the sketch: see `FrameEngine.fingerprint`
    queue_s: float
    render_s: float
    warnings: tuple[Unfamiliar, ...] = ()  # of what was given, what the pack does not know


Event = Queued | Progress | Preview | RenderedFrame
