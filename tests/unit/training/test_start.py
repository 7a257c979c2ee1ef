"""Starting from a pack: a grown network keeps what it knew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.models.eyes import load_eyes
from services.models.pack import Pack, load_pack
from services.models.registry import load_frame_model
from training import start
from training.evaluation.judge import load_judge
from training.eyes import trained_eyes
from training.loop import STARTED_FROM
from training.start import grown, start_captions, with_more_inputs
from training.storage import FOLDER_VARIABLE, Checkpoint, load_checkpoint, save_checkpoint
from training.toon_pack import PACK
from training.vae import CHECKPOINT as VAE_CHECKPOINT
from training.vae import DECODER_CHECKPOINT, encoding_vae


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pack:
    """The shipped pack, to start from in a training folder of the test's own."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return load_pack(PACK)


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


def test_what_was_there_does_not_hear_what_is_new() -> None:
    known, fresh = {"conv.weight": torch.ones(2, 3, 1, 1)}, {"conv.weight": torch.full((4, 5, 1, 1), 7.0)}
    weight = grown(fresh, known)["conv.weight"][:, :, 0, 0]
    assert weight[:2].tolist() == [[1, 1, 1, 0, 0]] * 2
    assert weight[2:].tolist() == [[7] * 5] * 2
    assert with_more_inputs(torch.ones(2, 3), 5).tolist() == [[1, 1, 1, 0, 0]] * 2


def test_an_autoencoder_with_more_channels_begins_as_the_packs(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(start.toon.VAE, latent_channels=start.toon.VAE.latent_channels + 4)
    monkeypatch.setattr(start.toon, "VAE", shape)
    start.start_vae(pack)
    before, now = load_frame_model(pack).codec.vae.float(), encoding_vae()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        was, found = before.encode(pixels).latent_dist, now.encode(pixels).latent_dist
        old = was.mean.shape[1]
        assert torch.allclose(found.mean[:, :old], was.mean, atol=1e-5)
        assert torch.allclose(now.decode(found.mean).sample, before.decode(was.mean).sample, atol=1e-5)
        assert float(found.std[:, old:].max()) < 0.5  # a new channel is no noise
        assert float(found.mean[:, old:].std()) > 0.1  # and says something


def test_a_decoder_learns_on_from_the_autoencoder_and_says_whose_it_was(pack: Pack, tmp_path: Path) -> None:
    start.start_vae(pack)
    start.start_decoder(pack)
    kept, whole = load_checkpoint(tmp_path / DECODER_CHECKPOINT), load_checkpoint(tmp_path / VAE_CHECKPOINT)
    assert kept is not None
    assert whole is not None
    assert (kept.facts["step"], kept.facts[STARTED_FROM]) == (0, pack.digest)
    assert all(torch.equal(kept.tensors[name], value) for name, value in whole.tensors.items())

    (tmp_path / DECODER_CHECKPOINT).unlink()
    save_checkpoint(tmp_path / VAE_CHECKPOINT, Checkpoint(whole.tensors, {**whole.facts, "step": 5}))
    with pytest.raises(ValueError, match="no longer the pack's"):
        start.start_decoder(pack)


def test_the_eyes_and_the_judge_begin_as_those_that_are_shipped(pack: Pack, tmp_path: Path) -> None:
    start.start_eyes(pack)
    start.start_judge(pack)
    with pytest.raises(FileExistsError, match="move it away"):
        start.start_judge(pack)
    shipped = load_eyes(pack.folder)
    assert shipped is not None
    assert all(torch.equal(value, shipped.state_dict()[name]) for name, value in trained_eyes().state_dict().items())
    kept = load_checkpoint(tmp_path / "judge.safetensors")
    assert kept is not None
    assert all(torch.equal(kept.part("average")[f"judge.{n}"], value) for n, value in load_judge().state_dict().items())


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
