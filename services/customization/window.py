"""How much text the encoders of a pack take, counted as training counts it: a job must not wait, and then be refused.

Training reads a description with the pack's own tokenizers and cuts nothing off. Where a method learns the character's
name as a word, the name is as many tokens as the word has vectors. How many those are is training's own business, which
no service imports; `test_window.py` holds the two together. Knows no network: the toon pack's tokenizer needs no torch,
published ones and AR-LDM's do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.models.tokenizer import StoryTokenizer

_MARKS = 2  # before and behind every text
# By architecture and method: the vectors of the word that the name becomes, or as many as the phrase has tokens. What
# is not here learns no word.
_VECTORS: Mapping[str, Mapping[str, int | Literal["phrase"]]] = {
    "arldm": {"custom-diffusion": 1, "textual-inversion": 1},
    "storygen": {"custom-diffusion": 2, "epicevo": "phrase", "lora": "phrase", "textual-inversion": 4},
}


@dataclass(frozen=True)
class Reader:
    """One text encoder of a pack."""

    encode: Callable[[str], list[int]]
    room: int  # tokens of a text, without the marks


@dataclass(frozen=True)
class Overlong:
    """A text that does not fit."""

    token_count: int
    limit: int


@dataclass(frozen=True, kw_only=True)
class Window:
    """What one job's descriptions have to fit into."""

    readers: tuple[Reader, ...]  # each reads every description
    word: str = ""  # that is learned; empty: none is
    vectors: int = 0  # of the word

    def overlong(self, text: str) -> Overlong | None:
        """None for a text that fits; else what the encoder that it fits least makes of it."""
        read = [Overlong(self._count(text, reader), reader.room) for reader in self.readers]
        worst = max(read, key=lambda one: one.token_count - one.limit)
        return worst if worst.token_count > worst.limit else None

    def _count(self, text: str, reader: Reader) -> int:
        """Tokens, as `services.models.text_encoder.ids_with_words` has them, which needs torch."""
        if not self.vectors or not self.word:
            return len(reader.encode(text))
        pieces = re.split(rf"(?: |(?<!\w)){re.escape(self.word)}(?!\w)", text)
        return sum(len(reader.encode(piece)) for piece in pieces) + self.vectors * (len(pieces) - 1)


def window_of(folder: Path, architecture: str, *, method: str, learns: str, name: str, phrase: str) -> Window:
    """The window of a job on the pack in `folder`; `name` and `phrase` are the new character's.

    Raises OSError or ValueError for a pack whose tokenizers or configurations cannot be read.
    """
    readers = _LOADERS[architecture](folder)
    learned = 0 if learns == "unet" else _VECTORS[architecture].get(method, 0)  # a whole UNet's file has no word
    as_phrase = max(len(reader.encode(f" {phrase}")) for reader in readers)
    vectors = learned if isinstance(learned, int) else as_phrase
    return Window(readers=readers, word=name, vectors=vectors)


def _storygen(folder: Path) -> tuple[Reader, ...]:
    """A pack of ours, or the published checkpoint."""
    shape = _shape(folder)
    if "hidden_size" in shape:  # in its library's words, as `is_published_storygen` knows it
        from services.models.stable_diffusion.text import ClipTokenizer

        return (Reader(ClipTokenizer(folder / "tokenizer").encode, _room(shape, "max_position_embeddings")),)
    return (Reader(StoryTokenizer.load(folder / "tokenizer").encode, _room(shape, "positions")),)


def _arldm(folder: Path) -> tuple[Reader, ...]:
    """CLIP reads the frame that is drawn, BLIP what was before it; both have CLIP's window."""
    from services.models.arldm.checkpoint import BLIP_TOKENIZER, CLIP_TOKENIZER
    from services.models.arldm.text import BLIP_MARKS, CLIP_MARKS, CaptionTokenizer

    room = _room(_shape(folder), "positions")
    clip = CaptionTokenizer.load(folder / CLIP_TOKENIZER, CLIP_MARKS)
    blip = CaptionTokenizer.load(folder / BLIP_TOKENIZER, BLIP_MARKS)
    return Reader(clip.encode, room), Reader(blip.encode, room)


_LOADERS: Mapping[str, Callable[[Path], tuple[Reader, ...]]] = {"arldm": _arldm, "storygen": _storygen}


def _shape(folder: Path) -> Mapping[str, Any]:
    document = json.loads((folder / "text_encoder" / "config.json").read_bytes())
    if not isinstance(document, dict):
        raise ValueError("text_encoder/config.json is no object")
    return document


def _room(shape: Mapping[str, Any], key: str) -> int:
    positions = shape.get(key)
    if not isinstance(positions, int):
        raise ValueError(f"text_encoder/config.json has no number {key}")
    return positions - _MARKS
