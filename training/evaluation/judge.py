"""The judge: a small network that reads a toon picture's truth off its pixels.

It looks where figures stand when there are one, two or three of them, and says of each who it is, what it looks like,
what it does, feels and holds; and of the picture where and when it is. It is trained on pictures that no pack is
trained on, is no part of a pack, and is shipped beside this file with its own accuracy, so that `make eval-toon` works
in a fresh clone.

    python -m training.evaluation.judge [--minutes 25]     # trains it again
    python -m training.evaluation.judge --measure          # on pictures as the world draws them today
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training.command import run_arguments, run_parser
from training.eyes import EyesRecipe, EyesTrainee, WorldEyes, adam_only
from training.loop import RunResult, train
from training.pictures import shelf
from training.precision import on_gpu
from training.storage import training_dir
from training.verdicts import agreement, truth

SHIPPED = Path(__file__).with_name("judge_weights")
CHECKPOINT = "judge.safetensors"


class Judge(WorldEyes):
    """Eyes that belong to no pack."""


def train_judge(recipe: EyesRecipe) -> tuple[Judge, RunResult]:
    """Train, or continue, the judge; its checkpoint is `judge.safetensors` in the training folder."""
    torch.manual_seed(recipe.loop.seed)
    judge = Judge()
    result = train(EyesTrainee(judge, recipe, "judge"), recipe.loop, training_dir() / CHECKPOINT, adam_only=adam_only)
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


def train_and_ship(recipe: EyesRecipe, folder: Path = SHIPPED) -> RunResult:
    """Train the judge and write it, with its accuracy, to `folder`."""
    judge, result = train_judge(recipe)
    facts = {
        "accuracy": result.figures,
        "pictures": recipe.held_out.pictures_count,
        "split": recipe.held_out.split,
        "steps": result.steps,
        "trained_on": ", ".join(one.file_name for one in recipe.shelves),
        "measured_on": recipe.held_out.file_name,
    }
    save_judge(judge, facts, folder)
    return result


def measure_shipped(recipe: EyesRecipe, folder: Path = SHIPPED, cache: Path | None = None) -> dict[str, float]:
    """Measure the judge in `folder` on today's world, and write that beside it: pictures may have changed since."""
    pictures, scenes = shelf(recipe.held_out, folder=cache), recipe.held_out.scenes(recipe.held_out.seeds)
    accuracy = agreement(load_judge(folder).verdicts(pictures), [truth(scene) for scene in scenes])
    facts = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
    facts |= {"accuracy": accuracy, "measured_on": recipe.held_out.file_name}
    (folder / "judge.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return accuracy


def main() -> None:
    """Train the judge and write it beside this file."""
    from training.recipes import toon_judge

    parser = run_parser(__doc__)
    parser.add_argument("--measure", action="store_true", help="only measure the shipped one on today's world")
    arguments = run_arguments(parser)
    if arguments.measure:
        print(f"judge: {measure_shipped(toon_judge())}")
        return
    result = train_and_ship(toon_judge(arguments.minutes, gpu=on_gpu()))
    print(f"judge: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}")


if __name__ == "__main__":
    main()
