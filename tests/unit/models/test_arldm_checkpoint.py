"""AR-LDM's weights: the published names find their places, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.models.arldm.checkpoint import (
    NETWORKS,
    assemble,
    convert,
    from_lightning,
    load_arldm,
    resized,
    save_arldm,
    states_of,
)
from services.models.arldm.model import ArldmConfig, build_arldm
from services.models.arldm.sampling import Story, draw_stories
from services.models.arldm.text import resized_table
from services.models.errors import PackFileMissing, PackManifestInvalid, PackWeightsMismatch
from tests.reference_arldm import PUBLISHED, Reference, Sizes, State, layout, random_state
from tests.tiny_arldm import (
    CAPTIONS,
    GUIDANCE,
    SIZES,
    STEPS,
    blip_tokenizer,
    clip_tokenizer,
    config,
    drawn_by_hand,
    noise,
    picture,
    worst,
)


@pytest.fixture(scope="module")
def state() -> State:
    return random_state(SIZES, seed=0)


@pytest.fixture(scope="module")
def folder(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint."""
    where = tmp_path_factory.mktemp("arldm")
    save_file(state, str(where / "lightning.safetensors"))
    sized = convert(
        where / "lightning.safetensors",
        where / "folder",
        clip_tokenizer=clip_tokenizer(),
        blip_tokenizer=blip_tokenizer(),
        config=config(given=1),
    )
    assert sized.text.positions == SIZES.positions
    return where / "folder"


def meta(sizes: Sizes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in layout(sizes).items()}


@pytest.mark.parametrize("positions", [91, 65], ids=["FlintstonesSV", "VIST-DII"])
def test_the_published_checkpoint_has_a_place_for_every_tensor(positions: int) -> None:
    sizes = dataclasses.replace(PUBLISHED, positions=positions)
    sized, states = from_lightning(meta(sizes), ArldmConfig())
    assert (sized.text.positions, sized.text.vocab_size, sized.blip.vocab_size) == (positions, 49412, 30525)
    assert len(states["unet"]) == 686
    assert len(states["vae"]) == 248
    assert sum(t.numel() for t in states["unet"].values()) == pytest.approx(859.52e6, rel=1e-5)
    assert sum(t.numel() for t in states["vae"].values()) == pytest.approx(83.65e6, rel=1e-4)
    placed = sum(len(network) for network in states.values())
    assert placed == len(layout(sizes)) - 5  # two counting buffers and three null tokens


def test_a_converted_checkpoint_loads_back_exactly(folder: Path, state: State) -> None:
    model = load_arldm(folder)
    found = states_of(model.networks, model.codec.vae)
    _, expected = from_lightning(state, config())
    for network in NETWORKS:
        assert found[network].keys() == expected[network].keys()
        for name, tensor in expected[network].items():
            assert torch.equal(found[network][name], tensor), f"{network} {name}"
    assert not any(parameter.requires_grad for parameter in model.networks.parameters())
    assert not any(module.training for module in model.networks.modules())
    assert model.networks.config.frame.given_frames == 1
    assert model.networks.config.frame.frames == 5
    for loaded, own in ((model.clip_tokenizer, clip_tokenizer()), (model.blip_tokenizer, blip_tokenizer())):
        assert torch.equal(loaded.rows(CAPTIONS, SIZES.positions).ids_BS, own.rows(CAPTIONS, SIZES.positions).ids_BS)


def test_a_loaded_folder_draws_what_the_reference_draws(folder: Path, state: State) -> None:
    first, captions = picture(9), CAPTIONS[:2]
    expected, _ = drawn_by_hand(Reference(state, SIZES), captions, [first], noise(1, 1)[0])
    story = Story(captions=captions, given=(first,))
    latents, _ = draw_stories(load_arldm(folder), [story], noise(1, 1), steps=STEPS, guidance=GUIDANCE)
    assert worst(latents[0], expected) <= 1e-4


