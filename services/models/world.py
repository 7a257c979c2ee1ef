"""What a pack knows of the world, and what it says, gently, of what it was given beyond that.

A pack draws what it was trained on. Whoever gives it a spaceship, or an astronaut called Zed, shall still get a story,
and be told what to expect: an `Unfamiliar` has a stable reason and a sentence or two that name what is unknown and what
is known instead. A pack without `world.json` knows nothing of itself and never warns. Pure but for loading and saving;
knows no model, no tokenizer and no service. English only, like the packs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

from pydantic import TypeAdapter, ValidationError

from services.runtime.reasons import NAME_UNFAMILIAR as NAME_UNFAMILIAR
from services.runtime.reasons import PICTURE_UNFAMILIAR as PICTURE_UNFAMILIAR
from services.runtime.reasons import WORDS_UNFAMILIAR as WORDS_UNFAMILIAR

FILE_NAME = "world.json"
_LISTED = 5  # unknown words a message lists; the metadata has them all
_EXAMPLES = 3  # of each kind of thing that is known
_ENDINGS = (  # what is taken off, the least letters that must be left, what is put in its place
    ("ies", 2, "y"),
    ("ied", 2, "y"),
    ("es", 3, ""),
    ("s", 3, ""),
    ("ed", 3, "e"),
    ("ing", 3, "e"),
)
_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SHORTENED = re.compile(r"(?:['’](?:s|ll|re|ve|d|m)|n['’]t)$", re.IGNORECASE)
_DOUBLED = re.compile(r"(\w{2,}(\w))\2(?:ed|ing|y)")  # hopped, running, sunny
_WHERE = "(?:in|into|at|through|across)"
_SENTENCE_MARKS = frozenset('.!?…:"“”„«»‘')
_ARTICLES = ("a", "an", "the", "my", "your", "his", "her", "its", "our", "their", "this", "that")
# Words that show nothing by themselves: a caption may use them whatever a pack has drawn.
_SHOW_NOTHING = """
    i me you he him she it we us they them mine yours hers ours theirs myself yourself himself herself itself
    ourselves themselves these those who whom whose which what when where why how and or but nor so yet if
    then than because while although though unless until since as of at by for with about against between into
    through during before after above below to from up down in out on off over under again further away back
    along across around behind beside near toward towards inside outside upon within without here there
    everywhere somewhere anywhere nowhere not no yes never ever always often sometimes soon later now today
    tomorrow yesterday once twice only just very too much many more most less least few little lot lots some
    any each every all both either neither other another such same own else even also still already almost
    quite rather really maybe perhaps oh ah hey hello well please together alone be am is are was were been
    being do does did done doing have has had having will would shall should can could may might must ought ca
    wo sha go goes went gone going come comes came coming get gets got getting make makes made making take
    takes took taken taking say says said saying see sees saw seen seeing let put give gives gave given find
    finds found know knows knew known think thought want wants wanted tell tells told call calls called named
    name thing things something anything nothing everything someone somebody anyone anybody everyone everybody
    nobody way one two three four five six seven eight nine ten eleven twelve twenty hundred thousand first
    second third last next time day night morning evening year mr mrs miss ms dr monday tuesday wednesday
    thursday friday saturday sunday january february march april june july august september october november
    december
