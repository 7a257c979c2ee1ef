"""From a job as it came to a sketch that can be drawn, with every default filled in, or to what is wrong with it.

Knows no transport and no queue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.frame.job import EditedImage, FrameJob
from services.frame.picture import read_reference
from services.models.character import CharacterWeights
from services.models.drawing import Edit, Seen, Sketch
from services.models.errors import TextTooLong
from services.models.pack import QualitySettings
from services.models.quality import Quality
from services.models.references import EXACT, ReferencePolicy
from services.models.registry import FrameModel
from services.models.samplers import samplers_of
from services.models.text_encoder import NO_WORDS, Words
from services.runtime.errors import (
    DescriptionEmpty,
    DescriptionTooLong,
    TooFewReferences,
    TooManyReferences,
    ValueOutOfRange,
)
from services.runtime.names import MOST_IN_FRAME
from services.runtime.store import SHA256

MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MIN_SIDE_PX = 32
MAX_AREA_RATIO = 4  # of a frame against the pack's own size: cost grows at least with the area
CHARACTERS_MAX = MOST_IN_FRAME  # with weights of their own
MAX_CHARACTER_SCALE = 2.0
MAX_DISTANCE = 3  # of a reference: networks were trained with none further away
DESCRIPTION_CHARACTERS = 10_000  # more than any window holds; keeps the tokenizer from reading megabytes


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a job may ask of one model."""

    min_side_px: int
    side_multiple_px: int
    max_area_px: int
    max_steps: int
    samplers: tuple[str, ...]  # the pack's own first


def limits_of(model: FrameModel) -> Limits:
    """What `sketch_of` takes for `model`."""
    manifest = model.manifest
    return Limits(
        min_side_px=MIN_SIDE_PX,
        side_multiple_px=model.codec.factor,
        max_area_px=manifest.width_px * manifest.height_px * MAX_AREA_RATIO,
        max_steps=min(MAX_STEPS, manifest.schedule.train_steps),
        samplers=tuple(
            sorted(samplers_of(manifest.schedule), key=lambda name: (name != manifest.sampling.sampler, name))
        ),
    )


def quality_of(model: FrameModel, quality: Quality, *, adapters: bool = True) -> QualitySettings:
    """How frames of a quality are drawn; without `adapters` as if the pack had none for it."""
    settings = model.manifest.sampling.at(quality, adapters=adapters)
    return settings.model_copy(update={"steps": min(settings.steps, limits_of(model).max_steps)})