def test_every_published_tensor_lands_in_the_file_it_belongs_to(folder: Path, state: State) -> None:
    """Some by name, written out: these are what the rules must give."""
    vit, crossed = "mm_encoder.visual_encoder", "encoder.layer.0.crossattention.self.key.weight"
    for theirs, network, ours in (
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias", "unet", None),
        ("vae.decoder.mid_block.attentions.0.query.weight", "vae", "decoder.mid_block.attentions.0.to_q.weight"),
        ("vae.encoder.mid_block.attentions.0.proj_attn.bias", "vae", "encoder.mid_block.attentions.0.to_out.0.bias"),
        ("text_encoder.text_model.final_layer_norm.weight", "text_encoder", "final_layer_norm.weight"),
        (f"{vit}.blocks.1.attn.proj.weight", "mm_encoder", "vision.encoder.layers.1.self_attn.projection.weight"),
        (f"{vit}.norm.bias", "mm_encoder", "vision.post_layernorm.bias"),
        (f"{vit}.blocks.0.norm2.bias", "mm_encoder", "vision.encoder.layers.0.layer_norm2.bias"),
        (f"mm_encoder.text_encoder.{crossed}", "mm_encoder", f"text.{crossed}"),
        ("modal_type_embeddings.weight", "frame_embeddings", "modal_type.weight"),
        ("time_embeddings.weight", "frame_embeddings", "time.weight"),
    ):
        written = load_file(str(folder / network / NETWORKS[network]))
        assert torch.equal(written[ours or theirs.removeprefix("unet.")], state[theirs]), theirs


def test_the_frozen_inception_of_a_sampling_run_is_left_out(state: State) -> None:
    _, states = from_lightning({**state, "inception.blocks.0.0.conv.weight": torch.zeros(2)}, config())
    assert states.keys() == NETWORKS.keys()
    assert not any("inception" in name for network in states.values() for name in network)


def test_the_flat_file_without_null_tokens_will_do(state: State) -> None:
    bare = {name: tensor for name, tensor in state.items() if "null_token" not in name and "position_ids" not in name}
    assert from_lightning(bare, config())[0].text.positions == SIZES.positions


def test_a_tensor_without_a_place_is_refused(state: State) -> None:
    with pytest.raises(PackWeightsMismatch, match=r"discriminator\.weight") as caught:
        from_lightning({**state, "discriminator.weight": torch.zeros(1)}, config())
    assert caught.value.reason == "PACK_WEIGHTS_MISMATCH"
    with pytest.raises(PackWeightsMismatch, match=r"unet: extra\.weight is unknown"):
        from_lightning({**state, "unet.extra.weight": torch.zeros(1)}, config())


@pytest.mark.parametrize(
    "name",
    [
        "unet.conv_in.weight",
        "vae.decoder.mid_block.attentions.0.key.weight",
        "text_encoder.text_model.embeddings.position_embedding.weight",
        "mm_encoder.visual_encoder.cls_token",
        "mm_encoder.text_encoder.encoder.layer.1.crossattention.self.value.bias",
        "time_embeddings.weight",
    ],
)
def test_a_missing_tensor_is_refused(state: State, name: str) -> None:
    with pytest.raises(PackWeightsMismatch, match="is missing"):
        from_lightning({k: v for k, v in state.items() if k != name}, config())


def test_a_tensor_of_another_shape_is_refused(state: State) -> None:
    with pytest.raises(PackWeightsMismatch, match=r"conv_in\.weight is \(16, 9, 3, 3\) and should be \(16, 4, 3, 3\)"):
        from_lightning({**state, "unet.conv_in.weight": torch.zeros(16, 9, 3, 3)}, config())


def test_a_position_table_that_was_not_resized_is_refused(state: State) -> None:
    """Stable Diffusion's own 77 rows under captions of 91 tokens."""
    short = {**state}
    name = "text_encoder.text_model.embeddings.position_embedding.weight"
    short[name] = short[name][:-2]
    with pytest.raises(PackWeightsMismatch, match="the position table was not resized"):
        from_lightning(short, config())


