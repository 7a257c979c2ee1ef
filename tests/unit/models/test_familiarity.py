"""How familiar a picture is: the toon pack's own autoencoder tells its world from everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from services.models.familiarity import gain_over_shrinking_db, psnr_db
from services.models.registry import FrameModel, load_weights
from services.models.vae import Codec, LatentScaling, VaeShape, build_vae
from services.runtime.config import SHIPPED_PACKS
from training.toon.crayon import beach_day
from training.toon.knowledge import familiar_gain_db
from training.toon.render import render
from training.toon.world import sample_frame

SIZE = 128


@pytest.fixture(scope="module")
def toon() -> Codec:
    folder = SHIPPED_PACKS / "toon" / "vae"
    shape = VaeShape.from_dict(json.loads((folder / "config.json").read_text()))
    vae: Any = build_vae(shape)
    load_weights(vae, folder / "diffusion_pytorch_model.safetensors")
    ones = (1.0,) * shape.latent_channels
    return Codec(vae, LatentScaling(shift=ones, scale=ones))


@pytest.fixture(scope="module")
def level_db(toon: Codec) -> float:
    return familiar_gain_db(toon, pictures=12)


def gradient() -> Any:
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1)
    return np.stack([250 * y, 120 + 100 * x, 255 * (1 - y)], axis=-1).astype(np.uint8)


def clouds() -> Any:
    """Soft noise with the spectrum of a photograph."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None])
    frequency[0, 0] = 1
    noise = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIZE, SIZE))) / frequency**1.2).real for _ in range(3)]
    return np.stack([(n - n.mean()) / n.std() * 45 + 128 for n in noise], axis=-1).clip(0, 255).astype(np.uint8)


def fur() -> Any:
    """Strong colours under fine texture."""
    texture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    blurred = np.asarray(texture.filter(ImageFilter.GaussianBlur(0.8))).astype(float)
    return (gradient() + 1.6 * (blurred - 128)).clip(0, 255).astype(np.uint8)


def crayon() -> Any:
    return np.asarray(Image.fromarray(beach_day()).resize((SIZE, SIZE), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("split", ["test", "new"])
def test_pictures_of_the_packs_own_world_are_familiar(toon: Codec, level_db: float, split: str) -> None:
    for seed in range(3):
        assert gain_over_shrinking_db(toon, render(sample_frame(seed, split).scene, SIZE)) > level_db


@pytest.mark.parametrize("draw", [gradient, clouds, fur, crayon])
def test_photographs_textures_and_crayon_are_not(toon: Codec, level_db: float, draw: Callable[[], Any]) -> None:
    assert gain_over_shrinking_db(toon, draw()) < level_db


def test_the_measure_takes_any_size_and_is_always_the_same(tiny_model: FrameModel) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    kept = pixels.copy()
    first = gain_over_shrinking_db(tiny_model.codec, pixels)
    assert np.isfinite(first)
    assert gain_over_shrinking_db(tiny_model.codec, pixels) == first
    assert (pixels == kept).all()


def test_psnr_is_what_it_is_called() -> None:
    black, grey = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1)
    assert psnr_db(black, grey) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(black, black) == pytest.approx(60.0, abs=1e-4)