def sketch_of(
    job: FrameJob,
    model: FrameModel,
    policy: ReferencePolicy = EXACT,
    words: Words = NO_WORDS,
    *,
    adapters: bool = True,
    deep_every: int = 1,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Sketch:
    """What `model` is to draw for `job`, with every default filled in.

    `policy`, `deep_every` and `guidance_interval` are the engine's, `words` are those that the job's characters taught
    the text encoder. Without `adapters` (a character that is a whole UNet cannot wear the pack's) a quality is what it
    is in a pack that has none for it. The pack's adapter of the quality is the last of the sketch's characters.

    Raises InvalidArgument or one of its kin, naming the field, when it cannot be drawn.
    """
    manifest = model.manifest
    _check_text(job, model, words)
    if len(job.references) > manifest.max_references:
        raise TooManyReferences(
            f"{len(job.references)} references; the pack {manifest.name!r} takes at most {manifest.max_references}",
            field="references",
        )
    if model.reader is not None and len(job.references) < model.reader.given_frames:
        raise TooFewReferences(
            f"{len(job.references)} references; the pack {manifest.name!r} goes on from {model.reader.given_frames}",
            field="references",
        )
    width_px, height_px = job.width_px or manifest.width_px, job.height_px or manifest.height_px
    limits = limits_of(model)
    _check_size(width_px, height_px, limits)
    quality = quality_of(model, job.quality, adapters=adapters)
    steps = job.steps or quality.steps
    if not 1 <= steps <= limits.max_steps:
        raise ValueOutOfRange(f"steps is {steps}; it must be between 1 and {limits.max_steps}", field="steps")
    if job.sampler and job.sampler not in limits.samplers:
        raise ValueOutOfRange(
            f"no sampler {job.sampler[:40]!r}; known: {', '.join(sorted(limits.samplers))}", field="sampler"
        )
    if not 0 <= job.seed < 2**64:
        raise ValueOutOfRange("seed must be between 0 and 2^64 - 1", field="seed")
    return Sketch(
        description=job.description,
        seed=job.seed,
        width_px=width_px,
        height_px=height_px,
        steps=steps,
        text_guidance=_scale(job.text_guidance, quality.text_guidance, "text_guidance"),
        image_guidance=_scale(job.image_guidance, quality.image_guidance, "image_guidance"),
        references=tuple(
            Seen(
                pixels=read_reference(reference.image, width_px, height_px, field=f"references[{index}].image"),
                # The caption of a given first frame is the user's, and may be long. Of an earlier frame its beginning
                # will do; only what is to be drawn must be read to its end.
                description=model.text.fitting(reference.description[:DESCRIPTION_CHARACTERS], words),
                distance=_distance(reference.distance, f"references[{index}].distance"),
            )
            for index, reference in enumerate(job.references)
        ),
        characters=(*checked_characters(job), *_own(model, quality)),
        sampler=job.sampler or manifest.sampling.sampler,
        policy=policy,
        deep_every=deep_every if model.has_deep_blocks else 1,
        guidance_interval=guidance_interval,
        edit=None if job.edit is None else _edit(job.edit, width_px, height_px),
    )


def _distance(given: int, field: str) -> int:
    if not 0 <= given <= MAX_DISTANCE:
        raise ValueOutOfRange(f"a reference's distance is at most {MAX_DISTANCE} frames", field=field)
    return given


def _edit(given: EditedImage, width_px: int, height_px: int) -> Edit:
    if not 0.0 < given.strength <= 1.0:
        raise ValueOutOfRange("an edit's strength is above 0 and at most 1", field="edit.strength")
    pixels = read_reference(given.image, width_px, height_px, field="edit.image")
    return Edit(pixels=pixels, strength=given.strength)


def _own(model: FrameModel, quality: QualitySettings) -> tuple[CharacterWeights, ...]:
    """The pack's own adapter for a quality."""
    return (CharacterWeights(model.adapters[quality.adapter].digest),) if quality.adapter else ()


def checked_characters(job: FrameJob) -> tuple[CharacterWeights, ...]:
    """The characters of a job. Raises ValueOutOfRange naming the field."""
    if len(job.characters) > CHARACTERS_MAX:
        raise ValueOutOfRange(f"at most {CHARACTERS_MAX} characters with weights of their own", field="characters")
    if len({one.digest for one in job.characters}) < len(job.characters):
        raise ValueOutOfRange("a character is named twice", field="characters")
    for index, one in enumerate(job.characters):
        if not SHA256.fullmatch(one.digest):
            raise ValueOutOfRange("a digest is 64 lower-case hex digits", field=f"characters[{index}].digest")
        if not math.isfinite(one.scale) or not 0.0 <= one.scale <= MAX_CHARACTER_SCALE:
            raise ValueOutOfRange(
                f"a character's scale is from 0 to {MAX_CHARACTER_SCALE:g}", field=f"characters[{index}].scale"
            )
    return job.characters


def _check_text(job: FrameJob, model: FrameModel, words: Words) -> None:
    field, text = "description", job.description
    if not text.strip():
        raise DescriptionEmpty(field=field)
    if len(text) > DESCRIPTION_CHARACTERS:
        raise DescriptionTooLong(f"the description has {len(text)} characters; shorten it", field=field)
    try:
        model.text.token_ids([text], words)
    except TextTooLong as error:
        raise DescriptionTooLong(
            f"the description does not fit: {error}",
            field=field,
            metadata={"token_count": str(error.token_count), "limit": str(error.limit)},
        ) from None


def _check_size(width_px: int, height_px: int, limits: Limits) -> None:
    multiple, least = limits.side_multiple_px, limits.min_side_px
    for field, side in (("width_px", width_px), ("height_px", height_px)):
        if side % multiple or side < least:
            raise ValueOutOfRange(
                f"{field} is {side}; it must be a multiple of {multiple} and at least {least}", field=field
            )
    if width_px * height_px > limits.max_area_px:
        raise ValueOutOfRange(
            f"{width_px}×{height_px} is more than the {limits.max_area_px} pixels this pack draws", field="width_px"
        )


def _scale(given: float | None, default: float, field: str) -> float:
    value = default if given is None else given
    if not math.isfinite(value) or not 0.0 <= value <= MAX_GUIDANCE:
        raise ValueOutOfRange(f"{field} must be between 0 and {MAX_GUIDANCE:g}", field=field)
    return value
