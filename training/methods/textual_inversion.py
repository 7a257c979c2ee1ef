"""Textual Inversion (Gal et al.): nothing of the networks changes, a word is learned that means the character.

The word is the character's name, so a description needs no new spelling. It is the smallest artefact, and says no more
than a text can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from services.models.text_encoder import Words
from training.methods.method import (
    TOTAL,
    Batch,
    Ground,
    Parts,
    Rates,
    answer_to,
    file_of,
    reconstruction,
    squared_errors,
)
from training.methods.words import LearnedWords


@dataclass(frozen=True, kw_only=True)
class TextualInversionRecipe:
    """The published rate is 5e-4, for 3,000 steps."""

    vectors: int = 1  # that the name stands for
    rate: float = 5e-4
    existing_weight: float = 1.0  # gives the word no gradient, but tells the same parts as elsewhere
    named_share: float = 1.0  # with its look told beside it, the word would have nothing to learn


class TextualInversion:
    """The method."""

    def __init__(self, ground: Ground, recipe: TextualInversionRecipe) -> None:
        self.ground, self.recipe = ground, recipe
        generator = torch.Generator().manual_seed(ground.seed)
        self.word = LearnedWords.of_noise(ground.tables, ground.names, recipe.vectors, generator)
        self.networks = nn.ModuleDict({"word": self.word})

    @property
    def words(self) -> Words:
        return self.word.words

    def rates(self, name: str) -> Rates:
        return Rates(rate=self.recipe.rate)

    def loss(self, batch: Batch) -> Parts:
        answer = answer_to(self.ground.denoiser, batch)
        errors = squared_errors(self.ground.denoiser, batch, answer)
        parts = reconstruction(errors, batch.kinds_B, self.recipe.existing_weight)
        return {**parts, TOTAL: parts["mse"]}

    def payload(self) -> bytes:
        return file_of(self.word.tensors(), self.ground.base_digest)
