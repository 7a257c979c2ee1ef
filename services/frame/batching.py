"""Chooses which drawings take the next denoising step together.

Pure: no clock, no network, no thread. Called before every step, so drawings join and leave between steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A drawing that could take a step."""

    kind: Hashable  # only equal kinds can share a forward: same networks, same size
    row_count: int  # what its step costs
    last_turn: int  # the turn in which it last took a step; -1 when never
    arrival: int  # its number in the order of arrival


def choose(candidates: Sequence[Candidate], max_rows: int) -> tuple[int, ...]:
    """Indices of the drawings that step now, longest-waiting first; empty only when there are no candidates.

    The one that has waited most turns always steps, alone if it is larger than `max_rows`, and those of its kind fill
    the rest in the same order. So no kind and no drawing can starve.
    """
    order = sorted(range(len(candidates)), key=lambda i: (candidates[i].last_turn, candidates[i].arrival))
    chosen: list[int] = []
    rows = 0
    for index in order:
        candidate = candidates[index]
        if chosen and (candidate.kind != candidates[chosen[0]].kind or rows + candidate.row_count > max_rows):
            continue
        chosen.append(index)
        rows += candidate.row_count
    return tuple(chosen)
