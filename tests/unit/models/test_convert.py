"""Old weights become safetensors in a process that can do nothing else; what wants more is refused by name."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from services.models import convert as convert_module
from services.models.convert import convert_path
from services.models.errors import (
    ConversionError,
    ConversionRefused,
    WeightsTooLarge,
    WeightsUnreadable,
    WeightsUnsafe,
)


class Burglar:
    """A pickle that runs a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    shared = torch.randn(3, generator=generator)
    return {
        "a.weight": base,
        "a.turned": base.t(),  # a view that is not contiguous
        "a.part": base[1:3, ::2],
        "b.one": shared,
        "b.same": shared,
        "c.half": torch.randn(5, generator=generator).half(),
        "c.brain": torch.randn(5, generator=generator).bfloat16(),
        "c.count": torch.tensor(7),
        "c.flags": torch.tensor([True, False]),
        "c.none": torch.zeros(0, 3),
        "d.parameter": torch.nn.Parameter(torch.ones(2)),
    }


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_both_old_formats_become_the_same_weights(tmp_path: Path, suffix: str) -> None:
    torch.save(weights(), tmp_path / f"w{suffix}", _use_new_zipfile_serialization=suffix != ".pth")
    done = convert_path(tmp_path / f"w{suffix}", tmp_path / "w.safetensors")
    assert same(load_file(tmp_path / "w.safetensors"), weights())
    (one,) = done.files
    assert (one.tensors_count, one.dropped) == (len(weights()), ())
    assert one.size_bytes == (tmp_path / "w.safetensors").stat().st_size
    with safe_open(str(tmp_path / "w.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", f"w{suffix}"}


def test_a_lightning_checkpoint_is_unwrapped_and_says_what_it_dropped(tmp_path: Path) -> None:
    document = {
        "epoch": 49,
        "pytorch-lightning_version": "1.6.0",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "state_dict": {**weights(), "unet": {"conv": torch.ones(1)}, "name": "a text", 3: torch.zeros(1)},
    }
    torch.save(document, tmp_path / "last.ckpt")
    done = convert_path(tmp_path / "last.ckpt", tmp_path / "last.safetensors")
    assert same(load_file(tmp_path / "last.safetensors"), {**weights(), "unet.conv": torch.ones(1)})
    assert done.files[0].dropped == (
        "epoch",
        "optimizer_states",
        "pytorch-lightning_version",
        "state_dict.3",
        "state_dict.name",
    )


def test_a_folder_becomes_what_a_pack_can_be_made_of(tmp_path: Path) -> None:
    old = tmp_path / "old"
    for folder in ("unet", "text_encoder", "vae", ".cache"):
        (old / folder).mkdir(parents=True)
    torch.save(weights(), old / "unet/diffusion_pytorch_model.bin")
    torch.save({"w": torch.ones(2)}, old / "text_encoder/pytorch_model.bin")
    torch.save({"w": torch.ones(2)}, old / "vae/diffusion_pytorch_model.bin")
    save_file({"w": torch.zeros(2)}, old / "vae/diffusion_pytorch_model.safetensors")
    torch.save({"x": argparse.Namespace(a=1)}, old / "training_args.bin")
    (old / "model_index.json").write_text("{}")
    (old / "notes.exe").write_text("x")
    (old / ".cache/blob.bin").write_bytes(b"x")
    done = convert_path(old, tmp_path / "new")
    files = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert torch.equal(load_file(tmp_path / "new/vae/diffusion_pytorch_model.safetensors")["w"], torch.zeros(2))
    assert {each.out for each in done.files} == {
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert {each.partition(" ")[0] for each in done.left_out} == {
        "notes.exe",
        "training_args.bin",
        "vae/diffusion_pytorch_model.bin",
    }


def test_an_index_of_split_weights_names_the_new_files(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for number in (1, 2):
        torch.save({f"w{number}": torch.ones(1)}, tmp_path / "old" / f"pytorch_model-0000{number}-of-00002.bin")
    places = {f"w{number}": f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)}
    (tmp_path / "old/pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    convert_path(tmp_path / "old", tmp_path / "new")
    index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert all((tmp_path / "new" / file).is_file() for file in index["weight_map"].values())


def burglar(path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": Burglar(path.with_name("mark"))}, path)


def old_burglar(path: Path) -> None:
    torch.save({"x": Burglar(path.with_name("mark"))}, path, _use_new_zipfile_serialization=False)


def plain_burglar(path: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Burglar(path.with_name("mark"))}))


def cut(path: Path) -> None:
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:-300])


def huge(path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(4 << 30)}, path)  # a few bytes on disk, 16 GiB as weights of their own


def many(path: Path) -> None:
    one = torch.zeros(1).expand(1 << 18)
    torch.save({f"w{number}": one for number in range(64)}, path)  # 64 MiB when written out


