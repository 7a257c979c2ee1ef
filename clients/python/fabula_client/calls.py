"""One connection and how calls are made over it: deadline, ids, retries, errors. The only module that talks gRPC."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from fabula_client.errors import FabulaError, error_from_status
from fabula_client.retrying import RetryPolicy
from fabula_client.tracing import call_ids

MOST_IMAGE_BYTES = 8 << 20  # the service takes no larger picture
MOST_EXAMPLE_BYTES = 48 << 20  # nor more of an example story's pictures together
MOST_WEIGHTS_BYTES = 40 << 20  # nor larger weights of a character
MAX_MESSAGE_BYTES = MOST_EXAMPLE_BYTES + (4 << 20)  # a request carries one story's pictures, and has room

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # gRPC would wait up to two minutes before it looks for a restarted service again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_retries", 0),  # one place decides about retries
    # A host that vanished says nothing, and neither does a watch whose story waits: only a ping tells them apart. The
    # service admits one every 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # measured: without it grpcio 1.85 waits a minute for the answer
    ("grpc.http2.max_pings_without_data", 0),  # a silent watch sends no data between them
)

_THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")  # never through a proxy, whatever the environment says

Metadata = Sequence[tuple[str, str]]


class Connection:
    """A channel to the story service. Opened on first use, so that it belongs to the event loop that uses it."""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float,
        retry: RetryPolicy,
        metadata: Metadata = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self.retry = retry
        self._metadata = tuple(metadata)
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel, opened now if it was not."""
        if self._channel is None:
            here = self.target.rpartition(":")[0] in _THIS_MACHINE
            options = (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(not here)))
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, options=options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, options=options)
        return self._channel

    async def close(self) -> None:
        """Closes the channel; calls in flight are cancelled."""
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None

    async def call(
        self,
        method: Callable[..., Any],
        request: Any,
        *,
        timeout_s: float | None = None,
        forgive: Callable[[FabulaError], bool] = lambda error: False,
    ) -> Any:
        """One unary call, tried again as the policy allows, within `timeout_s` in all.

        `forgive` names errors of a repeated try that mean an earlier one had worked; the answer is then None. Raises
        a FabulaError.
        """

        async def attempt(left_s: float, metadata: Metadata) -> Any:
            return await method(request, timeout=left_s, metadata=metadata)

        return await self._retrying(attempt, timeout_s, forgive)

    async def collect(self, method: Callable[..., Any], request: Any, *, timeout_s: float | None = None) -> list[Any]:
        """Every message of a short stream, asked for again from its beginning when it breaks. Raises a FabulaError."""

        async def attempt(left_s: float, metadata: Metadata) -> list[Any]:
            return [message async for message in method(request, timeout=left_s, metadata=metadata)]

        answer: list[Any] = await self._retrying(attempt, timeout_s, lambda error: False)
        return answer

    async def stream(self, method: Callable[..., Any], request: Any) -> AsyncIterator[Any]:
        """The messages of one stream, without deadline and without retry: whoever follows a log resumes it. Raises a
        FabulaError."""
        ids = call_ids()
        call = method(request, metadata=(*self._metadata, *ids.metadata()))
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise _named(error, ids.request_id) from None
        finally:
            call.cancel()

    async def _retrying(
        self,
        attempt: Callable[[float, Metadata], Any],
        timeout_s: float | None,
        forgive: Callable[[FabulaError], bool],
    ) -> Any:
        ids = call_ids()  # the same for every try: to the service they are one request
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        failures = 0
        while True:
            try:
                return await attempt(max(0.001, deadline - time.monotonic()), (*self._metadata, *ids.metadata()))
            except grpc.aio.AioRpcError as failure:
                error = _named(failure, ids.request_id)
            if failures and forgive(error):
                return None
            failures += 1
            # Jitter only spreads callers in time.
            pause = self.retry.next_pause_s(error, failures, random.random(), deadline - time.monotonic())
            if pause is None:
                raise error
            await asyncio.sleep(pause)


def _named(error: grpc.aio.AioRpcError, request_id: str) -> FabulaError:
    trailers: Any = error.trailing_metadata() or ()  # pairs, whatever the stubs say
    return error_from_status(error.code(), error.details(), trailers, request_id=request_id)
