"""The frame bench's arithmetic and its streams, without a network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from services.models.drawing import Sketch
from tests.bench.frame import serving, widths
from tests.bench.frame.__main__ import Enough, Plan
from tests.bench.frame.journal import Journal, OtherJournal
from tests.bench.frame.report import TARGETS, document, markdown, ratio
from tests.bench.frame.serving import serve_ours, serve_split
from tests.bench.frame.workload import Request, arriving

MACHINE = {"cpu": "a cpu", "usable_core_count": 2}


def requests(count: int, steps: int = 2, adapters: int = 2) -> list[Request]:
    sketch = Sketch(
        description="",
        seed=0,
        width_px=64,
        height_px=64,
        steps=steps,
        text_guidance=7.0,
        image_guidance=3.5,
    )
    return [Request(n, sketch, n % adapters, tenant=f"t{n % 2}") for n in range(count)]


def test_a_ratio_is_of_rounds_that_belong_together() -> None:
    found = ratio([2.0, 40.0, 6.0], [1.0, 20.0, 3.0])
    assert (found.median, found.low, found.high, found.rounds) == (2.0, 2.0, 2.0, 3)
    wide = ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert wide.low < wide.median == 3.0 < wide.high
    with pytest.raises(ValueError, match="do not pair"):
        ratio([1.0], [1.0, 2.0])


def test_every_target_has_a_verdict_and_one_miss_is_a_miss() -> None:
    good: dict[str, Any] = {t.figure: t.bound for t in TARGETS}
    plan, facts = {"rounds": 3}, {"machine": MACHINE, "revision": {"commit": "c"}, "date": "2026-01-01"}
    assert document(good, plan=plan, **facts)["passed"]  # type: ignore[arg-type]
    for target in TARGETS:
        worse = target.bound * (1.01 if target.at_most else 0.99)
        found = document({**good, target.figure: {"median": worse, "low": 0.0, "high": 9.0}}, plan=plan, **facts)  # type: ignore[arg-type]
        assert not found["passed"]
        assert [t["figure"] for t in found["targets"] if not t["passed"]] == [target.figure]
        assert markdown(found).count("missed") == 1
    without = {name: value for name, value in good.items() if name != "rows_story"}
    found = document(without, plan=plan, **facts)  # type: ignore[arg-type]
    assert not found["passed"]
    assert "not taken" in markdown(found)


def test_a_stream_is_the_same_again_and_as_dense_as_asked_for() -> None:
    first, again = (arriving(requests(400), 5.0, cancel_share=0.1, seed=1) for _ in range(2))
    assert first == again
    assert 60.0 < first[-1].arrives_s < 100.0
    assert 20 < sum(request.leaves_s < float("inf") for request in first) < 60
    assert all(request.leaves_s >= request.arrives_s for request in first)


class Clock:
    """Every piece of work takes as long as it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.next_s = 0.0
        monkeypatch.setattr(serving, "_timed", self.timed)

    def timed(self, work: Any) -> float:
        self.next_s = 0.0
        work()
        return self.next_s


