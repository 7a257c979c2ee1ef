"""What `fabula pack` asks for is done in the installation's own folders, and its settings are respected."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import LocalStore
from safetensors.torch import load_file

import services.sources
from services import packs
from services.models.errors import ModelError
from services.models.pack import MANIFEST, Pack, load_pack
from services.models.tiny import build_tiny_pack
from services.runtime.config import Installation
from tests.unit.models.test_library import make_pack

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FABULA_HOME", str(tmp_path / "home"))
    for name in ("FABULA_PACKS", "FABULA_FRAME_PACKS", "FABULA_CAPTION_PACK", "FABULA_STORY_DEFAULT_PACK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def published(tmp_path: Path) -> Pack:
    return make_pack(tmp_path / "elsewhere" / "mine")


def ask(*words: str) -> dict[str, Any]:
    """The answer to a command line, or the error's reason."""
    given = packs.parser().parse_args(words)
    answer: dict[str, Any]
    try:
        answer = given.run(given, lambda kind, value: None)
    except ModelError as error:
        return {"reason": error.reason, "message": str(error)}
    return json.loads(json.dumps(answer, default=str))  # type: ignore[no-any-return]  # it goes through a pipe


def test_a_pack_is_added_listed_verified_and_removed(home: Path, published: Pack) -> None:
    added = ask("add", str(published.folder))
    assert (added["name"], added["digest"], added["was_there"]) == ("mine", published.digest, False)
    assert Path(added["folder"]) == home / "packs" / "mine"
    assert added["draws_only"]
    assert ask("add", str(published.folder))["was_there"]
    listed = {each["name"]: each for each in ask("list")["packs"]}
    assert set(listed) == {"toon", "mine"}
    assert (listed["toon"]["in_use"], listed["mine"]["in_use"]) == (True, False)
    assert (listed["mine"]["digest"], listed["mine"]["licence"]) == (published.digest, "MIT")
    checked = ask("verify", "mine")
    assert checked["ok"]
    assert checked["packs"][0]["files_count"] == len(published.manifest.files)
    assert ask("remove", "mine")["freed_bytes"] > 10_000
    assert ask("remove", "mine")["reason"] == "PACK_NOT_FOUND"
    assert ask("verify", "mine")["reason"] == "PACK_NOT_FOUND"


