"""What is drawn: the same pixels for the same scene, something different for everything that varies."""

import hashlib
import itertools

import numpy as np
import pytest

from training.toon.cast import MAIN, NEW
from training.toon.colours import CLOTH, FUR
from training.toon.render import figure_mask, render
from training.toon.scene import (
    ACCESSORIES,
    ACTIONS,
    INDOORS,
    MOODS,
    PROPS,
    SETTINGS,
    SIDES,
    SPECIES,
    TIMES,
    Actor,
    Character,
    Look,
    Scene,
)
from training.toon.settings import Palette
from training.toon.world import PALETTES, sample_frame

PIP = MAIN[0]


def somebody(species, accessory="scarf"):
    look = Look(species=species, colour="grey", accessory=accessory, accessory_colour="red")
    return Character(id="somebody", name=None, pronoun="she", look=look)


def scene_in(character=PIP, action="stand", mood="happy", prop=None, **scene):
    actor = Actor(character=character, action=action, mood=mood, prop=prop)
    return Scene(actors=(actor,), **{"setting": "park", "time": "day", "side": "left", **scene})


def picture(character=PIP, size_px=128, **scene):
    return render(scene_in(character, **scene), size_px)


def changed_px(first, second):
    """How many pixels differ visibly."""
    return int((np.abs(first.astype(int) - second.astype(int)).max(axis=2) > 40).sum())


def test_the_same_scene_gives_the_same_pixels():
    for seed in range(12):
        drawn = sample_frame(seed).scene
        first, second = render(drawn), render(drawn)
        assert first.shape == (128, 128, 3)
        assert first.dtype == np.uint8
        assert hashlib.sha256(first.tobytes()).digest() == hashlib.sha256(second.tobytes()).digest()


@pytest.mark.parametrize("time", ["day", "sunset", "night"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_place_looks_different_in_every_palette(setting, time):
    pictures = [picture(setting=setting, time=time, palette=number) for number in range(PALETTES)]
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one.astype(int) - other.astype(int)).mean() >= 2
    assert np.array_equal(pictures[0], picture(setting=setting, time=time))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_palette_moves_no_figure(setting):
    scenes = [scene_in(setting=setting, palette=number) for number in range(PALETTES)]
    kept = figure_mask(scenes[0]) & figure_mask(scenes[-1])
    first, last = (render(scene) for scene in (scenes[0], scenes[-1]))
    # A figure's shadow lets the ground shine through; everything else of it is the same.
    assert (first[kept] == last[kept]).all(axis=-1).mean() > 0.8


def test_a_palette_chooses_by_its_number():
    assert [Palette(number).of("a", "b", "c") for number in range(4)] == ["a", "b", "c", "a"]
    assert Palette(0).turned([(1, 2, 3), (4, 5, 6)]) == [(1, 2, 3), (4, 5, 6)]
    assert Palette(1).turned([(1, 2, 3), (4, 5, 6)]) == [(4, 5, 6), (1, 2, 3)]


@pytest.mark.parametrize("size_px", [64, 128, 257, 512])
def test_any_resolution_is_the_same_picture(size_px):
    small = picture(size_px=64).astype(float).mean(axis=(0, 1))
    other = picture(size_px=size_px)
    assert other.shape == (size_px, size_px, 3)
    assert np.abs(other.astype(float).mean(axis=(0, 1)) - small).max() < 3


@pytest.mark.parametrize("species", SPECIES)
def test_every_mood_can_be_seen_on_every_species(species):
    faces = {mood: picture(somebody(species), mood=mood) for mood in MOODS}
    for one, other in itertools.combinations(MOODS, 2):
        assert changed_px(faces[one], faces[other]) >= 25, f"{one} and {other} look alike on a {species}"


@pytest.mark.parametrize("accessory", ACCESSORIES)
def test_moods_can_be_seen_behind_every_accessory(accessory):
    faces = {mood: picture(somebody("bear", accessory), mood=mood) for mood in MOODS}
    for one, other in itertools.combinations(MOODS, 2):
        assert changed_px(faces[one], faces[other]) >= 25


def test_every_action_can_be_told_from_every_other():
    moods = {"cry": "sad", "sleep": "sleepy"}
    poses = {
        action: picture(action=action, mood=moods.get(action, "happy"), prop="ball" if action == "hold" else None)
        for action in ACTIONS
    }
    for one, other in itertools.combinations(ACTIONS, 2):
        assert changed_px(poses[one], poses[other]) >= 150, f"{one} and {other} look alike"


@pytest.mark.parametrize("prop", PROPS)
def test_things_are_large_enough_to_be_known(prop):
    """A thing spans at least 35 of the 128 pixels, lying and, by what it changes, in the hand."""
    lying = picture(ground_prop=prop).astype(int)
    # Only the thing beside the actor: the actor steps aside, so it is compared with another thing there.
    other = picture(ground_prop="book" if prop != "book" else "ball").astype(int)
    rows, columns = np.nonzero(np.abs(lying - other)[:, 72:].max(axis=2) > 40)
    assert max(np.ptp(rows), np.ptp(columns)) >= 33
    held = picture(action="hold", prop=prop)
    assert changed_px(held, picture()) >= 400


def test_places_times_and_sides_all_differ():
    seen = {
        (setting, time, side): picture(setting=setting, time=time, side=side)
        for setting in SETTINGS
        for time in TIMES
        for side in SIDES
    }
    for one, other in itertools.combinations(seen, 2):
        assert changed_px(seen[one], seen[other]) >= 200, f"{one} and {other} look alike"


def test_weather_can_be_seen():
    for setting in SETTINGS:
        if setting not in INDOORS:
            skies = [picture(setting=setting, weather=weather) for weather in ("clear", "rain", "snow")]
            assert min(changed_px(a, b) for a, b in itertools.combinations(skies, 2)) >= 150


def test_a_character_keeps_its_colours_at_night():
    belly = (slice(90, 96), slice(60, 66))
    assert (picture(time="day")[belly] == picture(time="night")[belly]).all()


def test_one_character_fills_half_to_two_thirds_of_the_height():
    for character in MAIN + NEW:
        difference = np.abs(
            picture(character).astype(int) - picture(character, action="sleep", mood="sleepy").astype(int)
        )
        rows = np.nonzero((difference.max(axis=2) > 40).any(axis=1))[0]
        assert 0.45 * 128 <= np.ptp(rows) <= 0.92 * 128  # ears and hats come on top of the two thirds


def test_every_colour_of_fur_and_cloth_is_its_own():
    for table in (FUR, CLOTH):
        for one, other in itertools.combinations(table.values(), 2):
            assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 45
