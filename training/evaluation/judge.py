"""The judge: a small network that reads a toon picture's truth off its pixels.

It looks where figures stand when there are one, two or three of them, and says of each who it is, what it looks like,
what it does, feels and holds; and of the picture where and when it is. It is trained on pictures that no pack is
trained on, is no part of a pack, and is shipped beside this file with its own accuracy, so that `make eval-toon` works
in a fresh clone.

    python -m training.evaluation.judge [--minutes 25]     # trains it again

Shapes: B pictures, uint8 `[B, 128, 128, 3]` outside and floats `[B, 3, 128, 128]` inside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from training.command import run_arguments, run_parser
from training.loop import LoopRecipe, RunResult, train
from training.pictures import Pixels, ShelfRecipe, shelf
from training.precision import autocast, device_of, on_gpu
from training.questions import (
    NO_PROP,
    PRESENT,
    SCENE_QUESTIONS,
    SLOT_QUESTIONS,
    SOMEBODY_ELSE,
    Answers,
    answer_loss,
    answers,
    scene_answers,
    slot_answers,
)
from training.storage import training_dir
from training.toon.scene import MAX_ACTORS, Scene

SHIPPED = Path(__file__).with_name("judge_weights")
CHECKPOINT = "judge.safetensors"
_WIDTHS = (32, 64, 128)
_CELLS = 16  # along each side of what the figures are looked for in
_GLIMPSES = 2  # a figure is looked at; each sees eight places
_LOOK_WIDTH = 192


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """What the judge learns from, and on what its own accuracy is stated."""

    loop: LoopRecipe
    shelves: tuple[ShelfRecipe, ...]
    held_out: ShelfRecipe
    batch: int = 32


@dataclass(frozen=True, kw_only=True)
class Someone:
    """One figure of a picture, in the world's words. `who` is an id of the main cast, or "somebody else"."""

    who: str
    species: str
    colour: str
    accessory: str
    accessory_colour: str
    action: str
    mood: str
    prop: str  # "none" for empty hands

    @property
    def look(self) -> tuple[str, str, str, str]:
        """What it is recognised by."""
        return self.species, self.colour, self.accessory, self.accessory_colour


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be seen in one picture: figures from left to right, and the place."""

    figures: tuple[Someone, ...]
    setting: str
    time: str
    side: str
    weather: str
    ground_prop: str  # "none" where nothing lies about

    @property
    def characters(self) -> frozenset[str]:
        """Ids of the main cast."""
        return frozenset(one.who for one in self.figures) - {SOMEBODY_ELSE}


def truth(scene: Scene) -> Verdict:
    """What a perfect judge would say of `scene`."""
    return Verdict(figures=tuple(Someone(**slot_answers(actor)) for actor in scene.actors), **scene_answers(scene))


class Judge(nn.Module):
    """Convolutions to 16×16 cells, glimpses at the six places where figures can stand, one linear answer per question.

    Places are those of pictures with one, two and three figures; how many there are decides which are believed.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in _WIDTHS:
            layers += [_Convolution(before, width, stride=2), _Residual(width)]
            before = width
        self.body = nn.Sequential(*layers, _Residual(before), _Residual(before))
        places = sum(range(1, MAX_ACTORS + 1)) * _GLIMPSES + 2 * _GLIMPSES  # the last ones look at the scene, and count
        self.query = nn.Parameter(torch.randn(places, _LOOK_WIDTH) * 0.1)
        self.cell = nn.Parameter(torch.randn(_CELLS * _CELLS, before) * 0.1)
        self.look = nn.MultiheadAttention(_LOOK_WIDTH, 8, kdim=before, vdim=before, batch_first=True)
        self.figure = nn.Sequential(nn.Linear(_GLIMPSES * _LOOK_WIDTH, 256), nn.ReLU(inplace=True))
        self.scene = nn.Sequential(nn.Linear(2 * _GLIMPSES * _LOOK_WIDTH, 256), nn.ReLU(inplace=True))
        self.answers = Answers(256, present=False)
        self.count = nn.Linear(256, MAX_ACTORS)

    def forward(self, pixels_B3HW: Tensor, count_B: Tensor | None = None) -> dict[str, Tensor]:
        """Logits per question, and `count`. Pixels in −1..1; figures are looked for where `count_B` of them stand.

        Without `count_B`, where as many stand as there seem to be.
        """
        features = F.adaptive_avg_pool2d(self.body(pixels_B3HW), _CELLS).flatten(2).transpose(1, 2)
        query = self.query[None].expand(len(features), -1, -1)
        seen, _ = self.look(query, features + self.cell, features, need_weights=False)
        seen = seen.unflatten(1, (-1, _GLIMPSES)).flatten(2)
        scene = self.scene(seen[:, -2:].flatten(1))
        count = self.count(scene)
        count_B = count.argmax(dim=1) + 1 if count_B is None else count_B
        first_B = count_B * (count_B - 1) // 2
        slots = first_B[:, None] + torch.arange(MAX_ACTORS, device=first_B.device)
        slots = slots.clamp_max(seen.shape[1] - 3)  # of too few figures, the others are not asked about
        figures = self.figure(torch.take_along_dim(seen, slots[:, :, None], dim=1))
        said: dict[str, Tensor] = self.answers(figures, scene)
        return said | {"count": count}

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


class _Convolution(nn.Sequential):
    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU(inplace=True)
        )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = _Convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


