"""Where a job goes from where it stands."""

from __future__ import annotations

import itertools

import pytest
from fabula.customization.v1 import job_pb2 as pb

from services.customization.states import (
    ENDED,
    NEXT,
    NEXT_ATTEMPT,
    OCCUPYING,
    End,
    State,
    after,
    before,
    wished,
)


def test_the_words_are_those_of_the_wire() -> None:
    told = {f"STATE_{state.value}" for state in State}
    assert told == set(pb.CustomizationJob.State.keys()) - {"STATE_UNSPECIFIED"}


def test_every_state_is_reached_from_the_first_and_comes_to_an_end() -> None:
    reached = {State.VALIDATING}
    while more := {to for state in reached for to in NEXT[state]} - reached:
        reached |= more
    assert reached == set(State)
    for state in State:
        assert state in ENDED or NEXT[state]


def test_before_is_next_read_backwards() -> None:
    for first, second in itertools.product(State, State):
        assert (first in before(second)) == (second in NEXT[first])


@pytest.mark.parametrize(
    ("state", "pause", "resume", "cancel"),
    [
        (State.VALIDATING, State.PAUSED, State.VALIDATING, State.CANCELLED),
        (State.QUEUED, State.PAUSED, State.QUEUED, State.CANCELLED),
        (State.PROVISIONING, State.PAUSING, State.PROVISIONING, State.CANCELLING),
        (State.RUNNING, State.PAUSING, State.RUNNING, State.CANCELLING),
        (State.PAUSING, State.PAUSING, None, State.CANCELLING),
        (State.PAUSED, State.PAUSED, State.QUEUED, State.CANCELLED),
        (State.CANCELLING, None, None, State.CANCELLING),
        (State.CANCELLED, None, None, State.CANCELLED),
        (State.FAILED, None, State.QUEUED, State.FAILED),
        (State.SUCCEEDED, None, None, State.SUCCEEDED),
    ],
)
def test_what_may_be_wished(state: State, pause: State | None, resume: State | None, cancel: State) -> None:
    assert (wished(state, "pause"), wished(state, "resume"), wished(state, "cancel")) == (pause, resume, cancel)
    for to in (pause, resume, cancel):
        assert to is None or to is state or to in NEXT[state], "a wish never takes a way that there is not"


SUCCEEDED, STOPPED = End(outcome="succeeded"), End(outcome="stopped")
FAILED, LOST = End(outcome="failed", reason="LOSS_NOT_FINITE", message="at step 3"), End(outcome="lost", message="-9")


@pytest.mark.parametrize(
    ("state", "end", "to"),
    [
        (State.RUNNING, SUCCEEDED, State.SUCCEEDED),
        (State.PROVISIONING, SUCCEEDED, State.SUCCEEDED),
        (State.RUNNING, FAILED, State.FAILED),
        (State.RUNNING, LOST, None),
        (State.PROVISIONING, LOST, None),
        (State.RUNNING, STOPPED, None),
        (State.PAUSING, STOPPED, State.PAUSED),
        (State.PAUSING, LOST, State.PAUSED),
        (State.PAUSING, SUCCEEDED, State.SUCCEEDED),
        (State.PAUSING, FAILED, State.FAILED),
        (State.CANCELLING, STOPPED, State.CANCELLED),
        (State.CANCELLING, LOST, State.CANCELLED),
        (State.CANCELLING, FAILED, State.CANCELLED),
        (State.CANCELLING, SUCCEEDED, State.CANCELLED),
    ],
)
def test_what_an_end_means(state: State, end: End, to: State | None) -> None:
    decision = after(state, end, crashes=1, crashes_max=3)
    assert decision.to is to
    assert to is None or to in NEXT[state]
    if to is State.FAILED:
        assert (decision.reason, decision.message) == ("LOSS_NOT_FINITE", "at step 3")


def test_a_process_that_dies_again_and_again_fails_the_job() -> None:
    assert after(State.RUNNING, LOST, crashes=3, crashes_max=3) == NEXT_ATTEMPT
    decision = after(State.RUNNING, LOST, crashes=4, crashes_max=3)
    assert (decision.to, decision.reason) == (State.FAILED, "TRAINING_CRASHED")
    assert "4 times" in decision.message
    assert "-9" in decision.message


def test_being_stopped_by_the_machine_is_no_crash() -> None:
    assert after(State.RUNNING, STOPPED, crashes=99, crashes_max=3) == NEXT_ATTEMPT


@pytest.mark.parametrize("state", sorted(set(State) - OCCUPYING))
def test_nobody_without_a_process_can_end(state: State) -> None:
    with pytest.raises(ValueError, match="no training process"):
        after(state, LOST, crashes=1, crashes_max=3)