"""
_FUNCTION_WORDS = frozenset((*_ARTICLES, *_SHOW_NOTHING.split()))


@dataclass(frozen=True, kw_only=True)
class Unfamiliar:
    """Something a pack was given that it does not know. Never an error: it does what it can."""

    reason: str  # stable: one of the three above
    message: str  # what is unknown and what is known instead, for a person
    field: str  # what it is about, as the caller names it
    metadata: Mapping[str, str]


class _Word(NamedTuple):
    text: str  # without 's and its like
    begins: bool  # a sentence

    @property
    def lower(self) -> str:
        return self.text.lower()


@dataclass(frozen=True, kw_only=True)
class World:
    """What a pack knows. One that knows no word never warns about texts, one without a level never about pictures."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "strict": True}  # when read from a file

    words: tuple[str, ...] = ()  # of its captions and descriptions, lower-case
    characters: Mapping[str, str] = field(default_factory=dict)  # name → what they look like: "an orange cat"
    names: tuple[str, ...] = ()  # it has read as well, of people without a look of their own
    places: tuple[str, ...] = ()  # with their article: "the beach"
    there: Mapping[str, str] = field(default_factory=dict)  # place → the word before it, where that is not "in"
    things: tuple[str, ...] = ()  # with theirs: "a kite"
    # A picture is familiar when the pack's autoencoder gains at least so much on it: see `familiarity`.
    familiar_gain_db: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError naming what cannot be."""
        for word in self.words:
            if word != word.lower() or not _TOKEN.fullmatch(word):
                raise ValueError(f"words: {word!r} is not one lower-case word")
        for name, phrase in self.characters.items():
            if not name.strip() or not phrase.strip():
                raise ValueError(f"characters: {name!r} needs a name and a phrase")
        for place, word in self.there.items():
            if place not in self.places or not word.strip():
                raise ValueError(f"there: {place!r} needs a word, and to be one of the places")
        for key in ("names", "places", "things"):
            if not all(text.strip() for text in getattr(self, key)):
                raise ValueError(f"{key}: an entry is empty")

    @classmethod
    def load(cls, pack_folder: Path) -> World:
        """What the pack in a folder knows; nothing when it has no file. Raises ValueError naming file and key."""
        file = pack_folder / FILE_NAME
        if not file.is_file():
            return cls()
        try:
            return _READER.validate_json(file.read_bytes())
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{file}: {faults}") from None

    def save(self, pack_folder: Path) -> None:
        """Write it beside the pack's other files, before the pack is sealed."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (pack_folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    def unknown_words(self, caption: str) -> tuple[str, ...]:
        """The words of a caption that the pack has never read, lower-case, each once, without names.

        Other forms of known words are known (kites, played, hopping, Pip's), and so are numbers and words that show
        nothing by themselves.
        """
        found = (word.lower for word in _words(caption) if not self._knows(word.lower) and not self._is_name(word))
        return tuple(dict.fromkeys(found)) if self.words else ()

    def unknown_names(self, caption: str) -> tuple[str, ...]:
        """The names of a caption that are nobody's the pack knows, each once.

        A name is a capitalised word that is no known word, or that does not begin a sentence: "Snow" is a name in
        "a dog called Snow". In a caption that capitalises every word, and behind an article, capitals say nothing.
        """
        return tuple(name for name in self.names_in(caption) if name.lower() not in self._names)

    def names_in(self, caption: str) -> tuple[str, ...]:
        """The names of a caption, whether or not they are known, each once."""
        if not self.words:
            return ()
        words = list(_words(caption))
        titled = all(word.text[0].isupper() for word in words if word.lower not in _FUNCTION_WORDS)
        found: list[str] = []
        for before, word in zip([None, *words], words, strict=False):
            if not self._is_name(word):
                continue
            ordinary = self._knows(word.lower) and word.lower not in self._names
            meant = not (word.begins or titled or (before and before.lower in _ARTICLES))
            if meant or not ordinary:
                found.append(word.text)
        return tuple(dict.fromkeys(found))

    def whom(self, captions: Sequence[str], known: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Whom the picture of the last of `captions` may show: names that `known` has no look for, and others' looks.

        "She ran." is about whom the captions before it name; and "he" may be anybody known whom they name. Where
        somebody is ("in Paris") is nobody.
        """
        per_caption = [self.names_in(caption) for caption in captions]
        everybody = dict.fromkeys(name for names in per_caption for name in names)
        shown = per_caption[-1] or tuple(everybody)
        told = " ".join(captions)
        unknown = tuple(
            name for name in shown if name not in known and not re.search(rf"\b{_WHERE} {re.escape(name)}\b", told)
        )
        return unknown, tuple(known[name] for name in everybody if name in known)

    def unfamiliar_texts(self, caption: str, field: str) -> tuple[Unfamiliar, ...]:
        """What to say of a caption: of its words, of its names, or nothing."""
        told: list[Unfamiliar] = []
        if words := self.unknown_words(caption):
            message = f"This pack has never drawn: {_some(words)}."
            if surroundings := self._surroundings():
                message += f" Among what it knows are {_listing(surroundings)}."
            told.append(
                Unfamiliar(reason=WORDS_UNFAMILIAR, message=message, field=field, metadata=_list("words", words))
            )
        if names := self.unknown_names(caption):
            message = f"This pack has never met {_some(names)}, who may look different from frame to frame."
            if people := self._people():
                message += f" Among those it knows are {_listing(people)}."
            told.append(
                Unfamiliar(reason=NAME_UNFAMILIAR, message=message, field=field, metadata=_list("names", names))
            )
        return tuple(told)

    def unfamiliar_picture(self, gain_db: float, field: str) -> Unfamiliar | None:
        """What to say of a picture on which the pack's autoencoder gains `gain_db`; None for a familiar one."""
        if self.familiar_gain_db is None or gain_db >= self.familiar_gain_db:
            return None
        message = "This picture is unlike what this pack draws, so the frames after it may not look much like it."
        if known := (*self._people(), *self._surroundings()):
            message += f" Among what it draws are {_listing(known)}."
        level = {"gain_db": f"{gain_db:.1f}", "familiar_gain_db": f"{self.familiar_gain_db:.1f}"}
        return Unfamiliar(reason=PICTURE_UNFAMILIAR, message=message, field=field, metadata=level)

    def _surroundings(self) -> tuple[str, ...]:
        return (*self.places[:_EXAMPLES], *self.things[:_EXAMPLES])

    def _people(self) -> tuple[str, ...]:
        return tuple(f"{name} ({phrase})" for name, phrase in self.characters.items())[:_EXAMPLES]

    def _knows(self, word: str) -> bool:
        return word in _FUNCTION_WORDS or not self._bases.isdisjoint(_bases(word))

    def _is_name(self, word: _Word) -> bool:
        return word.text[0].isupper() and word.lower not in _FUNCTION_WORDS

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(part.lower for name in (*self.characters, *self.names) for part in _words(name))

    @cached_property
    def _bases(self) -> frozenset[str]:
        """The known words in every form that another form of them could share."""
        told = (word.lower for text in (*self.characters.values(), *self.places, *self.things) for word in _words(text))
        return frozenset(base for word in (*self.words, *self._names, *told) for base in _bases(word))


_READER = TypeAdapter(World)


def _words(text: str) -> Iterator[_Word]:
    """The words of a text without what is shortened behind them. Words with digits in them count as numbers."""
    end = 0
    for match in _TOKEN.finditer(text):
        begins = end == 0 or not _SENTENCE_MARKS.isdisjoint(text[end : match.start()])
        end = match.end()
        word = _SHORTENED.sub("", match[0])
        if word and not any(letter.isdigit() for letter in word):
            yield _Word(word, begins)


def words_of(text: str) -> Iterator[str]:
    """The words of a text as `World.words` has them."""
    return (word.lower for word in _words(text))


def _bases(word: str) -> Iterator[str]:
    """The word, and what it may be a plural or a form in -s, -ed or -ing of; "sun" for "sunny".

    Some of that is no word, which harms little: a word that is taken for a known one only goes without its warning.
    """
    yield word
    for ending, least, instead in _ENDINGS:
        rest = word.removesuffix(ending)
        if rest == word or len(rest) < least or word.endswith("ss"):
            continue
        yield rest + instead
        if instead != "y":
            yield rest
    if doubled := _DOUBLED.fullmatch(word):
        yield doubled[1]


def _list(key: str, values: Iterable[str]) -> dict[str, str]:
    return {key: ",".join(values)}


def _some(values: Sequence[str]) -> str:
    """The first few of them."""
    rest = len(values) - _LISTED
    return _listing((*values[:_LISTED], *([f"{rest} more"] if rest > 0 else [])))


def _listing(values: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join(filter(None, (", ".join(values[:-1]), values[-1])))
