"""The look lock: whoever a description names looks as the question said, and nobody else looks like them.

A small language model that was told "Tessa, a red duck with a teal top hat" writes that down nearly always, and now and
then a red cat. A frame is drawn from what is written, so the next four frames would be a cat's. Pure; knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from services.models.captions.prompts import told_looks

_WEARING = re.compile(r"\b(?:wearing|in)\b")
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


def faults(description: str, looks: Mapping[str, str]) -> int:
    """How many looks are wrong: of whom `looks` (by name) knows otherwise, and those that somebody unnamed has too."""
    told = told_looks([description])
    lower = description.lower()  # "A red duck" may begin a sentence
    right = [look for name, look in told.items() if look == looks.get(name)]
    # Two who are known to look alike, and are both named, double nothing.
    doubled = (lower.count(look.lower()) - right.count(look) for look in dict.fromkeys(right))
    return len(_wrong(told, looks)) + sum(doubled)


def repaired(description: str, looks: Mapping[str, str]) -> str:
    """The description in which everybody looks as `looks` knows, and without whole sentences about their doubles.

    Who was meant by a double is not known, and somebody missing is less of a mistake than the same one twice. A double
    in a sentence that tells of somebody by name stays.
    """
    for name, told in _wrong(told_looks([description]), looks).items():
        description = description.replace(f"{name}, {told}", f"{name}, {looks[name]}", 1)
    right = {look.lower() for name, look in told_looks([description]).items() if look == looks.get(name)}
    return " ".join(
        sentence
        for sentence in _SENTENCE_END.split(description)
        if told_looks([sentence]) or not any(look in sentence.lower() for look in right)
    )


def _wrong(told: Mapping[str, str], looks: Mapping[str, str]) -> dict[str, str]:
    return {name: look for name, look in told.items() if name in looks and not _alike(look, looks[name])}


def _alike(first: str, second: str) -> bool:
    """Equal but for the word between somebody and what they wear."""
    return _WEARING.sub("with", first) == _WEARING.sub("with", second)
