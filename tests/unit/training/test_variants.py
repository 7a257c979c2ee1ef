"""Variants of the frame model's training: one thing differs, and what is drawn with knows of it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from services.models.registry import load_frame_model
from services.models.storygen import build_storygen
from services.models.tiny import build_tiny_pack
from services.models.toon import SCHEDULE, UNET
from training.evaluation import variants
from training.evaluation.variants import EPSILON, VARIANTS, recipe_of, with_variant
from training.recipes import toon_frame

DIFFERS = {"velocity": set(), "epsilon": {"schedule"}, "eighth": {"singles", "stories"}, "cast": {"singles", "stories"}}


def test_every_variant_differs_in_one_thing_and_ends_by_its_steps() -> None:
    pack = toon_frame()
    assert set(DIFFERS) == set(VARIANTS)
    for name, differs in DIFFERS.items():
        recipe = recipe_of(name, 450)
        assert recipe.loop.pace == replace(pack.loop.pace, steps=450, minutes=None)
        others = [field.name for field in fields(pack) if field.name != "loop"]
        assert {field for field in others if getattr(recipe, field) != getattr(pack, field)} == differs


def test_fewer_pictures_and_fewer_looks() -> None:
    pack, eighth, cast = toon_frame(), recipe_of("eighth", 1), recipe_of("cast", 1)
    for some, all_of_them in ((eighth.singles, pack.singles), (eighth.stories, pack.stories)):
        assert [shelf.count for shelf in some] == [shelf.count // 8 for shelf in all_of_them]
    assert [shelf.breadth for shelf in (*cast.singles, *cast.stories)] == ["scene", "story"]


def test_a_variant_is_drawn_with_its_own_weights_and_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model = load_frame_model(build_tiny_pack(tmp_path / "tiny"))
    torch.manual_seed(5)
    weights = build_storygen(UNET).state_dict()
    asked = []

    def trained(path: Path) -> dict[str, torch.Tensor]:
        asked.append(path.name)
        return weights

    monkeypatch.setenv("FABULA_TRAINING_DIR", str(tmp_path))
    monkeypatch.setattr(variants, "trained_frame", trained)
    for name, schedule in (("epsilon", EPSILON), ("velocity", SCHEDULE)):
        model = with_variant(tiny_model, name)
        assert model.manifest.schedule == schedule == model.denoiser.schedule.config
        assert model.denoiser.unet.state_dict()["conv_in.weight"].equal(weights["conv_in.weight"])
    assert asked == ["epsilon.safetensors", "velocity.safetensors"]
    assert tiny_model.manifest.schedule != EPSILON
