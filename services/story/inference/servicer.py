"""`inference.GRPCInferenceService`: the RPCs, over the frame and caption services.

Like the other calls of this edge it has no login. What is not here answers UNIMPLEMENTED and says what to use.

`ModelInfer` answers with the result. `ModelStreamInfer` answers each request with previews, if the parameter
`preview_every` asks for them, and then with the result, whose parameter `triton_final_response` is true; a request that
fails is answered by an `error_message`, and the stream goes on. Answers carry their request's `id`.

The deadline is the sooner of the call's and the parameter `timeout`, microseconds from when the request arrived.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import grpc.aio
from fabula.caption.v1 import caption_service_pb2 as caption_pb
from fabula.caption.v1 import caption_service_pb2_grpc as caption_grpc
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from fabula.frame.v1 import frame_service_pb2_grpc as frame_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc

from services.runtime.call import Call, current_call, enter_call
from services.runtime.channel import ServiceChannel
from services.runtime.errors import (
    DeadlineExceeded,
    FabulaError,
    InvalidArgument,
    ReplicaLost,
    ShuttingDown,
    Unimplemented,
    UnknownField,
    ValueOutOfRange,
)
from services.runtime.rpc import stream_method, told_error, unary_method
from services.story.inference import caption, description, frame
from services.story.inference.catalog import KINDS, VERSION, Catalog, Model, check_digest, parse
from services.story.inference.parameters import Parameters, put_parameters
from services.story.inference.refusals import naming, with_reason
from services.story.inference.stream import answer_stream
from services.story.inference.tensors import read_inputs, read_outputs
from services.story.sandbox import Sandbox

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
LIST_TIMEOUT_S = 3.0
LOAD_TIMEOUT_S = 120.0  # a character may be a whole UNet, from a store far away
MOST_IN_STREAM = 32  # requests of one stream in progress; more of them wait unread
MOST_ID = 255  # characters of a request's id, which every answer repeats
MOST_TIMEOUT_US = 2**63 - 1
READY, SILENT = "READY", "UNAVAILABLE"  # states of models, as Triton names them

Method = Callable[[Any, Any, Any], Awaitable[Any]]


def reasoned(method: Method) -> Method:
    """Errors of the method begin with their reason: stock clients show the message and nothing else."""

    @functools.wraps(method)
    async def guarded(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except FabulaError as error:
            raise with_reason(error) from None

    return guarded


def _not_here(response: type, instead: str) -> Method:
    """A method that is not offered, and what to use."""

    async def refuse(self: Any, request: Any, context: Any) -> Any:
        raise Unimplemented(instead)

    refuse.__qualname__ = response.__name__.removesuffix("Response")
    return unary_method(response)(reasoned(refuse))


class InferenceServicer(pb_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # generated code is untyped
    """From inference protobuf, frame or caption service, to inference protobuf."""

    token = None  # as everywhere at this edge: it is bound to loopback or behind a gateway

    def __init__(
        self,
        *,
        caption_channel: ServiceChannel,
        frame_channel: ServiceChannel,
        sandbox: Sandbox,
        caption_timeout_s: float,
        frame_timeout_s: float,
    ) -> None:
        self._caption_channel = caption_channel
        self._caption = caption_grpc.CaptionServiceStub(caption_channel.grpc_channel)
        self._caption_timeout_s = caption_timeout_s
        self._frame_channel = frame_channel
        self._frame = frame_grpc.FrameServiceStub(frame_channel.grpc_channel)
        self._frame_timeout_s = frame_timeout_s
        self._sandbox = sandbox
        self._catalog = Catalog({"frame": self._frame_packs, "caption": self._caption_packs})
        self.accepting = False  # true while the process is ready, false again once it is stopping

    # -- health and description ----------------------------------------------------------------------------------------

    @unary_method(pb.ServerLiveResponse)
    @reasoned
    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:
        """That it answers is the answer."""
        return pb.ServerLiveResponse(live=True)

    @unary_method(pb.ServerReadyResponse)
    @reasoned
    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:
        """Whether requests are taken and both services answer, now."""
        listings = await asyncio.gather(*(self._catalog.ask(kind) for kind in KINDS)) if self.accepting else ()
        return pb.ServerReadyResponse(ready=self.accepting and all(listing.answered for listing in listings))

    @unary_method(pb.ModelReadyResponse)
    @reasoned
    async def ModelReady(self, request: Any, context: Any) -> pb.ModelReadyResponse:
        """Whether the model's service has its pack, now; false, as from Triton, for a model that does not exist.

        Of a character's model it says no more: weights are looked for when they are named.
        """
        try:
            name = parse(request.name)
        except FabulaError:
            return pb.ModelReadyResponse(ready=False)
        listing = await self._catalog.ask(name.kind)
        is_there = request.version in ("", VERSION) and any(pack.name == name.pack for pack in listing.packs)
        return pb.ModelReadyResponse(ready=self.accepting and listing.answered and is_there)

    @unary_method(pb.ServerMetadataResponse)
    @reasoned
    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:
        """Name and version."""
        return description.server_metadata()

    @unary_method(pb.ModelMetadataResponse)
    @reasoned
    async def ModelMetadata(self, request: Any, context: Any) -> pb.ModelMetadataResponse:
        """A model's tensors."""
        return description.model_metadata(await self._catalog.find(request.name, request.version))

    @unary_method(pb.ModelConfigResponse)
    @reasoned
    async def ModelConfig(self, request: Any, context: Any) -> pb.ModelConfigResponse:
        """A model's tensors, priorities and defaults."""
        return description.model_config(await self._catalog.find(request.name, request.version))

    # -- inference -----------------------------------------------------------------------------------------------------

    @unary_method(pb.ModelInferResponse)
    @reasoned
    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        """One result. Cancelling the call cancels the job."""
        async with aclosing(self._infer(request, streaming=False)) as answers:
            return await anext(answers)

    @stream_method(pb.ModelStreamInferResponse)
    async def ModelStreamInfer(self, request: Any, context: Any) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Results of many requests, previews before them. Cancelling the stream cancels its jobs."""
        async with aclosing(answer_stream(aiter(request), self._stream_answers, most=MOST_IN_STREAM)) as answers:
            async for answer in answers:
                yield answer

    async def _stream_answers(self, request: pb.ModelInferRequest) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """Every answer to one request of a stream; never raises."""
        try:
            async with aclosing(self._infer(request, streaming=True)) as answers:
                async for answer in answers:
                    yield pb.ModelStreamInferResponse(infer_response=answer)
        except Exception as error:  # noqa: BLE001 - the boundary: the other requests of the stream go on
            told = with_reason(told_error(error, "InferenceServicer.ModelStreamInfer"))
            request_id = request.id[:MOST_ID]
            answer = pb.ModelInferResponse(
                model_name=request.model_name[:MOST_ID], model_version=request.model_version[:MOST_ID], id=request_id
            )
            put_parameters(answer.parameters, {"triton_final_response": True})
            # The stock client drops the response beside an error; Triton tells it the id in this way too.
            prefix = f"[request id: {request_id}] " if request_id else ""
            yield pb.ModelStreamInferResponse(error_message=prefix + told.message, infer_response=answer)

    async def _infer(
        self, request: pb.ModelInferRequest, *, streaming: bool
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """Previews when streaming, then the result. Raises FabulaError, TimeoutError."""
        parameters = Parameters(request.parameters)
        limit_us = parameters.integer("timeout", 0, MOST_TIMEOUT_US) or 0
        priority = parameters.integer("priority", 0, 2**64 - 1) or 0
        parameters.flag("triton_enable_empty_final_response")  # the last response here is never empty
        if len(request.id) > MOST_ID:
            raise ValueOutOfRange(f"id: it has {len(request.id)} characters; at most {MOST_ID} are taken", field="id")
        call = _due_in(current_call() or Call(), limit_us / 1e6)
        enter_call(call)
        if not self.accepting:
            raise ShuttingDown()
        answers = self._results(request, parameters, priority=priority, streaming=streaming)
        async with aclosing(answers):
            while True:
                try:
                    # For each answer anew, so that the block is never left by a `yield`.
                    async with asyncio.timeout(call.remaining_s()):
                        is_final, answer = await anext(answers)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise DeadlineExceeded() from None
                answer.model_name = request.model_name
                answer.model_version = VERSION
                answer.id = request.id
                if streaming:
                    put_parameters(answer.parameters, {"triton_final_response": is_final})
                yield answer

    async def _results(
        self, request: pb.ModelInferRequest, parameters: Parameters, *, priority: int, streaming: bool
    ) -> AsyncGenerator[tuple[bool, pb.ModelInferResponse], None]:
        """Each answer, and whether it is the last."""
        model = await self._catalog.find(request.model_name, request.model_version)
        tensors = read_inputs(request, description.inputs(model))
        if model.name.kind == "caption":
            read_outputs(request, caption.OUTPUTS, caption.TEXT)
            asked = await caption.caption_request(model, tensors, parameters, clean=self._clean)
            yield True, caption.caption_response(asked, await self._write(asked))
            return
        outputs = read_outputs(request, frame.OUTPUTS, frame.IMAGE)
        job = await frame.frame_request(
            model, tensors, parameters, priority=priority, streaming=streaming, clean=self._clean
        )
        drawn: frame_pb.RenderedFrame | None = None
        async with aclosing(self._draw(job, self._frame_timeout_s)) as events:
            async for event in events:
                if event.HasField("preview"):
                    # In a thread: pixels, where they are asked for, are decoded.
                    yield False, await asyncio.to_thread(frame.preview_response, event.preview, outputs)
                elif event.HasField("frame"):
                    drawn = event.frame
        if drawn is None:
            raise ReplicaLost("the frame service ended its answer before the picture")
        yield True, await asyncio.to_thread(frame.frame_response, drawn, outputs)

    async def _write(self, asked: caption.CaptionRequest) -> caption.CaptionResponse:
        method = (
            self._caption.WriteCaption if isinstance(asked, caption_pb.WriteCaptionRequest) else self._caption.Describe
        )
        with naming(caption.names(asked)):
            written: caption.CaptionResponse = await self._caption_channel.call(
                method, asked, timeout_s=self._caption_timeout_s
            )
            return written

    async def _draw(
        self, job: frame_pb.RenderFrameRequest, timeout_s: float
    ) -> AsyncGenerator[frame_pb.RenderFrameResponse, None]:
        stream = self._frame_channel.stream(self._frame.RenderFrame, job, timeout_s=timeout_s)
        # Closed here and now, not whenever it is collected: that cancels the job.
        async with aclosing(cast("AsyncGenerator[Any, None]", stream)) as events:
            with naming(frame.NAMES):
                async for event in events:
                    if event.WhichOneof("event") is not None:  # the empty message that closes a failed stream
                        yield event

    async def _clean(self, picture: bytes) -> bytes:
        return (await self._sandbox.decode(picture)).png

    # -- repository ----------------------------------------------------------------------------------------------------

    @unary_method(pb.RepositoryIndexResponse)
    @reasoned
    async def RepositoryIndex(self, request: Any, context: Any) -> pb.RepositoryIndexResponse:
        """The models of both services; of a service that is silent those it had, as UNAVAILABLE."""
        _check_repository(request.repository_name)
        response = pb.RepositoryIndexResponse()
        for listing in await asyncio.gather(*(self._catalog.ask(kind) for kind in KINDS)):
            if not listing.answered and request.ready:
                continue
            for pack in listing.packs:
                response.models.add(
                    name=f"{listing.kind}/{pack.name}",
                    version=VERSION,
                    state=READY if listing.answered else SILENT,
                    reason="" if listing.answered else f"the {listing.kind} service does not answer",
                )
        return response

    @unary_method(pb.RepositoryModelLoadResponse)
    @reasoned
    async def RepositoryModelLoad(self, request: Any, context: Any) -> pb.RepositoryModelLoadResponse:
        """Has a character's weights read and checked; a pack is loaded already, if there is one.

        The frame service loads what a job names, before it queues the job. So one is queued, behind all others, and
        taken back at once. Where there are several replicas, this reaches one of them; the others load when a request
        names the character to them.
        """
        model, character = await self._repository_model(request)
        if not character:
            return pb.RepositoryModelLoadResponse()
        job = frame_pb.RenderFrameRequest(
            pack=model.name.pack,
            description="a character",
            steps=1,
            priority=frame_pb.PRIORITY_BATCH,
            characters=[frame_pb.CharacterWeights(digest=character)],
        )
        async with aclosing(self._draw(job, LOAD_TIMEOUT_S)) as events:
            if await anext(events, None) is None:
                raise ReplicaLost("the frame service ended its answer before it had loaded the character")
        return pb.RepositoryModelLoadResponse()

    @unary_method(pb.RepositoryModelUnloadResponse)
    @reasoned
    async def RepositoryModelUnload(self, request: Any, context: Any) -> pb.RepositoryModelUnloadResponse:
        """Puts a character's weights out of memory, of the replica that answers. Unloading twice is well."""
        _, character = await self._repository_model(request)
        if not character:
            raise Unimplemented(
                "packs come and go with their services; a character is unloaded as frame/<pack>/<digest>"
            )
        asked = frame_pb.UnloadCharacterRequest(digest=character)
        await self._frame_channel.call(self._frame.UnloadCharacter, asked, timeout_s=LIST_TIMEOUT_S)
        return pb.RepositoryModelUnloadResponse()

    async def _repository_model(self, request: Any) -> tuple[Model, str]:
        """The model of a repository call, and its character: by the model's name, or the parameter `character`."""
        _check_repository(request.repository_name)
        named = parse(request.model_name)
        character = named.character
        for name, parameter in request.parameters.items():
            if name == "character" and named.kind == "frame":
                if character:
                    raise InvalidArgument("character: the model's name has one already", field="character")
                if parameter.WhichOneof("parameter_choice") != "string_param":
                    raise ValueOutOfRange("character: a text is needed", field="character")
                character = check_digest(parameter.string_param, "character")
            elif name == "config" or name.startswith("file:"):
                raise Unimplemented(f"{name[:100]}: models come with packs, and are not configured or sent by clients")
            elif name != "unload_dependents":  # nothing depends on a character
                raise UnknownField(
                    f"parameters: none is called {name[:100]!r}; known here: character", field=name[:100]
                )
        return await self._catalog.find(request.model_name), character

    # -- what is not here ----------------------------------------------------------------------------------------------

    ModelStatistics = _not_here(pb.ModelStatisticsResponse, "figures of all services are at /metrics over HTTP")
    SystemSharedMemoryStatus = _not_here(pb.SystemSharedMemoryStatusResponse, "send tensors in the request")
    SystemSharedMemoryRegister = _not_here(pb.SystemSharedMemoryRegisterResponse, "send tensors in the request")
    SystemSharedMemoryUnregister = _not_here(pb.SystemSharedMemoryUnregisterResponse, "send tensors in the request")
    CudaSharedMemoryStatus = _not_here(pb.CudaSharedMemoryStatusResponse, "send tensors in the request")
    CudaSharedMemoryRegister = _not_here(pb.CudaSharedMemoryRegisterResponse, "send tensors in the request")
    CudaSharedMemoryUnregister = _not_here(pb.CudaSharedMemoryUnregisterResponse, "send tensors in the request")
    TraceSetting = _not_here(pb.TraceSettingResponse, "send a traceparent header; logs carry its trace id")
    LogSettings = _not_here(pb.LogSettingsResponse, "FABULA_LOG_LEVEL is read when a service starts")

    # -- the two services ----------------------------------------------------------------------------------------------

    async def _frame_packs(self) -> tuple[Any, ...]:
        asked = frame_pb.ListPacksRequest()
        response = await self._frame_channel.call(self._frame.ListPacks, asked, timeout_s=LIST_TIMEOUT_S)
        return tuple(response.packs)

    async def _caption_packs(self) -> tuple[Any, ...]:
        asked = caption_pb.ListPacksRequest()
        response = await self._caption_channel.call(self._caption.ListPacks, asked, timeout_s=LIST_TIMEOUT_S)
        return tuple(response.packs)


def add_to_server(servicer: InferenceServicer, server: grpc.aio.Server) -> None:
    """Registers the service."""
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)


def _check_repository(name: str) -> None:
    if name:
        raise ValueOutOfRange("repository_name: there is one repository; leave it empty", field="repository_name")


def _due_in(call: Call, limit_s: float) -> Call:
    """The call, due when it was or in `limit_s` seconds, whichever is sooner; 0 is no limit."""
    if not limit_s:
        return call
    due_s = time.monotonic() + limit_s
    return replace(call, deadline_s=due_s if call.deadline_s is None else min(due_s, call.deadline_s))
