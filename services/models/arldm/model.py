"""AR-LDM: Stable Diffusion that draws a story frame by frame, looking at its caption and at every earlier frame.

The UNet cross-attends to a context: CLIP's states of the frame's own caption, then, for each earlier frame, BLIP's
states of its caption and picture. A learned vector says which of the two a state is, another one which frame it is of.
Which states a row may see is a mask, and the mask is part of the model: padding is hidden, and so is every frame that
is not earlier (`Context`). What guidance and dropout put in place of a story is `Nothing`.
Source: Pan et al., "Synthesizing Coherent Story with Auto-Regressive Latent Diffusion Models" (arXiv 2211.10950), with
the rules of its published implementation.

Frames are numbered from 0 in the whole story. Visualization draws all of them; continuation is given frame 0 and draws
the rest; both follow the one rule that frame k sees frames 0..k−1.
Knows no file, text, sampler or batch scheduling.

Shapes: B rows, V frames drawn, F frames of a story, S caption positions, K context states, D their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.arldm.blip import Blip, BlipShape, black, build_blip
from services.models.arldm.text import TokenRows
from services.models.arldm.unet import ArldmUNet, Context
from services.models.schedule import Schedule, ScheduleConfig
from services.models.shape import config_values
from services.models.storygen import StoryGenConfig
from services.models.text_encoder import NO_WORDS, TextShape, Words, build_text_encoder, learned_words
from services.models.vae import LatentScaling, VaeShape

CAPTION, HISTORY = 0, 1  # rows of the type table

# DDIM as the published configuration names it: steps …, 20, 0 without an offset, ending at a clean picture.
SCHEDULE = ScheduleConfig(steps_offset=0, final_step_is_clean=True)
LATENTS = LatentScaling(shift=(0.0,) * 4, scale=(0.18215,) * 4)
GUIDANCE = 6.0


@dataclass(frozen=True, kw_only=True)
class FrameShape:
    """The shape of the two small tables, and how the model was trained."""

    width: int = 768
    frames: int = 5  # of a story: there is no vector for more
    given_frames: int = 0  # 0: visualization, all frames are drawn. 1: continuation, the first is given

    def __post_init__(self) -> None:
        """Raises ValueError for stories without a frame to draw."""
        if self.frames < 1 or not 0 <= self.given_frames < self.frames:
            raise ValueError(f"of {self.frames} frames {self.given_frames} cannot be given")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FrameShape:
        """Read a `config.json`. Raises ValueError naming a key that is unknown."""
        return cls(**config_values(cls, values, "frame embeddings"))

    def to_dict(self) -> dict[str, Any]:
        """The same, for `config.json`."""
        return {"width": self.width, "frames": self.frames, "given_frames": self.given_frames}


_SD_VAE = VaeShape(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, sample_size=512)
_SD_TEXT = TextShape(vocab_size=49408, width=768, layers=12, heads=12, positions=77)


@dataclass(frozen=True, kw_only=True)
class ArldmConfig:
    """The shapes of all networks. The defaults are Stable Diffusion 1.5 and BLIP-large, before any name was added."""

    unet: StoryGenConfig = field(default_factory=StoryGenConfig)
    vae: VaeShape = _SD_VAE
    text: TextShape = _SD_TEXT
    blip: BlipShape = field(default_factory=BlipShape)
    frame: FrameShape = field(default_factory=FrameShape)

    def __post_init__(self) -> None:
        """Raises ValueError where the networks do not fit each other: each alone would load without complaint."""
        widths = {
            "the UNet reads": self.unet.cross_attention_dim,
            "CLIP writes": self.text.width,
            "BLIP writes": self.blip.width,
            "the frame tables hold": self.frame.width,
        }
        if len(set(widths.values())) > 1:
            raise ValueError("widths differ: " + ", ".join(f"{what} {width}" for what, width in widths.items()))
        if self.text.positions > self.blip.positions:
            raise ValueError(f"BLIP has {self.blip.positions} positions and captions {self.text.positions}")
        if {self.unet.in_channels, self.unet.out_channels} != {self.vae.latent_channels}:
            raise ValueError(f"the UNet's channels are not the VAE's {self.vae.latent_channels}")


@dataclass(frozen=True)
class Memory:
    """What earlier frames left, oldest first: states with their type and time, and which of them are no padding.

    A slot whose frame is still to be drawn may hold any finite numbers.
    """

    states_BFSD: Tensor
    real_BFS: Tensor


@dataclass(frozen=True)
class Nothing:
    """What stands for "no story": the empty caption, and at every slot a black picture with the empty caption.

    All of it counts, padding too, and only the order of the frames hides some of it.
    """

    caption_SD: Tensor
    history_FSD: Tensor

    def memory(self, rows: int) -> Memory:
        """The history, for so many rows."""
        states = self.history_FSD.expand(rows, -1, -1, -1)
        return Memory(states, torch.ones(states.shape[:3], dtype=torch.bool, device=states.device))


def frame_context(captions_BSD: Tensor, captions_real_BS: Tensor, memory: Memory, frames_B: Tensor) -> Context:
    """Of one row for each caption, frame `frames_B` of its story: all slots of `memory`, with the later ones hidden.

    A frame sees those before it, not itself and none that follows.
    """
    batch, slots, length, width = memory.states_BFSD.shape
    earlier_BF = torch.arange(slots, device=frames_B.device) < frames_B[:, None]
    seen_BFS = memory.real_BFS & earlier_BF[:, :, None]
    return Context(
        torch.cat([captions_BSD, memory.states_BFSD.reshape(batch, slots * length, width)], dim=1),
        torch.cat([captions_real_BS, seen_BFS.reshape(batch, slots * length)], dim=1),
    )


def guided(without: Tensor, within: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance between the answers about nothing and about the story."""
    return without + scale * (within - without)


