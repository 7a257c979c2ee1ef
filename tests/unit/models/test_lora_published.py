"""LoRA of whole Stable Diffusion packs, text encoders included: as diffusers' own pipelines load our files."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from services.models.lora import Adapter, AdapterSlots, Form, LowRank, Worn, adapted_layers, read_adapter, write_adapter
from services.models.lora_formats import TEXT_2, UNET, Names
from services.models.registry import FrameModel, load_frame_model
from services.models.text_encoder import TextChange
from tests.stable_diffusion_checkpoints import KINDS, pipeline, sealed, write_checkpoint

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROMPT = "the cat and the dog, at night"
Pair = tuple[Any, FrameModel]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Diffusers' pipeline and our model of the same weights."""
    folder, kind = tmp_path_factory.mktemp("checkpoint"), request.param
    pipe = pipeline(kind)
    checkpoint = write_checkpoint(folder / "published", kind, pipe)
    return pipe, load_frame_model(sealed(checkpoint, folder / kind, kind))


def factors_of(network: nn.Module, pattern: str, seed: int) -> dict[str, LowRank]:
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, layer in adapted_layers(network).items():
        if re.search(pattern, name):
            ends = (1, 1) if layer.weight.ndim == 4 else ()
            down = 0.3 * torch.randn(3, *layer.weight.shape[1:], generator=generator)
            made[name] = LowRank(down, 0.3 * torch.randn(layer.weight.shape[0], 3, *ends, generator=generator), 2.0)
    return made


def an_adapter(model: FrameModel) -> Adapter:
    texts = {
        network: factors_of(module, r"[qv]_proj|out_proj|fc2", seed)
        for seed, (network, module) in enumerate(model.text.networks.items(), start=1)
    }
    unet = factors_of(model.denoiser.unet, r"to_[qv]|to_out|ff\.net\.2|resnets.*conv1|proj_in", 0)
    return Adapter(digest="", factors=unet, deltas={}, size_bytes=0, texts=texts)


@torch.no_grad()
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_pipeline_computes_what_we_do(pair: Pair, form: Form, tmp_path: Path) -> None:
    pipe, model = pair[0].__class__(**copy.deepcopy(pair[0].components)), pair[1]
    payload = write_adapter(an_adapter(model), form)
    adapter = read_adapter(payload, model.denoiser.unet, texts=model.text.networks)
    (tmp_path / "x.safetensors").write_bytes(payload)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    theirs = pipe.encode_prompt(
        PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, negative_prompt=None
    )
    plain = model.text.encode([PROMPT])
    ours = model.text.encode([PROMPT], changes=[TextChange(adapter.texts)])
    torch.testing.assert_close(ours[:, :77], theirs[0], **CLOSE)
    assert not torch.allclose(ours, plain, atol=1e-2)
    if TEXT_2 in model.text.networks:
        torch.testing.assert_close(ours[0, 77, : theirs[2].shape[1]], theirs[2][0], **CLOSE)
    assert torch.equal(model.text.encode([PROMPT]), plain), "for that call alone"
    unet = model.denoiser.unet
    slots = AdapterSlots(unet, count=1, rank_max=4)
    slots.put(1, adapter)
    latents, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([700])
    with slots.rows([(Worn(1, 1.0),)]):
        answer = unet.predict(latents, t, ours)
    words, told = unet._told(latents, ours)
    torch.testing.assert_close(answer, pipe.unet(latents, t, words, **told).sample, **CLOSE)
    assert not torch.allclose(answer, unet.predict(latents, t, ours), atol=1e-2)


@torch.no_grad()
def test_kohyas_names_of_the_first_code_are_read_as_by_diffusers(pair: Pair, tmp_path: Path) -> None:
    """What kohya's scripts write of SDXL: the UNet's blocks numbered through."""
    if TEXT_2 not in pair[1].text.networks:
        pytest.skip("only SDXL's scripts train the first code's UNet")
    pipe, model = pair[0].__class__(**copy.deepcopy(pair[0].components)), pair[1]
    adapter, names = an_adapter(model), Names(UNET, adapted_layers(model.denoiser.unet))
    first = {
        layer.replace(".", "_"): alias
        for alias, (layer, *_) in names.with_underscores.items()
        if alias.startswith(("input_blocks", "middle_block", "output_blocks"))
    }
    renamed = {}
    for key, value in load(write_adapter(adapter, "kohya")).items():
        module, _, rest = key.partition(".")
        told = first.get(module.removeprefix("lora_unet_"))
        renamed[f"lora_unet_{told}.{rest}" if told and module.startswith("lora_unet_") else key] = value
    assert sum("_blocks_" in key and "down_blocks" not in key for key in renamed) > 50
    payload = save(renamed)
    found = read_adapter(payload, model.denoiser.unet, texts=model.text.networks)
    assert found.factors.keys() == adapter.factors.keys()
    assert all(torch.equal(low.up, adapter.factors[name].up) for name, low in found.factors.items())
    (tmp_path / "x.safetensors").write_bytes(payload)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    unet, slots = model.denoiser.unet, AdapterSlots(model.denoiser.unet, count=1, rank_max=4)
    slots.put(1, found)
    latents, t, text = torch.ones(1, 4, 8, 8), torch.tensor([700]), model.text.encode([PROMPT])
    with slots.rows([(Worn(1, 1.0),)]):
        answer = unet.predict(latents, t, text)
    words, told = unet._told(latents, text)
    torch.testing.assert_close(answer, pipe.unet(latents, t, words, **told).sample, **CLOSE)
