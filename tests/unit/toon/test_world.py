"""Frames and stories by seed, and splits that do not leak."""

from dataclasses import replace
from itertools import pairwise

import pytest

from training.toon.arcs import ARCS
from training.toon.cast import MAIN, NEW, SIDE, combination
from training.toon.lexicon import SETTING_CUES
from training.toon.scene import ACCESSORIES, ACTIONS, MOODS, PROPS, SETTINGS, SPECIES, TIMES
from training.toon.splits import HELD_OUT_SHARE, is_held_out
from training.toon.stories import TOLD_TIME_CUES, told_value
from training.toon.world import PALETTES, SPLITS, sample_frame, sample_story

NEW_IDS = {character.id for character in NEW}
NEW_NAMES = {character.name for character in NEW}


def ids(scene):
    return {actor.character.id for actor in scene.actors}


def quadruples(scene):
    return {(actor.character.id, scene.setting, actor.action, actor.prop) for actor in scene.actors}


def held_out(scene):
    return [is_held_out(actor, scene.setting) for actor in scene.actors]


@pytest.fixture(scope="module")
def frames():
    return {split: [sample_frame(seed, split) for seed in range(1200)] for split in SPLITS}


@pytest.fixture(scope="module")
def stories():
    return {split: [sample_story(seed, split) for seed in range(250)] for split in SPLITS}


def test_a_seed_is_a_frame(frames):
    assert sample_frame(17) == frames["train"][17]
    assert sample_frame(17) != sample_frame(18)
    assert sample_frame(17, "validation").scene != sample_frame(17).scene


def test_a_seed_is_a_story(stories):
    assert sample_story(17) == stories["train"][17]


def test_a_story_keeps_its_palette():
    palettes = [{frame.scene.palette for frame in sample_story(seed).frames} for seed in range(60)]
    assert all(len(one) == 1 for one in palettes)
    assert set.union(*palettes) == set(range(PALETTES))


def test_single_frames_come_in_every_palette():
    assert {sample_frame(seed).scene.palette for seed in range(40)} == set(range(PALETTES))


def test_no_word_tells_the_palette(frames):
    frame = frames["train"][17]
    moved = replace(frame, scene=replace(frame.scene, palette=(frame.scene.palette + 1) % PALETTES))
    assert moved.description == frame.description
    assert moved.scene.labels() == frame.scene.labels()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_new_characters_are_in_no_split_but_new(split, frames, stories):
    for frame in frames[split]:
        assert not ids(frame.scene) & NEW_IDS
        assert not any(name in frame.description for name in NEW_NAMES)
    for story in stories[split]:
        for frame in story.frames:
            assert not ids(frame.scene) & NEW_IDS
            assert not any(name in frame.caption or name in frame.description for name in NEW_NAMES)


def test_every_frame_of_new_has_a_new_character(frames, stories):
    assert all(len(ids(frame.scene) & NEW_IDS) == 1 for frame in frames["new"])
    assert all(story.hero in NEW for story in stories["new"])
    assert {story.hero.id for story in stories["new"]} == NEW_IDS


@pytest.mark.parametrize("split", ["train", "validation"])
def test_held_out_combinations_are_not_trained_on(split, frames, stories):
    for frame in frames[split]:
        assert not any(held_out(frame.scene))
    for story in stories[split]:
        assert not any(any(held_out(frame.scene)) for frame in story.frames)


def test_every_test_frame_has_a_held_out_combination(frames, stories):
    assert all(any(held_out(frame.scene)) for frame in frames["test"])
    assert all(any(any(held_out(frame.scene)) for frame in story.frames) for story in stories["test"])
    trained = {quadruple for frame in frames["train"] for quadruple in quadruples(frame.scene)}
    for frame in frames["test"]:
        assert quadruples(frame.scene) - trained


def test_about_a_tenth_of_the_combinations_is_held_out():
    from training.toon.scene import Actor

    asked = [
        is_held_out(Actor(character=who, action="hold", mood="happy", prop=prop), setting)
        for who in MAIN + SIDE[:40]
        for setting in SETTINGS
        for prop in PROPS
    ]
    assert abs(sum(asked) / len(asked) - HELD_OUT_SHARE) < 0.02


