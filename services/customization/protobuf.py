"""Records to protobuf messages and requests from them, field by field."""

from __future__ import annotations

import hashlib
from typing import Any

from fabula.customization.v1 import customization_service_pb2 as service_pb
from fabula.customization.v1 import job_pb2 as pb
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.customization.checks import Finding, GivenFrame
from services.customization.intake import ImportRequest, JobRequest
from services.customization.records import (
    CharacterVersion,
    Checkpoint,
    CheckpointSaved,
    Estimate,
    Event,
    Job,
    NewCharacter,
    ProbeDrawn,
    Progress,
    QueueMoved,
    StateChanged,
    TrainingSettings,
    VersionPublished,
)
from services.customization.states import State

_LEARNS = {pb.LEARNS_UNSPECIFIED: "", pb.LEARNS_LORA: "lora", pb.LEARNS_UNET: "unet"}
_LEARNS_TO_PB = {told: value for value, told in _LEARNS.items()}


def request_from_pb(request: Any) -> JobRequest:
    """What somebody asks for."""
    body = service_pb.CreateCustomizationJobRequest()
    body.CopyFrom(request)
    body.request_id = ""
    return JobRequest(
        request_id=request.request_id,
        validate_only=request.validate_only,
        name=request.character.name,
        phrase=request.character.phrase,
        noun=request.character.noun,
        frames=[
            GivenFrame(image=frame.image, caption=frame.caption, description=frame.description)
            for frame in request.frames
        ],
        accepted_findings=list(request.accepted_findings),
        pack=request.pack,
        method=request.method,
        learns=_LEARNS.get(request.learns, ""),  # a newer peer's is the method's own choice
        steps=request.steps if request.HasField("steps") else None,
        budget_s=request.budget.ToNanoseconds() / 1e9 if request.HasField("budget") else None,
        rate=request.rate if request.HasField("rate") else None,
        seed=request.seed if request.HasField("seed") else None,
        workers=request.workers if request.HasField("workers") else None,
        body_sha256=hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest(),
    )


def import_from_pb(request: Any) -> ImportRequest:
    """The weights that somebody brings."""
    return ImportRequest(
        name=request.character.name,
        phrase=request.character.phrase,
        noun=request.character.noun,
        pack=request.pack,
        weights=request.weights,
        weights_sha256=request.weights_sha256,
        adapter_config=request.adapter_config,
        references=list(request.references),
    )


def job_to_pb(job: Job) -> Any:
    """The whole job."""
    message = pb.CustomizationJob(
        job_id=job.job_id,
        state=state_to_pb(job.state),
        attempt=job.attempt,
        character=character_to_pb(job.character),
        settings=settings_to_pb(job.settings),
        findings=[finding_to_pb(finding) for finding in job.findings],
        estimate=estimate_to_pb(job.estimate),
        progress=progress_to_pb(job.progress) if job.progress is not None else None,
        ahead_count=job.ahead_count if job.state is State.QUEUED else 0,
        error=error_to_pb(job.reason, job.message),
        last_sequence=job.last_sequence,
        create_time=timestamp(job.create_us),
        update_time=timestamp(job.update_us),
        versions=[version_to_pb(version) for version in job.versions],
    )
    for name, at in (
        ("start_time", job.start_us),
        ("end_time", job.end_us),
        ("delete_time", job.delete_us),
        ("purge_time", job.purge_us),
    ):
        if at is not None:
            getattr(message, name).CopyFrom(timestamp(at))
    return message


def character_to_pb(character: NewCharacter) -> Any:
    """How somebody is spoken of."""
    return pb.NewCharacter(name=character.name, phrase=character.phrase, noun=character.noun)


def settings_to_pb(settings: TrainingSettings) -> Any:
    """How somebody is learned."""
    return pb.TrainingSettings(
        pack=settings.pack,
        pack_digest=settings.pack_digest,
        method=settings.method,
        learns=_LEARNS_TO_PB[settings.learns],
        steps=settings.steps,
        budget=duration(settings.budget_s) if settings.budget_s is not None else None,
        rate=settings.rate or 0.0,
        seed=settings.seed,
        threads=settings.threads,
        workers=settings.workers,
    )


