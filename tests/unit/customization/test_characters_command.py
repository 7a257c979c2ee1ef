"""What `fabula character` has done to files: weights in other tools' layouts and back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services import characters
from services.models.errors import ModelError
from services.models.lora import Adapter, LowRank, adapted_layers, read_adapter, write_adapter
from services.models.registry import FrameModel, load_frame_model
from services.models.tiny import build_tiny_pack

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    build_tiny_pack(folder / "packs" / "tiny", captions=False)
    return folder


@pytest.fixture(autouse=True)
def installation(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FABULA_FRAME_CHARACTERS_URL", "FABULA_PACK_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FABULA_HOME", str(home))


@pytest.fixture(scope="module")
def model(home: Path) -> FrameModel:
    from services.models.pack import load_pack

    return load_frame_model(load_pack(home / "packs" / "tiny"))


@pytest.fixture(scope="module")
def learned(model: FrameModel) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: LowRank(
            torch.randn(2, layer.in_features, generator=generator),
            torch.randn(layer.out_features, 2, generator=generator),
            4.0,
        )
        for name, layer in adapted_layers(model.denoiser.unet).items()
        if isinstance(layer, torch.nn.Linear) and "attn2.to_" in name and "to_out" not in name
    }
    assert factors
    return Adapter(digest="", factors=factors, deltas={}, size_bytes=0)


@pytest.fixture
def weights(model: FrameModel, learned: Adapter, tmp_path: Path) -> Path:
    file = tmp_path / "learned.safetensors"
    file.write_bytes(write_adapter(learned, "peft", base_digest=model.base_digest))
    return file


def done(*words: str) -> dict[str, Any]:
    """What a verb answers, run as the module runs it."""
    given = characters.parser().parse_args(words)
    answer: dict[str, Any] = given.run(given)
    return answer


@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_weights_come_back_from_every_layout_as_they_were(
    form: str, model: FrameModel, learned: Adapter, weights: Path, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / form / "otto.safetensors"
    answer = done("export", "--pack=tiny", f"--form={form}", str(weights), str(out))
    assert answer["files"][0] == str(out)
    assert (len(answer["files"]) == 2) == (form == "peft"), "PEFT needs its configuration beside it"
    keys = set(load_file(str(out)))
    assert all(
        key.startswith({"peft": "base_model.", "diffusers": "unet.", "kohya": "lora_unet_"}[form]) for key in keys
    )
    kept = done("import", "--pack=tiny", str(out))
    stored = next(path for path in (home / "characters").rglob("*") if kept["weights_sha256"] in path.name)
    again = read_adapter(stored.read_bytes(), model.denoiser.unet, base_digest=model.base_digest)
    assert again.digest == kept["weights_sha256"]
    assert (kept["rank"], kept["base_digest"]) == (2, model.base_digest)
    assert again.factors.keys() == learned.factors.keys()
    for name, factors in learned.factors.items():
        torch.testing.assert_close(
            again.factors[name].scaled_up @ again.factors[name].down, factors.scaled_up @ factors.down
        )


def test_what_is_exported_twice_is_the_same_file(weights: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        done("export", "--pack=tiny", "--form=kohya", str(weights), str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("import", "--pack=tiny", "absent.safetensors"), "FILE_UNFIT"),
        (("import", "--pack=tiny", "broken.safetensors"), "ADAPTER_DAMAGED"),
        (("import", "--pack=absent", "broken.safetensors"), "PACK_NOT_FOUND"),
        (("export", "--pack=tiny", "foreign.safetensors", "out.safetensors"), "ADAPTER_WRONG_BASE"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(
    words: tuple[str, ...],
    reason: str,
    learned: Adapter,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b'{"format": "none"}')
    (tmp_path / "foreign.safetensors").write_bytes(write_adapter(learned, "peft", base_digest="0" * 64))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir()), sorted(home.rglob("*"))
    with pytest.raises((ModelError, characters.FileUnfit)) as raised:
        done(*words)
    assert raised.value.reason == reason
    assert (sorted(tmp_path.iterdir()), sorted(home.rglob("*"))) == before


def test_the_answer_is_one_line_of_json_whatever_it_is(home: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b'{"format": "none"}')
    ended = subprocess.run(
        [sys.executable, "-m", "services.characters", "import", "--pack=tiny", "broken.safetensors"],
        cwd=tmp_path,
        env={"PATH": "", "FABULA_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = ended.stdout.splitlines()
    assert json.loads(line)["error"]["reason"] == "ADAPTER_DAMAGED"


def test_learned_words_and_a_whole_unet_are_imported_too(
    model: FrameModel, learned: Adapter, home: Path, tmp_path: Path
) -> None:
    told = replace(learned, factors={}, words={"Otto": torch.randn(2, model.text.width)})
    file = tmp_path / "words.safetensors"
    file.write_bytes(write_adapter(told, "kohya", base_digest=model.base_digest))
    assert done("import", "--pack=tiny", str(file))["words"] == ["Otto"]
    from safetensors.torch import save_file

    whole = tmp_path / "unet.safetensors"
    save_file({name: value.contiguous() for name, value in model.denoiser.unet.state_dict().items()}, str(whole))
    kept = done("import", "--pack=tiny", str(whole))
    stored = next(path for path in (home / "characters").rglob("*") if kept["weights_sha256"] in path.name)
    assert stored.read_bytes() == whole.read_bytes()
