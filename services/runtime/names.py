"""Whom a text names: the one rule by which services find somebody's name in captions and descriptions. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

MOST_IN_FRAME = 2  # learned characters, whose weights one frame is drawn with


def named(names: Collection[str], text: str) -> tuple[str, ...]:
    """Those of `names` that a text has as whole words, each once, in its order. Capitals count.

    Where a name begins another one (Rosa, Rosa Lee), the longer one is meant where it stands. Names must be composed
    (NFC); the text need not be.
    """
    if not names:
        return ()
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return tuple(dict.fromkeys(re.findall(rf"(?<!\w)(?:{either})(?!\w)", unicodedata.normalize("NFC", text))))
