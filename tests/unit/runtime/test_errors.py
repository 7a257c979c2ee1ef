"""One tree of errors: unique reasons, drawn in the module, the same after a trip over the wire."""

from __future__ import annotations

import re

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from services.runtime import errors
from services.runtime.errors import (
    Code,
    FabulaError,
    FieldViolation,
    Internal,
    QueueFull,
    ReplicaLost,
    Unavailable,
    error_from_reason,
    every_error,
)
from services.runtime.wire import STATUS_DETAILS, error_from_status, grpc_code, public_error, status_from_error

EVERY = list(every_error())


def test_reasons_are_unique_upper_snake_and_short() -> None:
    reasons = [cls.reason for cls in EVERY]
    assert len(set(reasons)) == len(reasons)
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]{1,62}", reason) for reason in reasons)


def test_the_drawing_is_the_tree() -> None:
    drawn = re.findall(r"[├└]── (\w+)\s+([A-Z_]+)\s+(\d{3})", errors.__doc__ or "")
    assert sorted(drawn) == sorted((cls.__name__, cls.reason, str(cls.http_status)) for cls in EVERY)


@pytest.mark.parametrize("cls", EVERY)
def test_every_error_says_what_it_is_and_knows_its_codes(cls: type[FabulaError]) -> None:
    error = cls()
    assert error.message.endswith((".", "?", "!"))
    assert isinstance(grpc_code(error.code), grpc.StatusCode)
    assert 400 <= error.http_status <= 599
    # Only what can pass carries advice to come back.
    if error.retry_after_s is not None:
        assert error.code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize("cls", EVERY)
def test_an_error_is_the_same_after_a_trip_over_the_wire(cls: type[FabulaError]) -> None:
    sent = cls(
        "what happened: ümlaut 🦊",
        metadata={"limit": "8"},
        field_violations=[FieldViolation("a.b", "too long")],
        retry_after_s=2.5,
    )
    status = status_from_error(sent)
    trailing = [("other", "x"), (STATUS_DETAILS, status.SerializeToString())]
    got = error_from_status(grpc_code(sent.code), sent.message, trailing)
    assert type(got) is cls
    for name in ("message", "metadata", "field_violations", "retry_after_s", "reason"):
        assert getattr(got, name) == getattr(sent, name)


def test_no_retry_advice_is_invented_on_the_way() -> None:
    sent = QueueFull()
    sent.retry_after_s = None
    got = error_from_status(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "", [(STATUS_DETAILS, status_from_error(sent).SerializeToString())]
    )
    assert got.retry_after_s is None


def test_a_newer_peers_reason_is_kept() -> None:
    got = error_from_reason(Code.UNAVAILABLE, "SOLAR_FLARE", "later")
    assert (type(got), got.reason, got.http_status) == (Unavailable, "SOLAR_FLARE", 503)
    assert Unavailable.reason == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.INTERNAL, ReplicaLost),
        (grpc.StatusCode.UNKNOWN, ReplicaLost),
        (grpc.StatusCode.CANCELLED, ReplicaLost),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.NOT_FOUND, Unavailable),
        (grpc.StatusCode.UNIMPLEMENTED, Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, QueueFull),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgument),
        (grpc.StatusCode.OUT_OF_RANGE, Internal),
    ],
)
def test_statuses_that_are_not_ours_mean_what_stands_between(code: grpc.StatusCode, cls: type[FabulaError]) -> None:
    traceback = "\x1b[36mray::Frame()\x1b[39m died\n  File '/secret/path.py', line 1"
    got = error_from_status(code, traceback, [])
    assert type(got) is cls
    assert "/secret" not in got.message


def test_a_foreign_domain_is_not_ours() -> None:
    status = status_pb2.Status(code=13, message="x")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="STORY_NOT_FOUND", domain="example.com"))
    got = error_from_status(grpc.StatusCode.INTERNAL, "x", [(STATUS_DETAILS, status.SerializeToString())])
    assert type(got) is ReplicaLost


def test_internals_stay_inside() -> None:
    assert public_error(ValueError("password is hunter2")).message == Internal().message
    assert type(public_error(TimeoutError())) is errors.DeadlineExceeded
    mine = errors.StoryNotFound()
    assert public_error(mine) is mine
