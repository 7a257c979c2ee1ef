"""Describes a scene literally: who, where in the picture, doing what, feeling how, in which place and light.

The words come from `lexicon`, their order from here; `parse` (in `reading`) inverts it exactly. Everything that can
be seen to vary is said, because a model averages what the text leaves out. The wording is drawn from the generator
passed in.
"""

from __future__ import annotations

import random

from training.toon.lexicon import (
    ACTION_WAYS,
    GROUND_WAYS,
    LANDMARKS,
    LIGHT_WAYS,
    MOOD_SENTENCES,
    MOOD_WAYS,
    PAIRWISE_ACCESSORIES,
    POSITION_WAYS,
    POSITIONS,
    PROP_WAYS,
    SETTING_WAYS,
    TIME_WAYS,
    WEATHER_WAYS,
)
from training.toon.reading import ParsedActor, ParsedDescription, parse
from training.toon.scene import INDOORS, Actor, Character, Look, Scene

__all__ = ["ParsedActor", "ParsedDescription", "describe", "describe_plainly", "parse", "phrase"]

WORD_LIMITS = {1: 38, 2: 52, 3: 60}  # by how many actors; keeps a description within 90 tokens
_ADJECTIVES = ("smiling", "laughing", "overjoyed", "full of joy", "astonished", "amazed", "frightened")
_MOODLESS = ("sleep", "cry")  # these say their mood
NAME_ONLY_SHARE = 0.15  # how often the main cast goes without its phrase, so that a name alone means somebody


def article(noun: str) -> str:
    """Return `noun` behind "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def worn(look: Look) -> str:
    """Return the accessory with its colour and article."""
    noun = f"{look.accessory_colour} {look.accessory}"
    return noun if look.accessory in PAIRWISE_ACCESSORIES else article(noun)


def phrase(look: Look, definite: bool = False) -> str:
    """Return the phrase that a character is known by: "a white sheep with a red cape"."""
    noun = f"{look.colour} {look.species}"
    return f"{'the ' + noun if definite else article(noun)} with {worn(look)}"


def _mention(rng: random.Random, character: Character) -> str:
    """Return the way this character is first named; a trailing comma closes an apposition."""
    look, name = character.look, character.name
    noun = f"{look.colour} {look.species}"
    wear = f"{rng.choice(('with', 'with', 'wearing', 'in'))} {worn(look)}"
    if name is None:
        return f"{article(noun)} {wear}"
    if not character.id.startswith("side-") and rng.random() < NAME_ONLY_SHARE:
        return name
    return rng.choice(
        (
            f"{name}, {article(noun)} {wear},",
            f"{name}, the {noun} {wear},",
            f"{name} the {noun} {wear}",
            f"the {noun} {name} {wear}",
        )
    )


def _verb(rng: random.Random, actor: Actor) -> str:
    way = rng.choice(ACTION_WAYS[actor.action])
    return way if actor.prop is None else way.format(rng.choice(PROP_WAYS[actor.prop]))


def _mood(rng: random.Random, actor: Actor) -> str | None:
    """Return the mood's phrase; None where the action says it (who sleeps; mostly, who cries)."""
    if actor.action == "sleep" or (actor.action == "cry" and rng.random() < 0.7):
        return None
    return rng.choice(MOOD_WAYS[actor.mood])


def _clause(rng: random.Random, actor: Actor, position: str | None, alone: bool) -> str:
    mention, verb, mood = _mention(rng, actor.character), _verb(rng, actor), _mood(rng, actor)
    pronoun_sentence = ""
    if alone and mood is not None and rng.random() < 0.25:
        pronoun_sentence = ". " + rng.choice(MOOD_SENTENCES[actor.mood]).format(actor.character.pronoun.capitalize())
        mood = None
    feeling = "" if mood is None else f" {mood}"
    if mood is not None and not mood.startswith("and ") and (mood in _ADJECTIVES or rng.random() < 0.3):
        feeling = f", {mood}"
    if position is None:
        return f"{mention} {verb}{feeling}{pronoun_sentence}"
    where = rng.choice(POSITION_WAYS[position])
    return rng.choice(
        (
            f"{where}, {mention} {verb}{feeling}",
            f"{where} {mention} {verb}{feeling}",
            f"{mention} {verb}{feeling} {where}",
            f"{mention} {verb} {where}{feeling}",
        )
    )


def _source(scene: Scene) -> str:
    """Return what the light comes from."""
    return "window" if scene.setting in INDOORS else "moon" if scene.time == "night" else "sun"


