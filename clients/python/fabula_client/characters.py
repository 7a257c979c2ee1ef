"""Characters and the jobs that teach them: frozen values, made from protobuf; they know no connection."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal, Required, TypedDict

from fabula.customization.v1 import customization_service_pb2, job_pb2
from google.protobuf.duration_pb2 import Duration

from fabula_client.errors import FabulaError

Learns = Literal["lora", "unet"]
"""What of a network is learned: a small addition, or every weight."""


@dataclass(frozen=True, kw_only=True)
class ExampleFrame:
    """One frame of the example story."""

    image: bytes | str | os.PathLike[str]  # the picture, or where it is
    caption: str
    description: str = ""  # empty: the caption


class Training(TypedDict, total=False):
    """What somebody new is taught from, and how: the keywords of `train` and `check`."""

    name: Required[str]
    phrase: Required[str]  # what they look like: "a black penguin with orange earmuffs"
    frames: Required[Sequence[ExampleFrame]]
    noun: str  # "penguin"; left out: as the phrase says
    accepted_findings: Sequence[str]  # codes of warnings that are accepted; "*" accepts all
    pack: str
    method: str  # epicevo (the default), dreambooth, custom-diffusion, textual-inversion or lora
    learns: Learns | None
    steps: int | None
    budget_s: float | None  # of training time to fit the steps into; left out, and no steps either: the service's
    rate: float | None  # of learning; left out: the recipe's
    seed: int | None
    workers: int | None  # that train together, 0: one process; left out: the service's


class JobState(StrEnum):
    """Where a job stands."""

    UNKNOWN = "unknown"  # a state newer than this client
    VALIDATING = "validating"
    QUEUED = "queued"
    PROVISIONING = "provisioning"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"
    SUCCEEDED = "succeeded"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen. A failed job can be resumed all the same."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class NewCharacter:
    """How somebody new is spoken of."""

    name: str
    phrase: str  # "a black penguin with orange earmuffs"
    noun: str = ""  # "penguin"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a check found in an example story."""

    code: str  # stable; more may come
    severity: str  # "warning" can be accepted, "error" can not
    message: str
    mend: str  # what to do about it
    frame_number: int | None  # counted from one; None: the story as a whole


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job is expected to cost and take."""

    compute_s: float  # the price: seconds of a GPU, or of a CPU core, all workers together
    is_gpu: bool
    min_eta_s: float
    max_eta_s: float
    measured_count: int  # earlier jobs of that machine it was measured on; 0: a guess


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the checks found, and what a job would cost."""

    findings: tuple[Finding, ...]
    estimate: Estimate | None
    is_acceptable: bool


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far training is."""

    step: int
    step_count: int
    losses: Mapping[str, float]
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How somebody new is learned, defaults filled in."""

    pack: str
    pack_digest: str
    method: str
    learns: str  # one of Learns; empty: the method's own choice
    steps: int  # 0: not yet known
    budget_s: float | None
    rate: float  # 0: the recipe's own
    seed: int
    threads: int  # of each worker
    workers: int  # that train together; 0: one process


@dataclass(frozen=True, kw_only=True)
class JobError:
    """Why a job failed."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class CharacterVersion:
    """A character with weights, as frame services draw them."""

    version_id: str
    weights_sha256: str
    character: NewCharacter
    pack: str
    pack_digest: str
    base_digest: str
    method: str
    step: int
    rank: int  # 0: no low-rank addition
    size_bytes: int
    reference_sha256s: tuple[str, ...]
    job_id: str
    published: datetime | None
    figures: Mapping[str, float]
    deleted: datetime | None
    purged: datetime | None  # until then a deleted version can be undeleted


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was learned after some steps. It can be published."""

    step: int
    weights_sha256: str
    size_bytes: int
    rank: int
    created: datetime | None
    figures: Mapping[str, float]
    is_suggested: bool  # the one to publish when nobody chooses


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it stood when it was read."""

    job_id: str
    state: JobState
    attempt: int  # how often its training was started
    character: NewCharacter
    settings: TrainingSettings
    findings: tuple[Finding, ...]  # none in lists
    estimate: Estimate | None
    progress: TrainingProgress | None
    ahead_count: int
    error: JobError | None
    last_sequence: int
    created: datetime | None
    updated: datetime | None
    started: datetime | None
    ended_at: datetime | None
    deleted: datetime | None
    purged: datetime | None  # until then a deleted job can be undeleted
    versions: tuple[CharacterVersion, ...]  # none in lists

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it by itself."""
        return self.state.ended


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What became of weights from elsewhere."""

    version: CharacterVersion
    is_new: bool  # False: a version with this content was there before; if it was deleted, it is back


class JobFacts(ABC):
    """What a handle on a job tells without asking anybody: what was last read of it."""

    @property
    @abstractmethod
    def value(self) -> Job:
        """What was last read of it."""

    @property
    def job_id(self) -> str:
        """Its id."""
        return self.value.job_id

    @property
    def state(self) -> JobState:
        """Its state when it was last read."""
        return self.value.state

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.job_id} {self.state}>"


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Something that happened. One of the classes below; this one itself only for an event newer than this client."""

    sequence: int  # place in the job's log; 0 for passing events, which are not replayed
    job_id: str
    time: datetime | None


