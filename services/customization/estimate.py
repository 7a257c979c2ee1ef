"""What a job will cost and when it will end. Pure.

The price is compute: seconds of each CPU core, or of the GPU, that the training process may use. A range is as wide as
what it rests on is unsure: jobs like it on this machine, a budget that the steps will be fitted into, or a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from services.customization.records import Estimate, Job, TrainingSettings
from services.customization.states import State

START_S = 30.0  # until the first step: libraries, networks, and what the encoders say of the story
# Seconds a step on so many CPU cores with the toon pack, by method, where nothing was measured here.
GUESSED_CORES = 2
GUESSED_STEP_S = {
    "custom-diffusion": 0.9,
    "dreambooth": 1.4,
    "epicevo": 1.5,
    "lora": 0.8,
    "textual-inversion": 0.8,
}
# A machine that serves beside trains more slowly than one that does nothing else, by as much as it serves.
_MEASURED_RANGE = (0.8, 1.6)
_BUDGET_RANGE = (0.9, 2.0)
_GUESSED_RANGE = (0.2, 4.0)


def estimate(
    settings: TrainingSettings, *, measured: Sequence[float], ahead: Sequence[Job], gpus: float = 0.0
) -> Estimate:
    """`measured` are seconds a step of earlier jobs like this one, `ahead` the jobs that are trained before it."""
    step_s = median(measured) if measured else _guessed_step_s(settings, gpus)
    if settings.budget_s is not None:
        training_s, (low, high) = settings.budget_s, _BUDGET_RANGE
    else:
        training_s, (low, high) = settings.steps * step_s, _MEASURED_RANGE if measured else _GUESSED_RANGE
    waits = [left_s(job) for job in ahead]
    units = (gpus if gpus > 0 else float(settings.threads)) * max(1, settings.workers)
    return Estimate(
        compute_s=(training_s + START_S) * units,
        is_gpu=gpus > 0,
        min_eta_s=START_S / 2 + training_s * low + sum(low for low, _ in waits),
        max_eta_s=START_S * 3 + training_s * high + sum(high for _, high in waits),
        measured_count=len(measured),
    )


def _guessed_step_s(settings: TrainingSettings, gpus: float) -> float:
    """Workers of one machine share its cores, and whoever has fewer takes longer."""
    step_s = GUESSED_STEP_S.get(settings.method, 1.0)
    return step_s if gpus > 0 else step_s * max(1.0, GUESSED_CORES / settings.threads)


def left_s(job: Job) -> tuple[float, float]:
    """The least and the most that a job still takes, without those before it."""
    if job.state in (State.PAUSING, State.CANCELLING):
        return 0.0, START_S
    if job.progress is not None and job.progress.eta_s > 0:
        return job.progress.eta_s * _MEASURED_RANGE[0], job.progress.eta_s * _MEASURED_RANGE[1]
    # What was told when it was made holds the jobs that were before it then; its price does not.
    threads = 1.0 if job.estimate.is_gpu else float(job.settings.threads)
    own_s = job.estimate.compute_s / max(1.0, threads * max(1, job.settings.workers))
    return own_s * _BUDGET_RANGE[0], own_s * _BUDGET_RANGE[1]
