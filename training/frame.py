"""Trains the pack's frame model: the story UNet, on latents and a trained text encoder's states.

Most rows of a step are frames of stories that see one to three earlier ones, because that is how the product draws: its
first frame is always given. Some see a frame that has nothing to do with them, so that a reference never outweighs
the text; a few see none. All kinds from the first step on: residuals count twice with references, so drawing without
them is another function, and a network that learned it first has to unlearn it.

    python -m training.frame [--minutes 60] [--threads 2]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from services.models.denoiser import Dropped, Example, StoryDenoiser, Unconditional
from services.models.schedule import Schedule, ScheduleConfig
from services.models.storygen import build_storygen
from services.models.text_encoder import TextEncoder
from services.models.toon import SCHEDULE, UNET
from services.models.vae import Codec
from training.command import run_arguments, run_parser
from training.latents import Latents, latents_of, scaling_of
from training.loop import LoopRecipe, RunResult, train
from training.pictures import FIGURES_SHRINK, STORY_FRAMES, ShelfRecipe, shelf
from training.precision import autocast, device_of, on_gpu
from training.storage import load_checkpoint, training_dir
from training.text import trained_text
from training.toon.grammar import describe_plainly
from training.toon.world import Frame, StoryFrame
from training.vae import encoding_vae

CHECKPOINT = "frame.safetensors"

_HELD_OUT_BATCHES = 3

Tokens = npt.NDArray[np.int16]


@dataclass(frozen=True, kw_only=True)
class FrameRecipe:
    """What the frame model is trained on and how."""

    loop: LoopRecipe
    singles: tuple[ShelfRecipe, ...]
    stories: tuple[ShelfRecipe, ...]
    held_out: ShelfRecipe
    single_rows: int = 2  # of a step, without references; frames of stories are among them too
    story_rows: int = 30  # of a step, with references
    # How many references the rows of a step see, as far as their stories have them. The newest one says most.
    references_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    unrelated_share: float = 0.35  # of the rows with references: single frames, which see any other one
    crowd_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)  # how often frames with one, two, three figures come
    figure_weight: float = 1.0  # of the error where a figure is against elsewhere: looks are small, places are large
    plain_share: float = 0.4  # of the descriptions: in the one wording in which the captioner writes
    caption_share: float = 0.5  # of a story's first frames as references: with their caption, as a user gives them
    text_dropped: float = 0.10
    references_dropped: float = 0.10
    schedule: ScheduleConfig = SCHEDULE


@dataclass(frozen=True)
class Texts:
    """Token ids of frames, row for row."""

    told: Tokens  # descriptions in every wording the world has
    plain: Tokens  # the same in the captioner's
    captions: Tokens  # of a story's frames; descriptions for single ones


@dataclass(frozen=True)
class Corpus:
    """Latents and texts of frames, row for row; `stories_from` is the row where stories start, five rows each."""

    latents: Latents
    texts: Texts
    stories_from: int
    figures: npt.NDArray[np.uint8]  # `[N, h, w]`: 1 where a figure is
    counts: npt.NDArray[np.int64]  # `[N]`: how many figures

    @property
    def stories_count(self) -> int:
        return (len(self.latents) - self.stories_from) // STORY_FRAMES


def token_rows(text: TextEncoder, texts: list[str]) -> Tokens:
    """`[N, S]` token ids. Raises TextTooLong when a description does not fit the window."""
    rows: Tokens = text.token_ids(texts).numpy().astype(np.int16)
    return rows


def texts_of(text: TextEncoder, shelves: Sequence[ShelfRecipe]) -> Texts:
    """The texts of the pictures of some shelves, in their order. Raises TextTooLong."""
    frames: list[Frame | StoryFrame] = [frame for recipe in shelves for frame in recipe.frames(recipe.seeds)]
    return Texts(
        token_rows(text, [frame.description for frame in frames]),
        token_rows(text, [describe_plainly(frame.scene) for frame in frames]),
        token_rows(text, [frame.caption if isinstance(frame, StoryFrame) else frame.description for frame in frames]),
    )


def figures_of(shelves: Sequence[ShelfRecipe], factor: int) -> npt.NDArray[np.uint8]:
    """Where figures are in the pictures of some shelves, one answer per latent: `[N, h, w]`, 1 or 0."""
    masks = np.concatenate([shelf(replace(recipe, masks=True)) for recipe in shelves])
    cells = factor // FIGURES_SHRINK
    count, rows, columns = masks.shape
    seen: npt.NDArray[np.uint8] = masks.reshape(count, rows // cells, cells, columns // cells, cells).max(axis=(2, 4))
    return seen


def counts_of(shelves: Sequence[ShelfRecipe]) -> npt.NDArray[np.int64]:
    """How many figures are in the pictures of some shelves, `[N]`."""
    return np.array([len(scene.actors) for recipe in shelves for scene in recipe.scenes(recipe.seeds)])


class FrameTrainee:
    """A story UNet in training. The text encoder is only asked: what it says of a description does not change."""

    def __init__(
        self, recipe: FrameRecipe, codec: Codec, corpus: Corpus, held_out: Corpus, text: TextEncoder, blank_CHW: Tensor
    ) -> None:
        self.recipe = recipe
        self.codec = codec
        self.corpus = corpus
        self.held_out = held_out
        self.text = text
        self.blank_CHW = blank_CHW
        unet = build_storygen(UNET)
        unet.start_references_from_self_attention()
        # torch's fused attention is slow backwards on a CPU (a third of a step); the plain one computes the same.
        unet.set_attn_processor(AttnProcessor())  # type: ignore[operator]
        self.denoiser = StoryDenoiser(unet, Schedule(recipe.schedule))
        self.networks = nn.ModuleDict({"unet": unet})
        self.nothing_ids_S = text.token_ids([""])[0]
        often = torch.tensor(recipe.crowd_weights)[torch.from_numpy(corpus.counts) - 1]
        first = corpus.stories_from
        follows = (torch.arange(len(often)) - first) % STORY_FRAMES > 0  # a story's first frame is always given
        self.often_single, self.often_story = often[:first], often[first:] * follows[first:]

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        recipe = self.recipe
        singles = torch.randint(len(self.corpus.latents), (recipe.single_rows,), generator=generator)
        with autocast(self.device):
            total = self._single_loss(self.corpus, singles, generator) * recipe.single_rows
            if recipe.story_rows > 0:
                total = total + self._story_loss(self.corpus, recipe.story_rows, generator) * recipe.story_rows
        return total / (recipe.single_rows + recipe.story_rows)

    @property
    def device(self) -> torch.device:
        """Where the networks are; batches are drawn on the CPU and sent there."""
        return device_of(self.networks)

    @torch.no_grad()
    def states(self, ids_BS: Tensor) -> Tensor:
        """What the text encoder says of token ids, `[B, S, D]`."""
        self.text.model.to(self.device)
        return self.text.states(ids_BS)

    def _take(
        self, corpus: Corpus, rows: Tensor, plain_share: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        picks = rows.numpy()
        plainly = torch.rand(len(rows), 1, generator=generator) < plain_share
        told, plain = (torch.from_numpy(t[picks]).long() for t in (corpus.texts.told, corpus.texts.plain))
        return torch.from_numpy(corpus.latents[picks]).float(), torch.where(plainly, plain, told)

    def noise(self, generator: torch.Generator, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise levels `[B]`, noise for the frames, noise for their references."""
        steps = self.recipe.schedule.train_steps
        # Stratified: the noise levels of a batch are spread evenly, which makes the loss less noisy for nothing.
        spread = (torch.randperm(len(like), generator=generator) + torch.rand(len(like), generator=generator)) / len(
            like
        )
        noise = torch.randn(like.shape, generator=generator)
        other = torch.randn(like.shape, generator=generator)
        timesteps = (spread * steps).long().clamp_max(steps - 1)
        return timesteps.to(self.device), noise.to(self.device), other.to(self.device)

    def _single_loss(self, corpus: Corpus, rows: Tensor, generator: torch.Generator) -> Tensor:
        latents, ids = self._take(corpus, rows, self.recipe.plain_share, generator)
        hidden = torch.rand(len(rows), generator=generator) < self.recipe.text_dropped
        ids = torch.where(hidden[:, None], self.nothing_ids_S, ids)
        timesteps, noise, other = self.noise(generator, latents)
        latents = latents.to(self.device)
        weight = self.weight(corpus, rows)
        example = Example(
            latents_BCHW=latents,
            text_BSD=self.states(ids),
            reference_latents_BNCHW=latents[:, None][:, :0],
            reference_text_BNSD=torch.zeros(len(rows), 0, *self.text_shape, device=self.device),
            present_BN=torch.zeros(len(rows), 0, dtype=torch.bool, device=self.device),
        )
        return self.denoiser.loss(
            example, timesteps_B=timesteps, noise_BCHW=noise, reference_noise_BCHW=other, weight_B1HW=weight
        ).mean()

    def weight(self, corpus: Corpus, rows: Tensor) -> Tensor | None:
        """What the error at each place of these frames counts, `[B, 1, h, w]`, one in the mean; None: all alike."""
        if self.recipe.figure_weight == 1.0:
            return None
        figures = torch.from_numpy(corpus.figures[rows.numpy()])[:, None].float()
        weight = 1.0 + (self.recipe.figure_weight - 1.0) * figures
        return (weight / weight.mean()).to(self.device)

    @property
    def text_shape(self) -> tuple[int, int]:
        return self.text.window, int(self.text.model.config.hidden_size)

    def _story_loss(self, corpus: Corpus, rows: int, generator: torch.Generator, drops: bool = True) -> Tensor:
        """The network's error about `story_example`s."""
        recipe = self.recipe
        example, targets = self.story_example(corpus, rows, generator, varied=drops)
        nothing = self.states(self.nothing_ids_S[None])[0].float()
        timesteps, noise, reference_noise = self.noise(generator, example.latents_BCHW)
        chance = torch.rand(2, rows, generator=generator) if drops else torch.ones(2, rows)
        never = torch.zeros(rows, dtype=torch.bool)
        return self.denoiser.loss(
            example,
            timesteps_B=timesteps,
            noise_BCHW=noise,
            reference_noise_BCHW=reference_noise,
            dropped=Dropped(
                text_B=chance[0] < recipe.text_dropped,
                references_B=chance[1] < recipe.references_dropped,
                no_references_B=never,
            ),
            unconditional=Unconditional(text_SD=nothing, blank_CHW=self.blank_CHW.to(self.device)),
            weight_B1HW=self.weight(corpus, targets) if drops else None,
        ).mean()

    def story_example(
        self, corpus: Corpus, rows: int, generator: torch.Generator, *, varied: bool = True
    ) -> tuple[Example, Tensor]:
        """Frames 2 to 5 of stories with earlier ones, and single frames with an unrelated one; and their rows, `[B]`.

        `varied`, for training: of `self.corpus`, crowds as often as the recipe says; some descriptions in the
        captioner's wording, some first frames with their caption.
        """
        recipe = self.recipe
        if varied:
            row = torch.multinomial(self.often_story, rows, replacement=True, generator=generator)
            story, beat = row // STORY_FRAMES, row % STORY_FRAMES
        else:
            story = torch.randint(corpus.stories_count, (rows,), generator=generator)
            beat = torch.randint(1, STORY_FRAMES, (rows,), generator=generator)
        one, two, _ = recipe.references_shares
        chosen = float(torch.rand(1, generator=generator))
        wish = torch.tensor(1 + (chosen > one) + (chosen > one + two))  # one number a step: empty slots cost time
        unrelated = torch.rand(rows, generator=generator) < (recipe.unrelated_share if corpus.stories_from else 0.0)
        if varied and corpus.stories_from:
            single = torch.multinomial(self.often_single, rows, replacement=True, generator=generator)
        else:
            single = torch.zeros(rows, dtype=torch.long)
        anything = torch.randint(len(corpus.latents), (rows,), generator=generator)
        seen = torch.where(unrelated, 1, torch.minimum(wish, beat))
        target = torch.where(unrelated, single, corpus.stories_from + story * STORY_FRAMES + beat)
        slots = int(seen.max())
        distance = torch.arange(slots, 0, -1)
        present = distance[None] <= seen[:, None]
        earlier = torch.where(unrelated[:, None], anything[:, None], target[:, None] - distance[None])
        earlier = torch.where(present, earlier, 0).flatten()  # row 0 stands in slots that are not looked at
        plain_share, caption_share = (recipe.plain_share, recipe.caption_share) if varied else (0.0, 0.0)
        latents, ids = self._take(corpus, target, plain_share, generator)
        reference_latents, reference_ids = self._take(corpus, earlier, plain_share, generator)
        given = (earlier >= corpus.stories_from) & ((earlier - corpus.stories_from) % STORY_FRAMES == 0)
        given &= torch.rand(len(earlier), generator=generator) < caption_share
        captions = torch.from_numpy(corpus.texts.captions[earlier.numpy()]).long()
        reference_ids = torch.where(given[:, None], captions, reference_ids)
        reference_text = torch.zeros(rows * slots, *self.text_shape, device=self.device)
        filled = present.flatten()
        reference_text[filled.to(self.device)] = self.states(reference_ids[filled]).float()
        example = Example(
            latents_BCHW=latents.to(self.device),
            text_BSD=self.states(ids),
            reference_latents_BNCHW=reference_latents.view(rows, slots, *latents.shape[1:]).to(self.device),
            reference_text_BNSD=reference_text.view(rows, slots, *self.text_shape),
            present_BN=present.to(self.device),
        )
        return example, target

    def measure(self) -> dict[str, float]:
        """Loss on held-out stories, over evenly spread noise levels; the same frames and noise at every call."""
        generator = torch.Generator().manual_seed(0)
        with autocast(self.device):
            values = [
                float(self._story_loss(self.held_out, 64, generator, drops=False)) for _ in range(_HELD_OUT_BATCHES)
            ]
        return {"loss": sum(values) / len(values)}


