"""LoRA files of PEFT, diffusers and kohya: what is written is read back bit for bit, and others read the same of it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from services.models.errors import AdapterDamaged, AdapterNotWritable, AdapterWrongBase, AdapterWrongShape
from services.models.lora import (
    BASE_DIGEST,
    FORM,
    FORMS,
    Adapter,
    AdapterSlots,
    Form,
    LowRank,
    Worn,
    adapted_layers,
    adapter_config,
    read_adapter,
    read_adapter_file,
    write_adapter,
)
from services.models.lora_formats import TEXT, TEXT_2, UNET, Names, published_name
from services.models.text_encoder import TextChange, TextEncoder
from services.models.tiny import byte_tokenizer

CLOSE = {"atol": 1e-5, "rtol": 0.0}
BASE = "b" * 64


def tiny_unet(**changes: Any) -> Any:
    shape: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(shape | changes)).eval().requires_grad_(False)


def tiny_text() -> Any:
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_unet()


@pytest.fixture(scope="module")
def text() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return tiny_text()


def low_rank(layer: nn.Module, rank: int, alpha: float, generator: torch.Generator, size: float = 0.3) -> LowRank:
    weight: Any = layer.weight
    ends = (1, 1) if weight.ndim == 4 else ()
    down = size * torch.randn(rank, *weight.shape[1:], generator=generator)
    return LowRank(down, size * torch.randn(weight.shape[0], rank, *ends, generator=generator), alpha)


def an_adapter(factors: dict[str, LowRank], text: dict[str, LowRank] | None = None, **more: Any) -> Adapter:
    given = {"deltas": {}, **more}
    return Adapter(digest="", factors=factors, size_bytes=0, texts={TEXT: text} if text else {}, **given)


def of_layers(network: nn.Module, pattern: str, rank: int = 2, alpha: float | None = None, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: low_rank(layer, rank, float(rank) if alpha is None else alpha, generator)
        for name, layer in adapted_layers(network).items()
        if re.search(pattern, name)
    }


def bits(tensor: Tensor) -> Tensor:
    assert tensor.dtype == torch.float32
    return tensor.contiguous().view(torch.int32)


def assert_same(one: Adapter, other: Adapter) -> None:
    """Bit for bit, but for the digest of the file."""
    assert {k: v for k, v in one.texts.items() if v}.keys() == other.texts.keys()
    for left, right in ((one.factors, other.factors), *((one.texts[name], other.texts[name]) for name in other.texts)):
        assert left.keys() == right.keys()
        for name, low in left.items():
            assert low.alpha == right[name].alpha, name
            assert torch.equal(bits(low.down), bits(right[name].down)), name
            assert torch.equal(bits(low.up), bits(right[name].up)), name
    for mine, theirs in ((one.deltas, other.deltas), (one.words, other.words)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(bits(mine[name]), bits(theirs[name])) for name in mine)


# -- the round trip

ALPHAS = st.one_of(
    st.integers(1, 128).map(float),
    st.floats(-1e4, 1e4, allow_nan=False).filter(lambda value: abs(value) > 1e-6),
    st.sampled_from([0.1, 1 / 3, 4 * 3**0.5]),
)
EXTREME = torch.tensor([-0.0, 1e-45, 3e38, -3e38, 1.0000001])


@st.composite
def adapters(draw: st.DrawFn, unet: nn.Module, text: nn.Module) -> Adapter:
    def some_of(network: nn.Module) -> dict[str, LowRank]:
        layers = adapted_layers(network)
        names = draw(st.lists(st.sampled_from(sorted(layers)), max_size=6, unique=True))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        made = {}
        for name in names:
            low = low_rank(layers[name], draw(st.integers(1, 4)), draw(ALPHAS), generator)
            low.down.view(-1)[:5] = EXTREME
            made[name] = low
        return made

    factors, of_text = some_of(unet), some_of(text)
    if not factors and not of_text:
        factors = of_layers(unet, r"conv_in")
    return an_adapter(factors, of_text)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_back_bit_for_bit(form: Form, unet: Any, text: Any) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(adapter=adapters(unet, text))
    def holds(adapter: Adapter) -> None:
        payload = write_adapter(adapter, form, base_digest=BASE)
        again = read_adapter(payload, unet, texts={TEXT: text}, base_digest=BASE)
        assert_same(adapter, again)
        assert write_adapter(again, form, base_digest=BASE) == payload, "equal adapters, equal bytes"

    holds()


def test_from_form_to_form_nothing_is_lost(unet: Any, text: Any) -> None:
    factors = of_layers(unet, r"attn1.*to_q|resnets.*conv1", rank=3, alpha=2.5) | of_layers(unet, r"ff", rank=1)
    adapter = an_adapter(factors, of_layers(text, "q_proj|fc1", rank=2, alpha=1.0))
    went = adapter
    for form in ("kohya", "diffusers", "peft", "kohya", "peft"):
        went = read_adapter(write_adapter(went, form), unet, texts={TEXT: text})
    assert_same(adapter, went)


def test_whole_differences_and_learned_words_are_kohyas(unet: Any) -> None:
    name = next(name for name in adapted_layers(unet) if name.endswith("attn2.to_k"))
    weight = unet.get_submodule(name).weight
    deltas = {name: torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))}
    adapter = an_adapter({}, deltas=deltas, words={"Zoe": torch.randn(2, 16)})
    payload = write_adapter(adapter, "kohya")
    assert set(load(payload)) == {f"lora_unet_{name.replace('.', '_')}.diff", "bundle_emb.Zoe.string_to_param.*"}
    assert_same(adapter, read_adapter(payload, unet, text_width=16))
    for form in ("peft", "diffusers"):
        with pytest.raises(AdapterNotWritable, match="write it as kohya"):
            write_adapter(adapter, form)
    with pytest.raises(AdapterNotWritable, match="point in it"):
        write_adapter(an_adapter({}, words={"a.b": torch.ones(1, 16)}), "kohya")


def test_what_cannot_be_written_is_refused(unet: Any) -> None:
    with pytest.raises(AdapterNotWritable, match="whole UNet"):
        write_adapter(an_adapter({}, unet=unet))
    with pytest.raises(AdapterNotWritable, match="changes nothing"):
        write_adapter(an_adapter(of_layers(unet, "conv_in")), networks=(TEXT,))
    with pytest.raises(AdapterNotWritable, match="write it as float32"):
        write_adapter(an_adapter({"conv_in": LowRank(torch.full((1, 4, 3, 3), 1e9), torch.ones(16, 1, 1, 1), 1.0)}),
                      dtype=torch.float16)  # fmt: skip
    with pytest.raises(ValueError, match="a form is one of"):
        write_adapter(an_adapter(of_layers(unet, "conv_in")), "lycoris")  # type: ignore[arg-type]
    with pytest.raises(AdapterNotWritable, match="no LoRA of the text_encoder"):
        adapter_config(an_adapter(of_layers(unet, "conv_in")), TEXT)


def test_a_file_says_what_it_is(unet: Any, tmp_path: Path) -> None:
    adapter = an_adapter(of_layers(unet, "attn1", rank=4, alpha=2.0) | of_layers(unet, "conv_in", rank=2, alpha=1.0))
    told = {}
    for form in FORMS:
        (tmp_path / form).write_bytes(write_adapter(adapter, form, base_digest=BASE))
        with safe_open(str(tmp_path / form), "pt") as file:
            told[form] = file.metadata()
        assert (told[form][FORM], told[form][BASE_DIGEST], told[form]["format"]) == (form, BASE, "pt")
    assert (told["kohya"]["ss_network_dim"], told["kohya"]["ss_network_alpha"]) == ("4", "2")
    assert json.loads(told["kohya"]["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1"}
    for form in ("peft", "diffusers"):
        config = json.loads(told[form]["lora_adapter_metadata"])
        assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 2)
        assert (config["unet.rank_pattern"], config["unet.alpha_pattern"]) == ({"^conv_in": 2}, {"^conv_in": 1})


def test_half_precision_is_half_the_size(unet: Any) -> None:
    adapter = an_adapter(of_layers(unet, "attn1"))
    half = write_adapter(adapter, "kohya", dtype=torch.float16)
    assert {value.dtype for key, value in load(half).items() if not key.endswith(".alpha")} == {torch.float16}
    assert len(half) < len(write_adapter(adapter, "kohya"))
    again = read_adapter(half, unet)
    assert_same(again, read_adapter(write_adapter(again, "peft", dtype=torch.float16), unet))


# -- what others make of it


def inputs(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(rows, 4, 8, 8, generator=generator),
        torch.tensor([10, 700]),
        torch.randn(rows, 7, 16, generator=generator),
    )


@torch.no_grad()
def ours(unet: Any, adapter: Adapter) -> Tensor:
    own = copy.deepcopy(unet)
    slots = AdapterSlots(own, count=1, rank_max=8)
    slots.put(1, adapter)
    with slots.rows([(Worn(1, 1.0),)] * 2):
        answer: Tensor = own(*inputs(), return_dict=False)[0]
    assert not torch.allclose(answer, unet(*inputs(), return_dict=False)[0], atol=1e-3), "the adapter does something"
    return answer


def encoder(model: Any) -> TextEncoder:
    return TextEncoder(model, byte_tokenizer())


@torch.no_grad()
def our_text(model: Any, adapter: Adapter, ids: Tensor) -> Tensor:
    return encoder(model).states(ids, changes=[TextChange(adapter.texts)])


MIXED = r"attn1|attn2\.to_v"
IDS = torch.tensor([[0, 40, 41, 42, 1, 2, 2, 2]])


@pytest.fixture(scope="module")
def mixed(unet: Any, text: Any) -> Adapter:
    """Linear layers and convolutions, two ranks, three alphas."""
    factors = of_layers(unet, MIXED, rank=4, alpha=2.0, seed=1)
    factors |= of_layers(unet, r"resnets.*conv1|downsamplers.*conv|conv_in", rank=2, alpha=3.0, seed=2)
    factors |= of_layers(unet, r"ff\.net\.2|proj_in", rank=4, alpha=1.5, seed=3)
    return an_adapter(factors, of_layers(text, r"[qv]_proj|out_proj|fc1", rank=3, alpha=6.0, seed=4))


def alone(adapter: Adapter, network: str) -> Adapter:
    return an_adapter(dict(adapter.factors)) if network == UNET else an_adapter({}, dict(adapter.texts[TEXT]))


@torch.no_grad()
@pytest.mark.parametrize("network", [UNET, TEXT])
@pytest.mark.parametrize("as_model", [False, True])
def test_peft_reads_its_form_and_computes_the_same(
    network: str, as_model: bool, unet: Any, text: Any, mixed: Adapter, tmp_path: Path
) -> None:
    own = copy.deepcopy(unet if network == UNET else text)
    payload = write_adapter(mixed, "peft", networks=(network,))
    (tmp_path / "adapter_model.safetensors").write_bytes(payload)
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(mixed, network)))
    if as_model:
        model = peft.PeftModel.from_pretrained(own, str(tmp_path)).eval()
    else:
        config = peft.LoraConfig.from_pretrained(str(tmp_path))
        peft.inject_adapter_in_model(config, own)
        left = peft.set_peft_model_state_dict(own, load(payload))
        assert not left.unexpected_keys
        assert not [key for key in left.missing_keys if "lora_" in key]
        model = own.eval()
    if network == UNET:
        theirs = model(*inputs(), return_dict=False)[0]
        torch.testing.assert_close(ours(unet, mixed), theirs, **CLOSE)
    else:
        theirs = model(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(our_text(text, mixed, IDS), theirs, **CLOSE)
        assert not torch.allclose(theirs, text(input_ids=IDS).last_hidden_state, atol=1e-3)
    again = read_adapter_file(tmp_path / "adapter_model.safetensors", unet, texts={TEXT: text})
    assert_same(alone(mixed, network), again)


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["plain", "rslora"])
def test_pefts_own_file_and_configuration_are_read(scaling: str, unet: Any, tmp_path: Path) -> None:
    """With patterns as people write them, some of which are no plain names."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "conv1", "proj_in", "linear_1"],
        rank_pattern={"^down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 2, "proj_in": 3, ".*conv1": 1},
        alpha_pattern={"attn2.to_v": 5, "down_blocks.*.conv1": 9},
        use_rslora=scaling == "rslora",
        init_lora_weights=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(copy.deepcopy(unet), config).eval()
    model.save_pretrained(str(tmp_path))
    found = read_adapter_file(tmp_path / "adapter_model.safetensors", unet)
    assert {low.rank for low in found.factors.values()} == {1, 2, 3, 4}
    torch.testing.assert_close(ours(unet, found), model(*inputs(), return_dict=False)[0], **CLOSE)
    assert_same(found, read_adapter(write_adapter(found, "kohya"), unet))


def pipeline(unet: Any, text: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=copy.deepcopy(text),
        tokenizer=None,
        unet=copy.deepcopy(unet),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_diffusers_reads_both_networks_and_computes_the_same(
    form: Form, unet: Any, text: Any, mixed: Adapter, tmp_path: Path
) -> None:
    if form == "kohya":
        # diffusers 0.42 loses an attention projection's own alpha on kohya's way, so they have the commonest here.
        factors = {name: low for name, low in mixed.factors.items() if name.startswith("down_blocks") or "attn" in name}
        mixed = an_adapter(factors, dict(mixed.texts[TEXT]))
    (tmp_path / "x.safetensors").write_bytes(write_adapter(mixed, form))
    pipe = pipeline(unet, text)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    torch.testing.assert_close(ours(unet, mixed), pipe.unet(*inputs(), return_dict=False)[0], **CLOSE)
    told = pipe.text_encoder(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(our_text(text, mixed, IDS), told, **CLOSE)
    assert not torch.allclose(told, text(input_ids=IDS).last_hidden_state, atol=1e-3)


@torch.no_grad()
def test_a_unets_own_loader_reads_diffusers_form(unet: Any, mixed: Adapter, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(write_adapter(mixed, "diffusers", networks=(UNET,)))
    own = copy.deepcopy(unet)
    own.load_lora_adapter(str(tmp_path), weight_name="x.safetensors", prefix="unet")
    torch.testing.assert_close(ours(unet, mixed), own(*inputs(), return_dict=False)[0], **CLOSE)


@torch.no_grad()
def test_what_diffusers_saves_is_read(unet: Any, text: Any, tmp_path: Path) -> None:
    own = copy.deepcopy(unet)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        own.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_k", "conv2"], init_lora_weights=False))
    own.save_lora_adapter(str(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    found = read_adapter_file(file, unet)
    assert {low.alpha for low in found.factors.values()} == {5.0}
    torch.testing.assert_close(ours(unet, found), own(*inputs(), return_dict=False)[0], **CLOSE)


# -- names


def older(form: str, network: str, layer: str) -> tuple[str, str]:
    """The name of a layer's two factors in diffusers' older files."""
    name = published_name(network, layer)
    if form == "0.17":
        if network == TEXT:
            name = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", name)
        else:
            name = re.sub(r"\.(attn\d)\.", r".\1.processor.", name).removesuffix(".0")
        return f"{network}.{name}_lora.down.weight", f"{network}.{name}_lora.up.weight"
    joint = "lora_linear_layer" if network == TEXT else "lora"
    return f"{network}.{name}.{joint}.down.weight", f"{network}.{name}.{joint}.up.weight"


@pytest.mark.parametrize("form", ["0.17", "0.21"])
def test_diffusers_older_names_are_read(form: str, unet: Any, text: Any) -> None:
    adapter = an_adapter(of_layers(unet, r"attn\d\.to_(q|k|v|out)"), of_layers(text, r"self_attn\.(q|k|v|out)_proj"))
    state = {}
    for network, factors in ((UNET, adapter.factors), (TEXT, adapter.texts[TEXT])):
        for layer, low in factors.items():
            down, up = older(form, network, layer)
            state[down], state[up] = low.down, low.up
    assert_same(adapter, read_adapter(save(state), unet, texts={TEXT: text}))


def sdxl_unet(**changes: Any) -> Any:
    return tiny_unet(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        **changes,
    )


# Of SDXL's published LoRAs, by hand.
DEEPER = "down_blocks.1.attentions"
SDXL_NAMES = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_5_1_transformer_blocks_1_attn2_to_out_0": f"{DEEPER}.1.transformer_blocks.1.attn2.to_out.0",
    "input_blocks_8_1_transformer_blocks_2_ff_net_2": "down_blocks.2.attentions.1.transformer_blocks.2.ff.net.2",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_attn1_to_q": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_proj_out": "up_blocks.0.attentions.0.proj_out",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}  # fmt: skip


@pytest.fixture(scope="module")
def xl() -> Any:
    return sdxl_unet()


def test_the_first_codes_names_of_sdxl_are_known(xl: Any) -> None:
    names = Names(UNET, adapted_layers(xl))
    assert {told: names.find(told, "x", has_points=False) for told in SDXL_NAMES} == SDXL_NAMES


def test_diffusers_means_the_same_layers_by_them(xl: Any) -> None:
    """Every layer of the blocks, named in the first code's way, through diffusers' converter and through ours."""
    names = Names(UNET, adapted_layers(xl))
    told = {
        alias for alias in names.with_underscores if alias.startswith(("input_blocks", "middle_block", "output_blocks"))
    }
    told -= {"input_blocks_0_0"}
    assert len(told) > 200
    state = {f"lora_unet_{alias}.lora_down.weight": alias for alias in told}
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(state), xl.config)
    theirs = {alias: _convert_unet_lora_key(key) for key, alias in mapped.items()}
    for alias, name in theirs.items():
        plain = name.replace(".processor.", ".").replace("_lora.down.weight", "").replace(".lora.down.weight", "")
        assert names.find(alias, "x", has_points=False) == (f"{plain}.0" if plain.endswith("to_out") else plain), alias


def test_a_kohya_file_of_sdxl_is_read_with_both_text_encoders(xl: Any, text: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = adapted_layers(xl)
    factors = {layer: low_rank(layers[layer], 2, 1.0, generator) for layer in SDXL_NAMES.values()}
    texts = {TEXT: of_layers(text, "q_proj", seed=1), TEXT_2: of_layers(text, "v_proj", seed=2)}
    state = {}
    for told, layer in SDXL_NAMES.items():
        state[f"lora_unet_{told}.lora_down.weight"] = factors[layer].down
        state[f"lora_unet_{told}.lora_up.weight"] = factors[layer].up
        state[f"lora_unet_{told}.alpha"] = torch.tensor(1.0)
    for network, prefix in ((TEXT, "lora_te1_"), (TEXT_2, "lora_te2_")):
        for layer, low in texts[network].items():
            key = f"{prefix}text_model_{layer.replace('.', '_')}"
            state |= {f"{key}.lora_down.weight": low.down, f"{key}.lora_up.weight": low.up}
    adapter = Adapter(digest="", factors=factors, deltas={}, size_bytes=0, texts=texts)
    both = {TEXT: text, TEXT_2: text}
    found = read_adapter(save(state), xl, texts=both)
    assert_same(adapter, found)
    for form in FORMS:
        assert_same(adapter, read_adapter(write_adapter(found, form), xl, texts=both))
    with pytest.raises(AdapterWrongBase, match="looks like a LoRA of SDXL: it has lora_te2 keys"):
        read_adapter(save(state), xl, texts={TEXT: text})


def test_a_name_that_could_be_two_layers_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Linear(2, 2)
            self.a = nn.ModuleDict({"b": nn.Linear(2, 2)})

    odd = Odd()
    adapter = an_adapter(of_layers(odd, "."))
    with pytest.raises(AdapterNotWritable, match="apart"):
        write_adapter(adapter, "kohya")
    assert_same(adapter, read_adapter(write_adapter(adapter, "peft"), odd))
    low = adapter.factors["a_b"]
    with pytest.raises(AdapterWrongShape, match=r"a\.b or a_b"):
        read_adapter(save({"lora_unet_a_b.lora_down.weight": low.down, "lora_unet_a_b.lora_up.weight": low.up}), odd)


# -- what is refused


def pair(
    unet: Any, name: str = "conv_in", kind: tuple[str, str] = ("lora_A", "lora_B"), **more: Any
) -> dict[str, Tensor]:
    low = low_rank(unet.get_submodule(name), 2, 2.0, torch.Generator().manual_seed(0))
    return {f"{name}.{kind[0]}.weight": low.down, f"{name}.{kind[1]}.weight": low.up, **more}


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("base_model.model.conv_in.lora_magnitude_vector.weight", "DoRA"),
        ("lora_unet_conv_in.dora_scale", "DoRA"),
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lokr_w2", "LoKr"),
        ("lora_unet_conv_in.lora_mid.weight", "LoCon with a core"),
        ("conv_in.lora_embedding_A", "LoRA of an embedding"),
        ("lora_unet_conv_in.oft_blocks", "OFT"),
        ("lora_unet_conv_in.on_input", "IA3"),
        ("lora_unet_conv_in.a1.weight", "GLoRA"),
        ("lora_unet_conv_in.diff_b", "a change of biases"),
        ("conv_in.lora_B.bias", "a change of biases"),
        ("lora_unet_conv_in.w_norm", "a change of norms"),
    ],
)
def test_other_methods_are_refused_by_name_and_what_to_do(key: str, method: str, unet: Any) -> None:
    with pytest.raises(AdapterWrongShape, match=f"is {method}.*train it as plain LoRA"):
        read_adapter(save({**pair(unet), key: torch.ones(2)}), unet)


def test_another_family_is_refused_with_the_reason(unet: Any, text: Any) -> None:
    def refused(error: type[Exception], match: str, state: dict[str, Tensor], **metadata: str) -> None:
        with pytest.raises(error, match=match):
            read_adapter(save(state, metadata=metadata), unet)

    def cross(width: int) -> dict[str, Tensor]:
        key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        return {f"{key}.lora_down.weight": torch.ones(2, width), f"{key}.lora_up.weight": torch.ones(16, 2)}

    for width, family in ((768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "SDXL"), (48, "another")):
        refused(AdapterWrongBase, f"LoRA of {family}.*cross attention is {width} wide, this UNet's is 16", cross(width))
    refused(
        AdapterWrongBase, "says that its base is sdxl_base_v1-0", cross(2048), ss_base_model_version="sdxl_base_v1-0"
    )
    second = {"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}
    refused(AdapterWrongBase, "SDXL: it has text_encoder_2 keys", {**pair(unet), **second})
    flux = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 16)}
    refused(AdapterWrongBase, "FLUX", flux)
    speech = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}
    refused(AdapterWrongBase, "a language model", speech)
    refused(
        AdapterWrongShape,
        "no layer of this UNet; it says that its base is odd",
        {"lora_unet_nowhere.lora_down.weight": torch.ones(2, 16)},
        **{"modelspec.architecture": "odd"},
    )
    first = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 16)}
    refused(AdapterWrongShape, "changes the text encoder", {**pair(unet), **first})


