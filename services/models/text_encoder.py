"""Descriptions to the vectors the UNet attends to: a CLIP text model with its tokenizer.

What does not fit the window is an error, never silently cut: half a description draws the wrong picture without anybody
noticing. Who can do with a part asks for it (`fitting`). Knows no pack and no UNet.

Shapes: S positions (always the whole window, padded, as Stable Diffusion does), D the model's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from services.models.errors import TextTooLong
from services.models.shape import config_values


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The shape of a CLIP text model."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    positions: int  # begin and end marks included
    # Whether a word sees what comes after it. CLIP's do not; but "Pip runs on the left" says last where Pip is.
    bidirectional: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextShape:
        """Read a `config.json`. Raises ValueError naming a key that is unknown or missing."""
        return cls(**config_values(cls, values, "text encoder"))

    def to_dict(self) -> dict[str, Any]:
        """The same, for `config.json`."""
        return asdict(self)


class Tokenizer(Protocol):
    """What a text encoder needs of a tokenizer."""

    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone, with no mark among them whatever it says."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; a character cut in two becomes U+FFFD."""


def build_text_encoder(shape: TextShape, *, bos_id: int, eos_id: int, pad_id: int) -> CLIPTextModel:
    """A CLIP text model with fresh weights from torch's global generator, in eval mode."""
    config = CLIPTextConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        projection_dim=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.positions,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    model: Any = CLIPTextModel(config)
    model.eval()
    return model


class TextEncoder:
    """A text model and the tokenizer it was trained with. `bidirectional` as in the model's `TextShape`."""

    def __init__(self, model: CLIPTextModel, tokenizer: Tokenizer, *, bidirectional: bool = False) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.bidirectional = bidirectional

    @property
    def window(self) -> int:
        """Positions, the begin and end marks included."""
        return int(self.model.config.max_position_embeddings)

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """`[B, S]`: begin, the text, end, padding.

        Raises TextTooLong when a text does not fit.
        """
        rows = []
        for text in texts:
            ids = self.tokenizer.encode(text)
            room = self.window - 2
            if len(ids) > room:
                raise TextTooLong(token_count=len(ids), limit=room)
            padding = [self.tokenizer.pad_id] * (room - len(ids))
            rows.append([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id, *padding])
        return torch.tensor(rows, dtype=torch.long)

    def fitting(self, text: str) -> str:
        """`text` itself, or as much of its beginning as fits the window."""
        ids, room = self.tokenizer.encode(text), self.window - 2
        while len(ids) > room:
            # The beginning alone may be split into other, and more, tokens than it was within the whole.
            text = self.tokenizer.decode(ids[:room]).rstrip("\ufffd")
            ids, room = self.tokenizer.encode(text), room - 1
        return text

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`[B, S, D]`, the last layer's states after its norm.

        Raises TextTooLong when a text does not fit.
        """
        return self.states(self.token_ids(texts))

    def states(self, ids_BS: Tensor) -> Tensor:
        """The same for token ids, with gradients where they are on (training)."""
        weight = next(self.model.parameters())
        ids_BS = ids_BS.to(weight.device)
        mask_B11S: Tensor | None = None  # transformers then masks what comes after
        if self.bidirectional:
            hidden_BS = ids_BS == self.tokenizer.pad_id
            mask_B11S = torch.zeros(ids_BS.shape, dtype=weight.dtype, device=weight.device)
            mask_B11S = mask_B11S.masked_fill(hidden_BS, torch.finfo(weight.dtype).min)[:, None, None]
        states: Tensor = self.model(input_ids=ids_BS, attention_mask=mask_B11S).last_hidden_state
        return states
