"""The client side of an internal RPC: adds token, ids and deadline to a call, and turns its failure into a FabulaError.

    channel = ServiceChannel("127.0.0.1:8472", application="caption", token=token)
    stub = CaptionServiceStub(channel.grpc_channel)
    response = await channel.call(stub.Describe, request, timeout_s=60)
    async for message in channel.stream(stub.RenderFrame, request, timeout_s=600): ...

Retries are the caller's business: only it knows what may be repeated.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, cast

import grpc
import grpc.aio

from services.runtime.call import Call, current_call
from services.runtime.errors import Code, DeadlineExceeded, FabulaError, Unavailable
from services.runtime.rpc import APPLICATION, REQUEST_ID, TIMEOUT_MS, TOKEN, TRACEPARENT
from services.runtime.wire import error_from_status

MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # three reference frames of 8 MiB and room; the edge's own limits are far below
DEADLINE_GRACE_S = 2.0  # the transport gives up so much after the service should have, so the service's own answer wins

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A server that was not told otherwise (Serve's proxy cannot be) drops a client that pings a silent call more often
    # than every five minutes, with every call in flight. So a host that vanished is noticed that late, or by deadline.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted service is found again within a second or so, not after the default two minutes of back-off.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Proxies from the environment are for the web, never for the services of one installation.
    ("grpc.enable_http_proxy", 0),
)


class ServiceChannel:
    """A connection to one service of this installation. Make it inside a running event loop."""

    def __init__(self, target: str, *, application: str, token: str | None) -> None:
        """`target` is host:port; `application` is the service's word, by which Ray Serve's ingress routes."""
        self.target = target
        self.application = application
        self._token = token
        self.grpc_channel = grpc.aio.insecure_channel(target, options=list(OPTIONS))

    async def call(self, method: Any, request: Any, *, timeout_s: float) -> Any:
        """One unary call within `timeout_s` seconds or the current call's deadline. Raises FabulaError."""
        limit_s, metadata = self._prepare(timeout_s)
        call = method(request, metadata=metadata, timeout=limit_s + DEADLINE_GRACE_S)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from None
        finally:
            call.cancel()  # does nothing to a finished call; ends it when this task was cancelled

    async def stream(self, method: Any, request: Any, *, timeout_s: float) -> AsyncIterator[Any]:
        """The messages of a server stream. Leaving the loop early cancels the call. Raises FabulaError."""
        limit_s, metadata = self._prepare(timeout_s)
        call = method(request, metadata=metadata, timeout=limit_s + DEADLINE_GRACE_S)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """Closes the connection; calls in flight end."""
        await self.grpc_channel.close(None)

    def _prepare(self, timeout_s: float) -> tuple[float, list[tuple[str, str]]]:
        call = current_call() or Call()
        remaining_s = call.remaining_s()
        limit_s = timeout_s if remaining_s is None else min(timeout_s, remaining_s)
        if limit_s <= 0:
            raise DeadlineExceeded(f"the deadline had passed before {self.application} was called")
        metadata = [
            (APPLICATION, self.application),
            (REQUEST_ID, call.request_id),
            (TRACEPARENT, call.child_traceparent()),
            (TIMEOUT_MS, str(int(limit_s * 1000))),
        ]
        if self._token is not None:
            metadata.append((TOKEN, self._token))
        return limit_s, metadata

    def _failure(self, error: grpc.aio.AioRpcError) -> FabulaError:
        trailing = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
        found = error_from_status(error.code(), error.details() or "", trailing)
        if found.code is Code.UNAVAILABLE and type(found) is Unavailable:
            found.metadata.setdefault("service", self.application)
        return found
