"""What is drawn, from noise to picture: the sketch, the drawing on its way, its beginning and its end.

    drawing = begin(model, sketch)
    while not drawing.finished:
        advance(model, [drawing, …], cache)     # `services.models.step`; drawings come and go between steps
    [pixels] = finish(model, [drawing])

Every random number comes from the sketch's seed, or from the pack where `ReferencePolicy` shares noise. (The published
implementation takes the VAE's and the references' noise from the global generator.) Knows no queue, clock, thread or
file.

Shapes: C latent channels, h and w latent size, N references, S text positions, D text width.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from services.models.character import CharacterWeights
from services.models.denoiser import Branches, guidance
from services.models.lora import NOBODY, Outfit
from services.models.references import EXACT, ReferencePolicy
from services.models.registry import FrameModel
from services.models.samplers import History, Sampler, samplers_of, starting_amplitude
from services.models.storygen import KeyValue, StoryGenUNet, Told
from services.models.text_encoder import NO_WORDS, TextChange, Words
from services.models.transfer import moved

Pixels = npt.NDArray[np.uint8]
"""`[H, W, 3]`, RGB."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An earlier frame, at the size of the frame to be drawn, and the description it was drawn from."""

    pixels: Pixels
    description: str
    # In frames from the one that is drawn, at least 1. 0: by its place, the last reference being the frame just before.
    # With 1 everywhere the network looks at all alike, which is StoryGen's "multi-image-condition".
    distance: int = 0


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A picture, at the size of the frame to be drawn, that the frame is made of instead of noise alone."""

    pixels: Pixels
    # How much of it is drawn anew: sampling begins where this part of its steps is left (Meng et al., "SDEdit",
    # arXiv 2108.01073). 1 keeps no more than what shines through the noise of the first step.
    strength: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for a strength that is none."""
        if not 0.0 < self.strength <= 1.0:
            raise ValueError("an edit's strength must be above 0 and at most 1")


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
    sampler: str = ""  # of `samplers_of` the pack's schedule; empty: the pack's
    # The part of the steps, from 0 to 1, in which guidance counts. Outside of it only the row with text and references
    # is computed (Kynkäänniemi et al., arXiv 2404.07724).
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    policy: ReferencePolicy = EXACT
    # The deep blocks are computed in every so many steps, and their states used again in those between.
    deep_every: int = 1
    edit: Edit | None = None

    @property
    def distances(self) -> tuple[int, ...]:
        """Of the references from the frame, in their order."""
        count = len(self.references)
        return tuple(seen.distance or count - index for index, seen in enumerate(self.references))

    @property
    def steps_taken(self) -> int:
        """Of its steps those that are really taken: all, or those that an edit leaves, one at least."""
        return self.steps if self.edit is None else max(1, int(self.steps * self.edit.strength))


@dataclass
class Drawing:
    """One sketch on its way from noise to picture. `advance` is the only one to change it."""

    sketch: Sketch
    guided: Branches  # the guidance that the sketch asks for
    steps: tuple[float, ...]
    latents_CHW: Tensor
    description_SD: Tensor
    nothing_SD: Tensor
    reference_latents_NCHW: Tensor
    reference_text_NSD: Tensor
    blank_CHW: Tensor
    reference_noise_CHW: Tensor
    pictures: tuple[str, ...] = ()  # digests of the pixels of the references that passes are made of
    # What the references leave where no pass is made of them (`FrameModel.sees_pictures`), a row each.
    shown: Mapping[str, KeyValue] = field(default_factory=dict, repr=False)
    # The texts as the network's blocks read them, `[S, C]` each: nothing's, the description's, each reference's. Empty:
    # the network reads them in every pass.
    told: tuple[Told, ...] = field(default=(), repr=False)
    tenant: str = ""
    done: int = 0
    history: History | None = field(default=None, repr=False)
    outfit: Outfit = ()  # where the sketch's characters lie in the model's slots
    deep: dict[int, Tensor] = field(default_factory=dict, repr=False)  # by branch, of the last step that computed them

    @property
    def finished(self) -> bool:
        """All steps are done."""
        return self.done == len(self.steps)

    def branches_at(self, done: int) -> Branches:
        """How much each branch counts in step number `done`."""
        first, last = self.sketch.guidance_interval
        return self.guided if first <= done / len(self.steps) < last else UNGUIDED


def are_sound(drawings: Sequence[Drawing]) -> list[bool]:
    """Of each whether its numbers are finite. One that is not must not become a picture, nor a frame's reference.

    One answer from the device for all of them, because each makes the host wait for it.
    """
    sound: list[bool] = torch.stack([drawing.latents_CHW.isfinite().all() for drawing in drawings]).tolist()
    return sound


