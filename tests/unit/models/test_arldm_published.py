"""AR-LDM's published checkpoint becomes a pack that draws what its own loop draws, or is refused with the reason."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services import packs
from services.models.arldm import published as arldm_published
from services.models.arldm.checkpoint import convert, load_arldm
from services.models.arldm.model import GUIDANCE, LATENTS, SCHEDULE
from services.models.arldm.published import STEPS, is_arldm, plan_arldm
from services.models.arldm.sampling import Story, draw_stories
from services.models.drawing import Randomness, Sketch, begin
from services.models.errors import ModelError, PackSourceInvalid
from services.models.library import Library
from services.models.published import Told
from services.models.registry import load_frame_model
from services.models.source import FolderSource
from services.models.step import advance
from tests.reference_arldm import random_state
from tests.tiny_arldm import CAPTIONS, SIZES, blip_tokenizer, clip_tokenizer, config, worst

LICENCE = "LicenseRef-arldm"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted checkpoint."""
    source = tmp_path / "lightning.safetensors"
    save_file(random_state(SIZES, seed=0), str(source))
    convert(
        source,
        tmp_path / "Flintstones_SV",
        clip_tokenizer=clip_tokenizer(),
        blip_tokenizer=blip_tokenizer(),
        config=config(),
    )
    return tmp_path / "Flintstones_SV"


def test_a_converted_checkpoint_is_added_and_draws(folder: Path, tmp_path: Path) -> None:
    source = FolderSource(folder)
    assert is_arldm(source.files())
    plan = plan_arldm(source, source.files(), Told(licence=LICENCE, steps=4))
    pack = Library(tmp_path / "packs", (tmp_path / "packs",)).add(plan, source).pack
    manifest = pack.manifest
    assert (manifest.name, manifest.architecture, manifest.licence) == ("flintstones-sv", "arldm", LICENCE)
    assert (manifest.max_references, manifest.width_px, manifest.dtype) == (4, 16, "float32")
    assert (manifest.latents, manifest.schedule) == (LATENTS, SCHEDULE)
    assert (manifest.sampling.default_steps, manifest.sampling.default_text_guidance) == (4, GUIDANCE)
    model = load_frame_model(pack)
    sketch = Sketch(
        description=CAPTIONS[0], seed=3, width_px=16, height_px=16, steps=4, text_guidance=GUIDANCE, image_guidance=1.0
    )
    drawing = begin(model, sketch)
    while not drawing.finished:
        advance(model, [drawing])
    noise = Randomness(3).normal(4, 8, 8)[None, None]
    expected, _ = draw_stories(load_arldm(folder), [Story(captions=CAPTIONS[:1])], noise, steps=4)
    assert worst(drawing.latents_CHW, expected[0, 0]) <= 1e-4


def test_what_nobody_said_is_epicevos(folder: Path) -> None:
    source = FolderSource(folder)
    plan = plan_arldm(source, source.files(), Told(licence=LICENCE))
    assert plan.settings is not None
    assert plan.settings.sampling.default_steps == STEPS == 50  # type: ignore[union-attr]
    assert plan.notes == ("it draws every frame of a story and reads up to 4 earlier ones",)


@pytest.mark.parametrize(
    ("licence", "spoiled", "told"),
    [
        ("", "", "--licence"),
        (LICENCE, "mm_encoder/model.safetensors", "mm_encoder/model.safetensors"),
        (LICENCE, "blip_tokenizer/tokenizer.json", "blip_tokenizer/tokenizer.json"),
        (LICENCE, "frame_embeddings/config.json", "no converted AR-LDM"),
    ],
)
def test_what_cannot_be_added_is_said(folder: Path, licence: str, spoiled: str, told: str) -> None:
    if spoiled.endswith("frame_embeddings/config.json"):
        (folder / spoiled).write_text(json.dumps({"width": 16, "frames": 0}))
    elif spoiled:
        (folder / spoiled).unlink()
    source = FolderSource(folder)
    with pytest.raises(PackSourceInvalid, match=told):
        plan_arldm(source, source.files(), Told(licence=licence))


def test_a_family_that_it_is_not_is_refused(folder: Path) -> None:
    source = FolderSource(folder)
    with pytest.raises(PackSourceInvalid, match="is an AR-LDM, and sdxl is not"):
        plan_arldm(source, source.files(), Told(licence=LICENCE, family="sdxl"))
    plan_arldm(source, source.files(), Told(licence=LICENCE, family="arldm"))


def test_the_command_adds_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FABULA_PACKS", raising=False)

    def ask(*words: str) -> dict[str, object]:
        given = packs.parser().parse_args(words)
        answer: dict[str, object] = given.run(given, lambda kind, value: None)
        return answer

    added = ask("add", str(folder), "--licence", LICENCE, "--name", "story")
    assert (added["name"], added["architecture"], added["draws_only"]) == ("story", "arldm", True)
    assert added["notes"] == ["it draws every frame of a story and reads up to 4 earlier ones"]
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelError, match=r"vae/config\.json"):
        ask("add", str(folder), "--licence", LICENCE, "--name", "other")


def test_converting_says_what_is_wrong(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"strange.weight": torch.ones(1)}, str(tmp_path / "other.safetensors"))
    tokenizers = (
        "--clip-tokenizer",
        str(folder / "clip_tokenizer"),
        "--blip-tokenizer",
        str(folder / "blip_tokenizer"),
    )

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["arldm_published", *words])
        return arldm_published.main(), capsys.readouterr().err

    status, said = run(str(tmp_path / "other.safetensors"), str(folder), *tokenizers)
    assert (status, "is there already" in said) == (1, True)
    status, said = run(str(tmp_path / "other.safetensors"), str(tmp_path / "new"), *tokenizers)
    assert (status, "strange.weight" in said) == (1, True)
    status, said = run(str(tmp_path / "absent.safetensors"), str(tmp_path / "new"), *tokenizers)
    assert (status, "absent.safetensors" in said) == (1, True)
    assert not (tmp_path / "new").exists()
