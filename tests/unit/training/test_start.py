"""Starting from a pack: a grown network keeps what it knew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.start import grown, start_captions
from training.storage import FOLDER_VARIABLE


def test_the_same_shape_is_taken_over_whole() -> None:
    known = {"a.weight": torch.randn(3, 2), "a.steps": torch.tensor(4)}
    fresh = {"a.weight": torch.zeros(3, 2), "a.steps": torch.tensor(0)}
    found = grown(fresh, known)
    assert torch.equal(found["a.weight"], known["a.weight"])
    assert int(found["a.steps"]) == 4


def test_new_channels_stay_fresh_and_old_ones_keep_their_weights() -> None:
    known, fresh = {"conv_in.weight": torch.ones(2, 4, 1, 1)}, {"conv_in.weight": torch.zeros(2, 8, 1, 1)}
    weight = grown(fresh, known)["conv_in.weight"]
    assert torch.equal(weight[:, :4], torch.ones(2, 4, 1, 1))
    assert not weight[:, 4:].any()
    assert not fresh["conv_in.weight"].any()  # the argument is left alone


def test_means_and_log_variances_of_a_vae_grow_apart() -> None:
    known = {"quant_conv.weight": torch.arange(16.0).view(4, 4, 1, 1), "quant_conv.bias": torch.tensor([1.0, 2, 3, 4])}
    fresh = {"quant_conv.weight": torch.zeros(8, 8, 1, 1), "quant_conv.bias": torch.zeros(8)}
    found = grown(fresh, known)
    assert found["quant_conv.bias"].tolist() == [1, 2, 0, 0, 3, 4, 0, 0]
    square = found["quant_conv.weight"].view(8, 8)
    assert square[4, 5] == known["quant_conv.weight"].view(4, 4)[2, 3]
    assert square[0, 0] == 0
    assert square[1, 0] == 4
    assert int((square != 0).sum()) == 15


def test_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="not the same network"):
        grown({"a": torch.zeros(2)}, {"b": torch.zeros(2)})
    with pytest.raises(ValueError, match="does not fit"):
        grown({"a": torch.zeros(2)}, {"a": torch.zeros(3)})


def test_captions_do_not_start_beneath_phases_that_have_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "told.safetensors").touch()
    with pytest.raises(FileExistsError, match=r"told\.safetensors"):
        start_captions(None)  # type: ignore[arg-type]  # refused before the pack is read
