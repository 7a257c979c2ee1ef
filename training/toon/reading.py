"""Reads a description back into labels.

Exact on what `grammar` writes; on other text (a language model's) it returns what it recognises and None for the
rest. It never raises. The order of work is: phrases about the whole scene are taken out, then every mention of a
character owns the text up to the next mention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from training.toon.cast import BY_ID, MAIN, NEW, SIDE_NAMES
from training.toon.colours import CLOTH, FUR
from training.toon.lexicon import (
    ACTION_CUES,
    LANDMARKS,
    MOOD_CUES,
    PROP_CUES,
    SETTING_CUES,
    SETTING_WAYS,
    TIME_CUES,
    TIME_WAYS,
    WEATHER_CUES,
)
from training.toon.scene import ACCESSORIES, SPECIES

_POSITION_ORDER = {"left": 0, "middle": 1, "right": 2}


@dataclass(frozen=True, kw_only=True)
class ParsedActor:
    """What a description says of one character; None where it says nothing."""

    id: str | None = None
    name: str | None = None
    species: str | None = None
    colour: str | None = None
    accessory: str | None = None
    accessory_colour: str | None = None
    position: str | None = None
    action: str | None = None
    mood: str | None = None
    prop: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParsedDescription:
    """What a description says. `actors` go from left to right where positions are told, else as mentioned."""

    actors: tuple[ParsedActor, ...] = field(default=())
    setting: str | None = None
    time: str | None = None
    side: str | None = None
    weather: str = "clear"
    ground_prop: str | None = None

    @property
    def characters(self) -> tuple[str | None, ...]:
        """The ids of the actors; None for somebody who is not in the cast."""
        return tuple(actor.id for actor in self.actors)

    @property
    def names(self) -> tuple[str | None, ...]:
        """The names of the actors; None for somebody without."""
        return tuple(actor.name for actor in self.actors)

    def labels(self) -> dict[str, Any]:
        """Return the labels in the form of `Scene.labels`, to compare with them."""
        return {
            "characters": self.characters,
            "setting": self.setting,
            "time": self.time,
            "side": self.side,
            "weather": self.weather,
            "actions": tuple(actor.action for actor in self.actors),
            "moods": tuple(actor.mood for actor in self.actors),
            "props": tuple(actor.prop for actor in self.actors),
            "ground_prop": self.ground_prop,
        }


def _any(words: Any) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_NAMES = {character.name for character in MAIN + NEW if character.name} | {name for name, _ in SIDE_NAMES}
_BY_NAME = {character.name: character.id for character in MAIN + NEW}
_BY_LOOK = {(c.look.species, c.look.colour, c.look.accessory, c.look.accessory_colour): c.id for c in BY_ID.values()}
_NOT_NAMES = "While|And|Here|There|On|In|At|With|Then|It|By|Beside|Next|The|A|An|He|She|One|As|During|Late|After|Among"
_NAME = rf"(?!(?:{_NOT_NAMES})\b)[A-Z][a-z]+"
_WEAR = rf"(?:,? (?:with|wearing|in) (?:a |an |the )?(?P<cloth>{_any(CLOTH)}) (?P<accessory>{_any(ACCESSORIES)}))"
_NOUN = rf"(?P<colour>{_any(FUR)}) (?P<species>{_any(SPECIES)})"
_MENTION = re.compile(
    rf"(?:\b(?P<name>{_NAME}),? )?\b(?i:a|an|the|one) {_NOUN}\b(?: (?P<inner>{_NAME})\b)?{_WEAR}?,?"
    rf"|\b(?P<only>{_any(_NAMES)})\b"
)
_LIGHT = re.compile(
    r"(?:the )?\b(?:sun|moon|window)\b(?: \w+){0,2} (?:on|at|from|to) the (left|right)(?: side)?", re.IGNORECASE
)
_ALL_LANDMARKS = _any({word for words in LANDMARKS.values() for word in words})
_LANDMARK = re.compile(rf"\b(?:a|an|the) (?:{_ALL_LANDMARKS})(?: \w+)? (?:on|at) the (left|right)", re.IGNORECASE)
_PROP_WORD = rf"(?P<prop>{'|'.join(PROP_CUES.values())})"
_GROUND = (
    re.compile(
        rf"\b(?:an?|the)(?: \w+){{0,4}}? {_PROP_WORD}\b(?: is| lies| rests| stands| lying)*"
        r"(?: on the (?:ground|floor)| nearby)",
        re.IGNORECASE,
    ),
    re.compile(rf"\bon the (?:ground|floor)(?: there)? (?:is|lies)(?: \w+){{0,4}}? {_PROP_WORD}\b", re.IGNORECASE),
)
_POSITION = re.compile(r"\b(?:on|at|to|in) the (left|right|middle|centre|center)(?: side)?\b", re.IGNORECASE)
_POSITION_BEFORE = re.compile(_POSITION.pattern + r",? ?$", re.IGNORECASE)


def _value_of(cues: dict[str, str], word: str) -> str | None:
    for value, cue in cues.items():
        if re.fullmatch(cue, word, re.IGNORECASE):
            return value
    return None


def _earliest(cues: dict[str, str], text: str) -> str | None:
    """Return the value whose cue comes first in `text`."""
    found = [
        (match.start(), value)
        for value, cue in cues.items()
        if (match := re.search(rf"\b(?:{cue})\b", text, re.IGNORECASE))
    ]
    return min(found)[1] if found else None


def _take_phrase(text: str, ways: dict[str, tuple[str, ...]], cues: dict[str, str]) -> tuple[str, str | None]:
    """Take the phrase of a setting or time out of `text`; look for a bare cue where no whole phrase is found."""
    for value, phrases in ways.items():
        for way in sorted(phrases, key=len, reverse=True):
            match = re.search(rf"\b{re.escape(way)}\b", text, re.IGNORECASE)
            if match:
                return text[: match.start()] + " " + text[match.end() :], value
    for value, cue in cues.items():
        match = re.search(rf"\b(?:{cue})\b", text, re.IGNORECASE)
        if match:
            return text[: match.start()] + " " + text[match.end() :], value
    return text, None


def _take_side(text: str) -> tuple[str, str | None]:
    side = None
    match = _LANDMARK.search(text)
    if match:
        side = "left" if match[1].lower() == "right" else "right"
        text = text[: match.start()] + text[match.end() :]
    match = _LIGHT.search(text)
    if match:
        side = match[1].lower()
        text = text[: match.start()] + text[match.end() :]
    return text, side


def _take_ground(text: str) -> tuple[str, str | None]:
    for pattern in _GROUND:
        match = pattern.search(text)
        if match:
            return text[: match.start()] + text[match.end() :], _value_of(PROP_CUES, match["prop"])
    return text, None


def _position(word: str) -> str:
    word = word.lower()
    return "middle" if word in ("centre", "center") else word


def _actor(mention: re.Match[str], owned: str, position: str | None) -> ParsedActor:
    groups = mention.groupdict()
    name = groups["name"] or groups["inner"] or groups["only"]
    look = (groups["species"], groups["colour"], groups["accessory"], groups["cloth"])
    identity = _BY_NAME.get(name) if name is not None else None
    if identity is None:
        identity = _BY_LOOK.get(look)  # type: ignore[arg-type]
    if position is None:
        told = _POSITION.search(owned)
        position = _position(told[1]) if told else None
    action = _earliest(ACTION_CUES, owned)
    prop = _earliest(PROP_CUES, owned) if action in ("hold", None) else None
    if prop is not None:
        action = "hold"
    mood = _earliest(MOOD_CUES, owned)
    if action == "cry":
        mood = mood or "sad"
    if action == "sleep":
        mood = mood or "sleepy"
    return ParsedActor(
        id=identity,
        name=name,
        species=look[0],
        colour=look[1],
        accessory=look[2],
        accessory_colour=look[3],
        position=position,
        action=action,
        mood=mood,
        prop=prop,
    )


def _merged(first: ParsedActor, again: ParsedActor) -> ParsedActor:
    values = {key: value if value is not None else getattr(again, key) for key, value in vars(first).items()}
    return ParsedActor(**values)


def _actors(text: str) -> tuple[ParsedActor, ...]:
    mentions = list(_MENTION.finditer(text))
    found: dict[object, ParsedActor] = {}
    for index, mention in enumerate(mentions):
        gap = text[mentions[index - 1].end() if index else 0 : mention.start()]
        before = _POSITION_BEFORE.search(gap)
        owned = text[mention.end() : mentions[index + 1].start() if index + 1 < len(mentions) else len(text)]
        if index + 1 < len(mentions):
            owned = _POSITION_BEFORE.sub("", owned)
        actor = _actor(mention, owned, _position(before[1]) if before else None)
        key = actor.name or actor.id or (actor.species, actor.colour, actor.accessory)
        found[key] = _merged(found[key], actor) if key in found else actor
    actors = list(found.values())
    if len(actors) > 1 and all(actor.position for actor in actors):
        actors.sort(key=lambda actor: _POSITION_ORDER[actor.position or "middle"])
    return tuple(actors)


def parse(description: str) -> ParsedDescription:
    """Return what `description` says. Exact on `grammar.describe`; partial, and never an error, on other text."""
    text = " ".join(description.split())
    text, side = _take_side(text)
    text, ground_prop = _take_ground(text)
    text, weather = _take_phrase(text, {}, WEATHER_CUES)
    text, time = _take_phrase(text, TIME_WAYS, TIME_CUES)
    text, setting = _take_phrase(text, SETTING_WAYS, SETTING_CUES)
    return ParsedDescription(
        actors=_actors(text),
        setting=setting,
        time=time,
        side=side,
        weather=weather or "clear",
        ground_prop=ground_prop,
    )
