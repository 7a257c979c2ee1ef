"""The thread guard: tells a caption after which a story has lost sight of its hero, or in which somebody is two.

A small language model that may say "she" says "she" until nobody knows who she is. The hero is whom the first caption
names first; a story may leave its hero's name out of `UNNAMED_MAX` captions in a row and no more. And it forgets that a
friend is somebody else: "Luna picked it up, and here came Luna". Pure: knows no model, no tokenizer and no service.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.models.captions.cast import Cast
from services.models.world import World

UNNAMED_MAX = 2  # captions in a row that may go without the hero's name

_INNER_NAME = re.compile(r"(?<=[\w,;] )[^\W\d_a-z]\w*[^\W\d_A-Z]\b")  # a capital where no sentence begins
_SENTENCES = re.compile(r"[.!?…]+[\"'”’]*\s+")
_VERBS = ("was", "ran")  # after which captions go on without naming somebody the story does not have
_SUBJECT = re.compile(r"\b(?:he|she)\b(?!['’])", re.IGNORECASE)


def hero_of(captions: Sequence[str], cast: Cast) -> str | None:
    """Whom the first caption names first; of names that no pack knows only one within a sentence is seen as a name."""
    if not captions:
        return None
    known = cast.first_mentioned(captions[0])
    if known is not None:
        return known
    found = _INNER_NAME.search(captions[0])
    return found[0] if found else None


def people(names: Sequence[str], captions: Sequence[str], world: World) -> tuple[str, ...]:
    """Those of `names` that the first caption does not merely say as a word: "Sunny days came" is not about Sunny."""
    if not captions or not world.words:
        return tuple(names)
    meant = world.names_in(captions[0])
    return tuple(name for name in names if not _names(captions[0], name) or any(_names(name, part) for part in meant))


def loses_thread(text: str, earlier: Sequence[str], cast: Cast) -> bool:
    """Whether with `text` more than `UNNAMED_MAX` captions in a row would lack the hero's name."""
    hero = hero_of(earlier, cast)
    recent = (*earlier[1:], text)[-UNNAMED_MAX - 1 :]
    if hero is None or len(recent) <= UNNAMED_MAX:
        return False
    return not any(_names(one, hero) for one in recent)


def openings(text: str, earlier: Sequence[str], cast: Cast, world: World) -> tuple[str, ...]:
    """What other tries should begin with where `text` loses sight of the hero; nothing where it does not.

    A small model does not write a name that it never read in training; begun with it, it goes on. Left to itself after
    the name it would spell another ("Rosa" → "Rosais"), so a verb follows that goes with anything. Only for somebody:
    "On Monday", "in Paris" and "Christmas Eve" begin with a capital, too, and no caption should begin "Monday was".
    """
    hero = hero_of(earlier, cast)
    if hero is None or not loses_thread(text, earlier, cast):
        return ()
    somebody = hero in cast.names or _is_somebody(hero, earlier[0], world)
    return tuple(f"{hero} {verb}" for verb in _VERBS) if somebody else ()


def _is_somebody(name: str, caption: str, world: World) -> bool:
    """Whether a caption in the pack's own words plainly has somebody of that name do something."""
    does = re.search(rf"(?<!\w){re.escape(name)} [^\W\d_A-Z]", caption) is not None
    return does and name in world.whom([caption], {})[0] and not world.unknown_words(caption)


def doubles_somebody(text: str, cast: Cast) -> bool:
    """Whether a caption names one person twice in a sentence, and nobody else. Two may well be named twice each."""
    for sentence in _SENTENCES.split(text):
        named = cast.mentions(sentence)
        if len(named) > 1 and len(set(named)) == 1:
            return True
    return False


def faults(text: str, earlier: Sequence[str], cast: Cast) -> int:
    """How many of the two rules a caption breaks, `earlier` being those before it; 0 is what is wanted."""
    return int(loses_thread(text, earlier, cast)) + int(doubles_somebody(text, cast))


def with_hero(text: str, earlier: Sequence[str], cast: Cast) -> str:
    """`text` with its first "he" or "she" given the hero's name, where nobody else can be meant; else as it is."""
    hero = hero_of(earlier, cast)
    everybody = cast.mentioned("\n".join((*earlier, text)))
    if hero is None or everybody - {hero}:
        return text
    return _SUBJECT.sub(lambda _: hero, text, count=1)


def _names(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
