"""CustomizationService on the public edge over gRPC: the same messages as the service behind it, passed on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import customization_service_pb2_grpc as pb_grpc

from services.runtime.rpc import stream_method, unary_method
from services.story.customization import Customizations

SERVICE = pb.DESCRIPTOR.services_by_name["CustomizationService"].full_name


class CustomizationForward(pb_grpc.CustomizationServiceServicer):  # type: ignore[misc]  # generated code is untyped
    """From protobuf to protobuf."""

    token = None  # as the rest of the public edge

    def __init__(self, customizations: Customizations) -> None:
        self._customizations = customizations

    @unary_method(pb.CreateCustomizationJobResponse)
    async def CreateCustomizationJob(self, request: Any, context: Any) -> Any:
        return await self._customizations.create(request)

    @unary_method(pb.GetCustomizationJobResponse)
    async def GetCustomizationJob(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("GetCustomizationJob", request)

    @unary_method(pb.ListCustomizationJobsResponse)
    async def ListCustomizationJobs(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("ListCustomizationJobs", request)

    @stream_method(pb.WatchCustomizationJobResponse)
    async def WatchCustomizationJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with aclosing(self._customizations.watch(request)) as messages:
            async for message in messages:
                yield message

    @unary_method(pb.CancelCustomizationJobResponse)
    async def CancelCustomizationJob(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("CancelCustomizationJob", request)

    @unary_method(pb.PauseCustomizationJobResponse)
    async def PauseCustomizationJob(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("PauseCustomizationJob", request)

    @unary_method(pb.ResumeCustomizationJobResponse)
    async def ResumeCustomizationJob(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("ResumeCustomizationJob", request)

    @unary_method(pb.ListCheckpointsResponse)
    async def ListCheckpoints(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("ListCheckpoints", request)

    @unary_method(pb.PublishCheckpointResponse)
    async def PublishCheckpoint(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("PublishCheckpoint", request)

    @unary_method(pb.DeleteCustomizationJobResponse)
    async def DeleteCustomizationJob(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("DeleteCustomizationJob", request)

    @unary_method(pb.UndeleteCustomizationJobResponse)
    async def UndeleteCustomizationJob(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("UndeleteCustomizationJob", request)

    @unary_method(pb.ListCharacterVersionsResponse)
    async def ListCharacterVersions(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("ListCharacterVersions", request)

    @unary_method(pb.ImportCharacterVersionResponse)
    async def ImportCharacterVersion(self, request: Any, context: Any) -> Any:
        return await self._customizations.import_version(request)

    @unary_method(pb.DeleteCharacterVersionResponse)
    async def DeleteCharacterVersion(self, request: Any, context: Any) -> Any:
        return await self._customizations.delete_version(request)

    @unary_method(pb.UndeleteCharacterVersionResponse)
    async def UndeleteCharacterVersion(self, request: Any, context: Any) -> Any:
        return await self._customizations.ask("UndeleteCharacterVersion", request)

    @stream_method(pb.ReadWeightsResponse)
    async def ReadWeights(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with aclosing(self._customizations.read("ReadWeights", request)) as chunks:
            async for chunk in chunks:
                yield pb.ReadWeightsResponse(chunk=chunk)

    @stream_method(pb.ReadImageResponse)
    async def ReadImage(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with aclosing(self._customizations.read("ReadImage", request)) as chunks:
            async for chunk in chunks:
                yield pb.ReadImageResponse(chunk=chunk)

    @stream_method(pb.ReadReportResponse)
    async def ReadReport(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with aclosing(self._customizations.read("ReadReport", request)) as chunks:
            async for chunk in chunks:
                yield pb.ReadReportResponse(chunk=chunk)


def add_to_server(customizations: Customizations, server: grpc.aio.Server) -> None:
    """Makes a server answer for it."""
    pb_grpc.add_CustomizationServiceServicer_to_server(CustomizationForward(customizations), server)
