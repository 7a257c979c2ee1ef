"""Checkpoints are complete or absent, and hold no code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.storage import Checkpoint, load_checkpoint, save_checkpoint, training_dir, with_prefix


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

    def full_disk(*arguments: object, **options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("training.storage.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, Checkpoint({"a": torch.ones(1)}, {"step": 2}))
    kept = load_checkpoint(path)
    assert kept is not None
    assert kept.facts == {"step": 1}


def test_the_training_folder_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_TRAINING_DIR", str(tmp_path / "t"))
    assert training_dir() == tmp_path / "t"
    assert (tmp_path / "t").is_dir()
