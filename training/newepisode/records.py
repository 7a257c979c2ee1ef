"""Clips with a caption, and windows of five of them that are told as stories. Knows no file and no rule.

As published, windows of one video overlap: each clip starts one, so up to four of five frames of two stories are the
same. What may be learned from and what is tested on is therefore decided by clip, never by window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from training.customize_errors import CustomizationError

WINDOW_CLIPS = 5
SPLITS = ("train", "validation", "test")


class DataInvalid(CustomizationError):
    """A data set's folder, registry or accept file does not hold what it should. The message names file and entry."""

    reason = "DATA_INVALID"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One picture's worth of a video, by an id that never changes."""

    id: str
    caption: str
    new: frozenset[str] = frozenset()  # ids of the new characters that it shows, as far as is known
    known: frozenset[str] = frozenset()  # who else, where the data set says so, as it calls them; in lower case


@dataclass(frozen=True, kw_only=True)
class Window:
    """Five clips in a row. Raises DataInvalid for another number, or for a clip that comes twice."""

    id: str
    clips: tuple[str, ...]
    split: str  # as published

    def __post_init__(self) -> None:
        if len(self.clips) != WINDOW_CLIPS or len(set(self.clips)) != WINDOW_CLIPS:
            raise DataInvalid(f"window {self.id} is not of {WINDOW_CLIPS} different clips")
        if self.split not in SPLITS:
            raise DataInvalid(f"window {self.id} is of split {self.split!r}, not one of {', '.join(SPLITS)}")


@dataclass(frozen=True)
class Corpus:
    """A data set. Raises DataInvalid for a window of a clip that is not there, and for two windows of one id."""

    name: str
    clips: Mapping[str, Clip]
    windows: tuple[Window, ...]
    unread: tuple[str, ...] = field(default=())  # windows of the source that lack a clip, so are left out

    def __post_init__(self) -> None:
        ids = set()
        for window in self.windows:
            if window.id in ids:
                raise DataInvalid(f"two windows of {self.name} have the id {window.id}")
            ids.add(window.id)
            if missing := [one for one in window.clips if one not in self.clips]:
                raise DataInvalid(f"window {window.id} of {self.name} has a clip {missing[0]!r} that is not there")

    def showing(self, character: str) -> tuple[Window, ...]:
        """Windows with a clip that shows the character, in their order."""
        return tuple(one for one in self.windows if any(character in self.clips[clip].new for clip in one.clips))

    def with_clips(self, changed: Iterable[Clip]) -> Corpus:
        """The same with some clips told otherwise."""
        return replace(self, clips={**self.clips, **{clip.id: clip for clip in changed}})
