"""Checkpoints are complete or absent, and hold no code."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training import customize, probes
from training.storage import Checkpoint, load_checkpoint, save_bytes, save_checkpoint, training_dir, with_prefix


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    tensors = with_prefix("net", {"weight": torch.randn(3, 2), "count": torch.tensor(4)})
    save_checkpoint(path, Checkpoint(tensors, {"step": 3, "figures": {"loss": 0.5}}))
    found = load_checkpoint(path)
    assert found is not None
    assert found.facts == {"step": 3, "figures": {"loss": 0.5}}
    assert torch.equal(found.part("net")["weight"], tensors["net.weight"])
    assert found.part("net").keys() == {"weight", "count"}
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_no_checkpoint_is_none_and_a_foreign_file_is_refused(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none.safetensors") is None
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "foreign.safetensors")


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, Checkpoint({"a": torch.zeros(1)}, {"step": 1}))

    def full_disk(_: object, part: Path, **options: object) -> None:
        part.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("training.storage.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, Checkpoint({"a": torch.ones(1)}, {"step": 2}))
    kept = load_checkpoint(path)
    assert kept is not None
    assert kept.facts == {"step": 1}
    assert list(tmp_path.iterdir()) == [path], "the half that was written gives its room back"


def test_a_full_disk_is_no_fuller_for_what_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    save_bytes(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("training.storage.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    # Weights, cards and probes are written by the same function: none of them leaves its half.
    assert customize.save_bytes is probes.save_bytes is save_bytes


def test_the_training_folder_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_TRAINING_DIR", str(tmp_path / "t"))
    assert training_dir() == tmp_path / "t"
    assert (tmp_path / "t").is_dir()
