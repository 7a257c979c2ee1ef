"""The customization service's RPCs, and the process parts around them: from protobuf, API, to protobuf.

The same `CustomizationServicer` runs under plain grpc.aio (`python -m services.customization`) and as a Ray Serve
deployment (`app`). What may go wrong becomes a status in `services.runtime.rpc`; no foreign exception leaves the
process. Importing this does not import torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import structlog
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import customization_service_pb2_grpc as pb_grpc

from services.customization.api import CustomizationApi
from services.customization.config import CustomizationSettings
from services.customization.loading import CustomizationProcess
from services.customization.protobuf import (
    checkpoint_to_pb,
    estimate_to_pb,
    event_to_pb,
    finding_to_pb,
    import_from_pb,
    job_to_pb,
    request_from_pb,
    version_to_pb,
)
from services.customization.states import Wish
from services.runtime.config import Installation
from services.runtime.rpc import stream_method, unary_method
from services.runtime.telemetry import configure_logging

CHUNK_BYTES = 64 * 1024

log = structlog.get_logger("fabula.customization")


class CustomizationServicer(pb_grpc.CustomizationServiceServicer):  # type: ignore[misc]
    """CustomizationService over the API. `token` is the installation's; None switches the check off."""

    def __init__(self, process: CustomizationProcess, token: str | None) -> None:
        self.process = process
        self.token = token

    async def _api(self) -> CustomizationApi:
        """Serve makes a replica outside its event loop, so the process starts with the first call or health check."""
        await self.process.start()
        return self.process.api

    @unary_method(pb.CreateCustomizationJobResponse)
    async def CreateCustomizationJob(self, request: Any, context: Any) -> Any:
        created = await (await self._api()).create(request_from_pb(request))
        return pb.CreateCustomizationJobResponse(
            job=job_to_pb(created.job) if created.job is not None else None,
            findings=[finding_to_pb(finding) for finding in created.findings],
            estimate=estimate_to_pb(created.estimate),
            is_acceptable=created.is_acceptable,
        )

    @unary_method(pb.GetCustomizationJobResponse)
    async def GetCustomizationJob(self, request: Any, context: Any) -> Any:
        return pb.GetCustomizationJobResponse(job=job_to_pb(await (await self._api()).get(request.job_id)))

    @unary_method(pb.ListCustomizationJobsResponse)
    async def ListCustomizationJobs(self, request: Any, context: Any) -> Any:
        page = await (await self._api()).list(
            page_size=request.page_size, page_token=request.page_token, show_deleted=request.show_deleted
        )
        return pb.ListCustomizationJobsResponse(
            jobs=[job_to_pb(job) for job in page.jobs], next_page_token=page.next_page_token
        )

    @stream_method(pb.WatchCustomizationJobResponse)
    async def WatchCustomizationJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with aclosing((await self._api()).watch(request.job_id, after=request.after_sequence)) as events:
            async for event in events:
                yield pb.WatchCustomizationJobResponse(event=event_to_pb(event))

    @unary_method(pb.CancelCustomizationJobResponse)
    async def CancelCustomizationJob(self, request: Any, context: Any) -> Any:
        return pb.CancelCustomizationJobResponse(
            job=job_to_pb(await (await self._api()).wish(request.job_id, "cancel"))
        )

    @unary_method(pb.PauseCustomizationJobResponse)
    async def PauseCustomizationJob(self, request: Any, context: Any) -> Any:
        return pb.PauseCustomizationJobResponse(job=await self._wished(request.job_id, "pause"))

    @unary_method(pb.ResumeCustomizationJobResponse)
    async def ResumeCustomizationJob(self, request: Any, context: Any) -> Any:
        return pb.ResumeCustomizationJobResponse(
            job=job_to_pb(await (await self._api()).wish(request.job_id, "resume"))
        )

    async def _wished(self, job_id: str, wish: Wish) -> Any:
        return job_to_pb(await (await self._api()).wish(job_id, wish))

    @unary_method(pb.ListCheckpointsResponse)
    async def ListCheckpoints(self, request: Any, context: Any) -> Any:
        page = await (await self._api()).checkpoints(
            request.job_id, page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListCheckpointsResponse(
            checkpoints=[
                checkpoint_to_pb(one, is_suggested=one.step == page.suggested_step) for one in page.checkpoints
            ],
            next_page_token=page.next_page_token,
        )

    @unary_method(pb.PublishCheckpointResponse)
    async def PublishCheckpoint(self, request: Any, context: Any) -> Any:
        version = await (await self._api()).publish(request.job_id, request.step)
        return pb.PublishCheckpointResponse(version=version_to_pb(version))

    @unary_method(pb.DeleteCustomizationJobResponse)
    async def DeleteCustomizationJob(self, request: Any, context: Any) -> Any:
        return pb.DeleteCustomizationJobResponse(job=job_to_pb(await (await self._api()).delete(request.job_id)))

    @unary_method(pb.UndeleteCustomizationJobResponse)
    async def UndeleteCustomizationJob(self, request: Any, context: Any) -> Any:
        return pb.UndeleteCustomizationJobResponse(job=job_to_pb(await (await self._api()).undelete(request.job_id)))

    @unary_method(pb.ListCharacterVersionsResponse)
    async def ListCharacterVersions(self, request: Any, context: Any) -> Any:
        page = await (await self._api()).versions(
            page_size=request.page_size,
            page_token=request.page_token,
            name=request.name,
            show_deleted=request.show_deleted,
        )
        return pb.ListCharacterVersionsResponse(
            versions=[version_to_pb(version) for version in page.versions], next_page_token=page.next_page_token
        )

    @unary_method(pb.ImportCharacterVersionResponse)
    async def ImportCharacterVersion(self, request: Any, context: Any) -> Any:
        version, is_new = await (await self._api()).import_version(import_from_pb(request))
        return pb.ImportCharacterVersionResponse(version=version_to_pb(version), is_new=is_new)

    @unary_method(pb.DeleteCharacterVersionResponse)
    async def DeleteCharacterVersion(self, request: Any, context: Any) -> Any:
        version = await (await self._api()).delete_version(request.version_id)
        return pb.DeleteCharacterVersionResponse(version=version_to_pb(version))

    @unary_method(pb.UndeleteCharacterVersionResponse)
    async def UndeleteCharacterVersion(self, request: Any, context: Any) -> Any:
        version = await (await self._api()).undelete_version(request.version_id)
        return pb.UndeleteCharacterVersionResponse(version=version_to_pb(version))

    @stream_method(pb.ReadWeightsResponse)
    async def ReadWeights(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with aclosing((await self._api()).read_weights(request.version_id, CHUNK_BYTES)) as chunks:
            async for chunk in chunks:
                yield pb.ReadWeightsResponse(chunk=chunk)

    @stream_method(pb.ReadImageResponse)
    async def ReadImage(self, request: Any, context: Any) -> AsyncIterator[Any]:
        image = await (await self._api()).read_image(request.job_id, request.sha256, request.version_id)
        for start in range(0, len(image), CHUNK_BYTES):
            yield pb.ReadImageResponse(chunk=image[start : start + CHUNK_BYTES])

    @stream_method(pb.ReadReportResponse)
    async def ReadReport(self, request: Any, context: Any) -> AsyncIterator[Any]:
        page = await (await self._api()).read_report(request.job_id)
        for start in range(0, len(page), CHUNK_BYTES):
            yield pb.ReadReportResponse(chunk=page[start : start + CHUNK_BYTES])


class CustomizationDeployment(CustomizationServicer):
    """The servicer as a Ray Serve replica. Training processes outlive it: the next replica goes on with them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        installation = Installation.load()
        configure_logging("customization", installation.log_level)
        try:
            process = CustomizationProcess(installation, CustomizationSettings.load(**settings))
            token = installation.read_token()
        # Ray would pickle the exception, with all that it holds.
        except Exception as error:
            log.exception("customization_cannot_start")
            raise RuntimeError(f"the customization service cannot start: {type(error).__name__}: {error}") from None
        super().__init__(process, token)

    async def check_health(self) -> None:
        """Called by Ray Serve every few seconds; the first call starts the process."""
        try:
            await self.process.start()
        except Exception as error:
            log.exception("customization_cannot_start")
            raise RuntimeError(f"the customization service cannot start: {type(error).__name__}: {error}") from None
        if not self.process.is_healthy:
            raise RuntimeError("the runner of the customization service has ended")


def app(args: dict[str, Any]) -> Any:
    """The Ray Serve application. `args` are CustomizationSettings' fields and win over the environment."""
    from ray import serve

    settings = CustomizationSettings.load(**args)
    deployment = serve.deployment(
        CustomizationDeployment,
        name="CustomizationDeployment",
        num_replicas=1,
        max_ongoing_requests=1000,  # most are watches, which last as long as a job
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5.0,
        health_check_timeout_s=60.0,
        graceful_shutdown_timeout_s=10.0,
    )
    return deployment.bind(settings.model_dump(mode="json"))