def frame_trainee(recipe: FrameRecipe) -> FrameTrainee:
    """Everything ready to train; latents are made or read. Needs the trained autoencoder and text encoder."""
    vae = encoding_vae()
    vae.requires_grad_(False)
    scaling = scaling_of(vae, shelf(recipe.singles[0]))
    codec = Codec(vae, scaling)
    text = trained_text()
    text.model.requires_grad_(False)
    shelves = (*recipe.singles, *recipe.stories)
    corpus = Corpus(
        np.concatenate([latents_of(s, vae, codec) for s in shelves]),
        texts_of(text, shelves),
        stories_from=sum(s.pictures_count for s in recipe.singles),
        figures=figures_of(shelves, codec.factor),
        counts=counts_of(shelves),
    )
    held = recipe.held_out
    held_out = Corpus(
        latents_of(held, vae, codec),
        texts_of(text, [held]),
        stories_from=0,
        figures=figures_of([held], codec.factor),
        counts=counts_of([held]),
    )
    with torch.no_grad():
        blank = codec.encode_blank(held.size_px, held.size_px)[0]
    return FrameTrainee(recipe, codec, corpus, held_out, text, blank)


def adam_only(name: str) -> bool:
    """Embeddings, first and last layers, and the small networks that read the time step stay with AdamW."""
    return any(part in name for part in ("embedding", "conv_in", "conv_out", "time_"))


def train_frame(recipe: FrameRecipe) -> RunResult:
    """Train, or continue, the frame model; its checkpoint is `frame.safetensors` in the training folder."""
    torch.manual_seed(recipe.loop.seed)
    return train(frame_trainee(recipe), recipe.loop, training_dir() / CHECKPOINT, adam_only=adam_only)


def trained_frame(path: Path | None = None) -> dict[str, Tensor]:
    """The UNet's averaged weights of the training folder. Raises FileNotFoundError."""
    found = load_checkpoint(path or training_dir() / CHECKPOINT)
    if found is None:
        raise FileNotFoundError("no trained frame model: run `python -m training.frame`")
    weights = found.part("average") or found.part("networks")
    return {n.removeprefix("unet."): v for n, v in weights.items()}


def main() -> None:
    """Train the toon pack's frame model."""
    from training.recipes import toon_frame

    arguments = run_arguments(run_parser(__doc__))
    result = train_frame(toon_frame(arguments.minutes, gpu=on_gpu()))
    print(f"frame: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}")


if __name__ == "__main__":
    main()
