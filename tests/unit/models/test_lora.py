"""Adapters, a different one for every row: the same as PEFT's, the same as each alone."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.models import lora
from services.models.errors import AdapterDamaged, AdapterTooLarge, AdapterWrongBase, AdapterWrongShape
from services.models.lora import (
    ALPHA,
    BASE_DIGEST,
    NOBODY,
    AdapterSlots,
    Worn,
    adapted_layers,
    read_adapter_file,
    run_by_run,
)
from services.models.storygen import References, StoryGenUNet, build_storygen
from services.models.tiny import UNET

LINEARS = r".*attentions.*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out)"
CONVOLUTIONS = r".*resnets.*(conv1|conv2)|.*downsamplers.*conv|conv_out"
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
RANKS = {"one": 2, "two": 4, "three": 3}


@pytest.fixture(scope="module")
def unet() -> StoryGenUNet:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_storygen(UNET)


@pytest.fixture(scope="module")
def adapted(unet: StoryGenUNet) -> Any:
    """PEFT's model with three adapters of unlike ranks, on linear layers and on convolutions."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = None
        for name, rank in RANKS.items():
            targets = LINEARS if name != "three" else f"{LINEARS}|{CONVOLUTIONS}"
            config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
            if model is None:
                model = peft.get_peft_model(copy.deepcopy(unet), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    model.eval()
    return model


@pytest.fixture(scope="module")
def files(adapted: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, rank in RANKS.items():
        state = {k: v.contiguous() for k, v in get_peft_model_state_dict(adapted, adapter_name=name).items()}
        save_file(state, str(folder / f"{name}.safetensors"), metadata={ALPHA: str(2 * rank)})
        found[name] = folder / f"{name}.safetensors"
    return found


@pytest.fixture(params=[1 << 30, 0], ids=["merged", "added"])
def slots(
    unet: StoryGenUNet, files: dict[str, Path], request: pytest.FixtureRequest
) -> tuple[StoryGenUNet, AdapterSlots]:
    """The network with three adapters in the slots 1, 2 and 3, computed in either form."""
    own = copy.deepcopy(unet)
    held = AdapterSlots(own, count=4, rank_max=4, merged_bytes=request.param)
    for slot, file in enumerate(files.values(), start=1):
        held.put(slot, read_adapter_file(file, own))
    worn = held.prepared([(Worn(slot, 1.0),) for slot in (1, 2, 3)])
    assert worn is not None
    assert (worn.merged is not None) == (request.param > 0), "the way that it is named for"
    return own, held


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(rows, 4, 8, 8, generator=generator),
        torch.arange(rows) * 100,
        torch.randn(rows, 7, 16, generator=generator),
    )


@torch.no_grad()
def test_a_mixed_batch_is_what_peft_computes(slots: tuple[StoryGenUNet, AdapterSlots], adapted: Any) -> None:
    own, held = slots
    latents, timesteps, text = inputs(5)
    names = ["one", "three", "__base__", "two", "one"]
    theirs = adapted(latents, timesteps, text, return_dict=False, adapter_names=names)[0]
    worn = [() if name == "__base__" else (Worn(1 + list(RANKS).index(name), 1.0),) for name in names]
    with held.rows(worn):
        ours = own.predict(latents, timesteps, text)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    plain = own.predict(latents, timesteps, text)
    assert not torch.allclose(ours[0], plain[0], atol=1e-3), "the adapters do something"


@torch.no_grad()
def test_a_row_is_the_same_alone_and_among_others(slots: tuple[StoryGenUNet, AdapterSlots]) -> None:
    own, held = slots
    latents, timesteps, text = inputs(4)
    worn = [(Worn(3, 0.7),), (Worn(1, 1.0), Worn(2, 0.5)), (), (Worn(2, 0.3),)]
    with held.rows(worn):
        together = own.predict(latents, timesteps, text)
    for row, one in enumerate(worn):
        with held.rows([one]):
            alone = own.predict(latents[row : row + 1], timesteps[row : row + 1], text[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


@torch.no_grad()
def test_a_row_that_wears_nothing_is_the_networks_own(
    slots: tuple[StoryGenUNet, AdapterSlots], unet: StoryGenUNet
) -> None:
    own, held = slots
    latents, timesteps, text = inputs(3)
    plain = unet.predict(latents, timesteps, text)
    with held.rows([(), (Worn(2, 1.0),), ()]):
        mixed = own.predict(latents, timesteps, text)
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], atol=1e-6, rtol=1e-5)
    assert (mixed[1] - plain[1]).abs().max() > 1e-3
    with held.rows([(), (), ()]):
        assert torch.equal(own.predict(latents, timesteps, text), plain), "nobody among them: bit for bit"


@torch.no_grad()
def test_outfits_whose_weights_do_not_fit_side_by_side_are_added(
    unet: StoryGenUNet, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[str] = []
    merged, added = lora.run_by_run, AdapterSlots._added
    monkeypatch.setattr(lora, "run_by_run", lambda *given: (ways.append(f"{len(given[0])} runs"), merged(*given))[1])
    monkeypatch.setattr(AdapterSlots, "_added", lambda *given: (ways.append("added"), added(*given))[1])
    own = copy.deepcopy(unet)
    weights = sum(
        layer.weight.nbytes for name, layer in adapted_layers(own).items() if re.fullmatch(LINEARS, name) is not None
    )
    held = AdapterSlots(own, count=3, rank_max=4, merged_bytes=2 * weights)
    for slot, name in enumerate(("one", "two"), start=1):
        held.put(slot, read_adapter_file(files[name], own))
    held.put(3, read_adapter_file(files["one"], own))
    latents, timesteps, text = inputs(6)

    def drawn(*slots: int) -> Tensor:
        ways.clear()
        with held.rows([(Worn(slot, 1.0),) for slot in slots]):
            return own.predict(latents[: len(slots)], timesteps[: len(slots)], text[: len(slots)])

    side_by_side = drawn(1, 1, 1, 2, 2, 2)
    assert set(ways) == {"2 runs"}
    mixed = drawn(1, 2, 3)
    assert set(ways) == {"added"}
    torch.testing.assert_close(mixed[0], side_by_side[0], **CLOSE)
    again = drawn(3, 3, 3)  # in the place of those that were worn longest ago
    assert set(ways) == {"1 runs"}
    torch.testing.assert_close(again[2], mixed[2], **CLOSE)
    assert torch.equal(drawn(1, 1, 1, 2, 2, 2), side_by_side)
    uneven = drawn(1, 2, 2, 2, 2)
    assert set(ways) == {"2 runs"}, "not one copy for every row"
    torch.testing.assert_close(uneven[[0, 3, 4]], side_by_side[[0, 3, 4]], **CLOSE)


@torch.no_grad()
def test_merged_weights_stay_within_their_room_and_are_made_where_they_are_used(
    unet: StoryGenUNet, files: dict[str, Path]
) -> None:
    own = copy.deepcopy(unet)
    held = AdapterSlots(own, count=2, rank_max=4, merged_bytes=1 << 20)
    held.put(1, read_adapter_file(files["one"], own))
    latents, timesteps, text = inputs(2)
    for scale in (1.0, 0.5, 0.25, 0.125):
        worn = held.prepared([(Worn(1, scale),), ()])
        assert worn is not None
        assert worn.merged is not None
        assert worn.merged.nbytes == 0
        with held.worn(worn):
            own.predict(latents, timesteps, text)
        assert 0 < worn.merged.nbytes <= worn.merged.bytes_max
        kept = list(held._merged.values())
        assert kept[-1] is worn.merged
        assert sum(one.nbytes for one in kept) <= 1 << 20
    assert len(kept) < 4


@torch.no_grad()
@pytest.mark.parametrize("runs", [(6,), (3, 3), (1,) * 6, (1, 3, 2)], ids=str)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 5),
        nn.Linear(4, 5, bias=False),
        nn.Conv2d(4, 5, 1),
        nn.Conv2d(4, 5, 1, bias=False),
        nn.Conv2d(4, 5, 1, stride=2),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
    ],
    ids=str,
)
def test_every_row_goes_through_its_own_weights(
    layer: nn.Linear | nn.Conv2d, runs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    given = torch.randn((6, 7, 4) if isinstance(layer, nn.Linear) else (6, 4, 8, 8), generator=generator)
    weights = torch.randn(len(runs), *layer.weight.shape, generator=generator)
    answer = run_by_run(weights, runs, layer, given)
    own = [number for number, rows in enumerate(runs) for _ in range(rows)]
    for row in range(6):
        alone = torch.func.functional_call(layer, {"weight": weights[own[row]]}, (given[row : row + 1],))
        torch.testing.assert_close(answer[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(lora, "_REPEATED_BYTES", 0)
    torch.testing.assert_close(run_by_run(weights, runs, layer, given), answer, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_attention_to_references_wears_what_the_references_wear(
    slots: tuple[StoryGenUNet, AdapterSlots], adapted: Any
) -> None:
    """Two jobs of different characters: the keys and values of each reference are those of its own job."""
    own, held = slots
    latents, timesteps, text = inputs(2)
    earlier, levels, told = (value.flip(0) for value in inputs(2))
    with held.rows([(Worn(1, 1.0),), (Worn(2, 1.0),)]):
        projected = own.project(own.features(earlier, levels, told))
    seen = References(projected, torch.tensor([[0], [1]]))
    with held.rows([(Worn(1, 1.0),), (Worn(2, 1.0),)]):
        together = own.predict(latents, timesteps, text, seen)
    for row, name in enumerate(("one", "two")):
        merged = copy.deepcopy(adapted)
        merged.set_adapter(name)
        merged = merged.merge_and_unload(adapter_names=[name])
        at = slice(row, row + 1)
        looked = References(merged.project(merged.features(earlier[at], levels[at], told[at])), torch.tensor([[0]]))
        alone = merged.predict(latents[at], timesteps[at], text[at], looked)
        torch.testing.assert_close(together[at], alone, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_two_adapters_on_a_row_add_up(slots: tuple[StoryGenUNet, AdapterSlots], adapted: Any) -> None:
    own, held = slots
    latents, timesteps, text = inputs(2)
    with held.rows([(Worn(1, 0.5), Worn(2, 1.0)), (Worn(2, 1.0),)]):
        ours = own.predict(latents, timesteps, text)
    merged = copy.deepcopy(adapted)
    merged.base_model.set_adapter(["one", "two"])
    for layer in merged.modules():
        if hasattr(layer, "scaling") and "one" in layer.scaling:
            layer.scaling["one"] *= 0.5
    merged = merged.merge_and_unload(adapter_names=["one", "two"])
    torch.testing.assert_close(ours[:1], merged.predict(latents[:1], timesteps[:1], text[:1]), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_slot_that_was_cleared_changes_nothing_and_can_be_filled_again(
    slots: tuple[StoryGenUNet, AdapterSlots], files: dict[str, Path]
) -> None:
    own, held = slots
    latents, timesteps, text = inputs(1)
    with held.rows([(Worn(3, 1.0),)]):
        before = own.predict(latents, timesteps, text)
    held.put(3, read_adapter_file(files["one"], own))
    with held.rows([(Worn(3, 1.0),)]):
        other = own.predict(latents, timesteps, text)
    with held.rows([(Worn(1, 1.0),)]):
        assert torch.equal(own.predict(latents, timesteps, text), other), "nothing of the larger one is left"
    held.put(3, read_adapter_file(files["three"], own))
    with held.rows([(Worn(3, 1.0),)]):
        assert torch.equal(own.predict(latents, timesteps, text), before)
    held.clear(3)
    with pytest.raises(ValueError, match="slots \\[3\\]"), held.rows([(Worn(3, 1.0),)]):
        pass
    assert set(held.held) == {1, 2}


@torch.no_grad()
def test_an_adapter_for_which_there_is_no_memory_changes_nothing(
    unet: StoryGenUNet, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs out half-way through layers that nobody else changes, and the others go on together."""
    net = copy.deepcopy(unet)
    held, given, worn = AdapterSlots(net, count=2, rank_max=4, merged_bytes=0), inputs(2), [(Worn(1, 1.0),), ()]
    one, three = (read_adapter_file(files[name], net) for name in ("one", "three"))
    held.put(1, one)
    with held.rows(worn):
        expected = net.predict(*given)
    before = (held.stacks_bytes, held.parts)
    zeros, calls = Tensor.new_zeros, 0

    def fails(*asked: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # the second part of the second layer that is new
            raise MemoryError
        return zeros(*asked)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_zeros", fails)
        with pytest.raises(MemoryError):
            held.put(2, three)
    assert calls == 4
    assert (held.stacks_bytes, held.parts) == before
    assert dict(held.held) == {1: one.digest}
    with held.rows(worn):
        torch.testing.assert_close(net.predict(*given), expected)
    held.put(2, three)
    with held.rows([(Worn(1, 1.0),), (Worn(2, 1.0),)]):
        assert not torch.equal(net.predict(*given)[1], expected[1])


def test_adapters_side_by_side_have_a_budget(unet: StoryGenUNet, files: dict[str, Path]) -> None:
    net = copy.deepcopy(unet)
    one, three = (read_adapter_file(files[name], net) for name in ("one", "three"))
    roomy = AdapterSlots(net, count=2, rank_max=4)
    roomy.put(1, one)
    needed = roomy.stacks_bytes
    tight = AdapterSlots(copy.deepcopy(unet), count=2, rank_max=4, stacks_bytes_max=needed)
    tight.put(1, one)
    assert tight.stacks_bytes == needed
    tight.put(2, one)
    with pytest.raises(AdapterTooLarge, match="MiB"):
        tight.put(2, three)
    assert dict(tight.held) == {1: one.digest, 2: one.digest}


@torch.no_grad()
@pytest.mark.parametrize("merged_bytes", [1 << 30, 0], ids=["merged", "added"])
def test_whole_differences_of_keys_and_values_are_added(unet: StoryGenUNet, tmp_path: Path, merged_bytes: int) -> None:
    own = copy.deepcopy(unet)
    layers = {name: layer for name, layer in adapted_layers(own).items() if name.endswith("attn2.to_k")}
    deltas = {f"{name}.delta": torch.randn(layer.weight.shape) for name, layer in layers.items()}
    save_file(deltas, str(tmp_path / "k.safetensors"))
    held = AdapterSlots(own, count=1, rank_max=1, merged_bytes=merged_bytes)
    held.put(1, read_adapter_file(tmp_path / "k.safetensors", own))
    latents, timesteps, text = inputs(2)
    with held.rows([(Worn(1, 0.5),), ()]):
        ours = own.predict(latents, timesteps, text)
    changed = copy.deepcopy(unet)
    for name in layers:
        changed.get_submodule(name).weight += 0.5 * deltas[f"{name}.delta"]
    torch.testing.assert_close(ours[:1], changed.predict(latents[:1], timesteps[:1], text[:1]), **CLOSE)
    assert torch.equal(ours[1:], unet.predict(latents, timesteps, text)[1:])


def test_diffusers_names_and_alphas_are_read(unet: StoryGenUNet, tmp_path: Path) -> None:
    name = next(n for n in adapted_layers(unet) if n.endswith("attn1.to_q"))
    width = unet.get_submodule(name).weight.shape[0]
    state = {
        f"unet.{name}.lora.down.weight": torch.ones(2, width),
        f"unet.{name}.lora.up.weight": torch.ones(width, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(state, str(tmp_path / "d.safetensors"))
    found = read_adapter_file(tmp_path / "d.safetensors", unet)
    assert found.rank == 2
    assert torch.equal(found.factors[name].scaled_up, torch.full((width, 2), 0.5))
    assert found.size_bytes == 2 * 2 * width * 4


def test_pefts_alpha_is_found_in_the_file_beside(unet: StoryGenUNet, files: dict[str, Path], tmp_path: Path) -> None:
    save_file(load_file(str(files["one"])), str(tmp_path / "adapter_model.safetensors"))
    plain = read_adapter_file(tmp_path / "adapter_model.safetensors", unet)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    scaled = read_adapter_file(tmp_path / "adapter_model.safetensors", unet)
    name = next(iter(plain.factors))
    assert torch.equal(scaled.factors[name].scaled_up, 2 * plain.factors[name].scaled_up)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": "many"}')
    with pytest.raises(AdapterDamaged, match="number"):
        read_adapter_file(tmp_path / "adapter_model.safetensors", unet)


def test_what_does_not_fit_is_refused_by_name(unet: StoryGenUNet, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    good = load_file(str(files["one"]))
    first = sorted(good)[0]

    def refused(state: dict[str, Tensor], error: type[Exception], match: str, **metadata: str) -> None:
        save_file(state, str(path), metadata=metadata)
        with pytest.raises(error, match=match):
            read_adapter_file(path, unet, base_digest="b" * 64, rank_max=8)

    refused({**good, first: torch.full_like(good[first], torch.nan)}, AdapterDamaged, "finite")
    refused({k: v for k, v in good.items() if k != first}, AdapterDamaged, "half")
    refused({**good, first: torch.zeros(2, 999)}, AdapterWrongShape, "999")
    refused({**good, "mid.nothing.lora_A.weight": torch.zeros(1, 1), "mid.nothing.lora_B.weight": torch.zeros(1, 1)},
            AdapterWrongShape, "mid.nothing")  # fmt: skip
    refused({**good, "loose": torch.zeros(1)}, AdapterWrongShape, "loose")
    refused({}, AdapterDamaged, "empty|cannot be read")
    refused(good, AdapterWrongBase, "another|trained on", **{BASE_DIGEST: "a" * 64})
    wide = {k: torch.zeros(9, v.shape[1]) if "lora_A" in k else torch.zeros(v.shape[0], 9) for k, v in good.items()}
    refused(wide, AdapterWrongShape, "rank 9")
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(AdapterDamaged, match="cannot be read"):
        read_adapter_file(path, unet)
    with pytest.raises(AdapterDamaged, match="cannot be read"):
        read_adapter_file(tmp_path / "nowhere.safetensors", unet)


def test_a_file_of_a_whole_unet_is_one(unet: StoryGenUNet, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        other = build_storygen(UNET)
    path = tmp_path / "x.safetensors"
    state = {name: value.half().contiguous() for name, value in other.state_dict().items()}
    save_file(state, str(path))
    adapter = read_adapter_file(path, unet)
    assert not adapter.needs_slot
    assert adapter.size_bytes == sum(4 * value.numel() for value in state.values()), "of the pack's type"
    with torch.no_grad():
        mine, theirs = adapter.unet.predict(*inputs(2)), unet.predict(*inputs(2))
        expected = other.half().float().predict(*inputs(2))
    assert torch.equal(mine, expected)
    assert not torch.allclose(mine, theirs, atol=1e-3)
    first = sorted(state)[0]
    save_file({**state, first: torch.zeros(3)}, str(path))
    with pytest.raises(AdapterWrongShape, match=re.escape(f"{first} is (3,)")):
        read_adapter_file(path, unet)
    save_file({name: value for name, value in state.items() if name != first}, str(path))
    with pytest.raises(AdapterWrongShape, match="no part of an adapter"):
        read_adapter_file(path, unet)


def test_words_that_were_learned_are_read(unet: StoryGenUNet, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"words.Zoe": torch.ones(2, 16), "<cat-toy>": torch.zeros(16)}, str(path))
    adapter = read_adapter_file(path, unet, text_width=16)
    assert {word: tuple(vectors.shape) for word, vectors in adapter.words.items()} == {
        "Zoe": (2, 16),
        "<cat-toy>": (1, 16),
    }
    assert not adapter.needs_slot
    assert adapter.size_bytes == 4 * 48
    for width in (0, 8):
        with pytest.raises(AdapterWrongShape, match=f"words are {width} wide"):
            read_adapter_file(path, unet, text_width=width)


def test_who_changes_no_layer_may_be_among_those_who_do(slots: tuple[StoryGenUNet, AdapterSlots]) -> None:
    own, held = slots
    with torch.no_grad():
        with held.rows([(Worn(1, 1.0),), (NOBODY,)]):
            mixed = own.predict(*inputs(2))
        with held.rows([(Worn(1, 1.0),), ()]):
            expected = own.predict(*inputs(2))
        with held.rows([(NOBODY,), (NOBODY,)]):
            nobody = own.predict(*inputs(2))
        plain = own.predict(*inputs(2))
    assert torch.equal(mixed, expected)
    assert torch.equal(nobody, plain)


def test_announced_rows_must_be_the_rows_that_come(slots: tuple[StoryGenUNet, AdapterSlots]) -> None:
    own, held = slots
    with torch.no_grad(), held.rows([(Worn(1, 1.0),)]), pytest.raises(ValueError, match="announced"):
        own.predict(*inputs(2))
