"""StoryGen's network: the published layout, and what references do to a block."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from services.models import tiny, toon
from services.models.storygen import References, StoryGenBlock, StoryGenConfig, StoryGenUNet, build_storygen

NEW = re.compile(
    r"\.transformer_blocks\.0\.(attn3\.(to_q|to_k|to_v)\.weight|attn3\.to_out\.0\.(weight|bias)|norm4\.(weight|bias))$"
)


@pytest.fixture(scope="module")
def unet() -> StoryGenUNet:
    torch.manual_seed(0)
    fresh = build_storygen(tiny.UNET)
    with torch.no_grad():
        for name, value in fresh.named_parameters():
            if re.search(r"\.norm\d\.", name):  # else all norms of a block are the same one
                value.add_(torch.randn_like(value) * 0.2)
    return fresh


def rows(count: int, *, h: int = 8, w: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 4, h, w, generator=generator),
        torch.randint(0, 1000, (count,), generator=generator),
        torch.randn(count, 12, 16, generator=generator),
    )


def test_stable_diffusion_configuration_has_the_798_published_keys() -> None:
    with torch.device("meta"):
        state = build_storygen(StoryGenConfig()).state_dict()
        plain = UNet2DConditionModel(**StoryGenConfig().to_dict()).state_dict()
    new = {key for key in state if NEW.search(key)}
    assert len(state) == 798
    assert len(plain) == 686
    assert set(state) - new == set(plain)
    places = {f"down_blocks.{b}.attentions.{a}" for b in (0, 1, 2) for a in (0, 1)}
    places |= {f"up_blocks.{b}.attentions.{a}" for b in (1, 2, 3) for a in (0, 1, 2)} | {"mid_block.attentions.0"}
    assert {key.split(".transformer_blocks")[0] for key in new} == places
    assert len(new) == 112 == 7 * len(places)
    assert sum(value.numel() for value in state.values()) == pytest.approx(909.12e6, rel=1e-5)
    assert sum(state[key].numel() for key in new) == pytest.approx(49.60e6, rel=1e-4)


def test_toon_network_keeps_its_budget() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = build_storygen(toon.UNET)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            network.predict(
                torch.empty(1, toon.LATENT_CHANNELS, 16, 16), torch.zeros(1), torch.empty(1, toon.TEXT_POSITIONS, 192)
            )
    assert flops.get_total_flops() <= 1.65e9  # attention included
    assert 7e6 <= sum(p.numel() for p in network.parameters()) <= 9e6


def test_without_references_it_is_the_plain_network(unet: StoryGenUNet) -> None:
    plain = UNet2DConditionModel(**tiny.UNET.to_dict()).eval()
    plain.load_state_dict({k: v for k, v in unet.state_dict().items() if not NEW.search(k)})
    latents, t, text = rows(3)
    with torch.no_grad():
        torch.testing.assert_close(unet.predict(latents, t, text), plain(latents, t, text).sample)


def block_by_hand(block: StoryGenBlock, h: Tensor, text: Tensor, reference: Tensor | None) -> Tensor:
    """The published block, written out with explicit softmaxes."""

    def attend(attention: torch.nn.Module, query: Tensor, context: Tensor) -> Tensor:
        heads = attention.heads
        q, k, v = (
            layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, x in ((attention.to_q, query), (attention.to_k, context), (attention.to_v, context))
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2))

    n1 = block.norm1(h)
    h = h + attend(block.attn1, n1, n1)
    h_text = h + attend(block.attn2, block.norm2(h), text)
    if reference is not None:
        # The query is normalised, the reference is not; both branches carry the residual.
        h_text = h_text + h + attend(block.attn3, block.norm4(h), reference)
    return h_text + block.ff(block.norm3(h_text))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_residual_counts_twice_only_with_references(unet: StoryGenUNet, count: int) -> None:
    block = next(m for m in unet.modules() if isinstance(m, StoryGenBlock))
    dim = block.norm4.normalized_shape[0]
    h, text, seen = torch.randn(2, 16, dim), torch.randn(2, 5, 16), torch.randn(2 * count, 16, dim)
    arguments = {}
    if count:
        numbers = torch.arange(2 * count).view(2, count)
        arguments = {"storygen": storygen_pass(References({block.key: block.attn3.project(seen)}, numbers))}
    with torch.no_grad():
        out = block(h, encoder_hidden_states=text, cross_attention_kwargs=arguments)
        by_hand = block_by_hand(block, h, text, seen.view(2, 16 * count, dim) if count else None)
    torch.testing.assert_close(out, by_hand, atol=1e-5, rtol=1e-5)


def storygen_pass(references: References) -> object:
    from services.models.storygen import _Pass

    return _Pass(references=references)


def test_blank_references_are_not_the_same_as_none(unet: StoryGenUNet) -> None:
    latents, t, text = rows(1)
    with torch.no_grad():
        features = unet.features(torch.zeros_like(latents), t // 10, text)
        blank = unet.predict(latents, t, text, References(unet.project(features), torch.zeros(1, 1, dtype=torch.long)))
        assert (blank - unet.predict(latents, t, text)).abs().max() > 1e-2


def test_the_reference_pass_ends_where_the_last_feature_was_taken(unet: StoryGenUNet) -> None:
    calls: list[str] = []
    handle = unet.conv_out.register_forward_hook(lambda *_: calls.append("conv_out"))
    latents, t, text = rows(1)
    with torch.no_grad():
        features = unet.features(latents, t, text)
        assert calls == []
        unet.predict(latents, t, text)
    handle.remove()
    assert calls == ["conv_out"]
    assert features.keys() == set(unet.block_keys)


def test_feature_is_taken_after_self_attention_and_before_the_text(unet: StoryGenUNet) -> None:
    latents, t, text = rows(2)
    first = unet.block_keys[0]
    with torch.no_grad():
        feature = unet.features(latents, t, text)[first]
        same = unet.features(latents, t, text * 3)[first]
        other = unet.features(latents * 3, t, text)[first]
    torch.testing.assert_close(feature, same)
    assert (feature - other).abs().max() > 1e-3


@pytest.mark.parametrize(("h", "w"), [(4, 4), (5, 7), (16, 16), (3, 12), (9, 6)])
def test_blocks_are_matched_by_place_at_any_picture_size(unet: StoryGenUNet, h: int, w: int) -> None:
    latents, t, text = rows(2, h=h, w=w)
    with torch.no_grad():
        features = unet.features(latents, t // 10, text)
        out = unet.predict(latents, t, text, References(unet.project(features), torch.tensor([[0, 1], [1, 0]])))
    assert set(features) == set(unet.block_keys)
    assert len(features) == 7
    assert features[unet.block_keys[0]].shape[1] == h * w
    assert out.shape == latents.shape


def test_reference_order_does_not_matter_to_attention(unet: StoryGenUNet) -> None:
    latents, t, text = rows(3)
    with torch.no_grad():
        features = unet.features(latents, t // 10, text)
        one = unet.predict(latents[:1], t[:1], text[:1], References(unet.project(features), torch.tensor([[0, 1, 2]])))
        two = unet.predict(latents[:1], t[:1], text[:1], References(unet.project(features), torch.tensor([[2, 0, 1]])))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_rows_with_different_numbers_of_references_share_a_batch(unet: StoryGenUNet) -> None:
    latents, t, text = rows(4)
    with torch.no_grad():
        features = unet.features(latents, t // 10, text)
        sees = [[], [0], [1, 2], [0, 1, 3]]
        numbers = torch.tensor([row + [0] * (3 - len(row)) for row in sees])
        present = torch.tensor([[slot < len(row) for slot in range(3)] for row in sees])
        together = unet.predict(latents, t, text, References(unet.project(features), numbers, present))
        for i, row in enumerate(sees):
            references = References(unet.project(features), torch.tensor([row])) if row else None
            alone = unet.predict(latents[i : i + 1], t[i : i + 1], text[i : i + 1], references)
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_every_row_has_its_own_timestep(unet: StoryGenUNet) -> None:
    latents, _, text = rows(3)
    t = torch.tensor([0, 500, 999])
    with torch.no_grad():
        together = unet.predict(latents, t, text)
        for i in range(3):
            alone = unet.predict(latents[i : i + 1], t[i : i + 1], text[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
        assert (unet.predict(latents, t.flip(0), text)[0] - together[0]).abs().max() > 1e-3


def test_nothing_is_remembered_between_calls(unet: StoryGenUNet) -> None:
    latents, t, text = rows(2)
    with torch.no_grad():
        before = unet.predict(latents, t, text)
        features = unet.features(latents, t, text)
        unet.predict(latents, t, text, References(unet.project(features), torch.tensor([[0], [1]])))
        after = unet.predict(latents, t, text)
    assert torch.equal(before, after)


def test_reference_attention_starts_as_self_attention_when_asked(unet: StoryGenUNet) -> None:
    torch.manual_seed(1)
    fresh = build_storygen(tiny.UNET)
    fresh.start_references_from_self_attention()
    state = fresh.state_dict()
    for key in state:
        if ".attn3." in key:
            assert torch.equal(state[key], state[key.replace(".attn3.", ".attn1.")])
        if ".norm4." in key:
            assert torch.equal(state[key], state[key.replace(".norm4.", ".norm1.")])


def test_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="dropout"):
        StoryGenConfig.from_dict({"dropout": 0.1})
    assert StoryGenConfig.from_dict(toon.UNET.to_dict()) == toon.UNET


@pytest.mark.parametrize("references", [False, True])
@torch.no_grad()
def test_a_shallow_pass_with_its_own_deep_states_is_the_whole_pass(unet: StoryGenUNet, references: bool) -> None:
    latents, timesteps, text = rows(3)
    seen = None
    if references:
        seen = References(unet.project(unet.features(latents, timesteps // 10, text)), torch.tensor([[0], [1], [2]]))
    whole = unet.predict(latents, timesteps, text, seen)
    answer, deep = unet.predict_and_keep(latents, timesteps, text, seen)
    assert torch.equal(answer, whole)
    assert deep.shape[0] == 3
    torch.testing.assert_close(unet.predict_shallow(latents, timesteps, text, deep, seen), whole, atol=1e-6, rtol=1e-5)
    other = unet.predict_shallow(latents, timesteps, text, deep.flip(0), seen)
    assert not torch.allclose(other, whole, atol=1e-3), "the deep states count"


@torch.no_grad()
def test_deep_states_are_all_but_the_first_and_last_block() -> None:
    """In a network of four levels, as Stable Diffusion's is."""
    torch.manual_seed(0)
    unet = build_storygen(
        StoryGenConfig(
            sample_size=16,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=2,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )
    given = rows(2, h=16, w=16)
    whole, deep = unet.predict_and_keep(*given)
    assert deep.shape == (2, 8, 16, 16)
    computed: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: computed.append(name))
        for name, module in unet.named_modules()
        if re.fullmatch(r"(down_blocks|up_blocks)\.\d|mid_block", name)
    ]
    torch.testing.assert_close(unet.predict_shallow(*given, deep), whole, atol=1e-5, rtol=1e-4)
    for hook in hooks:
        hook.remove()
    assert computed == ["down_blocks.0", "up_blocks.3"]


@torch.no_grad()
def test_deep_states_of_a_network_without_attention_outside() -> None:
    torch.manual_seed(0)
    unet = build_storygen(
        StoryGenConfig(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )
    whole, deep = unet.predict_and_keep(*rows(2))
    torch.testing.assert_close(unet.predict_shallow(*rows(2), deep), whole, atol=1e-5, rtol=1e-4)
