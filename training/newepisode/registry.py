"""Who is new: an id, the names and mentions they go by, and the phrase by which a caption should tell them.

A *name* means the character wherever it stands as a word ("Tutu"). A *mention* may mean them and may not ("the alien"):
it finds clips to look at, and decides nothing (`relabelling`). Registries are JSON files, checked when they are read;
those in `registries/` hold whom the paper names, which is fewer than it tests on; their phrases are written without the
pictures at hand, to be checked by whoever has them.

    {"characters": [{"id": "rockzilla", "names": ["Rockzilla"], "mentions": ["monster"],
                     "phrase": "a lizard-like creature", "noun": "creature"}, …]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.newepisode.records import Clip, Corpus, DataInvalid

SHIPPED = Path(__file__).with_name("registries")
_KEYS = {"id", "names", "mentions", "phrase", "noun"}
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class NewCharacter:
    """Raises DataInvalid for an id that is none, for nobody's names, and for a text of nothing."""

    id: str
    names: tuple[str, ...]
    mentions: tuple[str, ...] = ()
    phrase: str
    noun: str

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise DataInvalid(f"{self.id!r} is no id of a character: lower-case letters, digits and hyphens")
        if not self.names and not self.mentions:
            raise DataInvalid(f"{self.id} has neither names nor mentions")
        if any(not text.strip() for text in (*self.names, *self.mentions, self.phrase, self.noun)):
            raise DataInvalid(f"{self.id} has a text of nothing")

    def is_named_in(self, caption: str) -> bool:
        """Whether a name of theirs stands in a caption, as a word, in whatever case."""
        return bool(self.names) and bool(_words(self.names).search(caption))

    def is_perhaps_in(self, caption: str) -> bool:
        """Whether a mention stands there that may mean them, and no name."""
        return bool(self.mentions) and not self.is_named_in(caption) and bool(_words(self.mentions).search(caption))

    def is_meant_by(self, label: str) -> bool:
        """Whether they are who a data set's label says is there; who has no name can be labelled by a mention alone."""
        return self.is_named_in(label) or (not self.names and self.is_perhaps_in(label))

    def told_by_phrase(self, caption: str) -> str:
        """The caption with the phrase in place of every name; of the first mention where there is no name.

        Their article goes with them ("the alien" becomes "a small green alien", not "the a small …").
        """
        if self.is_named_in(caption):
            return _words(self.names, with_article=True).sub(lambda found: self._cased(found[0]), caption)
        if self.is_perhaps_in(caption):
            return _words(self.mentions, with_article=True).sub(lambda found: self._cased(found[0]), caption, count=1)
        return caption

    def _cased(self, replaced: str) -> str:
        """The phrase, with a capital where an article or sentence began with one."""
        starts = replaced[:1].isupper() and re.match(r"(?:an?|the)\b", replaced, re.IGNORECASE) is not None
        return self.phrase[:1].upper() + self.phrase[1:] if starts else self.phrase


def _words(texts: Sequence[str], *, with_article: bool = False) -> re.Pattern[str]:
    """Any of the texts as whole words, the longest first."""
    found = "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text)))
    article = r"(?:\b(?:an?|the)\s+)?" if with_article else ""
    return re.compile(rf"{article}(?<!\w)(?:{found})(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Registry:
    """Everybody who is new in a data set. Raises DataInvalid when two share an id, a name or a phrase."""

    characters: tuple[NewCharacter, ...]

    def __post_init__(self) -> None:
        if not self.characters:
            raise DataInvalid("a registry has at least one new character")
        for what, values in (
            ("id", [one.id for one in self.characters]),
            ("name", [name.lower() for one in self.characters for name in one.names]),
            ("phrase", [one.phrase.lower() for one in self.characters]),
        ):
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise DataInvalid(f"two new characters have the {what} {twice!r}")

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(one.id for one in self.characters)

    def of(self, character: str) -> NewCharacter:
        """Raises DataInvalid for somebody who is not in it."""
        for one in self.characters:
            if one.id == character:
                return one
        raise DataInvalid(f"{character!r} is not in the registry: {', '.join(sorted(self.ids))}")

    @classmethod
    def read(cls, path: Path) -> Registry:
        """Raises DataInvalid naming the file and the entry."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataInvalid(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise DataInvalid(f"{path} is no JSON: {str(error)[:80]}") from None
        if not isinstance(document, dict) or set(document) != {"characters"}:
            raise DataInvalid(f"{path} is not an object of `characters` alone")
        if not isinstance(document["characters"], list):
            raise DataInvalid(f"{path}: characters is not a list")
        return cls(tuple(_character(one, f"{path}, character {n}") for n, one in enumerate(document["characters"], 1)))


def _character(entry: Any, where: str) -> NewCharacter:
    if not isinstance(entry, dict) or not {"id", "phrase", "noun"} <= set(entry) <= _KEYS:
        raise DataInvalid(f"{where} has not exactly the keys {', '.join(sorted(_KEYS))}")
    for key in ("id", "phrase", "noun"):
        if not isinstance(entry[key], str):
            raise DataInvalid(f"{where}: {key} is no text")
    lists = {key: entry.get(key, []) for key in ("names", "mentions")}
    for key, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise DataInvalid(f"{where}: {key} is no list of texts")
    return NewCharacter(
        id=entry["id"],
        names=tuple(lists["names"]),
        mentions=tuple(lists["mentions"]),
        phrase=entry["phrase"],
        noun=entry["noun"],
    )


def found_by_name(corpus: Corpus, registry: Registry) -> Corpus:
    """The corpus with every clip marked that names somebody new: PororoSV's rule, and where others begin.

    In its caption, or among those whom the data set itself says are there (FlintstonesSV): a caption may call them "a
    lady". Who is new is then no longer counted as one of the known.
    """
    changed: list[Clip] = []
    for clip in corpus.clips.values():
        labelled = {(label, one.id) for label in clip.known for one in registry.characters if one.is_meant_by(label)}
        named = {one.id for one in registry.characters if one.is_named_in(clip.caption)} | {one for _, one in labelled}
        told = replace(clip, new=clip.new | named, known=clip.known - {label for label, _ in labelled})
        if told != clip:
            changed.append(told)
    return corpus.with_clips(changed)