def test_tokenizers_of_another_data_set_are_refused(state: State, tmp_path: Path) -> None:
    save_file(state, str(tmp_path / "a.safetensors"))
    with pytest.raises(PackWeightsMismatch, match="another data set's"):
        convert(
            tmp_path / "a.safetensors",
            tmp_path / "out",
            clip_tokenizer=clip_tokenizer().with_words([f"word{i}" for i in range(40)]),
            blip_tokenizer=blip_tokenizer(),
            config=config(),
        )
    assert not (tmp_path / "out").exists()


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    tokenizers = {"clip_tokenizer": clip_tokenizer(), "blip_tokenizer": blip_tokenizer()}
    with pytest.raises(PackFileMissing, match="last"):
        convert(tmp_path / "last.safetensors", tmp_path / "out", **tokenizers)
    (tmp_path / "last.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip, as a .ckpt is")
    with pytest.raises(PackWeightsMismatch, match="is not safetensors"):
        convert(tmp_path / "last.safetensors", tmp_path / "out", **tokenizers)


def test_weights_that_are_not_finite_are_not_written(state: State, tmp_path: Path) -> None:
    sized, states = from_lightning(state, config())
    states["vae"] = {**states["vae"], "quant_conv.bias": torch.full((8,), 1e9)}
    with pytest.raises(ValueError, match="of vae are not finite"):
        save_arldm(tmp_path, sized, states, clip_tokenizer(), blip_tokenizer(), dtype=torch.float16)


def copied(folder: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, target / "copy"))


def test_a_folder_that_lacks_something_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path)
    (broken / "clip_tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(PackFileMissing, match="no tokenizer"):
        load_arldm(broken)
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(PackFileMissing, match=r"vae/config\.json"):
        load_arldm(broken)


def test_a_folder_whose_networks_do_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path)
    path = broken / "frame_embeddings" / "config.json"
    path.write_text(json.dumps({"width": 24, "frames": 5, "given_frames": 0}))
    with pytest.raises(PackManifestInvalid, match="widths differ"):
        load_arldm(broken)
    path.write_text(json.dumps({"width": 16, "frames": 5, "given_frames": 5}))
    with pytest.raises(PackManifestInvalid, match="cannot be given"):
        load_arldm(broken)
    path.write_text(json.dumps({"width": 16, "frames": 6}))
    with pytest.raises(PackWeightsMismatch, match="frame_embeddings: time"):
        load_arldm(broken)


def test_half_precision_is_the_unets_alone(folder: Path) -> None:
    model = load_arldm(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.networks.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.networks.mm_encoder.parameters()} == {torch.float32}
    story = Story(captions=CAPTIONS[:2], given=(picture(9),))
    half, whole = (draw_stories(m, [story], noise(1, 1), steps=2)[0] for m in (model, load_arldm(folder)))
    assert half.dtype == torch.float32
    assert 0.0 < worst(half, whole) < 0.5


def test_tables_grow_and_keep_what_they_knew(state: State) -> None:
    sized, states = from_lightning(state, config())
    longer, grown = resized(
        sized, states, torch.Generator().manual_seed(0), positions=SIZES.positions + 6, clip_words=44, blip_words=38
    )
    for network, name, rows in (
        ("text_encoder", "embeddings.position_embedding.weight", SIZES.positions + 6),
        ("text_encoder", "embeddings.token_embedding.weight", 44),
        ("mm_encoder", "text.embeddings.word_embeddings.weight", 38),
    ):
        old, new = states[network][name], grown[network][name]
        assert len(new) == rows
        assert torch.equal(new[: len(old)], old)
        assert 0.2 < float(new[len(old) :].std() / old.std()) < 2.0
    networks, _ = assemble(longer, grown)
    rows = clip_tokenizer().rows(["fred sits"], SIZES.positions + 6)
    assert networks.captions(rows).shape == (1, SIZES.positions + 6, SIZES.width)
    with pytest.raises(ValueError, match="BLIP has 32 positions"):
        resized(sized, states, torch.Generator(), positions=33)


def test_a_table_can_shrink() -> None:
    """VIST-DII's captions have fewer positions than CLIP's table."""
    table = torch.arange(12.0).view(6, 2)
    assert torch.equal(resized_table(table, 4, torch.Generator()), table[:4])


def test_fresh_networks_have_the_names_of_converted_ones(state: State) -> None:
    sized, states = from_lightning(state, config())
    with torch.device("meta"):
        fresh = build_arldm(sized)
    assert fresh.unet.state_dict().keys() == states["unet"].keys()
    assert fresh.mm_encoder.state_dict().keys() == states["mm_encoder"].keys()
