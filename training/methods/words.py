"""Words whose meaning is learned: vectors that stand in the text encoder's embedding where a word does.

A word starts as noise, which is textual inversion, or as the phrase that its character is told by: then a name alone
means from the first step on what the network makes of the look, and what is left to learn is what no words say. Knows
no method and no UNet.

Shapes: n vectors of a word, D the text encoder's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from services.models.lora import WORDS
from services.models.text_encoder import TextEncoder, Words
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
    def of_noise(cls, text: TextEncoder, words: Sequence[str], count: int, generator: torch.Generator) -> LearnedWords:
        """`count` vectors each, with the mean and the spread that each of the embedding's numbers has over words."""
        known_VD = _known(text)
        mean_D, spread_D = known_VD.mean(dim=0), known_VD.std(dim=0)
        noise = {word: torch.randn(count, known_VD.shape[1], generator=generator) for word in words}
        return cls({word: mean_D + spread_D * noise_nD.to(known_VD.device) for word, noise_nD in noise.items()})

    @classmethod
    def of_phrases(cls, text: TextEncoder, called: Sequence[Called]) -> LearnedWords:
        """As many vectors as the character's phrase has tokens, and the same."""
        known_VD = _known(text)
        return cls({one.name: known_VD[text.tokenizer.encode(f" {one.phrase}")] for one in called})

    @property
    def words(self) -> Words:
        """For the text encoder, with the vectors' gradient."""
        return {key.removeprefix(_KEY): vectors_nD for key, vectors_nD in self.vectors.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What is learned, as an adapter's file names it."""
        return {f"{WORDS}{word}": vectors_nD for word, vectors_nD in self.words.items()}


def _known(text: TextEncoder) -> Tensor:
    """The embedding of every token, `[V, D]`."""
    known_VD: Tensor = text.model.get_input_embeddings().weight.detach().float()
    return known_VD
