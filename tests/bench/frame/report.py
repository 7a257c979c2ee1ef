"""From paired rounds to figures, targets and a table. Pure."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

SCHEMA = "fabula.bench-frame/1"


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios and its 95 % interval (bootstrap over rounds, seeded)."""

    median: float
    low: float
    high: float
    rounds: int


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """How many times `above` is `below`, round by round. Raises ValueError for rounds that do not pair."""
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} and {len(below)} rounds do not pair")
    each = [a / b for a, b in zip(above, below, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(each, k=len(each))) for _ in range(1000))
    return Ratio(statistics.median(each), medians[25], medians[974], len(each))


@dataclass(frozen=True)
class Target:
    """What a figure is held to; above it or below."""

    figure: str
    bound: float
    what: str
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether it is."""
        return value <= self.bound if self.at_most else value >= self.bound


TARGETS = (
    Target("rows_story", 840, "network rows of the report's story (the published code takes 1,920)", at_most=True),
    Target("one_story_speedup", 1.8, "one story, against the published schedule with the same noise"),
    Target("pixel_difference_shared", 1, "and its picture, levels of 255 at most", at_most=True),
    Target("mixed_vs_split_unmerged", 2.0, "8 stories, 4 characters, against batches by character, unmerged weights"),
    Target("mixed_vs_split_merged", 1.8, "the same, merged weights"),
    Target("mixed_vs_split_ours", 1.1, "the same, merged weights and our rows"),
    Target("pixel_difference_mixed", 2, "and its pictures, against batches with our rows, levels of 255", at_most=True),
    Target("adapters_16_vs_1_unmerged", 0.95, "16 characters against one, all unmerged"),
    Target("mixed_vs_peft_4", 1.2, "against PEFT's mixed batch, 4 characters"),
    Target("mixed_vs_peft_16", 1.5, "the same, 16 characters at once"),
    Target("p99_ratio_at_80", 0.5, "p99 latency at 80 % of the batches' capacity, against theirs", at_most=True),
    Target("tenant_spread_at_80", 1.5, "slowest tenant's mean latency to the fastest's", at_most=True),
)

GPU_TARGETS = (
    Target("sd15_images_per_s_mixed", 4.5, "Stable Diffusion 1.5, 512 px, 50 steps, 16 characters: images a second"),
)
"""Held to where a GPU is at hand."""


def document(
    figures: dict[str, Any],
    *,
    targets: Sequence[Target] = TARGETS,
    machine: dict[str, Any],
    revision: dict[str, Any],
    date: str,
    plan: dict[str, Any],
) -> dict[str, Any]:
    """The whole report as JSON-ready data. A figure that was not taken has no verdict."""
    verdicts = []
    for target in targets:
        value = figures.get(target.figure)
        value = value["median"] if isinstance(value, dict) else value
        verdicts.append(
            {
                "figure": target.figure,
                "what": target.what,
                "bound": target.bound,
                "at_most": target.at_most,
                "value": value,
                "passed": None if value is None else target.met(value),
            }
        )
    return {
        "schema": SCHEMA,
        "date": date,
        "machine": machine,
        "revision": revision,
        "plan": plan,
        "figures": figures,
        "targets": verdicts,
        "passed": all(verdict["passed"] for verdict in verdicts),
    }


def table(found: dict[str, Any]) -> Table:
    """The report for people."""
    machine = found["machine"]
    view = Table(
        "figure",
        "value",
        "95 %",
        "target",
        "",
        title=f"Frame engine on {machine['cpu']}, {machine['usable_core_count']} cores",
        caption=f"{found['date']}  revision {found['revision']['commit'][:12]}  {found['plan']['rounds']} rounds",
        title_justify="left",
        caption_justify="left",
    )
    held = set()
    for target in found["targets"]:
        held.add(target["figure"])
        value, whole = target["value"], found["figures"].get(target["figure"])
        interval = f"{whole['low']:.2f}-{whole['high']:.2f}" if isinstance(whole, dict) else ""
        passed = target["passed"]
        mark = Text("-") if passed is None else Text("✓", style="green") if passed else Text("✗", style="red")
        sign = "≤" if target["at_most"] else "≥"
        view.add_row(
            target["what"], "" if value is None else f"{value:.2f}", interval, f"{sign} {target['bound']:g}", mark
        )
    view.add_section()
    for name, value in found["figures"].items():
        if name not in held:
            if isinstance(value, dict) and "median" in value:
                view.add_row(name, f"{value['median']:.2f}", f"{value['low']:.2f}-{value['high']:.2f}", "", "")
            elif isinstance(value, int | float):
                view.add_row(name, f"{value:.4g}", "", "", "")
    return view


def markdown(found: dict[str, Any]) -> str:
    """The targets as a table for the README."""
    machine = found["machine"]
    lines = [
        f"{found['date'][:10]}, {machine['cpu']}, {machine['usable_core_count']} cores, "
        f"{found['plan']['rounds']} paired rounds:",
        "",
        "| what | measured | 95 % | target | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for target in found["targets"]:
        whole = found["figures"].get(target["figure"])
        interval = f"{whole['low']:.2f} to {whole['high']:.2f}" if isinstance(whole, dict) else ""
        sign = "≤" if target["at_most"] else "≥"
        value = "not taken" if target["value"] is None else f"{target['value']:.2f}"
        verdict = {True: "met", False: "missed", None: ""}[target["passed"]]
        lines.append(f"| {target['what']} | {value} | {interval} | {sign} {target['bound']:g} | {verdict} |")
    return "\n".join(lines) + "\n"
