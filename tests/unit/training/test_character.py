"""What a character's weights are worth: counted figure by figure, on frames that no run saw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.models.lora import read_adapter
from services.models.pack import Pack
from services.models.registry import load_frame_model
from services.models.tiny import build_tiny_pack
from training.customize import customize, toon_customization
from training.customize_errors import FramesSeen, StoryInvalid
from training.evaluation.character import (
    LOOK,
    RECOGNISED,
    Dressed,
    character_figures,
    check_unseen,
    compared,
    drawn,
    dressed,
    new_scenes,
    old_scenes,
    right,
    told_and_named,
)
from training.evaluation.frames import Task
from training.evaluation.judge import load_judge
from training.new_story import SeenFrame, known_stories, world_story
from training.toon.cast import MAIN
from training.toon.grammar import describe_plainly
from training.toon.render import render
from training.verdicts import truth

OTTO = {"id": "otto", "name": "Otto", "phrase": "a black penguin with orange earmuffs", "noun": "penguin"}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return build_tiny_pack(tmp_path_factory.mktemp("pack") / "tiny", captions=False, positions=512)


def test_frames_show_the_new_character_or_the_main_cast_alone_and_are_the_same_every_time() -> None:
    new, old = new_scenes("otto", 4), old_scenes(4)
    assert len(new) == len(old) == 4
    assert all("otto" in {actor.character.id for actor in scene.actors} for _, scene in new)
    main = {one.id for one in MAIN}
    assert all({actor.character.id for actor in scene.actors} <= main for _, scene in old)
    assert new == new_scenes("otto", 4)


def test_what_is_right_is_counted_figure_by_figure() -> None:
    _, scene = next(one for one in new_scenes("otto", 12) if len(one[1].actors) == 2)
    place = next(n for n, actor in enumerate(scene.actors) if actor.character.id == "otto")
    true = truth(scene)
    assert right([true], [true], [[0, 1]]) == {name: [True, True] for name in right([], [], [])}

    wrong = list(true.figures)
    wrong[place] = replace(wrong[place], accessory_colour="pink")
    found = right([replace(true, figures=tuple(wrong))], [true], [[place]])
    assert (found[LOOK], found[RECOGNISED], found["accessory_colour"]) == ([False], [True], [False])

    wrong[place] = replace(true.figures[place], species="pig")
    found = right([replace(true, figures=tuple(wrong))], [true], [[0, 1]])
    assert found[RECOGNISED] == [n != place for n in range(2)]

    nobody = right([replace(true, figures=true.figures[:1])], [true], [[0, 1]])
    assert not any(value for values in nobody.values() for value in values)  # not even whom it sees


def test_gains_are_frame_by_frame() -> None:
    without = {name: [False, False, True, True] for name in right([], [], [])}
    worn = {name: [True, False, True, True] for name in without}
    found = {figure.name: figure for figure in compared("named", without, worn)}
    assert (found["named_look_without"].value, found["named_look_with"].value) == (0.5, 0.75)
    assert (found["named_look_gain"].value, found["named_look_gain"].n) == (0.25, 4)
    assert {"named_recognised_gain", "named_species_gain"} <= set(found)


def test_a_frame_that_was_learned_from_is_not_measured_on() -> None:
    ((frame_id, scene),) = scenes = new_scenes("otto", 1)
    nothing = {"dataset": {"new": {}, "existing": {}}}
    check_unseen(scenes, nothing, 32)
    with pytest.raises(FramesSeen, match="was learned from"):
        check_unseen(scenes, {"dataset": {"new": {frame_id: "x"}, "existing": {}}}, 32)
    frame = SeenFrame(id="x", pixels=render(scene, 32), caption="", descriptions=(), characters=frozenset())
    with pytest.raises(FramesSeen, match="was learned from"):
        check_unseen(scenes, {"dataset": {"new": {}, "existing": {"another": frame.digest}}}, 32)


def test_a_description_by_name_leaves_the_look_to_the_weights() -> None:
    for _, scene in new_scenes("otto", 6):
        told, named = told_and_named(OTTO, scene)
        assert "black penguin" in told
        assert "black penguin" not in named
        assert named.count("Otto") == 1


def test_worn_weights_draw_other_pictures_and_without_them_nothing_changes(pack: Pack, tmp_path: Path) -> None:
    tasks = [Task(scene, describe_plainly(scene), number) for number, (_, scene) in enumerate(new_scenes("otto", 2))]
    recipe = replace(toon_customization("lora"), steps=3, warmup_steps=1)
    artefact = customize(pack, world_story("otto", 64), known_stories(1, 64), recipe, tmp_path, say=lambda line: None)
    model = load_frame_model(pack)
    plain = drawn(Dressed(model), tasks)
    adapter = read_adapter(
        artefact.payload, model.denoiser.unet, base_digest=model.base_digest, text_width=model.text.width, name="it"
    )
    # Three steps are too few to be seen in a picture of eight bits, so they count for more.
    louder = replace(adapter, factors={name: replace(one, up=one.up * 300) for name, one in adapter.factors.items()})
    who = dressed(model, louder)
    worn = drawn(who, tasks)
    assert all(not np.array_equal(a, b) for a, b in zip(plain, worn, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(plain, drawn(Dressed(model), tasks), strict=True))


def test_all_is_measured_and_somebody_of_no_world_is_refused(pack: Pack, tmp_path: Path) -> None:
    recipe = replace(toon_customization("textual-inversion"), steps=1, warmup_steps=1)
    artefact = customize(pack, world_story("otto", 64), known_stories(1, 64), recipe, tmp_path, say=lambda line: None)
    model = load_frame_model(pack)
    adapter = read_adapter(
        artefact.payload, model.denoiser.unet, base_digest=model.base_digest, text_width=model.text.width, name="it"
    )
    judge = load_judge()
    with torch.no_grad():
        figures = character_figures(model, judge, adapter, artefact.card, 1, tmp_path / "sheet.png")
    names = {figure.name for figure in figures}
    assert {"judge_told_recognised", "named_recognised_gain", "told_look_with", "old_recognised_drop"} <= names
    assert not any(name.startswith("old_") and name.endswith("_gain") for name in names)
    assert (tmp_path / "sheet.png").is_file()
    card = {**artefact.card, "character": {**OTTO, "id": "new:Zaza"}}
    with pytest.raises(StoryInvalid, match="none of the world's"):
        character_figures(model, judge, adapter, card, 1)
