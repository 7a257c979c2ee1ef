"""`make bench-frame`: the frame engine against what else draws story frames; a table, and one JSON object at the end.

    python -m tests.bench.frame                    30 paired rounds and streams of 80: more than an hour
    python -m tests.bench.frame --rounds 3         to see whether the bench works
    python -m tests.bench.frame --check            exit status 1 when a target is missed

Where there is a GPU, images a second at Stable Diffusion's sizes follow (`widths.py`).

Every round runs every system once on the same requests, in an order that turns from round to round, so that what the
machine does meanwhile hits all alike; figures are medians of the rounds' ratios. The report goes to
`tests/bench/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from services.models.allocator import keep_freed_memory
from services.models.drawing import Seen, begin, finish
from services.models.pack import find_pack, load_pack
from services.models.references import EXACT, ReferenceCache, ReferencePolicy
from services.models.registry import FrameModel, load_frame_model
from services.models.step import advance
from services.runtime.config import Installation
from tests.bench.frame import widths
from tests.bench.frame.report import GPU_TARGETS, TARGETS, Target, document, markdown, ratio, table
from tests.bench.frame.serving import serve_ours, serve_split
from tests.bench.frame.systems import Adapters, Done, Ours, Published, Split, SplitOurs
from tests.bench.frame.workload import REFERENCES, Request, arriving, requests
from tests.bench.machine import machine_facts, revision_facts
from tests.bench.report import percentile

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHARED = ReferencePolicy(shared_noise=True)
FEW = ReferencePolicy(shared_noise=True, levels_count=2)
STEPS = 8
REPORT_STEPS = 40  # the report's
System = Published | Ours


def rounds(
    systems: dict[str, tuple[System, Sequence[Request]]], count: int, console: Console
) -> tuple[dict[str, list[float]], dict[str, Done]]:
    """Seconds of each system, round by round, and what it drew the last time."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    last: dict[str, Done] = {}
    names = list(systems)
    for name in names:  # warm: kernels chosen, tables filled
        systems[name][0].run(systems[name][1])
    for number in range(count):
        console.print(f"  round {number + 1} of {count}")
        for name in names[number % len(names) :] + names[: number % len(names)]:
            system, wanted = systems[name]
            start = time.perf_counter()
            last[name] = system.run(wanted)
            seconds[name].append(time.perf_counter() - start)
    return dict(seconds), last


def with_policy(wanted: Sequence[Request], policy: ReferencePolicy) -> list[Request]:
    """The same requests under another policy."""
    return [replace(request, sketch=replace(request.sketch, policy=policy)) for request in wanted]


def difference(one: Done, other: Done) -> int:
    """The largest difference of a pixel, in levels of 255."""
    return max(int(np.abs(p.astype(int) - other.pictures[n].astype(int)).max()) for n, p in one.pictures.items())


def story_rows(model: FrameModel, policy: ReferencePolicy) -> int:
    """Rows of the report's story: frame one given, four drawn, 40 steps, up to three references, the table warm."""
    cache, computed = ReferenceCache(2 << 30), 0
    base = requests(model, 1, adapters=0, steps=(REPORT_STEPS,), policy=policy)[0].sketch
    for warm in (True, False):
        seen = [base.references[0]]
        for number in range(4):
            drawing = begin(model, replace(base, references=tuple(seen[-REFERENCES:])), tenant=str(warm))
            while not drawing.finished:
                rows = advance(model, [drawing], cache, prefill_rows=24)
                computed += 0 if warm else rows.total
            seen.append(Seen(pixels=finish(model, [drawing])[0], description=f"frame {number}"))
    return computed


