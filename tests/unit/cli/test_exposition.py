"""Prometheus' text format, as far as `status` reads it."""

from __future__ import annotations

from fabula_cli.exposition import read_exposition, summarize

PAGE = r"""# HELP story_x_total Things.
# TYPE story_x_total counter
story_x_total{state="a",text="quote \" and } brace"} 2.0
story_x_total{state="b"} 3
story_wait_seconds_bucket{le="+Inf"} 4
story_wait_seconds_sum 10
story_wait_seconds_count 4
story_wait_seconds_created 1.7e9
other_total 99
story_gauge NaN_is_not_here
this is no sample
"""


def test_samples_are_read_with_their_labels() -> None:
    samples = list(read_exposition(PAGE))
    assert samples[0].labels == {"state": "a", "text": r"quote \" and } brace"}
    assert samples[0].value == 2.0


def test_labels_are_added_up_and_histograms_become_means() -> None:
    assert summarize(read_exposition(PAGE), ("story_",)) == {"story_wait_seconds_mean": 2.5, "story_x_total": 5.0}


def test_a_histogram_without_observations_has_no_mean() -> None:
    assert summarize(read_exposition("a_seconds_sum 0\na_seconds_count 0\n"), ("a_",)) == {}
