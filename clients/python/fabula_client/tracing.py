"""The ids that go with a call: a W3C `traceparent` and a request id, yours if you set them, fresh ones if not.

    with tracing(traceparent=span_header, request_id="order-17"):
        story = client.stories.create(...)

Kept in a context variable, so it holds for every call inside the block, in threads and tasks started from it too.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True, kw_only=True)
class CallIds:
    """What identifies one call, however often it is tried."""

    traceparent: str
    request_id: str

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """As gRPC metadata."""
        return (("traceparent", self.traceparent), ("fabula-request-id", self.request_id))


_given: ContextVar[tuple[str | None, str | None]] = ContextVar("fabula_client_ids", default=(None, None))


@contextmanager
def tracing(*, traceparent: str | None = None, request_id: str | None = None) -> Iterator[None]:
    """Sets the ids of every call inside the block. Raises ValueError for one that is malformed."""
    if traceparent is not None and not _TRACEPARENT.fullmatch(traceparent):
        raise ValueError(
            "traceparent: expected version-traceid-parentid-flags in lower-case hex, as in W3C Trace Context"
        )
    if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
        raise ValueError("request_id: expected 1 to 255 printable ASCII characters without spaces")
    before = _given.get()
    token = _given.set((traceparent or before[0], request_id or before[1]))
    try:
        yield
    finally:
        _given.reset(token)


def call_ids() -> CallIds:
    """The ids of a call that starts now."""
    traceparent, request_id = _given.get()
    return CallIds(
        traceparent=traceparent or f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
        request_id=request_id or secrets.token_hex(16),
    )
