"""What is drawn in the bench: seeded requests with three earlier frames each, some for characters with weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.models.drawing import Seen, Sketch
from services.models.references import EXACT, ReferencePolicy
from services.models.registry import FrameModel

REFERENCES = 3
TEXT_GUIDANCE, IMAGE_GUIDANCE = (
    7.0,
    3.5,
)  # three branches: every row of the published code is used
_WORDS = (
    "a cat",
    "a duck",
    "a bear",
    "runs",
    "sleeps",
    "waves",
    "in the forest",
    "on the beach",
    "at night",
    "at noon",
)


@dataclass(frozen=True)
class Request:
    """One frame that somebody wants."""

    number: int
    sketch: Sketch
    adapter: int | None = None  # whose weights it wears
    arrives_s: float = 0.0
    leaves_s: float = float("inf")  # when its reader gives it up
    tenant: str = ""


def requests(
    model: FrameModel,
    count: int,
    *,
    adapters: int,
    steps: Sequence[int],
    seed: int = 0,
    policy: ReferencePolicy = EXACT,
    guidance: tuple[float, float] = (TEXT_GUIDANCE, IMAGE_GUIDANCE),
    references: int = REFERENCES,
) -> list[Request]:
    """`count` requests; adapter k is wanted 1/(k+1) as often as the first (Zipf), and everybody is wanted at all."""
    rng = random.Random(f"bench {seed}")
    manifest = model.manifest
    popular = [1.0 / (rank + 1) for rank in range(adapters)]
    found = []
    for number in range(count):
        adapter = None
        if adapters:
            adapter = number if number < adapters else rng.choices(range(adapters), popular)[0]
        pixels = np.random.default_rng(1000 * seed + number)
        seen = tuple(
            Seen(
                pixels=pixels.integers(0, 256, (manifest.height_px, manifest.width_px, 3), dtype=np.uint8),
                description=" ".join(rng.sample(_WORDS, 4)),
            )
            for _ in range(references)
        )
        sketch = Sketch(
            description=" ".join(rng.sample(_WORDS, 5)),
            seed=rng.getrandbits(32),
            width_px=manifest.width_px,
            height_px=manifest.height_px,
            steps=rng.choice(steps),
            text_guidance=guidance[0],
            image_guidance=guidance[1],
            references=seen,
            policy=policy,
        )
        found.append(Request(number, sketch, adapter, tenant=f"tenant-{number % 4}"))
    rng.shuffle(found)
    return found


def arriving(requests: Sequence[Request], per_second: float, *, cancel_share: float, seed: int) -> list[Request]:
    """The same requests as a Poisson stream; some readers leave after a while that is short against a frame's."""
    rng = random.Random(f"arrivals {seed}")
    now_s, found = 0.0, []
    for request in requests:
        now_s += rng.expovariate(per_second)
        leaves_s = now_s + rng.uniform(0.0, 4.0 / per_second) if rng.random() < cancel_share else float("inf")
        found.append(replace(request, arrives_s=now_s, leaves_s=leaves_s))
    return found
