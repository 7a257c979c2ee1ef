"""Characters that a pack was taught after it was made: what is told of their looks, and their names in descriptions.

The pack's own cast is the business of `services.models.captions.cast`; whom a story has learned, its requests say.
Pure: knows no model and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from services.caption.job import Learned
from services.runtime.errors import ValueOutOfRange
from services.runtime.names import MOST_IN_FRAME, named

MOST_LEARNED = 64
NAME_CHARACTERS_MAX = 100
PHRASE_CHARACTERS_MAX = 1000
# Somebody as descriptions introduce them: "Waiga, a blue elephant with a yellow crown,".
_INTRODUCED = re.compile(r"\b(?P<name>[^\W\d_a-z]\w*), (?P<look>an? [^,.;]{1,80})(?=[,.;])")


def check_learned(learned: Sequence[Learned]) -> None:
    """Raises ValueOutOfRange, naming the field."""
    if len(learned) > MOST_LEARNED:
        raise ValueOutOfRange(f"{len(learned)} characters are more than {MOST_LEARNED}", field="characters")
    for number, one in enumerate(learned):
        for part, most in (("name", NAME_CHARACTERS_MAX), ("phrase", PHRASE_CHARACTERS_MAX)):
            text, field = getattr(one, part), f"characters[{number}].{part}"
            if len(text) > most:
                raise ValueOutOfRange(f"{field} has {len(text)} characters; at most {most} are taken", field=field)
        if not one.name.strip():
            raise ValueOutOfRange(f"characters[{number}].name is empty", field=f"characters[{number}].name")


def told(learned: Iterable[Learned]) -> tuple[str, ...]:
    """What they look like, in sentences that looks are read from: see `prompts.told_looks`."""
    return tuple(f"{one.name}, {one.phrase}, stands there." for one in learned if one.phrase)


def completed(
    description: str,
    caption: str,
    earlier_captions: Iterable[str],
    learned: Sequence[Learned],
    fits: Callable[[str], bool] = lambda text: True,
) -> str:
    """The description with those whom its caption names, at most as many as a frame has weights for.

    A small language model often loses a name that it has never read, or makes one up: whoever is introduced by a name
    that no caption has becomes somebody who is missing, and who is missing still gets a sentence, as the pack's own
    cast does. Without the name a frame would be drawn without the weights. Looks are said where there is room for them;
    where there is not even room for the names, nothing is changed.
    """
    by_name = {one.name: one for one in learned}
    inside = named(by_name, description)
    missing = [by_name[name] for name in named(by_name, caption)[:MOST_IN_FRAME] if name not in inside]
    if not missing:
        return description
    captions = "\n".join((*earlier_captions, caption))
    for people in (missing, [Learned(name=one.name) for one in missing]):
        text = _with_them(description, captions, people)
        if fits(text) or not fits(description):
            return text
    return description


def _with_them(description: str, captions: str, missing: Sequence[Learned]) -> str:
    waiting = list(missing)
    renamed: dict[str, Learned] = {}

    def introduced(found: re.Match[str]) -> str:
        if not waiting or re.search(rf"(?<!\w){re.escape(found['name'])}(?!\w)", captions):
            return found[0]
        one = waiting.pop(0)
        renamed.setdefault(found["name"], one)
        return _introduction(one)

    text = _INTRODUCED.sub(introduced, description)
    for name, one in renamed.items():  # where it stands alone: "Waiga's ball"
        text = one.name.join(re.split(rf"(?<!\w){re.escape(name)}(?!\w)(?!, an? )", text))
    sentences = (f"{_introduction(one)}{',' if one.phrase else ''} stands nearby." for one in waiting)
    return " ".join((text, *sentences))


def _introduction(one: Learned) -> str:
    return f"{one.name}, {one.phrase}" if one.phrase else one.name
