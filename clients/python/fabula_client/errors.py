"""Every error this client raises, in one tree.

FabulaError                    reason, message, metadata, field_violations, retry_after_s, request_id
├── ServerError                the service refused or failed: one class per gRPC code, `reason` says exactly why
│   ├── InvalidArgument        INVALID_ARGUMENT     change the request; `field_violations` say which field and how
│   ├── NotFound               NOT_FOUND            STORY_NOT_FOUND, IMAGE_NOT_FOUND: it is not there, or deleted
│   ├── IdempotencyKeyReused   ALREADY_EXISTS       this key was used with another body: use a new one
│   ├── Unauthenticated        UNAUTHENTICATED      say who you are
│   ├── PermissionDenied       PERMISSION_DENIED    you may not do this here
│   ├── FailedPrecondition     FAILED_PRECONDITION  something else must happen first
│   ├── ResourceExhausted      RESOURCE_EXHAUSTED   no room; retried only when the service says after how long
│   ├── Unavailable            UNAVAILABLE          not reachable now; the client has already retried
│   ├── DeadlineExceeded       DEADLINE_EXCEEDED    it took longer than `timeout_s`; a created story goes on
│   ├── Cancelled              CANCELLED            the call was cancelled
│   ├── DataLoss               DATA_LOSS            stored data is damaged
│   └── Internal               INTERNAL, the rest   a bug in the service: report it with `request_id`
├── WaitTimedOut               the story had not ended in time; it goes on, wait again
├── StoryFailed                the story ended in failure; `story` holds the frames it has, `reason` why
├── StoryCancelled             somebody cancelled the story; `story` holds the frames it has
└── ImageCorrupt               the picture received does not have the SHA-256 asked for

`reason` is the contract: stable, upper-snake, the same over gRPC and HTTP. Messages are for people and may change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from fabula_client.story import Story

DOMAIN = "fabula"
_DETAILS = "grpc-status-details-bin"


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request that is wrong, and what would be right."""

    field: str
    description: str


class FabulaError(Exception):
    """Base of the tree."""

    reason: str = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field_violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = dict(metadata or {})
        self.field_violations = tuple(field_violations)
        self.retry_after_s = retry_after_s  # trying the very same request after so many seconds can work; None: do not
        self.request_id = request_id  # find the call by it in the service's logs

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]"


class ServerError(FabulaError):
    """The service refused or failed."""


class InvalidArgument(ServerError):
    """The request is wrong as it stands."""

    reason = "INVALID_ARGUMENT"


class NotFound(ServerError):
    """There is no such thing."""

    reason = "NOT_FOUND"


class IdempotencyKeyReused(ServerError):
    """The idempotency key was used with another body."""

    reason = "IDEMPOTENCY_KEY_REUSED"


class Unauthenticated(ServerError):
    """The service does not know who calls."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(ServerError):
    """The caller may not do this."""

    reason = "PERMISSION_DENIED"


class FailedPrecondition(ServerError):
    """Something else must happen first."""

    reason = "FAILED_PRECONDITION"


class ResourceExhausted(ServerError):
    """There is no room."""

    reason = "RESOURCE_EXHAUSTED"


class Unavailable(ServerError):
    """The service cannot be reached now."""

    reason = "UNAVAILABLE"


class DeadlineExceeded(ServerError):
    """The call took longer than its deadline."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(ServerError):
    """The call was cancelled."""

    reason = "CANCELLED"


class DataLoss(ServerError):
    """Stored data is damaged."""

    reason = "DATA_LOSS"


class Internal(ServerError):
    """Something went wrong inside the service."""

    reason = "INTERNAL"


class WaitTimedOut(FabulaError):
    """The story had not ended in time."""

    reason = "WAIT_TIMED_OUT"


class StoryFailed(FabulaError):
    """The story ended in failure."""

    reason = "STORY_FAILED"

    def __init__(self, story: Story) -> None:
        error = story.error
        super().__init__(error.message if error else "the story failed", reason=error.reason if error else "")
        self.story = story


class StoryCancelled(FabulaError):
    """Somebody cancelled the story."""

    reason = "STORY_CANCELLED"

    def __init__(self, story: Story) -> None:
        super().__init__("the story was cancelled")
        self.story = story


class ImageCorrupt(FabulaError):
    """The picture received is not the one asked for."""

    reason = "IMAGE_CORRUPT"


_BY_CODE: dict[grpc.StatusCode, type[ServerError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: IdempotencyKeyReused,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DATA_LOSS: DataLoss,
}


def error_from_status(
    code: grpc.StatusCode,
    details: str | None,
    trailing_metadata: Iterable[tuple[str, str | bytes]],
    *,
    request_id: str = "",
) -> ServerError:
    """The error behind a failed call: its class from the code, everything else from the `google.rpc.Status` that came
    along."""
    cls = _BY_CODE.get(code, Internal)
    message, reason, metadata, retry_after_s = details or code.name, "", {}, None
    violations: list[FieldViolation] = []
    for detail in _rich_details(trailing_metadata):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            if info.domain == DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations = [FieldViolation(each.field, each.description) for each in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return cls(
        message,
        reason=reason,
        metadata=metadata,
        field_violations=violations,
        retry_after_s=retry_after_s,
        request_id=request_id,
    )


def _rich_details(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> list[status_pb2.Status]:
    for key, value in trailing_metadata:
        if key == _DETAILS and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []  # something between us and the service wrote it; the code and the message still count
    return []