@dataclass(frozen=True, kw_only=True)
class JobStateChanged(JobEvent):
    """The job's state or attempt changed."""

    state: JobState
    attempt: int
    error: JobError | None


@dataclass(frozen=True, kw_only=True)
class StepsTaken(JobEvent):
    """Training went on."""

    progress: TrainingProgress


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(JobEvent):
    """A checkpoint is complete."""

    checkpoint: Checkpoint


@dataclass(frozen=True, kw_only=True)
class ProbeDrawn(JobEvent):
    """A probe was drawn: the same text with the same seed at every checkpoint."""

    step: int
    probe: str  # "alone", "with:Pip", "old:Pip"
    description: str
    image_sha256: str


@dataclass(frozen=True, kw_only=True)
class VersionPublished(JobEvent):
    """A character version was published."""

    version: CharacterVersion


@dataclass(frozen=True, kw_only=True)
class QueueMoved(JobEvent):
    """Passing: the place in the queue changed."""

    ahead_count: int


class JobFailed(FabulaError):
    """The job ended in failure. Its last good checkpoint stays."""

    reason = "JOB_FAILED"

    def __init__(self, job: Job) -> None:
        error = job.error
        super().__init__(error.message if error else "the job failed", reason=error.reason if error else "")
        self.job = job


class JobCancelled(FabulaError):
    """Somebody cancelled the job. Its checkpoints stay and can be published."""

    reason = "JOB_CANCELLED"

    def __init__(self, job: Job) -> None:
        super().__init__("the job was cancelled")
        self.job = job


class JobPaused(FabulaError):
    """Somebody paused the job; it goes on when it is resumed."""

    reason = "JOB_PAUSED"

    def __init__(self, job: Job) -> None:
        super().__init__("the job is paused; resume it, and wait again")
        self.job = job


def learns_to_pb(learns: Learns | None) -> job_pb2.Learns:
    """For the wire. Raises ValueError for a word that is none."""
    numbers: dict[str | None, job_pb2.Learns] = {
        None: job_pb2.LEARNS_UNSPECIFIED,
        "lora": job_pb2.LEARNS_LORA,
        "unet": job_pb2.LEARNS_UNET,
    }
    if learns not in numbers:
        raise ValueError(f"learns is {learns!r}; it must be lora or unet")
    return numbers[learns]


def checked_from_pb(message: customization_service_pb2.CreateCustomizationJobResponse) -> Checked:
    """What the checks found, from the wire."""
    return Checked(
        findings=tuple(_finding(each) for each in message.findings),
        estimate=_estimate(message.estimate) if message.HasField("estimate") else None,
        is_acceptable=message.is_acceptable,
    )


def job_from_pb(message: job_pb2.CustomizationJob) -> Job:
    """A job from the wire."""
    settings = message.settings
    return Job(
        job_id=message.job_id,
        state=_state(message.state),
        attempt=message.attempt,
        character=_character(message.character),
        settings=TrainingSettings(
            pack=settings.pack,
            pack_digest=settings.pack_digest,
            method=settings.method,
            learns=_LEARNS.get(settings.learns, ""),
            steps=settings.steps,
            budget_s=_seconds(settings.budget) if settings.HasField("budget") else None,
            rate=settings.rate,
            seed=settings.seed,
            threads=settings.threads,
            workers=settings.workers,
        ),
        findings=tuple(_finding(each) for each in message.findings),
        estimate=_estimate(message.estimate) if message.HasField("estimate") else None,
        progress=_progress(message.progress) if message.HasField("progress") else None,
        ahead_count=message.ahead_count,
        error=_error(message.error) if message.HasField("error") else None,
        last_sequence=message.last_sequence,
        created=_time(message, "create_time"),
        updated=_time(message, "update_time"),
        started=_time(message, "start_time"),
        ended_at=_time(message, "end_time"),
        deleted=_time(message, "delete_time"),
        purged=_time(message, "purge_time"),
        versions=tuple(version_from_pb(each) for each in message.versions),
    )


