"""Which checkpoint of a job to publish when nobody chooses, and why, from what its probes showed.

A later checkpoint has learned more of somebody new and forgotten more of everybody else, so neither the last one nor
the best likeness is always right. Pure; knows figures by name and nothing of how they were measured.

Figures are shares from 0 to 1, of a checkpoint's probes (`training.probes` writes them):

* `recognised`: of the figures that should be the new character, how much of their look is right;
* `look_alike`: of them, those that look more like one of the old cast;
* `kept`: how much of the old cast's look is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RECOGNISED, LOOK_ALIKE, KEPT = "recognised", "look_alike", "kept"
MOST_FORGOTTEN = 0.05  # of the old cast's look that a checkpoint may lose before it counts against it
_FORGETTING_WEIGHT = 2.0  # what is lost beyond that counts double: it is lost to every story
_LOOK_ALIKE_WEIGHT = 0.5
_NEARLY = 0.02  # of two checkpoints so near each other the earlier one is taken


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One checkpoint with the figures of its probes."""

    step: int
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """The checkpoint to publish, and a sentence on why."""

    step: int
    why: str


def forgotten(measured: Measured, before: Measured) -> float:
    """How much of the old cast's look a checkpoint has lost; below zero where it gained."""
    return before.figures[KEPT] - measured.figures[KEPT]


def suggestion(checkpoints: Sequence[Measured], baseline: Mapping[str, float]) -> Suggestion | None:
    """The one to publish; None where there is nothing to publish. `baseline` was measured before the first step.

    Of checkpoints that were probed the best by what they recognise less what they confuse and have forgotten since
    before the first step, or since the first of them where nothing is known of before; the earlier of two that are
    nearly as good. Without probes the last one.
    """
    if not checkpoints:
        return None
    ordered = sorted(checkpoints, key=lambda one: one.step)
    learned = [one for one in ordered if {RECOGNISED, LOOK_ALIKE, KEPT} <= one.figures.keys()]
    if not learned:
        return Suggestion(step=ordered[-1].step, why="It is the last one; nothing was measured on any.")
    before = Measured(step=0, figures=baseline) if KEPT in baseline else learned[0]
    best = max(_worth(one, before) for one in learned)
    chosen = next(one for one in learned if _worth(one, before) >= best - _NEARLY)
    return Suggestion(step=chosen.step, why=_why(chosen, learned, before))


def _worth(measured: Measured, before: Measured) -> float:
    excess = max(0.0, forgotten(measured, before) - MOST_FORGOTTEN)
    confused = measured.figures[LOOK_ALIKE]
    return measured.figures[RECOGNISED] - _LOOK_ALIKE_WEIGHT * confused - _FORGETTING_WEIGHT * excess


def _why(chosen: Measured, learned: Sequence[Measured], before: Measured) -> str:
    lost = forgotten(chosen, before)
    told = f"{chosen.figures[RECOGNISED]:.0%} of the new character's look is right in its probes"
    if chosen is before:
        told += "; what the old cast has lost by then was not measured"
    else:
        since = f" since step {before.step}" if before.step else ""
        told += f", and the old cast {f'has lost {lost:.0%} of theirs' if lost > 0.005 else 'lost nothing'}{since}"
    last = learned[-1]
    if chosen is last:
        return f"{told}. It is the last one."
    if forgotten(last, before) > max(lost, MOST_FORGOTTEN):
        return f"{told}. Later ones forget more: {forgotten(last, before):.0%} at step {last.step}."
    if last.figures[LOOK_ALIKE] > chosen.figures[LOOK_ALIKE]:
        return f"{told}. Later ones are more easily taken for somebody of the old cast."
    return f"{told}. Later ones are no better."