class Arldm(nn.Module):
    """The networks that are trained: text encoder, multimodal encoder, the two tables, UNet. The VAE is a `Codec`'s."""

    def __init__(self, config: ArldmConfig) -> None:
        super().__init__()
        self.config = config
        # The marks only matter to CLIP's pooled output, which nobody reads.
        text: Any = build_text_encoder(config.text, bos_id=0, eos_id=0, pad_id=0)
        self.unet: ArldmUNet = ArldmUNet(**config.unet.to_dict())
        self.text_encoder = text
        self.mm_encoder: Blip = build_blip(config.blip)
        self.type_embeddings = nn.Embedding(2, config.frame.width)
        self.time_embeddings = nn.Embedding(config.frame.frames, config.frame.width)

    @property
    def window(self) -> int:
        """Positions of a caption, marks included."""
        return self.config.text.positions

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.type_embeddings.weight.device

    def captions(self, rows: TokenRows, words: Words = NO_WORDS) -> Tensor:
        """`[B, S, D]`: the captions of frames to be drawn, with their type. `words` are CLIP's (`halves`)."""
        rows = rows.to(self.device)
        with _learned(self.text_encoder, words):
            states: Tensor = self.text_encoder(
                input_ids=rows.ids_BS, attention_mask=rows.real_BS.long()
            ).last_hidden_state
        return states + self.type_embeddings.weight[CAPTION]

    def history(self, pixels_B3HW: Tensor, rows: TokenRows, frames_B: Tensor, words: Words = NO_WORDS) -> Tensor:
        """`[B, S, D]`: pictures with their captions, as frames number `frames_B`, with type and time."""
        return self.placed(self.told(self.mm_encoder.look(pixels_B3HW.to(self.device)), rows, words), frames_B)

    def told(self, seen_BPD: Tensor, rows: TokenRows, words: Words = NO_WORDS) -> Tensor:
        """`[B, S, D]`: what BLIP saw (`Blip.look`) with its captions, of no frame yet. `words` are BLIP's."""
        with _learned(self.mm_encoder.text, words):
            return self.mm_encoder.read(seen_BPD, rows.to(self.device))

    def placed(self, states_BSD: Tensor, frames_B: Tensor) -> Tensor:
        """`[B, S, D]`: the same as frames number `frames_B` of a story's history, with type and time."""
        time = self.time_embeddings.weight[frames_B.to(self.device)]
        return states_BSD + self.type_embeddings.weight[HISTORY] + time[:, None]

    def halves(self, words: Words) -> tuple[Words, Words]:
        """Learned words, `[n, 2·D]` each, as CLIP and as BLIP read them: `[up to n, D]`.

        A vector that is zero in a half is no token of that encoder: a phrase has not the same number in both.
        """
        width = self.config.text.width
        cut = [
            {word: vectors[:, part] for word, vectors in words.items()} for part in (slice(width), slice(width, None))
        ]
        clip, blip = ({word: half[half.detach().any(dim=1)] for word, half in own.items()} for own in cut)
        return clip, blip

    def nothing(self, clip_nothing: TokenRows, blip_nothing: TokenRows) -> Nothing:
        """From the two tokenizers' empty texts (`CaptionTokenizer.nothing`)."""
        picture = black(self.config.blip.image_size_px).to(self.device)
        states: Tensor = self.mm_encoder(picture, blip_nothing.to(self.device))
        states = states + self.type_embeddings.weight[HISTORY]
        return Nothing(self.captions(clip_nothing)[0], states + self.time_embeddings.weight[:, None])

    def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, context: Context) -> Tensor:
        """`[B, C, H, W]`: the noise that each row believes it sees."""
        return self.unet.answer(latents_BCHW, timesteps_B, context)