class Batches:
    """Draws a batch in a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.drawn: list[list[int]] = []

    def draw(self, batch: list[Request], done: object) -> None:
        self.drawn.append([request.number for request in batch])
        self.clock.next_s = 1.0


def at(request: Request, arrives_s: float, leaves_s: float = float("inf")) -> Request:
    from dataclasses import replace

    return replace(request, arrives_s=arrives_s, leaves_s=leaves_s)


def test_batches_take_the_first_ones_character_and_skip_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    some = requests(5)
    stream = [at(some[0], 0.0), at(some[1], 0.5), at(some[2], 0.6), at(some[3], 0.7, leaves_s=0.9), at(some[4], 0.8)]
    system = Batches(Clock(monkeypatch))
    served = serve_split(system, stream)  # type: ignore[arg-type]
    assert system.drawn == [[0], [1], [2, 4]]
    assert sorted(served.all_s) == pytest.approx([1.0, 1.5, 2.2, 2.4])
    assert served.drawn == 4


class Steps:
    """A drawing that counts its steps; a step of everybody takes a tenth of a second."""

    model = None

    class Drawing:
        def __init__(self, steps: int) -> None:
            self.left = steps

        @property
        def finished(self) -> bool:
            return self.left == 0

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = clock
        self.together: list[int] = []
        monkeypatch.setattr(serving, "finish", lambda model, drawing: None)

    def begin(self, *batch: Request) -> list[Steps.Drawing]:
        return [self.Drawing(request.sketch.steps) for request in batch]

    def step(self, drawings: list[Steps.Drawing]) -> int:
        self.together.append(len(drawings))
        for drawing in drawings:
            drawing.left -= 1
        self.clock.next_s = 0.1
        return len(drawings)


def test_the_engine_lets_newcomers_join_and_drops_who_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    some = requests(3, steps=4)
    stream = [at(some[0], 0.0), at(some[1], 0.15), at(some[2], 0.15, leaves_s=0.35)]
    system = Steps(Clock(monkeypatch), monkeypatch)
    served = serve_ours(system, stream)  # type: ignore[arg-type]
    assert system.together == [1, 1, 3, 3, 1, 1]
    assert served.drawn == 2
    assert sorted(served.all_s) == pytest.approx([0.4, 0.45])


def test_what_a_gpu_is_measured_with_runs_on_a_processor() -> None:
    console = Console(file=io.StringIO())
    figures = widths.measured(["tiny"], torch.device("cpu"), [1, 2], steps=2, rounds=1, characters=2, console=console)
    best = figures["tiny_images_per_s_mixed"]
    assert best == max(figures[f"tiny_mixed_as_it_is_at_{width}_images_per_s"] for width in (1, 2))
    assert all(figures[f"tiny_{kind}_as_it_is_at_2_of_peak"] > 0 for kind in ("mixed", "plain"))
    assert figures["tiny_diffusers_images_per_s"] > 0


def test_a_journal_goes_on_where_it_stopped(tmp_path: Path) -> None:
    about, path = {"sources": "a"}, tmp_path / "deep" / "frame.jsonl"
    journal = Journal(path, about)
    journal.add("one", {"ours": 1.0, "theirs": 2.0})
    journal.note("one", {"rows": 3})
    journal.add("two", {"ours": 5.0})
    with path.open("a") as file:
        file.write('{"part": "one", "rou')  # killed while it wrote
    again = Journal(path, about)
    again.add("one", {"ours": 3.0, "theirs": 4.0})
    last = Journal(path, about)
    assert last.columns("one") == {"ours": [1.0, 3.0], "theirs": [2.0, 4.0]}
    assert (last.facts("one"), last.columns("two"), last.columns("none")) == ({"rows": 3}, {"ours": [5.0]}, {})
    with pytest.raises(OtherJournal, match="remove it"):
        Journal(path, {"sources": "b"})


def test_rounds_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    ran: list[str] = []

    class System:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, wanted: Any) -> str:
            ran.append(self.name)
            return self.name

    systems: Any = {name: (System(name), []) for name in "ab"}
    path = tmp_path / "frame.jsonl"

    def plan(until_s: float = float("inf")) -> Plan:
        return Plan(Journal(path, {}), Console(file=io.StringIO()), until_s)

    first = plan().rounds("part", systems, 2, lambda drawn: {"drew": sorted(drawn)})
    assert ran == ["a", "b", "a", "b", "b", "a"], "warm, and then in turns"
    assert [len(values) for values in first.values()] == [2, 2]
    ran.clear()
    assert plan(until_s=0.0).rounds("part", systems, 2) == first
    assert plan().journal.facts("part") == {"drew": ["a", "b"]}
    assert not ran
    with pytest.raises(Enough):
        plan(until_s=0.0).rounds("part", systems, 3)
    third = plan().rounds("part", systems, 3)
    assert [values[:2] for values in third.values()] == list(first.values())
    assert ran == ["a", "b", "a", "b"]
