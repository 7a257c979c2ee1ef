"""Rough pictures from latents: the map that least squares find, its file, and what is no such map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from services.models.drawing import Sketch, begin, preview
from services.models.errors import PackWeightsMismatch
from services.models.glimpse import FILE, Glimpse, fitted_glimpse, load_glimpse
from services.models.pack import Pack, PackSettings, write_pack
from services.models.registry import load_frame_model
from services.models.step import advance
from services.models.tiny import build_tiny_pack


def test_a_linear_autoencoder_is_seen_through() -> None:
    torch.manual_seed(0)
    pictures = F.interpolate(torch.rand(12, 3, 8, 8), scale_factor=4, mode="nearest")
    latents = F.avg_pool2d(pictures, 4) * 2.0 - 1.0  # what an encoder that only shrinks would say
    glimpse = fitted_glimpse(latents, pictures, patch_px=4)
    assert glimpse.channels == 3
    assert (glimpse.decode(latents) - pictures).abs().max() < 0.01


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    glimpse = Glimpse(torch.randn(12, 5, 3, 3), torch.randn(12))
    glimpse.save(tmp_path)
    latents = torch.randn(2, 5, 4, 6)
    again = load_glimpse(tmp_path / FILE).decode(latents)
    assert again.shape == (2, 3, 8, 12)
    torch.testing.assert_close(again, glimpse.decode(latents), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("tensors", [{"weight": torch.zeros(12, 5, 3, 3)}, {"other": torch.zeros(1)}])
def test_another_file_is_refused_by_name(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="no map from latents to patches"):
        load_glimpse(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("weight", "bias"), [((12, 5, 1, 1), (12,)), ((10, 5, 3, 3), (10,)), ((12, 5, 3, 3), (3,))])
def test_other_shapes_are_refused(weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"patches|patch"):
        Glimpse(torch.zeros(weight), torch.zeros(bias))


def pack_with(glimpse: Glimpse, folder: Path) -> Pack:
    """The tiny pack, sealed again with a map."""
    pack = build_tiny_pack(folder, captions=False)
    glimpse.save(folder)
    return write_pack(folder, PackSettings(**{n: getattr(pack.manifest, n) for n in PackSettings.model_fields}))


def test_a_pack_that_brings_one_previews_with_it(tmp_path: Path) -> None:
    grey = Glimpse(torch.zeros(3 * 8 * 8, 4, 3, 3), torch.full((3 * 8 * 8,), 0.5))  # whatever the latents are
    model = load_frame_model(pack_with(grey, tmp_path))
    drawing = begin(
        model,
        Sketch(description="a cat", seed=1, width_px=64, height_px=32, steps=2, text_guidance=1.0, image_guidance=1.0),
    )
    advance(model, [drawing])
    seen = preview(model, drawing)
    assert seen.shape == (32, 64, 3)
    assert (seen == 128).all()


def test_a_map_of_another_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackWeightsMismatch, match="4 px of 4 channels; the VAE 8 px of 4"):
        load_frame_model(pack_with(Glimpse(torch.zeros(48, 4, 3, 3), torch.zeros(48)), tmp_path))
