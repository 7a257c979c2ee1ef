"""Where a job's training process runs: one interface, and what every backend is told.

A backend starts an attempt, says whether it still runs, and has it end. What the process says of itself it writes into
the job's folder (`training.customize_progress` has the words), so nobody parses logs and no backend carries results;
the service and the place where training runs must see that folder under one path. Training is only ever started by its
command line: no service imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from services.customization.records import TrainingSettings
from services.customization.states import End

STOPPED = 75  # exit status of a run that was told to stop
NO_ROOM = 74  # exit status of a run that met a full disk
PROGRESS_FILE = "progress.jsonl"
STOP_FILE = "stop"
STORY_FOLDER = "story"
WEIGHTS_FILE = "weights.safetensors"
LOG_FILE = "training.log"
REPOSITORY = Path(__file__).resolve().parents[2]  # where `python -m training.customize` is found
_MOST_READ_BYTES = 1 << 20  # of a progress file at a time


@dataclass(frozen=True, kw_only=True)
class Run:
    """One attempt of one job."""

    job_id: str
    attempt: int
    folder: Path
    arguments: tuple[str, ...]  # of `python -m training.customize`
    threads: int
    workers: int = 0  # under Ray Train, which asks for their resources itself; 0: the process trains

    @property
    def name(self) -> str:
        """Of this attempt and no other; letters, digits and hyphens, at most the 47 that KubeRay takes."""
        return f"job-{self.job_id}-{self.attempt}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What the process finds beside what its machine has."""
        count = str(self.threads)
        return {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }


@dataclass(frozen=True, kw_only=True)
class Ended:
    """There is no process of an attempt, or none any more."""

    status: int | None = None  # its exit status, where somebody knows
    detail: str = ""


class Backend(Protocol):
    """A place for training processes. Every method may raise FabulaError; Unavailable means: ask again later."""

    async def start(self, run: Run) -> None:
        """Starts an attempt. One of this job that still runs must have ended before."""
        ...

    async def look(self, run: Run) -> Ended | None:
        """None while the attempt runs, or waits for machines."""
        ...

    async def stop(self, run: Run) -> None:
        """Asks the attempt to end after the step in progress and its save. Asking again changes nothing."""
        ...

    async def kill(self, run: Run) -> None:
        """Ends the attempt at once. What it has not saved is lost."""
        ...

    async def close(self) -> None:
        """The service ends. Attempts that could not outlive it well are asked to stop."""
        ...


def arguments_of(
    settings: TrainingSettings,
    *,
    pack_folder: Path,
    folder: Path,
    known: Path | None = None,
    stop_file: bool = False,
    worker_cpus: float = 1.0,
    worker_gpus: float = 0.0,
) -> tuple[str, ...]:
    """The command line of `training.customize` for a job. The same in every attempt, so that attempts agree.

    `known` is where stories of those are whom the pack knows; None: the toon world has them.
    `worker_cpus` and `worker_gpus` are what each worker of a job of several asks Ray for.
    """
    given: dict[str, Any] = {
        "pack": pack_folder,
        "story": folder / STORY_FOLDER,
        "method": settings.method,
        "out": folder / WEIGHTS_FILE,
        "folder": folder,
        "progress": folder / PROGRESS_FILE,
        "snapshots": settings.snapshots,
        "save-every-s": settings.save_every_s,
        "seed": settings.seed,
        "threads": settings.threads,
    }
    if known is not None:
        given["known"] = known
    if settings.learns:
        given["learns"] = settings.learns
    if settings.rate is not None:
        given["rate"] = repr(settings.rate)
    if settings.budget_s is not None:
        given["minutes"] = repr(settings.budget_s / 60.0)
    else:
        given["steps"] = settings.steps
    if stop_file:
        given["stop-file"] = folder / STOP_FILE
    if settings.workers:
        given |= {"workers": settings.workers, "worker-cpus": f"{worker_cpus:g}", "worker-gpus": f"{worker_gpus:g}"}
    words = tuple(word for name, value in given.items() for word in (f"--{name}", str(value)))
    return (*words, "--probes") if settings.probes else words


def read_lines(path: Path, offset_bytes: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a progress file after an offset, and the offset after them. A torn line is left out."""
    try:
        with path.open("rb") as file:
            file.seek(offset_bytes)
            data = file.read(_MOST_READ_BYTES)
    except FileNotFoundError:
        return [], offset_bytes
    end = data.rfind(b"\n") + 1
    lines = []
    for line in data[:end].splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and isinstance(told.get("event"), str):
            lines.append(told)
    return lines, offset_bytes + end


def end_of(told: Mapping[str, str] | None, ended: Ended) -> End:
    """How an attempt ended: as it said last, else as its exit status says, else it is lost."""
    if told is not None and told.get("outcome") in ("succeeded", "stopped", "failed"):
        outcome: Any = told["outcome"]
        return End(outcome=outcome, reason=told.get("reason", ""), message=told.get("message", ""))
    if ended.status == NO_ROOM:
        message = "the disk is full; the last good checkpoint is kept: make room and resume the job"
        return End(outcome="failed", reason="DISK_FULL", message=message)
    if ended.status == STOPPED:
        return End(outcome="stopped")
    return End(outcome="lost", message=ended.detail or f"exit status {ended.status}")


def last_lines(path: Path, count: int = 3, most_bytes: int = 4096) -> Sequence[str]:
    """The end of a log, for a message; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - most_bytes))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ()
    return [line.strip() for line in text.splitlines() if line.strip()][-count:]
