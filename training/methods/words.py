"""Words whose meaning is learned: vectors that stand in the text encoder's embedding where a word does.

A word starts as noise, which is textual inversion, or as the phrase that its character is told by: then a name alone
means from the first step on what the network makes of the look, and what is left to learn is what no words say. Knows
no method and no UNet.

Where a family has two encoders, a word's vectors are as wide as both: first the one's part, then the other's.

Shapes: n vectors of a word, D the text encoders' widths together, V an encoder's vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.lora import WORDS
from services.models.text_encoder import Words
from training.backbones.backbone import Table
from training.new_story import Called

_KEY = "vectors of "  # before each word, so that none is taken for something that the dictionary itself has


class LearnedWords(nn.Module):
    """Vectors by word."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        """`[n, D]` for each word. Raises ValueError for a word of no vectors."""
        super().__init__()
        if not start or any(len(vectors_nD) < 1 for vectors_nD in start.values()):
            raise ValueError("a word is at least one vector")
        self.vectors = nn.ParameterDict({_KEY + word: nn.Parameter(start[word].clone()) for word in start})

    @classmethod
    def of_noise(
        cls, tables: Sequence[Table], words: Sequence[str], count: int, generator: torch.Generator
    ) -> LearnedWords:
        """`count` vectors each, with the mean and the spread that each of the embedding's numbers has over words."""
        mean_D = torch.cat([table.known_VD.mean(dim=0) for table in tables])
        spread_D = torch.cat([table.known_VD.std(dim=0) for table in tables])
        noise = {word: torch.randn(count, len(mean_D), generator=generator) for word in words}
        return cls({word: mean_D + spread_D * noise_nD.to(mean_D.device) for word, noise_nD in noise.items()})

    @classmethod
    def of_phrases(cls, tables: Sequence[Table], called: Sequence[Called]) -> LearnedWords:
        """As many vectors as the character's phrase has tokens, and the same.

        Of an encoder in which it has fewer than in the other the rest is zero, which is no token and stays none.
        """

        def told(phrase: str) -> Tensor:
            parts = [table.known_VD[table.encode(f" {phrase}")] for table in tables]
            most = max(map(len, parts))
            return torch.cat([F.pad(part_nD, (0, 0, 0, most - len(part_nD))) for part_nD in parts], dim=1)

        return cls({one.name: told(one.phrase) for one in called})

    @property
    def words(self) -> Words:
        """For the text encoder, with the vectors' gradient."""
        return {key.removeprefix(_KEY): vectors_nD for key, vectors_nD in self.vectors.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What is learned, as an adapter's file names it."""
        return {f"{WORDS}{word}": vectors_nD for word, vectors_nD in self.words.items()}
