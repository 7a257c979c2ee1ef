"""Studies of how the frame model is trained: one thing differs, all else is the recipe's, everybody from nothing.

    python -m training.evaluation.variants train velocity --steps 450 --threads 1     # resumable; a process for each
    python -m training.evaluation.variants measure velocity epsilon --frames 48       # the table for `training/LOG.md`

* `velocity`  the pack's: v-prediction from pure noise, all pictures
* `epsilon`   the network answers with the noise; a little signal is left in the last step, as noise alone says nothing
* `eighth`    an eighth of the pictures
* `cast`      without the pictures of other looks and the stories of strangers: two thirds of the pictures

So few steps draw no good pictures. What the judge says of the same held-out frames, of stories of the cast and of
strangers, tells which way learns faster, not where it would end. Checkpoints lie in the training folder, under
`variants`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from services.models.denoiser import StoryDenoiser
from services.models.pack import load_pack
from services.models.registry import FrameModel, load_frame_model
from services.models.schedule import Schedule, ScheduleConfig
from services.models.storygen import build_storygen
from services.models.toon import UNET
from training.evaluation.frames import Dials, held_out_stories, story_tasks
from training.evaluation.judge import load_judge
from training.evaluation.studies import drawn_figures, rows
from training.evaluation.toon import DEFAULT_PACK
from training.frame import FrameRecipe, adam_only, frame_trainee, trained_frame
from training.loop import RunResult, train
from training.pictures import ShelfRecipe
from training.recipes import toon_frame
from training.storage import training_dir

EPSILON = ScheduleConfig(prediction="epsilon", spacing="trailing", final_step_is_clean=True)
ASKED = ("characters", "look", "species", "colours", "mood", "action", "prop", "setting", "time")
HEROES = {"stories of the cast": "scene", "stories of strangers": "looks"}  # what is measured, and its breadth
_MAIN_CAST = ("scene", "story")  # breadths that show nobody else


def _fewer(shelves: tuple[ShelfRecipe, ...], share: int) -> tuple[ShelfRecipe, ...]:
    return tuple(replace(shelf, count=shelf.count // share) for shelf in shelves)


def _of_the_cast(shelves: tuple[ShelfRecipe, ...]) -> tuple[ShelfRecipe, ...]:
    return tuple(shelf for shelf in shelves if shelf.breadth in _MAIN_CAST)


VARIANTS: dict[str, Callable[[FrameRecipe], FrameRecipe]] = {
    "velocity": lambda recipe: recipe,
    "epsilon": lambda recipe: replace(recipe, schedule=EPSILON),
    "eighth": lambda recipe: replace(recipe, singles=_fewer(recipe.singles, 8), stories=_fewer(recipe.stories, 8)),
    "cast": lambda recipe: replace(recipe, singles=_of_the_cast(recipe.singles), stories=_of_the_cast(recipe.stories)),
}
"""What each changes of the recipe."""


def recipe_of(name: str, steps: int) -> FrameRecipe:
    """The pack's recipe with one difference, ending after so many steps whatever time they take."""
    recipe = VARIANTS[name](toon_frame())
    pace = replace(recipe.loop.pace, steps=steps, minutes=None)
    return replace(recipe, loop=replace(recipe.loop, pace=pace))


def checkpoint_of(name: str) -> Path:
    """Where a variant's weights lie."""
    return training_dir() / "variants" / f"{name}.safetensors"


def train_variant(name: str, steps: int) -> RunResult:
    """Train, or continue, one of them."""
    recipe, path = recipe_of(name, steps), checkpoint_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.loop.seed)
    return train(frame_trainee(recipe), recipe.loop, path, adam_only=adam_only)


def with_variant(model: FrameModel, name: str) -> FrameModel:
    """The pack's model with a variant's UNet and schedule. Raises FileNotFoundError before that was trained."""
    unet = build_storygen(UNET)
    unet.load_state_dict(trained_frame(checkpoint_of(name)))
    unet.requires_grad_(False)
    schedule = VARIANTS[name](toon_frame()).schedule
    manifest = model.manifest.model_copy(update={"schedule": schedule})
    return replace(model, denoiser=StoryDenoiser(unet, Schedule(schedule)), manifest=manifest)


def main() -> None:
    """Train one, or measure some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("variants", nargs="+", choices=tuple(VARIANTS))
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK, help="whose other networks draw with them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "train":
        for name in arguments.variants:
            result = train_variant(name, arguments.steps)
            print(f"{name}: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}", flush=True)
        return
    model, judge = load_frame_model(load_pack(arguments.pack)), load_judge()
    side = model.manifest.width_px
    for title, breadth in HEROES.items():
        stories = held_out_stories(-(-arguments.frames // 4), 7, breadth=breadth)
        tasks = story_tasks(stories, arguments.frames, side, 7)
        lines = [
            (name, drawn_figures(with_variant(model, name), judge, tasks, Dials(), ASKED))
            for name in arguments.variants
        ]
        print(rows(title, lines), flush=True)


if __name__ == "__main__":
    main()
