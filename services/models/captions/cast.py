"""The named characters a pack knows, and the name lock: a description may name only who is in the captions.

A small language model that has seen a cast a million times likes to put its favourites everywhere. So whoever describes
a caption forbids the names of the cast that neither caption mentions, counts what is still wrong with the names
(`Cast.faults`) to choose among several tries, and mends what the best of them leaves (`Cast.repaired`). A name that is
not the cast's own, a user's "Zora", is never touched. Knows the tokenizer, and neither a model nor a service.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

FILE_NAME = "cast.json"
NEARBY = "{} stands nearby."  # says that somebody is there, in the words that descriptions are drawn from
SOMEBODY = "somebody"  # stands for a name that is one too many, where no looks say who is meant

_SENTENCE_END = re.compile(r"[.!?…。！？؟][\"'”’»)]*\s*$")
# The ways of a description to say a name beside its looks: "Mina, a white sheep with", "the white sheep Mina with".
_LOOKS_AFTER = re.compile(r",? (?=(?:an?|the)(?: \w+){2,3}(?:,| (?:with|wearing|in) ))")
_LOOKS_BEFORE = re.compile(r"\b(?<!on )(?<!at )(?<!in )(?:an?|the)(?: \w+){2,3} $", re.IGNORECASE)
_WORN_AFTER = re.compile(r" (?:with|wearing|in) ")


class Encoder(Protocol):
    """A tokenizer, as far as the lock needs one."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as data."""


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

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """A name as a whole word; "Pip-Squeak" and "O'Pip" are words of somebody else's."""
        names = "|".join(re.escape(name) for name in sorted(self.names, key=len, reverse=True)) or r"(?!)"
        return re.compile(rf"(?<!\w)(?<!\w[-'’])(?P<name>{names})(?!\w)(?!-\w)")

    def mentioned(self, text: str) -> frozenset[str]:
        """The names that occur in a text as whole words."""
        return frozenset(self._pattern.findall(text))

    def mentions(self, text: str) -> tuple[str, ...]:
        """Every mention of a name in a text, in order."""
        return tuple(found["name"] for found in self._pattern.finditer(text))

    def first_mentioned(self, text: str) -> str | None:
        """The name that a text mentions first; None when it mentions nobody."""
        found = self._pattern.search(text)
        return found["name"] if found else None

    def strangers(self, texts: Iterable[str]) -> frozenset[str]:
        """The names that occur in none of the texts; nobody when the texts mention no name at all.

        Captions that only say "she" leave it to the picture who she is.
        """
        known = self.mentioned("\n".join(texts))
        return frozenset(self.names) - known if known else frozenset()

    def context(self, earlier_captions: Sequence[str], previous_caption: str, caption: str) -> tuple[str, str]:
        """The texts that say who may be named: all captions so far in one, and the new one.

        "She ran." after "She fell." is about whom the story is about, and not about the model's favourite; and who came
        three captions ago may still stand in the picture.
        """
        return "\n".join((*earlier_captions, previous_caption)), caption

    def faults(self, description: str, previous_caption: str, caption: str) -> int:
        """How many names of a description of `caption` are wrong; 0 is what is wanted.

        Counts whoever of the caption it leaves out, every repetition, and every stranger: a name of several tokens can
        not be forbidden, only found.
        """
        told = self._pattern.findall(description)
        named = frozenset(told)
        missing = len(self.mentioned(caption) - named)
        return missing + len(told) - len(named) + len(named & self.strangers((previous_caption, caption)))

    def repaired(
        self,
        description: str,
        previous_caption: str,
        caption: str,
        fits: Callable[[str], bool] = lambda text: True,
        looks: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """The description with the names mended that `faults` counts; as it is when there is nothing to mend.

        A stranger's name, then a name's second mention, becomes a name of the caption that is missing; a caption that
        names nobody ("She woke.") speaks of whom the previous one names. When nobody is missing, the name goes and its
        looks stay, or `SOMEBODY` takes its place. Whoever of the caption is missing still gets a sentence (`NEARBY`),
        with the looks that `looks` has. A change after which the text no longer `fits` is not made.
        """
        captions = (previous_caption, caption)
        unknown, repeated = self._wrong_mentions(description, captions)
        told = self.mentioned(description)
        wanted = self._pattern.findall(caption) or self._pattern.findall(previous_caption)
        missing = [name for name in dict.fromkeys(wanted) if name not in told]
        # A stranger comes first: that is somebody who is drawn, and needs the name more than one who has it already.
        new_names = {slot.start(): name for slot, name in zip(unknown + repeated, missing, strict=False)}
        text = description
        # From the end, so that the places of the others stay true.
        for slot in sorted(unknown + repeated, key=lambda slot: slot.start(), reverse=True):
            name = new_names.get(slot.start())
            changed = _with_name(text, slot, name) if name else _without_name(text, slot)
            if fits(changed) or not fits(text):
                text = changed
        absent = self.mentioned(caption) - self.mentioned(text)
        for name in (name for name in missing if name in absent):
            ended = text if _SENTENCE_END.search(text) else f"{text}."
            whole = f"{name}, {looks[name]}," if name in looks else name
            for who in dict.fromkeys((whole, name)):
                longer = f"{ended.rstrip()} {NEARBY.format(who)}"
                if fits(longer):
                    text = longer
                    break
        return text

    def _wrong_mentions(
        self, description: str, captions: Sequence[str]
    ) -> tuple[list[re.Match[str]], list[re.Match[str]]]:
        """The first mention of each stranger, and whatever is a mention too many."""
        strangers = self.strangers(captions)
        unknown: list[re.Match[str]] = []
        repeated: list[re.Match[str]] = []
        seen: set[str] = set()
        for mention in self._pattern.finditer(description):
            if self._is_in_a_longer_name(mention, captions):
                continue
            if mention["name"] in seen:
                repeated.append(mention)
            elif mention["name"] in strangers:
                unknown.append(mention)
            seen.add(mention["name"])
        return unknown, repeated

    def _is_in_a_longer_name(self, mention: re.Match[str], captions: Sequence[str]) -> bool:
        """Whether the captions put the same capitalised word beside the name: their "Mary Rose" is not our Rose."""
        before = re.search(r"(\w+) $", mention.string[: mention.start()])
        after = re.match(r" (\w+)", mention.string[mention.end() :])
        pairs = []
        if before and before[1][0].isupper() and before[1] not in self.names:
            pairs.append(f"{before[1]} {mention['name']}")
        if after and after[1][0].isupper() and after[1] not in self.names:
            pairs.append(f"{mention['name']} {after[1]}")
        return any(re.search(rf"\b{re.escape(pair)}\b", told) for pair in pairs for told in captions)


def _with_name(text: str, slot: re.Match[str], name: str) -> str:
    before, after = text[: slot.start()], text[slot.end() :]
    # "Gus' kite" is "Mina's kite"; the mark after a name in quotes is no ending.
    if slot["name"].endswith("s") and re.match(r"['’] \w", after) and not before.endswith(("'", "‘", "’")):
        after = f"{after[0]}s{after[1:]}"
    return before + name + after


def _without_name(text: str, slot: re.Match[str]) -> str:
    before, after = text[: slot.start()], text[slot.end() :]
    starts = not before.strip() or _SENTENCE_END.search(before)
    if looks := _LOOKS_AFTER.match(after):
        after = after[looks.end() :]
    elif _LOOKS_BEFORE.search(before) and _WORN_AFTER.match(after):
        before = before[:-1]
    else:
        return _with_name(text, slot, SOMEBODY.capitalize() if starts else SOMEBODY)
    return before + (after[:1].upper() + after[1:] if starts else after)


def name_tokens(tokenizer: Encoder, names: Iterable[str], texts: Iterable[str] = ()) -> tuple[int, ...]:
    """Tokens that are a whole name, with or without the space before it. Names of several tokens have none.

    Tokens that `texts` are made of are left out: "Tom" is how "Tommy" begins, and Tommy may be a user's own.
    """
    forms: list[Sequence[int]] = [tokenizer.encode(form) for name in names for form in (name, f" {name}")]
    told = {index for text in texts for index in (*tokenizer.encode(text), *tokenizer.encode(f" {text}"))}
    return tuple(sorted({ids[0] for ids in forms if len(ids) == 1} - told))
