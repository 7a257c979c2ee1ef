"""The nouns of the frame service: what is asked for, what is told on the way, and what comes out.

A `FrameJob` is a request as it came; `sketch_of` turns it into a `Sketch` that can be drawn, or says what is wrong.
Knows no transport, queue or network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.frame.picture import read_reference
from services.models.drawing import Seen, Sketch
from services.models.errors import TextTooLong
from services.models.registry import FrameModel
from services.runtime.errors import (
    DescriptionEmpty,
    DescriptionTooLong,
    TooManyReferences,
    ValueOutOfRange,
)

MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MIN_SIDE_PX = 32
MAX_AREA_RATIO = 4  # of a frame against the pack's own size: cost grows at least with the area
DESCRIPTION_CHARACTERS = 10_000  # more than any window holds; keeps the tokenizer from reading megabytes


@dataclass(frozen=True, kw_only=True)
class ReferenceImage:
    """An earlier frame as it came."""

    image: bytes  # PNG, JPEG or WebP
    description: str


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
    preview_every_steps: int = 0
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
    queue_s: float
    render_s: float


Event = Queued | Progress | Preview | RenderedFrame


def sketch_of(job: FrameJob, model: FrameModel) -> Sketch:
    """What `model` is to draw for `job`, with every default filled in.

    Raises InvalidArgument or one of its kin, naming the field, when it cannot be drawn.
    """
    manifest = model.manifest
    _check_text(job, model)
    if len(job.references) > manifest.max_references:
        raise TooManyReferences(
            f"{len(job.references)} references; the pack {manifest.name!r} takes at most {manifest.max_references}",
            field="references",
        )
    width_px, height_px = job.width_px or manifest.width_px, job.height_px or manifest.height_px
    _check_size(width_px, height_px, model)
    steps = job.steps or manifest.sampling.default_steps
    limit = min(MAX_STEPS, manifest.schedule.train_steps)
    if not 1 <= steps <= limit:
        raise ValueOutOfRange(f"steps is {steps}; it must be between 1 and {limit}", field="steps")
    if not 0 <= job.seed < 2**64:
        raise ValueOutOfRange("seed must be between 0 and 2^64 - 1", field="seed")
    return Sketch(
        description=job.description,
        seed=job.seed,
        width_px=width_px,
        height_px=height_px,
        steps=steps,
        text_guidance=_scale(job.text_guidance, manifest.sampling.default_text_guidance, "text_guidance"),
        image_guidance=_scale(job.image_guidance, manifest.sampling.default_image_guidance, "image_guidance"),
        references=tuple(
            Seen(
                pixels=read_reference(reference.image, width_px, height_px, field=f"references[{index}].image"),
                # The caption of a given first frame is the user's, and may be long. Of an earlier frame its beginning
                # will do; only what is to be drawn must be read to its end.
                description=model.text.fitting(reference.description[:DESCRIPTION_CHARACTERS]),
            )
            for index, reference in enumerate(job.references)
        ),
    )


def _check_text(job: FrameJob, model: FrameModel) -> None:
    field, text = "description", job.description
    if not text.strip():
        raise DescriptionEmpty(field=field)
    if len(text) > DESCRIPTION_CHARACTERS:
        raise DescriptionTooLong(f"the description has {len(text)} characters; shorten it", field=field)
    try:
        model.text.token_ids([text])
    except TextTooLong as error:
        raise DescriptionTooLong(
            f"the description does not fit: {error}",
            field=field,
            metadata={"token_count": str(error.token_count), "limit": str(error.limit)},
        ) from None


def _check_size(width_px: int, height_px: int, model: FrameModel) -> None:
    factor = model.codec.factor
    area = model.manifest.width_px * model.manifest.height_px * MAX_AREA_RATIO
    for field, side in (("width_px", width_px), ("height_px", height_px)):
        if side % factor or side < MIN_SIDE_PX:
            raise ValueOutOfRange(
                f"{field} is {side}; it must be a multiple of {factor} and at least {MIN_SIDE_PX}", field=field
            )
    if width_px * height_px > area:
        raise ValueOutOfRange(
            f"{width_px}×{height_px} is more than the {area} pixels this pack draws", field="width_px"
        )


def _scale(given: float | None, default: float, field: str) -> float:
    value = default if given is None else given
    if not math.isfinite(value) or not 0.0 <= value <= MAX_GUIDANCE:
        raise ValueOutOfRange(f"{field} must be between 0 and {MAX_GUIDANCE:g}", field=field)
    return value


__all__ = [
    "Event",
    "FrameJob",
    "Preview",
    "Progress",
    "Queued",
    "ReferenceImage",
    "RenderedFrame",
    "sketch_of",
]
