"""The companion lock: somebody without a name keeps the looks that a story first gave them, and stays while "they" do.

"A green pig with a red cap" was "a green pig with a blue top hat" a frame later, because a small model reads it off the
last picture each time, and what is drawn from that is somebody else. Who shares half of a look with one who was there
before, and of whom the caption does not speak as somebody new, is that one.

"They laughed and twirled" was described as one of them, laughing. Where two were there a frame before, "they" are these
two: whom the description leaves out does what the other does. Pure; knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from services.models.eyes import EyesShape, article

_SHARED_MIN = 2  # of the four parts of a look make somebody the same
_NAMED = re.compile(r"[^\W\d_a-z]\w*, $")  # "Pip, an orange cat …": what stands before the look of somebody with a name
_SPEECH = re.compile(r"[\"“][^\"”]*[\"”]")
_THEY = re.compile(r"\b(?:they|both)\b", re.IGNORECASE)
_SIDES = ("On the left ", "On the right ")  # where who stands, as descriptions of two say it


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
    """`description` with its companions as the `earlier` descriptions tell of them; oldest first.

    They look as was told first, and both of two are there where the caption speaks of "them". `shape` has the words
    that looks are told in. As it is where it is not clear who is meant.
    """
    dressed = _dressed(description, caption, earlier, shape)
    return _both(dressed, earlier[-1], shape) if earlier and _THEY.search(_SPEECH.sub("", caption)) else dressed


def _dressed(description: str, caption: str, earlier: Sequence[str], shape: EyesShape) -> str:
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


def _both(description: str, before: str, shape: EyesShape) -> str:
    """Both who were there before, where one of them is told of alone."""
    here, there = _sentences(description, shape), _sentences(before, shape)
    if len(here) != 1 or len(there) != 2 or here[0].who not in (both := [one.who for one in there]):
        return description
    (alone,) = here
    if alone.side is not None and _SIDES.index(alone.side) != both.index(alone.who):
        both.reverse()  # where it says, and the other beside
    told = " ".join(f"{side}{who}{alone.does}" for side, who in zip(_SIDES, both, strict=True))
    return f"{description[: alone.start]}{told}{description[alone.end :]}"


class _Sentence(NamedTuple):
    """A sentence about somebody, as the plain wording has it."""

    start: int
    end: int
    side: str | None  # one of `_SIDES`
    who: str  # the name, if any, and the look
    does: str  # the rest of it


def _sentences(text: str, shape: EyesShape) -> list[_Sentence]:
    """Everybody's sentence; nothing where somebody is told of in another way, as then it is not clear who is there."""
    look = _pattern(*(tuple(shape.figure[name]) for name in Look._fields))
    whole = re.compile(
        rf"(?:^|(?<=[.!?] ))(?P<side>{'|'.join(_SIDES)})?(?P<who>(?:[^\W\d_a-z]\w*, )?{look.pattern},?)"
        r"(?P<does> [^.!?]*[.!?])"
    )
    found = [
        _Sentence(
            *one.span(), one["side"], re.sub(r"^An? ", lambda article: article[0].lower(), one["who"]), one["does"]
        )
        for one in whole.finditer(text)
    ]
    return found if len(found) == len(look.findall(text)) else []


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
