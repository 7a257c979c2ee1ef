"""How much time a frame is worth, as everybody names it. Costs nothing to import."""

from __future__ import annotations

from enum import StrEnum


class Quality(StrEnum):
    """What a request asks for; a pack says what that means (`pack.Sampling`)."""

    DRAFT = "draft"
    STANDARD = "standard"
    BEST = "best"
