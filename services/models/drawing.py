"""Draws frames: StoryGen's sampling, one denoising step of many drawings at a time.

    drawing = begin(model, sketch)
    while not drawing.finished:
        advance(model, [drawing, …])        # drawings come and go between steps
    pixels = finish(model, drawing)

A step is two forwards: the reference pass over every noised earlier frame, then the main pass over every guidance
branch. Each row has its own timestep, text and references; a drawing's numbers do not depend on which others share its
batch, but for the last bits (matrix kernels sum in an order that depends on the batch). Every random number comes from
the sketch's seed. Knows no queue, clock, thread or file.

Against the reference implementation: rows that it computes twice are computed once, guidance branches that count
nothing are left out, and everything is seeded (it takes the VAE's and the references' noise from the global generator).

Shapes: C latent channels, h and w latent size, N references, S text positions, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from services.models.character import CharacterWeights
from services.models.denoiser import Branches, guidance, reference_level
from services.models.lora import Outfit
from services.models.registry import FrameModel
from services.models.samplers import History
from services.models.storygen import References

Pixels = npt.NDArray[np.uint8]
"""`[H, W, 3]`, RGB."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An earlier frame, at the size of the frame to be drawn, and the description it was drawn from."""

    pixels: Pixels
    description: str


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """What is to be drawn. Same sketch, same model, same machine, drawn alone: same pixels."""

    description: str
    seed: int  # 0 … 2⁶⁴ − 1
    width_px: int
    height_px: int
    steps: int
    text_guidance: float
    image_guidance: float
    references: tuple[Seen, ...] = ()  # oldest first
    characters: tuple[CharacterWeights, ...] = ()


@dataclass
class Drawing:
    """One sketch on its way from noise to picture. `advance` is the only one to change it."""

    sketch: Sketch
    branches: Branches
    steps: tuple[int, ...]
    latents_CHW: Tensor
    description_SD: Tensor
    nothing_SD: Tensor
    reference_latents_NCHW: Tensor
    reference_text_NSD: Tensor
    blank_CHW: Tensor
    reference_noise_CHW: Tensor
    done: int = 0
    history: History | None = field(default=None, repr=False)
    outfit: Outfit = ()  # where the sketch's characters lie in the model's slots

    @property
    def finished(self) -> bool:
        """All steps are done."""
        return self.done == len(self.steps)

    @property
    def is_sound(self) -> bool:
        """Its numbers are finite. One that is not must not become a picture, nor the next frame's reference."""
        return bool(self.latents_CHW.isfinite().all())

    @property
    def row_count(self) -> int:
        """Rows of one step, both passes together: what a step costs."""
        return row_count(self.sketch)


def row_count(sketch: Sketch) -> int:
    """Rows of one step of a sketch's drawing, both passes together."""
    count = len(sketch.references)
    branches = guidance(sketch.image_guidance, sketch.text_guidance, has_references=count > 0)
    nothing, images, everything = (weight != 0.0 for weight in (branches.nothing, branches.images, branches.everything))
    return nothing + images + everything + count * (nothing + (images or everything))


class Randomness:
    """A sketch's random numbers, drawn on the CPU so that every device gets the same ones.

    numpy's generator and not torch's: torch's CPU generator keeps only the low 32 bits of a seed.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32."""
        return torch.from_numpy(self._generator.standard_normal(shape, dtype=np.float32))


