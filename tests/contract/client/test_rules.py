"""The client's rules against a service that behaves as told: what is tried again, with which key, what is checked."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from fabula.story.v1 import story_pb2, story_service_pb2, story_service_pb2_grpc
from fabula_client import (
    AsyncClient,
    DeadlineExceeded,
    ImageCorrupt,
    Internal,
    NotFound,
    ResourceExhausted,
    RetryPolicy,
    Unavailable,
)

from services.runtime.errors import FabulaError, QueueFull, ReplicaLost, StorageFull, StoryNotFound
from services.runtime.errors import Internal as InternalFault
from services.runtime.wire import grpc_code, status_from_error

QUICK = RetryPolicy(attempts=4, first_pause_s=0.01, longest_pause_s=0.02)


class Scripted(story_service_pb2_grpc.StoryServiceServicer):
    """Fails as told, then answers."""

    def __init__(self) -> None:
        self.failures: list[FabulaError] = []
        self.requests: list[Any] = []
        self.ids: list[str] = []
        self.image = b"chunk"

    async def _enter(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        self.requests.append(request)
        self.ids.append(dict(context.invocation_metadata())["fabula-request-id"])
        if self.failures:
            error = self.failures.pop(0)
            details = (("grpc-status-details-bin", status_from_error(error).SerializeToString()),)
            await context.abort(grpc_code(error.code), error.message, details)

    async def CreateStory(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        await self._enter(request, context)
        return story_service_pb2.CreateStoryResponse(story=story_pb2.Story(story_id="s1"))

    async def DeleteStory(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        await self._enter(request, context)
        return story_service_pb2.DeleteStoryResponse()

    async def GetStory(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        await self._enter(request, context)
        return story_service_pb2.GetStoryResponse(story=story_pb2.Story(story_id=request.story_id))

    async def ReadImage(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        yield story_service_pb2.ReadImageResponse(chunk=self.image)
        await self._enter(request, context)


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[Scripted, str]]:
    servicer = Scripted()
    server = grpc.aio.server()
    story_service_pb2_grpc.add_StoryServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(0)


async def create(target: str, **options: Any) -> Any:
    async with AsyncClient(target, **{"retry": QUICK, **options}) as client:
        return await client.stories.create(image=b"x", caption="Once.")


async def test_every_try_carries_the_same_key_and_id(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    servicer.failures = [ReplicaLost(), QueueFull(retry_after_s=0.01), ReplicaLost()]
    assert (await create(target)).story_id == "s1"
    assert len(servicer.requests) == 4
    assert len({request.request_id for request in servicer.requests}) == 1
    assert servicer.requests[0].request_id
    assert len(set(servicer.ids)) == 1
    assert (await create(target)).story_id == "s1"
    assert len({request.request_id for request in servicer.requests}) == 2  # another call is another request


async def test_tries_are_bounded(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    servicer.failures = [ReplicaLost() for _ in range(10)]
    with pytest.raises(Unavailable) as error:
        await create(target)
    assert error.value.reason == "REPLICA_LOST"
    assert len(servicer.requests) == 4


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (lambda: InternalFault(), Internal),
        (lambda: StoryNotFound(), NotFound),
        (lambda: StorageFull(), ResourceExhausted),  # without RetryInfo: trying again cannot help
    ],
)
async def test_other_errors_are_not_tried_again(
    scripted: tuple[Scripted, str], fault: Callable[[], FabulaError], raised: type[Exception]
) -> None:
    servicer, target = scripted
    servicer.failures = [fault()]
    with pytest.raises(raised):
        await create(target)
    assert len(servicer.requests) == 1


async def test_an_asked_for_pause_beyond_the_deadline_is_not_waited_for(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    servicer.failures = [QueueFull(retry_after_s=3600)]
    with pytest.raises(ResourceExhausted) as error:
        await create(target, timeout_s=30)
    assert error.value.retry_after_s == 3600
    assert len(servicer.requests) == 1


async def test_a_deletion_whose_answer_was_lost_counts_as_done(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    async with AsyncClient(target, retry=QUICK) as client:
        story = await client.stories.get("s1")
        servicer.failures = [ReplicaLost(), StoryNotFound()]
        await story.delete()
        servicer.failures = [StoryNotFound()]
        with pytest.raises(NotFound):
            await story.delete()


async def test_a_broken_picture_stream_is_read_again_and_checked(scripted: tuple[Scripted, str]) -> None:
    servicer, target = scripted
    sha256 = "c7e4c6a1f2a0d0d3"
    async with AsyncClient(target, retry=QUICK) as client:
        story = await client.stories.get("s1")
        servicer.failures = [ReplicaLost()]
        with pytest.raises(ImageCorrupt):
            await story.read_image(sha256)
        assert await story.read_image(hashlib.sha256(b"chunk").hexdigest()) == b"chunk"
    assert len(servicer.requests) == 4  # get, two tries of the first picture, one of the second


async def test_a_deadline_ends_a_call() -> None:
    # Nobody listens: the address is reserved for documentation, so packets to it go nowhere or come back refused.
    async with AsyncClient("192.0.2.1:9", timeout_s=0.5, retry=RetryPolicy(attempts=100)) as client:
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await client.stories.get("s1")
