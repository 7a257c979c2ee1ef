"""The public API over gRPC: StoryService, the Open Inference Protocol, grpc.health.v1, reflection."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from fabula.story.v1 import story_pb2
from fabula.story.v1 import story_service_pb2 as pb
from fabula.story.v1 import story_service_pb2_grpc as pb_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.runtime.rpc import stream_method, unary_method
from services.story.api import MOST_CALLS, StoryApi
from services.story.config import port_refused
from services.story.customization import MOST_MESSAGE_BYTES as MOST_JOB_BYTES
from services.story.customization import Customizations
from services.story.customization_grpc import SERVICE as CUSTOMIZATION
from services.story.customization_grpc import add_to_server
from services.story.editing import EditRequest, InsertRequest
from services.story.inference import servicer as inference
from services.story.intake import MOST_IMAGE_BYTES, StoryRequest
from services.story.metrics import REQUEST_SECONDS
from services.story.protobuf import backends_to_pb, event_to_pb, story_to_pb
from services.story.records import DEFAULT_QUALITY

SERVICE = pb.DESCRIPTOR.services_by_name["StoryService"].full_name
CHUNK_BYTES = 64 * 1024
# Twice what is accepted, so that somewhat too large a picture gets our answer and not the transport's.
MOST_MESSAGE_BYTES = 2 * MOST_IMAGE_BYTES


class StoryServicer(pb_grpc.StoryServiceServicer):  # type: ignore[misc]  # generated code is untyped
    """From protobuf, API, to protobuf."""

    token = None  # the public edge has no login; it is bound to loopback or behind a gateway

    def __init__(self, api: StoryApi) -> None:
        self._api = api

    @unary_method(pb.CreateStoryResponse)
    async def CreateStory(self, request: Any, context: Any) -> Any:
        story, _ = await self._api.create(story_request_from_pb(request))
        return pb.CreateStoryResponse(story=story_to_pb(story))

    @unary_method(pb.GetStoryResponse)
    async def GetStory(self, request: Any, context: Any) -> Any:
        return pb.GetStoryResponse(story=story_to_pb(await self._api.get(request.story_id)))

    @unary_method(pb.ListStoriesResponse)
    async def ListStories(self, request: Any, context: Any) -> Any:
        page = await self._api.list(page_size=request.page_size, page_token=request.page_token)
        return pb.ListStoriesResponse(
            stories=[story_to_pb(story) for story in page.stories], next_page_token=page.next_page_token
        )

    @stream_method(pb.WatchStoryResponse)
    async def WatchStory(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._api.watch(request.story_id, after=request.after_sequence):
            yield pb.WatchStoryResponse(event=event_to_pb(event))

    @unary_method(pb.CancelStoryResponse)
    async def CancelStory(self, request: Any, context: Any) -> Any:
        return pb.CancelStoryResponse(story=story_to_pb(await self._api.cancel(request.story_id)))

    @unary_method(pb.DeleteStoryResponse)
    async def DeleteStory(self, request: Any, context: Any) -> Any:
        await self._api.delete(request.story_id)
        return pb.DeleteStoryResponse()

    @unary_method(pb.EditFrameResponse)
    async def EditFrame(self, request: Any, context: Any) -> Any:
        story = await self._api.edit_frame(
            EditRequest(
                request_id=request.request_id,
                story_id=request.story_id,
                frame_index=request.frame_index,
                **_given(request, "strength", "caption", "description", "seed"),
            )
        )
        return pb.EditFrameResponse(story=story_to_pb(story))

    @unary_method(pb.InsertFrameResponse)
    async def InsertFrame(self, request: Any, context: Any) -> Any:
        story = await self._api.insert_frame(
            InsertRequest(
                request_id=request.request_id,
                story_id=request.story_id,
                after_frame_index=request.after_frame_index,
                caption=request.caption,
                **_given(request, "description", "seed"),
            )
        )
        return pb.InsertFrameResponse(story=story_to_pb(story))

    @stream_method(pb.ReadImageResponse)
    async def ReadImage(self, request: Any, context: Any) -> AsyncIterator[Any]:
        image = await self._api.read_image(request.story_id, request.sha256)
        for start in range(0, len(image), CHUNK_BYTES):
            yield pb.ReadImageResponse(chunk=image[start : start + CHUNK_BYTES])

    @unary_method(pb.ListBackendsResponse)
    async def ListBackends(self, request: Any, context: Any) -> Any:
        found = await self._api.backends()
        return pb.ListBackendsResponse(
            backends=backends_to_pb(found.backends), unavailable_services=found.unavailable_services
        )


def story_request_from_pb(request: Any) -> StoryRequest:
    """CreateStory's fields; what is not set is None."""
    return StoryRequest(
        request_id=request.request_id,
        image=request.image,
        caption=request.caption,
        pack=request.pack,
        quality=_quality_from_pb(request.quality),
        characters=tuple(request.characters),
        **_given(request, "frame_count", "seed", "steps", "text_guidance", "image_guidance", "temperature"),
    )


