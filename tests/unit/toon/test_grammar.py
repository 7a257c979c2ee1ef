"""Descriptions: varied, short, complete, and read back exactly."""

import random

import pytest

from services.models.captions import prompts
from training.toon.cast import BY_ID, MAIN, NEW
from training.toon.grammar import WORD_LIMITS, describe, describe_plainly, parse, phrase
from training.toon.lexicon import (
    ACTION_CUES,
    ACTION_WAYS,
    MOOD_CUES,
    MOOD_SENTENCES,
    MOOD_WAYS,
    PROP_CUES,
    PROP_WAYS,
    SETTING_WAYS,
    TIME_WAYS,
)
from training.toon.reading import _earliest
from training.toon.scene import Actor, Scene
from training.toon.world import SPLITS, sample_frame, sample_story


@pytest.mark.parametrize("split", SPLITS)
def test_reading_inverts_describing(split):
    for seed in range(900):
        frame = sample_frame(seed, split)
        assert parse(frame.description).labels() == frame.scene.labels(), frame.description


def test_reading_inverts_describing_in_stories():
    for seed in range(60):
        for frame in sample_story(seed).frames:
            assert parse(frame.description).labels() == frame.scene.labels(), frame.description


def test_one_scene_has_many_descriptions_and_all_mean_the_same():
    scene = sample_frame(3).scene
    wordings = {describe(scene, random.Random(seed)) for seed in range(300)}
    assert len(wordings) >= 280
    assert all(parse(wording).labels() == scene.labels() for wording in wordings)


@pytest.mark.parametrize("split", SPLITS)
def test_reading_inverts_describing_plainly(split):
    for seed in range(600):
        scene = sample_frame(seed, split).scene
        text = describe_plainly(scene)
        assert parse(text).labels() == scene.labels(), text
        assert len(text.split()) <= WORD_LIMITS[len(scene.actors)] + 4


def test_a_scene_has_one_plain_description_in_the_words_of_the_question_about_it():
    scene = sample_frame(3).scene
    assert describe_plainly(scene) == describe_plainly(scene)
    for actor in (a for f in sample_story(7).frames for a in f.scene.actors if a.character.name):
        told = prompts.told_looks(describe_plainly(f.scene) for f in sample_story(7).frames)
        assert told[actor.character.name] == phrase(actor.character.look)


def test_two_thousand_frames_have_nearly_as_many_descriptions():
    assert len({sample_frame(seed).description for seed in range(2000)}) >= 1900


def test_the_same_frame_is_always_described_in_the_same_words():
    assert [sample_frame(seed).description for seed in range(20)] == [
        sample_frame(seed).description for seed in range(20)
    ]


def test_descriptions_stay_short():
    for seed in range(1500):
        frame = sample_frame(seed)
        assert len(frame.description.split()) <= WORD_LIMITS[len(frame.scene.actors)]


def test_every_actor_is_named_or_phrased():
    for seed in range(300):
        frame = sample_frame(seed)
        for actor in frame.scene.actors:
            who = actor.character
            said = frame.description
            assert (who.name or who.look.species) in said
            if who.id.startswith("side-"):
                assert f"{who.look.colour} {who.look.species}" in said
                assert f"{who.look.accessory_colour} {who.look.accessory}" in said


@pytest.mark.parametrize(
    ("ways", "cues"), [(ACTION_WAYS, ACTION_CUES), (MOOD_WAYS, MOOD_CUES), (MOOD_SENTENCES, MOOD_CUES)]
)
def test_a_way_of_saying_something_says_only_that(ways, cues):
    for value, phrases in ways.items():
        for way in phrases:
            assert _earliest(cues, way) == value


def test_props_are_not_mistaken_for_each_other():
    for value, phrases in PROP_WAYS.items():
        for way in phrases:
            assert _earliest(PROP_CUES, way) == value


def test_no_phrase_of_a_place_or_time_contains_that_of_another():
    for ways in (SETTING_WAYS, TIME_WAYS):
        said = [(value, way) for value, phrases in ways.items() for way in phrases]
        for value, way in said:
            assert all(other == value or way not in longer for other, longer in said)


def test_a_phrase_finds_its_character():
    for character in BY_ID.values():
        parsed = parse(f"{phrase(character.look).capitalize()} waves.")
        assert parsed.characters == (character.id,)


def test_phrases_read_well():
    assert phrase(NEW[0].look) == "a black penguin with orange earmuffs"
    assert phrase(MAIN[0].look) == "an orange cat with a blue scarf"


def test_positions_rule_over_the_order_of_mention():
    text = "On the right, Mina waves happily. On the left, Pip the orange cat with a blue scarf is crying."
    parsed = parse(text)
    assert parsed.characters == ("pip", "mina")
    assert tuple(actor.action for actor in parsed.actors) == ("cry", "wave")
    assert tuple(actor.mood for actor in parsed.actors) == ("sad", "happy")


def test_imperfect_text_gives_what_it_says_and_no_error():
    parsed = parse("Pip something something at the beach")
    assert parsed.characters == ("pip",)
    assert parsed.setting == "beach"
    assert parsed.actors[0].action is None
    assert parsed.actors[0].mood is None
    assert (parsed.time, parsed.side, parsed.ground_prop) == (None, None, None)


def test_a_stranger_is_recognised_by_name_and_phrase_but_has_no_id():
    (stranger,) = parse("Quill, a green fox with a purple cap, is running in the park at night.").actors
    assert (stranger.id, stranger.name, stranger.species, stranger.accessory) == (None, "Quill", "fox", "cap")
    assert stranger.action == "run"


@pytest.mark.parametrize("text", ["", "   ", "!!!", "the the the", "A" * 5000, "Pip Pip Pip", "holds", "with a with a"])
def test_reading_never_fails(text):
    parse(text).labels()


def test_somebody_mentioned_twice_is_one_actor():
    parsed = parse("Pip, an orange cat with a blue scarf, runs. Pip looks sad.")
    assert parsed.characters == ("pip",)
    assert (parsed.actors[0].action, parsed.actors[0].mood) == ("run", "sad")


def test_a_thing_in_the_hand_is_not_the_thing_on_the_ground():
    scene = Scene(
        actors=(Actor(character=MAIN[0], action="hold", mood="happy", prop="kite"),),
        setting="park",
        time="day",
        side="left",
        ground_prop="ball",
    )
    for seed in range(100):
        parsed = parse(describe(scene, random.Random(seed)))
        assert (parsed.actors[0].prop, parsed.ground_prop) == ("kite", "ball")