def _light(rng: random.Random, scene: Scene) -> str:
    """Say on which side the light is, or the landmark, or both."""
    said = rng.choice(LIGHT_WAYS).format(_source(scene), scene.side)
    if scene.setting in LANDMARKS and rng.random() < 0.25 and len(scene.actors) < 3:
        other = "left" if scene.side == "right" else "right"
        landmark = article(rng.choice(LANDMARKS[scene.setting]))
        said = f"{said}, {landmark} on the {other}" if rng.random() < 0.7 else f"{landmark} is on the {other}"
    return said


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + "."


def _wording(scene: Scene, rng: random.Random) -> str:
    count = len(scene.actors)
    order = list(range(count))
    if rng.random() < 0.35:
        rng.shuffle(order)
    clauses = [
        _clause(rng, scene.actors[i], POSITIONS[count][i] if count > 1 else None, alone=count == 1) for i in order
    ]
    place, time = rng.choice(SETTING_WAYS[scene.setting]), rng.choice(TIME_WAYS[scene.time])
    where = f"{place} {time}" if rng.random() < 0.7 else f"{time} {place}"
    joints = rng.choice((". ", "; ", ", and ", ", while ")) if count == 2 else rng.choice((". ", "; "))
    told = joints.join(clauses)
    sentences: list[str] = []
    layout = rng.randrange(5)
    if layout == 0:  # the place first, as a phrase
        sentences += f"{where}, {told}".split(". ")
    elif layout == 1:  # the place first, as a sentence
        sentences += [f"it is {time} {place}" if rng.random() < 0.3 else f"{where}", *told.split(". ")]
    elif layout == 2:  # the place within the first clause
        first, *others = clauses
        head, dot, tail = first.partition(". ")
        sentences += f"{joints.join([f'{head} {where}{dot}{tail}', *others])}".split(". ")
    elif layout == 3:  # the place after the clauses
        sentences += [*told.split(". "), f"the scene is {where}" if rng.random() < 0.5 else where]
    else:  # time before, place after
        sentences += (
            [f"{time}, {told} {place}"]
            if count == 1 and ". " not in clauses[0]
            else [
                f"{time} {place}",
                *told.split(". "),
            ]
        )
    details = [_light(rng, scene)]
    if scene.weather != "clear":
        details.append(rng.choice(WEATHER_WAYS[scene.weather]))
    if scene.ground_prop is not None:
        details.append(rng.choice(GROUND_WAYS).format(rng.choice(PROP_WAYS[scene.ground_prop])))
    rng.shuffle(details)
    if len(details) > 1 and rng.random() < 0.5:
        details = [", ".join(details[:2]), *details[2:]]
    return " ".join(_sentence(sentence) for sentence in sentences + details)


def describe_plainly(scene: Scene) -> str:
    """Return the one description of `scene` that a captioner learns to write: `describe` in a single wording.

    A frame model must read every wording; who writes needs one. A captioner that was taught all of them spent most of
    its small weights on which of them comes next. The place comes first, then everybody from left to right, their looks
    in the words that the question tells them in ("Pip, an orange cat with a blue scarf"), then the light.
    """
    sentences = [f"{SETTING_WAYS[scene.setting][0]} {TIME_WAYS[scene.time][0]}"]
    for actor, position in zip(scene.actors, POSITIONS[len(scene.actors)], strict=True):
        where = f"{POSITION_WAYS[position][0]} " if len(scene.actors) > 1 else ""
        name, look = actor.character.name, phrase(actor.character.look)
        verb = ACTION_WAYS[actor.action][0]
        if actor.prop is not None:
            verb = verb.format(PROP_WAYS[actor.prop][0])
        mood = "" if actor.action in _MOODLESS else MOOD_WAYS[actor.mood][0]
        feeling = f", {mood}" if mood in _ADJECTIVES else f" {mood}" if mood else ""
        sentences.append(f"{where}{look if name is None else f'{name}, {look},'} {verb}{feeling}")
    sentences.append(LIGHT_WAYS[0].format(_source(scene), scene.side))
    if scene.weather != "clear":
        sentences.append(WEATHER_WAYS[scene.weather][0])
    if scene.ground_prop is not None:
        sentences.append(GROUND_WAYS[0].format(PROP_WAYS[scene.ground_prop][0]))
    return " ".join(map(_sentence, sentences))


def describe(scene: Scene, rng: random.Random) -> str:
    """Return a description of `scene`, worded by `rng`. `parse` gives the scene's labels back.

    Long wordings are drawn again, so that a description of one, two, three actors has at most 38, 52, 60 words.
    """
    text = _wording(scene, rng)
    for _ in range(40):
        if len(text.split()) <= WORD_LIMITS[len(scene.actors)]:
            break
        text = min(text, _wording(scene, rng), key=lambda wording: len(wording.split()))
    return text
