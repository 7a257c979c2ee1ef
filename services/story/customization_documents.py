"""The JSON that HTTP speaks of customization: the protos' nouns and names, times as RFC 3339, durations as seconds.

Numbers are JSON numbers: every seed is below 2^53.
"""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime
from typing import Any, Literal

from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import job_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.runtime.errors import ImageUnreadable, InvalidArgument
from services.story.documents import refusal

JobStateName = Literal[
    "STATE_VALIDATING",
    "STATE_QUEUED",
    "STATE_PROVISIONING",
    "STATE_RUNNING",
    "STATE_PAUSING",
    "STATE_PAUSED",
    "STATE_CANCELLING",
    "STATE_CANCELLED",
    "STATE_FAILED",
    "STATE_SUCCEEDED",
]
LearnsName = Literal["", "lora", "unet"]
_LEARNS: dict[LearnsName, job_pb2.Learns] = {
    "": job_pb2.LEARNS_UNSPECIFIED,
    "lora": job_pb2.LEARNS_LORA,
    "unet": job_pb2.LEARNS_UNET,
}
_LEARNS_WORDS: dict[int, LearnsName] = {number: word for word, number in _LEARNS.items()}


class NewCharacterBody(BaseModel):
    """How somebody new is spoken of."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="The name that captions and descriptions use. At most 40 letters, and nobody else's.")
    phrase: str = Field(description='The look in words: "a black penguin with orange earmuffs". At most 200 letters.')
    noun: str = Field(default="", description="What they are in one word. Empty: as the phrase says.")


class ExampleFrameBody(BaseModel):
    """One frame of the example story."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(
        description="Base64: PNG, JPEG, WebP, GIF or TIFF, at most 8 MiB.",
        json_schema_extra={"contentEncoding": "base64"},
    )
    caption: str = Field(description="The story caption; it names the character. 1 to 1000 characters.")
    description: str = Field(default="", description="What is to be seen. Empty means the caption.")


class CreateCustomizationJobBody(BaseModel):
    """Asks for a job. What is left out has its default."""

    model_config = ConfigDict(extra="forbid")

    character: NewCharacterBody
    frames: list[ExampleFrameBody] = Field(description="3 to 20, in order; five are usual. At most 48 MiB in all.")
    validate_only: bool = Field(default=False, description="Only check and estimate: nothing is made.")
    accepted_findings: list[str] = Field(default=[], description="Codes of warnings that are accepted; * accepts all.")
    pack: str = Field(default="", description="Empty means the default pack.")
    method: str = Field(
        default="", description="epicevo, dreambooth, custom-diffusion, textual-inversion or lora. Default epicevo."
    )
    learns: LearnsName = Field(default="", description="What of the network is learned.")
    steps: int | None = Field(default=None, ge=0, lt=1 << 32, description="1 to 100000. Default: what the budget fits.")
    budget_s: float | None = Field(default=None, ge=0, le=1e8, description="Training time to fit the steps into.")
    rate: float | None = Field(default=None, description="Learning rate, above 0 and at most 1. Default: the recipe's.")
    seed: int | None = Field(default=None, ge=0, lt=1 << 53, description="Left out: the server picks one.")
    workers: int | None = Field(
        default=None,
        ge=0,
        lt=1 << 32,
        description="Workers that train together; 0 means one process. Default: the service's.",
    )


