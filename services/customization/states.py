"""Decides where a job goes from where it stands. Pure: no clock, no I/O.

                 ┌──────────────────────── resume ────────────────────────┐
                 ▼                                                        │
    VALIDATING → QUEUED → PROVISIONING → RUNNING → SUCCEEDED     PAUSED, FAILED
                                            ├─ pause  → PAUSING    → PAUSED
                                            ├─ cancel → CANCELLING → CANCELLED
                                            └─ crash: stays, with the next attempt

An attempt is a training process. Its end is read from what it told last, or from its exit status, and a process that
ended without a word is started again from its last complete checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class State(StrEnum):
    """Where a job stands; the same words as in the proto, without its prefix."""

    VALIDATING = "VALIDATING"
    QUEUED = "QUEUED"
    PROVISIONING = "PROVISIONING"
    RUNNING = "RUNNING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"
    SUCCEEDED = "SUCCEEDED"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself or by waiting."""
        return self in ENDED

    @property
    def occupies(self) -> bool:
        """Whether it has, or may have, a training process."""
        return self in OCCUPYING


ENDED = frozenset({State.CANCELLED, State.FAILED, State.SUCCEEDED})
OCCUPYING = frozenset({State.PROVISIONING, State.RUNNING, State.PAUSING, State.CANCELLING})

NEXT: dict[State, frozenset[State]] = {
    State.VALIDATING: frozenset({State.QUEUED, State.PAUSED, State.CANCELLED, State.FAILED}),
    State.QUEUED: frozenset({State.PROVISIONING, State.PAUSED, State.CANCELLED, State.FAILED}),
    State.PROVISIONING: frozenset(
        {State.RUNNING, State.PAUSING, State.CANCELLING, State.FAILED, State.SUCCEEDED}  # a short run ends unseen
    ),
    State.RUNNING: frozenset({State.PAUSING, State.CANCELLING, State.FAILED, State.SUCCEEDED}),
    State.PAUSING: frozenset({State.PAUSED, State.CANCELLING, State.FAILED, State.SUCCEEDED}),
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    State.CANCELLING: frozenset({State.CANCELLED}),
    State.CANCELLED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.SUCCEEDED: frozenset(),
}


def before(to: State) -> frozenset[State]:
    """The states from which a job may go to this one."""
    return frozenset(state for state, following in NEXT.items() if to in following)


Wish = Literal["pause", "resume", "cancel"]
Outcome = Literal["succeeded", "stopped", "failed", "lost"]

_WISHES: dict[Wish, dict[State, State]] = {
    "pause": {
        State.VALIDATING: State.PAUSED,
        State.QUEUED: State.PAUSED,
        State.PROVISIONING: State.PAUSING,
        State.RUNNING: State.PAUSING,
        State.PAUSING: State.PAUSING,
        State.PAUSED: State.PAUSED,
    },
    "resume": {
        State.VALIDATING: State.VALIDATING,
        State.QUEUED: State.QUEUED,
        State.PROVISIONING: State.PROVISIONING,
        State.RUNNING: State.RUNNING,
        State.PAUSED: State.QUEUED,
        State.FAILED: State.QUEUED,
    },
    "cancel": {
        State.VALIDATING: State.CANCELLED,
        State.QUEUED: State.CANCELLED,
        State.PROVISIONING: State.CANCELLING,
        State.RUNNING: State.CANCELLING,
        State.PAUSING: State.CANCELLING,
        State.PAUSED: State.CANCELLED,
        State.CANCELLING: State.CANCELLING,
        State.CANCELLED: State.CANCELLED,
        State.FAILED: State.FAILED,
        State.SUCCEEDED: State.SUCCEEDED,
    },
}


def wished(state: State, wish: Wish) -> State | None:
    """Where somebody's wish takes a job; the same state when there is nothing to do, None when it cannot be granted."""
    return _WISHES[wish].get(state)


@dataclass(frozen=True, kw_only=True)
class End:
    """How a training process ended. `lost` is one that said nothing: it crashed, or was killed."""

    outcome: Outcome
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What follows from an end: a new state, or the next attempt in the same one."""

    to: State | None
    reason: str = ""
    message: str = ""


NEXT_ATTEMPT = Decision(to=None)


def after(state: State, end: End, *, crashes: int, crashes_max: int) -> Decision:
    """What an end means to a job in this state.

    `crashes` are those in a row without a step between them, this one included. Raises ValueError for a job that has no
    training process.
    """
    if not state.occupies:
        raise ValueError(f"a job that is {state} has no training process")
    if state is State.CANCELLING:
        return Decision(to=State.CANCELLED)
    if end.outcome == "succeeded":
        return Decision(to=State.SUCCEEDED)
    if end.outcome == "failed":
        return Decision(to=State.FAILED, reason=end.reason, message=end.message)
    if state is State.PAUSING:
        return Decision(to=State.PAUSED)
    if end.outcome == "lost" and crashes > crashes_max:
        return Decision(
            to=State.FAILED,
            reason="TRAINING_CRASHED",
            message=f"the training process ended {crashes} times in a row without a step: {end.message}",
        )
    return NEXT_ATTEMPT  # also one that was stopped by somebody else: the machine goes down, the service comes back
