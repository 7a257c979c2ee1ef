"""The named characters a pack knows, and the name lock: a description may name only who is in the captions.

A small language model that has seen a cast a million times likes to put its favourites everywhere. So whoever describes
a caption forbids the names of the cast that neither caption mentions. A name that is not the cast's own, a user's
"Zora", is never touched. Knows the tokenizer, and neither a model nor a service.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.models.tokenizer import StoryTokenizer

FILE_NAME = "cast.json"


@dataclass(frozen=True)
class Cast:
    """Names, in no particular order. An empty cast locks nothing."""

    names: tuple[str, ...] = ()

    @classmethod
    def load(cls, pack_folder: Path) -> Cast:
        """The cast of a pack folder; empty when the pack names nobody. Raises ValueError when the file is malformed."""
        file = pack_folder / FILE_NAME
        if not file.is_file():
            return cls()
        document = json.loads(file.read_text(encoding="utf-8"))
        names = document.get("names") if isinstance(document, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{file} must hold an object with a list of names")
        return cls(tuple(names))

    def save(self, pack_folder: Path) -> None:
        """Write the cast beside the pack's other files."""
        document = {"names": sorted(self.names)}
        (pack_folder / FILE_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def mentioned(self, text: str) -> frozenset[str]:
        """The names that occur in a text as whole words."""
        return frozenset(name for name in self.names if re.search(rf"\b{re.escape(name)}\b", text))

    def strangers(self, texts: Iterable[str]) -> frozenset[str]:
        """The names that occur in none of the texts; nobody when the texts mention no name at all.

        Captions that only say "she" leave it to the picture who she is.
        """
        known = self.mentioned("\n".join(texts))
        return frozenset(self.names) - known if known else frozenset()

    def faults(self, description: str, previous_caption: str, caption: str) -> int:
        """How many names of a description of `caption` are wrong; 0 is what is wanted.

        Counts whoever of the caption it leaves out, every repetition, and every stranger: a name of several tokens can
        not be forbidden, only found.
        """
        named = self.mentioned(description)
        missing = len(self.mentioned(caption) - named)
        counts = (len(re.findall(rf"\b{re.escape(name)}\b", description)) for name in named)
        return missing + sum(count - 1 for count in counts) + len(named & self.strangers((previous_caption, caption)))


def name_tokens(tokenizer: StoryTokenizer, names: Iterable[str], texts: Iterable[str] = ()) -> tuple[int, ...]:
    """Tokens that are a whole name, with or without the space before it. Names of several tokens have none.

    Tokens that `texts` are made of are left out: "Tom" is how "Tommy" begins, and Tommy may be a user's own.
    """
    forms: list[Sequence[int]] = [tokenizer.encode(form) for name in names for form in (name, f" {name}")]
    told = {index for text in texts for index in (*tokenizer.encode(text), *tokenizer.encode(f" {text}"))}
    return tuple(sorted({ids[0] for ids in forms if len(ids) == 1} - told))
