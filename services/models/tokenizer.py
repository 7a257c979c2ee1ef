"""The one tokenizer of a pack: byte-level BPE, shared by text encoder, CLIP and LLaVA.

Every string is encodable, because the 256 bytes are tokens: a new character's name, an emoji
or Arabic text is never `<unk>` (there is no such token). Text given to `encode` is always data:
`<image>` or `<eos>` inside it becomes ordinary bytes, never a special token. Special tokens are
placed by their ids, by code that means them.

Knows nothing of prompts (`services.models.captions.prompts`) or of how it was trained (`training.tokenizer`).

Shapes: B texts, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

FILE_NAME = "tokenizer.json"

PAD, BOS, IMAGE, EOS, USER, ASSISTANT = "<pad>", "<bos>", "<image>", "<eos>", "<user>", "<assistant>"
# Ids are positions here. `<eos>` is not id 2 on purpose: transformers' CLIP treats eos id 2 as a legacy
# checkpoint and pools at the highest token id instead of at `<eos>`.
SPECIAL_TOKENS = (PAD, BOS, IMAGE, EOS, USER, ASSISTANT)
VOCABULARY_SIZE = 2048


@dataclass(frozen=True)
class PaddedTokens:
    """Fixed-length rows for an encoder: `<bos> text <eos> <pad>…`."""

    ids_BN: npt.NDArray[np.int64]
    mask_BN: npt.NDArray[np.bool_]  # True where a token is real, `<bos>` and `<eos>` included
    cut_B: tuple[bool, ...]  # True where the text was too long and lost its end


class StoryTokenizer:
    """Text to token ids and back. Immutable, safe to share between threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        ids = {token: index for token, index in found.items() if index is not None}
        missing = sorted(found.keys() - ids.keys())
        if missing:
            raise ValueError(f"tokenizer lacks the special tokens {missing}")
        # Without this the library would turn `<image>` typed by a user into the special token.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.pad_id: int = ids[PAD]
        self.bos_id: int = ids[BOS]
        self.image_id: int = ids[IMAGE]
        self.eos_id: int = ids[EOS]
        self.user_id: int = ids[USER]
        self.assistant_id: int = ids[ASSISTANT]
        self.special_ids: frozenset[int] = frozenset(ids.values())

    @classmethod
    def load(cls, path: Path) -> StoryTokenizer:
        """Load from a `tokenizer.json`, or from the folder that holds it.

        Raises FileNotFoundError when there is none and ValueError when it is not one of ours.
        """
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except ValueError:
            raise
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a malformed file
            raise ValueError(f"{file} is not a tokenizer: {error}") from None

    @property
    def vocabulary_size(self) -> int:
        """Entries, special tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as data: no special id can come out, whatever `text` holds."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens and ids outside the vocabulary are dropped, broken UTF-8 becomes U+FFFD."""
        size = self.vocabulary_size
        plain = [index for index in ids if index not in self.special_ids and 0 <= index < size]
        text: str = self._tokenizer.decode(plain, skip_special_tokens=False)
        return text

    def pad(self, texts: Sequence[str], length_tokens: int) -> PaddedTokens:
        """Rows `<bos> text <eos> <pad>…` of exactly `length_tokens` (at least 2) for an encoder.

        A text that is too long loses its end, keeps its `<eos>`, and is reported in `cut_B`.
        """
        if length_tokens < 2:
            raise ValueError("length_tokens must be at least 2")
        ids_BN = np.full((len(texts), length_tokens), self.pad_id, dtype=np.int64)
        mask_BN = np.zeros((len(texts), length_tokens), dtype=np.bool_)
        cut: list[bool] = []
        for row, text in enumerate(texts):
            body = self.encode(text)
            kept = [self.bos_id, *body[: length_tokens - 2], self.eos_id]
            ids_BN[row, : len(kept)] = kept
            mask_BN[row, : len(kept)] = True
            cut.append(len(body) > length_tokens - 2)
        return PaddedTokens(ids_BN, mask_BN, tuple(cut))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and the two files transformers reads beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.for_transformers().save_pretrained(str(folder))

    def for_transformers(self) -> Any:
        """The same vocabulary as a `transformers.PreTrainedTokenizerFast`, for vLLM's and LLaVA's processors.

        That class does recognise special tokens in text: give it only text that we wrote.
        """
        from transformers import PreTrainedTokenizerFast

        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        return PreTrainedTokenizerFast(
            tokenizer_object=copy,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
            clean_up_tokenization_spaces=False,
            padding_side="right",
        )