def test_training_frames_show_everything(frames):
    scenes = [frame.scene for frame in frames["train"]]
    actors = [actor for scene in scenes for actor in scene.actors]
    assert {actor.action for actor in actors} == set(ACTIONS)
    assert {actor.mood for actor in actors} == set(MOODS)
    assert {actor.prop for actor in actors} == {None, *PROPS}
    assert {(scene.setting, scene.time) for scene in scenes} == {(s, t) for s in SETTINGS for t in TIMES}
    assert {len(scene.actors) for scene in scenes} == {1, 2, 3}
    main = {character.id for character in MAIN}
    assert 0.6 < sum(actor.character.id in main for actor in actors) / len(actors) < 0.72


def test_frames_of_looks_show_every_word_and_nobody_of_the_cast():
    actors = [actor for seed in range(900) for actor in sample_frame(seed, breadth="looks").scene.actors]
    looks = [actor.character.look for actor in actors]
    assert {look.species for look in looks} == set(SPECIES)
    assert {look.accessory for look in looks} == set(ACCESSORIES)
    assert not {combination(look) for look in looks} & {combination(character.look) for character in MAIN + NEW}
    assert all(look.fur_rgb is None for look in looks), "its words say what it looks like"
    assert sample_frame(5, breadth="looks") == sample_frame(5, breadth="looks")


def test_wide_frames_show_a_thousand_different_looks():
    looks = {actor.character.look for seed in range(700) for actor in sample_frame(seed, breadth="wide").scene.actors}
    assert len(looks) > 1000


def test_an_unknown_split_or_breadth_is_refused():
    with pytest.raises(ValueError, match="'dev'"):
        sample_frame(0, "dev")
    with pytest.raises(ValueError, match="'dev'"):
        sample_story(0, "dev")
    with pytest.raises(ValueError, match="'broad'"):
        sample_frame(0, breadth="broad")


def test_stories_tell_every_arc(stories):
    assert len(ARCS) >= 12
    assert {story.arc for story in stories["train"]} == set(ARCS)


def test_a_story_has_one_hero_and_five_frames_in_order(stories):
    for split in SPLITS:
        for story in stories[split]:
            assert [frame.beat for frame in story.frames] == [0, 1, 2, 3, 4]
            assert {frame.arc for frame in story.frames} == {story.arc}
            assert all(story.hero.id in ids(frame.scene) for frame in story.frames)
            assert story.frames[0].labels()["arc"] == story.arc


def test_time_never_goes_back_and_a_scene_stays_where_it_is(stories):
    for story in stories["train"]:
        times = [TIMES.index(frame.scene.time) for frame in story.frames]
        assert times == sorted(times)
        sides = {}
        for frame in story.frames:
            assert sides.setdefault(frame.scene.setting, frame.scene.side) == frame.scene.side


def test_captions_are_finished_sentences_that_name_the_hero(stories):
    for story in stories["train"]:
        for frame in story.frames:
            assert not set("{}[]|") & set(frame.caption)
            assert frame.caption[-1] in '.!?"'
            assert frame.caption[0].isupper() or frame.caption[0] == '"'
            assert len(frame.caption.split()) <= 26
        assert story.hero.name in story.frames[0].caption


def test_somebody_who_arrives_is_named_by_the_caption(stories):
    """A description can only name who is in the story: whoever appears first appears in words too."""
    for story in stories["train"]:
        known = set()
        for frame in story.frames:
            for actor in frame.scene.actors:
                who = actor.character
                if who.id not in known:
                    assert (who.name or f"{who.look.colour} {who.look.species}") in frame.caption
                known.add(who.id)


def test_captions_vary(stories):
    captions = {frame.caption for story in stories["train"] for frame in story.frames}
    assert len(captions) >= 700


def test_something_changes_in_every_story(stories):
    """A story that tells something changes who is there, what is done or what is felt from frame to frame."""
    for story in stories["train"]:
        seen = [
            (frame.scene.labels()["characters"], frame.scene.labels()["actions"], frame.scene.labels()["moods"])
            for frame in story.frames
        ]
        assert len(set(seen)) >= 4


def test_a_story_says_when_it_moves_and_when_time_passes(stories):
    moved = passed = 0
    for story in stories["train"] + stories["test"]:
        for before, frame in pairwise(story.frames):
            if frame.scene.setting != before.scene.setting:
                moved += 1
                assert told_value(SETTING_CUES, frame.caption) == frame.scene.setting, frame.caption
            if frame.scene.time != before.scene.time:
                passed += 1
                assert told_value(TOLD_TIME_CUES, frame.caption) == frame.scene.time, frame.caption
    assert moved > 50
    assert passed > 200


def test_no_story_forgets_its_heros_name(stories):
    for story in stories["train"] + stories["test"]:
        assert any(story.hero.name in frame.caption for frame in story.frames[1:])