def _given(request: Any, *names: str) -> dict[str, Any]:
    """Optional fields; what is not set is None."""
    return {name: getattr(request, name) if request.HasField(name) else None for name in names}


def _quality_from_pb(number: int) -> str:
    """The word for a quality; a number without one stays a number, to be refused with the other options."""
    if number == story_pb2.QUALITY_UNSPECIFIED:
        return DEFAULT_QUALITY
    try:
        return str(story_pb2.Quality.Name(number)).removeprefix("QUALITY_").lower()
    except ValueError:
        return str(number)


class RequestMetrics(grpc.aio.ServerInterceptor):  # type: ignore[misc, type-arg]  # the stubs make it generic
    """Times every call of our services, by method and outcome."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Wraps the handler of one method."""
        handler = await continuation(details)
        service, _, method = details.method.removeprefix("/").partition("/")
        if handler is None or service not in (SERVICE, CUSTOMIZATION, inference.SERVICE):
            return handler

        def observe(started: float, context: Any) -> None:
            code = context.code()
            name = code.name if hasattr(code, "name") else "OK"
            REQUEST_SECONDS.labels(protocol="grpc", method=method, reason=name).observe(time.monotonic() - started)

        if handler.response_streaming:
            inner_stream = handler.stream_stream or handler.unary_stream

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                started = time.monotonic()
                try:
                    async with aclosing(inner_stream(request, context)) as messages:
                        async for message in messages:
                            yield message
                finally:
                    observe(started, context)

            wrapped = (
                grpc.stream_stream_rpc_method_handler if handler.stream_stream else grpc.unary_stream_rpc_method_handler
            )
            return wrapped(stream, handler.request_deserializer, handler.response_serializer)
        inner = handler.unary_unary

        async def unary(request: Any, context: Any) -> Any:
            started = time.monotonic()
            try:
                return await inner(request, context)
            finally:
                observe(started, context)

        return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)


class GrpcEdge:
    """The gRPC server and its health. Making one binds its port and raises ConfigInvalid when that is taken."""

    def __init__(
        self,
        api: StoryApi,
        *,
        host: str,
        port: int,
        inference_servicer: inference.InferenceServicer | None = None,
        customizations: Customizations | None = None,
    ) -> None:
        self._inference = inference_servicer
        most_bytes = MOST_MESSAGE_BYTES if customizations is None else MOST_JOB_BYTES
        self._server = grpc.aio.server(
            interceptors=[RequestMetrics()],
            maximum_concurrent_rpcs=MOST_CALLS,
            options=[
                ("grpc.max_receive_message_length", most_bytes),
                ("grpc.so_reuseport", 0),  # a second process on the port must fail, not share it
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        pb_grpc.add_StoryServiceServicer_to_server(StoryServicer(api), self._server)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the package has no types
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._services: tuple[str, ...] = (SERVICE,)
        if inference_servicer is not None:
            inference.add_to_server(inference_servicer, self._server)
            self._services += (inference.SERVICE,)
        if customizations is not None:
            add_to_server(customizations, self._server)
            self._services += (CUSTOMIZATION,)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        name = f"[{host}]" if ":" in host else host
        try:
            self.port = self._server.add_insecure_port(f"{name}:{port}")
        except RuntimeError as error:
            raise port_refused(host, port, str(error)) from error

    async def start(self) -> None:
        """Starts to answer; health says NOT_SERVING until `serving`."""
        await self.serving(False)
        await self._server.start()

    async def serving(self, is_serving: bool) -> None:
        """What health answers from now on, and whether inference is accepted."""
        if self._inference is not None:
            self._inference.accepting = is_serving
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls; those in flight have `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
