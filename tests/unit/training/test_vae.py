"""The autoencoder's losses: what keeps latents where a pack has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.models.vae import Codec, LatentScaling, VaeShape, build_vae
from training.loop import LoopRecipe, step_generator
from training.optimizer import OptimizerRecipe, Pace
from training.pictures import ShelfRecipe
from training.vae import VaeRecipe, VaeTrainee

SHAPE = VaeShape(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=32, latent_channels=2)


@pytest.fixture
def recipe() -> VaeRecipe:
    return VaeRecipe(
        loop=LoopRecipe(pace=Pace(steps=1), optimizer=OptimizerRecipe(matrix_rate=0.0, rate=0.0)),
        shelves=(ShelfRecipe(split="train", breadth="scene", count=4, size_px=32),),
        held_out=(),
        crop_px=16,
    )


def test_old_channels_are_kept_close_and_new_ones_are_free(recipe: VaeRecipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    packs = Codec(build_vae(SHAPE), LatentScaling(shift=(0.25, -0.5), scale=(2.0, 3.0)))
    vae = build_vae(replace(SHAPE, latent_channels=3))

    # A batch is one whole picture here, so what is added is the distance of one of the shelf's.
    whole = replace(recipe, crop_px=32, near_weight=0.7, batch=1)
    trainee = VaeTrainee(vae, whole, tmp_path, near=packs)
    pixels = torch.from_numpy(trainee.shelves[0][0].copy()).permute(0, 3, 1, 2)
    with torch.no_grad():
        one = float(trainee.loss(0, 0.0, step_generator(1, 0)))
        bare = float(VaeTrainee(vae, replace(whole, near_weight=0.0), tmp_path).loss(0, 0.0, step_generator(1, 0)))
        apart = []
        for picture in pixels:
            was = packs.encode(picture[None].float() / 255)
            now = packs.normalised(vae.encode(picture[None].float() / 127.5 - 1).latent_dist.mean[:, :2])
            apart.append(float((now - was).square().mean()))
    assert min(abs(one - bare - 0.7 * each) for each in apart) < 1e-3
