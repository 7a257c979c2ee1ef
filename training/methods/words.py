"""Words whose meaning is learned: vectors that stand in the text encoder's embedding where a word does.

Knows no method and no UNet.

Shapes: n vectors of a word, D the text encoder's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from services.models.lora import WORDS
from services.models.text_encoder import TextEncoder, Words

_KEY = "vectors of "  # before each word, so that none is taken for something that the dictionary itself has


class LearnedWords(nn.Module):
    """Starts as noise with the mean and the spread that each of the embedding's numbers has over known words."""

    def __init__(self, text: TextEncoder, words: Sequence[str], count: int, generator: torch.Generator) -> None:
        """`count` vectors for each. Raises ValueError for a word of no vectors, and for one that comes twice."""
        super().__init__()
        if count < 1:
            raise ValueError("a word is at least one vector")
        if len(set(words)) != len(words):
            raise ValueError("two of those who are new have the same name")
        known_VD: Tensor = text.model.get_input_embeddings().weight.detach().float()
        mean_D, spread_D = known_VD.mean(dim=0), known_VD.std(dim=0)
        self.vectors = nn.ParameterDict()
        for word in words:
            noise_nD = torch.randn(count, known_VD.shape[1], generator=generator).to(known_VD.device)
            self.vectors[_KEY + word] = nn.Parameter(mean_D + spread_D * noise_nD)

    @property
    def words(self) -> Words:
        """For the text encoder, with the vectors' gradient."""
        return {key.removeprefix(_KEY): vectors_nD for key, vectors_nD in self.vectors.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What is learned, as an adapter's file names it."""
        return {f"{WORDS}{word}": vectors_nD for word, vectors_nD in self.words.items()}
