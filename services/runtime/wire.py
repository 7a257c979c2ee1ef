"""Errors as gRPC carries them: `google.rpc.Status` with ErrorInfo, BadRequest and RetryInfo in a trailing header.

Knows the two directions and nothing about servers or clients.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from services.runtime.errors import (
    DOMAIN,
    Cancelled,
    Code,
    DeadlineExceeded,
    FabulaError,
    FieldViolation,
    Internal,
    QueueFull,
    ReplicaLost,
    Unavailable,
    error_from_reason,
)

STATUS_DETAILS = "grpc-status-details-bin"
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def grpc_code(code: Code) -> grpc.StatusCode:
    """The grpc library's enum member of a code."""
    return grpc.StatusCode[code.value]


def status_from_error(error: FabulaError) -> status_pb2.Status:
    """The rich status: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    status = status_pb2.Status(code=grpc_code(error.code).value[0], message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if error.field_violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.field_violations
        ]
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=violations))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def error_from_status(
    code: grpc.StatusCode, details: str, trailing_metadata: Iterable[tuple[str, str | bytes]]
) -> FabulaError:
    """The error behind a failed call.

    A status without our ErrorInfo was not made by a service but by what stands between (Ray Serve's proxy, the
    network): INTERNAL, UNKNOWN, CANCELLED and ABORTED then mean that a replica was lost with the call in flight,
    NOT_FOUND and UNIMPLEMENTED that the application is not deployed (yet), RESOURCE_EXHAUSTED that its queue is full.
    """
    for key, value in trailing_metadata:
        if key == STATUS_DETAILS and isinstance(value, bytes):
            error = _error_from_details(value)
            if error is not None:
                return error
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("the service did not answer before the deadline")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return QueueFull("the service has no room for this call now")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.NOT_FOUND | grpc.StatusCode.UNIMPLEMENTED:
            return Unavailable(f"the service does not answer ({code.name}): {_short(details)}")
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN | grpc.StatusCode.CANCELLED | grpc.StatusCode.ABORTED:
            return ReplicaLost(f"the replica was lost during the call ({code.name}): {_short(details)}")
        case _:
            return error_from_reason(
                Code(code.name) if code.name in Code.__members__ else Code.INTERNAL, "", _short(details)
            )


def _error_from_details(value: bytes) -> FabulaError | None:
    status = status_pb2.Status.FromString(value)
    reason, metadata, retry_after_s = "", {}, None
    violations: list[FieldViolation] = []
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            if info.domain == DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    if not reason:
        return None
    names = {member.value[0]: member.name for member in grpc.StatusCode}
    name = names.get(status.code, "INTERNAL")
    return error_from_reason(
        Code(name) if name in Code.__members__ else Code.INTERNAL,
        reason,
        status.message,
        metadata=metadata,
        field_violations=violations,
        retry_after_s=retry_after_s,
    )


def _short(text: str) -> str:
    """The first line of a foreign message: a proxy may send a whole traceback, which must not travel on."""
    return TERMINAL_CODES.sub("", text).strip().split("\n", 1)[0][:200]


def public_error(error: BaseException) -> FabulaError:
    """What a caller may see of an exception: our own errors as they are, cancellation, and INTERNAL for the rest."""
    if isinstance(error, FabulaError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceeded()
    if type(error).__name__ == "CancelledError":
        return Cancelled()
    return Internal()
