"""The place lock: where a caption says that its frame is, its description is too.

"In the forest, Tiko saw Dot" was now and then described as "In the mountains", and then drawn and told on from there.
Only what is plainly said counts: one place that the pack knows, where a clause begins. Nobody is where "a treasure
hidden in the forest" is, and what a caption says of two places is left to the model. Pure; knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_THERE = r"\b(?P<there>in|inside|at|on)\s+(?P<place>{})\b"
_CLAUSE_BEGINS = re.compile(r"(?:^|[.!?…:;,])[\s\"“”'‘’]*$")  # what stands before


class _At(NamedTuple):
    there: str
    place: str


def faults(description: str, caption: str, places: Sequence[str]) -> int:
    """1 where the description is at other places than the one that the caption tells; `places` with their article."""
    told = _told(caption, places)
    described = [found["place"].lower() for found in _mentions(description, places)]
    return int(told is not None and bool(described) and told.place not in described)


def repaired(description: str, caption: str, places: Sequence[str]) -> str:
    """The description at the place of its caption, in the caption's words; as it is when nothing is wrong."""
    told = _told(caption, places)
    if told is None or not faults(description, caption, places):
        return description
    first = next(_mentions(description, places))
    there = told.there.capitalize() if first["there"][0].isupper() else told.there
    return f"{description[: first.start()]}{there} {told.place}{description[first.end() :]}"


def _told(caption: str, places: Sequence[str]) -> _At | None:
    """Where a caption is, if it names one place only and says that somebody is there."""
    named = [place for place in places if re.search(rf"\b{re.escape(place)}\b", caption, re.IGNORECASE)]
    if len(named) != 1:
        return None
    plain = (found for found in _mentions(caption, named) if _CLAUSE_BEGINS.search(caption[: found.start()]))
    found = next(plain, None)
    return found and _At(found["there"].lower(), named[0].lower())


def _mentions(text: str, places: Sequence[str]) -> Iterator[re.Match[str]]:
    if not places:
        return iter(())
    alternatives = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    return re.finditer(_THERE.format(alternatives), text, re.IGNORECASE)
