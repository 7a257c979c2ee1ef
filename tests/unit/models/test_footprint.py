"""What a pack takes of memory, told before any weight is read, and packs that do not fit."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from services.models.drawing import Seen, Sketch, begin
from services.models.errors import PackTooLarge
from services.models.footprint import Footprint, check_room, footprint
from services.models.pack import MANIFEST, Pack, read_manifest
from services.models.registry import load_frame_model
from services.models.step import advance
from services.models.storygen import StoryGenConfig, build_storygen
from tests.flux2_checkpoints import pipeline, sealed, settings

MIB = 1 << 20


def test_the_weights_are_counted_to_the_byte(tiny_pack: Pack) -> None:
    model = load_frame_model(tiny_pack)
    networks = {"unet": model.denoiser.unet, "vae": model.codec.vae, "text": getattr(model.text, "model", None)}
    numbers = {
        name: sum(value.numel() for value in network.state_dict().values())  # type: ignore[union-attr]
        for name, network in networks.items()
    }
    for width in (2, 4):
        found = footprint(tiny_pack.folder, tiny_pack.manifest, unet_bytes=width)
        assert found.weights_bytes == numbers["unet"] * width + (numbers["vae"] + numbers["text"]) * 4
        assert found.loading_bytes == tiny_pack.manifest.files["unet/diffusion_pytorch_model.safetensors"].size_bytes
        assert 0 < found.working_bytes < 64 * MIB


def test_no_weight_is_read(tiny_pack: Pack, pack_folder: Path) -> None:
    """Weights that are cut off behind their header, and even that cannot be read, are somebody else's finding."""
    whole = footprint(tiny_pack.folder, tiny_pack.manifest, unet_bytes=4)
    weights = pack_folder / "unet/diffusion_pytorch_model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    weights.write_bytes(weights.read_bytes()[: 8 + header])
    assert footprint(pack_folder, read_manifest(pack_folder), unet_bytes=4) == whole
    weights.write_bytes(b"\xff" * 50)
    (pack_folder / "unet/config.json").write_text("{")
    (pack_folder / "vae/config.json").unlink()
    guessed = footprint(pack_folder, read_manifest(pack_folder), unet_bytes=4)
    assert guessed.weights_bytes > 0
    assert guessed.working_bytes == 0


def test_a_storygen_at_its_published_size_takes_gigabytes(tmp_path: Path, pack_folder: Path) -> None:
    """909 million numbers, by a header alone: the file behind it is a hole."""
    with torch.device("meta"):
        state = build_storygen(StoryGenConfig()).state_dict()
    header, end = {}, 0
    for name, value in state.items():
        header[name] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [end, end + 2 * value.numel()]}
        end += 2 * value.numel()
    head = json.dumps(header).encode()
    weights = pack_folder / "unet/diffusion_pytorch_model.safetensors"
    with weights.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)
    (pack_folder / "unet/config.json").write_text(json.dumps(StoryGenConfig().to_dict()))
    document = json.loads((pack_folder / MANIFEST).read_text())
    document.update(width_px=512, height_px=512)
    document["files"]["unet/diffusion_pytorch_model.safetensors"]["size_bytes"] = weights.stat().st_size
    (pack_folder / MANIFEST).write_text(json.dumps(document))
    half = footprint(pack_folder, read_manifest(pack_folder), unet_bytes=2)
    full = footprint(pack_folder, read_manifest(pack_folder), unet_bytes=4)
    numbers = sum(value.numel() for value in state.values())
    assert full.weights_bytes - half.weights_bytes == 2 * numbers > 1.8e9
    assert full.working_bytes > half.working_bytes > 50 * MIB
    with pytest.raises(PackTooLarge, match="2048 MiB of memory are free"):
        check_room([full], free_bytes=2 << 30)
    check_room([full], free_bytes=16 << 30)


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.most_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                # Views, and what is written in place, are no new memory.
                if storage._cdata not in self._known | given:
                    self._known.add(storage._cdata)
                    self.now_bytes += storage.nbytes()
                    self.most_bytes = max(self.most_bytes, self.now_bytes)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, name: int, size_bytes: int) -> None:
        self._known.discard(name)
        self.now_bytes -= size_bytes