def test_verifying_all_names_every_problem(home: Path, published: Pack, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        make_pack(home / "packs" / name, name=name)
    (home / "packs/two" / UNET).write_bytes(b"x" * 300)
    (home / "packs/three" / MANIFEST).write_text("{")
    checked = ask("verify", "--all")
    assert not checked["ok"]
    found = {each["name"]: each["reason"] for each in checked["packs"]}
    assert found == {"toon": "", "one": "", "two": "PACK_FILE_UNSAFE", "three": "PACK_MANIFEST_INVALID"}
    assert ask("verify", "one")["ok"]


def test_a_pack_that_the_settings_name_stays(home: Path, published: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    ask("add", str(published.folder))
    for name, value in (
        ("FABULA_FRAME_PACKS", "toon,mine"),
        ("FABULA_CAPTION_PACK", "mine"),
        ("FABULA_STORY_DEFAULT_PACK", "mine"),
    ):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert ask("remove", "mine")["reason"] == "PACK_IN_USE"
            assert load_pack(home / "packs" / "mine").digest == published.digest
    assert ask("remove", "toon", "--force")["reason"] == "PACK_NOT_FOUND", "what is shipped is not ours to remove"
    monkeypatch.setenv("FABULA_FRAME_PACKS", "toon,mine")
    assert ask("remove", "mine", "--force")["freed_bytes"] > 0


def test_packs_go_where_they_are_looked_for(
    home: Path, published: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packs.library_folder(Installation.load()) == home / "packs"
    monkeypatch.setenv("FABULA_PACKS", f"{tmp_path / 'first'}:{tmp_path / 'last'}")
    assert Path(ask("add", str(published.folder))["folder"]) == tmp_path / "last" / "mine"


def test_a_prefix_of_an_object_store_is_added_as_a_folder_is(published: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalStore(prefix=published.folder)
    monkeypatch.setattr(services.sources, "from_url", lambda url: backend)
    assert ask("add", "s3://models/mine")["digest"] == published.digest
    assert ask("add", published.folder.as_uri())["was_there"]


def test_a_name_that_does_not_go_with_a_sealed_pack_is_refused(published: Pack) -> None:
    assert ask("add", str(published.folder), "--name=other")["reason"] == "PACK_SOURCE_INVALID"
    assert ask("add", "hub:owner/name")["reason"] == "PACK_FETCH_NOT_ALLOWED"


def test_a_captioner_is_added_from_its_hub_layout(tmp_path: Path, home: Path) -> None:
    from tests.caption_checkpoints import write_llava

    write_llava(tmp_path / "llava-1.5-7b-hf", names="saved", adapters=True)
    assert ask("add", str(tmp_path / "llava-1.5-7b-hf"))["reason"] == "PACK_SOURCE_INVALID", "no licence"
    added = ask("add", str(tmp_path / "llava-1.5-7b-hf"), "--licence=LicenseRef-llama2")
    assert (added["name"], added["architecture"]) == ("llava-1-5-7b-hf", "llava")
    assert (added["draws_only"], added["writes_only"]) == (False, True)
    assert any("vLLM looks for" in note for note in added["notes"])
    assert ask("verify", "llava-1-5-7b-hf")["ok"]
    sealed = ask("add", added["folder"])
    assert (sealed["was_there"], sealed["digest"]) == (True, added["digest"])


def test_a_model_on_a_server_is_added_by_its_address(home: Path) -> None:
    added = ask("add", "triton://captions.example:8001/caption/toon", "--licence=LicenseRef-theirs", "--name=far")
    assert (added["name"], added["architecture"], added["size_bytes"]) == ("far", "remote-captioner", 0)
    assert (added["draws_only"], added["writes_only"]) == (False, True)
    assert ask("verify", "far")["ok"]
    assert [(each["name"], each["fault"]) for each in ask("list")["packs"] if each["name"] == "far"] == [("far", "")]


def test_old_weights_are_converted_and_then_added(tmp_path: Path, home: Path) -> None:
    """As StoryGen was published: pickles first, a pack in the end."""
    from tests.stable_diffusion_checkpoints import write_checkpoint
    from tests.unit.models.test_published import write_storygen

    old = write_checkpoint(tmp_path / "checkpoint", "sd15")
    write_storygen(old)
    weights = load_file(old / UNET)
    torch.save(weights, old / "unet/diffusion_pytorch_model.bin")
    (old / UNET).unlink()
    refused = ask("add", str(old), "--licence=MIT")
    assert refused["reason"] == "PACK_FILE_UNSAFE"
    assert "fabula pack convert" in refused["message"]
    done = ask("convert", str(old), str(tmp_path / "StoryGen"))
    assert [each["tensors_count"] for each in done["files"]] == [len(weights)]
    added = ask("add", str(tmp_path / "StoryGen"), "--licence=MIT", "--steps=9")
    assert (added["name"], added["architecture"]) == ("storygen", "storygen")
    manifest = load_pack(home / "packs" / "storygen").manifest
    assert manifest.made_by == "fabula pack add StoryGen --licence MIT --steps 9"
    assert manifest.sampling.default_steps == 9
    found = load_file(home / "packs" / "storygen" / UNET)
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_pack_with_a_captioner_says_so(tmp_path: Path) -> None:
    pack = build_tiny_pack(tmp_path / "tiny")
    assert ask("add", str(pack.folder))["draws_only"] is False


def test_the_answer_is_the_only_thing_on_standard_output(
    published: Pack, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import sys

    def said(*words: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["packs", *words])
        keep = os.dup(1)
        try:
            assert packs.main() == 0
        finally:
            os.dup2(keep, 1)
            os.close(keep)
        return [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    assert said("add", str(published.folder))[-1]["result"]["name"] == "mine"
    listed = {each["name"]: each for each in said("list")[0]["result"]["packs"]}
    assert (listed["mine"]["created"], listed["mine"]["hidden_by"]) == ("2026-01-01T00:00:00+00:00", None)
    assert said("remove", "absent") == [
        {"error": {"reason": "PACK_NOT_FOUND", "message": said("remove", "absent")[0]["error"]["message"]}}
    ]
    monkeypatch.setenv("FABULA_FRAME_COLOUR", "red")
    assert said("list")[0]["error"]["reason"] == "SETTING_INVALID"
    assert isinstance(packs.parser(), argparse.ArgumentParser)
