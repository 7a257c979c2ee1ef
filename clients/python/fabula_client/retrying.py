"""Which failed calls are tried again, and after how long.

Only UNAVAILABLE, and RESOURCE_EXHAUSTED when the service itself said after how long (`RetryInfo`). Nothing else:
INTERNAL, ABORTED and DEADLINE_EXCEEDED may have had an effect, and trying them again could double it. Pure: the
caller passes the randomness in.
"""

from __future__ import annotations

from dataclasses import dataclass

from fabula_client.errors import FabulaError, ResourceExhausted, Unavailable


def may_retry(error: FabulaError) -> bool:
    """Whether the same request, unchanged, can succeed later."""
    if isinstance(error, Unavailable):
        return True
    return isinstance(error, ResourceExhausted) and error.retry_after_s is not None


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently. All tries together stay within the call's `timeout_s`."""

    attempts: int = 6  # tries in all; 1 means never again
    first_pause_s: float = 0.2  # doubles with every failure
    longest_pause_s: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_pause_s <= 0 or self.longest_pause_s < self.first_pause_s:
            raise ValueError("a retry policy needs attempts >= 1 and 0 < first_pause_s <= longest_pause_s")

    def pause_s(self, failures: int, jitter: float, at_least_s: float | None = None) -> float:
        """Seconds to wait after so many failures in a row (from 1). `jitter` is uniform in 0..1 and takes off up to
        half.

        What the service asked for (`at_least_s`) is never shortened, and is spread upwards so that callers do not
        return as one.
        """
        full = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(failures - 1, 32))
        pause = full * (1.0 - 0.5 * jitter)
        return pause if at_least_s is None else max(pause, at_least_s * (1.0 + 0.25 * jitter))

    def next_pause_s(self, error: FabulaError, failures: int, jitter: float, left_s: float) -> float | None:
        """Seconds to wait before the next try; None when there is none: wrong kind of error, too many tries, too
        little time."""
        if not may_retry(error) or failures >= self.attempts:
            return None
        pause = self.pause_s(failures, jitter, error.retry_after_s)
        return pause if pause < left_s else None
