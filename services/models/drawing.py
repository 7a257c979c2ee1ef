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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from services.models.character import CharacterWeights
from services.models.denoiser import Branches, guidance
from services.models.lora import NOBODY, Outfit, WornRows
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
    blanks = nothing * (not policy.shared_noise) * (min(count, 1) if policy.levels_count else count)
    return steps * (nothing + images + everything) + levels * (blanks + count * (images or everything))


# Pixels that are decoded together at most: as much work at a time as one frame of Stable Diffusion.
_DECODED_PX = 512 * 512
_ENCODED_PX = 4 * _DECODED_PX  # the same of pictures that are encoded: half the work, and a story has a few
_POSITIONS_TOGETHER = 32 * 77  # of texts that are read together: 32 of CLIP's windows
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


@dataclass(frozen=True, kw_only=True)
class Start:
    """A sketch that is to be begun, and whose it is."""

    sketch: Sketch
    # In which of the model's slots the sketch's characters lie, in their order; the slots must stay theirs until the
    # drawing is done.
    outfit: Outfit = ()
    tenant: str = ""  # what references leave is not shown to others
    words: Words = field(default_factory=lambda: NO_WORDS)  # that the characters taught
    changes: Sequence[TextChange] = ()  # what they change of the text encoder


def begin(
    model: FrameModel,
    sketch: Sketch,
    outfit: Outfit = (),
    tenant: str = "",
    words: Words = NO_WORDS,
    changes: Sequence[TextChange] = (),
) -> Drawing:
    """One drawing; the rest as in `begin_together`."""
    start = Start(sketch=sketch, outfit=outfit, tenant=tenant, words=words, changes=changes)
    return begin_together(model, [start])[0]


@torch.inference_mode()
def begin_together(model: FrameModel, starts: Sequence[Start]) -> list[Drawing]:
    """Encode texts and earlier frames and draw all noise: for the frame, its references, the blank, each reference.

    They share the passes of the text encoder, but for those that change it or teach it words, and of the autoencoder
    over earlier frames; what a model reads instead of seeing it (`FrameModel.reader`) is read alone. A frame that is
    made of a picture begins with that, under the noise of the first step that is taken.
    Raises TextTooLong when a description does not fit.
    """
    for start in starts:
        if len(start.outfit) != len(start.sketch.characters):
            raise ValueError(f"{len(start.sketch.characters)} characters lie in {len(start.outfit)} slots")
    numbers = [_numbers(model, start.sketch) for start in starts]
    texts = _texts(model, starts)
    told = _told(model, texts, [tuple(start.outfit) for start in starts])
    pictures = _encoded(model, starts, numbers)
    return [_begun(model, *each) for each in zip(starts, numbers, texts, told, pictures, strict=True)]


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    """A sketch's random numbers, `[C, h, w]` each, on the CPU. None: nothing is there to be noised with them."""

    latents: Tensor
    reference: Tensor  # the same for all that is looked at, in every step
    blank: Tensor | None
    pictures_NCHW: Tensor | None
    edit: Tensor | None


