"""The example story of somebody new: what can be learned from, what is refused, and how they are spoken of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.customize_errors import FramesSeen, StoryInvalid
from training.new_story import (
    STORY_FRAMES,
    Called,
    KnownStory,
    SeenFrame,
    check_wall,
    known_stories,
    names_in,
    read_known,
    read_story,
    world_story,
)
from training.toon.cast import NEW

OTTO = Called(name="Otto", phrase="a black penguin with orange earmuffs", noun="penguin")
SIZE = 64


@pytest.mark.parametrize(
    ("told", "by_name", "by_noun"),
    [
        (
            "Otto, a black penguin with orange earmuffs, runs on the beach.",
            "Otto runs on the beach.",
            "A penguin runs on the beach.",
        ),
        ("Otto the black penguin with orange earmuffs waves.", "Otto waves.", "A penguin waves."),
        ("A black penguin with orange earmuffs waves.", "Otto waves.", "A penguin waves."),
        (
            "At night, the black penguin Otto wearing orange earmuffs sleeps.",
            "At night, Otto sleeps.",
            "At night, a penguin sleeps.",
        ),
        ("Otto waves at Pip.", "Otto waves at Pip.", "A penguin waves at Pip."),
    ],
)
def test_a_look_can_be_told_as_a_name_or_a_noun(told: str, by_name: str, by_noun: str) -> None:
    assert OTTO.is_told_in(told)
    assert OTTO.by_name(told) == by_name
    assert OTTO.by_noun(told) == by_noun


def test_somebody_else_is_not_the_character() -> None:
    assert not OTTO.is_told_in("A black pig with orange earmuffs stands in the park.")
    assert not OTTO.is_told_in("Ottoline stands in the park.")
    assert OTTO.by_name("A black pig stands in the park.") == "A black pig stands in the park."


def test_a_worlds_story_shows_its_hero_in_every_frame_and_is_the_same_every_time() -> None:
    story = world_story("otto", SIZE)
    assert (story.name, story.phrase, story.noun) == ("Otto", "a black penguin with orange earmuffs", "penguin")
    assert len(story.frames) == STORY_FRAMES
    assert all("otto" in frame.characters for frame in story.frames)
    assert [frame.digest for frame in story.frames] == [frame.digest for frame in world_story("otto", SIZE).frames]
    assert all(story.called.by_name(text).count("Otto") == 1 for frame in story.frames for text in frame.descriptions)


def test_somebody_whom_the_world_knows_is_not_new() -> None:
    with pytest.raises(StoryInvalid, match="none of the world's new characters") as caught:
        world_story("pip", SIZE)
    assert caught.value.field == "character"


def test_nobody_new_is_in_a_known_story() -> None:
    known = known_stories(6, SIZE)
    ids = {one.id for one in NEW}
    assert not any(frame.characters & ids for story in known for frame in story.frames)
    check_wall(world_story("otto", SIZE), known)


def test_the_wall_holds_by_id_by_pixels_and_by_who_is_seen() -> None:
    new, (known,) = world_story("otto", SIZE), known_stories(1, SIZE)
    with pytest.raises(FramesSeen, match="shows somebody new"):
        check_wall(new, [KnownStory(frames=new.frames)])
    stripped = tuple(_unnamed(frame) for frame in new.frames)
    with pytest.raises(FramesSeen, match="is a frame of the new character's story"):
        check_wall(new, [known, KnownStory(frames=stripped)])


def _unnamed(frame: SeenFrame) -> SeenFrame:
    """The same picture under another id, in which nobody is known."""
    return replace(frame, id="other", characters=frozenset())


def _folder(tmp_path: Path, count: int = STORY_FRAMES) -> tuple[Path, dict[str, Any]]:
    noise = np.random.default_rng(0)
    frames = []
    for number in range(count):
        pixels = noise.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        told = "Otto, a black penguin with orange earmuffs, runs."
        frames.append({"image": f"{number}.png", "caption": "Otto runs.", "description": told})
    document = {"name": "Otto", "phrase": "a black penguin with orange earmuffs", "frames": frames}
    return tmp_path, document


def _written(folder: Path, document: Any) -> Path:
    (folder / "story.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_a_folder_is_read_and_its_noun_guessed_from_the_phrase(tmp_path: Path) -> None:
    story = read_story(_written(*_folder(tmp_path)), 32, 32)
    assert (story.id, story.noun) == ("new:Otto", "penguin")
    assert story.frames[0].pixels.shape == (32, 32, 3)


@pytest.mark.parametrize("count", [3, 8, 20])
def test_a_story_has_3_to_20_frames(tmp_path: Path, count: int) -> None:
    folder, document = _folder(tmp_path, count)
    story = read_story(_written(folder, document), 32, 32)
    assert [frame.id for frame in story.frames] == [f"new:Otto:{number}" for number in range(count)]
    for wrong in (story.frames[:2], story.frames * 7):
        with pytest.raises(StoryInvalid, match="3 to 20 frames and not"):
            replace(story, frames=wrong)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.pop("phrase"), "story.json"),
        (lambda d: d.update(extra=1), "story.json"),
        (lambda d: d.update(name="Pip"), "name"),
        (lambda d: d.update(name="<image>"), "name"),
        (lambda d: d.update(phrase=" "), "phrase"),
        (lambda d: d.update(frames=d["frames"][:2]), "frames"),
        (lambda d: d.update(frames=d["frames"] * 4 + d["frames"][:1]), "frames"),
        (lambda d: d.update(frames={"1": d["frames"][0]}), "frames"),
        (lambda d: d["frames"][1].update(image="../story.json"), "frames[1].image"),
        (lambda d: d["frames"][1].update(image="0.png"), "frames[1].image"),
        (lambda d: d["frames"][2].update(image="missing.png"), "frames[2].image"),
        (lambda d: d["frames"][2].update(image="story.json"), "frames[2].image"),
        (lambda d: d["frames"][3].update(description="A penguin runs."), "frames[3].description"),
        (lambda d: d["frames"][4].update(caption=5), "frames[4].caption"),
        (lambda d: d["frames"][4].update(caption="a\x00b"), "frames[4].caption"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_by_field(tmp_path: Path, change: Any, field: str) -> None:
    folder, document = _folder(tmp_path)
    change(document)
    with pytest.raises(StoryInvalid) as caught:
        read_story(_written(folder, document), SIZE, SIZE, taken={"Pip"})
    assert caught.value.field == field


def _known(tmp_path: Path) -> dict[str, Any]:
    """The document of a known story whose pictures lie in its folder."""
    (tmp_path / "one").mkdir()
    _, document = _folder(tmp_path / "one")
    return {"frames": [{**frame, "characters": ["Fred"]} for frame in document["frames"]]}


def test_stories_of_those_whom_a_pack_knows_are_read_from_folders_in_their_order(tmp_path: Path) -> None:
    document = _known(tmp_path)
    _written(tmp_path / "one", document)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    document["frames"] = document["frames"][:2]
    document["frames"][0]["characters"] = ["Dino", "Fred"]
    _written(tmp_path / "two", document)
    stories = read_known(tmp_path, 32, 32, 9)
    assert [len(story.frames) for story in stories] == [STORY_FRAMES, 2]
    assert stories[0].frames[1].id == "known:one:1"
    assert stories[0].frames[0].pixels.shape == (32, 32, 3)
    assert names_in(stories) == {"Dino", "Fred"}
    assert [story.frames[0].id for story in read_known(tmp_path, 32, 32, 1, first=1)] == ["known:two:0"]
    for nowhere, first in ((tmp_path, 2), (tmp_path / "three", 0)):
        with pytest.raises(StoryInvalid) as caught:
            read_known(nowhere, 32, 32, 1, first)
        assert caught.value.field == "known"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.update(name="Fred"), "one/story.json"),
        (lambda d: d.update(frames=[]), "one/frames"),
        (lambda d: d["frames"][1].pop("characters"), "one/frames[1]"),
        (lambda d: d["frames"][1].update(characters="Fred"), "one/frames[1].characters"),
        (lambda d: d["frames"][1].update(image="../one.png"), "one/frames[1].image"),
    ],
)
def test_what_is_wrong_with_a_known_story_is_said_by_field(tmp_path: Path, change: Any, field: str) -> None:
    document = _known(tmp_path)
    change(document)
    _written(tmp_path / "one", document)
    with pytest.raises(StoryInvalid) as caught:
        read_known(tmp_path, SIZE, SIZE, 1)
    assert caught.value.field == field


def test_a_picture_of_another_shape_is_refused_and_not_squeezed(tmp_path: Path) -> None:
    with pytest.raises(StoryInvalid, match="crop it"):
        read_story(_written(*_folder(tmp_path)), SIZE, SIZE * 2)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "story.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoryInvalid, match="no JSON"):
        read_story(tmp_path, SIZE, SIZE)
    with pytest.raises(StoryInvalid, match="cannot be read"):
        read_story(tmp_path / "nowhere", SIZE, SIZE)
