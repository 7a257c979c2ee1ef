"""A failed call becomes one error with everything the service said about it."""

from __future__ import annotations

import grpc
import pytest
from fabula_client import errors
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2


def trailers(*details: object) -> list[tuple[str, str | bytes]]:
    status = status_pb2.Status(code=3, message="ignored")
    for detail in details:
        status.details.add().Pack(detail)
    return [("other", "x"), ("grpc-status-details-bin", status.SerializeToString())]


def test_reason_metadata_fields_and_pause_arrive() -> None:
    error = errors.error_from_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        "The caption is too long.",
        trailers(
            error_details_pb2.ErrorInfo(reason="CAPTION_TOO_LONG", domain="fabula", metadata={"limit": "1000"}),
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field="caption", description="at most 1000")
                ]
            ),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
        ),
        request_id="abc",
    )
    assert isinstance(error, errors.InvalidArgument)
    assert error.reason == "CAPTION_TOO_LONG"
    assert error.metadata == {"limit": "1000"}
    assert error.field_violations == (errors.FieldViolation("caption", "at most 1000"),)
    assert error.retry_after_s == 1.5
    assert error.request_id == "abc"
    assert str(error) == "The caption is too long. [CAPTION_TOO_LONG]"


def test_another_domains_reason_is_not_taken_for_ours() -> None:
    info = error_details_pb2.ErrorInfo(reason="API_KEY_INVALID", domain="googleapis.com")
    error = errors.error_from_status(grpc.StatusCode.UNAVAILABLE, "away", trailers(info))
    assert error.reason == "UNAVAILABLE"


def test_broken_details_do_not_hide_the_error() -> None:
    error = errors.error_from_status(grpc.StatusCode.NOT_FOUND, "gone", [("grpc-status-details-bin", b"\xff\xff")])
    assert isinstance(error, errors.NotFound)
    assert error.message == "gone"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.ABORTED])
def test_a_code_without_a_class_is_internal(code: grpc.StatusCode) -> None:
    assert isinstance(errors.error_from_status(code, None, []), errors.Internal)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = errors.__doc__ or ""
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.FabulaError)]
    assert [cls.__name__ for cls in classes if cls.__name__ not in drawn] == []
