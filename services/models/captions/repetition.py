"""The repetition guard: tells a caption that says again what the story, or the caption itself, has said already.

A small language model that reads its own captions likes to write one of them once more. Whoever writes captions
counts the faults of a text and samples again while there are any. Pure: knows no model, no tokenizer and no service.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Sequence

NEAR_COPY_RATIO = 0.9  # difflib's similarity from which two captions count as the same
RUN_WORDS = 4  # so many words in the same order twice are a repetition: "the red kite and" is, "the red kite" is not

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SENTENCE_END = re.compile(r"[.!?…؟]+(?=[\s\"'”’»)]|$)|[。！？]+")  # the dot of 3.5 ends nothing


def is_near_copy(text: str, earlier: Iterable[str]) -> bool:
    """Whether a caption repeats one of the earlier ones, capitals aside. Costs a millisecond per caption."""
    text = text.lower()
    # The letters of a long text are all frequent: autojunk would overlook every one of them.
    matcher = difflib.SequenceMatcher(None, "", text, autojunk=False)
    for other in earlier:
        matcher.set_seq1(other.lower())
        bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)  # each a bound of the next, and cheaper
        if all(bound() >= NEAR_COPY_RATIO for bound in bounds):
            return True
    return False


def repeats_itself(text: str) -> bool:
    """Whether a text has the same sentence, or the same run of `RUN_WORDS` words, twice; capitals aside."""
    words = _words(text)
    runs = [words[start : start + RUN_WORDS] for start in range(len(words) - RUN_WORDS + 1)]
    sentences = [sentence for part in _SENTENCE_END.split(text) if (sentence := _words(part))]
    return _has_doubles(runs) or _has_doubles(sentences)


def faults(text: str, earlier: Iterable[str]) -> int:
    """How many of the two rules a caption breaks, `earlier` being those before it; 0 is what is wanted."""
    return int(is_near_copy(text, earlier)) + int(repeats_itself(text))


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _has_doubles(values: Sequence[Hashable]) -> bool:
    return len(set(values)) < len(values)
