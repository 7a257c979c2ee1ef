"""Samplers: from the network's answer at one noise level to the latents of the next.

Plain functions over one job's latents (any shape); both are deterministic, so the only randomness of a frame is the
noise it starts from. Knows no network, guidance or batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.models.schedule import Schedule


@dataclass(frozen=True)
class History:
    """What a multi-step sampler remembers: the clean latents it saw last, and at which step."""

    clean: Tensor
    t: int


Sampler = Callable[[Schedule, Tensor, Tensor, int, int, History | None], tuple[Tensor, History]]
"""(schedule, output, latents, t, next t, history) → (latents at next t, history for the next call)."""


def ddim(
    schedule: Schedule, output: Tensor, latents: Tensor, t: int, t_next: int, history: History | None
) -> tuple[Tensor, History]:
    """One DDIM step with η = 0 (Song et al., arXiv 2010.02502, eq. 12)."""
    clean, noise = schedule.split(output, latents, torch.tensor(t))
    signal, sigma = schedule.levels(t_next)
    return signal * clean + sigma * noise, History(clean, t)


def dpm_solver_pp_2m(
    schedule: Schedule, output: Tensor, latents: Tensor, t: int, t_next: int, history: History | None
) -> tuple[Tensor, History]:
    """One step of DPM-Solver++ 2M (Lu et al., arXiv 2211.01095, algorithm 2). First and last steps are first order.

    Holds at a zero-terminal-SNR start, where log-SNR is −∞ and the step is the exact DDIM one.
    """
    clean, noise = schedule.split(output, latents, torch.tensor(t))
    here, there = schedule.log_snr(t), schedule.log_snr(t_next)
    signal_next, sigma_next = schedule.levels(t_next)
    _, sigma = schedule.levels(t)
    step = there - here
    guess = clean
    if history is not None and math.isfinite(step):
        ratio = (here - schedule.log_snr(history.t)) / step
        correction = 0.0 if math.isinf(ratio) else 1.0 / (2.0 * ratio)
        guess = clean + correction * (clean - history.clean)
    if sigma == 0.0:
        return signal_next * guess + sigma_next * noise, History(clean, t)
    return (sigma_next / sigma) * latents - signal_next * math.expm1(-step) * guess, History(clean, t)


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}
"""Every sampler a pack may name."""
