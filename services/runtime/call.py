"""What belongs to one call: its request id, trace and deadline, carried in a context variable.

Pure but for the monotonic clock; knows no transport.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,255}")


def new_request_id() -> str:
    """128 random bits in hex."""
    return secrets.token_hex(16)


def new_traceparent() -> str:
    """A fresh, sampled W3C trace context."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call as every layer below it sees it. `deadline_s` is on the monotonic clock; None means no deadline."""

    request_id: str = field(default_factory=new_request_id)
    traceparent: str = field(default_factory=new_traceparent)
    deadline_s: float | None = None

    @property
    def trace_id(self) -> str:
        """The 32 hex digits that all spans of this request share."""
        return self.traceparent.split("-")[1]

    def remaining_s(self) -> float | None:
        """Seconds until the deadline, never below zero. None means no deadline."""
        return None if self.deadline_s is None else max(0.0, self.deadline_s - time.monotonic())

    def child_traceparent(self) -> str:
        """The same trace with a new span id: what an outgoing call carries."""
        version, trace_id, _, flags = self.traceparent.split("-")
        return f"{version}-{trace_id}-{secrets.token_hex(8)}-{flags}"


_current: ContextVar[Call | None] = ContextVar("fabula_call", default=None)


def current_call() -> Call | None:
    """The call this code runs for, or None outside of any."""
    return _current.get()


def enter_call(call: Call) -> None:
    """Makes `call` the current one for the rest of this context (a task, or one RPC)."""
    _current.set(call)


@contextmanager
def calling(call: Call) -> Iterator[Call]:
    """Makes `call` the current one inside the block."""
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


def call_from_headers(*, request_id: str | None, traceparent: str | None, timeout_s: float | None) -> Call:
    """A call from what a caller sent. What is absent or malformed is replaced, because it only serves tracing."""
    return Call(
        request_id=request_id if request_id and REQUEST_ID.fullmatch(request_id) else new_request_id(),
        traceparent=traceparent if traceparent and TRACEPARENT.fullmatch(traceparent) else new_traceparent(),
        deadline_s=None if timeout_s is None else time.monotonic() + timeout_s,
    )
