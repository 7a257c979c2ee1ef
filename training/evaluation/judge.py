"""The judge: a small network that reads a toon picture's truth off its pixels.

It says who of the main cast is there (and whether anybody else), which setting, which time of day, and which actions,
moods and props are to be seen. It is trained on pictures that no pack is trained on, is no part of a pack, and is
shipped beside this file with its own accuracy, so that `make eval-toon` works in a fresh clone.

    python -m training.evaluation.judge [--minutes 6]     # trains it again

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
from training.storage import training_dir
from training.toon.cast import MAIN
from training.toon.scene import ACTIONS, MOODS, PROPS, SETTINGS, TIMES, Scene

SHIPPED = Path(__file__).with_name("judge_weights")
CHECKPOINT = "judge.safetensors"
CAST = tuple(character.id for character in MAIN)
# What each head answers. "one": exactly one is true; "many": each is true or not.
HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "characters": ("many", (*CAST, "somebody else")),
    "setting": ("one", SETTINGS),
    "time": ("one", TIMES),
    "actions": ("many", ACTIONS),
    "moods": ("many", MOODS),
    "props": ("many", PROPS),
}
_WIDTHS = (24, 48, 96, 128)


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """What the judge learns from, and on what its own accuracy is stated."""

    loop: LoopRecipe
    pictures: ShelfRecipe
    held_out: ShelfRecipe
    batch: int = 32


@dataclass(frozen=True)
class Verdict:
    """What is to be seen in one picture, in the world's words."""

    characters: frozenset[str]  # ids of the main cast
    somebody_else: bool
    setting: str
    time: str
    actions: frozenset[str]
    moods: frozenset[str]
    props: frozenset[str]


def truth(scene: Scene) -> Verdict:
    """What a perfect judge would say of `scene`."""
    labels = scene.labels()
    present = set(labels["characters"])
    props = {prop for prop in (*labels["props"], labels["ground_prop"]) if prop is not None}
    return Verdict(
        characters=frozenset(present & set(CAST)),
        somebody_else=bool(present - set(CAST)),
        setting=labels["setting"],
        time=labels["time"],
        actions=frozenset(labels["actions"]),
        moods=frozenset(labels["moods"]),
        props=frozenset(props),
    )


class Judge(nn.Module):
    """Convolutions down to 8×8, then one linear head per question over the mean and the maximum."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in _WIDTHS:
            layers += [_Convolution(before, width, stride=2), _Residual(width)]
            before = width
        self.body = nn.Sequential(*layers, _Residual(before))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * before, len(words)) for name, (_, words) in HEADS.items()})

    def forward(self, pixels_B3HW: Tensor) -> dict[str, Tensor]:
        """Logits per head. Pixels in −1..1."""
        features: Tensor = self.body(pixels_B3HW)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def verdicts(self, pictures: Pixels | Sequence[Pixels], batch: int = 64) -> list[Verdict]:
        """What is to be seen in each picture."""
        self.eval()
        found: list[Verdict] = []
        for first in range(0, len(pictures), batch):
            pixels = as_input(np.stack([np.asarray(p) for p in pictures[first : first + batch]]))
            answers = self(pixels.to(device_of(self)))
            found += [self._verdict({k: v[row] for k, v in answers.items()}) for row in range(len(answers["time"]))]
        return found

    def _verdict(self, logits: dict[str, Tensor]) -> Verdict:
        said: dict[str, Any] = {}
        for name, (kind, words) in HEADS.items():
            if kind == "one":
                said[name] = words[int(logits[name].argmax())]
            else:
                said[name] = frozenset(
                    word for word, logit in zip(words, logits[name].tolist(), strict=True) if logit > 0
                )
        return Verdict(
            characters=said["characters"] - {"somebody else"},
            somebody_else="somebody else" in said["characters"],
            setting=said["setting"],
            time=said["time"],
            actions=said["actions"],
            moods=said["moods"],
            props=said["props"],
        )


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


def targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Per head: class numbers `[B]` for "one", 0/1 floats `[B, words]` for "many"."""
    verdicts = [truth(scene) for scene in scenes]
    out: dict[str, Tensor] = {}
    for name, (kind, words) in HEADS.items():
        if kind == "one":
            out[name] = torch.tensor([words.index(getattr(v, name)) for v in verdicts])
            continue
        rows = []
        for verdict in verdicts:
            seen = set(getattr(verdict, name))
            if name == "characters" and verdict.somebody_else:
                seen.add("somebody else")
            rows.append([float(word in seen) for word in words])
        out[name] = torch.tensor(rows)
    return out


