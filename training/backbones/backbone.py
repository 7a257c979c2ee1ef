"""What a lesson needs of the family of packs that is taught: encoded frames, rows, what is hidden, words.

    shelf = backbone.shelf(frames)                # what frozen encoders say, once
    example = backbone.example(rows, words)       # rows of a step, complete
    example = backbone.hidden(example, rows, recipe, generator)

Whatever the family, a row is an `Example` that its UNet answers, and a learned word is vectors as wide as the pack's
text encoders take them. Knows no batch, method or loop.

Shapes: F frames, B rows, V vocabulary, D width of a table; latents `[.., C, h, w]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from services.models.denoiser import Example
from services.models.text_encoder import NO_WORDS, Words
from services.models.vae import Codec
from training.lesson_recipe import LessonRecipe
from training.new_story import Called, SeenFrame

TOGETHER = 16  # pictures or texts encoded at a time


class Table(NamedTuple):
    """The words that one text encoder knows: their vectors, and which of them a text is made of."""

    known_VD: Tensor
    encode: Callable[[str], list[int]]


@dataclass(frozen=True)
class Shelf:
    """Frames one behind the other, encoded. Each backbone has its own kind, with what it needs besides."""

    frames: tuple[SeenFrame, ...]
    latents_FCHW: Tensor
    learns_words: bool  # texts may hold words that are learned, which are encoded anew each time


class Told(NamedTuple):
    """A frame of a shelf, and the chance from 0 to 1 that chooses its wording."""

    frame: int
    chance: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A frame that is to be drawn, and the ones just before it that it sees, oldest first."""

    shelf: Shelf
    drawn: Told
    earlier: tuple[Told, ...]
    named: bool  # the new character is told by name alone


class Backbone(Protocol):
    """A family of packs that can be taught."""

    @property
    def given_frames(self) -> int:
        """How many frames of a story are given and never drawn: it goes on from them."""
        ...

    @property
    def tables(self) -> tuple[Table, ...]:
        """What learned words stand beside. A word is as wide as all of them together, in this order."""
        ...

    def slots(self, recipe: LessonRecipe, chance: float) -> int:
        """How many earlier frames the rows of a step see at most; `chance` is from 0 to 1."""
        ...

    def shelf(
        self, frames: Sequence[SeenFrame], words: Words = NO_WORDS, called: Sequence[Called] | None = None
    ) -> Shelf:
        """`words` may stand in the texts; `called` is how each frame's new character is called, None where is none.

        Raises TextTooLong when a text does not fit.
        """
        ...

    def example(self, rows: Sequence[Row], slots: int, words: Words) -> Example:
        """Rows with all that they see, nothing hidden. `words` have their gradient where the family gives one."""
        ...

    def hidden(
        self, example: Example, rows: Sequence[Row], recipe: LessonRecipe, generator: torch.Generator
    ) -> Example:
        """The same rows, some without what guidance will steer away from."""
        ...


def wordings(frames: Sequence[SeenFrame], called: Sequence[Called] | None) -> tuple[list[list[str]], list[list[str]]]:
    """Each frame's descriptions, as many of each, and the same with the new character by name alone."""
    most = max(len(frame.descriptions) for frame in frames)
    told = [[frame.descriptions[number % len(frame.descriptions)] for number in range(most)] for frame in frames]
    if called is None:
        return told, told
    return told, [[who.by_name(text) for text in texts] for who, texts in zip(called, told, strict=True)]


def chosen(chance: float, count: int) -> int:
    """Which of so many things a chance from 0 to 1 means."""
    return min(int(chance * count), count - 1)


def pixels_of(frames: Sequence[SeenFrame], device: torch.device) -> list[Tensor]:
    """Pictures in 0..1, `[up to TOGETHER, 3, H, W]` each."""
    pixels = torch.from_numpy(np.stack([frame.pixels for frame in frames])).permute(0, 3, 1, 2).float() / 255.0
    return [part.to(device) for part in torch.split(pixels, TOGETHER)]


@torch.no_grad()
def latents_of(codec: Codec, parts: Sequence[Tensor]) -> Tensor:
    """`[F, C, h, w]`, what the autoencoder makes of pictures."""
    return torch.cat([codec.encode(part) for part in parts]).float()
