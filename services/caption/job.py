"""What the engine is asked and what it answers. Plain data: knows no transport and no vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from services.runtime.errors import ValueOutOfRange

TEMPERATURE_DEFAULT = 0.2  # the report's best (Table 1)
TEMPERATURE_MAX = 2.0
TOKENS_MAX = 128
SEED_MAX = 2**64 - 1


class Finish(StrEnum):
    """Why the model stopped."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. `max_tokens` 0 means the question's default."""

    temperature: float = TEMPERATURE_DEFAULT  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 0

    def __post_init__(self) -> None:
        """Raises ValueOutOfRange naming the field."""
        if not 0.0 <= self.temperature <= TEMPERATURE_MAX:
            raise ValueOutOfRange(f"temperature is from 0 to {TEMPERATURE_MAX}", field="sampling.temperature")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueOutOfRange("top_p is above 0 and at most 1", field="sampling.top_p")
        if not 0 <= self.seed <= SEED_MAX:
            raise ValueOutOfRange("seed is an unsigned 64-bit number", field="sampling.seed")
        if not 0 <= self.max_tokens <= TOKENS_MAX:
            raise ValueOutOfRange(f"max_tokens is from 0 to {TOKENS_MAX}", field="sampling.max_tokens")


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Somebody whom the pack was taught: the name that stories use, and what descriptions say of their looks."""

    name: str
    phrase: str = ""  # begins with an article: "a pink pig with a teal hat"


@dataclass(frozen=True, kw_only=True)
class StoryJob:
    """Asks for the caption after the last of `captions`; `image` is the last one's picture, as a file's bytes."""

    image: bytes
    captions: tuple[str, ...]
    learned: tuple[Learned, ...] = ()  # whom the story has besides the pack's cast, named by now or not
    pack: str = ""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True)
class DescribeJob:
    """Asks for the description of `caption`; `image` and `previous_caption` belong to the frame before."""

    image: bytes
    previous_caption: str
    caption: str
    earlier_captions: tuple[str, ...] = ()  # of the story, oldest first; who is named there may be whom "she" means
    earlier_descriptions: tuple[str, ...] = ()  # of the story, oldest first; what they say somebody looks like, stays
    learned: tuple[Learned, ...] = ()  # whom the story has besides the pack's cast; their looks count first
    pack: str = ""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A text the model wrote, and what it cost."""

    text: str
    finish: Finish
    prompt_tokens: int  # image tokens included
    completion_tokens: int  # of all attempts
    duration_s: float
    pack_digest: str
