"""The invention guard: captions and descriptions in which somebody turns up whose name nobody has.

A small language model that has to write a name it has never read spells another: after "Rosa waved" comes "Naiprux
came". Nobody knows what Naiprux looks like, and Rosa is gone from her own story. So a name that neither the pack nor
the story knows is a fault, and is taken for that of somebody in the story whom the pack does not know. A pack that does
not say what it knows may name whom it likes. Pure: knows no model, no tokenizer and no service.

`learned` are names that the story has learned, whole as they were given: "Star" is somebody's although the pack knows
stars, and "Rosa Lee" is one person.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from services.models.likeness import whole_word
from services.models.world import World


def invented(text: str, captions: Sequence[str], world: World, learned: Sequence[str] = ()) -> tuple[str, ...]:
    """The names in a caption that are nobody's, each once; `captions` are those before it."""
    known = _with(world, learned)
    told = {name for caption in captions for name in known.names_in(caption)}
    return tuple(name for name in known.unknown_names(text) if name not in told)


def faults(text: str, captions: Sequence[str], world: World, learned: Sequence[str] = ()) -> int:
    """How many names a caption makes up; 0 is what is wanted."""
    return len(invented(text, captions, world, learned))


def repaired(text: str, captions: Sequence[str], world: World, learned: Sequence[str] = ()) -> str:
    """`text` with its made-up names given to those of the story whom the pack does not know and `text` leaves out.

    In the order in which the captions name them, then whom they do not name. A name for which nobody is left stays.
    """
    known = _with(world, learned)
    told = "\n".join(captions)
    strangers = dict.fromkeys((*(name for caption in captions for name in known.unknown_names(caption)), *learned))
    missing = [name for name in strangers if not whole_word(name).search(text)]
    missing.sort(key=lambda name: first.start() if (first := whole_word(name).search(told)) else sys.maxsize)
    for made_up, name in zip(invented(text, captions, world, learned), missing, strict=False):
        text = name.join(whole_word(made_up).split(text))
    return text


def _with(world: World, learned: Sequence[str]) -> World:
    """The world with people in it whose looks it does not know."""
    return replace(world, names=(*world.names, *learned)) if learned else world
