"""Descriptions to the vectors the UNet attends to: a CLIP text model with its tokenizer.

What does not fit the window is an error, never silently cut: half a description draws the wrong picture without anybody
noticing. Who can do with a part asks for it (`fitting`). What a character changes of the model holds for one call, and
the model is the same afterwards. Knows no pack and no UNet.

Shapes: S positions (always the whole window, padded, as Stable Diffusion does), D the model's width, r rank, I inputs,
O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from services.models.errors import TextTooLong
from services.models.lora_formats import TEXT, LowRank
from services.models.shape import config_values

Words = Mapping[str, Tensor]
"""Words that a character taught: `[n, D]` vectors each, which stand where the word does (textual inversion)."""
NO_WORDS: Words = MappingProxyType({})


class TextChange(NamedTuple):
    """What a character changes of the text encoders' layers, by encoder and layer, and how strongly."""

    factors: Mapping[str, Mapping[str, LowRank]]
    scale: float = 1.0


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

    def __init__(
        self,
        model: CLIPTextModel,
        tokenizer: Tokenizer,
        *,
        bidirectional: bool = False,
        adapted: nn.Module | None = None,
    ) -> None:
        """`adapted` is the part of `model` that has the published names, which characters change; None: all of it."""
        self.model = model
        self.adapted: nn.Module = model if adapted is None else adapted
        self.tokenizer = tokenizer
        self.bidirectional = bidirectional

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """What a character may change, by the name that its files have for it."""
        return {TEXT: self.adapted}

    @property
    def width(self) -> int:
        """D of its words: what a learned one must have."""
        return int(self.model.config.hidden_size)

    @property
    def window(self) -> int:
        """Positions, the begin and end marks included."""
        return int(self.model.config.max_position_embeddings)

    def token_ids(self, texts: Sequence[str], words: Words = NO_WORDS) -> Tensor:
        """`[B, S]`: begin, the text, end, padding. Of `words` each vector is a token behind those of the vocabulary.

        Raises TextTooLong when a text does not fit.
        """
        rows = []
        for text in texts:
            ids = self._ids(text, words)
            room = self.window - 2
            if len(ids) > room:
                raise TextTooLong(token_count=len(ids), limit=room)
            padding = [self.tokenizer.pad_id] * (room - len(ids))
            rows.append([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id, *padding])
        return torch.tensor(rows, dtype=torch.long)

    def _ids(self, text: str, words: Words) -> list[int]:
        return ids_with_words(text, words, self.tokenizer.encode, int(self.model.config.vocab_size))

    def fitting(self, text: str, words: Words = NO_WORDS) -> str:
        """`text` itself, or as much of its beginning as fits the window."""
        room = limit = self.window - 2
        if words:  # their vectors have no text to be cut within, so whole words go
            parts = text.split(" ")[:limit]
            while parts and len(self._ids(" ".join(parts), words)) > limit:
                parts.pop()
            return " ".join(parts)
        ids = self.tokenizer.encode(text)
        while len(ids) > limit:
            # The beginning alone may be split into other, and more, tokens than it was within the whole.
            text = self.tokenizer.decode(ids[:room]).rstrip("\ufffd")
            ids, room = self.tokenizer.encode(text), room - 1
        return text

    def encode(self, texts: Sequence[str], words: Words = NO_WORDS, changes: Sequence[TextChange] = ()) -> Tensor:
        """`[B, S, D]`, the last layer's states after its norm. `changes` count for this call alone.

        Raises TextTooLong when a text does not fit.
        """
        return self.states(self.token_ids(texts, words), words, changes)

    def states(self, ids_BS: Tensor, words: Words = NO_WORDS, changes: Sequence[TextChange] = ()) -> Tensor:
        """The same for token ids, with gradients where they are on (training).

        Not thread-safe with `words` or `changes`: meanwhile the model is another one for everybody.
        """
        weight = next(self.model.parameters())
        ids_BS = ids_BS.to(weight.device)
        mask_B11S: Tensor | None = None  # transformers then masks what comes after
        if self.bidirectional:
            hidden_BS = ids_BS == self.tokenizer.pad_id
            mask_B11S = torch.zeros(ids_BS.shape, dtype=weight.dtype, device=weight.device)
            mask_B11S = mask_B11S.masked_fill(hidden_BS, torch.finfo(weight.dtype).min)[:, None, None]
        with learned_words(self.model, words) if words else nullcontext(), _changed(self.adapted, changes):
            states: Tensor = self.model(input_ids=ids_BS, attention_mask=mask_B11S).last_hidden_state
        return states


def ids_with_words(text: str, words: Words, encode: Callable[[str], list[int]], behind: int) -> list[int]:
    """Token ids of a text in which each vector of `words` is a token from `behind` on; `encode` has all others."""
    if not words:
        return encode(text)
    places = {}
    for word, vectors in words.items():
        places[word] = list(range(behind, behind + len(vectors)))
        behind += len(vectors)
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    ids: list[int] = []
    # A word stands alone: "Zoe" is not in "Zoey". The space before it goes with it, as with any other word.
    for piece in re.split(rf"(?: |(?<!\w))({longest_first})(?!\w)", text):
        ids += places[piece] if piece in places else encode(piece)
    return ids


@contextmanager
def learned_words(model: nn.Module, words: Words) -> Iterator[None]:
    """Within, ids behind the vocabulary are the vectors of `words`, in order. (The model takes no embeddings.)"""
    any_model: Any = model
    embedding: Any = any_model.get_input_embeddings()
    vectors = torch.cat(list(words.values())).to(embedding.weight)
    known = embedding.num_embeddings
    asked: list[Tensor] = []

    def before(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        asked.append(given[0])
        return (given[0].clamp_max(known - 1), *given[1:])

    def after(_: Any, __: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        ids = asked.pop()
        own = vectors[(ids - known).clamp_min(0)]
        return torch.where((ids >= known)[..., None], own, answer)

    hooks = (embedding.register_forward_pre_hook(before), embedding.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _changed(model: nn.Module, changes: Sequence[TextChange]) -> Iterator[None]:
    """Within, each layer adds what `changes` say, rank beside rank. The weights are not touched."""
    lows: dict[str, list[tuple[LowRank, float]]] = {}
    for change in changes:
        for name, low in change.factors.get(TEXT, {}).items():
            if change.scale != 0.0:
                lows.setdefault(name, []).append((low, change.scale))
    with ExitStack() as hooks:
        for name, own in lows.items():
            layer: Any = model.get_submodule(name)
            down_rI = torch.cat([low.down for low, _ in own]).to(layer.weight)
            up_Or = torch.cat([low.scaled_up * scale for low, scale in own], dim=1).to(layer.weight)
            hooks.enter_context(layer.register_forward_hook(_Added(down_rI, up_Or)))
        yield


class _Added:
    """What torch calls after a layer that is changed."""

    def __init__(self, down_rI: Tensor, up_Or: Tensor) -> None:
        self._down_rI, self._up_Or = down_rI, up_Or

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        return answer + F.linear(F.linear(given[0], self._down_rI), self._up_Or)
