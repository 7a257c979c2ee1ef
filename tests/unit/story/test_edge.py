"""What the edge refuses before it costs anything."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import grpc
import grpc.aio
import pytest
from fabula.story.v1 import story_service_pb2 as pb
from fabula.story.v1 import story_service_pb2_grpc as pb_grpc

from services.runtime.config import ConfigInvalid
from services.runtime.errors import QueueFull, StoryNotFound
from services.story import api_grpc, api_http
from services.story.api import StoryApi
from services.story.api_grpc import GrpcEdge
from services.story.api_http import EdgeMiddleware
from services.story.config import StorySettings
from services.story.events import Broadcaster
from services.story.intake import StoryRequest
from services.story.process import bound_sockets


class FullRepository:
    """A database whose queue is full."""

    async def find_by_request(self, request_id: str, body_sha256: str) -> None:
        return None

    async def check_room(self, *, max_queued: int) -> None:
        raise QueueFull(retry_after_s=5.0)


async def test_a_full_queue_costs_no_decoding() -> None:
    untouched: Any = None  # pictures, packs and workflows: to use one is an AttributeError
    api = StoryApi(
        repository=FullRepository(),  # type: ignore[arg-type]
        store=untouched,
        workflows=untouched,
        broadcaster=Broadcaster(),
        sandbox=untouched,
        packs=untouched,
        characters=untouched,
        caption=untouched,
        frame=untouched,
        settings=StorySettings(),
    )
    with pytest.raises(QueueFull):
        await api.create(StoryRequest(image=b"x", caption="x"))


class SlowApi:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.entered = asyncio.Semaphore(0)
        self.go_on = asyncio.Event()

    async def get(self, story_id: str) -> Any:
        self.entered.release()
        await self.go_on.wait()
        raise StoryNotFound


async def test_grpc_takes_so_many_calls_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_grpc, "MOST_CALLS", 2)
    api = SlowApi()
    edge = GrpcEdge(api, host="127.0.0.1", port=0)  # type: ignore[arg-type]
    await edge.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{edge.port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = pb_grpc.StoryServiceStub(channel)
        taken = [stub.GetStory(pb.GetStoryRequest(story_id="x"), timeout=60) for _ in range(2)]
        for _ in taken:
            await asyncio.wait_for(api.entered.acquire(), 60)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetStory(pb.GetStoryRequest(story_id="x"), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        api.go_on.set()
        for call in taken:
            assert await call.code() is grpc.StatusCode.NOT_FOUND
    await edge.stop(0)


async def test_http_takes_so_many_calls_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_http, "MOST_CALLS", 2)
    go_on = asyncio.Event()

    async def slow(_scope: Any, _receive: Any, send: Any) -> None:
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    edge = EdgeMiddleware(slow, StorySettings())

    async def call(path: str) -> dict[str, Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await edge({"type": "http", "path": path, "headers": [(b"host", b"localhost")]}, receive, send)
        return dict(sent[0])

    taken = [asyncio.create_task(call("/v1/stories")) for _ in range(2)]
    await asyncio.sleep(0)
    refused = await asyncio.wait_for(call("/v1/stories"), 30)
    assert refused["status"] == 429
    assert b"retry-after" in dict(refused["headers"])
    probe = asyncio.create_task(call("/livez"))  # a busy process must not be taken for a dead one
    await asyncio.sleep(0)
    go_on.set()
    assert [(await answer)["status"] for answer in (*taken, probe)] == [200] * 3
    assert (await call("/v1/stories"))["status"] == 200


async def test_a_taken_port_is_a_wrong_setting_for_both_edges() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigInvalid, match=f"FABULA_PORT_BASE.*{port}"):
            bound_sockets("127.0.0.1", port)
        with pytest.raises(ConfigInvalid, match=f"FABULA_PORT_BASE.*{port}"):
            GrpcEdge(SlowApi(), host="127.0.0.1", port=port)  # type: ignore[arg-type]
    for free in bound_sockets("127.0.0.1", port):
        with free:
            assert free.getsockname() == ("127.0.0.1", port)
