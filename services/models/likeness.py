"""How alike two looks are: a phrase, "a black penguin with orange earmuffs", in the words that a pack's eyes know.

Whoever checks an upload and whoever scores what was drawn ask the same: does this figure look as that phrase says? Eyes
are right about most parts of a look and now and then wrong about one, so somebody is recognised by `ALIKE` of the four.
Pure; costs nothing to import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is not needed to compare words
    from services.models.eyes import EyesShape

ALIKE = 3  # of the four parts of a look make somebody who is known, as for `services.models.eyes.new_looks`
WORN = re.compile(r" (?:with|wearing|in) ")
"""Between what somebody is and what they wear."""
_OF_THE_BODY = ("species", "colour")
_OF_WHAT_IS_WORN = ("accessory", "accessory_colour")

Parts = dict[str, str]
"""Words of a look by question; a question without an answer is missing."""


class Vocabulary:
    """The words that eyes have for a look."""

    def __init__(self, shape: EyesShape) -> None:
        self._words: Mapping[str, Sequence[str]] = {
            name: tuple(shape.figure[name]) for name in (*_OF_THE_BODY, *_OF_WHAT_IS_WORN)
        }

    def parts(self, phrase: str) -> Parts:
        """What a phrase tells of a look in words that the eyes know."""
        joint = WORN.search(phrase)
        body, worn = (phrase, "") if joint is None else (phrase[: joint.start()], phrase[joint.end() :])
        told = {name: self._said(name, body) for name in _OF_THE_BODY}
        told |= {name: self._said(name, worn) for name in _OF_WHAT_IS_WORN}
        return {name: word for name, word in told.items() if word}

    def seen(self, answers: Mapping[str, str]) -> Parts:
        """The same of what the eyes said of a figure."""
        return {name: answers[name] for name in self._words}

    def _said(self, name: str, text: str) -> str:
        found = [word for word in self._words[name] if whole_word(word.lower()).search(text.lower())]
        return max(found, key=len, default="")


def matches(first: Mapping[str, str], second: Mapping[str, str]) -> int:
    """How many parts of a look are told by both, and alike."""
    return sum(second.get(question) == word for question, word in first.items())


def whole_word(text: str) -> re.Pattern[str]:
    """A text as a whole word."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
