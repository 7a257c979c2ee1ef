"""Earlier frames as prefill: their passes through the network do not depend on the frame that is drawn.

A reference row is one earlier frame (or the blank one) at one noise level with one text. What its pass leaves, the keys
and values of every `attn3`, is kept in a paged cache, one page a row, and looked at by all main rows that need it: the
guidance branches of a frame, its later steps, and, where `ReferencePolicy` lets noise be shared, the story's next
frames and, for the blank, everybody. `services.models.step` fills pages ahead of the steps that need them.

A cache belongs to one network with one arithmetic, so neither is in a key. Not thread-safe.

Shapes: P pages, L latent pixels of a block, C width of its keys, R rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from torch import Tensor

from services.models.denoiser import REFERENCE_LEVEL_DIVISOR, reference_level
from services.models.lora import Outfit
from services.models.storygen import KeyValue, Told
from services.models.transfer import sent

SIZES_KEPT = 2  # picture sizes whose pages are kept at the same time


@dataclass(frozen=True, kw_only=True)
class ReferencePolicy:
    """How earlier frames are noised. The default is StoryGen's own rule; the others are departures from it.

    `shared_noise`: one noise per pack and size instead of one per frame, so that a row is the same for every frame that
    looks at it, and the blank's rows are a table that is computed once.
    `levels_count`: so many noise levels during a frame, each for a stretch of its steps and for every distance, instead
    of one per step and distance; 0 is StoryGen's rule. With shared noise the next frame of a story finds all of them.
    `level_divisor`: how much clearer a reference is than the frame.
    """

    shared_noise: bool = False
    levels_count: int = 0
    level_divisor: int = REFERENCE_LEVEL_DIVISOR

    def __post_init__(self) -> None:
        if self.levels_count < 0:
            raise ValueError("levels_count must not be negative")
        if self.level_divisor < 1:
            raise ValueError("level_divisor must be positive")

    def level(self, steps: Sequence[float], done: int, distance: int) -> int:
        """The noise level of the frame `distance` back while step `steps[done]` is taken."""
        if self.levels_count == 0:
            return reference_level(steps[done], distance, self.level_divisor)
        count = min(self.levels_count, len(steps))
        stretch = done * count // len(steps)
        first, after = (-(-number * len(steps) // count) for number in (stretch, stretch + 1))
        return reference_level(steps[(first + after - 1) // 2], 1, self.level_divisor)


EXACT = ReferencePolicy()


class ReferenceKey(NamedTuple):
    """Everything that the pass of a reference row depends on, besides the network."""

    picture: str  # digest of its pixels; empty for the blank
    text: str
    level: int
    noise: tuple[int, ...]  # what its noise was drawn from; empty where it is shared
    size: tuple[int, int]  # of the latents
    wearing: tuple[tuple[str, float], ...]  # digests and scales of the characters whose weights the row wears
    tenant: str  # nobody learns from the time of a step what others have drawn; empty for the blank

    @property
    def is_blank(self) -> bool:
        """It is the blank's: every frame with these weights looks at it."""
        return not self.picture


@dataclass(frozen=True)
class ReferenceRow:
    """One row of a reference pass, and what makes it."""

    key: ReferenceKey
    clean_CHW: Tensor
    noise_CHW: Tensor
    text_SD: Tensor
    outfit: Outfit
    told: Told | None = None  # the text as the network's blocks read it, `[S, C]` each, where they were asked before

    @property
    def is_shared(self) -> bool:
        """Others may want it too."""
        return not self.key.noise