def finding_to_pb(finding: Finding) -> Any:
    """What a check found."""
    return pb.Finding(
        code=finding.code,
        severity=pb.Finding.SEVERITY_ERROR if finding.severity == "error" else pb.Finding.SEVERITY_WARNING,
        frame_number=finding.frame_number,
        message=finding.message,
        mend=finding.mend,
    )


def estimate_to_pb(estimate: Estimate) -> Any:
    """What a job costs and takes."""
    return pb.Estimate(
        compute_duration=duration(estimate.compute_s),
        is_gpu=estimate.is_gpu,
        min_eta=duration(estimate.min_eta_s),
        max_eta=duration(estimate.max_eta_s),
        measured_count=estimate.measured_count,
    )


def progress_to_pb(progress: Progress) -> Any:
    """How far training is."""
    return pb.Progress(
        step=progress.step,
        step_count=progress.step_count,
        losses=dict(progress.losses),
        eta=duration(progress.eta_s),
    )


def checkpoint_to_pb(checkpoint: Checkpoint, *, is_suggested: bool = False) -> Any:
    """What was learned after some steps."""
    return pb.Checkpoint(
        step=checkpoint.step,
        weights_sha256=checkpoint.weights_sha256,
        size_bytes=checkpoint.size_bytes,
        rank=checkpoint.rank,
        create_time=timestamp(checkpoint.create_us),
        figures=dict(checkpoint.figures),
        is_suggested=is_suggested,
    )


def version_to_pb(version: CharacterVersion) -> Any:
    """A published character."""
    return pb.CharacterVersion(
        version_id=version.version_id,
        weights_sha256=version.weights_sha256,
        character=character_to_pb(version.character),
        pack=version.pack,
        pack_digest=version.pack_digest,
        base_digest=version.base_digest,
        method=version.method,
        step=version.step,
        rank=version.rank,
        size_bytes=version.size_bytes,
        reference_sha256s=version.reference_sha256s,
        job_id=version.job_id,
        publish_time=timestamp(version.publish_us),
        figures=dict(version.figures),
        delete_time=timestamp(version.delete_us) if version.delete_us is not None else None,
        purge_time=timestamp(version.purge_us) if version.purge_us is not None else None,
    )


def event_to_pb(event: Event) -> Any:
    """One event, durable or passing."""
    message = pb.CustomizationEvent(sequence=event.sequence, job_id=event.job_id, event_time=timestamp(event.time_us))
    match event.what:
        case StateChanged(state=state, attempt=attempt, reason=reason, message=text):
            told = pb.StateChanged(state=state_to_pb(state), attempt=attempt, error=error_to_pb(reason, text))
            message.state_changed.CopyFrom(told)
        case Progress() as progress:
            message.progress.CopyFrom(progress_to_pb(progress))
        case CheckpointSaved(checkpoint=checkpoint):
            message.checkpoint_saved.CopyFrom(pb.CheckpointSaved(checkpoint=checkpoint_to_pb(checkpoint)))
        case ProbeDrawn() as probe:
            message.probe_drawn.CopyFrom(
                pb.ProbeDrawn(
                    step=probe.step,
                    probe=probe.probe,
                    description=probe.description,
                    image_sha256=probe.image_sha256,
                )
            )
        case VersionPublished(version=version):
            message.version_published.CopyFrom(pb.VersionPublished(version=version_to_pb(version)))
        case QueueMoved(ahead_count=ahead):
            message.queue_moved.CopyFrom(pb.QueueMoved(ahead_count=ahead))
    return message


def state_to_pb(state: State) -> Any:
    """The enum value."""
    return pb.CustomizationJob.State.Value(f"STATE_{state.value}")


def error_to_pb(reason: str, message: str) -> Any:
    """Why a job failed; None when it did not."""
    return pb.JobError(reason=reason, message=message) if reason else None


def timestamp(us: int) -> Timestamp:
    """Microseconds since 1970 UTC as a Timestamp."""
    stamp = Timestamp()
    stamp.FromMicroseconds(us)
    return stamp


def duration(seconds: float) -> Duration:
    """Seconds as a Duration."""
    span = Duration()
    span.FromNanoseconds(int(seconds * 1e9))
    return span