class PublishBody(BaseModel):
    """Asks to publish a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    step: int = Field(default=0, ge=0, lt=1 << 32, description="The checkpoint's step; 0 means the suggested one.")


class ImportCharacterVersionBody(BaseModel):
    """Asks that weights from elsewhere become a character version."""

    model_config = ConfigDict(extra="forbid")

    character: NewCharacterBody
    pack: str = Field(default="", description="The pack that the weights are for. Empty means the default pack.")
    weights: str = Field(
        default="",
        description="Base64 of a safetensors file: a LoRA in diffusers', PEFT's or kohya's layout. At most 40 MiB.",
        json_schema_extra={"contentEncoding": "base64"},
    )
    weights_sha256: str = Field(default="", description="Instead: of a file that the characters' store has already.")
    adapter_config: str = Field(default="", description="Text of the adapter_config.json beside PEFT's file.")
    references: list[str] = Field(
        default=[], description="Pictures of the character, base64, at most 8. With the weights at most 48 MiB."
    )


class FindingDocument(BaseModel):
    """Something that a check found in the example story."""

    code: str
    severity: Literal["warning", "error"]
    frame_number: int | None = Field(description="Counted from one; null: the story as a whole.")
    message: str
    mend: str = Field(description="What to do about it.")


class EstimateDocument(BaseModel):
    """What a job is expected to cost and take."""

    compute_s: float = Field(description="The price: seconds of a GPU, or of a CPU core, all workers together.")
    is_gpu: bool
    min_eta_s: float
    max_eta_s: float
    measured_count: int = Field(description="Earlier jobs of this machine that it was measured on; 0: a guess.")


class ProgressDocument(BaseModel):
    """How far training is."""

    step: int
    step_count: int
    losses: dict[str, float]
    eta_s: float


class JobSettingsDocument(BaseModel):
    """How somebody new is learned, defaults filled in."""

    pack: str
    pack_digest: str
    method: str
    learns: LearnsName
    steps: int
    budget_s: float | None
    rate: float
    seed: int
    threads: int
    workers: int = Field(description="That train together; 0: one process.")


class JobErrorDocument(BaseModel):
    """Why a job failed."""

    reason: str
    message: str


class NewCharacterDocument(BaseModel):
    """How somebody is spoken of."""

    name: str
    phrase: str
    noun: str


class CharacterVersionDocument(BaseModel):
    """A character with weights, as frame services draw them."""

    version_id: str
    weights_sha256: str
    character: NewCharacterDocument
    pack: str
    pack_digest: str
    base_digest: str
    method: str
    step: int
    rank: int
    size_bytes: int
    reference_sha256s: list[str]
    job_id: str
    publish_time: datetime | None
    figures: dict[str, float]
    delete_time: datetime | None
    purge_time: datetime | None = Field(description="Until then a deleted version can be undeleted.")
    weights_url: str = Field(description="Path of the weights on this edge.")


class CustomizationJobDocument(BaseModel):
    """One job as it stands."""

    job_id: str
    state: JobStateName
    attempt: int
    character: NewCharacterDocument
    settings: JobSettingsDocument
    findings: list[FindingDocument]
    estimate: EstimateDocument | None
    progress: ProgressDocument | None
    ahead_count: int
    error: JobErrorDocument | None
    last_sequence: int
    create_time: datetime | None
    update_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    delete_time: datetime | None
    purge_time: datetime | None
    versions: list[CharacterVersionDocument]


class CreatedJobDocument(BaseModel):
    """The accepted job; null with `validate_only`."""

    job: CustomizationJobDocument | None
    findings: list[FindingDocument]
    estimate: EstimateDocument | None
    is_acceptable: bool


class CustomizationJobListDocument(BaseModel):
    """A page of jobs, newest first. An empty token is the end."""

    jobs: list[CustomizationJobDocument]
    next_page_token: str


class CheckpointDocument(BaseModel):
    """What was learned after some steps."""

    step: int
    weights_sha256: str
    size_bytes: int
    rank: int
    create_time: datetime | None
    figures: dict[str, float]
    is_suggested: bool


class CheckpointListDocument(BaseModel):
    """A page of checkpoints, oldest first. An empty token is the end."""

    checkpoints: list[CheckpointDocument]
    next_page_token: str


class CharacterVersionListDocument(BaseModel):
    """A page of character versions, newest first. An empty token is the end."""

    versions: list[CharacterVersionDocument]
    next_page_token: str


class CustomizationEventDocument(BaseModel):
    """The data of one server-sent event; the event's name says which of the last fields is set."""

    sequence: int = Field(description="Place in the job's log; 0 for passing events. Also the event's id.")
    job_id: str
    event_time: datetime | None
    state_changed: dict[str, Any] | None = Field(default=None, description="state, attempt, error")
    progress: ProgressDocument | None = None
    checkpoint_saved: dict[str, Any] | None = Field(default=None, description="checkpoint")
    probe_drawn: dict[str, Any] | None = Field(
        default=None, description="step, probe, description, image_sha256, image_url"
    )
    version_published: dict[str, Any] | None = Field(default=None, description="version")
    queue_moved: dict[str, Any] | None = Field(default=None, description="ahead_count")


