"""The companion lock: somebody without a name keeps the looks that a story first gave them.

"A green pig with a red cap" was "a green pig with a blue top hat" a frame later, because a small model reads it off the
last picture each time, and what is drawn from that is somebody else. Who shares half of a look with one who was there
before, and of whom the caption does not speak as somebody new, is that one. Pure; knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from services.models.eyes import EyesShape, article

_SHARED_MIN = 2  # of the four parts of a look make somebody the same
_NAMED = re.compile(r"[^\W\d_a-z]\w*, $")  # "Pip, an orange cat …": what stands before the look of somebody with a name


class Look(NamedTuple):
    """Somebody without a name, in a description."""

    species: str
    colour: str
    accessory: str
    accessory_colour: str

    def shared(self, other: Look) -> int:
        """How many parts are the same."""
        return sum(a == b for a, b in zip(self, other, strict=True))


def repaired(description: str, caption: str, earlier: Sequence[str], shape: EyesShape) -> str:
    """`description` in which companions look as the `earlier` descriptions told first; oldest first.

    `shape` has the words that looks are told in. As it is where it is not clear who is meant.
    """
    found_here = _companions(description, shape)
    known = list(dict.fromkeys(look for text in earlier for _, look in _companions(text, shape)))
    taken = {look for _, look in found_here}
    parts, end = [], 0
    for found, look in found_here:
        if look in known or _tells_of(caption, look):
            continue
        right = _same(look, [one for one in known if one not in taken])
        if right is None:
            continue
        taken.add(right)
        worn = f"{right.accessory_colour} {right.accessory}"
        who = article(f"{right.colour} {right.species}")
        who = who.capitalize() if found["article"][0].isupper() else who
        wears = worn if right.accessory in shape.plural else article(worn)
        parts += [description[end : found.start()], f"{who} {found['link']} {wears}"]
        end = found.end()
    return "".join([*parts, description[end:]])


def _same(look: Look, known: Sequence[Look]) -> Look | None:
    """Who of those it is: the only one who shares most."""
    shared = sorted(((look.shared(one), one) for one in known), reverse=True)
    if not shared or shared[0][0] < _SHARED_MIN or (len(shared) > 1 and shared[1][0] == shared[0][0]):
        return None
    return shared[0][1]


def _tells_of(caption: str, look: Look) -> bool:
    return re.search(rf"\b{re.escape(look.species)}s?\b", caption, re.IGNORECASE) is not None


def _companions(text: str, shape: EyesShape) -> list[tuple[re.Match[str], Look]]:
    return [
        (found, Look(found["species"], found["colour"], found["accessory"], found["accessory_colour"]))
        for found in _pattern(*(tuple(shape.figure[name]) for name in Look._fields)).finditer(text)
        if not _NAMED.search(text[: found.start()])
    ]


@cache
def _pattern(*words: tuple[str, ...]) -> re.Pattern[str]:
    """A whole look: "a green pig with a red cap"."""
    species, colour, accessory, accessory_colour = (
        f"(?P<{name}>{'|'.join(map(re.escape, sorted(some, key=len, reverse=True)))})"
        for name, some in zip(Look._fields, words, strict=True)
    )
    return re.compile(
        rf"\b(?P<article>[Aa]n?) {colour} {species} (?P<link>with|wearing|in) (?:an? )?{accessory_colour} {accessory}\b"
    )