@torch.inference_mode()
def begin(model: FrameModel, sketch: Sketch, outfit: Outfit = ()) -> Drawing:
    """Encode the texts and earlier frames and draw all noise: for the frame, its references, the blank, each reference.

    `outfit` says in which of the model's slots the sketch's characters lie, in their order; the slots must stay theirs
    until the drawing is done. Raises TextTooLong when a description does not fit.
    """
    if len(outfit) != len(sketch.characters):
        raise ValueError(f"{len(sketch.characters)} characters lie in {len(outfit)} slots")
    codec, device = model.codec, model.device
    count = len(sketch.references)
    shape = (codec.channels, sketch.height_px // codec.factor, sketch.width_px // codec.factor)
    random = Randomness(sketch.seed)
    latents, reference_noise = random.normal(*shape), random.normal(*shape)
    texts = model.text.encode(["", sketch.description, *(seen.description for seen in sketch.references)])
    if count:
        blank = codec.encode_blank(sketch.height_px, sketch.width_px, random.normal(1, *shape).to(device))[0]
        pixels = np.stack([seen.pixels for seen in sketch.references])
        values = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255.0
        seen = codec.encode_references(values, random.normal(count, *shape).to(device))
    else:
        blank, seen = torch.zeros(shape, device=device), torch.zeros((0, *shape), device=device)
    return Drawing(
        sketch=sketch,
        branches=guidance(sketch.image_guidance, sketch.text_guidance, has_references=count > 0),
        steps=model.denoiser.schedule.sampling_steps(sketch.steps),
        latents_CHW=latents.to(device),
        description_SD=texts[1],
        nothing_SD=texts[0],
        reference_latents_NCHW=seen,
        reference_text_NSD=texts[2:],
        blank_CHW=blank,
        reference_noise_CHW=reference_noise.to(device),
        outfit=tuple(outfit),
    )


@torch.inference_mode()
def advance(model: FrameModel, drawings: Sequence[Drawing]) -> None:
    """One denoising step of every drawing. They must have the same latent size and not be finished.

    When it raises, no drawing has changed.
    """
    rows, references = _Rows(), _ReferenceRows()
    for owner, drawing in enumerate(drawings):
        _add_rows(model, owner, drawing, rows, references)
    answers = _forward(model, rows, references)
    stepped = [
        _sample(model, drawing, output)
        for drawing, output in zip(drawings, _combine(rows, answers, len(drawings)), strict=True)
    ]
    for drawing, (latents, history) in zip(drawings, stepped, strict=True):
        drawing.latents_CHW, drawing.history = latents, history
        drawing.done += 1


@torch.inference_mode()
def finish(model: FrameModel, drawing: Drawing) -> Pixels:
    """The picture."""
    return _pixels(model.codec.decode(drawing.latents_CHW[None])[0])


@torch.inference_mode()
def preview(model: FrameModel, drawing: Drawing, max_px: int = 128) -> Pixels:
    """What the network now believes the picture will be, at most `max_px` on the longer side.

    Decoded from shrunken latents where the frame is larger: a preview must cost a fraction of a step. Needs one done.
    """
    assert drawing.history is not None
    latents = drawing.history.clean[None]
    longest = max(drawing.sketch.width_px, drawing.sketch.height_px)
    if longest > max_px:
        latents = F.interpolate(latents, scale_factor=max_px / longest, mode="area")
    return _pixels(model.codec.decode(latents)[0])


def draw(model: FrameModel, sketch: Sketch) -> Pixels:
    """A whole picture, alone: the trivial use of the above."""
    drawing = begin(model, sketch)
    while not drawing.finished:
        advance(model, [drawing])
    return finish(model, drawing)


class _Row(NamedTuple):
    """One row of the main pass: whose it is, how much it counts, what it looks at."""

    owner: int
    weight: float
    latents_CHW: Tensor
    t: int
    text_SD: Tensor
    sees: tuple[int, ...]  # rows of the reference pass
    outfit: Outfit


class _Rows(list[_Row]):
    """The main pass of a step."""


class _ReferenceRow(NamedTuple):
    latents_CHW: Tensor
    t: int
    text_SD: Tensor
    outfit: Outfit


class _ReferenceRows(list[_ReferenceRow]):
    """The reference pass of a step."""

    def add(self, row: _ReferenceRow) -> int:
        """Its number."""
        self.append(row)
        return len(self) - 1


def _add_rows(model: FrameModel, owner: int, drawing: Drawing, rows: _Rows, references: _ReferenceRows) -> None:
    """The rows of one drawing's next step."""
    schedule = model.denoiser.schedule
    t = drawing.steps[drawing.done]
    branches = drawing.branches
    count = len(drawing.sketch.references)
    blanks: list[int] = []
    seen: list[int] = []
    for index in range(count):
        level = reference_level(t, distance=count - index)

        def noisy(clean_CHW: Tensor, level: int = level) -> Tensor:
            return schedule.add_noise(clean_CHW, drawing.reference_noise_CHW, torch.tensor(level))

        if branches.nothing != 0.0:
            blank = noisy(drawing.blank_CHW)
            blanks.append(references.add(_ReferenceRow(blank, level, drawing.nothing_SD, drawing.outfit)))
        if branches.images != 0.0 or branches.everything != 0.0:
            frame = noisy(drawing.reference_latents_NCHW[index])
            text = drawing.reference_text_NSD[index]
            seen.append(references.add(_ReferenceRow(frame, level, text, drawing.outfit)))
    for weight, text, sees in (
        (branches.nothing, drawing.nothing_SD, blanks),
        (branches.images, drawing.nothing_SD, seen),
        (branches.everything, drawing.description_SD, seen),
    ):
        if weight != 0.0:
            rows.append(_Row(owner, weight, drawing.latents_CHW, t, text, tuple(sees), drawing.outfit))


def _forward(model: FrameModel, rows: _Rows, references: _ReferenceRows) -> Tensor:
    """The network's answer for every row of the main pass, float32."""
    unet, device, dtype = model.denoiser.unet, model.device, model.dtype
    looked_at: References | None = None
    reference_outfits = [row.outfit for row in references]
    if references:
        with _wearing(model, reference_outfits):
            features = unet.features(
                torch.stack([row.latents_CHW for row in references]).to(dtype),
                torch.tensor([row.t for row in references], device=device),
                torch.stack([row.text_SD for row in references]).to(dtype),
            )
        slots = max(len(row.sees) for row in rows)
        numbers = [list(row.sees) + [0] * (slots - len(row.sees)) for row in rows]
        present = [[slot < len(row.sees) for slot in range(slots)] for row in rows]
        complete = all(all(slots_of_row) for slots_of_row in present)
        looked_at = References(
            features,
            torch.tensor(numbers, device=device),
            # A mask costs the attention kernel its fast path, so only where rows differ.
            None if complete else torch.tensor(present, device=device),
        )
    with _wearing(model, [row.outfit for row in rows], reference_outfits):
        return unet.predict(
            torch.stack([row.latents_CHW for row in rows]).to(dtype),
            torch.tensor([row.t for row in rows], device=device),
            torch.stack([row.text_SD for row in rows]).to(dtype),
            looked_at,
        ).float()


def _wearing(
    model: FrameModel, outfits: Sequence[Outfit], references: Sequence[Outfit] = ()
) -> AbstractContextManager[None]:
    """The rows of a forward wear what they wear."""
    if not any(outfits):
        return nullcontext()
    if model.slots is None:
        raise ValueError("a drawing wears something, and the model has no slots")
    return model.slots.rows(outfits, references)


def _sample(model: FrameModel, drawing: Drawing, output_CHW: Tensor) -> tuple[Tensor, History]:
    schedule = model.denoiser.schedule
    t = drawing.steps[drawing.done]
    t_next = schedule.step_after(t, len(drawing.steps))
    return model.sampler(schedule, output_CHW, drawing.latents_CHW, t, t_next, drawing.history)


def _combine(rows: _Rows, answers_BCHW: Tensor, drawing_count: int) -> list[Tensor]:
    """Guidance: each drawing's weighted sum of its branches."""
    combined = [torch.zeros_like(answers_BCHW[0]) for _ in range(drawing_count)]
    for row, answer in zip(rows, answers_BCHW, strict=True):
        combined[row.owner] = combined[row.owner] + row.weight * answer
    return combined


def _pixels(values_3HW: Tensor) -> Pixels:
    """0..1 to bytes."""
    rounded = (values_3HW * 255.0).round().clamp(0, 255).to(torch.uint8)
    return rounded.permute(1, 2, 0).contiguous().cpu().numpy()


__all__ = [
    "Drawing",
    "Pixels",
    "Randomness",
    "Seen",
    "Sketch",
    "advance",
    "begin",
    "draw",
    "finish",
    "preview",
    "row_count",
]