def read_create_body(data: bytes, request_id: str) -> pb.CreateCustomizationJobRequest:
    """A request from JSON. Raises UnknownField, InvalidArgument, ImageUnreadable."""
    try:
        body = CreateCustomizationJobBody.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise refusal(error) from None
    budget = None
    if body.budget_s is not None:
        budget = Duration()
        budget.FromNanoseconds(round(body.budget_s * 1e9))
    return pb.CreateCustomizationJobRequest(
        request_id=request_id,
        validate_only=body.validate_only,
        character=job_pb2.NewCharacter(**body.character.model_dump()),
        frames=[
            job_pb2.ExampleFrame(
                image=_decoded(frame.image, f"frames[{number}].image"),
                caption=frame.caption,
                description=frame.description,
            )
            for number, frame in enumerate(body.frames)
        ],
        accepted_findings=body.accepted_findings,
        pack=body.pack,
        method=body.method,
        learns=_LEARNS[body.learns],
        steps=body.steps,
        budget=budget,
        rate=body.rate,
        seed=body.seed,
        workers=body.workers,
    )


def read_publish_body(data: bytes) -> int:
    """The step to publish; no body means the suggested one. Raises UnknownField, InvalidArgument."""
    if not data.strip():
        return 0
    try:
        return PublishBody.model_validate_json(data, strict=True).step
    except ValidationError as error:
        raise refusal(error) from None


def read_import_body(data: bytes) -> pb.ImportCharacterVersionRequest:
    """A request from JSON. Raises UnknownField, InvalidArgument, ImageUnreadable."""
    try:
        body = ImportCharacterVersionBody.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise refusal(error) from None
    if body.weights and body.weights_sha256:
        raise InvalidArgument("give weights or weights_sha256, and not both", field="weights")
    request = pb.ImportCharacterVersionRequest(
        character=job_pb2.NewCharacter(**body.character.model_dump()),
        pack=body.pack,
        adapter_config=body.adapter_config,
        references=[_decoded(image, f"references[{number}]") for number, image in enumerate(body.references)],
    )
    if body.weights_sha256:
        request.weights_sha256 = body.weights_sha256
    else:
        request.weights = _decoded(body.weights, "weights", InvalidArgument)
    return request


def _decoded(text: str, field: str, refused: type[InvalidArgument] = ImageUnreadable) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise refused(f"{field} is not base64", field=field) from None


def created_document(message: pb.CreateCustomizationJobResponse) -> CreatedJobDocument:
    """What CreateCustomizationJob answers."""
    return CreatedJobDocument(
        job=job_document(message.job) if message.HasField("job") else None,
        findings=[finding_document(each) for each in message.findings],
        estimate=_estimate(message.estimate) if message.HasField("estimate") else None,
        is_acceptable=message.is_acceptable,
    )


def job_document(job: job_pb2.CustomizationJob) -> CustomizationJobDocument:
    """One job."""
    settings = job.settings
    return CustomizationJobDocument(
        job_id=job.job_id,
        state=_state(job.state),
        attempt=job.attempt,
        character=_character(job.character),
        settings=JobSettingsDocument(
            pack=settings.pack,
            pack_digest=settings.pack_digest,
            method=settings.method,
            learns=_LEARNS_WORDS.get(settings.learns, ""),
            steps=settings.steps,
            budget_s=_seconds(settings.budget) if settings.HasField("budget") else None,
            rate=settings.rate,
            seed=settings.seed,
            threads=settings.threads,
            workers=settings.workers,
        ),
        findings=[finding_document(each) for each in job.findings],
        estimate=_estimate(job.estimate) if job.HasField("estimate") else None,
        progress=_progress(job.progress) if job.HasField("progress") else None,
        ahead_count=job.ahead_count,
        error=_error(job.error) if job.HasField("error") else None,
        last_sequence=job.last_sequence,
        versions=[version_document(each) for each in job.versions],
        **{
            name: _time(job, name)
            for name in ("create_time", "update_time", "start_time", "end_time", "delete_time", "purge_time")
        },
    )