def as_input(pictures: Pixels) -> Tensor:
    """uint8 `[B, H, W, 3]` as floats `[B, 3, H, W]` in −1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _matched(said: Verdict, true: Verdict) -> list[tuple[Someone | None, Someone]]:
    """Each true figure with the one seen in its place; None where the picture has another number of figures."""
    if len(said.figures) != len(true.figures):
        return [(None, one) for one in true.figures]
    return list(zip(said.figures, true.figures, strict=True))


def outcomes(said: Sequence[Verdict], true: Sequence[Verdict]) -> dict[str, list[bool]]:
    """Right or wrong, per question: an entry a picture or, where said so, a figure (all wrong if their number is).

    characters      pictures with exactly the true ones of the main cast (and as many figures as there should be)
    whole           pictures in which everybody is who should be there, with the right look: nobody missing or blended
    look, colours   figures with the right species, colour and accessory; with the right colours alone
    action, mood    figures
    prop            pictures that have a thing, held or lying about: all of them right
    no_prop         pictures that have none: none seen
    """
    out: dict[str, list[bool]] = {
        name: []
        for name in ("count", "characters", "whole", "species", "look", "colours", "action", "mood", "prop", "no_prop")
    }
    out |= {name: [] for name in SCENE_QUESTIONS if name != "ground_prop"}
    for seen, real in zip(said, true, strict=True):
        pairs = _matched(seen, real)
        out["count"].append(len(seen.figures) == len(real.figures))
        out["characters"].append(out["count"][-1] and seen.characters == real.characters)
        out["whole"].append(all(a is not None and a.look == b.look for a, b in pairs))
        for a, b in pairs:
            out["species"].append(a is not None and a.species == b.species)
            out["look"].append(a is not None and a.look == b.look)
            out["colours"].append(a is not None and (a.colour, a.accessory_colour) == (b.colour, b.accessory_colour))
            out["action"].append(a is not None and a.action == b.action)
            out["mood"].append(a is not None and a.mood == b.mood)
        things = [(a.prop if a is not None else "", b.prop) for a, b in pairs] + [(seen.ground_prop, real.ground_prop)]
        has_one = any(b != NO_PROP for _, b in things)
        out["prop" if has_one else "no_prop"].append(all(a == b for a, b in things))
        for name in ("setting", "time", "side", "weather"):
            out[name].append(getattr(seen, name) == getattr(real, name))
    return out


def agreement(said: Sequence[Verdict], true: Sequence[Verdict]) -> dict[str, float]:
    """Share of right answers per question of `outcomes`; questions that never came up are left out."""
    return {name: sum(values) / len(values) for name, values in outcomes(said, true).items() if values}


class JudgeTrainee:
    """A judge in training."""

    def __init__(self, judge: Judge, recipe: JudgeRecipe, folder: Path | None = None) -> None:
        self.judge = judge
        self.networks = nn.ModuleDict({"judge": judge})
        self.recipe = recipe
        self.shelves = [shelf(one, folder=folder) for one in recipe.shelves]
        self.targets = answers([scene for one in recipe.shelves for scene in one.scenes(one.seeds)])
        self.held_out = shelf(recipe.held_out, folder=folder)
        self.held_out_truth = [truth(s) for s in recipe.held_out.scenes(recipe.held_out.seeds)]

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        rows = torch.randint(sum(map(len, self.shelves)), (self.recipe.batch,), generator=generator)
        pixels = as_input(self._take(rows.tolist()))
        # A drawn picture is softer and its colours are off by a little; the judge must not care.
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
            said = self.judge(pixels.to(device), count)
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
        return agreement(self.judge.verdicts(self.held_out), self.held_out_truth)


def _adam_only(name: str) -> bool:
    return "heads" in name or name.endswith(("query", "cell", "count.weight"))


def train_judge(recipe: JudgeRecipe) -> tuple[Judge, RunResult]:
    """Train, or continue, the judge; its checkpoint is `judge.safetensors` in the training folder."""
    torch.manual_seed(recipe.loop.seed)
    judge = Judge()
    result = train(JudgeTrainee(judge, recipe), recipe.loop, training_dir() / CHECKPOINT, adam_only=_adam_only)
    return judge, result


def save_judge(judge: Judge, facts: dict[str, Any], folder: Path = SHIPPED) -> None:
    """Write the judge's float16 weights and what is known about it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: v.detach().half().contiguous() for n, v in judge.state_dict().items()}, str(folder / "judge.safetensors")
    )
    (folder / "judge.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_judge(folder: Path = SHIPPED) -> Judge:
    """The shipped judge, in eval mode. Raises FileNotFoundError when it is not there."""
    judge = Judge()
    judge.load_state_dict({n: v.float() for n, v in load_file(str(folder / "judge.safetensors")).items()})
    judge.eval()
    return judge


def train_and_ship(recipe: JudgeRecipe, folder: Path = SHIPPED) -> RunResult:
    """Train the judge and write it, with its accuracy, to `folder`."""
    judge, result = train_judge(recipe)
    facts = {
        "accuracy": result.figures,
        "pictures": recipe.held_out.pictures_count,
        "split": recipe.held_out.split,
        "steps": result.steps,
        "trained_on": ", ".join(one.file_name for one in recipe.shelves),
    }
    save_judge(judge, facts, folder)
    return result


def main() -> None:
    """Train the judge and write it beside this file."""
    from training.recipes import toon_judge

    arguments = run_arguments(run_parser(__doc__))
    result = train_and_ship(toon_judge(arguments.minutes, gpu=on_gpu()))
    print(f"judge: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}")


if __name__ == "__main__":
    main()
