"""The draft LoRA learns the guided answer, and is shipped as what it learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.models.lora import AdapterSlots, Worn, read_adapter_file
from services.models.storygen import build_storygen
from services.models.toon import UNET
from training.draft import CHECKPOINT, DraftTrainee, export_draft, fingerprint
from training.frame import FrameTrainee
from training.loop import STARTED_FROM, step_generator, train
from training.recipes import toon_draft
from training.storage import FOLDER_VARIABLE, Checkpoint, load_checkpoint, save_checkpoint

from .test_frame import trainee  # noqa: F401 - a fixture

RECIPE = replace(toon_draft(), rank=4, rows=2, held_out_rows=4)


@pytest.fixture
def draft(trainee: FrameTrainee) -> DraftTrainee:  # noqa: F811
    return DraftTrainee(trainee, RECIPE)


def test_before_it_learned_it_is_the_network_without_guidance(draft: DraftTrainee) -> None:
    figures = draft.measure()
    assert figures["loss"] == pytest.approx(figures["unguided"])
    assert figures["loss"] > 0
    trained = {name for name, one in draft.base.denoiser.unet.named_parameters() if one.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_what_it_learns_is_guidance_and_is_what_is_shipped(
    draft: DraftTrainee, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = replace(RECIPE.loop, pace=replace(RECIPE.loop.pace, steps=15, warmup_steps=1), measure_every_s=1e9)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    path = tmp_path / CHECKPOINT
    result = train(draft, loop, path, say=lambda line: None, device="cpu")
    assert result.figures["loss"] < 0.8 * result.figures["unguided"]
    unet = build_storygen(UNET)
    adapted = draft.base.denoiser.unet.state_dict()
    unet.load_state_dict({name.replace("base_layer.", ""): v for name, v in adapted.items() if "lora_" not in name})
    shipped = tmp_path / "shipped.safetensors"
    with pytest.raises(ValueError, match="another frame model"):  # nobody wrote down who taught it
        export_draft(shipped, unet.state_dict(), "d" * 64, RECIPE.rank)
    found = load_checkpoint(path)
    assert found is not None
    save_checkpoint(path, Checkpoint(found.tensors, {**found.facts, STARTED_FROM: fingerprint(unet.state_dict())}))
    export_draft(shipped, unet.state_dict(), "d" * 64, RECIPE.rank)
    slots = AdapterSlots(unet, 1, RECIPE.rank)
    slots.put(1, read_adapter_file(shipped, unet, base_digest="d" * 64))
    example, _ = draft.base.story_example(draft.base.held_out, 2, step_generator(0, 0))
    noisy, levels = example.latents_BCHW + 0.5, torch.tensor([900, 300])
    with torch.no_grad():
        expected = draft.base.denoiser.unet.predict(noisy, levels, example.text_BSD)
        with slots.rows([(Worn(1, 1.0),)] * 2):
            answer = unet.predict(noisy, levels, example.text_BSD)
        plain = unet.predict(noisy, levels, example.text_BSD)
    torch.testing.assert_close(answer, expected, atol=5e-3, rtol=5e-2)  # stored in float16
    assert (answer - plain).abs().max() > 10 * (answer - expected).abs().max()


def test_a_draft_needs_rows_that_see_their_references(trainee: FrameTrainee) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="image guidance must be 1"):
        DraftTrainee(trainee, replace(RECIPE, image_guidance=1.5))
