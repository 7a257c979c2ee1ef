"""What a failure means for a story."""

from __future__ import annotations

from collections import Counter
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import (
    DeadlineExceeded,
    DeadlineUnreachable,
    DescriptionTooLong,
    EngineDead,
    FabulaError,
    InstallationTokenInvalid,
    Internal,
    ObjectCorrupt,
    QueueFull,
    ReplicaLost,
    ResourceExhausted,
    StorageFull,
    Unavailable,
    every_error,
)
from services.story.retry import MOST_ATTEMPTS, GiveUp, TryAgain, decide

attempts = st.integers(1, 10_000)
chances = st.floats(0, 1)


def after(error: FabulaError, attempt: int = 1, repeats: int = 1, random: float = 0.5) -> TryAgain | GiveUp:
    return decide(error, attempt=attempt, repeats=repeats, first_s=0.5, most_s=10.0, random=random)


@given(attempts, chances)
@pytest.mark.parametrize("error", [Unavailable(), EngineDead(), StorageFull(), QueueFull(), InstallationTokenInvalid()])
def test_outages_are_waited_out_for_ever(error: FabulaError, attempt: int, random: float) -> None:
    decision = after(error, attempt, attempt, random)
    assert isinstance(decision, TryAgain)
    assert 0 < decision.after_s <= 10.0


@given(attempts, chances)
def test_a_service_that_says_when_is_not_asked_earlier(attempt: int, random: float) -> None:
    decision = after(QueueFull(retry_after_s=30.0), attempt, attempt, random)
    assert isinstance(decision, TryAgain)
    assert decision.after_s >= 30.0


@pytest.mark.parametrize("error", [DescriptionTooLong(), ObjectCorrupt(), ResourceExhausted("your quota is spent")])
def test_what_cannot_pass_fails_at_once(error: FabulaError) -> None:
    assert after(error) == GiveUp(error=error)


@pytest.mark.parametrize("error", [ReplicaLost(), DeadlineExceeded(), Internal()])
def test_what_may_be_the_requests_own_fault_is_tried_a_few_times(error: FabulaError) -> None:
    limit = MOST_ATTEMPTS[type(error)]
    assert all(isinstance(after(error, k, k), TryAgain) for k in range(1, limit))
    assert isinstance(after(error, limit, limit), GiveUp)
    # An outage before it does not count against the request.
    assert isinstance(after(error, attempt=500, repeats=1), TryAgain)


def test_a_request_that_takes_replicas_down_is_called_poison() -> None:
    decision = after(ReplicaLost("actor died"), 5, 5)
    assert isinstance(decision, GiveUp)
    assert decision.error.reason == "POISON_REQUEST"
    assert "actor died" in decision.error.message


def test_poison_is_found_though_each_death_is_followed_by_refusals() -> None:
    # As a story sees an engine that its request kills: lost with it, then refused until the next engine is up.
    repeats: Counter[str] = Counter()
    for attempt, error in enumerate(cycle([ReplicaLost(), EngineDead(), Unavailable(), EngineDead()]), start=1):
        repeats[error.reason] += 1
        decision = after(error, attempt, repeats[error.reason])
        if isinstance(decision, GiveUp):
            break
    assert isinstance(decision, GiveUp)
    assert decision.error.reason == "POISON_REQUEST"
    assert repeats["REPLICA_LOST"] == MOST_ATTEMPTS[ReplicaLost]


def test_a_blip_and_a_full_queue_do_not_show_but_an_outage_and_a_full_disk_do() -> None:
    def waiting(error: FabulaError, attempt: int) -> bool:
        decision = after(error, attempt, attempt)
        assert isinstance(decision, TryAgain)
        return decision.waiting

    assert not waiting(Unavailable(), 1)
    assert waiting(Unavailable(), 2)
    assert waiting(StorageFull(), 1)
    assert not waiting(QueueFull(), 50)


def test_every_error_of_the_tree_has_an_answer() -> None:
    for cls in every_error():
        for attempt in (1, 2, 5, 100):
            assert isinstance(after(cls(), attempt, attempt), TryAgain | GiveUp)


def test_a_deadline_that_could_not_be_met_waits_as_long_as_it_is_told() -> None:
    decision = after(DeadlineUnreachable(retry_after_s=30.0), 3, 3, 0.5)
    assert isinstance(decision, TryAgain)
    assert decision.after_s >= 30.0
    assert not decision.waiting
    assert isinstance(after(DeadlineUnreachable(), 1, 1, 0.5), GiveUp), "it would never be done in time"
