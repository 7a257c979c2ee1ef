"""The nouns of the customization service as plain data: a job, its checkpoints, its events, character versions.

Knows no database and no wire.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.customization.checks import Finding
from services.customization.states import State


@dataclass(frozen=True, kw_only=True)
class NewCharacter:
    """How somebody new is spoken of."""

    name: str
    phrase: str
    noun: str


@dataclass(frozen=True, kw_only=True)
class StoredFrame:
    """A frame of the example story; its picture is a PNG in the object store."""

    image_sha256: str
    caption: str
    description: str


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How somebody new is learned, defaults filled in."""

    pack: str
    pack_digest: str
    method: str
    learns: str  # "lora", "unet", or empty: the method's own choice
    steps: int  # 0: as many as fit the budget, not measured yet
    budget_s: float | None
    rate: float | None  # None: the recipe's own
    seed: int
    threads: int
    snapshots: int
    save_every_s: float
    probes: bool = False
    workers: int = 0  # that train together under Ray Train; 0: one process, without Ray


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job is expected to cost and take."""

    compute_s: float
    is_gpu: bool
    min_eta_s: float
    max_eta_s: float
    measured_count: int  # earlier jobs it rests on


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training is. A durable event, too."""

    step: int
    step_count: int
    losses: Mapping[str, float]
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was learned after some steps."""

    step: int
    weights_sha256: str
    size_bytes: int
    rank: int
    create_us: int
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CharacterVersion:
    """A published character; `version_id` is the SHA-256 of its manifest."""

    version_id: str
    weights_sha256: str
    character: NewCharacter
    pack: str
    pack_digest: str
    base_digest: str
    method: str
    step: int
    rank: int
    size_bytes: int
    reference_sha256s: tuple[str, ...]
    job_id: str
    publish_us: int
    figures: Mapping[str, float] = field(default_factory=dict)
    delete_us: int | None = None
    purge_us: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job as it stands."""

    job_id: str
    state: State
    attempt: int
    character: NewCharacter
    frames: tuple[StoredFrame, ...]
    settings: TrainingSettings
    findings: tuple[Finding, ...]
    estimate: Estimate
    create_us: int
    update_us: int
    last_sequence: int
    progress: Progress | None = None
    reason: str = ""
    message: str = ""
    start_us: int | None = None
    end_us: int | None = None
    delete_us: int | None = None
    purge_us: int | None = None
    baseline: Mapping[str, float] = field(default_factory=dict)  # of the probes before the first step; empty: not known
    ahead_count: int = 0
    versions: tuple[CharacterVersion, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Following:
    """What the runner has seen of a job's training processes."""

    offset_bytes: int = 0  # of the progress file, up to which everything is recorded
    crashes: int = 0  # in a row without a new step between them
    top_step: int = 0  # the most steps that any attempt told of
    # How the attempt in progress said it ended; None before, and for one that said nothing.
    outcome: Mapping[str, str] | None = None
    stop_us: int | None = None  # when the attempt in progress was first told to stop
    first_step: int | None = None  # of the attempt in progress, and when it was told: what the speed is measured from
    first_at: float | None = None
    begin_at: float | None = None  # when the attempt in progress began
    seconds_a_step: float | None = None  # as last measured


@dataclass(frozen=True, kw_only=True)
class StateChanged:
    """The job's state or attempt changed."""

    state: State
    attempt: int
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete."""

    checkpoint: Checkpoint


@dataclass(frozen=True, kw_only=True)
class ProbeDrawn:
    """A probe was drawn with what was learned so far."""

    step: int
    probe: str
    description: str
    image_sha256: str


@dataclass(frozen=True, kw_only=True)
class VersionPublished:
    """A character version was published."""

    version: CharacterVersion


@dataclass(frozen=True, kw_only=True)
class QueueMoved:
    """Passing: the place in the queue changed."""

    ahead_count: int


Durable = StateChanged | Progress | CheckpointSaved | ProbeDrawn | VersionPublished


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened. Durable ones have gapless sequence numbers from 1, passing ones have 0."""

    job_id: str
    sequence: int
    time_us: int
    what: Durable | QueueMoved


KINDS: dict[str, type[Any]] = {
    "state_changed": StateChanged,
    "progress": Progress,
    "checkpoint_saved": CheckpointSaved,
    "probe_drawn": ProbeDrawn,
    "version_published": VersionPublished,
}
# Of a version, and in columns of their own: the release before reads what this one writes, and knows no such fields.
_IN_COLUMNS = frozenset({"delete_us", "purge_us"})
_NAMES = {cls: name for name, cls in KINDS.items()}


def kind_of(what: Durable) -> str:
    """The event's name, as in the proto's oneof."""
    return _NAMES[type(what)]


def to_json(what: Any) -> dict[str, Any]:
    """A record as the database keeps it."""
    told: dict[str, Any] = dataclasses.asdict(
        what, dict_factory=lambda pairs: {name: value for name, value in pairs if name not in _IN_COLUMNS}
    )
    return told


def durable_from_json(kind: str, payload: dict[str, Any]) -> Durable:
    """The event behind a row of the log."""
    if kind == "state_changed":
        return StateChanged(**{**payload, "state": State(payload["state"])})
    if kind == "checkpoint_saved":
        return CheckpointSaved(checkpoint=Checkpoint(**payload["checkpoint"]))
    if kind == "version_published":
        return VersionPublished(version=version_from_json(payload["version"]))
    what: Durable = KINDS[kind](**payload)
    return what


def version_from_json(payload: dict[str, Any]) -> CharacterVersion:
    """A version as `to_json` told it."""
    return CharacterVersion(
        **{
            **payload,
            "character": NewCharacter(**payload["character"]),
            "reference_sha256s": tuple(payload["reference_sha256s"]),
        }
    )