def finding_document(finding: job_pb2.Finding) -> FindingDocument:
    """One finding."""
    return FindingDocument(
        code=finding.code,
        severity="error" if finding.severity == job_pb2.Finding.SEVERITY_ERROR else "warning",
        frame_number=finding.frame_number if finding.HasField("frame_number") else None,
        message=finding.message,
        mend=finding.mend,
    )


def checkpoint_document(checkpoint: job_pb2.Checkpoint) -> CheckpointDocument:
    """One checkpoint."""
    return CheckpointDocument(
        step=checkpoint.step,
        weights_sha256=checkpoint.weights_sha256,
        size_bytes=checkpoint.size_bytes,
        rank=checkpoint.rank,
        create_time=_time(checkpoint, "create_time"),
        figures=dict(checkpoint.figures),
        is_suggested=checkpoint.is_suggested,
    )


def version_document(version: job_pb2.CharacterVersion) -> CharacterVersionDocument:
    """One character version."""
    return CharacterVersionDocument(
        version_id=version.version_id,
        weights_sha256=version.weights_sha256,
        character=_character(version.character),
        pack=version.pack,
        pack_digest=version.pack_digest,
        base_digest=version.base_digest,
        method=version.method,
        step=version.step,
        rank=version.rank,
        size_bytes=version.size_bytes,
        reference_sha256s=list(version.reference_sha256s),
        job_id=version.job_id,
        publish_time=_time(version, "publish_time"),
        figures=dict(version.figures),
        delete_time=_time(version, "delete_time"),
        purge_time=_time(version, "purge_time"),
        weights_url=f"/v1/character-versions/{version.version_id}/weights",
    )


def event_document(event: job_pb2.CustomizationEvent) -> tuple[str, dict[str, Any]]:
    """One event: its name, and its data with only the field that is set. One newer than this edge has no field."""
    kind = event.WhichOneof("event") or "unknown"
    content: dict[str, Any] = {}
    match kind:
        case "state_changed":
            changed = event.state_changed
            error = _error(changed.error).model_dump() if changed.HasField("error") else None
            content = {"state": _state(changed.state), "attempt": changed.attempt, "error": error}
        case "progress":
            content = _progress(event.progress).model_dump()
        case "checkpoint_saved":
            content = {"checkpoint": checkpoint_document(event.checkpoint_saved.checkpoint).model_dump(mode="json")}
        case "probe_drawn":
            probe = event.probe_drawn
            content = {name: getattr(probe, name) for name in ("step", "probe", "description", "image_sha256")}
            content["image_url"] = f"/v1/customization-jobs/{event.job_id}/images/{probe.image_sha256}"
        case "version_published":
            content = {"version": version_document(event.version_published.version).model_dump(mode="json")}
        case "queue_moved":
            content = {"ahead_count": event.queue_moved.ahead_count}
    at = _time(event, "event_time")
    told = {"sequence": event.sequence, "job_id": event.job_id, "event_time": at.isoformat() if at else None}
    return kind, told | ({kind: content} if content else {})


def _character(character: job_pb2.NewCharacter) -> NewCharacterDocument:
    return NewCharacterDocument(name=character.name, phrase=character.phrase, noun=character.noun)


def _state(number: int) -> Any:
    return job_pb2.CustomizationJob.State.Name(number)


def _error(error: job_pb2.JobError) -> JobErrorDocument:
    return JobErrorDocument(reason=error.reason, message=error.message)


def _estimate(estimate: job_pb2.Estimate) -> EstimateDocument:
    return EstimateDocument(
        compute_s=_seconds(estimate.compute_duration),
        is_gpu=estimate.is_gpu,
        min_eta_s=_seconds(estimate.min_eta),
        max_eta_s=_seconds(estimate.max_eta),
        measured_count=estimate.measured_count,
    )


def _progress(progress: job_pb2.Progress) -> ProgressDocument:
    return ProgressDocument(
        step=progress.step,
        step_count=progress.step_count,
        losses=dict(progress.losses),
        eta_s=_seconds(progress.eta),
    )


def _seconds(duration: Duration) -> float:
    return float(duration.ToNanoseconds() / 1e9)


def _time(message: Any, name: str) -> datetime | None:
    if not message.HasField(name):
        return None
    stamp: Timestamp = getattr(message, name)
    return stamp.ToDatetime(tzinfo=UTC)
