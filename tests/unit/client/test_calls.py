"""A connection whose other end is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from fabula.story.v1 import story_pb2, story_service_pb2, story_service_pb2_grpc
from fabula_client import AsyncClient, Unavailable, calls


class Silent(story_service_pb2_grpc.StoryServiceServicer):
    """A watch of a story that waits."""

    def __init__(self) -> None:
        self.watched = asyncio.Event()

    async def GetStory(self, request: Any, context: Any) -> Any:
        return story_service_pb2.GetStoryResponse(story=story_pb2.Story(story_id=request.story_id))

    async def WatchStory(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.watched.set()
        await asyncio.Event().wait()
        yield


class Cable:
    """Carries bytes between a client and a server until it is cut; then both ends hear nothing at all, not even a
    close."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._cut = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target in ((reader, there_writer), (there_reader, writer)):
            self._tasks.add(asyncio.create_task(self._carry(source, target)))

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if not self._cut:
                    target.write(data)

    def cut(self) -> None:
        self._cut = True


async def test_a_host_that_vanished_breaks_a_silent_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"grpc.keepalive_time_ms": 200, "grpc.keepalive_timeout_ms": 500, "grpc.http2.ping_timeout_ms": 500}
    options = tuple((name, quick.get(name, value)) for name, value in calls._CHANNEL_OPTIONS)
    monkeypatch.setattr(calls, "_CHANNEL_OPTIONS", options)
    servicer, server = Silent(), grpc.aio.server(options=[("grpc.http2.min_ping_interval_without_data_ms", 50)])
    story_service_pb2_grpc.add_StoryServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    cable = Cable(port)
    listener = await asyncio.start_server(cable, "127.0.0.1", 0)
    target = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        async with AsyncClient(target) as client, asyncio.timeout(40):
            story = await client.stories.get("s1")
            events = story.watch(patience_s=0.0)
            waiting = asyncio.create_task(anext(events))
            await asyncio.wait_for(servicer.watched.wait(), 30)
            cable.cut()
            with pytest.raises(Unavailable):
                await waiting
    finally:
        listener.close()
        await server.stop(0)