def agreement(said: Sequence[Verdict], true: Sequence[Verdict]) -> dict[str, float]:
    """Share of pictures whose whole answer is right, per question; `named_characters`: share of those told."""
    pairs = list(zip(said, true, strict=True))
    told = sum(len(t.characters) for _, t in pairs)
    return {
        "characters": sum(s.characters == t.characters for s, t in pairs) / len(pairs),
        "named_characters": sum(len(s.characters & t.characters) for s, t in pairs) / max(1, told),
        "setting": sum(s.setting == t.setting for s, t in pairs) / len(pairs),
        "time": sum(s.time == t.time for s, t in pairs) / len(pairs),
        "actions": sum(s.actions == t.actions for s, t in pairs) / len(pairs),
        "moods": sum(s.moods == t.moods for s, t in pairs) / len(pairs),
        "props": sum(s.props == t.props for s, t in pairs) / len(pairs),
    }


class JudgeTrainee:
    """A judge in training."""

    def __init__(self, judge: Judge, recipe: JudgeRecipe, folder: Path | None = None) -> None:
        self.judge = judge
        self.networks = nn.ModuleDict({"judge": judge})
        self.recipe = recipe
        self.pictures = shelf(recipe.pictures, folder=folder)
        self.targets = targets(recipe.pictures.scenes(recipe.pictures.seeds))
        self.held_out = shelf(recipe.held_out, folder=folder)
        self.held_out_truth = [truth(s) for s in recipe.held_out.scenes(recipe.held_out.seeds)]

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.pictures), (self.recipe.batch,), generator=generator)
        pixels = as_input(self.pictures[rows.numpy()])
        # A drawn picture is softer and its colours are off by a little; the judge must not care.
        gain = 1.0 + 0.1 * torch.randn(len(rows), 3, 1, 1, generator=generator)
        pixels = pixels * gain + 0.1 * torch.rand(len(rows), 1, 1, 1, generator=generator) * torch.randn(
            pixels.shape, generator=generator
        )
        shrunk = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
        soft = torch.rand(len(rows), 1, 1, 1, generator=generator) * 0.8
        pixels = pixels.lerp(shrunk, soft)
        device = device_of(self.networks)
        with autocast(device):
            answers = self.judge(pixels.to(device))
        total = torch.zeros((), device=device)
        for name, (kind, _) in HEADS.items():
            logits, wanted = answers[name].float(), self.targets[name][rows].to(device)
            if kind == "one":
                total = total + F.cross_entropy(logits, wanted)
            else:
                total = total + 4.0 * F.binary_cross_entropy_with_logits(logits, wanted)
        return total

    def measure(self) -> dict[str, float]:
        return agreement(self.judge.verdicts(self.held_out), self.held_out_truth)


def train_judge(recipe: JudgeRecipe) -> tuple[Judge, RunResult]:
    """Train, or continue, the judge; its checkpoint is `judge.safetensors` in the training folder."""
    torch.manual_seed(recipe.loop.seed)
    judge = Judge()
    result = train(
        JudgeTrainee(judge, recipe), recipe.loop, training_dir() / CHECKPOINT, adam_only=lambda name: "heads" in name
    )
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
        "trained_on": recipe.pictures.file_name,
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
