"""Decides what a failure means for a story: try again after a pause, tell the watchers that it waits, or give up.

Pure: the attempt number and a random number are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.errors import (
    Code,
    DeadlineExceeded,
    DeadlineUnreachable,
    FabulaError,
    Internal,
    PoisonRequest,
    QueueFull,
    ReplicaLost,
    StorageFull,
)

# How often one step may fail in a way that can be the request's own fault before the story is set aside. An outage
# (nothing answers, no room, a wrong token) is not the request's fault and is waited out for as long as it takes. So a
# service says REPLICA_LOST to what it worked on when it died, and ENGINE_DEAD to what came in after that.
MOST_ATTEMPTS: dict[type[FabulaError], int] = {ReplicaLost: 5, DeadlineExceeded: 3, Internal: 3}


@dataclass(frozen=True, kw_only=True)
class TryAgain:
    """Try the same again after `after_s` seconds. `waiting` says whether the story's state should show it."""

    after_s: float
    waiting: bool


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """The story fails with this error; its finished frames stay."""

    error: FabulaError


def decide(
    error: FabulaError, *, attempt: int, repeats: int, first_s: float, most_s: float, random: float
) -> TryAgain | GiveUp:
    """What to do after a step's `attempt`-th failure in a row (from 1), of which `repeats` had this error's reason.

    `random`, 0..1, shortens pauses by up to a quarter, so that stories do not all come back at the same moment.
    """
    limit = next((count for cls, count in MOST_ATTEMPTS.items() if isinstance(error, cls)), None)
    if limit is not None and repeats >= limit:
        return GiveUp(error=_poison(error) if isinstance(error, ReplicaLost) else error)
    if limit is None and not _passes(error):
        return GiveUp(error=error)
    pause_s = min(most_s, first_s * 2 ** min(attempt - 1, 30)) * (0.75 + 0.25 * random)
    # The service knows best when it has room again. A longer pause of ours must not undercut it, a shorter one may not.
    crowded = isinstance(error, QueueFull | DeadlineUnreachable)
    after_s = max(pause_s, error.retry_after_s) if crowded and error.retry_after_s else pause_s
    # A full queue is normal life and one failure may be a blip; a full disk is neither.
    waiting = isinstance(error, StorageFull) or (attempt >= 2 and not crowded)
    return TryAgain(after_s=after_s, waiting=waiting)


def _passes(error: FabulaError) -> bool:
    """Whether the cause can go away without this story changing."""
    if error.code in (Code.UNAVAILABLE, Code.UNAUTHENTICATED):
        return True  # a wrong token is mended by restarting with the right one; no story should be lost to it
    if error.code is Code.RESOURCE_EXHAUSTED:
        return isinstance(error, StorageFull) or error.retry_after_s is not None
    return False


def _poison(error: FabulaError) -> PoisonRequest:
    return PoisonRequest(
        f"this frame took the service down {MOST_ATTEMPTS[ReplicaLost]} times and was set aside; last: {error.message}"
    )