BAD: list[tuple[str, Callable[[Path], object], type[ConversionError], str]] = [
    ("code", burglar, WeightsUnsafe, r"posix\.system"),
    ("code in the old format", old_burglar, WeightsUnsafe, r"posix\.system"),
    ("code in a plain pickle", plain_burglar, WeightsUnsafe, "more than weights"),
    (
        "a class",
        lambda path: torch.save({"x": argparse.Namespace(a=1)}, path),
        WeightsUnsafe,
        r"argparse\.Namespace",
    ),
    ("a module", lambda path: torch.save(torch.nn.Linear(2, 2), path), WeightsUnsafe, "Linear"),
    ("cut off", cut, WeightsUnreadable, "cut off"),
    ("junk", lambda path: path.write_bytes(b"hello world" * 10), WeightsUnreadable, "no file of weights"),
    ("empty", lambda path: path.write_bytes(b""), WeightsUnreadable, "no file of weights"),
    ("one tensor", lambda path: torch.save(torch.ones(2), path), WeightsUnreadable, "without a name"),
    ("a list", lambda path: torch.save([torch.ones(2)], path), WeightsUnreadable, "list"),
    ("no tensors", lambda path: torch.save({"a": 1}, path), WeightsUnreadable, "no weights"),
    ("sparse", lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), WeightsUnreadable, "a is a"),
    (
        "one name twice",
        lambda path: torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, path),
        WeightsUnreadable,
        "two weights",
    ),
    ("a small file with huge weights", huge, WeightsTooLarge, "memory"),
    ("a small file with many weights", many, WeightsTooLarge, ""),
]


@pytest.mark.parametrize(("spoil", "error", "said"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_what_is_no_weights_is_refused_and_leaves_nothing(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[ConversionError], said: str
) -> None:
    spoil(tmp_path / "w.bin")
    with pytest.raises(error, match=said) as raised:
        convert_path(tmp_path / "w.bin", tmp_path / "w.safetensors")
    assert type(raised.value) is error
    assert "w.bin" in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"w.bin"}, "no result, no half one, and no burglary"


def test_one_bad_file_of_a_folder_leaves_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    torch.save(weights(), tmp_path / "old/a.bin")
    burglar(tmp_path / "old/b.bin")
    with pytest.raises(WeightsUnsafe, match=r"b\.bin"):
        convert_path(tmp_path / "old", tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "w.bin")
    (tmp_path / "w.safetensors").write_text("mine")
    with pytest.raises(ConversionRefused, match="there already"):
        convert_path(tmp_path / "w.bin", tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_text() == "mine"
    with pytest.raises(ConversionRefused, match="must end in"):
        convert_path(tmp_path / "w.bin", tmp_path / "w.json")
    with pytest.raises(ConversionRefused, match="is none of"):
        convert_path(tmp_path / "w.safetensors", tmp_path / "v.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionRefused, match="to convert"):
        convert_path(tmp_path / "empty", tmp_path / "new")


SPY = """
import json, os, socket, sys
sys.path.insert(0, {folder!r})
import converter
closed = converter.shut_off()
import torch
torch.set_num_threads(1)
converter.limit(1000)
def tried(work):
    try:
        work()
    except BaseException as error:
        return type(error).__name__
    return "done"
found = {{
    "network_closed": closed,
    "environment": sorted(os.environ),
    "connect": tried(lambda: socket.create_connection(("127.0.0.1", {port}), timeout=5)),
    "allocate": tried(lambda: bytearray(1 << 30)),
    "write": tried(lambda: os.pwrite(int(sys.argv[2]), bytes(8 << 20), 0) == 8 << 20 or sys.exit()),
    "spin": converter.resource.getrlimit(converter.resource.RLIMIT_CPU)[0] < 600,
}}
print(json.dumps({{"reason": "WEIGHTS_UNREADABLE", "message": json.dumps(found)}}))
"""


def test_whatever_gets_through_finds_itself_locked_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spy in the converter's place, started by the real code with the converter's own limits, says what it can do."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        spy = tmp_path / "spy.py"
        spy.write_text(
            SPY.format(folder=str(convert_module.CONVERTER.parent), port=server.getsockname()[1]), encoding="utf-8"
        )
        monkeypatch.setattr(convert_module, "CONVERTER", spy)
        monkeypatch.setenv("FABULA_DATABASE_URL", "secret")
        torch.save(weights(), tmp_path / "w.bin")
        with pytest.raises(WeightsUnreadable) as raised:
            convert_path(tmp_path / "w.bin", tmp_path / "w.safetensors")
    found = json.loads(str(raised.value).partition("not converted: ")[2])
    assert set(found["environment"]) <= {"LC_ALL", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LC_CTYPE"}
    assert found["allocate"] == "MemoryError"
    assert found["write"] != "done"
    assert found["spin"] is True
    if found["network_closed"]:  # not every kernel lets an ordinary user have a network of its own
        assert found["connect"] == "OSError"
