"""The RPC boundary under both servers it has to live in: grpc.aio, and the context that Ray Serve's proxy passes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from fabula.frame.v1 import frame_service_pb2 as pb
from fabula.frame.v1 import frame_service_pb2_grpc as pb_grpc

from services.runtime.call import Call, calling, current_call
from services.runtime.channel import OPTIONS, ServiceChannel
from services.runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    FabulaError,
    InstallationTokenInvalid,
    Internal,
    QueueFull,
    Unavailable,
)
from services.runtime.rpc import stream_method, unary_method
from services.runtime.wire import error_from_status

TOKEN = "t" * 64


class Servicer(pb_grpc.FrameServiceServicer):
    token = TOKEN

    def __init__(self) -> None:
        self.calls: list[Call | None] = []
        self.ended: list[str] = []
        self.error: BaseException | None = None
        self.sleep_s = 0.0

    @unary_method(pb.ListPacksResponse)
    async def ListPacks(self, request: Any, context: Any) -> Any:
        self.calls.append(current_call())
        await asyncio.sleep(self.sleep_s)
        if self.error:
            raise self.error
        return pb.ListPacksResponse(packs=[pb.Pack(name="toon")])

    @stream_method(pb.RenderFrameResponse)
    async def RenderFrame(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.calls.append(current_call())
        try:
            yield pb.RenderFrameResponse(queued=pb.Queued(ahead_count=1))
            await asyncio.sleep(self.sleep_s)
            if self.error:
                raise self.error
            yield pb.RenderFrameResponse(progress=pb.Progress(step=1))
            self.ended.append("finished")
        except (asyncio.CancelledError, GeneratorExit):
            self.ended.append("cancelled")
            raise


class ServeContext:
    """What Ray Serve passes: no abort, no deadline, nothing but setters."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        self._metadata = list(metadata)
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: list[tuple[str, bytes]] = []

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing: list[tuple[str, bytes]]) -> None:
        self.trailing = trailing

    def error(self) -> FabulaError:
        assert self.code is not None
        return error_from_status(self.code, self.details, self.trailing)


@pytest.fixture
async def served() -> AsyncIterator[tuple[Servicer, ServiceChannel, Any]]:
    servicer = Servicer()
    server = grpc.aio.server()
    pb_grpc.add_FrameServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = ServiceChannel(f"127.0.0.1:{port}", application="frame", token=TOKEN)
    yield servicer, channel, pb_grpc.FrameServiceStub(channel.grpc_channel)
    await channel.close()
    await server.stop(0)


def test_serve_finds_its_context_argument() -> None:
    for method in (Servicer.ListPacks, Servicer.RenderFrame):
        assert "grpc_context" in inspect.signature(method).parameters
    assert inspect.iscoroutinefunction(Servicer.ListPacks)
    assert inspect.isasyncgenfunction(Servicer.RenderFrame)
    assert Servicer.ListPacks.__name__ == "ListPacks"


async def test_an_error_crosses_both_ways_whole(served: Any) -> None:
    servicer, channel, stub = served
    servicer.error = QueueFull("no room", metadata={"queued_count": "9"}, retry_after_s=2.5)
    with pytest.raises(QueueFull) as caught:
        await channel.call(stub.ListPacks, pb.ListPacksRequest(), timeout_s=5)
    assert (caught.value.message, caught.value.retry_after_s) == ("no room", 2.5)
    assert caught.value.metadata["queued_count"] == "9"
    messages = channel.stream(stub.RenderFrame, pb.RenderFrameRequest(), timeout_s=5)
    assert (await anext(messages)).WhichOneof("event") == "queued"
    with pytest.raises(QueueFull):
        await anext(messages)


async def test_under_serve_the_status_travels_with_a_last_empty_message() -> None:
    servicer = Servicer()
    servicer.error = QueueFull(retry_after_s=2.5)
    context = ServeContext(("fabula-token", TOKEN))
    answer = await servicer.ListPacks(pb.ListPacksRequest(), grpc_context=context)
    assert answer == pb.ListPacksResponse()
    assert type(context.error()) is QueueFull
    context = ServeContext(("fabula-token", TOKEN))
    messages = [message async for message in servicer.RenderFrame(pb.RenderFrameRequest(), grpc_context=context)]
    assert [message.WhichOneof("event") for message in messages] == ["queued", None]
    assert type(context.error()) is QueueFull


async def test_foreign_exceptions_never_leave_and_never_tell() -> None:
    servicer = Servicer()
    servicer.error = RuntimeError("secret/path")
    context = ServeContext(("fabula-token", TOKEN))
    await servicer.ListPacks(pb.ListPacksRequest(), context)
    error = context.error()
    assert type(error) is Internal
    assert "secret" not in error.message
    assert error.metadata["error_id"] in error.message


