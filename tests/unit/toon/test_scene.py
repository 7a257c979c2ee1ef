"""The truth of a picture can only be made valid, and survives JSON."""

import dataclasses
import json

import pytest

from training.toon.cast import MAIN
from training.toon.scene import Actor, Look, Scene, SceneInvalid
from training.toon.world import sample_frame

PIP, MINA, BRUNO = MAIN[:3]


def actor(character=PIP, action="stand", mood="happy", prop=None):
    return Actor(character=character, action=action, mood=mood, prop=prop)


def scene(*actors, setting="beach", **changes):
    return Scene(actors=actors or (actor(),), setting=setting, time="day", side="left", **changes)


@pytest.mark.parametrize("breadth", ["scene", "wide"])
def test_a_scene_survives_json(breadth):
    for seed in range(60):
        drawn = sample_frame(seed, breadth=breadth).scene
        assert Scene.from_json(drawn.to_json()) == drawn


def test_a_scene_written_before_there_were_palettes_is_in_the_plain_one():
    raw = json.loads(sample_frame(3).scene.to_json())
    del raw["palette"]
    assert Scene.from_json(json.dumps(raw)).palette == 0


def test_nobody_holds_nothing_and_nobody_carries_a_thing_while_running():
    with pytest.raises(SceneInvalid, match="hold"):
        actor(action="hold")
    with pytest.raises(SceneInvalid, match="run"):
        actor(action="run", prop="kite")


def test_moods_follow_crying_and_sleeping():
    with pytest.raises(SceneInvalid, match="sad"):
        actor(action="cry", mood="happy")
    with pytest.raises(SceneInvalid, match="sleepy"):
        actor(action="sleep", mood="angry")


def test_a_scene_refuses_what_cannot_be_seen():
    with pytest.raises(SceneInvalid, match="indoors"):
        scene(setting="kitchen", weather="rain")
    with pytest.raises(SceneInvalid, match="twice"):
        scene(actor(PIP), actor(PIP))
    with pytest.raises(SceneInvalid, match="ground_prop"):
        scene(actor(PIP), actor(MINA), actor(BRUNO), ground_prop="ball")
    with pytest.raises(SceneInvalid, match="setting is 'moon'"):
        scene(setting="moon")
    with pytest.raises(SceneInvalid, match="species is 'whale'"):
        Look(species="whale", colour="blue", accessory="cap", accessory_colour="red")


def test_labels_follow_the_actors_from_left_to_right():
    labels = scene(actor(MINA, "hold", "happy", "kite"), actor(PIP, "cry", "sad")).labels()
    assert labels["characters"] == ("mina", "pip")
    assert labels["actions"] == ("hold", "cry")
    assert labels["props"] == ("kite", None)


def test_scenes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        scene().time = "night"