class Pages:
    """The pages of one picture size. There are none until the first rows come and say how large a page is.

    Where room is short a story's pictures go before the blank's rows, which every frame of a character looks at; but
    the blanks of characters that nobody draws any more take half of the pages at most.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.count = 0
        self.blocks: dict[str, KeyValue] = {}  # `[P, L, C]` each
        self._slots: OrderedDict[ReferenceKey, int] = OrderedDict()  # used longest ago first
        self._blanks: OrderedDict[ReferenceKey, None] = OrderedDict()  # those of them that are the blank's, likewise
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: ReferenceKey) -> bool:
        return key in self._slots

    def slots(self, keys: Iterable[ReferenceKey]) -> list[int]:
        """Page numbers. Raises KeyError for a key that is not here."""
        found = []
        for key in keys:
            found.append(self._slots[key])
            self._slots.move_to_end(key)
            if key in self._blanks:
                self._blanks.move_to_end(key)
        return found

    def store(
        self, keys: Sequence[ReferenceKey], projected: Mapping[str, KeyValue], keep: Collection[ReferenceKey]
    ) -> None:
        """Lay rows into pages; rows of `keep` stay, of the others those go that were used longest ago.

        What must stay always finds room: where the budget is too small for a single step, it is exceeded.
        """
        staying = {*(key for key in keep if key in self._slots), *keys}
        if len(staying) > self.count:
            row_bytes = sum(part[0].nbytes for seen in projected.values() for part in seen)
            self._grow(max(len(staying), self.budget_bytes // row_bytes), projected)
        for key in keys:
            if key not in self._slots:
                self._slots[key] = self._page(staying)
                if key.is_blank:
                    self._blanks[key] = None
        places = sent([self._slots[key] for key in keys], next(iter(projected.values())).key.device)
        for name, seen in projected.items():
            for page, part in zip(self.blocks[name], seen, strict=True):
                page[places] = part

    def discard(self, keys: Iterable[ReferenceKey]) -> None:
        """Free the pages of those that are here."""
        for key in keys:
            if (slot := self._slots.pop(key, None)) is not None:
                self._free.append(slot)
                self._blanks.pop(key, None)

    def _grow(self, count: int, like: Mapping[str, KeyValue]) -> None:
        grown = {
            name: KeyValue(*(part.new_empty((count, *part.shape[1:])) for part in seen)) for name, seen in like.items()
        }
        for name, before in self.blocks.items():
            for new, old in zip(grown[name], before, strict=True):
                new[: self.count] = old
        self._free += range(count - 1, self.count - 1, -1)
        self.blocks, self.count = grown, count

    def _page(self, staying: Collection[ReferenceKey]) -> int:
        if not self._free:
            self.discard([self._leaving(staying)])
        return self._free.pop()

    def _leaving(self, staying: Collection[ReferenceKey]) -> ReferenceKey:
        pictures = (key for key in self._slots if key not in self._blanks and key not in staying)
        blanks = (key for key in self._blanks if key not in staying)
        many = 2 * len(self._blanks) > self.count
        return next(chain(blanks, pictures) if many else chain(pictures, blanks))


class ReferenceCache:
    """Pages for every picture size that is drawn now, and what looking for them found."""

    def __init__(self, budget_bytes: int = 0) -> None:
        """At most `budget_bytes` for each of `SIZES_KEPT` sizes, or what a single step needs."""
        self.budget_bytes = budget_bytes
        self._sizes: OrderedDict[tuple[int, int], Pages] = OrderedDict()
        self.hits_count = 0  # rows that a step needed and that were here
        self.misses_count = 0
        self.computed_count = 0  # rows in all, those ahead of their step too

    def of(self, size: tuple[int, int]) -> Pages:
        """The pages of a size of latents."""
        pages = self._sizes.setdefault(size, Pages(self.budget_bytes))
        self._sizes.move_to_end(size)
        while len(self._sizes) > SIZES_KEPT:
            self._sizes.popitem(last=False)
        return pages

    def discard(self, keys: Iterable[ReferenceKey]) -> None:
        """Free what nobody will ask for again."""
        for key in keys:
            if key.size in self._sizes:
                self._sizes[key.size].discard([key])

    @property
    def rows_count(self) -> int:
        """Rows that are kept now."""
        return sum(map(len, self._sizes.values()))
