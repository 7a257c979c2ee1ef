"""The invention guard: captions in which somebody turns up whose name nobody has.

A small language model that has to write a name it has never read spells another: after "Rosa waved" comes "Naiprux
came". Nobody knows what Naiprux looks like, and Rosa is gone from her own story. So a name that neither the pack nor
the story knows is a fault, and is taken for that of somebody in the story whom the pack does not know. A pack that does
not say what it knows may name whom it likes. Pure: knows no model, no tokenizer and no service.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.models.likeness import whole_word
from services.models.world import World


def invented(text: str, earlier: Sequence[str], world: World) -> tuple[str, ...]:
    """The names in a caption that are nobody's, each once.

    `earlier` are the texts that may name people: the captions before it, then the names of whom the story has learned.
    """
    told = {name for caption in earlier for name in world.names_in(caption)}
    return tuple(name for name in world.unknown_names(text) if name not in told)


def faults(text: str, earlier: Sequence[str], world: World) -> int:
    """How many names a caption makes up; 0 is what is wanted."""
    return len(invented(text, earlier, world))


def repaired(text: str, earlier: Sequence[str], world: World) -> str:
    """`text` with its made-up names given to those of the story whom the pack does not know and `text` leaves out.

    In the order in which the story names them. A name for which nobody is left stays.
    """
    strangers = dict.fromkeys(name for caption in earlier for name in world.unknown_names(caption))
    missing = [name for name in strangers if not whole_word(name).search(text)]
    for made_up, name in zip(invented(text, earlier, world), missing, strict=False):
        text = whole_word(made_up).sub(name, text)
    return text