@pytest.mark.parametrize(
    ("kind", "side_px", "references", "guidance"),
    [
        ("flux2-klein", 128, 3, 4.0),
        ("flux2-klein", 128, 1, 4.0),
        ("flux2-klein", 128, 3, 1.0),
        ("flux2-klein", 64, 0, 4.0),
        ("flux2-klein-kv", 256, 3, 1.0),
        ("flux2-klein-kv", 128, 3, 4.0),
    ],
)
def test_a_transformers_work_is_counted_with_its_references(
    tmp_path: Path, kind: str, side_px: int, references: int, guidance: float
) -> None:
    """Against the tensors that one step really makes: never more than those, and most of them."""
    sampling = settings("any").sampling.model_copy(update={"default_text_guidance": guidance})
    pack = sealed(
        tmp_path / "flux2",
        kind,
        pipeline(kind),
        width_px=side_px,
        height_px=side_px,
        max_references=references,
        sampling=sampling,
    )
    model = load_frame_model(pack)
    seen = Seen(pixels=np.zeros((side_px, side_px, 3), dtype=np.uint8), description="")
    job = Sketch(
        description="a fox",
        seed=1,
        width_px=side_px,
        height_px=side_px,
        steps=1,
        text_guidance=guidance,
        image_guidance=1.0,
        references=(seen,) * references,
    )
    drawing = begin(model, job)  # encoding pictures takes more than a tiny transformer does
    kept = sum(part.nbytes for both in drawing.shown.values() for part in both)
    with Memory() as memory:
        advance(model, [drawing])
    took = memory.most_bytes + (kept if kind == "flux2-klein-kv" else 0)
    found = footprint(pack.folder, without_decoder(pack), unet_bytes=4).working_bytes
    assert 0.6 * took < found <= took


def without_decoder(pack: Pack) -> Any:
    """The manifest of a pack whose decoder's config says nothing but how much it shrinks, so that it does not count."""
    (pack.folder / "vae/config.json").write_text('{"block_out_channels": [1, 1, 1, 1]}')
    (pack.folder / "text_encoder/config.json").write_text("{}")
    return pack.manifest


def test_reading_a_description_counts(tmp_path: Path) -> None:
    """A language model that is deep and wide beside a small transformer: it gives the states of all its layers."""
    pack = sealed(tmp_path / "flux2", "flux2-klein", pipeline("flux2-klein"))
    small = footprint(pack.folder, pack.manifest, unet_bytes=2).working_bytes
    (pack.folder / "text_encoder/config.json").write_text('{"num_hidden_layers": 36, "hidden_size": 2560}')
    assert footprint(pack.folder, pack.manifest, unet_bytes=2).working_bytes == 2 * 37 * 512 * 2560 * 2 > small


@pytest.mark.parametrize("nonsense", ["{}", '{"num_attention_heads": -3}', '{"num_attention_heads": "many"}', "["])
def test_a_transformer_that_does_not_say_its_shape_is_not_guessed(tmp_path: Path, nonsense: str) -> None:
    pack = sealed(tmp_path / "flux2", "flux2-klein", pipeline("flux2-klein"))
    (pack.folder / "transformer/config.json").write_text(nonsense)
    manifest = without_decoder(pack)
    (pack.folder / "vae/config.json").unlink()
    assert footprint(pack.folder, manifest, unet_bytes=4).working_bytes == 0


def of(name: str, *, weights: int, loading: int = 0, working: int = 0) -> Footprint:
    return Footprint(name=name, weights_bytes=weights * MIB, loading_bytes=loading * MIB, working_bytes=working * MIB)


def test_packs_must_fit_together() -> None:
    small, large = of("small", weights=10, working=5), of("large", weights=80, loading=40, working=20)
    check_room([], free_bytes=0)
    check_room([large], free_bytes=120 * MIB)
    with pytest.raises(
        PackTooLarge, match=r"'large' does not fit: its weights take 80 MiB, .* 40 MiB more, and 119 MiB"
    ):
        check_room([large], free_bytes=119 * MIB)
    check_room([small, large], free_bytes=130 * MIB)
    with pytest.raises(PackTooLarge, match=r"90 MiB \(of small, large together\)") as raised:
        check_room([small, large], free_bytes=129 * MIB)
    assert "FABULA_FRAME_CHECK_MEMORY=false" in str(raised.value)


def test_a_gpu_has_a_memory_of_its_own() -> None:
    pack = of("one", weights=80, loading=160, working=20)
    check_room([pack], free_bytes=100 * MIB, host_free_bytes=160 * MIB)
    with pytest.raises(PackTooLarge, match="fit the GPU"):
        check_room([pack], free_bytes=99 * MIB, host_free_bytes=160 * MIB)
    with pytest.raises(PackTooLarge, match="on its way to the GPU"):
        check_room([pack], free_bytes=100 * MIB, host_free_bytes=159 * MIB)
