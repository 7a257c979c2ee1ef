"""The place lock: where a caption says that its frame is, its description is too; else where the last picture is.

"In the forest, Tiko saw Dot" was now and then described as "In the mountains", and then drawn and told on from there.
Only what is plainly said counts: one place that the pack knows, where a clause begins. Nobody is where "a treasure
hidden in the forest" is, and what a caption says of two places is left to the model. A caption that speaks of no place
goes on where the story is, which the pack's eyes see. Pure; knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_THERE = r"\b(?P<there>in|inside|at|on)\s+(?P<place>{})\b"
_SOMEWHERE = re.compile(
    r"\b(?:in|into|inside|at|to|by|near|through|across|along|towards?)\s+(?:the|an?|his|her|their|our|my|its)\s+\w"
    r"|\b(?:home|outside|indoors|outdoors|upstairs|downstairs|bed|school)\b",
    re.IGNORECASE,
)
_CLAUSE_BEGINS = re.compile(r"(?:^|[.!?…:;,])[\s\"“”'‘’]*$")  # what stands before


class At(NamedTuple):
    """A place, and the word before it: ("at", "the beach")."""

    there: str
    place: str

    @property
    def opening(self) -> str:
        """How a description there begins."""
        return f"{self.there.capitalize()} {self.place}"


def where(caption: str, places: Sequence[str], seen: At | None = None) -> At | None:
    """Where a caption is: what it tells, or where it speaks of no place what is `seen`; None: who knows.

    `places` with their article.
    """
    if (told := _told(caption, places)) is not None:
        return told
    return None if is_told(caption, places) else seen


def is_told(caption: str, places: Sequence[str]) -> bool:
    """Whether a caption speaks of any place at all, known or not."""
    nouns = (re.escape(place.split()[-1]) for place in places)
    return bool(_SOMEWHERE.search(caption) or re.search(rf"\b(?:{'|'.join(nouns)})s?\b", caption, re.IGNORECASE))


def faults(description: str, at: At | None, places: Sequence[str]) -> int:
    """1 where the description is at other places than `at`."""
    described = [found["place"].lower() for found in _mentions(description, places)]
    return int(at is not None and bool(described) and at.place not in described)


def repaired(description: str, at: At | None, places: Sequence[str]) -> str:
    """The description at the place where it should be; as it is when nothing is wrong."""
    if at is None or not faults(description, at, places):
        return description
    first = next(_mentions(description, places))
    there = at.there.capitalize() if first["there"][0].isupper() else at.there
    return f"{description[: first.start()]}{there} {at.place}{description[first.end() :]}"


def _told(caption: str, places: Sequence[str]) -> At | None:
    """Where a caption is, if it names one place only and says that somebody is there."""
    named = [place for place in places if re.search(rf"\b{re.escape(place)}\b", caption, re.IGNORECASE)]
    if len(named) != 1:
        return None
    plain = (found for found in _mentions(caption, named) if _CLAUSE_BEGINS.search(caption[: found.start()]))
    found = next(plain, None)
    return found and At(found["there"].lower(), named[0].lower())


def _mentions(text: str, places: Sequence[str]) -> Iterator[re.Match[str]]:
    if not places:
        return iter(())
    alternatives = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    return re.finditer(_THERE.format(alternatives), text, re.IGNORECASE)
