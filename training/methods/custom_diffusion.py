"""Custom Diffusion (Kumari et al.): keys and values of text attention learn a difference, and the name becomes a word.

What text attention makes of a word is where a name turns into a look; the rest of the UNet knows how to draw already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from services.models.text_encoder import Words
from training.methods.changes import TEXT_KEYS_AND_VALUES, WholeChanges
from training.methods.method import (
    STORED,
    TOTAL,
    Batch,
    Ground,
    Parts,
    Rates,
    Stored,
    answer_to,
    file_of,
    reconstruction,
    squared_errors,
)
from training.methods.words import LearnedWords


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionRecipe:
    """The published rate is 1e-5, scaled by the batch to 4e-5 on one device; 250 steps."""

    vectors: int = 1  # that the name stands for
    rate: float = 4e-5
    word_rate: float = 4e-5
    existing_weight: float = 1.0
    named_share: float = 1.0  # of the new frames' descriptions: with the name alone, without the look
    stored: Stored = "float16"


class CustomDiffusion:
    """The method."""

    def __init__(self, ground: Ground, recipe: CustomDiffusionRecipe) -> None:
        self.ground, self.recipe = ground, recipe
        generator = torch.Generator().manual_seed(ground.seed)
        self.change = WholeChanges(ground.unet, TEXT_KEYS_AND_VALUES)
        self.word = LearnedWords.of_noise(ground.tables, ground.names, recipe.vectors, generator)
        self.networks = nn.ModuleDict({"change": self.change, "word": self.word})

    @property
    def words(self) -> Words:
        return self.word.words

    def rates(self, name: str) -> Rates:
        return Rates(rate=self.recipe.word_rate if name.startswith("word.") else self.recipe.rate)

    def loss(self, batch: Batch) -> Parts:
        answer = answer_to(self.ground.denoiser, batch)
        errors = squared_errors(self.ground.denoiser, batch, answer)
        parts = reconstruction(errors, batch.kinds_B, self.recipe.existing_weight)
        return {**parts, TOTAL: parts["mse"]}

    def payload(self) -> bytes:
        dtype = STORED[self.recipe.stored]
        deltas = {f"{name}.delta": delta.to(dtype) for name, delta in self.change.deltas().items()}
        return file_of({**deltas, **self.word.tensors()}, self.ground.base_digest)
