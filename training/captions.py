"""Trains the pack's LLaVA: its eyes on the world's labels, the base on every question, one LoRA adapter per question.

    python -m training.captions --out services/models/packs/toon

Phases, each with a checkpoint of its own in the training folder, so that an interrupted run goes on where it stopped:

    sight        the vision tower reads a scene's truth off its picture (`captions_sight`)
    words        the whole model says what it sees ("Describe the picture.") on single frames
    base         both questions about stories, full weights
    tales        how stories go, in words alone: many more of them than there are pictures of
    told         the description of a caption, full weights, and tales in between, which it would forget: this is the
                 base that is shipped
    story        a LoRA on the frozen base: the next caption
    descriptive  a LoRA on the frozen base: the description of a caption

Everything is drawn from the phase's seed and the step, so a resumed run sees what an uninterrupted one would have seen.
Knows no serving.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from services.models.captions import llava
from services.models.captions.cast import Cast, name_tokens
from services.models.tokenizer import StoryTokenizer
from training import loop, questions
from training.captions_data import (
    FRAMES_PER_STORY,
    IGNORED,
    Batch,
    CacheRecipe,
    Frames,
    Row,
    RowRecipe,
    Stories,
    batch,
    degrade,
    draw_frames,
    draw_stories,
    frame_row,
    renamed,
    shelf_frames,
    shelf_stories,
    story_names,
    story_row,
    tale_row,
)
from training.captions_sight import Sight
from training.optimizer import OptimizerRecipe, Pace
from training.pictures import ShelfRecipe
from training.precision import autocast, device_of, fast_dtype
from training.storage import training_dir
from training.toon.cast import MAIN, SIDE_NAMES
from training.toon.scene import Scene
from training.toon.world import sample_story

FOLDER = "captions"  # of its checkpoints, in the training folder
TALES_FIRST_SEED = 2_000_000  # of the stories that are read and never drawn
_SIGHT_HELD_OUT = 128  # pictures of each kind
_HELD_OUT_STEPS = 4  # validation batches a look at the held-out loss takes


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One training run: which questions, how long, how fast."""

    name: str
    steps: int
    rows_per_step: int
    tasks: tuple[str, ...] = ()
    frames_ratio: float = 0.0  # share of the steps that look at single frames instead of stories
    matrix_rate: float = 0.02
    rate: float = 2e-3
    learn_captions_so_far: bool = False  # see `RowRecipe`
    rename_ratio: float = 0.2  # see `RowRecipe`
    strangers_ratio: float = 0.0  # share of the steps with pictures that show characters of any look
    first_picture_ratio: float = 0.25  # of the steps with stories, those whose picture is a story's first: a user's
    tales_ratio: float = 0.0  # share of the steps that read tales, so that they are not forgotten
    first_tale: int = TALES_FIRST_SEED  # seed of the first of them
    story_ratio: float = 0.0  # of the others, the share that asks for the next caption only, which keeps its picture
    name_weight: float = 1.0  # how much more a name counts than another token
    seed: int = 0
    minutes: float | None = None  # end earlier when this much time is over; the learning rate still ends at zero

    @property
    def loop(self) -> loop.LoopRecipe:
        """The phase as the training loop takes it."""
        return loop.LoopRecipe(
            pace=Pace(steps=self.steps, warmup_steps=40, minutes=self.minutes),
            optimizer=OptimizerRecipe(matrix_rate=self.matrix_rate, rate=self.rate),
            seed=self.seed,
            measure_every_s=300.0,
        )


_STRANGERS = ShelfRecipe(split="train", breadth="looks", count=6000)
_STRANGERS_STORIES = ShelfRecipe(split="train", breadth="strangers", count=1500)
_HELD_OUT_STRANGERS = ShelfRecipe(split="test", breadth="looks", count=400)


