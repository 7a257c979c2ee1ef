"""Shelves hold what the world draws, and what is judged with was never trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from training.captions import CaptionsRecipe
from training.pictures import ShelfRecipe, shelf
from training.recipes import toon_clip, toon_decoder, toon_frame, toon_judge, toon_vae
from training.toon.cast import NEW
from training.toon.render import figure_mask, render
from training.toon.world import sample_frame
from training.vae import picture_batch


def test_a_shelf_holds_the_pictures_of_its_seeds(tmp_path: Path) -> None:
    recipe = ShelfRecipe(split="train", breadth="scene", count=5, first_seed=40, size_px=32)
    pictures = shelf(recipe, folder=tmp_path)
    assert pictures.shape == (5, 32, 32, 3)
    for picture, scene in zip(pictures, recipe.scenes(recipe.seeds), strict=True):
        assert np.array_equal(picture, render(scene, 32))


def test_a_story_shelf_has_five_pictures_a_seed_in_order(tmp_path: Path) -> None:
    recipe = ShelfRecipe(split="train", breadth="story", count=2, size_px=32)
    pictures = shelf(recipe, folder=tmp_path)
    assert len(pictures) == recipe.pictures_count == 10
    assert np.array_equal(pictures[7], render(recipe.scenes([1])[2], 32))


def test_a_shelf_is_drawn_once(tmp_path: Path) -> None:
    recipe = ShelfRecipe(split="train", breadth="scene", count=2, size_px=16)
    shelf(recipe, folder=tmp_path)
    path = tmp_path / "pictures" / recipe.file_name
    changed = np.load(path)
    changed[:] = 7
    np.save(path, changed)
    assert int(shelf(recipe, folder=tmp_path)[0, 0, 0, 0]) == 7


def _trained_on() -> list[ShelfRecipe]:
    frame = toon_frame()
    captions = CaptionsRecipe()
    return [
        *toon_vae().shelves,
        *toon_decoder().shelves,
        *frame.singles,
        *frame.stories,
        captions.strangers,
        captions.strangers_stories,
        toon_clip().pairs,
    ]


def test_nothing_is_trained_on_held_out_splits_or_new_characters() -> None:
    new = {character.id for character in NEW}
    for recipe in (*_trained_on(), *toon_judge().shelves):
        assert recipe.split == "train"
        for scene in recipe.scenes(list(recipe.seeds)[:40]):
            assert not new & set(scene.labels()["characters"])


def test_the_judge_learned_from_other_seeds_than_the_pack() -> None:
    for judge in toon_judge().shelves:
        for recipe in _trained_on():
            if recipe.breadth == judge.breadth:
                assert not set(recipe.seeds) & set(judge.seeds)
    assert toon_judge().held_out.split == "test"


def test_crops_lie_within_pictures(tmp_path: Path) -> None:
    import torch

    recipe = ShelfRecipe(split="train", breadth="scene", count=3, size_px=32)
    shelves = [(shelf(recipe, folder=tmp_path), shelf(replace(recipe, masks=True), folder=tmp_path))]
    batch, figures = picture_batch(shelves, 6, torch.Generator().manual_seed(0), crop_px=16)
    assert tuple(batch.shape) == (6, 3, 16, 16)
    assert tuple(figures.shape) == (6, 1, 16, 16)
    assert float(batch.min()) >= -1.0
    assert float(batch.max()) <= 1.0
    assert set(figures.unique().tolist()) <= {0.0, 1.0}
    whole, figures = picture_batch(shelves, 2, torch.Generator().manual_seed(0))
    assert tuple(whole.shape) == (2, 3, 32, 32)
    assert 0.05 < float(figures.mean()) < 0.7, "somebody is there, and not everywhere"


def test_a_mask_is_where_a_picture_would_change_without_its_figures() -> None:
    scene = sample_frame(3, split="train").scene
    mask = figure_mask(scene, 64)
    assert mask.shape == (64, 64)
    assert mask[20:56].mean() > mask[:8].mean(), "figures stand on the ground and leave the sky alone"
