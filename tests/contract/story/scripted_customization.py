"""A deterministic customization service: the real proto over real gRPC, jobs in memory, events from a list.

Every request is written down. Tests add events, switch on failures, and look at what reached the service.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import customization_service_pb2_grpc as pb_grpc
from fabula.customization.v1 import job_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.runtime.errors import (
    CharacterVersionNotFound,
    CustomizationJobNotFound,
    ExampleStoryRefused,
    FabulaError,
    FieldViolation,
    IdempotencyKeyReused,
    ImageNotFound,
    JobStateUnsuitable,
)
from services.runtime.rpc import stream_method, unary_method
from tests.contract.story.scripted_services import TOKEN

State = job_pb2.CustomizationJob
WEIGHTS = bytes(range(256)) * 1024
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
PROBE = b"\x89PNG a probe"
PROBE_SHA256 = hashlib.sha256(PROBE).hexdigest()
VERSION_ID = "f00d" * 16
AT = Timestamp(seconds=1_700_000_000, nanos=500_000_000)
ESTIMATE = job_pb2.Estimate(
    compute_duration=Duration(seconds=90),
    min_eta=Duration(seconds=60),
    max_eta=Duration(seconds=120, nanos=500_000_000),
    measured_count=2,
)
BLURRED = job_pb2.Finding(
    code="FRAME_BLURRED",
    severity=job_pb2.Finding.SEVERITY_WARNING,
    frame_number=2,
    message="Frame 2 is blurred.",
    mend="Upload a sharper picture.",
)
UNREADABLE = "FRAME_UNREADABLE"
CHUNK = 64 * 1024


def checkpoint(step: int) -> job_pb2.Checkpoint:
    return job_pb2.Checkpoint(
        step=step,
        weights_sha256=SHA256,
        size_bytes=len(WEIGHTS),
        rank=16,
        create_time=AT,
        figures={"recognised": step / 100, "kept": 0.9, "look_alike": 0.0},
        is_suggested=step == 100,
    )


class CustomizationScript:
    """What was asked, what there is, and how the service shall behave."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.failures: dict[str, list[FabulaError]] = defaultdict(list)  # method: errors to raise, first ones first
        self.jobs: dict[str, Any] = {}
        self.bodies: dict[str, tuple[bytes, str]] = {}  # request id: body and job
        self.events: dict[str, list[Any]] = defaultdict(list)
        self.versions_a_page = 200
        self.blurred = False  # the checks find a warning
        self.watches_break_after = 0  # events, of every stream; 0: never
        self.versions: list[Any] = []  # published besides those of jobs, newest first
        self.pictures: dict[str, bytes] = {}  # of imported versions, by SHA-256
        self.held = False  # a job does not go on to its end by itself

    def requests(self, method: str) -> list[Any]:
        return [request for called, request in self.calls if called == method]

    def tell(self, job_id: str, **event: Any) -> None:
        """One more durable event."""
        sequence = len(self.events[job_id]) + 1
        self.events[job_id].append(job_pb2.CustomizationEvent(sequence=sequence, job_id=job_id, event_time=AT, **event))
        self.jobs[job_id].last_sequence = sequence

    def move(self, job_id: str, state: Any, **changed: Any) -> None:
        """To another state, told as an event."""
        job = self.jobs[job_id]
        job.state = state
        if "error" in changed:
            job.error.CopyFrom(changed["error"])
        self.tell(job_id, state_changed=job_pb2.StateChanged(state=state, attempt=job.attempt, **changed))

    def train(self, job_id: str) -> None:
        """All that happens to a job until it succeeds."""
        job = self.jobs[job_id]
        job.attempt = 1
        job.start_time.CopyFrom(AT)
        self.move(job_id, State.STATE_RUNNING)
        for step in (50, 100):
            progress = job_pb2.Progress(
                step=step, step_count=100, losses={"total": 1 / step, "mse_new": 0.5}, eta=Duration(seconds=100 - step)
            )
            job.progress.CopyFrom(progress)
            self.tell(job_id, progress=progress)
            drawn = job_pb2.ProbeDrawn(step=step, probe="alone", description="Otto waves.", image_sha256=PROBE_SHA256)
            self.tell(job_id, probe_drawn=drawn)
            self.tell(job_id, checkpoint_saved=job_pb2.CheckpointSaved(checkpoint=checkpoint(step)))
        job.end_time.CopyFrom(AT)
        self.move(job_id, State.STATE_SUCCEEDED)