@dataclass(frozen=True, kw_only=True)
class CaptionsRecipe:
    """The whole recipe of the shipped captioner."""

    cache: CacheRecipe = field(default_factory=CacheRecipe)
    held_out: CacheRecipe = field(
        default_factory=lambda: CacheRecipe(stories_count=40, frames_count=128, split="validation")
    )
    # Characters of any look but the cast's: what they look like has to be seen, it cannot be known.
    strangers: ShelfRecipe = _STRANGERS
    strangers_stories: ShelfRecipe = _STRANGERS_STORIES
    held_out_strangers: ShelfRecipe = _HELD_OUT_STRANGERS
    shape: llava.LlavaShape = field(default_factory=llava.LlavaShape)
    sight: Phase = Phase(name="sight", steps=6000, rows_per_step=48, strangers_ratio=0.6, minutes=47.0)
    words: Phase = Phase(name="words", steps=260, rows_per_step=32, tasks=("describe",), frames_ratio=1.0)
    base: Phase = Phase(
        name="base",
        steps=2000,
        rows_per_step=12,
        tasks=("story", "descriptive"),
        frames_ratio=0.1,
        learn_captions_so_far=True,
        minutes=34.5,
    )
    tales: Phase = Phase(
        name="tales",
        steps=4000,
        rows_per_step=24,
        tasks=("story",),
        rename_ratio=0.2,
        name_weight=4.0,
        minutes=38.0,
    )
    told: Phase = Phase(
        name="told",
        steps=2000,
        rows_per_step=24,
        tasks=("descriptive",),
        frames_ratio=0.25,
        rename_ratio=0.05,
        strangers_ratio=0.5,
        first_picture_ratio=0.5,
        matrix_rate=0.012,
        rate=1.2e-3,
        tales_ratio=0.45,
        first_tale=TALES_FIRST_SEED + 500_000,
        story_ratio=0.15,
        name_weight=4.0,
        minutes=74.0,
    )
    story: Phase = Phase(
        name="story",
        steps=600,
        rows_per_step=16,
        tasks=("story",),
        rename_ratio=0.1,
        matrix_rate=0.0,
        tales_ratio=0.5,
        first_tale=TALES_FIRST_SEED + 1_000_000,
        name_weight=4.0,
        seed=1,
        minutes=5.0,
    )
    descriptive: Phase = Phase(
        name="descriptive",
        steps=2000,
        rows_per_step=16,
        tasks=("descriptive",),
        rename_ratio=0.05,
        strangers_ratio=0.4,
        first_picture_ratio=0.5,
        matrix_rate=0.0,
        name_weight=4.0,
        seed=2,
        minutes=15.0,
    )
    adapter_rank: int = 8
    adapter_alpha: float = 16.0
    seed: int = 7


def cast_names() -> tuple[str, ...]:
    """Everybody in the train split who has a name."""
    return tuple(sorted({character.name for character in MAIN if character.name} | {name for name, _ in SIDE_NAMES}))


