"""A pack that does not fit is named before any of its weights is read; whoever knows better may try."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from services.frame import loading
from services.frame.config import FrameSettings
from services.frame.loading import free_memory_bytes, load_engine
from services.models.errors import PackTooLarge
from services.models.tiny import build_tiny_pack
from services.runtime.config import Installation

MIB = 1 << 20


def test_a_pack_that_does_not_fit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_HOME", str(tmp_path))
    build_tiny_pack(tmp_path / "packs" / "tiny", captions=False)
    monkeypatch.setattr(loading, "free_memory_bytes", lambda: MIB)
    read: list[Path] = []
    check = loading.load_pack

    def load_pack(folder: Path) -> object:
        read.append(folder)
        return check(folder)

    monkeypatch.setattr(loading, "load_pack", load_pack)
    with pytest.raises(PackTooLarge, match="'tiny' does not fit"):
        load_engine(FrameSettings.load(packs="tiny", threads=1, warm_up=False), Installation.load())
    assert read == []
    monkeypatch.setenv("FABULA_FRAME_CHECK_MEMORY", "false")
    load_engine(FrameSettings.load(packs="tiny", threads=1, warm_up=False), Installation.load()).stop()
    assert [folder.name for folder in read] == ["tiny"]


def test_the_shipped_pack_fits_a_small_machine() -> None:
    from services.models.footprint import check_room, footprint
    from services.models.pack import find_pack, read_manifest

    folder = find_pack("toon", Installation.load().pack_folders)
    check_room([footprint(folder, read_manifest(folder), unet_bytes=4)], free_bytes=256 * MIB)


def group(folder: Path, *, limit: str, used: int = 0, cached: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\nslab 2\n")
    return folder


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = psutil.virtual_memory()._replace(available=1000 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    folder = tmp_path / "group"
    assert free_memory_bytes(folder) == 1000 * MIB, "no container"
    assert free_memory_bytes(group(folder, limit="max")) == 1000 * MIB
    assert free_memory_bytes(group(folder, limit=str(500 * MIB), used=400 * MIB, cached=50 * MIB)) == 150 * MIB
    assert free_memory_bytes(group(folder, limit=str(9000 * MIB), used=MIB)) == 1000 * MIB
    assert free_memory_bytes(group(folder, limit=str(10 * MIB), used=400 * MIB)) == 0
    assert free_memory_bytes(group(folder, limit="soup")) == 1000 * MIB
