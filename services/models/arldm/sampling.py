"""Draws stories with AR-LDM, frame after frame: each new picture becomes part of what the next one looks at.

    draw_stories(model, stories, noise_BVCHW, steps=50)

Noise is an argument, one piece for each frame, so a story does not depend on those beside it. Frame k is denoised in
two rows, about the story and about nothing; then its picture, as an 8-bit file would hold it, is read by BLIP.
Knows no file, no seed and no scheduling.

Shapes: B stories, V frames drawn, F frames of a story, S caption positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from services.models.arldm.blip import as_blip_sees, as_pictures
from services.models.arldm.model import GUIDANCE, Arldm, Memory, Nothing, frame_context, guided
from services.models.arldm.text import CaptionTokenizer, TokenRows
from services.models.arldm.unet import Context
from services.models.errors import ModelError
from services.models.samplers import ddim
from services.models.schedule import Schedule
from services.models.vae import Codec

Picture = np.ndarray[Any, np.dtype[np.uint8]]


class StoryDoesNotFit(ModelError):
    """The story has more frames than the model knows, or lacks the pictures that the model goes on from."""

    reason = "STORY_DOES_NOT_FIT"


@dataclass(frozen=True)
class ArldmModel:
    """Everything that draws stories, on one device."""

    networks: Arldm
    codec: Codec
    schedule: Schedule
    clip_tokenizer: CaptionTokenizer
    blip_tokenizer: CaptionTokenizer

    def __post_init__(self) -> None:
        """Raises ValueError when a tokenizer knows more words than its encoder's table has rows."""
        config = self.networks.config
        for tokenizer, rows in (
            (self.clip_tokenizer, config.text.vocab_size),
            (self.blip_tokenizer, config.blip.vocab_size),
        ):
            if tokenizer.vocabulary_size > rows:
                raise ValueError(
                    f"the tokenizer with {tokenizer.marks.begin} has {tokenizer.vocabulary_size} words "
                    f"and its encoder's table {rows} rows"
                )

    @property
    def window(self) -> int:
        """Positions of a caption, marks included."""
        return self.networks.window

    def nothing(self) -> Nothing:
        """What guidance steers away from. The same for every story: compute it once."""
        return self.networks.nothing(self.clip_tokenizer.nothing(self.window), self.blip_tokenizer.nothing(self.window))


@dataclass(frozen=True, kw_only=True)
class Story:
    """A caption for every frame, and the pictures of the first ones where there are any (8-bit, `[H, W, 3]`).

    Giving the first k is also how frame k is drawn again: earlier pictures are all that a frame knows of its past.
    """

    captions: tuple[str, ...]
    given: tuple[Picture, ...] = ()


class DrawnFrame(NamedTuple):
    """One frame of all stories of a call."""

    number: int  # in its story
    latents_BCHW: Tensor
    pixels_B3HW: Tensor  # 0..1


class _Read(NamedTuple):
    """The texts of a call as the encoders left them."""

    captions_BVSD: Tensor
    captions_real_BVS: Tensor
    sources: TokenRows  # [B, F, S]


@torch.inference_mode()
def draw_stories(
    model: ArldmModel,
    stories: Sequence[Story],
    noise_BVCHW: Tensor,
    *,
    steps: int = 50,
    guidance: float = GUIDANCE,
    keep_hidden: bool = False,
) -> tuple[Tensor, Tensor]:
    """Latents `[B, V, C, h, w]` and pixels in 0..1 `[B, V, 3, H, W]`: of each story, its frames in their order.

    `noise_BVCHW` also says how large pictures are. `keep_hidden` leaves in the context what is hidden, as the published
    code does: the same pictures for more work.
    Raises as `frames_of` does.
    """
    frames = list(frames_of(model, stories, noise_BVCHW, steps=steps, guidance=guidance, keep_hidden=keep_hidden))
    return (
        torch.stack([frame.latents_BCHW for frame in frames], dim=1),
        torch.stack([frame.pixels_B3HW for frame in frames], dim=1),
    )


def frames_of(
    model: ArldmModel,
    stories: Sequence[Story],
    noise_BVCHW: Tensor,
    *,
    steps: int = 50,
    guidance: float = GUIDANCE,
    keep_hidden: bool = False,
) -> Iterator[DrawnFrame]:
    """The same one frame at a time, each as soon as it is drawn.

    Raises StoryDoesNotFit, TextTooLong, or ValueError for pictures, noise or steps that cannot be.
    """
    drawn = _check(model, stories, noise_BVCHW)
    return _frames(model, stories, noise_BVCHW, drawn, steps, guidance, keep_hidden)


