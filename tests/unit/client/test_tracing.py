"""The ids of a call: given ones pass through, others are fresh."""

from __future__ import annotations

import pytest
from fabula_client.tracing import call_ids, tracing

TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


def test_given_ids_hold_inside_the_block_and_nest() -> None:
    with tracing(traceparent=TRACE):
        assert call_ids().traceparent == TRACE
        with tracing(request_id="order-17"):
            assert call_ids().metadata() == (("traceparent", TRACE), ("fabula-request-id", "order-17"))
        assert call_ids().request_id != "order-17"
    assert call_ids().traceparent != TRACE


def test_fresh_ids_differ() -> None:
    assert call_ids() != call_ids()


@pytest.mark.parametrize("bad", ["", "00-xyz", TRACE.upper(), TRACE + "\n"])
def test_a_malformed_traceparent_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="traceparent"), tracing(traceparent=bad):
        pass


@pytest.mark.parametrize("bad", ["", "two words", "x" * 256, "café"])
def test_a_malformed_request_id_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="request_id"), tracing(request_id=bad):
        pass