class ScriptedCustomization(pb_grpc.CustomizationServiceServicer):
    def __init__(self, script: CustomizationScript) -> None:
        self.script = script
        self.token = TOKEN

    def _enter(self, method: str, request: Any) -> None:
        self.script.calls.append((method, request))
        if self.script.failures[method]:
            raise self.script.failures[method].pop(0)

    def _job(self, job_id: str) -> Any:
        if job_id not in self.script.jobs:
            raise CustomizationJobNotFound(metadata={"job_id": job_id[:100]})
        return self.script.jobs[job_id]

    @unary_method(pb.CreateCustomizationJobResponse)
    async def CreateCustomizationJob(self, request: Any, context: Any) -> Any:
        self._enter("CreateCustomizationJob", request)
        findings = [BLURRED] if self.script.blurred else []
        findings += [
            job_pb2.Finding(
                code=UNREADABLE,
                severity=job_pb2.Finding.SEVERITY_ERROR,
                frame_number=number,
                message=f"Frame {number} cannot be read.",
                mend="Save it again.",
            )
            for number, frame in enumerate(request.frames, 1)
            if not frame.image
        ]
        accepted = {UNREADABLE: False, "FRAME_BLURRED": bool({"*", "FRAME_BLURRED"} & set(request.accepted_findings))}
        refused = [one for one in findings if not accepted[one.code]]
        if request.validate_only:
            return pb.CreateCustomizationJobResponse(findings=findings, estimate=ESTIMATE, is_acceptable=not refused)
        if refused:
            raise ExampleStoryRefused(
                "the story cannot be learned from",
                field_violations=[
                    FieldViolation(f"frames[{one.frame_number - 1}]", f"{one.code}: {one.message}") for one in refused
                ],
            )
        body = pb.CreateCustomizationJobRequest()
        body.CopyFrom(request)
        body.ClearField("request_id")
        known = self.script.bodies.get(request.request_id) if request.request_id else None
        if known is not None and known[0] != body.SerializeToString(deterministic=True):
            raise IdempotencyKeyReused()
        if known is None:
            job_id = f"job-{len(self.script.jobs) + 1}"
            self.script.bodies[request.request_id] = (body.SerializeToString(deterministic=True), job_id)
            self.script.jobs[job_id] = job_pb2.CustomizationJob(
                job_id=job_id,
                character=request.character,
                settings=job_pb2.TrainingSettings(
                    pack=request.pack or "toon",
                    method=request.method or "epicevo",
                    learns=request.learns,
                    steps=request.steps,
                    seed=request.seed,
                    threads=2,
                    workers=request.workers,
                    **({"budget": request.budget} if request.HasField("budget") else {}),
                ),
                findings=findings,
                estimate=ESTIMATE,
                create_time=AT,
                update_time=AT,
            )
            self.script.move(job_id, State.STATE_QUEUED)
            if not self.script.held:
                self.script.train(job_id)
        else:
            job_id = known[1]
        return pb.CreateCustomizationJobResponse(
            job=self.script.jobs[job_id], findings=findings, estimate=ESTIMATE, is_acceptable=True
        )

    @unary_method(pb.GetCustomizationJobResponse)
    async def GetCustomizationJob(self, request: Any, context: Any) -> Any:
        self._enter("GetCustomizationJob", request)
        return pb.GetCustomizationJobResponse(job=self._job(request.job_id))

    @unary_method(pb.ListCustomizationJobsResponse)
    async def ListCustomizationJobs(self, request: Any, context: Any) -> Any:
        self._enter("ListCustomizationJobs", request)
        jobs = [one for one in self.script.jobs.values() if request.show_deleted or not one.HasField("delete_time")]
        first = int(request.page_token or 0)
        last = first + (request.page_size or 50)
        return pb.ListCustomizationJobsResponse(
            jobs=jobs[::-1][first:last], next_page_token=str(last) if last < len(jobs) else ""
        )

    @stream_method(pb.WatchCustomizationJobResponse)
    async def WatchCustomizationJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._enter("WatchCustomizationJob", request)
        job, sent = self._job(request.job_id), 0
        last = request.after_sequence
        if job.state == State.STATE_QUEUED:
            moved = job_pb2.CustomizationEvent(
                job_id=job.job_id, event_time=AT, queue_moved=job_pb2.QueueMoved(ahead_count=3)
            )
            yield pb.WatchCustomizationJobResponse(event=moved)
        while True:
            for event in self.script.events[request.job_id][last:]:
                last = event.sequence
                sent += 1
                yield pb.WatchCustomizationJobResponse(event=event)
                if sent == self.script.watches_break_after:
                    return
            if job.state in (State.STATE_SUCCEEDED, State.STATE_FAILED, State.STATE_CANCELLED):
                return
            await asyncio.sleep(0.02)

    def _moved(self, request: Any, state: Any) -> Any:
        job = self._job(request.job_id)
        if job.state == State.STATE_SUCCEEDED and state != State.STATE_CANCELLED:
            raise JobStateUnsuitable("a job that has ended cannot be paused", metadata={"job_id": job.job_id})
        if job.state != State.STATE_SUCCEEDED and job.state != state:
            self.script.move(request.job_id, state)
        return job

    @unary_method(pb.CancelCustomizationJobResponse)
    async def CancelCustomizationJob(self, request: Any, context: Any) -> Any:
        self._enter("CancelCustomizationJob", request)
        return pb.CancelCustomizationJobResponse(job=self._moved(request, State.STATE_CANCELLED))

    @unary_method(pb.PauseCustomizationJobResponse)
    async def PauseCustomizationJob(self, request: Any, context: Any) -> Any:
        self._enter("PauseCustomizationJob", request)
        return pb.PauseCustomizationJobResponse(job=self._moved(request, State.STATE_PAUSED))

    @unary_method(pb.ResumeCustomizationJobResponse)
    async def ResumeCustomizationJob(self, request: Any, context: Any) -> Any:
        self._enter("ResumeCustomizationJob", request)
        return pb.ResumeCustomizationJobResponse(job=self._moved(request, State.STATE_QUEUED))

    @unary_method(pb.ListCheckpointsResponse)
    async def ListCheckpoints(self, request: Any, context: Any) -> Any:
        self._enter("ListCheckpoints", request)
        job = self._job(request.job_id)
        found = [checkpoint(step) for step in (50, 100) if step <= job.progress.step]
        first = int(request.page_token or 0)
        last = first + (request.page_size or 1)  # small pages: whoever wants all has to turn them
        return pb.ListCheckpointsResponse(
            checkpoints=found[first:last], next_page_token=str(last) if last < len(found) else ""
        )

    @unary_method(pb.PublishCheckpointResponse)
    async def PublishCheckpoint(self, request: Any, context: Any) -> Any:
        self._enter("PublishCheckpoint", request)
        job = self._job(request.job_id)
        version = job_pb2.CharacterVersion(
            version_id=VERSION_ID,
            weights_sha256=SHA256,
            character=job.character,
            pack=job.settings.pack,
            method=job.settings.method,
            step=request.step or 100,
            rank=16,
            size_bytes=len(WEIGHTS),
            reference_sha256s=[PROBE_SHA256],
            job_id=job.job_id,
            publish_time=AT,
            figures={"recognised": 1.0},
        )
        job.versions.append(version)
        return pb.PublishCheckpointResponse(version=version)

    @unary_method(pb.DeleteCustomizationJobResponse)
    async def DeleteCustomizationJob(self, request: Any, context: Any) -> Any:
        self._enter("DeleteCustomizationJob", request)
        job = self._job(request.job_id)
        job.delete_time.CopyFrom(AT)
        job.purge_time.CopyFrom(Timestamp(seconds=AT.seconds + 86_400))
        return pb.DeleteCustomizationJobResponse(job=job)

    @unary_method(pb.UndeleteCustomizationJobResponse)
    async def UndeleteCustomizationJob(self, request: Any, context: Any) -> Any:
        self._enter("UndeleteCustomizationJob", request)
        job = self._job(request.job_id)
        job.ClearField("delete_time")
        job.ClearField("purge_time")
        return pb.UndeleteCustomizationJobResponse(job=job)

    @unary_method(pb.ListCharacterVersionsResponse)
    async def ListCharacterVersions(self, request: Any, context: Any) -> Any:
        self._enter("ListCharacterVersions", request)
        found = [*self.script.versions, *(version for job in self.script.jobs.values() for version in job.versions)]
        shown = [version for version in found if request.show_deleted or not version.HasField("delete_time")]
        named = [version for version in shown if request.name in ("", version.character.name)]
        first = int(request.page_token or 0)
        last = first + min(request.page_size or 50, self.script.versions_a_page)
        return pb.ListCharacterVersionsResponse(
            versions=named[first:last], next_page_token=str(last) if last < len(named) else ""
        )

    @unary_method(pb.ImportCharacterVersionResponse)
    async def ImportCharacterVersion(self, request: Any, context: Any) -> Any:
        self._enter("ImportCharacterVersion", request)
        body = request.SerializeToString(deterministic=True)
        version = job_pb2.CharacterVersion(
            version_id=hashlib.sha256(body).hexdigest(),
            weights_sha256=request.weights_sha256 or hashlib.sha256(request.weights).hexdigest(),
            character=request.character,
            pack=request.pack or "toon",
            method="import",
            rank=4,
            size_bytes=len(request.weights),
            reference_sha256s=[hashlib.sha256(picture).hexdigest() for picture in request.references],
            publish_time=AT,
        )
        is_new = all(one.version_id != version.version_id for one in self.script.versions)
        if is_new:
            self.script.versions.insert(0, version)
            self.script.pictures.update((hashlib.sha256(one).hexdigest(), one) for one in request.references)
        return pb.ImportCharacterVersionResponse(version=version, is_new=is_new)

    def _version(self, version_id: str) -> Any:
        every = [*self.script.versions, *(version for job in self.script.jobs.values() for version in job.versions)]
        for version in every:
            if version.version_id == version_id:
                return version
        raise CharacterVersionNotFound(metadata={"version_id": version_id[:100]})

    @unary_method(pb.DeleteCharacterVersionResponse)
    async def DeleteCharacterVersion(self, request: Any, context: Any) -> Any:
        self._enter("DeleteCharacterVersion", request)
        version = self._version(request.version_id)
        version.delete_time.CopyFrom(AT)
        version.purge_time.CopyFrom(Timestamp(seconds=AT.seconds + 86_400))
        return pb.DeleteCharacterVersionResponse(version=version)

    @unary_method(pb.UndeleteCharacterVersionResponse)
    async def UndeleteCharacterVersion(self, request: Any, context: Any) -> Any:
        self._enter("UndeleteCharacterVersion", request)
        version = self._version(request.version_id)
        version.ClearField("delete_time")
        version.ClearField("purge_time")
        return pb.UndeleteCharacterVersionResponse(version=version)

    @stream_method(pb.ReadWeightsResponse)
    async def ReadWeights(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._enter("ReadWeights", request)
        if request.version_id != VERSION_ID:
            raise CharacterVersionNotFound(metadata={"version_id": request.version_id[:100]})
        for start in range(0, len(WEIGHTS), CHUNK):
            yield pb.ReadWeightsResponse(chunk=WEIGHTS[start : start + CHUNK])

    @stream_method(pb.ReadImageResponse)
    async def ReadImage(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._enter("ReadImage", request)
        if request.version_id and request.sha256 in self.script.pictures:
            yield pb.ReadImageResponse(chunk=self.script.pictures[request.sha256])
            return
        if request.sha256 != PROBE_SHA256:
            raise ImageNotFound(metadata={"sha256": request.sha256[:100]})
        yield pb.ReadImageResponse(chunk=PROBE[:4])
        yield pb.ReadImageResponse(chunk=PROBE[4:])

    @stream_method(pb.ReadReportResponse)
    async def ReadReport(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._enter("ReadReport", request)
        page = f"<!doctype html>\n{self._job(request.job_id).character.name}".encode()
        yield pb.ReadReportResponse(chunk=page[:4])
        yield pb.ReadReportResponse(chunk=page[4:])


class CustomizationServer:
    """The service on a port, in a thread of its own. `stop` and `start` make an outage."""

    def __init__(self) -> None:
        self.script = CustomizationScript()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: grpc.aio.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> CustomizationServer:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)
        return self

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(20)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _start(self) -> None:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 << 20)])
        pb_grpc.add_CustomizationServiceServicer_to_server(ScriptedCustomization(self.script), server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        self._server = server

    async def _stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None