def answer_loss(model: Any, given: Batch, heavy: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """Mean cross entropy over the answers' tokens of one batch: what is trained, and what is reported.

    Tokens of `heavy` count `weight` times: a name is one token in twenty and the one that must be right.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = device_of(whole)
    labels_BN = torch.from_numpy(given.labels_BN).to(device)
    with autocast(device):
        hidden_BND = whole.model(
            input_ids=torch.from_numpy(given.ids_BN).to(device),
            pixel_values=None if given.images_BHWC is None else llava.pixels(given.images_BHWC).to(device),
            attention_mask=_additive(given.visible_B1NN, device),
            position_ids=torch.from_numpy(given.positions_BN).to(device),
            use_cache=False,
        ).last_hidden_state
        asked_BN = labels_BN[:, 1:] != IGNORED  # the logits of all other places are never computed
        logits = whole.lm_head(hidden_BND[:, :-1][asked_BN])
    asked = labels_BN[:, 1:][asked_BN]
    losses = nn.functional.cross_entropy(logits.float(), asked, reduction="none")
    if heavy is None:
        return losses.mean()
    weights = torch.isin(asked, heavy.to(device)).float() * (weight - 1.0) + 1.0
    return (losses * weights).sum() / weights.sum()


def _additive(visible_B1NN: npt.NDArray[np.bool_], device: torch.device) -> Tensor:
    """The mask as zeros and a large negative number, which attention adds to its scores."""
    visible = torch.from_numpy(visible_B1NN).to(device)
    return torch.zeros(visible.shape, dtype=fast_dtype(device), device=device).masked_fill_(~visible, -1e4)


def draw_rows(pool: Pool, phase: Phase, recipe: RowRecipe, tokenizer: StoryTokenizer, step: int) -> Iterator[Row]:
    """The rows of one step, from the phase's seed and the step alone."""
    frames, stories = pool.frames, pool.stories
    rng = random.Random(f"{phase.name} {phase.seed} {step}")
    if stories is None or rng.random() < phase.frames_ratio:
        count = phase.rows_per_step if stories is None else 3 * phase.rows_per_step  # these rows are much shorter
        for _ in range(count):
            yield frame_row(frames, rng.choice(frames.frames), recipe, tokenizer, rng)
    else:
        if rng.random() < phase.story_ratio:
            recipe = replace(recipe, tasks=("story",))
        # One place in the story per step keeps the rows of a batch about equally long.
        first = rng.random() < phase.first_picture_ratio
        index = 0 if first else rng.randrange(1, FRAMES_PER_STORY - 1)
        for _ in range(phase.rows_per_step):
            yield story_row(stories, rng.choice(stories.stories), index, recipe, tokenizer, rng)


class Tales:
    """Stories that nobody draws, so they never run out."""

    def __init__(self, phase: Phase, rows: RowRecipe, tokenizer: StoryTokenizer) -> None:
        self.phase, self.rows, self.tokenizer = phase, rows, tokenizer

    def batch(self, step: int, split: str = "train") -> Batch:
        """Step `step`'s tales, of seeds that no other step has."""
        first_seed = step * self.phase.rows_per_step + (self.phase.first_tale if split == "train" else 0)
        rng = random.Random(f"{self.phase.name} {self.phase.seed} {first_seed}")
        rows = []
        for seed in range(first_seed, first_seed + self.phase.rows_per_step):
            story = sample_story(seed, split=split)
            captions = renamed([f.caption for f in story.frames], story_names(story), self.rows.rename_ratio, rng)
            rows.append(tale_row(captions, self.rows, self.tokenizer, rng))
        return batch(rows, self.tokenizer.pad_id)


def rows_of(phase: Phase, shape: llava.LlavaShape) -> RowRecipe:
    """How a phase's rows are made."""
    return RowRecipe(
        tasks=phase.tasks,
        image_tokens_count=shape.image_tokens_count,
        context_tokens=shape.context_tokens,
        learn_captions_so_far=phase.learn_captions_so_far,
        rename_ratio=phase.rename_ratio,
    )


class TalesTrainee:
    """The tales phase."""

    def __init__(self, model: Any, phase: Phase, shape: llava.LlavaShape, tokenizer: StoryTokenizer) -> None:
        self.model, self.phase = model, phase
        self.tales = Tales(phase, rows_of(phase, shape), tokenizer)
        self.heavy = torch.tensor(name_tokens(tokenizer, cast_names()))
        self.networks = nn.ModuleDict({"llava": model})

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        """Mean cross entropy of the captions."""
        return answer_loss(self.model, self.tales.batch(step), self.heavy, self.phase.name_weight)

    def measure(self) -> dict[str, float]:
        """The same on the validation split, a name counting as any other token."""
        return {"loss": tales_loss(self.model, self.tales)}


def tales_loss(model: Any, tales: Tales) -> float:
    """Mean cross entropy of held-out tales."""
    batches = [tales.batch(step, "validation") for step in range(_HELD_OUT_STEPS)]
    return sum(float(answer_loss(model, one)) for one in batches) / len(batches)


@dataclass(frozen=True)
class Pool:
    """What a step draws from: single frames, and stories where there are any."""

    frames: Frames
    stories: Stories | None = None


@dataclass(frozen=True)
class Pools:
    """The world's own pictures and those of strangers."""

    known: Pool
    strangers: Pool

    def of(self, phase: Phase, step: int) -> Pool:
        """The pool of a step: strangers in `strangers_ratio` of them."""
        chance = random.Random(f"strangers {phase.name} {phase.seed} {step}").random()
        return self.strangers if chance < phase.strangers_ratio else self.known


class SightTrainee:
    """The sight phase."""

    def __init__(self, model: Any, phase: Phase, drawn: Pools, held_out: Pools) -> None:
        self.phase, self.drawn, self.held_out = phase, drawn, held_out
        tower = model.model.vision_tower
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(phase.seed)
            self.sight = Sight(tower, tower.config.hidden_size)
        self.networks = nn.ModuleDict({"sight": self.sight})

    def _batch(self, frames: Frames, step: int, count: int) -> tuple[Tensor, list[Scene]]:
        rng = random.Random(f"{self.phase.name} {self.phase.seed} {step}")
        chosen = [rng.choice(frames.frames) for _ in range(count)]
        images_BHWC = np.stack([degrade(frames.images_NHWC[frame.picture], rng) for frame in chosen])
        return llava.pixels(images_BHWC).to(device_of(self.networks)), [frame.scene for frame in chosen]

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        """Sum of the questions' cross entropies."""
        frames = self.drawn.of(self.phase, step).frames
        pixels_BCHW, scenes = self._batch(frames, step, self.phase.rows_per_step)
        with autocast(device_of(self.networks)):
            return questions.answer_loss(self.sight(pixels_BCHW), questions.answers(scenes))

    def measure(self) -> dict[str, float]:
        """Share of right answers about held-out frames, known characters and strangers."""
        figures: dict[str, float] = {}
        for prefix, pool in (("", self.held_out.known), ("strangers_", self.held_out.strangers)):
            pixels_BCHW, scenes = self._batch(pool.frames, 0, _SIGHT_HELD_OUT)
            hits, whole = questions.right(self.sight(pixels_BCHW), questions.answers(scenes))
            figures |= {prefix + name: float(hit.mean()) for name, hit in hits.items()}
            figures[prefix + "whole"] = float(whole.float().mean())
        return figures


class SpeechTrainee:
    """A phase that learns answers to questions: words, base, or an adapter's."""

    def __init__(
        self,
        model: Any,
        phase: Phase,
        shape: llava.LlavaShape,
        tokenizer: StoryTokenizer,
        drawn: Pools,
        held_out: Pools,
    ) -> None:
        self.model, self.phase, self.tokenizer = model, phase, tokenizer
        self.drawn, self.held_out = drawn, held_out
        self.rows = rows_of(phase, shape)
        self.tales = Tales(phase, self.rows, tokenizer)
        self.heavy = torch.tensor(name_tokens(tokenizer, cast_names()))
        self.networks = nn.ModuleDict({"llava": model})

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        """Mean cross entropy of the answers."""
        if random.Random(f"tales {self.phase.name} {self.phase.seed} {step}").random() < self.phase.tales_ratio:
            given = self.tales.batch(step)
        else:
            rows = list(draw_rows(self.drawn.of(self.phase, step), self.phase, self.rows, self.tokenizer, step))
            given = batch(rows, self.tokenizer.pad_id)
        return answer_loss(self.model, given, self.heavy, self.phase.name_weight)

    def measure(self) -> dict[str, float]:
        """The same loss on the validation split, a name counting as any other token."""
        losses = []
        for step in range(_HELD_OUT_STEPS):
            rows = list(draw_rows(self.held_out.known, self.phase, self.rows, self.tokenizer, step))
            losses.append(answer_loss(self.model, batch(rows, self.tokenizer.pad_id)).item())
        tales = {"tales": tales_loss(self.model, self.tales)} if self.phase.tales_ratio else {}
        return {"loss": sum(losses) / len(losses), **tales}


def stays_with_adam(name: str) -> bool:
    """Parameters that Muon is not made for: token and position tables, the first convolution, LoRA factors."""
    return any(part in name for part in ("embed", "lora_", "lm_head", "query", "_heads."))


def pools(recipe: CaptionsRecipe, work: Path, *, with_stories: bool) -> tuple[Pools, Pools]:
    """What is trained on and what is held out, drawn now or found in `work`."""

    def known(folder: str, cache: CacheRecipe) -> Pool:
        frames = draw_frames(work / folder, cache)
        return Pool(frames, draw_stories(work / folder, cache) if with_stories else None)

    drawn = Pool(shelf_frames(recipe.strangers), shelf_stories(recipe.strangers_stories) if with_stories else None)
    return (
        Pools(known("train", recipe.cache), drawn),
        Pools(known("validation", recipe.held_out), Pool(shelf_frames(recipe.held_out_strangers))),
    )


def train(recipe: CaptionsRecipe, tokenizer: StoryTokenizer, work: Path, out: Path) -> None:
    """Run every phase and write `llava/` and `adapters/` under `out`. Goes on where an earlier run stopped."""

    def speak(model: Any, phase: Phase) -> None:
        drawn, held_out = pools(recipe, work, with_stories=phase.frames_ratio < 1.0)
        trainee = SpeechTrainee(model, phase, recipe.shape, tokenizer, drawn, held_out)
        print(f"phase {phase.name}", flush=True)
        loop.train(trainee, phase.loop, work / f"{phase.name}.safetensors", adam_only=stays_with_adam)

    base = llava.build(recipe.shape, tokenizer, recipe.seed)
    tales_file = work / f"{recipe.tales.name}.safetensors"
    if not tales_file.is_file():  # it may have been started from a pack, with all that comes before learned already
        sight = SightTrainee(base, recipe.sight, *pools(recipe, work, with_stories=False))
        print("phase sight", flush=True)
        loop.train(sight, recipe.sight.loop, work / "sight.safetensors", adam_only=stays_with_adam)
        speak(base, recipe.words)
        speak(base, recipe.base)
    print("phase tales", flush=True)
    tales = TalesTrainee(base, recipe.tales, recipe.shape, tokenizer)
    loop.train(tales, recipe.tales.loop, tales_file, adam_only=stays_with_adam)
    speak(base, recipe.told)
    llava.save_base(base, tokenizer, out / "llava")
    Cast(cast_names()).save(out)
    for number, phase in enumerate((recipe.story, recipe.descriptive), start=1):
        # An adapter is trained on the weights it will be served with: those rounded to fp16.
        rounded = llava.load_base(out / "llava")
        adapted = llava.add_adapter(rounded, recipe.adapter_rank, recipe.adapter_alpha, recipe.seed + number)
        speak(adapted, phase)
        llava.save_adapter(adapted, out / "adapters" / phase.name)
    print(json.dumps({"written": str(out)}), flush=True)


def main() -> None:
    """Train the captioner."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="pack folder; its tokenizer/ is read")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokenizer = StoryTokenizer.load(arguments.out / "tokenizer")
    train(CaptionsRecipe(), tokenizer, training_dir() / FOLDER, arguments.out)


if __name__ == "__main__":
    main()
