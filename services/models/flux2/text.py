"""Descriptions to the vectors that FLUX.2 Klein reads: a Qwen3 language model with its tokenizer.

A description is asked as a chat's question, and of the model's states three layers are taken, side by side. The window
is always filled, and what fills it counts: the transformer reads it too. Characters teach it no words and change
nothing of it. Knows no pack and no transformer.

Shapes: B texts, S positions, D the width of three layers together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from services.models.errors import TextTooLong
from services.models.text_encoder import NO_WORDS, TextChange, Words

LAYERS = (9, 18, 27)  # numbers of the states that are read, as published; 0 is what enters the first layer
WINDOW = 512  # positions, the chat around the description included
FILES = ("tokenizer.json", "tokenizer_config.json")
_MARK = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}description\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"


class QwenTokenizer:
    """Qwen's tokenizer as published, and the chat around a description. No mark comes out of a description."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when the folder holds none, or one without a chat template."""
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise ValueError(f"{folder.name} has no {missing[0]}")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            chat = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a malformed file
            raise ValueError(f"{folder.name} is not a Qwen tokenizer with a chat: {error}") from None
        if self._tokenizer.pad_token_id is None or chat.count(_MARK) != 1:
            raise ValueError(f"{folder.name} has no padding, or its chat does not hold a question once")
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        before, _, after = chat.partition(_MARK)
        # What stands between a description and the nearest mark is read together with it.
        (before_marks, self._lead), (self._tail, after_marks) = self._to_last_mark(before), self._from_first_mark(after)
        self._before, self._after = self._marked_ids(before_marks), self._marked_ids(after_marks)
        # Without this the library would turn `<|im_end|>` typed by a user into the mark.
        self._backend.encode_special_tokens = True

    @property
    def bos_id(self) -> int:
        """The first token of the chat."""
        return self._before[0] if self._before else self.pad_id

    @property
    def eos_id(self) -> int:
        """The last token of the chat."""
        return self._after[-1] if self._after else self.pad_id

    @property
    def pad_id(self) -> int:
        """What fills the window."""
        return int(self._tokenizer.pad_token_id)

    @property
    def fills_left(self) -> bool:
        """The window is filled before the chat and not behind it."""
        return str(self._tokenizer.padding_side) == "left"

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def chat(self, text: str) -> list[int]:
        """Token ids of the chat that asks for `text`."""
        return [*self._before, *self.encode(self._lead + text + self._tail), *self._after]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _marked_ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _marks(self, text: str) -> list[tuple[int, int]]:
        """Where the marks of a text begin and end."""
        special = {number for number, token in self._backend.get_added_tokens_decoder().items() if token.special}
        read = self._backend.encode(text, add_special_tokens=False)
        return [place for number, place in zip(read.ids, read.offsets, strict=True) if number in special]

    def _to_last_mark(self, text: str) -> tuple[str, str]:
        end = max((end for _, end in self._marks(text)), default=0)
        return text[:end], text[end:]

    def _from_first_mark(self, text: str) -> tuple[str, str]:
        start = min((start for start, _ in self._marks(text)), default=len(text))
        return text[:start], text[start:]


class QwenTexts:
    """`registry.Texts` of one language model."""

    def __init__(self, model: Any, tokenizer: QwenTokenizer) -> None:
        """Raises ValueError for a model that has too few layers or positions."""
        layers, positions = int(model.config.num_hidden_layers), int(model.config.max_position_embeddings)
        if layers < LAYERS[-1] or positions < WINDOW:
            raise ValueError(
                f"the text encoder has {layers} layers and {positions} positions; {LAYERS[-1]} and {WINDOW} are read"
            )
        self.model = model
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> QwenTokenizer:
        """Of the descriptions."""
        return self._tokenizer

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """None: what a character changes is the transformer."""
        return MappingProxyType({})

    @property
    def width(self) -> int:
        """0: it takes no learned words."""
        return 0

    @property
    def window(self) -> int:
        """Positions that each text takes, the chat's own words included."""
        return WINDOW

    @property
    def states_width(self) -> int:
        """D: what the transformer reads."""
        return len(LAYERS) * int(self.model.config.hidden_size)

    def token_ids(self, texts: Sequence[str], words: Words = NO_WORDS) -> Tensor:
        """`[B, S]`. Raises TextTooLong when a text does not fit."""
        _refuse(words)
        return self._rows(texts)[0]

    def fitting(self, text: str, words: Words = NO_WORDS) -> str:
        """`text` itself, or as much of its beginning as fits the window."""
        _refuse(words)
        room = WINDOW - len(self._tokenizer.chat(""))
        kept = self._tokenizer.encode(text)[:room]
        while len(self._tokenizer.chat(text)) > WINDOW:
            # The beginning alone may be split into other, and more, tokens than it was within the whole.
            text, kept = self._tokenizer.decode(kept).rstrip("\ufffd"), kept[:-1]
        return text

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], words: Words = NO_WORDS, changes: Sequence[TextChange] = ()) -> Tensor:
        """`[B, S, D]`, float32. Raises TextTooLong when a text does not fit."""
        _refuse(words, changes)
        ids_BS, real_BS = self._rows(texts)
        device = next(self.model.parameters()).device
        out = self.model(
            input_ids=ids_BS.to(device),
            attention_mask=real_BS.to(device),
            output_hidden_states=True,
            use_cache=False,
        )
        states: Tensor = torch.cat([out.hidden_states[number] for number in LAYERS], dim=-1).float()
        return states

    def _rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids `[B, S]`, and 1 where they are not what fills the window."""
        ids, real = [], []
        for text in texts:
            chat = self._tokenizer.chat(text)
            short = WINDOW - len(chat)
            if short < 0:
                around = len(self._tokenizer.chat(""))
                raise TextTooLong(token_count=len(chat) - around, limit=WINDOW - around)
            filling, told = [self._tokenizer.pad_id] * short, [1] * len(chat)
            left = self._tokenizer.fills_left
            ids.append([*filling, *chat] if left else [*chat, *filling])
            real.append([*[0] * short, *told] if left else [*told, *[0] * short])
        return torch.tensor(ids), torch.tensor(real)


def _refuse(words: Words, changes: Sequence[TextChange] = ()) -> None:
    if words or changes:
        raise TypeError("FLUX.2's text encoder takes neither learned words nor changes")