def checkpoint_from_pb(message: job_pb2.Checkpoint) -> Checkpoint:
    """A checkpoint from the wire."""
    return Checkpoint(
        step=message.step,
        weights_sha256=message.weights_sha256,
        size_bytes=message.size_bytes,
        rank=message.rank,
        created=_time(message, "create_time"),
        figures=dict(message.figures),
        is_suggested=message.is_suggested,
    )


def version_from_pb(message: job_pb2.CharacterVersion) -> CharacterVersion:
    """A character version from the wire."""
    return CharacterVersion(
        version_id=message.version_id,
        weights_sha256=message.weights_sha256,
        character=_character(message.character),
        pack=message.pack,
        pack_digest=message.pack_digest,
        base_digest=message.base_digest,
        method=message.method,
        step=message.step,
        rank=message.rank,
        size_bytes=message.size_bytes,
        reference_sha256s=tuple(message.reference_sha256s),
        job_id=message.job_id,
        published=_time(message, "publish_time"),
        figures=dict(message.figures),
        deleted=_time(message, "delete_time"),
        purged=_time(message, "purge_time"),
    )


def job_event_from_pb(message: job_pb2.CustomizationEvent) -> JobEvent:
    """An event from the wire."""
    kind = message.WhichOneof("event")
    build = _EVENTS.get(kind) if kind else None
    return build(message) if build else JobEvent(**_common(message))


def _common(message: job_pb2.CustomizationEvent) -> dict[str, Any]:
    return {"sequence": message.sequence, "job_id": message.job_id, "time": _time(message, "event_time")}


def _state_changed(message: job_pb2.CustomizationEvent) -> JobEvent:
    body = message.state_changed
    error = _error(body.error) if body.HasField("error") else None
    return JobStateChanged(**_common(message), state=_state(body.state), attempt=body.attempt, error=error)


def _probe_drawn(message: job_pb2.CustomizationEvent) -> JobEvent:
    body = message.probe_drawn
    return ProbeDrawn(
        **_common(message),
        step=body.step,
        probe=body.probe,
        description=body.description,
        image_sha256=body.image_sha256,
    )


_EVENTS: dict[str, Callable[[job_pb2.CustomizationEvent], JobEvent]] = {
    "state_changed": _state_changed,
    "progress": lambda message: StepsTaken(**_common(message), progress=_progress(message.progress)),
    "checkpoint_saved": lambda message: CheckpointSaved(
        **_common(message), checkpoint=checkpoint_from_pb(message.checkpoint_saved.checkpoint)
    ),
    "probe_drawn": _probe_drawn,
    "version_published": lambda message: VersionPublished(
        **_common(message), version=version_from_pb(message.version_published.version)
    ),
    "queue_moved": lambda message: QueueMoved(**_common(message), ahead_count=message.queue_moved.ahead_count),
}
_LEARNS: dict[int, str] = {job_pb2.LEARNS_LORA: "lora", job_pb2.LEARNS_UNET: "unet"}


def _state(number: int) -> JobState:
    """One that this client does not know is UNKNOWN."""
    try:
        name = job_pb2.CustomizationJob.State.Name(number)  # type: ignore[arg-type]  # any number may come
        return JobState(name.removeprefix("STATE_").lower())
    except ValueError:
        return JobState.UNKNOWN


def _character(message: job_pb2.NewCharacter) -> NewCharacter:
    return NewCharacter(name=message.name, phrase=message.phrase, noun=message.noun)


def _finding(message: job_pb2.Finding) -> Finding:
    return Finding(
        code=message.code,
        severity="error" if message.severity == job_pb2.Finding.SEVERITY_ERROR else "warning",
        message=message.message,
        mend=message.mend,
        frame_number=message.frame_number if message.HasField("frame_number") else None,
    )


def _estimate(message: job_pb2.Estimate) -> Estimate:
    return Estimate(
        compute_s=_seconds(message.compute_duration),
        is_gpu=message.is_gpu,
        min_eta_s=_seconds(message.min_eta),
        max_eta_s=_seconds(message.max_eta),
        measured_count=message.measured_count,
    )


def _progress(message: job_pb2.Progress) -> TrainingProgress:
    return TrainingProgress(
        step=message.step, step_count=message.step_count, losses=dict(message.losses), eta_s=_seconds(message.eta)
    )


def _error(message: job_pb2.JobError) -> JobError:
    return JobError(reason=message.reason, message=message.message)


def _seconds(duration: Duration) -> float:
    return float(duration.ToNanoseconds() / 1e9)


def _time(message: Any, name: str) -> datetime | None:
    """UTC; None for a time that was never set."""
    if not message.HasField(name):
        return None
    found: datetime = getattr(message, name).ToDatetime(tzinfo=UTC)
    return found
