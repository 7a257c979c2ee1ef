"""Rough pictures from latents: the map that least squares find, its file, and what is no such map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from services.models.glimpse import FILE, Glimpse, fitted_glimpse, load_glimpse


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