def _learned(encoder: nn.Module, words: Words) -> AbstractContextManager[None]:
    """Within, an encoder knows the vectors of `words`, of which there may be none."""
    return learned_words(encoder, words) if sum(map(len, words.values())) else nullcontext()


def build_arldm(config: ArldmConfig) -> Arldm:
    """The networks with fresh weights from torch's global generator, in eval mode.

    Build them under `torch.device("meta")` to see their keys without their memory.
    """
    networks = Arldm(config)
    networks.eval()
    return networks


# Training.


@dataclass(frozen=True, kw_only=True)
class StoryExample:
    """A training batch of B whole stories; nothing has been dropped and no noise added yet.

    The last V of F frames are drawn. `sources` and `pixels` are of all frames: later ones look at drawn ones, too. The
    last frame's are never seen.
    """

    latents_BVCHW: Tensor  # of the drawn frames, normalised
    captions: TokenRows  # [B, V, S], CLIP's tokens of the drawn frames
    sources: TokenRows  # [B, F, S], BLIP's tokens of all frames
    pixels_BF3HW: Tensor  # all frames as BLIP sees them

    def __post_init__(self) -> None:
        """Raises ValueError when the counts of stories or frames differ."""
        (stories, drawn), (told, frames) = self.latents_BVCHW.shape[:2], self.sources.ids_BS.shape[:2]
        if (
            self.captions.ids_BS.shape[:2] != (stories, drawn)
            or self.pixels_BF3HW.shape[:2] != (stories, frames)
            or told != stories
            or not 0 < drawn <= frames
        ):
            raise ValueError(
                "stories need latents and a caption for each drawn frame, a picture and a text for each frame"
            )


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """What training hides, so that guidance has something to steer away from."""

    rate: float = 0.10  # of frames whose caption and history become `Nothing`, together

    def draw(self, stories: int, frames: int, generator: torch.Generator) -> Tensor:
        """`[B, V]`, True where a frame is trained with nothing. Each frame for itself, from a CPU generator."""
        return torch.rand(stories, frames, generator=generator) < self.rate


