"""One tiny pack and its models for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.models.pack import Pack
from services.models.registry import FrameModel, load_frame_model
from services.models.tiny import build_tiny_pack


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return build_tiny_pack(tmp_path_factory.mktemp("packs") / "tiny", captions=False)


@pytest.fixture(scope="session")
def tiny_model(tiny_pack: Pack) -> FrameModel:
    return load_frame_model(tiny_pack)


@pytest.fixture
def pack_folder(tmp_path: Path, tiny_pack: Pack) -> Path:
    """A copy of the tiny pack that a test may damage."""
    import shutil

    return Path(shutil.copytree(tiny_pack.folder, tmp_path / "tiny"))
