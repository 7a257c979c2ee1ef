"""LoRA: low-rank changes of attention, to earlier frames too, and of the feed-forward; the text encoder stays.

The cheapest way that is worth something on a small pack: drawn together with everybody else's characters in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from services.models.lora import Adapter, write_adapter
from services.models.text_encoder import NO_WORDS, Words
from training.methods.changes import EVERY_ATTENTION, LowRankChanges
from training.methods.method import (
    STORED,
    TOTAL,
    Batch,
    Ground,
    Parts,
    Rates,
    Stored,
    answer_to,
    reconstruction,
    squared_errors,
)
from training.methods.words import LearnedWords


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """The published numbers are those of DreamBooth's LoRA: rank 4, rate 1e-4."""

    rank: int = 4
    layers: str = EVERY_ATTENTION
    rate: float = 1e-4
    existing_weight: float = 1.0
    named_share: float = 0.0  # of the new frames' descriptions: with the name alone, without the look
    word_rate: float = 0.0  # above 0 the name becomes a word, which starts as the phrase and learns this fast
    stored: Stored = "float16"


class Lora:
    """The method."""

    def __init__(self, ground: Ground, recipe: LoraRecipe) -> None:
        self.ground, self.recipe = ground, recipe
        generator = torch.Generator().manual_seed(ground.seed)
        self.change = LowRankChanges(ground.unet, recipe.layers, recipe.rank, generator)
        self.word = LearnedWords.of_phrases(ground.tables, ground.called) if recipe.word_rate > 0.0 else None
        self.networks = nn.ModuleDict({"change": self.change, **({} if self.word is None else {"word": self.word})})

    @property
    def words(self) -> Words:
        return NO_WORDS if self.word is None else self.word.words

    def rates(self, name: str) -> Rates:
        return Rates(rate=self.recipe.word_rate if name.startswith("word.") else self.recipe.rate)

    def loss(self, batch: Batch) -> Parts:
        answer = answer_to(self.ground.denoiser, batch)
        errors = squared_errors(self.ground.denoiser, batch, answer)
        parts = reconstruction(errors, batch.kinds_B, self.recipe.existing_weight)
        return {**parts, TOTAL: parts["mse"]}

    def payload(self) -> bytes:
        return low_rank_file(self.change, self.ground.base_digest, self.recipe.stored, self.words)


def low_rank_file(change: LowRankChanges, base_digest: str, stored: Stored, words: Words = NO_WORDS) -> bytes:
    """What low-rank changes have learned, in PEFT's layout; with words in kohya's, the only one that has both."""
    kept = {word: vectors_nD.detach().cpu() for word, vectors_nD in words.items()}
    adapter = Adapter(digest="", factors=change.factors(), deltas={}, words=kept, size_bytes=0)
    return write_adapter(adapter, "kohya" if kept else "peft", base_digest=base_digest, dtype=STORED[stored])
