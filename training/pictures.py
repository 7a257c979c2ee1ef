"""Draws the world's frames once and keeps their pixels, so that training reads instead of drawing.

A shelf is one `.npy` file of uint8 pictures `[N, H, W, 3]`; its recipe (split, breadth, seeds, size) and the world's
edition are in its name, so a changed recipe is another file. Scenes and texts are not stored: they follow from the
seeds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.storage import training_dir
from training.toon.render import figure_mask, render
from training.toon.scene import Scene
from training.toon.world import EDITION, Frame, StoryFrame, sample_frame, sample_story

STORY_FRAMES = 5
STORY_BREADTHS = {"story": "scene", "strangers": "looks"}  # of a shelf: the world's breadth of its stories
_CHUNK = 250  # pictures one worker draws at a time

FIGURES_SHRINK = 4  # pixels along each side of what a mask of figures says one thing about

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ShelfRecipe:
    """Which frames: `count` seeds from `first_seed` on.

    `breadth` is the world's, or one of `STORY_BREADTHS` (five frames a seed).
    """

    split: str
    breadth: str
    count: int
    first_seed: int = 0
    size_px: int = 128
    masks: bool = False  # instead of pictures, where their figures are: 1 or 0, `[N, H/4, W/4]`

    @property
    def file_name(self) -> str:
        of = "-figures" if self.masks else ""
        return f"world{EDITION}-{self.breadth}-{self.split}-{self.first_seed}-{self.count}-{self.size_px}px{of}.npy"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the shelf's array."""
        cells = self.size_px // FIGURES_SHRINK
        one = (cells, cells) if self.masks else (self.size_px, self.size_px, 3)
        return self.pictures_count, *one

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.count)

    @property
    def pictures_count(self) -> int:
        return self.count * (STORY_FRAMES if self.breadth in STORY_BREADTHS else 1)

    def frames(self, seeds: Iterable[int]) -> Sequence[Frame | StoryFrame]:
        """The frames of some of its seeds, in the order of the pictures."""
        if self.breadth in STORY_BREADTHS:
            breadth = STORY_BREADTHS[self.breadth]
            return [frame for seed in seeds for frame in sample_story(seed, self.split, breadth).frames]
        return [sample_frame(seed, self.split, self.breadth) for seed in seeds]

    def scenes(self, seeds: Iterable[int]) -> list[Scene]:
        """The scenes of some of its seeds, in the order of the pictures."""
        return [frame.scene for frame in self.frames(seeds)]


def _draw(job: tuple[ShelfRecipe, int, int, str]) -> int:
    recipe, first, last, path = job
    per_seed = recipe.pictures_count // recipe.count
    scenes = recipe.scenes(recipe.seeds[first:last])
    pictures = np.lib.format.open_memmap(path, mode="r+")  # type: ignore[no-untyped-call]
    for offset, scene in enumerate(scenes):
        pictures[first * per_seed + offset] = _drawn(recipe, scene)
    return len(scenes)


def _drawn(recipe: ShelfRecipe, scene: Scene) -> Pixels:
    if not recipe.masks:
        return render(scene, recipe.size_px)
    rows, columns = recipe.shape[1:]
    cells = figure_mask(scene, recipe.size_px).reshape(rows, FIGURES_SHRINK, columns, FIGURES_SHRINK)
    seen: Pixels = cells.max(axis=3).max(axis=1).astype(np.uint8)
    return seen


def shelf(recipe: ShelfRecipe, workers: int = 1, folder: Path | None = None) -> Pixels:
    """The pictures of `recipe`, read-only and memory-mapped; drawn now if they are not there yet.

    A half-drawn shelf has another name, so an interrupted run starts it again.
    """
    home = (folder or training_dir()) / "pictures"
    home.mkdir(parents=True, exist_ok=True)
    path = home / recipe.file_name
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may draw the same
        empty = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=recipe.shape)  # type: ignore[no-untyped-call]
        empty.flush()
        jobs = [
            (recipe, first, min(first + _CHUNK, recipe.count), str(part)) for first in range(0, recipe.count, _CHUNK)
        ]
        if workers <= 1:
            for job in jobs:
                _draw(job)
        else:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for _ in pool.imap_unordered(_draw, jobs):
                    pass
        part.replace(path)
    pictures: Pixels = np.load(path, mmap_mode="r")
    return pictures


def main() -> None:
    """Draw one shelf ahead of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="train")
    parser.add_argument("--breadth", default="scene", choices=("scene", "looks", "wide", *STORY_BREADTHS))
    parser.add_argument("--count", type=int, required=True, help="seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    recipe = ShelfRecipe(
        split=arguments.split, breadth=arguments.breadth, count=arguments.count, first_seed=arguments.first_seed
    )
    print(shelf(recipe, arguments.workers).shape, recipe.file_name)


if __name__ == "__main__":
    main()
