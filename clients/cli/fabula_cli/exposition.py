"""Reads Prometheus' text format, as far as `fabula status` needs it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line of an exposition."""

    name: str
    labels: dict[str, str]
    value: float


def read_exposition(text: str) -> Iterator[Sample]:
    """Every sample, in order. Lines that are not samples are passed over."""
    for line in text.splitlines():
        found = None if line.startswith("#") else _SAMPLE.match(line)
        if found is None:
            continue
        try:
            value = float(found[3])
        except ValueError:
            continue
        yield Sample(name=found[1], labels=dict(_LABEL.findall(found[2] or "")), value=value)


def summarize(samples: Iterator[Sample], prefixes: tuple[str, ...]) -> dict[str, float]:
    """Totals and gauges added up over their labels, histograms as their mean (`…_mean`), for names that start so."""
    sums: dict[str, float] = {}
    for sample in samples:
        if sample.name.startswith(prefixes) and not sample.name.endswith(("_bucket", "_created")):
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    means = {
        f"{name.removesuffix('_sum')}_mean": round(value / sums[name.removesuffix("_sum") + "_count"], 6)
        for name, value in sums.items()
        if name.endswith("_sum") and sums.get(name.removesuffix("_sum") + "_count")
    }
    kept = {name: value for name, value in sums.items() if not name.endswith(("_sum", "_count"))}
    return dict(sorted({**kept, **means}.items()))
