"""A pack that trains in seconds, and somebody new who fits into its window."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.models.world import World


@pytest.fixture(scope="module")
def tiny_packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pack `tiny`: random weights, a window wide enough for the world's descriptions."""
    from services.models.tiny import build_tiny_pack

    folder = tmp_path_factory.mktemp("packs")
    build_tiny_pack(folder / "tiny", captions=False, positions=400, world=World(characters={"Pip": "an orange cat"}))
    return folder
