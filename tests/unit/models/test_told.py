"""Texts that a network has read before: the same numbers, and no text is read again in a later step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.models.drawing import begin
from services.models.lora import Adapter, AdapterSlots, LowRank, Worn, adapted_layers
from services.models.references import ReferenceCache, ReferencePolicy
from services.models.registry import FrameModel
from services.models.step import advance
from services.models.storygen import References, StoryGenUNet, build_storygen
from services.models.tiny import UNET

from .test_drawing import sketch

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def unet() -> StoryGenUNet:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build_storygen(UNET)


def rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(count, 4, 8, 8, generator=generator),
        torch.arange(count) * 90,
        torch.randn(count, 7, 16, generator=generator),
    )


@torch.no_grad()
def test_every_pass_gives_the_same_numbers_from_texts_that_were_read(unet: StoryGenUNet) -> None:
    latents, timesteps, text = rows(4)
    told = unet.read(text)
    plain, read = unet.features(latents, timesteps, text), unet.features(latents, timesteps, text, told)
    for name, states in plain.items():
        torch.testing.assert_close(read[name], states, **CLOSE)
    seen = References(unet.project(plain), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]))
    answer, deep = unet.predict_and_keep(latents, timesteps, text, seen)
    torch.testing.assert_close(unet.predict(latents, timesteps, text, seen, told), answer, **CLOSE)
    torch.testing.assert_close(unet.predict_and_keep(latents, timesteps, text, seen, told)[1], deep, **CLOSE)
    shallow = unet.predict_shallow(latents, timesteps, text, deep, seen, told)
    torch.testing.assert_close(shallow, unet.predict_shallow(latents, timesteps, text, deep, seen), **CLOSE)
    other = unet.read(text.flip(0))
    assert (unet.predict(latents, timesteps, text, seen, other) - answer).abs().max() > 1e-3


@torch.no_grad()
def test_what_was_read_wears_what_its_row_wears(unet: StoryGenUNet) -> None:
    slots = AdapterSlots(unet, count=1, rank_max=2)
    generator = torch.Generator().manual_seed(6)
    factors = {}
    for name, layer in adapted_layers(unet).items():
        if ".attn2.to_" in name:
            down = torch.randn(2, layer.weight.shape[1], generator=generator)
            factors[name] = LowRank(down, torch.randn(layer.weight.shape[0], 2, generator=generator) * 0.1, 2.0)
    slots.put(1, Adapter(digest="1" * 64, factors=factors, deltas={}, size_bytes=0))
    latents, timesteps, text = rows(2)
    outfits = [(Worn(1, 1.0),), ()]
    with slots.rows(outfits):
        expected = unet.predict(latents, timesteps, text)
        told = unet.read(text)
        torch.testing.assert_close(unet.predict(latents, timesteps, text, None, told), expected, **CLOSE)
    plain = unet.read(text)
    with slots.rows(outfits):
        assert (unet.predict(latents, timesteps, text, None, plain) - expected)[0].abs().max() > 1e-3


def test_a_frame_reads_each_text_once(tiny_model: FrameModel) -> None:
    unet = tiny_model.denoiser.unet
    assert isinstance(unet, StoryGenUNet)
    read: list[int] = []
    block = next(module for name, module in unet.named_modules() if name.endswith("attn2"))
    handle = block.to_k.register_forward_hook(lambda _m, args, _o: read.append(len(args[0])))
    try:
        drawing, cache = begin(tiny_model, sketch(3)), ReferenceCache()
        while not drawing.finished:
            advance(tiny_model, [drawing], cache)
    finally:
        handle.remove()
    assert len(drawing.steps) > 1
    assert read == [2 + 3]  # nothing's, the description's, three references'


def test_jobs_that_share_forwards_keep_their_own_texts(tiny_model: FrameModel) -> None:
    policy = ReferencePolicy(shared_noise=True)
    jobs = [sketch(2, description=text, policy=policy) for text in ("a cat runs", "a duck sleeps")]

    def drawn(*some: int) -> list[Tensor]:
        drawings, cache = [begin(tiny_model, jobs[number]) for number in some], ReferenceCache()
        while not drawings[0].finished:
            advance(tiny_model, drawings, cache)
        return [drawing.latents_CHW for drawing in drawings]

    together = drawn(0, 1)
    for number, latents in enumerate(together):
        torch.testing.assert_close(latents, drawn(number)[0], atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3
