"""The report of a run: figures, the targets they are held to, and the table that people read.

Pure: measurements in, plain data and a renderable out. Knows neither how a figure was taken nor where the report goes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

SCHEMA = "fabula.bench/1"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StoryTiming:
    """One story as its reader saw it; seconds since the call that created it."""

    frame_count: int
    first_caption_s: float
    first_frame_s: float
    total_s: float
    frame_s: tuple[float, ...]  # from one frame to the next, in order


@dataclass(frozen=True, kw_only=True)
class CallTimings:
    """One kind of call, made again and again over an open connection."""

    name: str
    call_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """All processes of the installation together; proportional set size where the kernel tells it."""

    when: str
    total_bytes: int
    process_count: int


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """All that one run measured."""

    cold_start_s: float  # from the command `fabula up` to its end, everything warmed
    first_story: StoryTiming  # the first one after the start
    single_stories: tuple[StoryTiming, ...]  # one after the other, nothing else going on
    concurrent_stories: tuple[StoryTiming, ...]  # all at once
    concurrent_wall_s: float  # from the first call to the end of the last of them
    memory: tuple[MemoryUse, ...]
    calls: tuple[CallTimings, ...]  # nothing else going on


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a figure is held to."""

    figure: str
    at_most: float
    unit: str
    what: str


TARGETS = (
    Target(figure="cold_start_s", at_most=45.0, unit="s", what="cold start to ready"),
    Target(figure="memory_gib", at_most=3.0, unit="GiB", what="memory of all processes together"),
    Target(figure="single_story_s", at_most=30.0, unit="s", what="a warm story of 4 frames, alone"),
    Target(figure="get_story_grpc_p50_ms", at_most=5.0, unit="ms", what="edge overhead, GetStory over gRPC, p50"),
    Target(figure="get_story_http_p50_ms", at_most=5.0, unit="ms", what="edge overhead, GET story over HTTP, p50"),
)
UNTARGETED = {
    "first_caption_s": ("s", "first story: its first caption"),
    "first_frame_s": ("s", "first story: its first frame"),
    "first_story_s": ("s", "first story, whole"),
    "concurrent_story_s": ("s", "seconds per story, several at once (wall clock / stories)"),
    "concurrent_latency_s": ("s", "what one of them waits, median"),
    "last_to_first_frame_ratio": ("", "time of a story's last frame / of its first, alone"),
}


def percentile(values: Sequence[float], ratio: float) -> float:
    """The smallest value that at least `ratio` of all do not exceed. Raises ValueError for no values."""
    if not values:
        raise ValueError("a percentile of nothing")
    return sorted(values)[max(0, math.ceil(ratio * len(values)) - 1)]


def figures(measured: Measurements) -> dict[str, float]:
    """Every figure by name; the unit is the end of the name."""
    frames = [timing.frame_s for timing in measured.single_stories if len(timing.frame_s) > 1]
    found = {
        "cold_start_s": measured.cold_start_s,
        "memory_gib": max(use.total_bytes for use in measured.memory) / GIB,
        "first_caption_s": measured.first_story.first_caption_s,
        "first_frame_s": measured.first_story.first_frame_s,
        "first_story_s": measured.first_story.total_s,
        "single_story_s": statistics.median(timing.total_s for timing in measured.single_stories),
        "concurrent_story_s": measured.concurrent_wall_s / len(measured.concurrent_stories),
        "concurrent_latency_s": statistics.median(timing.total_s for timing in measured.concurrent_stories),
    }
    if frames:
        found["last_to_first_frame_ratio"] = statistics.median(times[-1] / times[0] for times in frames)
    for calls in measured.calls:
        for name, ratio in (("p50", 0.50), ("p95", 0.95), ("p99", 0.99)):
            found[f"{calls.name}_{name}_ms"] = percentile(calls.call_s, ratio) * 1000.0
    return {name: round(value, 4) for name, value in found.items()}


def report(
    measured: Measurements, *, machine: dict[str, Any], revision: dict[str, Any], date: str, quick: bool
) -> dict[str, Any]:
    """The whole report as JSON-ready data. A quick run says so: it holds fewer samples."""
    found = figures(measured)
    return {
        "schema": SCHEMA,
        "date": date,
        "revision": revision,
        "machine": machine,
        "quick": quick,
        "figures": found,
        "targets": [
            {**asdict(target), "value": found[target.figure], "passed": found[target.figure] <= target.at_most}
            for target in TARGETS
        ],
        "measurements": asdict(measured),
    }


def passed(document: dict[str, Any]) -> bool:
    """Whether every target was met."""
    return all(target["passed"] for target in document["targets"])


def table(document: dict[str, Any]) -> Table:
    """The report for people: targets first, then the rest."""
    machine, revision = document["machine"], document["revision"]
    dirty = " + changes" if revision["is_dirty"] else ""
    quick = "  quick run" if document["quick"] else ""
    view = Table(
        "figure",
        "value",
        "target",
        "",
        title=f"Fabula on {machine['cpu']}, {machine['usable_core_count']} cores, {machine['memory_gib']:g} GiB",
        caption=f"{document['date']}  revision {revision['commit'][:12]}{dirty}{quick}",
        title_justify="left",
        caption_justify="left",
    )
    view.columns[1].justify = view.columns[2].justify = "right"
    for target in document["targets"]:
        mark = Text("✓", style="green") if target["passed"] else Text("✗", style="red")
        view.add_row(
            target["what"], f"{target['value']:.2f} {target['unit']}", f"≤ {target['at_most']:g} {target['unit']}", mark
        )
    view.add_section()
    held = {target["figure"] for target in document["targets"]}
    for name, value in document["figures"].items():
        if name not in held:
            unit, what = UNTARGETED.get(name, ("ms", name.removesuffix("_ms").replace("_", " ")))
            view.add_row(what, f"{value:.2f} {unit}".rstrip(), "", "")
    return view
