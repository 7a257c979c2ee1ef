"""A tiny pack's models, and pictures to refer to."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from services.models.registry import FrameModel, load_frame_model
from services.models.tiny import build_tiny_pack


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> FrameModel:
    return load_frame_model(build_tiny_pack(tmp_path_factory.mktemp("packs") / "tiny", captions=False))


def picture(seed: int = 0, width_px: int = 64, height_px: int = 64) -> bytes:
    """A PNG of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def png_bytes() -> bytes:
    return picture()
