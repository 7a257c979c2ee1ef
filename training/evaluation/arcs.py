"""The world's grammar as a judge of stories: which beat of which arc a caption is, and whether five make a story.

Strict: a caption counts as a beat when it is one of that beat's own wordings, whatever the names, places and things in
it. A sentence blended from two beats is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from training.toon.arcs import ARCS
from training.toon.stories import ARRIVALS, CONNECTIVE, OPENINGS, PLACES, STORY_LENGTH

SETUP, TURN, ENDING = (0,), (1, 2, 3), (4,)  # beats
_TOKEN = re.compile(r"\[([^\[\]]*)\]|\{(\w+)\}")

Place = tuple[str, int]
"""An arc and one of its beats."""


def _pattern(way: str) -> str:
    """A regular expression for one wording: choices are alternatives, slots are any words."""
    out, end = "", 0
    for token in _TOKEN.finditer(way):
        out += re.escape(way[end : token.start()])
        out += f"(?:{'|'.join(map(_pattern, token[1].split('|')))})" if token[1] is not None else r"[^.!?]+?"
        end = token.end()
    return out + re.escape(way[end:])


def _without_connective(way: str) -> str:
    """A wording whose "Then" may be missing: one that tells where or when it is has lost it."""
    start = CONNECTIVE.match(way)
    return way if start is None else f"[{start[0]}|]{way[start.end() :]}"


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], Place], ...]:
    openings = {opening for group in (*OPENINGS, *ARRIVALS.values()) for opening in group}
    places = {place for _, place in PLACES.values()}
    before = rf"(?:(?:{'|'.join(map(re.escape, sorted(openings)))}) )?(?:(?:{'|'.join(sorted(places))}), )?"
    return tuple(
        (re.compile(before + _pattern(_without_connective(way)), re.IGNORECASE), (name, number))
        for name, arc in ARCS.items()
        for number, beat in enumerate(arc.beats)
        for way in beat.ways
    )


def places_of(caption: str) -> frozenset[Place]:
    """The beats that this caption is a wording of; none for a sentence that the world would not say."""
    return frozenset(place for pattern, place in _patterns() if pattern.fullmatch(caption.strip()))


def has_arc(captions: Sequence[str]) -> bool:
    """Whether one arc has its setup, a turn and its ending among `captions`, in order and none told twice."""
    found = [places_of(caption) for caption in captions]
    for arc in ARCS:
        beats = [{number for name, number in places if name == arc} for places in found]
        if _in_order([b for b in beats if b]):
            return True
    return False


def _in_order(beats: Sequence[set[int]]) -> bool:
    """Whether one beat of each set can be chosen so that they rise from the setup over a turn to the ending."""
    paths = [[]]  # type: list[list[int]]
    for choices in beats:
        paths = [[*path, beat] for path in paths for beat in choices]
    return any(
        all(a < b for a, b in pairwise(path))
        and path[0] in SETUP
        and path[-1] in ENDING
        and any(beat in TURN for beat in path)
        for path in paths
        if path
    )


def drops_hero(captions: Sequence[str], hero: str) -> bool:
    """Whether nothing after the first caption names the hero any more."""
    return not any(re.search(rf"\b{re.escape(hero)}\b", caption) for caption in captions[1:STORY_LENGTH])
