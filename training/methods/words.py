"""A word whose meaning is learned: vectors that stand in the text encoder's embedding where the word does.

Knows no method and no UNet.

Shapes: n vectors of a word, D the text encoder's width, V its vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.models.text_encoder import TextEncoder, Words


class LearnedWord(nn.Module):
    """One word. Starts as noise with the mean and the spread that each of the embedding's numbers has over words."""

    def __init__(self, text: TextEncoder, word: str, count: int, generator: torch.Generator) -> None:
        """Raises ValueError for a word of no vectors."""
        super().__init__()
        if count < 1:
            raise ValueError("a word is at least one vector")
        self.word = word
        known_VD: Tensor = text.model.get_input_embeddings().weight.detach().float()
        noise_nD = torch.randn(count, known_VD.shape[1], generator=generator).to(known_VD.device)
        self.vectors_nD = nn.Parameter(known_VD.mean(dim=0) + known_VD.std(dim=0) * noise_nD)

    @property
    def words(self) -> Words:
        """For the text encoder, with the vectors' gradient."""
        return {self.word: self.vectors_nD}
