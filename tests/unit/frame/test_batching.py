"""Who steps together: nobody starves, nothing unlike shares a forward."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.frame.batching import Candidate, choose


def candidate(kind: str = "a", rows: int = 5, last_turn: int = -1, arrival: int = 0) -> Candidate:
    return Candidate(kind=kind, row_count=rows, last_turn=last_turn, arrival=arrival)


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        kind=st.sampled_from("ab"),
        row_count=st.integers(1, 12),
        last_turn=st.integers(-1, 5),
        arrival=st.integers(0, 99),
    ),
    max_size=12,
)


def test_nobody_waiting_means_nobody_steps() -> None:
    assert choose([], 64) == ()


def test_equals_step_together_in_order_of_arrival() -> None:
    assert choose([candidate(arrival=2), candidate(arrival=0), candidate(arrival=1)], 64) == (1, 2, 0)


def test_unlike_sizes_take_turns() -> None:
    assert choose([candidate("a", last_turn=3), candidate("b", last_turn=2)], 64) == (1,)


def test_one_that_is_larger_than_the_limit_steps_alone() -> None:
    assert choose([candidate(rows=99), candidate(rows=1, arrival=1)], 64) == (0,)


def test_a_small_one_fills_what_a_large_one_leaves() -> None:
    crowd = [candidate(rows=6), candidate(rows=6, arrival=1), candidate(rows=2, arrival=2)]
    assert choose(crowd, 8) == (0, 2)


@given(CANDIDATES, st.integers(1, 30))
def test_a_batch_is_of_one_kind_and_within_the_limit(candidates: list[Candidate], max_rows: int) -> None:
    chosen = choose(candidates, max_rows)
    assert len(set(chosen)) == len(chosen)
    assert bool(chosen) == bool(candidates)
    assert len({candidates[i].kind for i in chosen}) <= 1
    assert len(chosen) == 1 or sum(candidates[i].row_count for i in chosen) <= max_rows


@given(CANDIDATES, st.integers(1, 30))
def test_the_longest_waiting_always_steps(candidates: list[Candidate], max_rows: int) -> None:
    chosen = choose(candidates, max_rows)
    if candidates:
        first = min(candidates, key=lambda c: (c.last_turn, c.arrival))
        assert first in [candidates[i] for i in chosen]


@given(CANDIDATES.filter(bool), st.integers(1, 30))
def test_everybody_steps_within_as_many_turns_as_there_are_drawings(crowd: list[Candidate], max_rows: int) -> None:
    stepped: set[int] = set()
    turns = {i: c.last_turn for i, c in enumerate(crowd)}
    for turn in range(100, 100 + len(crowd)):
        now = [
            Candidate(kind=c.kind, row_count=c.row_count, last_turn=turns[i], arrival=i) for i, c in enumerate(crowd)
        ]
        for i in choose(now, max_rows):
            turns[i] = turn
            stepped.add(i)
    assert stepped == set(range(len(crowd)))