def closed_loop(model: FrameModel, adapters: dict[int, Adapters], count: int, console: Console) -> dict[str, Any]:
    """One story, and eight at once."""
    figures: dict[str, Any] = {}
    console.print("one frame at a time …")
    single = requests(model, 1, adapters=0, steps=(STEPS,))
    none = adapters[1]
    published, ours = Published(model), Ours(model, none)
    alone: dict[str, tuple[System, Sequence[Request]]] = {
        "published": (published, single),
        "published_shared": (published, with_policy(single, SHARED)),
        "exact": (ours, single),
        "shared": (ours, with_policy(single, SHARED)),
        "few_levels": (ours, with_policy(single, FEW)),
        "strict": (Ours(model, none, "strict", strict=True), single),
    }
    seconds, drawn = rounds(alone, count, console)
    figures["one_story_speedup"] = asdict(ratio(seconds["published_shared"], seconds["shared"]))
    for mode in ("exact", "shared", "few_levels", "strict"):
        figures[f"one_frame_{mode}_vs_published"] = asdict(ratio(seconds["published"], seconds[mode]))
        figures[f"one_frame_{mode}_s"] = statistics.median(seconds[mode])
        figures[f"one_frame_{mode}_rows"] = drawn[mode].rows
    figures["one_frame_published_s"] = statistics.median(seconds["published"])
    figures["one_frame_published_rows"] = drawn["published"].rows
    figures["pixel_difference_exact"] = difference(drawn["exact"], drawn["published"])
    figures["pixel_difference_shared"] = difference(drawn["shared"], drawn["published_shared"])

    console.print("eight frames at once, four characters …")
    mixed = requests(model, 8, adapters=4, steps=(STEPS,), seed=1)
    shared = with_policy(mixed, SHARED)
    four = adapters[4]
    eight: dict[str, tuple[System, Sequence[Request]]] = {
        "split_unmerged": (Split(model, four, merged=False), mixed),
        "split_merged": (Split(model, four, merged=True), mixed),
        "split_ours": (SplitOurs(model, four), shared),
        "peft": (Ours(model, four, "peft"), shared),
        "exact": (Ours(model, four), mixed),
        "shared": (Ours(model, four), shared),
        "few_levels": (Ours(model, four), with_policy(mixed, FEW)),
        "strict": (Ours(model, four, "strict", strict=True), shared),
    }
    seconds, drawn = rounds(eight, count, console)
    for mode, name in (("split_unmerged", "split_unmerged"), ("split_merged", "split_merged"), ("split_ours",) * 2):
        figures[f"mixed_vs_{name}"] = asdict(ratio(seconds[mode], seconds["shared"]))
    figures["mixed_vs_peft_4"] = asdict(ratio(seconds["peft"], seconds["shared"]))
    figures["mixed_few_levels_vs_split_merged"] = asdict(ratio(seconds["split_merged"], seconds["few_levels"]))
    figures["mixed_exact_vs_split_merged"] = asdict(ratio(seconds["split_merged"], seconds["exact"]))
    figures["mixed_strict_vs_shared"] = asdict(ratio(seconds["shared"], seconds["strict"]))
    for mode, taken in seconds.items():
        figures[f"frames_per_s_{mode}"] = len(mixed) / statistics.median(taken)
        figures[f"rows_per_frame_{mode}"] = drawn[mode].rows / len(mixed)
    # Where the gain over batches by character comes from, each step on top of the one before.
    figures["gain_of_rows"] = asdict(ratio(seconds["split_merged"], seconds["split_ours"]))
    figures["gain_of_one_batch"] = asdict(ratio(seconds["split_ours"], seconds["shared"]))

    console.print("the same, one request at a time …")  # slow, and far from anything else: a few rounds will do
    slowly: dict[str, tuple[System, Sequence[Request]]] = {
        "published": (Published(model), mixed),
        "shared": eight["shared"],
    }
    seconds, drawn = rounds(slowly, max(1, count // 6), console)
    figures["mixed_vs_published"] = asdict(ratio(seconds["published"], seconds["shared"]))
    figures["frames_per_s_published"] = len(mixed) / statistics.median(seconds["published"])
    figures["rows_per_frame_published"] = drawn["published"].rows / len(mixed)

    console.print("sixteen characters …")
    sixteen = adapters[16]
    many = requests(model, 16, adapters=16, steps=(STEPS,), seed=2, policy=SHARED)
    one = [replace(request, adapter=0) for request in many]
    seconds, _ = rounds(
        {
            "sixteen": (Ours(model, sixteen), many),
            "one": (Ours(model, sixteen), one),
            "sixteen_unmerged": (Ours(model, sixteen, merges=False), many),
            "one_unmerged": (Ours(model, sixteen, merges=False), one),
            "peft": (Ours(model, sixteen, "peft"), many),
        },
        max(1, count // 2),
        console,
    )
    figures["adapters_16_vs_1_unmerged"] = asdict(ratio(seconds["one_unmerged"], seconds["sixteen_unmerged"]))
    figures["adapters_16_vs_1_merged"] = asdict(ratio(seconds["one"], seconds["sixteen"]))
    figures["adapters_16_merged_vs_unmerged"] = asdict(ratio(seconds["sixteen_unmerged"], seconds["sixteen"]))
    figures["mixed_vs_peft_16"] = asdict(ratio(seconds["peft"], seconds["sixteen"]))
    return figures


def open_loop(model: FrameModel, four: Adapters, count: int, console: Console) -> dict[str, Any]:
    """A Poisson stream at 50, 80 and 120 % of what batches by character can take; a tenth gives up."""
    figures: dict[str, Any] = {}
    split, ours = Split(model, four, merged=True), Ours(model, four)
    wanted = requests(model, count, adapters=4, steps=(4, 8), seed=3)
    start = time.perf_counter()
    split.run(wanted)
    capacity = len(wanted) / (time.perf_counter() - start)
    ours.run(with_policy(wanted[:8], SHARED))  # the tables
    figures["split_capacity_frames_per_s"] = capacity
    for percent in (50, 80, 120):
        console.print(f"a stream at {percent} % of the batches' capacity …")
        stream = arriving(wanted, capacity * percent / 100, cancel_share=0.1, seed=percent)
        theirs, mine = serve_split(split, stream), serve_ours(ours, with_policy(stream, SHARED))
        for name, served in (("split", theirs), ("ours", mine)):
            figures[f"p50_s_{name}_at_{percent}"] = percentile(served.all_s, 0.50)
            figures[f"p99_s_{name}_at_{percent}"] = percentile(served.all_s, 0.99)
            figures[f"drawn_{name}_at_{percent}"] = served.drawn
        figures[f"p99_ratio_at_{percent}"] = percentile(mine.all_s, 0.99) / percentile(theirs.all_s, 0.99)
        means = [statistics.mean(values) for values in mine.latencies_s.values()]
        figures[f"tenant_spread_at_{percent}"] = max(means) / min(means)
    return figures


def main() -> int:
    """Measure, tell, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", default="toon")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--stream", type=int, default=80, help="requests of each stream; 0 leaves the streams out")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    keep_freed_memory()  # as a frame service does; the others in this process have it, too
    machine, revision = machine_facts(), revision_facts()
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
    model = load_frame_model(load_pack(find_pack(arguments.pack, Installation.load().pack_folders)))
    adapters = {count: Adapters(model, count) for count in (1, 4, 16)}
    figures: dict[str, Any] = {
        "rows_story": story_rows(model, SHARED),
        "rows_story_exact": story_rows(model, EXACT),
        "rows_story_few_levels": story_rows(model, FEW),
    }
    figures |= closed_loop(model, adapters, arguments.rounds, console)
    if arguments.stream:
        figures |= open_loop(model, adapters[4], arguments.stream, console)
    targets: Sequence[Target] = TARGETS
    if torch.cuda.is_available():
        targets = (*TARGETS, *GPU_TARGETS)
        figures |= widths.measured(
            widths.KINDS,
            torch.device("cuda"),
            widths.WIDTHS,
            steps=widths.STEPS,
            rounds=widths.ROUNDS,
            characters=widths.CHARACTERS,
            console=console,
        )
    plan = {"rounds": arguments.rounds, "stream": arguments.stream, "threads": torch.get_num_threads(), "steps": STEPS}
    found = document(figures, targets=targets, machine=machine, revision=revision, date=date, plan=plan)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"frame-{date}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "frame.md").write_text(markdown(found), encoding="utf-8")
    console.print(table(found))
    print(json.dumps({"targets": found["targets"], "figures": figures, "passed": found["passed"]}))
    return 1 if arguments.check and not found["passed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
