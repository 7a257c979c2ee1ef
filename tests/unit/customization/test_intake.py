"""Which packs and stories a job may be for, and what its training is told of the stories that it is taught beside."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from services.customization.backends import arguments_of
from services.customization.checks import GivenFrame, GivenStory, check_story
from services.customization.config import CustomizationSettings
from services.customization.intake import JobRequest, lay_out, taught_pack, training_settings
from services.customization.records import NewCharacter, StoredFrame
from services.models.tiny import build_tiny_pack
from services.runtime.errors import PackUnknown
from tests.tiny_arldm_pack import build_arldm_pack
from training.new_story import read_story


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    build_arldm_pack(folder / "stories")
    build_tiny_pack(folder / "tiny", captions=False)
    return folder


def test_packs_of_both_backbones_are_taught_and_others_are_refused_by_name(packs: Path) -> None:
    assert taught_pack("stories", [packs]).manifest.architecture == "arldm"
    tiny = taught_pack("tiny", [packs])
    other = tiny.manifest.model_copy(update={"architecture": "stable-diffusion", "name": "other"})
    (packs / "other").mkdir()
    (packs / "other" / "pack.json").write_text(other.model_dump_json(), encoding="utf-8")
    with pytest.raises(PackUnknown, match="other is a stable-diffusion pack; arldm, storygen packs can be taught"):
        taught_pack("other", [packs])
    with pytest.raises(PackUnknown, match="no pack 'nowhere'"):
        taught_pack("nowhere", [packs])


def test_an_arldm_pack_is_taught_beside_its_own_worlds_stories_alone(packs: Path, tmp_path: Path) -> None:
    stories, tiny = taught_pack("stories", [packs]), taught_pack("tiny", [packs])
    request = JobRequest(steps=3, seed=1)
    for settings in (CustomizationSettings(), CustomizationSettings(known_folder=tmp_path)):
        assert training_settings(request, tiny, settings).pack == "tiny"
        with pytest.raises(PackUnknown, match="stories of those whom it knows") as refused:
            training_settings(request, stories, settings)
        assert refused.value.field_violations[0].field == "pack"
    (tmp_path / "stories").mkdir()
    settings = CustomizationSettings(known_folder=tmp_path)
    told = training_settings(request, stories, settings)
    words = arguments_of(told, pack_folder=packs, folder=tmp_path, known=settings.known_of(told.pack))
    assert words[words.index("--known") + 1] == str(tmp_path / "stories")
    of_toon = training_settings(request, tiny, settings)
    assert "--known" not in arguments_of(
        of_toon, pack_folder=packs, folder=tmp_path, known=settings.known_of(of_toon.pack)
    )


@pytest.mark.parametrize(
    ("count", "warned"), [(3, {"FRAMES_FEW"}), (4, {"FRAMES_FEW"}), (5, set()), (8, set()), (20, set())]
)
def test_a_story_of_3_to_20_frames_is_taken_and_read_by_training(tmp_path: Path, count: int, warned: set[str]) -> None:
    pictures, told = [], []
    for number in range(count):
        out = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(out, "PNG")
        pictures.append(out.getvalue())
        told.append(f"Otto, a black penguin, stands beside {number + 2} red boxes.")
    frames = tuple(
        GivenFrame(image=image, caption=text, description=text) for image, text in zip(pictures, told, strict=True)
    )
    given = GivenStory(name="Otto", phrase="a black penguin", frames=frames, width_px=64, height_px=64)
    found = check_story(given, (), None)
    assert not [one for one in found if one.severity == "error"]
    assert {one.code for one in found if one.code.startswith("FRAMES_")} == warned
    stored = [StoredFrame(image_sha256="", caption=text, description=text) for text in told]
    lay_out(tmp_path / "story", NewCharacter(name="Otto", phrase="a black penguin", noun="penguin"), stored, pictures)
    story = read_story(tmp_path / "story", 64, 64)
    assert [frame.descriptions[0] for frame in story.frames] == told
