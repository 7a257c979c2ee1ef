"""Trains the toon pack's eyes (`services.models.eyes`): who stands in a picture, and what they look like.

The captioner is told what they read off a given first frame, and the autoencoder is taught to keep what they can see.
The judge of `make eval-toon` is the same kind of network with other weights, from other pictures: see
`training.evaluation.judge`.

    python -m training.eyes [--minutes 50] [--threads 1]

Shapes: B pictures, uint8 `[B, 128, 128, 3]` outside and floats `[B, 3, 128, 128]` inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.eyes import Eyes, EyesShape, as_input
from training.command import run_arguments, run_parser
from training.loop import LoopRecipe, RunResult, train
from training.pictures import Pixels, ShelfRecipe, shelf
from training.precision import autocast, device_of, on_gpu
from training.questions import PRESENT, SCENE_QUESTIONS, SLOT_QUESTIONS, answer_loss, answers
from training.storage import load_checkpoint, training_dir
from training.toon.lexicon import PAIRWISE_ACCESSORIES
from training.verdicts import Someone, Verdict, agreement, truth

CHECKPOINT = "eyes.safetensors"
WORLD = EyesShape(figure=SLOT_QUESTIONS, scene=SCENE_QUESTIONS, plural=PAIRWISE_ACCESSORIES)


@dataclass(frozen=True, kw_only=True)
class EyesRecipe:
    """What eyes learn from, and on what their accuracy is stated."""

    loop: LoopRecipe
    shelves: tuple[ShelfRecipe, ...]
    held_out: ShelfRecipe
    batch: int = 32


class WorldEyes(Eyes):
    """Eyes that are asked everything the world knows about a picture."""

    def __init__(self) -> None:
        super().__init__(WORLD)

    @torch.no_grad()
    def verdicts(self, pictures: Pixels | Sequence[Pixels], batch: int = 64) -> list[Verdict]:
        """What is to be seen in each picture."""
        self.eval()
        found: list[Verdict] = []
        for first in range(0, len(pictures), batch):
            pixels = as_input(np.stack([np.asarray(p) for p in pictures[first : first + batch]]))
            said = {name: v.argmax(dim=-1).tolist() for name, v in self(pixels.to(device_of(self))).items()}
            found += [_verdict(said, row) for row in range(len(pixels))]
        return found


def _verdict(said: dict[str, Any], row: int) -> Verdict:
    figures = tuple(
        Someone(**{name: words[said[name][row][slot]] for name, words in SLOT_QUESTIONS.items()})
        for slot in range(said["count"][row] + 1)
    )
    return Verdict(figures=figures, **{name: words[said[name][row]] for name, words in SCENE_QUESTIONS.items()})


class EyesTrainee:
    """Eyes in training: `name` is what their weights are called in checkpoints."""

    def __init__(self, eyes: WorldEyes, recipe: EyesRecipe, name: str, folder: Path | None = None) -> None:
        self.eyes = eyes
        self.networks = nn.ModuleDict({name: eyes})
        self.recipe = recipe
        self.shelves = [shelf(one, folder=folder) for one in recipe.shelves]
        self.targets = answers([scene for one in recipe.shelves for scene in one.scenes(one.seeds)])
        self.held_out = shelf(recipe.held_out, folder=folder)
        self.held_out_truth = [truth(s) for s in recipe.held_out.scenes(recipe.held_out.seeds)]

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        rows = torch.randint(sum(map(len, self.shelves)), (self.recipe.batch,), generator=generator)
        pixels = as_input(self._take(rows.tolist()))
        # A drawn picture is softer and its colours are off by a little; eyes must not care.
        gain = 1.0 + 0.04 * torch.randn(len(rows), 3, 1, 1, generator=generator)
        pixels = pixels * gain + 0.1 * torch.rand(len(rows), 1, 1, 1, generator=generator) * torch.randn(
            pixels.shape, generator=generator
        )
        shrunk = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
        soft = torch.rand(len(rows), 1, 1, 1, generator=generator) * 0.8
        pixels = pixels.lerp(shrunk, soft)
        device = device_of(self.networks)
        wanted = {name: true[rows].to(device) for name, true in self.targets.items()}
        count = wanted.pop(PRESENT).sum(dim=1)
        with autocast(device):
            said = self.eyes(pixels.to(device), count)
        return answer_loss(said, wanted) + F.cross_entropy(said["count"].float(), count - 1)

    def _take(self, rows: Sequence[int]) -> Pixels:
        """Pictures of all shelves, one behind the other."""
        taken = []
        for row in rows:
            for one in self.shelves:
                if row < len(one):
                    taken.append(one[row])
                    break
                row -= len(one)
        return np.stack(taken)

    def measure(self) -> dict[str, float]:
        return agreement(self.eyes.verdicts(self.held_out), self.held_out_truth)


def adam_only(name: str) -> bool:
    """Parameters of eyes that Muon is not for."""
    return "heads" in name or name.endswith(("query", "cell", "count.weight"))


def train_eyes(recipe: EyesRecipe) -> RunResult:
    """Train, or continue, the pack's eyes; their checkpoint is `eyes.safetensors` in the training folder."""
    torch.manual_seed(recipe.loop.seed)
    trainee = EyesTrainee(WorldEyes(), recipe, "eyes")
    return train(trainee, recipe.loop, training_dir() / CHECKPOINT, adam_only=adam_only)


def trained_eyes(folder: Path | None = None) -> WorldEyes:
    """The pack's eyes (averaged weights, eval mode). Raises FileNotFoundError."""
    found = load_checkpoint((folder or training_dir()) / CHECKPOINT)
    if found is None:
        raise FileNotFoundError("no trained eyes: run `python -m training.eyes`")
    eyes = WorldEyes()
    eyes.load_state_dict({n.removeprefix("eyes."): v for n, v in found.part("average").items()})
    return eyes.eval()


def main() -> None:
    """Train the toon pack's eyes."""
    from training.recipes import toon_eyes

    arguments = run_arguments(run_parser(__doc__))
    result = train_eyes(toon_eyes(arguments.minutes, gpu=on_gpu()))
    print(f"eyes: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}")


if __name__ == "__main__":
    main()
