"""Trains the pack's text encoder to read descriptions, before any picture is drawn from them.

Pixels are a poor teacher of language: which of two characters jumps is worth little of a picture's error, so a network
that learns both at once draws the average pose. Here the encoder answers, slot by slot from left to right, who stands
there, looking how, doing what, and where and when all that is; descriptions cost nothing and never run out. The frame
model then learns to draw from its states, which no longer change.

    python -m training.text [--minutes 30] [--threads 1]

Shapes: B descriptions, S positions, D width; slots are the actors from left to right, and the scene comes last.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.models.text_encoder import TextEncoder
from services.models.tokenizer import StoryTokenizer
from services.models.toon import TEXT, toon_text_encoder
from training.command import run_arguments, run_parser
from training.loop import LoopRecipe, RunResult, train
from training.precision import autocast, device_of, on_gpu
from training.questions import Reader, answer_loss, answers, right
from training.storage import load_checkpoint, training_dir
from training.tokenizer import TOKENIZER_FOLDER
from training.toon.grammar import describe, describe_plainly
from training.toon.scene import Scene
from training.toon.world import Frame, sample_frame

CHECKPOINT = "text.safetensors"


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """What the text encoder learns to read."""

    loop: LoopRecipe
    batch: int = 48
    first_seed: int = 1_000_000  # from which on frames' descriptions are read; no other stage draws these
    strangers_share: float = 0.5  # of a batch: looks that the cast does not have, which must be read, not remembered
    crowd_pool: float = 1.5  # frames drawn per frame read; those with the fewest figures are left out
    plain_share: float = 0.4  # of a batch: in the one wording in which the captioner writes
    held_out_count: int = 400


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 40, (), generator=generator))


class TextTrainee:
    """A text encoder learning to read."""

    def __init__(self, text: TextEncoder, recipe: TextRecipe) -> None:
        self.text = text
        self.recipe = recipe
        model: Any = text.model
        model.set_attn_implementation("eager")  # torch's fused attention is slow backwards on a CPU
        self.reader = Reader(TEXT.width, TEXT.heads)
        self.networks = nn.ModuleDict({"text": text.model, "reader": self.reader})
        seeds = range(recipe.held_out_count)
        known = [sample_frame(seed, split="test") for seed in seeds]
        strangers = [sample_frame(seed, split="test", breadth="looks") for seed in seeds]
        self.held_out = {"": known, "strangers_": strangers}

    def _logits(self, texts: list[str]) -> dict[str, Tensor]:
        ids = self.text.token_ids(texts)
        padding = ids == self.text.tokenizer.pad_id
        longest = int((~padding).sum(dim=1).max())
        ids, padding = ids[:, :longest], padding[:, :longest]
        device = device_of(self.networks)
        with autocast(device):
            logits: dict[str, Tensor] = self.reader(self.text.states(ids), padding.to(device))
        return logits

    def _scenes(self, generator: torch.Generator) -> list[Scene]:
        """What a step reads about: frames that hardly any other step has, nor the same step of another process."""
        recipe = self.recipe
        strangers = round(recipe.batch * recipe.strangers_share)
        scenes: list[Scene] = []
        start = recipe.first_seed + _drawn(generator)
        for breadth, count in (("looks", strangers), ("scene", recipe.batch - strangers)):
            pool = round(count * recipe.crowd_pool)
            drawn = [sample_frame(seed, breadth=breadth).scene for seed in range(start, start + pool)]
            scenes += sorted(drawn, key=lambda scene: -len(scene.actors))[:count]
        return scenes

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        scenes = self._scenes(generator)
        rng = random.Random(_drawn(generator))
        texts = [describe_plainly(s) if rng.random() < self.recipe.plain_share else describe(s, rng) for s in scenes]
        return answer_loss(self._logits(texts), answers(scenes))

    def measure(self) -> dict[str, float]:
        """Share of right answers on held-out combinations; `whole`: of descriptions read without any mistake.

        `crowd_whole` are those of two or three figures; `strangers_…` the same of looks that the cast does not have.
        """
        figures: dict[str, float] = {}
        for prefix, frames in self.held_out.items():
            figures |= {prefix + name: value for name, value in self._read(frames).items()}
        return figures

    def _read(self, frames: Sequence[Frame]) -> dict[str, float]:
        hits: dict[str, list[Tensor]] = {"whole": []}
        for first in range(0, len(frames), 100):
            part = frames[first : first + 100]
            told, faultless = right(self._logits([f.description for f in part]), answers([f.scene for f in part]))
            hits["whole"].append(faultless.float())
            for name, hit in told.items():
                hits.setdefault(name, []).append(hit)
        crowd = torch.tensor([len(frame.scene.actors) > 1 for frame in frames])
        return {name: float(torch.cat(values).mean()) for name, values in hits.items()} | {
            "crowd_whole": float(torch.cat(hits["whole"])[crowd].mean())
        }


def fresh_text() -> TextEncoder:
    """The pack's text encoder with fresh weights and the pack's tokenizer."""
    tokenizer = StoryTokenizer.load(TOKENIZER_FOLDER)
    model = toon_text_encoder(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    return TextEncoder(model, tokenizer, bidirectional=TEXT.bidirectional)


def train_text(recipe: TextRecipe) -> RunResult:
    """Train, or continue, the text encoder; its checkpoint is `text.safetensors` in the training folder."""
    torch.manual_seed(recipe.loop.seed)
    trainee = TextTrainee(fresh_text(), recipe)
    return train(
        trainee,
        recipe.loop,
        training_dir() / CHECKPOINT,
        adam_only=lambda name: "embedding" in name or "heads" in name or name.endswith("query"),
    )


def trained_text() -> TextEncoder:
    """The text encoder that learned to read (averaged weights). Raises FileNotFoundError."""
    found = load_checkpoint(training_dir() / CHECKPOINT)
    if found is None:
        raise FileNotFoundError("no trained text encoder: run `python -m training.text`")
    text = fresh_text()
    weights = found.part("average") or found.part("networks")
    text.model.load_state_dict({n.removeprefix("text."): v for n, v in weights.items() if n.startswith("text.")})
    text.model.eval()
    return text


def main() -> None:
    """Train the toon pack's text encoder."""
    from training.recipes import toon_text

    arguments = run_arguments(run_parser(__doc__))
    result = train_text(toon_text(arguments.minutes, gpu=on_gpu()))
    print(f"text: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}")


if __name__ == "__main__":
    main()