def test_what_is_damaged_is_refused(unet: Any, text: Any) -> None:
    def refused(match: str, state: dict[str, Tensor], peft: object = None, **metadata: str) -> None:
        with pytest.raises(AdapterDamaged, match=match):
            read_adapter(save(state, metadata=metadata), unet, texts={TEXT: text}, peft=peft)

    good = pair(unet)
    other = pair(unet, kind=("lora_down", "lora_up"))
    huge = {"conv_in.lora_B.weight": torch.full((16, 2, 1, 1), 3e38)}
    beyond = torch.full((2, 4, 3, 3), 1e60, dtype=torch.float64)
    refused("of conv_in twice", {**good, **other})
    refused("the alpha of conv_in is 0", {**good, "conv_in.alpha": torch.tensor(0.0)})
    refused("should be one number", {**good, "conv_in.alpha": torch.ones(2)})
    refused("not finite", {**good, "conv_in.alpha": torch.tensor(torch.inf)})
    refused("with the alpha .* is not finite", {**good, "conv_in.alpha": torch.tensor(3e38), **huge})
    refused("not finite: conv_in.lora_A", {**good, "conv_in.lora_A.weight": beyond})
    refused("only half of conv_in", {"conv_in.alpha": torch.tensor(1.0)})
    refused("factors and a whole difference", {**good, "conv_in.diff": torch.ones(1)})
    refused("as torch.int64", {**good, "conv_in.lora_A.weight": torch.ones(2, 4, 3, 3, dtype=torch.int64)})
    refused("no number: 'nan'", good, lora_alpha="nan")
    refused("ss_network_alpha of the adapter is no number", good, ss_network_alpha="many")
    refused("is no JSON", good, lora_adapter_metadata="{")
    refused("is no JSON", good, lora_adapter_metadata="[" * 100_000)
    refused("is no JSON object", good, lora_adapter_metadata="[]")
    refused("is no JSON", good, ss_network_args="{", ss_network_alpha="1")
    refused("they are of two files", good, peft={"r": 8, "lora_alpha": 8})
    refused("is no whole number", good, peft={"r": 2.5, "lora_alpha": 8})
    refused("is no number: 'None'", good, peft={"r": 2})
    refused("is no number: 'True'", good, peft={"lora_alpha": True})
    refused("is no JSON object", good, peft=["lora_alpha"])
    refused("pattern .* is not understood", good, peft={"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}})
    refused("rank_pattern .* no JSON object", good, peft={"lora_alpha": 1, "rank_pattern": [1]})


def test_configurations_of_other_methods_are_refused(unet: Any) -> None:
    for peft_says, method in (({"peft_type": "LOHA"}, "LOHA"), ({"use_dora": True, "lora_alpha": 1}, "DoRA")):
        with pytest.raises(AdapterWrongShape, match=f"is {method}"):
            read_adapter(save(pair(unet)), unet, peft=peft_says)


def test_a_text_encoders_layers_must_fit_too(unet: Any, text: Any) -> None:
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    wide = {f"{name}.lora_A.weight": torch.ones(2, 99), f"{name}.lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(AdapterWrongShape, match="99"):
        read_adapter(save(wide), unet, texts={TEXT: text})
    high = {f"{name}.lora_A.weight": torch.ones(9, 16), f"{name}.lora_B.weight": torch.ones(32, 9)}
    with pytest.raises(AdapterWrongShape, match="rank 9"):
        read_adapter(save(high), unet, texts={TEXT: text}, rank_max=8)
    with pytest.raises(AdapterWrongShape, match="differs as a whole"):
        read_adapter(save({f"{name}.delta": torch.ones(32, 16)}), unet, texts={TEXT: text})


def test_alpha_is_told_by_the_tensor_then_the_file_then_what_lies_beside(unet: Any) -> None:
    def alpha(state: dict[str, Tensor], name: str = "conv_in", peft: object = None, **metadata: str) -> float:
        return read_adapter(save(state, metadata=metadata), unet, peft=peft).factors[name].alpha

    good = pair(unet)
    beside = {"lora_alpha": 7, "r": 2}
    assert alpha(good) == 2.0, "without a word, the rank"
    assert alpha(good, peft=beside) == 7.0
    assert alpha(good, peft=beside, lora_alpha="5") == 5.0
    assert alpha({**good, "conv_in.alpha": torch.tensor(3)}, peft=beside, lora_alpha="5") == 3.0
    assert alpha(good, ss_network_alpha="6.0") == 6.0
    assert alpha(good, ss_network_alpha="None") == 2.0
    assert alpha(good, ss_network_alpha="Dynamic", ss_network_args="{}") == 2.0
    kernels = '{"conv_dim": "2", "conv_alpha": "1"}'
    assert alpha(good, ss_network_alpha="6.0", ss_network_args=kernels) == 1.0, "a convolution's own"
    linear = pair(unet, "time_embedding.linear_1")
    assert alpha(linear, "time_embedding.linear_1", ss_network_alpha="6.0", ss_network_args=kernels) == 6.0
    told = '{"unet.r": 2, "unet.lora_alpha": 9, "text_encoder.lora_alpha": 1}'
    assert alpha(good, lora_adapter_metadata=told) == 9.0


def test_a_linear_layer_may_be_written_as_a_convolution_of_one_pixel(unet: Any, xl: Any) -> None:
    name = "down_blocks.1.attentions.0.proj_in"
    low = low_rank(xl.get_submodule(name), 2, 2.0, torch.Generator().manual_seed(0))
    state = {f"{name}.lora_A.weight": low.down[..., None, None], f"{name}.lora_B.weight": low.up[..., None, None]}
    assert_same(an_adapter({name: low}), read_adapter(save(state), xl))
    name = "down_blocks.0.attentions.0.proj_in"
    low = low_rank(unet.get_submodule(name), 2, 2.0, torch.Generator().manual_seed(0))
    state = {f"{name}.lora_A.weight": low.down[..., 0, 0], f"{name}.lora_B.weight": low.up[..., 0, 0]}
    assert_same(an_adapter({name: low}), read_adapter(save(state), unet))


# -- the text encoder


@torch.no_grad()
def test_a_change_of_the_text_encoder_ends_with_the_call(text: Any) -> None:
    own = encoder(copy.deepcopy(text))
    change = TextChange({TEXT: of_layers(text, r"q_proj|fc2", seed=1)})
    plain = own.encode(["a cat", "a dog"])
    state = {name: value.clone() for name, value in own.model.state_dict().items()}
    changed = own.encode(["a cat", "a dog"], changes=[change])
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(own.encode(["a cat", "a dog"]), plain)
    assert torch.equal(own.encode(["a cat", "a dog"], changes=[change]), changed)
    assert torch.equal(own.encode(["a cat", "a dog"], changes=[change._replace(scale=0.0)]), plain)
    unknown = {**change.factors[TEXT], "nowhere": next(iter(change.factors[TEXT].values()))}
    with pytest.raises(AttributeError):
        own.encode(["a cat"], changes=[TextChange({TEXT: unknown})])
    assert torch.equal(own.encode(["a cat", "a dog"]), plain), "also after a failure"
    assert all(torch.equal(value, state[name]) for name, value in own.model.state_dict().items())
    assert not [module for module in own.model.modules() if module._forward_hooks or module._forward_pre_hooks]


@torch.no_grad()
def test_changes_add_up_as_merged_weights_do(text: Any) -> None:
    own, merged = encoder(text), copy.deepcopy(text)
    one, two = of_layers(text, r"q_proj|fc2", seed=1), of_layers(text, r"v_proj|fc2", rank=3, alpha=1.0, seed=2)
    for factors, scale in ((one, 0.5), (two, 1.5)):
        for name, low in factors.items():
            merged.get_submodule(name).weight += scale * low.scaled_up @ low.down
    ids = own.token_ids(["a cat and a dog"])
    ours = own.states(ids, changes=[TextChange({TEXT: one}, 0.5), TextChange({TEXT: two}, 1.5)])
    torch.testing.assert_close(ours, merged(input_ids=ids).last_hidden_state, **CLOSE)