def sampler_of(model: FrameModel, sketch: Sketch) -> Sampler:
    """The sampler that a sketch asks for, or the pack's."""
    return samplers_of(model.manifest.schedule)[sketch.sampler] if sketch.sampler else model.sampler


def rows_of_a_frame(sketch: Sketch, *, reads: bool = False, sees: bool = False) -> int:
    """Rows of a whole frame when it finds nothing in the cache but the blank's shared table.

    `reads`: the model reads earlier frames (`FrameModel.reader`), so nothing is looked at. `sees`: it looks at them as
    they are (`FrameModel.sees_pictures`), so there are no passes.
    """
    count, policy = 0 if reads else len(sketch.references), sketch.policy
    branches = guidance(sketch.image_guidance, sketch.text_guidance, has_references=count > 0)
    nothing, images, everything = (weight != 0.0 for weight in (branches.nothing, branches.images, branches.everything))
    steps = sketch.steps_taken
    if sees:
        return steps * (nothing + images + everything)
    levels = min(policy.levels_count or steps, steps)
    blanks = count * nothing * (not policy.shared_noise)
    return steps * (nothing + images + everything) + levels * (blanks + count * (images or everything))


# Pixels that are decoded together at most: as much work at a time as one frame of Stable Diffusion.
_DECODED_PX = 512 * 512
_SHARED_SEED = 0x5EED  # of the noise that frames share
UNGUIDED = Branches(nothing=0.0, images=0.0, everything=1.0)


