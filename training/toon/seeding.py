"""Makes independent random generators from words and numbers, the same on every machine and Python.

Built-in `hash` is salted per process, so seeds go through SHA-256.
"""

from __future__ import annotations

import hashlib
import random


def stable_number(*parts: object) -> int:
    """Return a 64-bit number that depends on `parts` only."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def generator(*parts: object) -> random.Random:
    """Return a fresh generator seeded by `parts`; it shares no state with any other."""
    return random.Random(stable_number(*parts))
