"""The server side of an RPC: checks the token, reads deadline and ids, turns any exception into a status.

    class CaptionServicer(caption_pb2_grpc.CaptionServiceServicer):
        def __init__(self, engine, token):
            self.token = token                        # None switches the check off (public edge)

        @unary_method(pb.DescribeResponse)
        async def Describe(self, request, context): ...

        @stream_method(pb.RenderFrameResponse)
        async def RenderFrame(self, request, context):
            yield ...

The same servicer runs under plain grpc.aio and as a Ray Serve deployment. Serve passes its own context by the keyword
`grpc_context`; that one can only set code, details and trailing metadata, and loses them if the method raises or if a
stream ends without another message. So an error sets them and then *returns*, with an empty message: callers of a
stream skip messages whose `event` is not set. Nothing but these errors, cancellation and GeneratorExit ever leaves a
method.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import structlog

from services.runtime.call import Call, call_from_headers, enter_call
from services.runtime.errors import DeadlineExceeded, FabulaError, InstallationTokenInvalid, Internal
from services.runtime.wire import STATUS_DETAILS, grpc_code, public_error, status_from_error

TOKEN = "fabula-token"
REQUEST_ID = "fabula-request-id"
TIMEOUT_MS = "fabula-timeout-ms"
TRACEPARENT = "traceparent"
APPLICATION = "application"

log = structlog.get_logger("fabula.rpc")

UnaryMethod = Callable[[Any, Any, Any], Awaitable[Any]]
StreamMethod = Callable[[Any, Any, Any], AsyncIterator[Any]]
Method = TypeVar("Method", UnaryMethod, StreamMethod)


def unary_method(response_type: type) -> Callable[[UnaryMethod], UnaryMethod]:
    """Guards `async def M(self, request, context) -> response_type()`."""

    def guard(method: UnaryMethod) -> UnaryMethod:
        async def guarded(self: Any, request: Any, grpc_context: Any) -> Any:
            try:
                call = _enter(self, grpc_context)
                async with asyncio.timeout(call.remaining_s()):
                    return await method(self, request, grpc_context)
            except Exception as error:  # noqa: BLE001 - the boundary: a foreign exception must never leave a replica
                _set_status(grpc_context, error, method.__qualname__)
                return response_type()

        return _like(guarded, method)

    return guard


def stream_method(response_type: type) -> Callable[[StreamMethod], StreamMethod]:
    """Guards `async def M(self, request, context)` that yields `response_type` messages."""

    def guard(method: StreamMethod) -> StreamMethod:
        async def guarded(self: Any, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
            messages: AsyncIterator[Any] | None = None
            try:
                call = _enter(self, grpc_context)
                messages = method(self, request, grpc_context)
                while True:
                    enter_call(call)  # Serve may drive each step of the stream from another task
                    try:
                        async with asyncio.timeout(call.remaining_s()):
                            message = await anext(messages)
                    except StopAsyncIteration:
                        return
                    yield message
            except Exception as error:  # noqa: BLE001 - the boundary: a foreign exception must never leave a replica
                _set_status(grpc_context, error, method.__qualname__)
                if not hasattr(grpc_context, "abort"):  # Serve: a status travels only together with a message
                    yield response_type()
            finally:
                close = getattr(messages, "aclose", None)
                if close is not None:
                    await close()  # cancellation and GeneratorExit reach the engine here, at once

        return _like(guarded, method)

    return guard


def _like(guarded: Method, method: Method) -> Method:
    """Names the wrapper after the method, but keeps its own signature: Serve looks for `grpc_context` there."""
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(guarded, name, getattr(method, name))
    return guarded


def _enter(servicer: Any, context: Any) -> Call:
    """Checks the token and makes the call current. Raises InstallationTokenInvalid or DeadlineExceeded."""
    metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
    expected = servicer.token
    if expected is not None and not hmac.compare_digest(metadata.get(TOKEN, "").encode(), expected.encode()):
        raise InstallationTokenInvalid()
    call = call_from_headers(
        request_id=metadata.get(REQUEST_ID),
        traceparent=metadata.get(TRACEPARENT),
        timeout_s=_timeout_s(metadata.get(TIMEOUT_MS), context),
    )
    enter_call(call)
    structlog.contextvars.bind_contextvars(request_id=call.request_id, trace_id=call.trace_id)
    if call.remaining_s() == 0.0:
        raise DeadlineExceeded("the deadline had passed before the call arrived")
    return call


def _timeout_s(sent_ms: str | None, context: Any) -> float | None:
    """The shorter of the deadline in the metadata (all that survives Serve's proxy) and the transport's own."""
    limits: list[float] = []
    if sent_ms is not None:
        try:
            limits.append(max(0.0, float(sent_ms) / 1000.0))
        except ValueError:
            log.warning("timeout_unreadable", value=sent_ms[:40])
    time_remaining = getattr(context, "time_remaining", None)
    if time_remaining is not None and (remaining := time_remaining()) is not None:
        limits.append(max(0.0, float(remaining)))
    return min(limits) if limits else None


def _set_status(context: Any, error: BaseException, method: str) -> None:
    """Writes the error on the call."""
    public = told_error(error, method)
    status = status_from_error(public)
    context.set_code(grpc_code(public.code))
    context.set_details(public.message)
    context.set_trailing_metadata([(STATUS_DETAILS, status.SerializeToString())])


def told_error(error: BaseException, method: str) -> FabulaError:
    """What the caller of `method` is told; an unexpected error is logged under an id, and only the id is told."""
    public = public_error(error)
    if isinstance(public, Internal) and not isinstance(error, FabulaError):
        error_id = secrets.token_hex(8)
        public = Internal(
            f"something went wrong inside; the log has it under {error_id}", metadata={"error_id": error_id}
        )
        log.error("internal_error", method=method, error_id=error_id, exc_info=error)
    else:
        log.info("call_refused", method=method, reason=public.reason, message=public.message)
    return public