@torch.inference_mode()  # as a decorator: within a generator it would stay on while the caller has the frame
def _frames(
    model: ArldmModel,
    stories: Sequence[Story],
    noise_BVCHW: Tensor,
    drawn: int,
    steps: int,
    guidance: float,
    keep_hidden: bool,
) -> Iterator[DrawnFrame]:
    networks = model.networks
    read = _read(model, stories, drawn)
    nothing = model.nothing()
    length, width = nothing.caption_SD.shape
    total = read.sources.ids_BS.shape[1]
    given = total - drawn
    # Slots that are still to be filled hold zeros, and no frame sees them.
    memory = Memory(
        torch.zeros(len(stories), total, length, width, device=networks.device, dtype=nothing.caption_SD.dtype),
        read.sources.real_BS,
    )
    for number in range(given):
        _remember(model, memory, read.sources, number, [story.given[number] for story in stories])
    for index in range(drawn):
        number = given + index
        context = _context(read, memory, nothing, index, number, keep_hidden=keep_hidden)
        latents = _denoise(model, noise_BVCHW[:, index].to(networks.device), context, steps, guidance)
        pixels = model.codec.decode(latents)
        if number + 1 < total:
            _remember(model, memory, read.sources, number, as_pictures(pixels))
        yield DrawnFrame(number, latents, pixels)


def _check(model: ArldmModel, stories: Sequence[Story], noise_BVCHW: Tensor) -> int:
    """How many frames are drawn of each story."""
    shape = model.networks.config.frame
    if not stories:
        raise ValueError("there is no story to draw")
    if len({(len(story.captions), len(story.given)) for story in stories}) > 1:
        raise ValueError("stories of one call must have the same number of frames, and of given ones")
    captions, given = len(stories[0].captions), len(stories[0].given)
    if captions > shape.frames:
        raise StoryDoesNotFit(f"the story has {captions} frames and the model knows {shape.frames}; leave some out")
    if given < shape.given_frames:
        raise StoryDoesNotFit(f"the model continues {shape.given_frames} given pictures and was given {given}")
    drawn = captions - given
    if drawn < 1:
        raise StoryDoesNotFit(f"the story has {captions} captions and {given} pictures: nothing is left to draw")
    if noise_BVCHW.dim() != 5 or noise_BVCHW.shape[:3] != (len(stories), drawn, model.codec.channels):
        raise ValueError(
            f"noise is {tuple(noise_BVCHW.shape)} and should be "
            f"({len(stories)}, {drawn}, {model.codec.channels}, height, width)"
        )
    return drawn


def _read(model: ArldmModel, stories: Sequence[Story], drawn: int) -> _Read:
    texts = [caption for story in stories for caption in story.captions[-drawn:]]
    rows = model.clip_tokenizer.rows(texts, model.window).to(model.networks.device)
    everything = [caption for story in stories for caption in story.captions]
    sources = model.blip_tokenizer.rows(everything, model.window).to(model.networks.device)
    count = len(stories)
    captions = model.networks.captions(rows)
    return _Read(
        captions.view(count, drawn, *captions.shape[1:]),
        rows.real_BS.view(count, drawn, -1),
        TokenRows(sources.ids_BS.view(count, -1, model.window), sources.real_BS.view(count, -1, model.window)),
    )


def _remember(model: ArldmModel, memory: Memory, sources: TokenRows, number: int, pictures: Sequence[Picture]) -> None:
    """Fill slot `number` of the memory with that frame of every story."""
    rows = TokenRows(sources.ids_BS[:, number], sources.real_BS[:, number])
    pixels = as_blip_sees(pictures, model.networks.config.blip.image_size_px)
    memory.states_BFSD[:, number] = model.networks.history(pixels, rows, torch.full((len(pictures),), number))


def _context(read: _Read, memory: Memory, nothing: Nothing, index: int, number: int, *, keep_hidden: bool) -> Context:
    """Rows of frame `number`: about nothing first, then about the stories. Nothing hides what the stories hide."""
    count = len(read.captions_BVSD)
    frames = torch.full((count,), number, device=read.captions_BVSD.device)
    within = frame_context(read.captions_BVSD[:, index], read.captions_real_BVS[:, index], memory, frames)
    caption = nothing.caption_SD.expand(count, -1, -1)
    everything = torch.ones(caption.shape[:2], dtype=torch.bool, device=caption.device)
    past = nothing.memory(count)
    slots = memory.states_BFSD.shape[1]  # a story may be shorter than the model's longest
    past = Memory(past.states_BFSD[:, :slots], past.real_BFS[:, :slots])
    context = Context.joined(frame_context(caption, everything, past, frames), within)
    return context if keep_hidden else context.trimmed()


def _denoise(model: ArldmModel, noise_BCHW: Tensor, context: Context, steps: int, guidance: float) -> Tensor:
    schedule, latents = model.schedule, noise_BCHW
    dtype = next(model.networks.unet.parameters()).dtype
    count = len(latents)
    for t in schedule.sampling_steps(steps):
        timesteps = torch.full((2 * count,), t, device=latents.device)
        answer = model.networks.predict(torch.cat([latents, latents]).to(dtype), timesteps, context).float()
        output = guided(answer[:count], answer[count:], guidance)
        latents, _ = ddim(schedule, output, latents, t, schedule.step_after(t, steps), None, _no_noise)
    return latents


def _no_noise() -> Tensor:
    raise AssertionError("DDIM draws no noise")
