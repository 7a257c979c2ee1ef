"""A character that has weights of its own, as everybody names it. Costs nothing to import."""

from __future__ import annotations

from typing import NamedTuple


class CharacterWeights(NamedTuple):
    """The SHA-256 of the weights' file, in lower-case hex, and how strongly they count."""

    digest: str
    scale: float = 1.0
