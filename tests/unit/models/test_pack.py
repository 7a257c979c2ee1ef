"""Packs: what is sealed is what is loaded, and anything else has a name."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.models.errors import (
    ModelError,
    PackError,
    PackFileDamaged,
    PackFileMissing,
    PackFileUnsafe,
    PackManifestInvalid,
    PackNotFound,
    PackWeightsMismatch,
    TextTooLong,
)
from services.models.pack import MANIFEST, Pack, PackSettings, find_pack, load_pack, write_pack
from services.models.quality import Quality
from services.models.registry import FrameModel, load_frame_model, save_network
from services.models.text_encoder import TextEncoder
from services.models.tiny import UNET, build_tiny_pack, byte_tokenizer

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    edit(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def reseal(folder: Path) -> Pack:
    """Seal a changed pack again with its own settings, as whoever made it on purpose would."""
    document = json.loads((folder / MANIFEST).read_text())
    settings = {name: document[name] for name in PackSettings.model_fields}
    return write_pack(folder, PackSettings.model_validate_json(json.dumps(settings)))


def test_what_was_written_is_what_is_read(tiny_pack: Pack) -> None:
    again = load_pack(tiny_pack.folder)
    assert again.manifest == tiny_pack.manifest
    for relative, entry in again.manifest.files.items():
        assert hashlib.sha256(again.path(relative).read_bytes()).hexdigest() == entry.sha256
    assert MANIFEST not in again.manifest.files


def test_same_seed_same_digest_and_another_seed_another(tiny_pack: Pack, tmp_path: Path) -> None:
    assert build_tiny_pack(tmp_path / "a", captions=False).digest == tiny_pack.digest
    assert build_tiny_pack(tmp_path / "b", seed=1, captions=False).digest != tiny_pack.digest


def test_digest_is_of_the_canonical_manifest(pack_folder: Path, tiny_pack: Pack) -> None:
    """Layout of the JSON does not matter; every value does."""
    document = json.loads((pack_folder / MANIFEST).read_text())
    (pack_folder / MANIFEST).write_text(json.dumps(dict(reversed(document.items())), indent=7))
    assert load_pack(pack_folder).digest == tiny_pack.digest
    edit_manifest(pack_folder, lambda d: d["sampling"].update(default_steps=5))
    assert load_pack(pack_folder).digest != tiny_pack.digest


def test_weights_are_stored_in_half_precision(tiny_pack: Pack) -> None:
    assert {value.dtype for value in load_file(tiny_pack.path(WEIGHTS)).values()} == {torch.float16}


def test_first_match_on_the_search_path_wins(tmp_path: Path, pack_folder: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pack_folder, other / "tiny")
    assert find_pack("tiny", [tmp_path / "nowhere", other, pack_folder.parent]) == other / "tiny"


def test_a_folder_that_bears_another_packs_name_is_refused(tmp_path: Path, pack_folder: Path) -> None:
    shutil.copytree(pack_folder, tmp_path / "tiny-new")
    with pytest.raises(PackManifestInvalid, match="calls itself 'tiny'"):
        find_pack("tiny-new", [tmp_path])


@pytest.mark.parametrize("name", ["absent", "../tiny", "", "/etc", "Tiny", "a/b"])
def test_unknown_packs_are_not_found(pack_folder: Path, name: str) -> None:
    with pytest.raises(PackNotFound):
        find_pack(name, [pack_folder.parent])


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def swap_in_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))


def link_outside(folder: Path) -> None:
    outside = folder.parent / "outside.json"
    shutil.move(folder / "unet/config.json", outside)
    (folder / "unet/config.json").symlink_to(outside)


DAMAGE: list[tuple[str, Callable[[Path], object], type[PackError]]] = [
    ("no manifest", lambda f: (f / MANIFEST).unlink(), PackManifestInvalid),
    ("manifest is not JSON", lambda f: (f / MANIFEST).write_text("{"), PackManifestInvalid),
    ("unknown key", lambda f: edit_manifest(f, lambda d: d.update(colour="red")), PackManifestInvalid),
    ("unknown schedule key", lambda f: edit_manifest(f, lambda d: d["schedule"].update(x=1)), PackManifestInvalid),
    ("missing key", lambda f: edit_manifest(f, lambda d: d.pop("licence")), PackManifestInvalid),
    ("number as text", lambda f: edit_manifest(f, lambda d: d.update(width_px="64")), PackManifestInvalid),
    ("odd size", lambda f: edit_manifest(f, lambda d: d.update(width_px=63)), PackManifestInvalid),
    (
        "bad schedule",
        lambda f: edit_manifest(f, lambda d: d["schedule"].update(spacing="leading")),
        PackManifestInvalid,
    ),
    ("newer format", lambda f: edit_manifest(f, lambda d: d.update(format=2)), PackManifestInvalid),
    (
        "path leaves the folder",
        lambda f: edit_manifest(f, lambda d: d["files"].update({"../x": next(iter(d["files"].values()))})),
        PackManifestInvalid,
    ),
    ("file missing", lambda f: (f / WEIGHTS).unlink(), PackFileMissing),
    ("file changed", flip_a_byte, PackFileDamaged),
    ("file cut short", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), PackFileDamaged),
    ("pickle in disguise", swap_in_a_pickle, PackFileUnsafe),
    ("unlisted file", lambda f: (f / "unet/pytorch_model.bin").write_bytes(b"x"), PackFileUnsafe),
    ("link leads out", link_outside, PackFileUnsafe),
]


@pytest.mark.parametrize(("damage", "error"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_has_a_name(pack_folder: Path, damage: Callable[[Path], object], error: type[PackError]) -> None:
    damage(pack_folder)
    with pytest.raises(error) as raised:
        load_pack(pack_folder)
    assert type(raised.value) is error
    assert str(raised.value)


def test_a_pickle_cannot_be_sealed_either(pack_folder: Path) -> None:
    swap_in_a_pickle(pack_folder)
    with pytest.raises(PackFileUnsafe):
        reseal(pack_folder)
    (pack_folder / WEIGHTS).unlink()
    (pack_folder / "unet/weights.pt").write_bytes(b"x")
    with pytest.raises(PackFileUnsafe):
        reseal(pack_folder)


def wrong_shape(state: dict[str, torch.Tensor]) -> None:
    state["conv_out.bias"] = torch.zeros(5)


def missing_weight(state: dict[str, torch.Tensor]) -> None:
    del state["conv_out.bias"]


def unknown_weight(state: dict[str, torch.Tensor]) -> None:
    state["conv_extra.bias"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("change", "words"),
    [(wrong_shape, "conv_out.bias is"), (missing_weight, "missing"), (unknown_weight, "conv_extra.bias is unknown")],
)
def test_weights_that_do_not_fit_are_refused(
    pack_folder: Path, change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    state = load_file(pack_folder / WEIGHTS)
    change(state)
    save_file(state, pack_folder / WEIGHTS)
    with pytest.raises(PackWeightsMismatch, match=words):
        load_frame_model(reseal(pack_folder))


@pytest.mark.parametrize(
    ("key", "value"), [("architecture", "crayon"), ("sampling", {"sampler": "magic"})], ids=["architecture", "sampler"]
)
def test_unknown_architectures_and_samplers_are_named(pack_folder: Path, key: str, value: Any) -> None:
    edit_manifest(pack_folder, lambda d: d[key].update(value) if isinstance(value, dict) else d.update({key: value}))
    with pytest.raises(PackManifestInvalid, match="unknown; known"):
        load_frame_model(load_pack(pack_folder))


def test_unknown_network_settings_are_named(pack_folder: Path) -> None:
    config = json.loads((pack_folder / "unet/config.json").read_text())
    (pack_folder / "unet/config.json").write_text(json.dumps({**config, "wheels": 4}))
    with pytest.raises(PackManifestInvalid, match="wheels"):
        load_frame_model(reseal(pack_folder))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("vae/config.json", {"latent_channels": 8}, "VAE's latent channels are 8"),
        ("unet/config.json", {"in_channels": 9}, "input channels are 9"),
        ("unet/config.json", {"cross_attention_dim": 32}, "32 wide"),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused(
    pack_folder: Path, file: str, change: dict[str, Any], said: str
) -> None:
    config = json.loads((pack_folder / file).read_text())
    (pack_folder / file).write_text(json.dumps(config | change))
    with pytest.raises(PackManifestInvalid, match=said):
        load_frame_model(reseal(pack_folder))


def test_broken_weights_cannot_be_saved(tmp_path: Path, tiny_model: FrameModel) -> None:
    from services.models.storygen import build_storygen

    unet = build_storygen(UNET)
    with torch.no_grad():
        unet.conv_out.bias[0] = 1e6  # beyond float16
    with pytest.raises(ValueError, match=r"conv_out\.bias"):
        save_network(tmp_path, unet, UNET, torch.float16)


def test_every_error_has_its_own_reason() -> None:
    def below(cls: type[ModelError]) -> list[type[ModelError]]:
        return [cls, *(deeper for child in cls.__subclasses__() for deeper in below(child))]

    reasons = [cls.reason for cls in below(ModelError)]
    assert len(reasons) == len(set(reasons))


def test_a_text_that_fills_the_window_is_taken_and_one_more_is_not(tiny_model: FrameModel) -> None:
    text = tiny_model.text
    room = text.window - 2
    assert text.token_ids(["a" * room]).shape == (1, text.window)
    with pytest.raises(TextTooLong) as raised:
        text.token_ids(["a" * (room + 1)])
    assert (raised.value.token_count, raised.value.limit, raised.value.reason) == (room + 1, room, "TEXT_TOO_LONG")


def test_token_rows_are_begin_text_end_padding(tiny_model: FrameModel) -> None:
    tokenizer = byte_tokenizer()
    row = tiny_model.text.token_ids(["hi <eos>"])[0].tolist()
    assert row[0] == tokenizer.bos_id
    end = row.index(tokenizer.eos_id)
    assert tokenizer.decode(row[1:end]) == "hi <eos>"
    assert set(row[end + 1 :]) == {tokenizer.pad_id}


def test_text_is_encoded_row_by_row(tiny_model: FrameModel) -> None:
    texts = ["a fox", "", "a very much longer text about a fox and its kite"]
    with torch.no_grad():
        together = tiny_model.text.encode(texts)
        for i, text in enumerate(texts):
            torch.testing.assert_close(together[i : i + 1], tiny_model.text.encode([text]), atol=1e-5, rtol=1e-5)
    assert isinstance(tiny_model.text, TextEncoder)


@pytest.mark.slow
def test_a_tiny_pack_is_complete(tmp_path: Path) -> None:
    files = build_tiny_pack(tmp_path / "tiny").manifest.files
    for name in ("llava/config.json", "llava/model.safetensors", "adapters/story/adapter_model.safetensors"):
        assert name in files
    assert "adapters/descriptive/adapter_config.json" in files


def test_a_pack_that_says_nothing_of_qualities_has_them_all(tiny_pack: Pack) -> None:
    sampling = tiny_pack.manifest.sampling
    steps = {quality: sampling.at(quality).steps for quality in Quality}
    assert steps == {Quality.DRAFT: 2, Quality.STANDARD: 4, Quality.BEST: 8}
    assert {sampling.at(quality).text_guidance for quality in Quality} == {sampling.default_text_guidance}
    assert not any(sampling.at(quality).adapter for quality in Quality)


def test_a_pack_says_what_its_qualities_are(pack_folder: Path, tiny_pack: Pack) -> None:
    told = {"steps": 3, "text_guidance": 1.0, "image_guidance": 1.0, "adapter": "tokenizer/tokenizer.json"}
    edit_manifest(pack_folder, lambda d: d["sampling"].update(qualities={"draft": told}))
    pack = load_pack(pack_folder)
    assert pack.manifest.sampling.at(Quality.DRAFT).model_dump() == told
    assert pack.manifest.sampling.at(Quality.DRAFT, adapters=False).steps == 2, "as if it had said nothing"
    assert pack.manifest.sampling.at(Quality.BEST).steps == 8
    assert pack.digest != tiny_pack.digest
    with pytest.raises(PackWeightsMismatch, match="cannot be read"):
        load_frame_model(pack)
    edit_manifest(pack_folder, lambda d: d["sampling"]["qualities"]["draft"].update(adapter=WEIGHTS))
    with pytest.raises(PackWeightsMismatch, match="changes no layer"):  # it is the UNet itself
        load_frame_model(load_pack(pack_folder))
    edit_manifest(pack_folder, lambda d: d["sampling"]["qualities"]["draft"].update(adapter="draft/no.safetensors"))
    with pytest.raises(PackManifestInvalid, match="no file of the pack"):
        load_pack(pack_folder)


def test_an_empty_word_of_qualities_changes_no_digest(pack_folder: Path, tiny_pack: Pack) -> None:
    """They came later: packs that were sealed before keep the digest that stories have stored."""
    edit_manifest(pack_folder, lambda d: d["sampling"].pop("qualities"))
    assert load_pack(pack_folder).digest == tiny_pack.digest
