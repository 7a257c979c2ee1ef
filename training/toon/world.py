"""Draws lots: seeded frames and stories of a split.

Pure: the same arguments give the same frame on every machine. What may occur where is decided in `splits`; the ways
stories go are told in `arcs`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from training.toon.cast import MAIN, NEW, SIDE, combination, random_look
from training.toon.colours import hsv
from training.toon.grammar import describe
from training.toon.scene import (
    ACTIONS,
    INDOORS,
    MAX_ACTORS,
    MOODS,
    PROPS,
    SETTINGS,
    SIDES,
    TIMES,
    Actor,
    Character,
    Grade,
    Look,
    Scene,
)
from training.toon.seeding import generator, stable_number
from training.toon.splits import SPLITS, belongs, checked
from training.toon.stories import Story, StoryFrame, draw_story

__all__ = ["SPLITS", "Frame", "Story", "StoryFrame", "sample_frame", "sample_story"]

BREADTHS = ("scene", "looks", "wide")
EDITION = 2  # one more whenever a seed gives another picture or text than before: what is kept of it is named by it
# Of every place. No words tell a story's palette, so only references can; with a single one a background would follow
# from the words. Networks know as many as they were trained on: another number is another EDITION.
PALETTES = 4
MAIN_SHARE = 0.65  # of the characters in "scene" frames; the others are side characters
SIDE_HERO_SHARE = 0.25  # of the stories of the training splits; their heroes have names
_CAST_LOOKS = {combination(character.look) for character in MAIN + NEW}
_NAMED_SIDE = tuple(character for character in SIDE if character.name is not None)
_HOLDABLE_IN_A_CROWD = tuple(prop for prop in PROPS if prop not in ("umbrella", "guitar", "kite"))


@dataclass(frozen=True)
class Frame:
    """A scene and the seed of its wording."""

    scene: Scene
    wording_seed: int

    @property
    def description(self) -> str:
        """The scene in words, always the same ones for this frame."""
        return describe(self.scene, random.Random(self.wording_seed))


def _who(rng: random.Random, split: str, count: int) -> tuple[Character, ...]:
    chosen: list[Character] = [rng.choice(NEW)] if split == "new" else []
    while len(chosen) < count:
        character = rng.choice(MAIN) if rng.random() < MAIN_SHARE else rng.choice(SIDE)
        if all(character.id != other.id and (character.name or other.id) != other.name for other in chosen):
            chosen.append(character)
    rng.shuffle(chosen)
    return tuple(chosen)


def _actor(rng: random.Random, character: Character, crowd: int, prop_taken: bool) -> Actor:
    action = rng.choice(ACTIONS)
    while prop_taken and action == "hold":
        action = rng.choice(ACTIONS)
    if rng.random() < 0.14 and not prop_taken:  # holding shows ten different things, so it needs more than its share
        action = "hold"
    mood = rng.choice(MOODS)
    if action == "cry":
        mood = "sad"
    if action == "sleep":
        mood = "sleepy"
    prop = None
    if action == "hold":
        prop = rng.choice(PROPS if crowd < MAX_ACTORS else _HOLDABLE_IN_A_CROWD)
    return Actor(character=character, action=action, mood=mood, prop=prop)


def _draw_scene(rng: random.Random, split: str) -> Scene:
    count = rng.choices((1, 2, 3), (0.5, 0.35, 0.15))[0]
    actors: list[Actor] = []
    for character in _who(rng, split, count):
        taken = count == MAX_ACTORS and any(actor.prop for actor in actors)
        actors.append(_actor(rng, character, count, taken))
    setting = rng.choice(SETTINGS)
    weather = "clear" if setting in INDOORS else rng.choices(("clear", "rain", "snow"), (0.84, 0.08, 0.08))[0]
    ground = rng.choice(PROPS) if count < MAX_ACTORS and rng.random() < 0.22 else None
    return Scene(
        actors=tuple(actors),
        setting=setting,
        time=rng.choice(TIMES),
        side=rng.choice(SIDES),
        weather=weather,
        ground_prop=ground,
    )


def _widened(scene: Scene, rng: random.Random) -> Scene:
    """Give every actor a look that no words describe, and the picture a random grading."""
    actors: list[Actor] = []
    for index, actor in enumerate(scene.actors):
        look = random_look("wide", rng.random())
        if rng.random() < 0.7:
            fur = hsv(rng.random(), rng.betavariate(1.4, 1.4), 1 - 0.75 * rng.betavariate(1, 2))
            cloth = hsv(rng.random(), rng.uniform(0.0, 1.0), rng.uniform(0.25, 1.0))
            light = None
            if rng.random() < 0.4:
                light = hsv(rng.random(), rng.uniform(0.0, 0.7), rng.uniform(0.5, 1.0))
            look = replace(look, fur_rgb=fur, accessory_rgb=cloth, belly_rgb=light)
        actors.append(replace(actor, character=Character(id=f"wide-{index}", name=None, pronoun="he", look=look)))
    grade = None
    if rng.random() < 0.4:
        gains = tuple(rng.uniform(0.8, 1.15) for _ in range(3))
        hue = rng.uniform(-180, 180) if rng.random() < 0.5 else rng.uniform(-25, 25)
        grade = Grade(hue_deg=hue, gains=(gains[0], gains[1], gains[2]))
    return replace(scene, actors=tuple(actors), grade=grade)


def _redressed(scene: Scene, rng: random.Random) -> Scene:
    """Give every actor some look that words describe, of all there are but those of the cast."""
    actors: list[Actor] = []
    for index, actor in enumerate(scene.actors):
        look = _stranger_look(rng)
        actors.append(replace(actor, character=Character(id=f"looks-{index}", name=None, pronoun="he", look=look)))
    return replace(scene, actors=tuple(actors))


def _stranger_look(rng: random.Random) -> Look:
    look = random_look("looks", rng.random())
    while combination(look) in _CAST_LOOKS:
        look = random_look("looks", rng.random())
    return look


def sample_frame(seed: int, split: str = "train", breadth: str = "scene") -> Frame:
    """Return the frame of `seed` in `split`.

    `breadth` "scene" mixes main cast and side characters (and exactly one new character a frame in "new"); "looks"
    draws strangers of every look but the cast's, for a judge of new characters; "wide" draws characters of random
    species, colours and accessories under random grading, to teach a picture codec more than a cast.

    Raises `ValueError` for an unknown split or breadth.
    """
    checked(split)
    if breadth not in BREADTHS:
        raise ValueError(f"breadth is {breadth!r}, not one of {', '.join(BREADTHS)}")
    rng = generator("frame", split, breadth, seed)
    if breadth != "scene":
        widen = _widened if breadth == "wide" else _redressed
        scene = widen(_draw_scene(rng, "train"), rng)
    else:
        scene = _draw_scene(rng, split)
        while not belongs((scene,), split):
            scene = _draw_scene(rng, split)
    scene = replace(scene, palette=generator("palette", split, breadth, seed).randrange(PALETTES))
    return Frame(scene=scene, wording_seed=stable_number("words", split, breadth, seed))


def sample_story(seed: int, split: str = "train", breadth: str = "scene") -> Story:
    """Return the five-frame story of `seed` in `split`; in "new" its hero is a new character.

    With `breadth` "looks" the hero is somebody with a name and any look but the cast's: whom a user's own picture may
    show. Raises `ValueError` for an unknown split or breadth.
    """
    checked(split)
    if breadth not in ("scene", "looks"):
        raise ValueError(f"breadth is {breadth!r}, not scene or looks")
    rng = generator("story", split, *(() if breadth == "scene" else (breadth,)), seed)
    heroes = NEW if split == "new" else MAIN
    while True:
        hero = rng.choice(heroes)
        if breadth == "looks":
            hero = replace(rng.choice(_NAMED_SIDE), id="looks-hero", look=_stranger_look(rng))
        elif split != "new" and rng.random() < SIDE_HERO_SHARE:
            hero = rng.choice(_NAMED_SIDE)
        story = draw_story(rng, hero, _company(rng, hero))
        if belongs(tuple(frame.scene for frame in story.frames), split):
            return _coloured(story, generator("story-palette", split, breadth, seed).randrange(PALETTES))


def _coloured(story: Story, palette: int) -> Story:
    """The story in one palette, wherever it goes: what one picture shows of it, the next ones have."""
    frames = (replace(frame, scene=replace(frame.scene, palette=palette)) for frame in story.frames)
    return replace(story, frames=tuple(frames))


def _company(rng: random.Random, hero: Character) -> tuple[Character, Character]:
    """Return a friend and a third, all three of different names."""
    chosen = [hero]
    while len(chosen) < 3:
        character = rng.choice(MAIN) if rng.random() < MAIN_SHARE else rng.choice(SIDE)
        if all(character.id != other.id and (character.name or other.id) != other.name for other in chosen):
            chosen.append(character)
    return chosen[1], chosen[2]
