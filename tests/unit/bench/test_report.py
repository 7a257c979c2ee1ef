"""A report says what was measured, in figures that can be compared with those of another run."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from tests.bench.report import (
    GIB,
    TARGETS,
    CallTimings,
    Measurements,
    MemoryUse,
    StoryTiming,
    figures,
    passed,
    percentile,
    report,
    table,
)

MACHINE = {"cpu": "An abacus", "usable_core_count": 2, "memory_gib": 8.0, "load_before": 0.1}
REVISION = {"commit": "0123456789abcdef", "is_dirty": True}


def story(total_s: float, frame_s: tuple[float, ...] = (2.0, 3.0)) -> StoryTiming:
    return StoryTiming(
        frame_count=len(frame_s), first_caption_s=0.5, first_frame_s=frame_s[0], total_s=total_s, frame_s=frame_s
    )


@pytest.fixture
def measured() -> Measurements:
    return Measurements(
        cold_start_s=30.0,
        first_story=story(20.0),
        single_stories=(story(9.0), story(30.0), story(12.0)),
        concurrent_stories=(story(40.0), story(44.0)),
        concurrent_wall_s=44.0,
        memory=(
            MemoryUse(when="ready", total_bytes=2 * GIB, process_count=9),
            MemoryUse(when="after the stories", total_bytes=int(2.5 * GIB), process_count=9),
        ),
        calls=(
            CallTimings(name="get_story_grpc", call_s=tuple(i / 1000 for i in range(1, 101))),
            CallTimings(name="get_story_http", call_s=(0.004,) * 100),
        ),
    )


def make(measured: Measurements) -> dict:
    return report(measured, machine=MACHINE, revision=REVISION, date="2026-11-20T120000Z", quick=False)


def test_figures_are_medians_maxima_and_percentiles(measured):
    found = figures(measured)
    assert found["single_story_s"] == 12.0
    assert found["concurrent_story_s"] == 22.0
    assert found["concurrent_latency_s"] == 42.0
    assert found["memory_gib"] == 2.5
    assert found["last_to_first_frame_ratio"] == 1.5
    assert (found["get_story_grpc_p50_ms"], found["get_story_grpc_p95_ms"]) == (50.0, 95.0)


@pytest.mark.parametrize(
    ("ratio", "value"), [(0.0, 1.0), (0.25, 1.0), (0.26, 2.0), (0.5, 2.0), (0.99, 4.0), (1.0, 4.0)]
)
def test_a_percentile_is_a_value_that_was_measured(ratio, value):
    assert percentile([4.0, 1.0, 3.0, 2.0], ratio) == value


def test_there_is_no_percentile_of_nothing():
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)


def test_every_target_is_held_to_a_figure(measured):
    document = make(measured)
    judged = {target["figure"]: target["passed"] for target in document["targets"]}
    assert judged == {
        "cold_start_s": True,
        "memory_gib": True,
        "single_story_s": True,
        "get_story_grpc_p50_ms": False,
        "get_story_http_p50_ms": True,
    }
    assert {target.figure for target in TARGETS} == judged.keys()
    assert not passed(document)


def test_a_target_that_is_just_met_is_met(measured):
    fast = replace(
        measured,
        cold_start_s=45.0,
        calls=tuple(CallTimings(name=calls.name, call_s=(0.005,)) for calls in measured.calls),
    )
    assert passed(make(fast))


def test_the_report_is_json_with_machine_revision_targets_and_raw_figures(measured):
    document = json.loads(json.dumps(make(measured)))
    assert document.keys() == {
        "schema",
        "date",
        "revision",
        "machine",
        "quick",
        "figures",
        "targets",
        "measurements",
    }
    assert document["schema"] == "fabula.bench/1"
    assert document["machine"] == MACHINE
    assert document["revision"] == REVISION
    assert document["measurements"]["single_stories"][1]["total_s"] == 30.0
    assert len(document["measurements"]["calls"][0]["call_s"]) == 100
    for target in document["targets"]:
        assert target.keys() == {"figure", "at_most", "unit", "what", "value", "passed"}


def test_the_table_shows_every_figure_once(measured):
    console = Console(width=140, record=True, file=io.StringIO())
    document = make(measured)
    view = table(document)
    assert view.row_count == len(document["figures"])
    console.print(view)
    shown = console.export_text()
    assert "≤ 45 s" in shown
    assert "✗" in shown
    assert "0123456789ab + changes" in shown
