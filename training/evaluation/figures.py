"""Numbers with their intervals and targets, as the evaluation prints them and the model card shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number with its 95 % interval. `target` None: reported, not judged, and always passed."""

    name: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    target: float | None = None
    at_most: bool = False  # the target is an upper limit
    is_share: bool = False  # counted: `value * n` of `n` were right
    surely: bool = False  # the whole interval has to lie on the target's right side, not the value alone

    @property
    def passed(self) -> bool:
        """Whether the target is reached; what nobody counted reaches none."""
        if self.target is None:
            return True
        if self.n == 0:
            return False
        if self.at_most:
            return (self.high if self.surely and self.high is not None else self.value) <= self.target
        return (self.low if self.surely and self.low is not None else self.value) >= self.target

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {name: None if v is None else round(v, 5) for name, v in asdict(self).items() if name in _NUMBERS}
        return {**asdict(self), **numbers, "passed": self.passed}


_NUMBERS = ("value", "low", "high", "target")


def share(name: str, values: Sequence[bool], target: float | None = None, *, at_most: bool = False) -> Figure:
    """The share of true values, with Wilson's interval. Nothing to count is 0 of 0, and reaches no lower target."""
    return share_of(name, sum(values), len(values), target, at_most=at_most)


def share_of(name: str, hits: int, n: int, target: float | None = None, *, at_most: bool = False) -> Figure:
    """The same from counts."""
    if n == 0:
        return Figure(name=name, value=0.0, n=0, target=target, at_most=at_most, is_share=True)
    p = hits / n
    middle, wide = (p + _Z**2 / (2 * n)), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    low, high = ((middle + sign * wide) / (1 + _Z**2 / n) for sign in (-1, 1))
    return Figure(name=name, value=p, n=n, low=low, high=high, target=target, at_most=at_most, is_share=True)


def mean(name: str, values: Sequence[float], target: float | None = None, *, at_most: bool = False) -> Figure:
    """The mean, with its normal interval."""
    n = len(values)
    if n == 0:
        return Figure(name=name, value=0.0, n=0, target=target, at_most=at_most)
    middle = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / max(1, n - 1) / n)
    return Figure(
        name=name,
        value=middle,
        n=n,
        low=middle - _Z * spread,
        high=middle + _Z * spread,
        target=target,
        at_most=at_most,
    )


def difference(name: str, first: Sequence[float], second: Sequence[float], target: float | None = None) -> Figure:
    """The mean of `first − second`, pair by pair; a target is reached when the whole interval reaches it."""
    return replace(mean(name, [a - b for a, b in zip(first, second, strict=True)], target), surely=target is not None)


def gap(name: str, known: Figure, held_out: Figure, target: float) -> Figure:
    """By how much a share is lower on what was held out; negative when it is higher."""
    if known.n == 0 or held_out.n == 0:
        return Figure(name=name, value=1.0, n=0, target=target, at_most=True)
    spreads = [f.value * (1 - f.value) / f.n for f in (known, held_out)]
    value, wide = known.value - held_out.value, _Z * math.sqrt(sum(spreads))
    return Figure(
        name=name,
        value=value,
        n=held_out.n,
        low=value - wide,
        high=value + wide,
        target=target,
        at_most=True,
    )


def table(figures: Sequence[Figure]) -> str:
    """The figures as lines of text."""
    lines = [f"{'figure':34} {'value':>8} {'95 % interval':>18} {'target':>8} {'n':>5}"]
    for figure in figures:
        target = "" if figure.target is None else f"{'≤' if figure.at_most else '≥'} {figure.target:g}"
        mark = "" if figure.target is None else ("  ok" if figure.passed else "  MISSED")
        interval = "" if figure.low is None else f"{figure.low:.3f} … {figure.high:.3f}"
        lines.append(f"{figure.name:34} {figure.value:8.3f} {interval:>18} {target:>8} {figure.n:5d}{mark}")
    return "\n".join(lines)
