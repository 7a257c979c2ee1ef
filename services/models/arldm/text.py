"""Captions as AR-LDM's two encoders read them: token rows with what in them is real, and the tables they index.

CLIP reads the caption of the frame being drawn, BLIP those of earlier frames, each with its own tokenizer and marks.
Published tokenizers have added words (a cast's names) and a window longer than CLIP's 77 positions.
What does not fit the window is an error: the published code pads without cutting and then fails on ragged rows.
Knows no network.

Shapes: B texts, S positions (always the whole window), N rows of a table, D its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from services.models.errors import TextTooLong
from services.models.text_encoder import NO_WORDS, Words, ids_with_words

FILE_NAME = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What stands before, after and behind a text, as the tokenizer spells it."""

    begin: str
    end: str
    pad: str


CLIP_MARKS = Marks(begin="<|startoftext|>", end="<|endoftext|>", pad="<|endoftext|>")
# BLIP's text encoder is told by the first token that there is a picture to look at.
BLIP_MARKS = Marks(begin="[ENC]", end="[SEP]", pad="[PAD]")


@dataclass(frozen=True)
class TokenRows:
    """Token ids `[..., S]` and which of them count. CLIP pads with its end mark, so the ids alone do not say."""

    ids_BS: Tensor
    real_BS: Tensor  # bool; marks included

    def __post_init__(self) -> None:
        """Raises ValueError unless both have the same shape and the second is bool."""
        if self.ids_BS.shape != self.real_BS.shape or self.real_BS.dtype != torch.bool:
            raise ValueError(f"ids are {tuple(self.ids_BS.shape)}, what is real {tuple(self.real_BS.shape)}")

    def to(self, device: torch.device) -> TokenRows:
        """The same on another device."""
        return TokenRows(self.ids_BS.to(device), self.real_BS.to(device))


class CaptionTokenizer:
    """One encoder's tokenizer. Immutable, safe to share between threads.

    Text is data: a mark that a caption spells out is read as ordinary letters.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, marks: Marks) -> None:
        """Raises ValueError naming a mark that the tokenizer does not have."""
        found = {mark: tokenizer.token_to_id(mark) for mark in (marks.begin, marks.end, marks.pad)}
        ids = {mark: index for mark, index in found.items() if index is not None}
        if missing := sorted(found.keys() - ids.keys()):
            raise ValueError(f"tokenizer lacks the marks {', '.join(missing)}")
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.marks = marks
        self.bos_id: int = ids[marks.begin]
        self.eos_id: int = ids[marks.end]
        self.pad_id: int = ids[marks.pad]

    @classmethod
    def load(cls, path: Path, marks: Marks) -> CaptionTokenizer:
        """Load a `tokenizer.json`, or the one in a folder.

        Raises FileNotFoundError when there is none and ValueError when it is none of this encoder's.
        """
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)), marks)
        except ValueError:
            raise
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a malformed file
            raise ValueError(f"{file} is not a tokenizer: {error}") from None

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / FILE_NAME))

    @property
    def vocabulary_size(self) -> int:
        """Rows that a word table needs: one more than the highest id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def with_words(self, words: Sequence[str]) -> CaptionTokenizer:
        """A copy that also knows `words`, each one token behind the vocabulary, in order.

        A word that is a token already keeps its id: of FlintstonesSV's seven names CLIP lacks four and BLIP one. So
        nobody may count on the sum; `vocabulary_size` says what came out.
        """
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.add_tokens([word for word in words if copy.token_to_id(word) is None])
        return CaptionTokenizer(copy, self.marks)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, marks left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def window_for(self, texts: Sequence[str]) -> int:
        """Positions that the longest of `texts` needs, marks included."""
        return 2 + max((len(self.encode(text)) for text in texts), default=0)

    def rows(self, texts: Sequence[str], window: int, words: Words = NO_WORDS, behind: int = 0) -> TokenRows:
        """`[B, S]`: begin, the text, end, padding. Each vector of `words` is a token, from the id `behind` on.

        Raises TextTooLong when a text does not fit `window`.
        """
        ids_BS = torch.full((len(texts), window), self.pad_id, dtype=torch.long)
        real_BS = torch.zeros(len(texts), window, dtype=torch.bool)
        for row, text in enumerate(texts):
            body = ids_with_words(text, words, self.encode, behind)
            if len(body) > window - 2:
                raise TextTooLong(token_count=len(body), limit=window - 2)
            ids = torch.tensor([self.bos_id, *body, self.eos_id])
            ids_BS[row, : len(ids)] = ids
            real_BS[row, : len(ids)] = True
        return TokenRows(ids_BS, real_BS)

    def nothing(self, window: int) -> TokenRows:
        """`[1, S]`: the empty text as guidance knows it. Its padding counts: the published code gives it no mask."""
        ids_BS = self.rows([""], window).ids_BS
        return TokenRows(ids_BS, torch.ones_like(ids_BS, dtype=torch.bool))


def resized_table(table_ND: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """A table of words or positions with `rows` rows: the known ones kept, new ones drawn like them.

    The published code draws new rows with unit variance, some fifty times what CLIP's are; since training goes over
    them, they start here with the mean and the spread of the known rows instead.
    """
    kept = table_ND[:rows]
    fresh = torch.randn(rows - len(kept), table_ND.shape[1], generator=generator)
    known = table_ND.float()
    fresh = known.mean(dim=0) + fresh.to(known.device) * known.std(dim=0, correction=0)
    return torch.cat([kept, fresh.to(table_ND.dtype)])