def training_context(networks: Arldm, example: StoryExample, dropped_BV: Tensor, nothing: Nothing) -> Context:
    """Of every drawn frame, story after story: `[B·V]` rows."""
    stories, drawn = example.captions.ids_BS.shape[:2]
    frames = example.sources.ids_BS.shape[1]
    rows = TokenRows(example.captions.ids_BS.flatten(0, 1), example.captions.real_BS.flatten(0, 1)).to(networks.device)
    captions = networks.captions(rows)
    past = frames - 1  # nobody looks at the last frame
    memory = nothing.memory(stories)
    memory = Memory(memory.states_BFSD[:, :past], memory.real_BFS[:, :past])
    null = memory
    if past:
        sources = TokenRows(
            example.sources.ids_BS[:, :past].flatten(0, 1), example.sources.real_BS[:, :past].flatten(0, 1)
        ).to(networks.device)
        states = networks.history(
            example.pixels_BF3HW[:, :past].flatten(0, 1), sources, torch.arange(past).repeat(stories)
        )
        memory = Memory(states.view(stories, past, *states.shape[1:]), sources.real_BS.view(stories, past, -1))
    gone = dropped_BV.to(networks.device).flatten()

    def each_frame(of_story: Tensor) -> Tensor:
        return of_story.repeat_interleave(drawn, dim=0)

    states_BFSD = torch.where(gone[:, None, None, None], each_frame(null.states_BFSD), each_frame(memory.states_BFSD))
    real_BFS = each_frame(memory.real_BFS) | gone[:, None, None]
    numbers = torch.arange(frames - drawn, frames, device=networks.device).repeat(stories)
    return frame_context(
        torch.where(gone[:, None, None], nothing.caption_SD, captions),
        rows.real_BS | gone[:, None],
        Memory(states_BFSD, real_BFS),
        numbers,
    )


def loss(
    networks: Arldm,
    schedule: Schedule,
    example: StoryExample,
    *,
    timesteps_BV: Tensor,
    noise_BVCHW: Tensor,
    dropped_BV: Tensor,
    nothing: Nothing,
) -> Tensor:
    """Mean squared error of the answer for each drawn frame, `[B, V]`.

    Gradients reach whatever is not frozen, the encoders too: `nothing` must then be of these weights and this step.
    """
    stories, drawn = timesteps_BV.shape
    clean = example.latents_BVCHW.flatten(0, 1)
    noise, timesteps = noise_BVCHW.flatten(0, 1), timesteps_BV.flatten()
    context = training_context(networks, example, dropped_BV, nothing)
    answer = networks.predict(schedule.add_noise(clean, noise, timesteps), timesteps, context)
    target = schedule.target(clean, noise, timesteps)
    error = F.mse_loss(answer.float(), target.float(), reduction="none")
    return error.mean(dim=(1, 2, 3)).view(stories, drawn)


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """What is not trained. The published flags freeze an encoder *but for its word table*, which is easily missed.

    So tables have a flag of their own here, and what is named is what happens.
    """

    clip: bool = False  # the text encoder but for its word table
    blip: bool = False  # the multimodal encoder but for its word table
    word_tables: bool = False
    frame_tables: bool = False
    resnets: bool = False  # of the UNet, everything outside its attention blocks


PUBLISHED_FREEZE = Freeze()
"""AR-LDM trains everything but the VAE."""
CUSTOMIZE_FREEZE = Freeze(clip=True, blip=True, word_tables=True, frame_tables=True)
"""EpicEvo trains the denoiser alone."""


def set_training(networks: Arldm, freeze: Freeze) -> tuple[str, ...]:
    """Make everything trainable but what `freeze` says, and return the names of what is.

    Frozen encoders stay in eval mode: dropout in a network that does not learn is noise.
    """
    networks.requires_grad_(True)
    networks.train()
    tables = (networks.text_encoder.get_input_embeddings(), networks.mm_encoder.text.get_input_embeddings())
    for frozen, encoder in ((freeze.clip, networks.text_encoder), (freeze.blip, networks.mm_encoder)):
        if frozen:
            encoder.requires_grad_(False)
            encoder.eval()
    for table in tables:
        table.requires_grad_(not freeze.word_tables)
    for table in (networks.type_embeddings, networks.time_embeddings):
        table.requires_grad_(not freeze.frame_tables)
    if freeze.resnets:
        for name, parameter in networks.unet.named_parameters():
            parameter.requires_grad_("attentions" in name)
    return tuple(name for name, parameter in networks.named_parameters() if parameter.requires_grad)