def _numbers(model: FrameModel, sketch: Sketch) -> _Numbers:
    codec, count = model.codec, len(_looked_at(model, sketch))
    shape = (codec.channels, sketch.height_px // codec.factor, sketch.width_px // codec.factor)
    random = Randomness(sketch.seed)
    latents, reference = random.normal(*shape), random.normal(*shape)
    around = random  # what the references and the blank are noised with
    if sketch.policy.shared_noise:
        around = Randomness(_SHARED_SEED)
        reference = around.normal(*shape)
    blank = around.normal(*shape) if count and not model.sees_pictures else None
    pictures = None
    if count:
        one = around.normal(1, *shape) if sketch.policy.shared_noise else random.normal(count, *shape)
        pictures = one.expand(count, *shape)
    edit = random.normal(*shape) if sketch.edit is not None else None
    return _Numbers(latents=latents, reference=reference, blank=blank, pictures_NCHW=pictures, edit=edit)


def _looked_at(model: FrameModel, sketch: Sketch) -> tuple[Seen, ...]:
    """The earlier frames that the network sees; a model that reads them has them in its texts."""
    return () if model.reader else sketch.references


def _texts(model: FrameModel, starts: Sequence[Start]) -> list[Tensor]:
    """Of each sketch `[T, S, D]`: nothing's states, the description's, and those of each frame that is looked at."""
    if model.reader is not None:
        return [
            model.reader.contexts(
                start.sketch.description,
                [(seen.pixels, seen.description) for seen in start.sketch.references],
                start.words,
            )
            for start in starts
        ]
    said = []
    for start in starts:
        captions = () if model.sees_pictures else (seen.description for seen in start.sketch.references)
        said.append(["", start.sketch.description, *captions])
    # Who changes the encoder, or its words, has it alone.
    plain = [not start.words and not start.changes for start in starts]
    wanted = list(dict.fromkeys(text for texts, shared in zip(said, plain, strict=True) if shared for text in texts))
    states: dict[str, Tensor] = {}
    together = max(2, _POSITIONS_TOGETHER // model.text.window)  # at least nothing and a description, as for one frame
    for first in range(0, len(wanted), together):
        some = wanted[first : first + together]
        states.update(zip(some, model.text.encode(some), strict=True))
    return [
        torch.stack([states[text] for text in texts])
        if shared
        else model.text.encode(texts, start.words, start.changes)
        for start, texts, shared in zip(starts, said, plain, strict=True)
    ]


def _encoded(
    model: FrameModel, starts: Sequence[Start], numbers: Sequence[_Numbers]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Of each sketch the blank's latents `[C, h, w]` and its earlier frames' `[N, C, h, w]`, as far as it has any."""
    codec, device = model.codec, model.device
    rows: dict[tuple[int, int], list[tuple[Pixels | None, Tensor]]] = {}  # by size: a picture or the blank, its noise
    for start, own in zip(starts, numbers, strict=True):
        of_size = rows.setdefault((start.sketch.height_px, start.sketch.width_px), [])
        if own.blank is not None:
            of_size.append((None, own.blank))
        if own.pictures_NCHW is not None:
            seen = _looked_at(model, start.sketch)
            of_size += [(one.pixels, noise) for one, noise in zip(seen, own.pictures_NCHW, strict=True)]
    latents: dict[tuple[int, int], Iterator[Tensor]] = {}
    for size, all_rows in rows.items():
        together = max(1, _ENCODED_PX // (size[0] * size[1]))
        done: list[Tensor] = []
        for first in range(0, len(all_rows), together):
            pixels, noises = zip(*all_rows[first : first + together], strict=True)
            values = [
                torch.full((3, *size), codec.blank_value, device=device)
                if one is None
                else moved(torch.tensor(one), device).permute(2, 0, 1).float() / 255.0
                for one in pixels
            ]
            done += codec.encode_references(torch.stack(values), moved(torch.stack(noises), device))
        latents[size] = iter(done)
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for start, own in zip(starts, numbers, strict=True):
        row = latents[start.sketch.height_px, start.sketch.width_px]
        blank = None if own.blank is None else next(row).clone()  # a view would keep everybody's
        count = 0 if own.pictures_NCHW is None else len(own.pictures_NCHW)
        found.append((blank, torch.stack(list(itertools.islice(row, count))) if count else None))
    return found


def _begun(
    model: FrameModel,
    start: Start,
    numbers: _Numbers,
    texts: Tensor,
    told: tuple[Told, ...],
    pictures: tuple[Tensor | None, Tensor | None],
) -> Drawing:
    sketch, codec, device, outfit = start.sketch, model.codec, model.device, tuple(start.outfit)
    blank, seen = pictures
    shape = numbers.latents.shape
    schedule = model.denoiser.schedule.at(shape[1] * shape[2])
    steps = schedule.sampling_steps(sketch.steps)[-sketch.steps_taken :]
    latents = moved(numbers.latents, device)
    if sketch.edit is None or numbers.edit is None:
        latents = starting_amplitude(sampler_of(model, sketch), schedule, steps[0]) * latents
    else:
        values = moved(torch.tensor(sketch.edit.pixels), device).permute(2, 0, 1)[None].float() / 255.0
        given = codec.encode(values, moved(numbers.edit[None], device))[0]
        latents = schedule.add_noise(given, latents, torch.tensor(steps[0]))
    return Drawing(
        sketch=sketch,
        guided=guidance(sketch.image_guidance, sketch.text_guidance, has_references=seen is not None),
        steps=steps,
        latents_CHW=latents,
        description_SD=texts[1],
        nothing_SD=texts[0],
        reference_latents_NCHW=torch.zeros((0, *shape), device=device) if seen is None else seen,
        reference_text_NSD=texts[2:],
        blank_CHW=torch.zeros(shape, device=device) if blank is None else blank,
        reference_noise_CHW=moved(numbers.reference, device),
        pictures=()
        if model.sees_pictures
        else tuple(hashlib.sha256(one.pixels.tobytes()).hexdigest() for one in _looked_at(model, sketch)),
        shown=_shown(model, seen, texts[0], outfit) if model.sees_pictures and seen is not None else {},
        told=told,
        tenant=start.tenant,
        outfit=outfit,
    )


def worn_by(model: FrameModel, outfits: Sequence[Outfit]) -> WornRows | None:
    """What rows wear, as a forward asks for it; None where nobody wears anything."""
    if not any(one.slot != NOBODY.slot for outfit in outfits for one in outfit):
        return None
    if model.slots is None:
        raise ValueError("a drawing wears something, and the model has no slots")
    return model.slots.prepared(outfits)


def wearing(model: FrameModel, worn: WornRows | None) -> AbstractContextManager[None]:
    """The rows of the forwards in this block wear what they wear."""
    return nullcontext() if worn is None or model.slots is None else model.slots.worn(worn)


def _shown(model: FrameModel, seen_NCHW: Tensor, nothing_SD: Tensor, outfit: Outfit) -> Mapping[str, KeyValue]:
    """What a network that looks at pictures as they are keeps of those of one frame: without noise or words."""
    unet = model.denoiser.unet
    nothing_NSD = nothing_SD.to(model.dtype).expand(len(seen_NCHW), *nothing_SD.shape)
    clean_N = torch.zeros(len(seen_NCHW), device=seen_NCHW.device)
    with wearing(model, worn_by(model, [outfit])):
        return unet.project(unet.features(seen_NCHW.to(model.dtype), clean_N, nothing_NSD))


def _told(model: FrameModel, texts: Sequence[Tensor], outfits: Sequence[Outfit]) -> list[tuple[Told, ...]]:
    """Of each drawing its texts as the blocks of a StoryGen read them with what the drawing wears."""
    unet = model.denoiser.unet
    if not isinstance(unet, StoryGenUNet):
        return [()] * len(texts)
    sizes = [len(own) for own in texts]
    rows = [outfit for size, outfit in zip(sizes, outfits, strict=True) for _ in range(size)]
    with wearing(model, worn_by(model, rows)):
        read = unet.read(torch.cat(list(texts)).to(model.dtype))
    told: list[tuple[Told, ...]] = []
    for first, size in zip(itertools.accumulate([0, *sizes]), sizes, strict=False):
        # Of several each has a copy: a view would keep all of them in memory until the last one is drawn.
        own = {name: [part[first : first + size] for part in one] for name, one in read.items()}
        if len(sizes) > 1:
            own = {name: [part.clone() for part in parts] for name, parts in own.items()}
        told.append(tuple({name: KeyValue(k[row], v[row]) for name, (k, v) in own.items()} for row in range(size)))
    return told


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
    "Start",
    "are_sound",
    "begin",
    "begin_together",
    "decodable",
    "finish",
    "preview",
    "rows_of_a_frame",
    "sampler_of",
    "wearing",
    "worn_by",
]