@pytest.mark.parametrize("sent", ["", "wrong", TOKEN + "x", TOKEN[:-1]])
async def test_without_the_token_nothing_is_reached(sent: str) -> None:
    servicer = Servicer()
    context = ServeContext(("fabula-token", sent)) if sent else ServeContext()
    await servicer.ListPacks(pb.ListPacksRequest(), context)
    assert type(context.error()) is InstallationTokenInvalid
    context = ServeContext()
    assert len([message async for message in servicer.RenderFrame(pb.RenderFrameRequest(), context)]) == 1
    assert type(context.error()) is InstallationTokenInvalid
    assert servicer.calls == []


async def test_ids_and_deadline_travel(served: Any) -> None:
    servicer, channel, stub = served
    with calling(Call(request_id="mine", traceparent=f"00-{'a' * 32}-{'b' * 16}-01")):
        await channel.call(stub.ListPacks, pb.ListPacksRequest(), timeout_s=30)
        async for _ in channel.stream(stub.RenderFrame, pb.RenderFrameRequest(), timeout_s=30):
            pass
    for call in servicer.calls:
        assert call.request_id == "mine"
        assert call.trace_id == "a" * 32
        assert call.traceparent.split("-")[2] != "b" * 16  # a span of its own
        assert 0 < call.remaining_s() <= 30


async def test_a_deadline_ends_the_call_on_both_sides(served: Any) -> None:
    servicer, channel, stub = served
    servicer.sleep_s = 30
    with pytest.raises(DeadlineExceeded):
        await channel.call(stub.ListPacks, pb.ListPacksRequest(), timeout_s=0.2)
    with pytest.raises(DeadlineExceeded):
        async for _ in channel.stream(stub.RenderFrame, pb.RenderFrameRequest(), timeout_s=0.2):
            pass
    assert servicer.ended == ["cancelled"]


async def test_a_passed_deadline_starts_nothing() -> None:
    servicer = Servicer()
    context = ServeContext(("fabula-token", TOKEN), ("fabula-timeout-ms", "0"))
    await servicer.ListPacks(pb.ListPacksRequest(), context)
    assert type(context.error()) is DeadlineExceeded
    assert servicer.calls == []
    channel = ServiceChannel("127.0.0.1:1", application="frame", token=TOKEN)
    with calling(Call(deadline_s=0.0)), pytest.raises(DeadlineExceeded):
        await channel.call(None, None, timeout_s=5)
    await channel.close()


async def test_leaving_a_stream_cancels_the_job(served: Any) -> None:
    servicer, channel, stub = served
    servicer.sleep_s = 30
    messages = channel.stream(stub.RenderFrame, pb.RenderFrameRequest(), timeout_s=60)
    await anext(messages)
    await messages.aclose()
    for _ in range(500):
        if servicer.ended:
            break
        await asyncio.sleep(0.01)
    assert servicer.ended == ["cancelled"]


async def test_closing_the_generator_reaches_the_engine_at_once() -> None:
    servicer = Servicer()
    messages = servicer.RenderFrame(pb.RenderFrameRequest(), ServeContext(("fabula-token", TOKEN)))
    await anext(messages)
    await messages.aclose()
    assert servicer.ended == ["cancelled"]


async def test_nobody_there_is_unavailable() -> None:
    channel = ServiceChannel("127.0.0.1:1", application="caption", token=TOKEN)
    stub = pb_grpc.FrameServiceStub(channel.grpc_channel)
    with pytest.raises(Unavailable) as caught:
        await channel.call(stub.ListPacks, pb.ListPacksRequest(), timeout_s=5)
    assert caught.value.metadata["service"] == "caption"
    assert caught.value.retry_after_s is not None
    await channel.close()


def test_silent_calls_are_not_pinged_more_often_than_a_default_server_bears() -> None:
    # Found the hard way: GOAWAY "too_many_pings" ended every call in flight after some silent minutes.
    assert dict(OPTIONS)["grpc.keepalive_time_ms"] > 300_000


async def test_malformed_ids_are_replaced() -> None:
    servicer = Servicer()
    metadata = (("fabula-request-id", "bad\nid"), ("traceparent", "nonsense"), ("fabula-timeout-ms", "soon"))
    await servicer.ListPacks(pb.ListPacksRequest(), ServeContext(("fabula-token", TOKEN), *metadata))
    (call,) = servicer.calls
    assert call is not None
    assert "\n" not in call.request_id
    assert len(call.trace_id) == 32
    assert call.remaining_s() is None


def test_cancellation_is_an_error_of_ours_only_at_the_edge() -> None:
    assert Cancelled().http_status == 499
