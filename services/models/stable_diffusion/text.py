"""Descriptions to the vectors that Stable Diffusion's UNets attend to, with the published text encoders and tokenizers.

1.x and 2.x read the last layer of one CLIP text model, after its norm (a published 2.x encoder has one layer less than
it was trained with, so that this is the last but one): that is `TextEncoder` with another tokenizer. XL reads the last
layer but one of two models side by side, and the second one's pooled and projected vector, which travels as one more
row. Knows no pack and no UNet.

Shapes: B texts, S positions, D the width of the words' vectors, of XL's both models together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from services.models.lora_formats import TEXT, TEXT_2
from services.models.text_encoder import NO_WORDS, TextChange, TextEncoder, Words


class ClipTokenizer:
    """CLIP's tokenizer as published: `tokenizer.json`, or `vocab.json` with `merges.txt`. No mark comes out of a text.

    That holds for 2.x's padding too, whose mark is "!": diffusers reads an exclamation mark as padding, this reads it
    as the word that the model was trained with.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when the folder holds no tokenizer."""
        has_pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
        if not has_pair and not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder.name} holds neither a tokenizer.json nor a vocab.json with its merges.txt")
        try:
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a malformed file
            raise ValueError(f"{folder.name} is not a CLIP tokenizer: {error}") from None
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        # Without this the library would turn `<|endoftext|>` typed by a user into the mark.
        self._backend.encode_special_tokens = True

    @property
    def bos_id(self) -> int:
        """The mark before a text."""
        return int(self._tokenizer.bos_token_id)

    @property
    def eos_id(self) -> int:
        """The mark after a text."""
        return int(self._tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """What fills the window."""
        return int(self._tokenizer.pad_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, in lower case as CLIP reads it."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Penultimate(nn.Module):
    """A CLIP text model whose answer is its last layer but one, and with a projection one row more: the pooled vector.

    The rest is what `TextEncoder` asks of a model.
    """

    def __init__(self, model: Any, *, eos_id: int, projection: nn.Linear | None = None) -> None:
        """Raises ValueError for a projection that is wider than the model."""
        super().__init__()
        if projection is not None and projection.out_features > model.config.hidden_size:
            raise ValueError(f"the pooled text is {projection.out_features} wide, a word {model.config.hidden_size}")
        self.model, self.projection, self.eos_id = model, projection, eos_id
        self.config = model.config

    def get_input_embeddings(self) -> nn.Module:
        """The words' vectors, for those that are learned."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """`last_hidden_state` is `[B, S, D]`, or `[B, S + 1, D]` with the pooled vector, zeros behind it."""
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states = out.hidden_states[-2]
        if self.projection is not None:
            # Of the first mark: a text is padded with the same one, and learned words have higher ids.
            ends_B = (input_ids == self.eos_id).int().argmax(dim=1)
            pooled = self.projection(out.last_hidden_state[torch.arange(len(ends_B), device=ends_B.device), ends_B])
            row = F.pad(pooled, (0, states.shape[-1] - pooled.shape[-1]))
            states = torch.cat([states, row[:, None]], dim=1)
        return SimpleNamespace(last_hidden_state=states)


class TwoTextEncoders:
    """XL's: the words of both models side by side, and in the last row the second's pooled vector, zeros behind it."""

    def __init__(self, first: TextEncoder, second: TextEncoder, *, nothing_is_zero: bool) -> None:
        """`second`'s model must be `Penultimate` with a projection.

        `nothing_is_zero`: the text "" is no text at all but zeros, as the base model's pipeline wants it.
        """
        self.first, self.second = first, second
        self.nothing_is_zero = nothing_is_zero

    @property
    def tokenizer(self) -> Any:
        """The first one's; the second's differs in its padding."""
        return self.first.tokenizer

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """What a character may change, by the name that its files have for it."""
        return {TEXT: self.first.adapted, TEXT_2: self.second.adapted}

    @property
    def width(self) -> int:
        """D: a learned word has a vector for each of the models, the first one's first."""
        return self.first.width + self.second.width

    @property
    def window(self) -> int:
        """Positions, the begin and end marks included."""
        return min(self.first.window, self.second.window)

    def token_ids(self, texts: Sequence[str], words: Words = NO_WORDS) -> Tensor:
        """The first model's, `[B, S]`. Raises TextTooLong when a text does not fit either of the two."""
        one, two = self._split(words)
        self.second.token_ids(texts, two)
        return self.first.token_ids(texts, one)

    def fitting(self, text: str, words: Words = NO_WORDS) -> str:
        """`text` itself, or as much of its beginning as fits the window."""
        one, two = self._split(words)
        return self.second.fitting(self.first.fitting(text, one), two)

    def encode(self, texts: Sequence[str], words: Words = NO_WORDS, changes: Sequence[TextChange] = ()) -> Tensor:
        """`[B, S + 1, D]`. Raises TextTooLong when a text does not fit."""
        one, two = self._split(words)
        of_second = [TextChange({TEXT: change.factors.get(TEXT_2, {})}, change.scale) for change in changes]
        first_BSD, second_BSD = self.first.encode(texts, one, changes), self.second.encode(texts, two, of_second)
        words_BSD = torch.cat([first_BSD, second_BSD[:, :-1]], dim=-1)
        pooled_B1D = F.pad(second_BSD[:, -1:], (0, first_BSD.shape[-1]))
        out = torch.cat([words_BSD, pooled_B1D], dim=1)
        if self.nothing_is_zero:
            out[torch.tensor([not text for text in texts], device=out.device)] = 0.0
        return out

    def _split(self, words: Words) -> tuple[Words, Words]:
        own = self.first.width
        return {word: v[:, :own] for word, v in words.items()}, {word: v[:, own:] for word, v in words.items()}
