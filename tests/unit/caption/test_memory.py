"""A captioner that does not fit is refused before it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.caption import loading
from services.caption.config import CaptionSettings
from services.caption.loading import build_engine
from services.models.captions.published import plan_captioner
from services.models.errors import PackTooLarge
from services.models.footprint import check_writer, writer_footprint
from services.models.library import Library
from services.models.pack import load_any_pack, read_any_manifest
from services.models.published import Told
from services.models.source import FolderSource
from services.models.tiny import build_tiny_pack
from services.runtime.config import Installation
from tests import caption_checkpoints as checkpoints

MIB = 1 << 20


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published captioner with adapters, and our own in a pack that draws too."""
    folder = tmp_path_factory.mktemp("memory")
    checkpoints.write_llava(folder / "llava", adapters=True)
    source = FolderSource(folder / "llava")
    plan, served = plan_captioner(source, source.files(), Told(licence="MIT", name="llava"))
    Library(folder / "packs", (folder / "packs",)).add(plan, served)
    build_tiny_pack(folder / "packs" / "tiny")
    return folder / "packs"


@pytest.mark.parametrize("name", ["llava", "tiny"])
@pytest.mark.parametrize("width", [2, 4])
def test_the_weights_of_a_captioner_are_counted_to_the_byte(packs: Path, name: str, width: int) -> None:
    manifest: Any = read_any_manifest(packs / name)
    wanted = [path for path in manifest.files if path.split("/")[0] in ("captioner", "llava", "adapters")]
    files = [path for path in wanted if path.endswith(".safetensors")]
    assert len(files) == 3, "the network and two adapters"
    numbers = sum(value.numel() for path in files for value in load_file(str(packs / name / path)).values())
    found = writer_footprint(packs / name, manifest, number_bytes=width, cache_bytes=7)
    assert (found.weights_bytes, found.working_bytes) == (numbers * width, 7)


def settings(**more: Any) -> CaptionSettings:
    return CaptionSettings.load(**{"pack": "llava", "warm_up": False, "device": "cpu", "kv_cache_mib": 8, **more})


def test_a_captioner_that_does_not_fit_is_refused_before_it_is_read(
    packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation = Installation.load(home=tmp_path, packs=str(packs))
    read: list[Path] = []

    def load(folder: Path) -> Any:
        read.append(folder)
        return load_any_pack(folder)

    monkeypatch.setattr(loading, "load_any_pack", load)
    monkeypatch.setattr(loading, "free_memory_bytes", lambda: 4 * MIB)
    with pytest.raises(
        PackTooLarge, match=r"'llava' does not fit: .* values of what is being written 8 MiB, and 4 MiB"
    ):
        build_engine(settings(), installation)
    assert read == []
    build_engine(settings(check_memory=False), installation)
    monkeypatch.setattr(loading, "free_memory_bytes", lambda: 64 * MIB)
    build_engine(settings(), installation)
    assert [folder.name for folder in read] == ["llava", "llava"]


def test_a_gpu_is_asked_for_what_it_may_give(packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's share of the whole, or what is free now; keys and values take what the weights leave."""
    installation = Installation.load(home=tmp_path, packs=str(packs))
    weights = writer_footprint(
        packs / "llava",
        read_any_manifest(packs / "llava"),  # type: ignore[arg-type]
        number_bytes=2,
        cache_bytes=0,
    ).weights_bytes
    memory = (0, 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: memory)
    for free, total, fits in (
        (weights, 2 * weights, True),
        (weights - 1, 9 * weights, False),
        (weights, weights, False),
    ):
        memory = (free, total)
        if fits:
            build_engine(settings(device="cuda"), installation)
        else:
            with pytest.raises(PackTooLarge, match="of the GPU's memory are free"):
                build_engine(settings(device="cuda"), installation)


def test_what_just_fits_fits_and_what_does_not_is_told_how_to_go_on(packs: Path) -> None:
    found = writer_footprint(packs / "llava", read_any_manifest(packs / "llava"), number_bytes=4, cache_bytes=0)  # type: ignore[arg-type]
    check_writer(found, free_bytes=found.weights_bytes, device="machine")
    with pytest.raises(PackTooLarge, match="FABULA_CAPTION_CHECK_MEMORY=false"):
        check_writer(found, free_bytes=found.weights_bytes - 1, device="machine")
