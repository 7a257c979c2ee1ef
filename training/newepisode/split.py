"""Divides a corpus as NewEpisode does: pretraining without anybody new, one lesson for each of them, tests.

* No clip that shows somebody new is in a window of pretraining, whatever its published split (`check_leaks`).
* A character's lesson is the window in which most clips show them, among those the one with the fewest others; ties go
  to the smallest id.
* Everything else that shows them is tested on: every window (FlintstonesSV), or at most so many, drawn by a seed
  (PororoSV: 100). Of a test window, the clips that show the character are measured.
* Windows overlap, so `ALL`, the paper's way, measures on pictures that the lesson held, too; `STRICT` leaves those out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.customize_errors import FramesSeen
from training.newepisode.records import SPLITS, Corpus, DataInvalid, Window

Variant = Literal["all", "strict"]
ALL: Variant = "all"
STRICT: Variant = "strict"
VARIANTS: tuple[Variant, ...] = (ALL, STRICT)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What the paper leaves to choose."""

    tests_max: int | None = None  # windows of a character; None: all there are
    seed: int = 0  # of the draw, where there are more


@dataclass(frozen=True)
class Split:
    """Who learns and is measured on what. `measured` are the clips that count, by test window."""

    corpus: Corpus
    pretraining: Mapping[str, tuple[Window, ...]]
    lessons: Mapping[str, Window]
    tests: Mapping[str, tuple[Window, ...]]

    def measured(self, character: str, window: Window, variant: Variant) -> tuple[str, ...]:
        """The clips of a test window that show the character; for `STRICT`, those that no lesson held."""
        shown = (clip for clip in window.clips if character in self.corpus.clips[clip].new)
        taught = self.taught if variant == STRICT else frozenset()
        return tuple(clip for clip in shown if clip not in taught)

    @property
    def taught(self) -> frozenset[str]:
        """Clips of all lessons: new characters are taught jointly, so each has seen the others' lessons."""
        return frozenset(clip for window in self.lessons.values() for clip in window.clips)

    def to_dict(self) -> dict[str, Any]:
        """Every id, for JSON: what was learned from and tested on can be checked years later."""
        return {
            "corpus": self.corpus.name,
            "pretraining": {name: [one.id for one in windows] for name, windows in self.pretraining.items()},
            "lessons": {who: list(window.clips) for who, window in self.lessons.items()},
            "tests": {who: [one.id for one in windows] for who, windows in self.tests.items()},
        }


def build_split(corpus: Corpus, new: frozenset[str], protocol: Protocol) -> Split:
    """The split, checked. Raises DataInvalid for somebody with no lesson or nothing to test on, and FramesSeen."""
    shown = {clip.id for clip in corpus.clips.values() if clip.new & new}
    clean = [window for window in corpus.windows if shown.isdisjoint(window.clips)]
    pretraining = {name: tuple(one for one in clean if one.split == name) for name in SPLITS}
    lessons: dict[str, Window] = {}
    tests: dict[str, tuple[Window, ...]] = {}
    for character in sorted(new):
        windows = corpus.showing(character)
        if len(windows) < 2:
            raise DataInvalid(f"{corpus.name} has {len(windows)} stories of {character}: one to learn, one to test")
        lesson = min(windows, key=lambda window: (_worth(corpus, character, window), window.id))
        others = [window for window in windows if window.id != lesson.id]
        if protocol.tests_max is not None and len(others) > protocol.tests_max:
            rng = random.Random(f"{corpus.name} {character} {protocol.seed}")
            drawn = set(rng.sample(sorted(window.id for window in others), protocol.tests_max))
            others = [window for window in others if window.id in drawn]
        lessons[character], tests[character] = lesson, tuple(others)
    split = Split(corpus, pretraining, lessons, tests)
    check_leaks(split, new)
    return split


def _worth(corpus: Corpus, character: str, window: Window) -> tuple[int, int]:
    """Small for a good lesson: how many clips do not show the character, and how many others are in it."""
    clips = [corpus.clips[clip] for clip in window.clips]
    others = sum(len(clip.known) + len(clip.new - {character}) for clip in clips)
    return sum(character not in clip.new for clip in clips), others


def check_leaks(split: Split, new: frozenset[str]) -> None:
    """Raises FramesSeen when pretraining holds a clip of somebody new, a clip that is measured, or a lesson's window.

    Checked by clip id, on what the split says and not on how it was made, so that a split read from elsewhere can be
    checked, too.
    """
    seen = {clip: window for windows in split.pretraining.values() for window in windows for clip in window.clips}
    for clip, window in seen.items():
        if found := split.corpus.clips[clip].new & new:
            raise FramesSeen(f"{clip}, in window {window.id} of pretraining, shows {', '.join(sorted(found))}")
    for character, lesson in split.lessons.items():
        if any(lesson.id == window.id for window in split.tests.get(character, ())):
            raise FramesSeen(f"the lesson of {character}, {lesson.id}, is tested on")
    for character, windows in split.tests.items():
        for window in windows:
            if both := sorted(set(split.measured(character, window, STRICT)) & (split.taught | seen.keys())):
                raise FramesSeen(f"{both[0]} is measured for {character} and was learned from")
