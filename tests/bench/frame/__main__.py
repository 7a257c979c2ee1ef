"""`make bench-frame`: the frame engine against what else draws story frames; a table, and one JSON object at the end.

    python -m tests.bench.frame                       30 paired rounds and five streams: more than an hour and a half
    python -m tests.bench.frame --until-minutes 60    stops then; the same command again goes on
    python -m tests.bench.frame --rounds 3            to see whether the bench works
    python -m tests.bench.frame --check               exit status 1 when a target is missed

Where there is a GPU, images a second at Stable Diffusion's sizes follow (`widths.py`).

Every round runs every system once on the same requests, in an order that turns from round to round, so that what the
machine does meanwhile hits all alike; figures are medians of the rounds' ratios. Each round is kept as it ends
(`journal.py`). The report goes to `tests/bench/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from tests.bench.frame.journal import Journal, OtherJournal, sources_digest
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


class Enough(Exception):
    """The time that was given is over; what was measured is kept."""


@dataclass
class Plan:
    """How much is run, and where it is kept."""

    journal: Journal
    console: Console
    until_s: float = float("inf")

    def check_time(self) -> None:
        """Raises Enough."""
        if time.monotonic() >= self.until_s:
            raise Enough

    def rounds(
        self,
        part: str,
        systems: dict[str, tuple[System, Sequence[Request]]],
        count: int,
        facts: Callable[[dict[str, Done]], dict[str, Any]] = lambda drawn: {},
    ) -> dict[str, list[float]]:
        """Seconds of each system, round by round; `facts` of what they drew in a round are noted."""
        missing = count - len(self.journal.rounds(part))
        if missing > 0:
            self.console.print(f"{part} …")
            self.check_time()
            for system, wanted in systems.values():
                system.run(wanted)  # warm: tables filled
        names = list(systems)
        for number in range(count - missing, count):
            self.check_time()
            self.console.print(f"  round {number + 1} of {count}")
            seconds, drawn = {}, {}
            for name in names[number % len(names) :] + names[: number % len(names)]:
                system, wanted = systems[name]
                start = time.perf_counter()
                drawn[name] = system.run(wanted)
                seconds[name] = time.perf_counter() - start
            if number == 0:
                self.journal.note(part, facts(drawn))
            self.journal.add(part, {name: seconds[name] for name in names})
        return {name: values[:count] for name, values in self.journal.columns(part).items()}


def with_policy(wanted: Sequence[Request], policy: ReferencePolicy) -> list[Request]:
    """The same requests under another policy."""
    return [replace(request, sketch=replace(request.sketch, policy=policy)) for request in wanted]


def changed(wanted: Sequence[Request], **sketch: Any) -> list[Request]:
    """The same requests, with something else in their sketches."""
    return [replace(request, sketch=replace(request.sketch, **sketch)) for request in wanted]


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


def closed_loop(model: FrameModel, adapters: dict[int, Adapters], count: int, plan: Plan) -> dict[str, Any]:
    """One story, eight at once, many characters, thirty-two."""
    return {
        **one_frame(model, adapters[1], count, plan),
        **eight_frames(model, adapters[4], count, plan),
        **sixteen_characters(model, adapters[16], count, plan),
        **thirty_two_frames(model, adapters[16], max(1, count // 6), plan),
    }


def one_frame(model: FrameModel, none: Adapters, count: int, plan: Plan) -> dict[str, Any]:
    """A frame at a time: every mode against the published schedule."""
    single = requests(model, 1, adapters=0, steps=(STEPS,))
    published, ours = Published(model), Ours(model, none)
    alone: dict[str, tuple[System, Sequence[Request]]] = {
        "published": (published, single),
        "published_shared": (published, with_policy(single, SHARED)),
        "exact": (ours, single),
        "shared": (ours, with_policy(single, SHARED)),
        "few_levels": (ours, with_policy(single, FEW)),
        "deep": (ours, changed(single, deep_every=2)),
        "interval": (ours, changed(single, guidance_interval=(0.2, 0.8))),
        "strict": (Ours(model, none, "strict", strict=True), single),
    }
    modes = [name for name in alone if not name.startswith("published")]

    def facts(drawn: dict[str, Done]) -> dict[str, Any]:
        return {
            **{f"one_frame_{mode}_rows": drawn[mode].rows for mode in ("published", *modes)},
            "pixel_difference_exact": difference(drawn["exact"], drawn["published"]),
            "pixel_difference_shared": difference(drawn["shared"], drawn["published_shared"]),
        }

    part = "one frame"
    seconds = plan.rounds(part, alone, count, facts)
    return {
        **plan.journal.facts(part),
        "one_story_speedup": asdict(ratio(seconds["published_shared"], seconds["shared"])),
        **{f"one_frame_{mode}_vs_published": asdict(ratio(seconds["published"], seconds[mode])) for mode in modes},
        **{f"one_frame_{mode}_s": statistics.median(seconds[mode]) for mode in ("published", *modes)},
    }


def eight_frames(model: FrameModel, four: Adapters, count: int, plan: Plan) -> dict[str, Any]:
    """Eight frames of four characters at once."""
    mixed = requests(model, 8, adapters=4, steps=(STEPS,), seed=1)
    shared = with_policy(mixed, SHARED)
    ours = Ours(model, four)
    held: dict[str, tuple[System, Sequence[Request]]] = {
        "split_unmerged": (Split(model, four, merged=False), mixed),
        "split_merged": (Split(model, four, merged=True), mixed),
        "split_ours": (SplitOurs(model, four), shared),
        "peft": (Ours(model, four, "peft"), shared),
        "shared": (ours, shared),
    }

    def facts(drawn: dict[str, Done]) -> dict[str, Any]:
        out: dict[str, Any] = {f"rows_per_frame_{mode}": one.rows / len(mixed) for mode, one in drawn.items()}
        if "split_ours" in drawn:
            out["pixel_difference_mixed"] = difference(drawn["shared"], drawn["split_ours"])
        if "exact" in drawn:
            out["pixel_difference_mixed_exact"] = difference(drawn["exact"], drawn["split_merged"])
        return out

    seconds = plan.rounds("eight frames", held, count, facts)
    figures: dict[str, Any] = {
        **plan.journal.facts("eight frames"),
        **{f"frames_per_s_{mode}": len(mixed) / statistics.median(taken) for mode, taken in seconds.items()},
        **{f"mixed_vs_{name}": asdict(ratio(seconds[name], seconds["shared"])) for name in held if name != "shared"},
        # Where the gain over batches by character comes from, each step on top of the one before.
        "gain_of_rows": asdict(ratio(seconds["split_merged"], seconds["split_ours"])),
        "gain_of_one_batch": asdict(ratio(seconds["split_ours"], seconds["shared"])),
    }
    figures["mixed_vs_peft_4"] = figures.pop("mixed_vs_peft")
    modes: dict[str, tuple[System, Sequence[Request]]] = {
        "split_merged": held["split_merged"],
        "exact": (ours, mixed),
        "shared": held["shared"],
        "few_levels": (ours, with_policy(mixed, FEW)),
        "strict": (Ours(model, four, "strict", strict=True), shared),
    }
    part = "eight frames, each mode"  # held to nothing: fewer rounds
    seconds = plan.rounds(part, modes, max(1, count // 3), facts)
    figures |= plan.journal.facts(part)
    for mode in ("exact", "few_levels", "strict"):
        figures[f"frames_per_s_{mode}"] = len(mixed) / statistics.median(seconds[mode])
        figures[f"mixed_{mode}_vs_split_merged"] = asdict(ratio(seconds["split_merged"], seconds[mode]))
    figures["mixed_strict_vs_shared"] = asdict(ratio(seconds["shared"], seconds["strict"]))
    part = "eight frames, one at a time"  # slow, and far from anything else
    slowly: dict[str, tuple[System, Sequence[Request]]] = {
        "published": (Published(model), mixed),
        "shared": held["shared"],
    }
    seconds = plan.rounds(part, slowly, max(1, count // 6), facts)
    figures |= plan.journal.facts(part)
    figures["mixed_vs_published"] = asdict(ratio(seconds["published"], seconds["shared"]))
    figures["frames_per_s_published"] = len(mixed) / statistics.median(seconds["published"])
    return figures


def sixteen_characters(model: FrameModel, sixteen: Adapters, count: int, plan: Plan) -> dict[str, Any]:
    """Sixteen frames at once, each of a character of its own, against sixteen of one."""
    many = requests(model, 16, adapters=16, steps=(STEPS,), seed=2, policy=SHARED)
    one = [replace(request, adapter=0) for request in many]
    seconds = plan.rounds(
        "sixteen characters",
        {
            "sixteen": (Ours(model, sixteen, together=16), many),
            "sixteen_unmerged": (Ours(model, sixteen, merges=False, together=16), many),
            "one_unmerged": (Ours(model, sixteen, merges=False, together=16), one),
            "peft": (Ours(model, sixteen, "peft", together=16), many),
        },
        count,
    )
    merged: dict[str, tuple[System, Sequence[Request]]] = {
        "sixteen": (Ours(model, sixteen, together=16), many),
        "one": (Ours(model, sixteen, together=16), one),
    }
    both = plan.rounds("sixteen characters, merged", merged, max(1, count // 3))
    return {
        "adapters_16_vs_1_unmerged": asdict(ratio(seconds["one_unmerged"], seconds["sixteen_unmerged"])),
        "adapters_16_vs_1_merged": asdict(ratio(both["one"], both["sixteen"])),
        "adapters_16_merged_vs_unmerged": asdict(ratio(seconds["sixteen_unmerged"], seconds["sixteen"])),
        "mixed_vs_peft_16": asdict(ratio(seconds["peft"], seconds["sixteen"])),
    }


def thirty_two_frames(model: FrameModel, sixteen: Adapters, count: int, plan: Plan) -> dict[str, Any]:
    """Thirty-two frames at once, sixteen characters of unlike popularity."""
    crowd = requests(model, 32, adapters=16, steps=(STEPS,), seed=4)
    systems: dict[str, tuple[System, Sequence[Request]]] = {
        "split_merged": (Split(model, sixteen, merged=True), crowd),
        "shared": (Ours(model, sixteen), with_policy(crowd, SHARED)),
    }
    seconds = plan.rounds("thirty-two frames", systems, count)
    return {
        "crowd_vs_split_merged": asdict(ratio(seconds["split_merged"], seconds["shared"])),
        "frames_per_s_crowd": len(crowd) / statistics.median(seconds["shared"]),
    }


def open_loop(model: FrameModel, four: Adapters, count: int, times: int, plan: Plan) -> dict[str, Any]:
    """Poisson streams at 50, 80 and 120 % of what batches by character can take; a tenth gives up.

    That at 80 %, which is held to something, runs `times` times; the others show what is below and above.
    """
    split, ours = Split(model, four, merged=True), Ours(model, four)
    wanted = requests(model, count, adapters=4, steps=(4, 8), seed=3)
    turns = {50: 1, 80: times, 120: 1}
    missing = any(len(plan.journal.rounds(_stream(percent))) < wished for percent, wished in turns.items())
    if "capacity" not in plan.journal.facts("streams") and missing:
        plan.check_time()
        plan.console.print("what the batches can take …")
        split.run(wanted[: count // 4])  # warm, as the other one will be
        start = time.perf_counter()
        split.run(wanted)
        plan.journal.note("streams", {"capacity": len(wanted) / (time.perf_counter() - start)})
    capacity = plan.journal.facts("streams")["capacity"]
    if missing:
        ours.run(with_policy(wanted[:8], SHARED))  # the tables
    figures: dict[str, Any] = {"split_capacity_frames_per_s": capacity}
    for percent, wished in turns.items():
        for turn in range(len(plan.journal.rounds(_stream(percent))), wished):
            plan.check_time()
            plan.console.print(f"{_stream(percent)}, {turn + 1} of {wished} …")
            stream = arriving(wanted, capacity * percent / 100, cancel_share=0.1, seed=1000 * turn + percent)
            runs = {
                "split": lambda stream=stream: serve_split(split, stream),
                "ours": lambda stream=stream: serve_ours(ours, with_policy(stream, SHARED)),
            }
            served = {name: runs[name]() for name in (runs if turn % 2 == 0 else reversed(runs))}
            means = [statistics.mean(values) for values in served["ours"].latencies_s.values()]
            measured = {f"tenant_spread_at_{percent}": max(means) / min(means)}
            for name, one in served.items():
                for quantile in (0.5, 0.99):
                    measured[f"p{quantile * 100:g}_s_{name}_at_{percent}"] = percentile(one.all_s, quantile)
                measured[f"drawn_{name}_at_{percent}"] = one.drawn
            plan.journal.add(_stream(percent), measured)
    for percent in turns:
        columns = plan.journal.columns(_stream(percent))
        pair = (columns[f"p99_s_ours_at_{percent}"], columns[f"p99_s_split_at_{percent}"])
        figures[f"p99_ratio_at_{percent}"] = asdict(ratio(*pair))
        figures |= {name: statistics.median(values) for name, values in columns.items()}
    return figures


def _stream(percent: int) -> str:
    return f"a stream at {percent} % of the batches' capacity"


def main() -> int:
    """Measure, tell, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", default="toon")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--stream", type=int, default=60, help="requests of each stream; 0 leaves the streams out")
    parser.add_argument("--streams", type=int, default=3, help="at 80 %%, the order of the two turned about")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--until-minutes", type=float, help="begin nothing after so many; the same command goes on")
    parser.add_argument(
        "--journal", type=Path, default=Path("bench-results") / "frame.jsonl", help="of what is measured"
    )
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
    about = {
        "sources": sources_digest(),
        "pack": model.manifest.digest,
        "machine": f"{machine['cpu']}, {torch.get_num_threads()} threads",
        "stream": arguments.stream,
    }
    minutes = arguments.until_minutes
    until_s = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    try:
        plan = Plan(Journal(arguments.journal, about), console, until_s)
    except OtherJournal as error:
        parser.error(str(error))
    try:
        figures |= closed_loop(model, adapters, arguments.rounds, plan)
        if arguments.stream:
            figures |= open_loop(model, adapters[4], arguments.stream, arguments.streams, plan)
    except Enough:
        console.print(f"enough for now; the same command goes on with what is in {arguments.journal}")
        return 0
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
    run = {
        "rounds": arguments.rounds,
        "stream": arguments.stream,
        "streams": arguments.streams,
        "threads": torch.get_num_threads(),
        "steps": STEPS,
    }
    found = document(figures, targets=targets, machine=machine, revision=revision, date=date, plan=run)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"frame-{date}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "frame.md").write_text(markdown(found), encoding="utf-8")
    console.print(table(found))
    print(json.dumps({"targets": found["targets"], "figures": figures, "passed": found["passed"]}))
    return 1 if arguments.check and not found["passed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
