"""Tells a story: casts an arc, chooses its places, times and thing, and words its captions.

A caption is narrative (names, pronouns, feelings); the description of the same frame is literal and comes from
`grammar`. The hero is in every frame, places and sides stay as they are until the story moves, and time never goes
back; when the story moves or the time changes, the caption says so.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from training.toon.arcs import ARCS, Arc, Beat
from training.toon.grammar import article, describe
from training.toon.lexicon import SETTING_CUES
from training.toon.scene import SIDES, Actor, Character, Scene
from training.toon.seeding import stable_number

STORY_LENGTH = 5
_TIMES = {"d": "day", "s": "sunset", "n": "night"}
PLACES: dict[str, tuple[str, str]] = {  # bare, and with its preposition
    "beach": ("the beach", "at the beach"),
    "forest": ("the forest", "in the forest"),
    "park": ("the park", "in the park"),
    "mountains": ("the mountains", "in the mountains"),
    "town": ("the town", "in the town"),
    "farm": ("the farm", "on the farm"),
    "bedroom": ("the bedroom", "in the bedroom"),
    "kitchen": ("the kitchen", "in the kitchen"),
}
_PRONOUNS: dict[str, dict[str, str]] = {
    "she": {"he": "she", "him": "her", "his": "her"},
    "he": {"he": "he", "him": "him", "his": "his"},
}
_OPENING_SHARE, _ARRIVAL_SHARE = 0.25, 0.5  # of the sentences that begin with somebody
OPENINGS: tuple[tuple[str, ...], ...] = (
    ("One day,", "Once upon a time,", "One fine morning,"),
    ("Then", "But then", "A little later,", "All of a sudden,"),
    ("Soon", "After a while,", "A moment later,"),
    ("Just then,", "And then", "Before long,"),
    ("In the end,", "At last,", "Finally,"),
)
ARRIVALS: dict[str, tuple[str, ...]] = {
    "sunset": ("That evening,", "As the sun went down,", "When evening came,"),
    "night": ("That night,", "When the moon came up,", "When night came,"),
}
TOLD_TIME_CUES = {  # what a caption says of the time; "from that day on" and "all evening" say nothing of now
    "sunset": r"sunset|(?<!all )evening|sun went down|dusk",
    "night": r"(?<!all )(?<!good )night|moon came up|after dark",
    "day": r"morning|daytime",
}
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class StoryFrame:
    """One frame of a story: the truth, what the reader reads, and what the picture is drawn from."""

    scene: Scene
    caption: str
    description: str
    arc: str
    beat: int  # 0..4

    def labels(self) -> dict[str, Any]:
        """Return the labels of the scene, with `arc` and `beat`."""
        return {**self.scene.labels(), "arc": self.arc, "beat": self.beat}


@dataclass(frozen=True, kw_only=True)
class Story:
    """Five frames of one arc with the same hero."""

    arc: str
    hero: Character
    frames: tuple[StoryFrame, ...]


@dataclass(frozen=True, kw_only=True)
class _Casting:
    """What is decided once for a story."""

    roles: dict[str, Character]
    places: dict[str, str]
    sides: dict[str, str]
    prop: str
    order: tuple[str, ...]  # roles from left to right


def _actor(rng: random.Random, character: Character, part: str, casting: _Casting) -> Actor:
    action, mood, *props = part.split("/")
    prop = None
    if props:
        prop = rng.choice(props[0].split("|"))
        prop = casting.prop if prop == "PROP" else prop
    chosen = rng.choice(action.split("|"))
    mood = "sad" if chosen == "cry" else "sleepy" if chosen == "sleep" else rng.choice(mood.split("|"))
    return Actor(character=character, action=chosen, mood=mood, prop=prop)


def _scene(rng: random.Random, beat: Beat, time: str, casting: _Casting) -> Scene:
    parts = dict(part.split("=") for part in beat.cast)
    actors = tuple(_actor(rng, casting.roles[role], parts[role], casting) for role in casting.order if role in parts)
    return Scene(
        actors=actors,
        setting=casting.places[beat.place],
        time=time,
        side=casting.sides[beat.place],
        weather=beat.weather,
        ground_prop=casting.prop if beat.on_ground == "PROP" else beat.on_ground,
    )


class _Teller:
    """Fills the slots of captions; remembers who has been introduced."""

    def __init__(self, rng: random.Random, casting: _Casting) -> None:
        self.rng, self.casting = rng, casting
        self.introduced: set[str] = set()

    def caption(self, beat: Beat, index: int, arrived: str | None) -> str:
        """Return one wording of beat `index`; `arrived` is the time of day when it has just changed to that."""
        text = self.rng.choice(beat.ways)
        openings = OPENINGS[index] if arrived is None else ARRIVALS[arrived]
        if text.startswith("{") and self.rng.random() < (_OPENING_SHARE if arrived is None else _ARRIVAL_SHARE):
            text = f"{self.rng.choice(openings)} {{{text[1].lower()}{text[2:]}"
        text = _CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), text)
        return _SLOT.sub(lambda match: self._filled(match[1], beat), text)

    def _filled(self, slot: str, beat: Beat) -> str:
        low = slot[0].lower() + slot[1:]
        word = self._word(low, beat)
        return word[0].upper() + word[1:] if slot[0].isupper() else word

    def _word(self, slot: str, beat: Beat) -> str:
        casting = self.casting
        if slot in casting.roles:
            return self._name(slot)
        if slot == "prop":
            return "toy boat" if casting.prop == "boat" else casting.prop
        if slot == "place":
            return PLACES[casting.places[beat.place]][0]
        if slot in ("at", "at_b"):
            return PLACES[casting.places["b" if slot == "at_b" else beat.place]][1]
        if slot.startswith("f"):
            return _PRONOUNS[casting.roles["friend"].pronoun][slot[1:]]
        return _PRONOUNS[casting.roles["hero"].pronoun][slot]

    def _name(self, role: str) -> str:
        character = self.casting.roles[role]
        if character.name is not None:
            return character.name
        noun = f"{character.look.colour} {character.look.species}"
        if role in self.introduced:
            return f"the {noun}"
        self.introduced.add(role)
        return article(noun)


def _cast(rng: random.Random, arc: Arc, hero: Character, company: tuple[Character, Character]) -> _Casting:
    first = rng.choice(arc.places_a)
    second = rng.choice([place for place in arc.places_b if place != first] or [first])
    order = ["hero", "friend"]
    rng.shuffle(order)
    return _Casting(
        roles={"hero": hero, "friend": company[0], "other": company[1]},
        places={"a": first, "b": second},
        sides={"a": rng.choice(SIDES), "b": rng.choice(SIDES)},
        prop=rng.choice(arc.props),
        order=(*order, "other"),
    )


def draw_story(rng: random.Random, hero: Character, company: tuple[Character, Character]) -> Story:
    """Return a story of `hero`, who needs a name, with a friend and a third; all choices come from `rng`."""
    name = rng.choice(tuple(ARCS))
    arc = ARCS[name]
    casting = _cast(rng, arc, hero, company)
    teller = _Teller(rng, casting)
    times = rng.choice(arc.times)
    frames: list[StoryFrame] = []
    for index, (beat, letter) in enumerate(zip(arc.beats, times, strict=True)):
        scene = _scene(rng, beat, _TIMES[letter], casting)
        arrived = scene.time if index and letter != times[index - 1] else None
        frames.append(
            StoryFrame(
                scene=scene,
                caption=teller.caption(beat, index, arrived),
                description=describe(scene, rng),
                arc=name,
                beat=index,
            )
        )
    return Story(arc=name, hero=hero, frames=_told_openly(_named_again(tuple(frames), casting), casting))


def _named_again(frames: tuple[StoryFrame, ...], casting: _Casting) -> tuple[StoryFrame, ...]:
    """The frames, with the latest caption that can name the hero told anew where none after the first one does.

    A story that says "he" for four frames teaches a small model to forget whom it is about.
    """
    hero = casting.roles["hero"].name
    if any(re.search(rf"\b{hero}\b", frame.caption) for frame in frames[1:]):
        return frames
    rng = random.Random(stable_number("named again", *(frame.caption for frame in frames)))
    told = list(frames)
    for index in range(len(frames) - 1, 0, -1):
        beat = ARCS[frames[index].arc].beats[index]
        ways = tuple(way for way in beat.ways if "{hero}" in way)
        if ways:
            caption = _Teller(rng, casting).caption(replace(beat, ways=ways), index, None)
            told[index] = replace(frames[index], caption=caption)
            break
    return tuple(told)


CONNECTIVE = re.compile(r"(?:But then|And then|Just then|Then|But|Soon|Luckily|In the end|At last|Finally|Now)\b,? ")


def told_value(cues: dict[str, str], text: str) -> str | None:
    """The place or time that a caption tells, by its cues; None when it is silent."""
    return next((value for value, cue in cues.items() if re.search(rf"\b(?:{cue})\b", text, re.IGNORECASE)), None)


def _told_openly(frames: tuple[StoryFrame, ...], casting: _Casting) -> tuple[StoryFrame, ...]:
    """The frames, with captions that say so when it has become another time of day or the story has moved.

    Who describes a caption can only carry over what is not told; a change nobody mentions would be a guess.
    """
    rng = random.Random(stable_number("told openly", *(frame.caption for frame in frames)))
    names = tuple(c.name for c in casting.roles.values() if c.name)
    told = [frames[0]]
    for before, frame in pairwise(frames):
        prefixes = []
        if frame.scene.time != before.scene.time and told_value(TOLD_TIME_CUES, frame.caption) != frame.scene.time:
            prefixes.append(rng.choice(ARRIVALS[frame.scene.time]))
        if (
            frame.scene.setting != before.scene.setting
            and told_value(SETTING_CUES, frame.caption) != frame.scene.setting
        ):
            prefixes.append(f"{PLACES[frame.scene.setting][1]},")
        caption = frame.caption if not prefixes else _prefixed(" ".join(prefixes), frame.caption, names)
        told.append(replace(frame, caption=caption))
    return tuple(told)


def _prefixed(prefix: str, caption: str, names: tuple[str, ...]) -> str:
    rest = CONNECTIVE.sub("", caption, count=1) if CONNECTIVE.match(caption) else caption
    if not rest.startswith((*names, "I ", '"')):
        rest = rest[:1].lower() + rest[1:]
    return f"{prefix[:1].upper()}{prefix[1:]} {rest}"