class Randomness:
    """A sketch's random numbers, drawn on the CPU so that every device gets the same ones.

    numpy's generator and not torch's: torch's CPU generator keeps only the low 32 bits of a seed.
    """

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.default_rng(seed if len(seed) > 1 else seed[0])

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32."""
        return torch.from_numpy(self._generator.standard_normal(shape, dtype=np.float32))


@torch.inference_mode()
def begin(
    model: FrameModel,
    sketch: Sketch,
    outfit: Outfit = (),
    tenant: str = "",
    words: Words = NO_WORDS,
    changes: Sequence[TextChange] = (),
) -> Drawing:
    """Encode the texts and earlier frames and draw all noise: for the frame, its references, the blank, each reference.

    A frame that is made of a picture begins with that, under the noise of the first step that is taken.

    `outfit` says in which of the model's slots the sketch's characters lie, in their order; the slots must stay theirs
    until the drawing is done. `words` are those that they taught, `changes` what they change of the text encoder. What
    references leave is not shown to other tenants than `tenant`.
    Raises TextTooLong when a description does not fit.
    """
    if len(outfit) != len(sketch.characters):
        raise ValueError(f"{len(sketch.characters)} characters lie in {len(outfit)} slots")
    codec, device = model.codec, model.device
    looked_at = () if model.reader else sketch.references
    count = len(looked_at)
    shape = (codec.channels, sketch.height_px // codec.factor, sketch.width_px // codec.factor)
    random = Randomness(sketch.seed)
    latents, reference_noise = random.normal(*shape), random.normal(*shape)
    around = random  # what the references and the blank are noised with
    if sketch.policy.shared_noise:
        around = Randomness(_SHARED_SEED)
        reference_noise = around.normal(*shape)
    if model.reader is None:
        captions = () if model.sees_pictures else (seen.description for seen in looked_at)
        told = ["", sketch.description, *captions]
        texts = model.text.encode(told, words, changes)
    else:
        past = [(seen.pixels, seen.description) for seen in sketch.references]
        texts = model.reader.contexts(sketch.description, past, words)
    blank = torch.zeros(shape, device=device)
    if count:
        if not model.sees_pictures:
            blank = codec.encode_blank(sketch.height_px, sketch.width_px, moved(around.normal(1, *shape), device))[0]
        pixels = np.stack([seen.pixels for seen in looked_at])
        values = moved(torch.from_numpy(pixels), device).permute(0, 3, 1, 2).float() / 255.0
        noise = around.normal(1, *shape) if sketch.policy.shared_noise else random.normal(count, *shape)
        seen = codec.encode_references(values, moved(noise, device).expand(count, *shape))
    else:
        seen = torch.zeros((0, *shape), device=device)
    schedule = model.denoiser.schedule.at(shape[1] * shape[2])
    steps = schedule.sampling_steps(sketch.steps)[-sketch.steps_taken :]
    if sketch.edit is None:
        latents = starting_amplitude(sampler_of(model, sketch), schedule, steps[0]) * moved(latents, device)
    else:
        values = moved(torch.tensor(sketch.edit.pixels), device).permute(2, 0, 1)[None].float() / 255.0
        given = codec.encode(values, moved(random.normal(1, *shape), device))[0]
        latents = schedule.add_noise(given, moved(latents, device), torch.tensor(steps[0]))
    return Drawing(
        sketch=sketch,
        guided=guidance(sketch.image_guidance, sketch.text_guidance, has_references=count > 0),
        steps=steps,
        latents_CHW=latents,
        description_SD=texts[1],
        nothing_SD=texts[0],
        reference_latents_NCHW=seen,
        reference_text_NSD=texts[2:],
        blank_CHW=blank,
        reference_noise_CHW=moved(reference_noise, device),
        pictures=()
        if model.sees_pictures
        else tuple(hashlib.sha256(seen.pixels.tobytes()).hexdigest() for seen in looked_at),
        shown=_shown(model, seen, texts[0], tuple(outfit)) if model.sees_pictures and count else {},
        told=_told(model, texts, tuple(outfit)),
        tenant=tenant,
        outfit=tuple(outfit),
    )


def wearing(model: FrameModel, outfits: Sequence[Outfit]) -> AbstractContextManager[None]:
    """The rows of a forward wear what they wear."""
    if not any(one.slot != NOBODY.slot for outfit in outfits for one in outfit):
        return nullcontext()
    if model.slots is None:
        raise ValueError("a drawing wears something, and the model has no slots")
    return model.slots.rows(outfits)


def _shown(model: FrameModel, seen_NCHW: Tensor, nothing_SD: Tensor, outfit: Outfit) -> Mapping[str, KeyValue]:
    """What a network that looks at pictures as they are keeps of those of one frame: without noise or words."""
    unet = model.denoiser.unet
    nothing_NSD = nothing_SD.to(model.dtype).expand(len(seen_NCHW), *nothing_SD.shape)
    clean_N = torch.zeros(len(seen_NCHW), device=seen_NCHW.device)
    with wearing(model, [outfit]):
        return unet.project(unet.features(seen_NCHW.to(model.dtype), clean_N, nothing_NSD))


def _told(model: FrameModel, texts_TSD: Tensor, outfit: Outfit) -> tuple[Told, ...]:
    """Each text as the blocks of a StoryGen read it with what the drawing wears."""
    unet = model.denoiser.unet
    if not isinstance(unet, StoryGenUNet):
        return ()
    with wearing(model, [outfit] * len(texts_TSD)):
        read = unet.read(texts_TSD.to(model.dtype))
    return tuple(
        {name: KeyValue(one.key[number], one.value[number]) for name, one in read.items()}
        for number in range(len(texts_TSD))
    )


def decodable(drawings: Sequence[Drawing]) -> list[list[Drawing]]:
    """Those that are decoded together, in order: neighbours of one size, as far as `_DECODED_PX` holds them."""
    batches = []
    for _, alike in itertools.groupby(drawings, key=lambda drawing: drawing.latents_CHW.shape):
        waiting = list(alike)
        room = max(1, _DECODED_PX // (waiting[0].sketch.width_px * waiting[0].sketch.height_px))
        batches += [waiting[first : first + room] for first in range(0, len(waiting), room)]
    return batches


@torch.inference_mode()
def finish(model: FrameModel, drawings: Sequence[Drawing]) -> list[Pixels]:
    """The pictures, decoded in the batches that are `decodable`."""
    latents = (torch.stack([drawing.latents_CHW for drawing in batch]) for batch in decodable(drawings))
    return [_pixels(values) for latents_BCHW in latents for values in model.codec.decode(latents_BCHW)]


@torch.inference_mode()
def preview(model: FrameModel, drawing: Drawing, max_px: int = 128) -> Pixels:
    """What the network now believes the picture will be, at most `max_px` on the longer side. Needs one step done.

    By the pack's own map where it has one, else decoded; from shrunken latents where the frame is larger: a preview
    must cost a fraction of a step.
    """
    assert drawing.history is not None
    latents = drawing.history.clean[None]
    longest = max(drawing.sketch.width_px, drawing.sketch.height_px)
    if longest > max_px:
        latents = F.interpolate(latents, scale_factor=max_px / longest, mode="area")
    return _pixels((model.codec if model.glimpse is None else model.glimpse).decode(latents)[0])


def _pixels(values_3HW: Tensor) -> Pixels:
    """0..1 to bytes."""
    rounded = (values_3HW * 255.0).round().clamp(0, 255).to(torch.uint8)
    return rounded.permute(1, 2, 0).contiguous().cpu().numpy()


__all__ = [
    "Drawing",
    "Edit",
    "Pixels",
    "Randomness",
    "Seen",
    "Sketch",
    "are_sound",
    "begin",
    "decodable",
    "finish",
    "preview",
    "rows_of_a_frame",
    "sampler_of",
    "wearing",
]
