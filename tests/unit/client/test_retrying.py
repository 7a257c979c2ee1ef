"""Which calls are tried again, and when: plain data, no network."""

from __future__ import annotations

import pytest
from fabula_client import errors
from fabula_client.retrying import RetryPolicy, may_retry
from hypothesis import given
from hypothesis import strategies as st

EVERY_CLASS = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.ServerError)]


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_only_unavailable_and_advised_exhaustion_are_tried_again(cls: type[errors.ServerError]) -> None:
    assert may_retry(cls("no")) is (cls is errors.Unavailable)
    advised = cls("no", retry_after_s=1.0)
    assert may_retry(advised) is (cls in (errors.Unavailable, errors.ResourceExhausted))


@given(failures=st.integers(1, 60), jitter=st.floats(0, 1))
def test_pauses_grow_and_stay_bounded(failures: int, jitter: float) -> None:
    policy = RetryPolicy(first_pause_s=0.2, longest_pause_s=5.0)
    pause = policy.pause_s(failures, jitter)
    assert 0.1 <= pause <= 5.0
    assert policy.pause_s(failures + 1, jitter) >= pause


@given(asked=st.floats(0.01, 100), jitter=st.floats(0, 1), failures=st.integers(1, 9))
def test_a_pause_that_the_service_asks_for_is_never_shortened(asked: float, jitter: float, failures: int) -> None:
    assert RetryPolicy().pause_s(failures, jitter, asked) >= asked


def test_tries_end_with_their_number_and_with_the_deadline() -> None:
    policy = RetryPolicy(attempts=3, first_pause_s=1.0)
    error = errors.Unavailable("away")
    assert policy.next_pause_s(error, 2, 0.0, left_s=60.0) == 2.0
    assert policy.next_pause_s(error, 3, 0.0, left_s=60.0) is None
    assert policy.next_pause_s(error, 2, 0.0, left_s=1.9) is None
    assert policy.next_pause_s(errors.Internal("bug"), 1, 0.0, left_s=60.0) is None


def test_a_policy_that_makes_no_sense_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="attempts"):
        RetryPolicy(attempts=0)
    with pytest.raises(ValueError, match="first_pause_s"):
        RetryPolicy(first_pause_s=9.0, longest_pause_s=1.0)
