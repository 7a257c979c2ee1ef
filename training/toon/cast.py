"""Who lives in the world: the named main cast, a few hundred side characters, and the new ones kept out of training.

A side character never has a new one's (species, colour, accessory); that is asserted when the module is loaded, so a
change of either list cannot leak.
"""

from __future__ import annotations

from training.toon.colours import CLOTH, FUR
from training.toon.scene import ACCESSORIES, SPECIES, Character, Look
from training.toon.seeding import generator

SIDE_COUNT = 400


def _named(name: str, pronoun: str, colour: str, species: str, accessory_colour: str, accessory: str) -> Character:
    look = Look(species=species, colour=colour, accessory=accessory, accessory_colour=accessory_colour)
    return Character(id=name.lower(), name=name, pronoun=pronoun, look=look)


MAIN: tuple[Character, ...] = (
    _named("Pip", "he", "orange", "cat", "blue", "scarf"),
    _named("Mina", "she", "pink", "rabbit", "yellow", "bow"),
    _named("Bruno", "he", "brown", "bear", "green", "cap"),
    _named("Luna", "she", "grey", "owl", "purple", "wizard hat"),
    _named("Dot", "she", "yellow", "duck", "red", "glasses"),
    _named("Tiko", "he", "green", "dragon", "orange", "bandana"),
    _named("Ella", "she", "blue", "elephant", "yellow", "crown"),
    _named("Wolly", "he", "white", "sheep", "red", "cape"),
)
NEW: tuple[Character, ...] = (
    _named("Otto", "he", "black", "penguin", "orange", "earmuffs"),
    _named("Rosa", "she", "pink", "pig", "teal", "top hat"),
    _named("Momo", "he", "brown", "monkey", "yellow", "party hat"),
    _named("Fitz", "he", "green", "frog", "purple", "cape"),
    _named("Saffi", "she", "red", "fox", "teal", "scarf"),
    _named("Kiri", "she", "grey", "koala", "red", "flower"),
    _named("Lio", "he", "yellow", "lion", "green", "bow tie"),
    _named("Bao", "he", "black", "panda", "pink", "glasses"),
    _named("Nia", "she", "purple", "mouse", "orange", "cap"),
    _named("Zora", "she", "teal", "squirrel", "white", "straw hat"),
)
SIDE_NAMES: tuple[tuple[str, str], ...] = (
    ("Tom", "he"), ("Anna", "she"), ("Ben", "he"), ("Lucy", "she"), ("Max", "he"), ("Rose", "she"), ("Sam", "he"),
    ("Nora", "she"), ("Leo", "he"), ("Ivy", "she"), ("Jack", "he"), ("Emma", "she"), ("Oscar", "he"), ("Daisy", "she"),
    ("Hugo", "he"), ("Clara", "she"), ("Felix", "he"), ("Molly", "she"), ("Theo", "he"), ("Ruby", "she"),
    ("Toby", "he"), ("Alice", "she"), ("Finn", "he"), ("Holly", "she"), ("Gus", "he"), ("Poppy", "she"),
    ("Henry", "he"), ("Lily", "she"), ("Charlie", "he"), ("Zoe", "she"), ("Arthur", "he"), ("Olive", "she"),
    ("Milo", "he"), ("Hazel", "she"), ("Ned", "he"), ("Penny", "she"), ("Ralph", "he"), ("Tessa", "she"),
    ("Boris", "he"), ("Greta", "she"),
)  # fmt: skip


def combination(look: Look) -> tuple[str, str, str]:
    """Return what makes a character recognisable: species, colour, accessory."""
    return look.species, look.colour, look.accessory


def random_look(*seed: object) -> Look:
    """Return a look drawn evenly from all there are; the accessory never has the fur's colour."""
    rng = generator("look", *seed)
    colour = rng.choice(tuple(FUR))
    return Look(
        species=rng.choice(SPECIES),
        colour=colour,
        accessory=rng.choice(ACCESSORIES),
        accessory_colour=rng.choice([name for name in CLOTH if name != colour]),
    )


def _side_cast() -> tuple[Character, ...]:
    taken = {combination(character.look) for character in MAIN + NEW}
    found: list[Character] = []
    attempt = 0
    while len(found) < SIDE_COUNT:
        look = random_look("side", attempt)
        attempt += 1
        if combination(look) in taken:
            continue
        taken.add(combination(look))
        index = len(found)
        name, pronoun = SIDE_NAMES[index % len(SIDE_NAMES)]
        named = index % 5 < 3  # three of five have a name, the others are only known by a phrase
        found.append(Character(id=f"side-{index:03d}", name=name if named else None, pronoun=pronoun, look=look))
    return tuple(found)


SIDE: tuple[Character, ...] = _side_cast()
BY_ID: dict[str, Character] = {character.id: character for character in MAIN + SIDE + NEW}

_new = {combination(character.look) for character in NEW}
if any(combination(character.look) in _new for character in MAIN + SIDE):
    raise AssertionError("a character of the training splits looks like a new one")
_taken_names = [character.name for character in MAIN + NEW] + [name for name, _ in SIDE_NAMES]
if len(set(_taken_names)) != len(_taken_names):
    raise AssertionError("two characters share a name")
