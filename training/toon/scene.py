"""The truth of a picture: who is where, does what, feels how, with which thing, when.

Frozen data with checks and a JSON form; it knows neither how a scene is drawn nor how it is told.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from training.toon.colours import CLOTH, FUR, RGB

ACTIONS = ("stand", "wave", "run", "jump", "sit", "sleep", "cry", "hold", "cheer", "dance", "point")
MOODS = ("happy", "delighted", "sad", "surprised", "angry", "scared", "sleepy")
SETTINGS = ("beach", "forest", "park", "mountains", "town", "farm", "bedroom", "kitchen")
INDOORS = ("bedroom", "kitchen")
TIMES = ("day", "sunset", "night")
WEATHERS = ("clear", "rain", "snow")
SIDES = ("left", "right")
PROPS = ("kite", "balloon", "gift", "cake", "umbrella", "book", "ball", "lantern", "guitar", "boat")
SPECIES = (
    "rabbit", "cat", "bear", "fox", "frog", "duck", "owl", "penguin", "elephant", "mouse", "pig", "dog",
    "monkey", "koala", "panda", "lion", "sheep", "hedgehog", "dragon", "raccoon", "deer", "squirrel", "tiger", "cow",
)  # fmt: skip
ACCESSORIES = (
    "bow", "cap", "party hat", "top hat", "beanie", "flower", "crown", "wizard hat", "earmuffs", "straw hat",
    "glasses", "scarf", "bow tie", "bandana", "cape",
)  # fmt: skip
MAX_ACTORS = 3


class SceneInvalid(ValueError):
    """A scene that cannot be drawn or told; the message names the field."""


def _one_of(field: str, value: str, allowed: tuple[str, ...] | dict[str, RGB]) -> None:
    if value not in allowed:
        raise SceneInvalid(f"{field} is {value!r}, not one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a character looks like. The three `*_rgb` overrides exist for pictures no words describe (VAE data)."""

    species: str
    colour: str
    accessory: str
    accessory_colour: str
    fur_rgb: RGB | None = None
    belly_rgb: RGB | None = None
    accessory_rgb: RGB | None = None

    def __post_init__(self) -> None:
        """Raise `SceneInvalid` for a word that the world does not have."""
        _one_of("species", self.species, SPECIES)
        _one_of("colour", self.colour, FUR)
        _one_of("accessory", self.accessory, ACCESSORIES)
        _one_of("accessory_colour", self.accessory_colour, CLOTH)


@dataclass(frozen=True, kw_only=True)
class Character:
    """Somebody with an identity. `name` is None for one who is only known by a phrase."""

    id: str
    name: str | None
    pronoun: str  # "she" or "he"
    look: Look


@dataclass(frozen=True, kw_only=True)
class Actor:
    """A character in one frame. `prop` is held in the hands, so it goes with the action "hold" and only with it."""

    character: Character
    action: str
    mood: str
    prop: str | None = None

    def __post_init__(self) -> None:
        """Raise `SceneInvalid` when the parts do not fit together."""
        _one_of("action", self.action, ACTIONS)
        _one_of("mood", self.mood, MOODS)
        if self.prop is not None:
            _one_of("prop", self.prop, PROPS)
        if (self.action == "hold") != (self.prop is not None):
            raise SceneInvalid(f"action {self.action!r} does not go with prop {self.prop!r}")
        if self.action == "cry" and self.mood != "sad":
            raise SceneInvalid("who cries is sad")
        if (self.action == "sleep") and self.mood != "sleepy":
            raise SceneInvalid("who sleeps is sleepy")


@dataclass(frozen=True, kw_only=True)
class Grade:
    """Colour grading of the whole picture (VAE data): hue turn in degrees and one gain for each channel."""

    hue_deg: float = 0.0
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture's truth. `actors` stand from left to right; `side` is where the sun, moon or window is.

    `palette` is the colours of the setting (`settings.Palette`), which no description tells.
    """

    actors: tuple[Actor, ...]
    setting: str
    time: str
    side: str
    weather: str = "clear"
    ground_prop: str | None = None
    grade: Grade | None = None
    palette: int = 0

    def __post_init__(self) -> None:
        """Raise `SceneInvalid` when the scene cannot exist."""
        _one_of("setting", self.setting, SETTINGS)
        _one_of("time", self.time, TIMES)
        _one_of("side", self.side, SIDES)
        _one_of("weather", self.weather, WEATHERS)
        if not 1 <= len(self.actors) <= MAX_ACTORS:
            raise SceneInvalid(f"actors are {len(self.actors)}, not 1 to {MAX_ACTORS}")
        if self.setting in INDOORS and self.weather != "clear":
            raise SceneInvalid("it neither rains nor snows indoors")
        if self.ground_prop is not None:
            _one_of("ground_prop", self.ground_prop, PROPS)
            if len(self.actors) == MAX_ACTORS:
                raise SceneInvalid("three actors leave no room for a ground_prop")
        if len({actor.character.id for actor in self.actors}) != len(self.actors):
            raise SceneInvalid("a character cannot be in a frame twice")

    def labels(self) -> dict[str, Any]:
        """Return the truth a judge compares with; per-character tuples follow the actors from left to right."""
        return {
            "characters": tuple(actor.character.id for actor in self.actors),
            "setting": self.setting,
            "time": self.time,
            "side": self.side,
            "weather": self.weather,
            "actions": tuple(actor.action for actor in self.actors),
            "moods": tuple(actor.mood for actor in self.actors),
            "props": tuple(actor.prop for actor in self.actors),
            "ground_prop": self.ground_prop,
        }

    def to_json(self) -> str:
        """Return the scene as one line of JSON; `from_json` gives an equal scene back."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Return the scene that `to_json` wrote. Raises `SceneInvalid`, `KeyError` or `TypeError` for anything else."""
        raw = json.loads(text)
        actors = tuple(
            Actor(
                character=Character(**{**actor["character"], "look": _look(actor["character"]["look"])}),
                action=actor["action"],
                mood=actor["mood"],
                prop=actor["prop"],
            )
            for actor in raw["actors"]
        )
        grade = raw["grade"]
        return cls(
            **{
                **raw,
                "actors": actors,
                "grade": None if grade is None else Grade(hue_deg=grade["hue_deg"], gains=tuple(grade["gains"])),
            }
        )


def _look(raw: dict[str, Any]) -> Look:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    return Look(**values)
