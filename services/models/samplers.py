"""Samplers: from the network's answer at one noise level to the latents of the next.

Plain functions over one job's latents (any shape). All but `euler_ancestral` and `lcm` are deterministic, so that the
only randomness of a frame is the noise it starts from; those two ask for more. Knows no network, guidance or batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from services.models.ranges import AnyScheduleConfig, FlowConfig
from services.models.schedule import Schedule
from services.models.transfer import moved


@dataclass(frozen=True)
class History:
    """What a multi-step sampler remembers: the clean latents it saw last, and at which step."""

    clean: Tensor
    t: float


Noise = Callable[[], Tensor]
"""Fresh standard normal noise in the latents' shape, from the job's own seed."""

Sampler = Callable[[Schedule, Tensor, Tensor, float, float, History | None, Noise], tuple[Tensor, History]]
"""(schedule, output, latents, t, next t, history, noise) → (latents at next t, history for the next call)."""


def ddim(
    schedule: Schedule, output: Tensor, latents: Tensor, t: float, t_next: float, history: History | None, fresh: Noise
) -> tuple[Tensor, History]:
    """One DDIM step with η = 0 (Song et al., arXiv 2010.02502, eq. 12)."""
    clean, noise = schedule.split(output, latents, torch.tensor(t))
    signal, sigma = schedule.levels(t_next)
    return signal * clean + sigma * noise, History(clean, t)


def euler(
    schedule: Schedule, output: Tensor, latents: Tensor, t: float, t_next: float, history: History | None, fresh: Noise
) -> tuple[Tensor, History]:
    """One Euler step of the probability-flow ODE in x/signal over σ = noise/signal (Karras et al., arXiv 2206.00364).

    In these variables the ODE's slope is the predicted noise. The same line as DDIM's, walked in another form: the two
    agree but for rounding. From pure noise (signal zero), where σ is infinite, the first step is DDIM's.
    """
    clean, noise = schedule.split(output, latents, torch.tensor(t))
    (signal, sigma), (signal_next, sigma_next) = schedule.levels(t), schedule.levels(t_next)
    if signal < _PURE_NOISE:
        return signal_next * clean + sigma_next * noise, History(clean, t)
    moved = latents / signal + (sigma_next / signal_next - sigma / signal) * noise
    return signal_next * moved, History(clean, t)


def euler_ancestral(
    schedule: Schedule, output: Tensor, latents: Tensor, t: float, t_next: float, history: History | None, fresh: Noise
) -> tuple[Tensor, History]:
    """One ancestral Euler step (Karras et al., arXiv 2206.00364, with k-diffusion's split of the noise).

    It goes below the next level, and back up to it with fresh noise. Of the next level's σ² the part (σ_next/σ)² is the
    predicted noise squared once more, the rest is fresh: from pure noise, all of it.
    """
    clean, noise = schedule.split(output, latents, torch.tensor(t))
    (signal, sigma), (signal_next, sigma_next) = schedule.levels(t), schedule.levels(t_next)
    if sigma_next == 0.0:
        return signal_next * clean, History(clean, t)
    ratio = sigma_next * signal / (signal_next * sigma)
    down, up = sigma_next * ratio, sigma_next * math.sqrt(max(0.0, 1.0 - ratio**2))
    return signal_next * clean + down * noise + up * moved(fresh(), clean.device).to(clean.dtype), History(clean, t)


def lcm(
    schedule: Schedule, output: Tensor, latents: Tensor, t: float, t_next: float, history: History | None, fresh: Noise
) -> tuple[Tensor, History]:
    """One step of multistep consistency sampling (Luo et al., arXiv 2310.04378, algorithm 3): believe, then noise anew.

    The boundary weights are the published ones (σ_data 0.5, ten times the timestep).
    """
    clean, _ = schedule.split(output, latents, torch.tensor(t))
    scaled = 10.0 * t
    skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    out = scaled / math.sqrt(scaled**2 + _SIGMA_DATA**2)
    believed = skip * latents + out * clean
    if t_next < 0:
        return believed, History(clean, t)
    signal_next, sigma_next = schedule.levels(t_next)
    return signal_next * believed + sigma_next * moved(fresh(), believed.device).to(believed.dtype), History(clean, t)


def dpm_solver_pp_2m(
    schedule: Schedule, output: Tensor, latents: Tensor, t: float, t_next: float, history: History | None, fresh: Noise
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


def flow_euler(
    schedule: Schedule, output: Tensor, latents: Tensor, t: float, t_next: float, history: History | None, fresh: Noise
) -> tuple[Tensor, History]:
    """One Euler step along the line that a flow's network says (Lipman et al., arXiv 2210.02747)."""
    clean, _ = schedule.split(output, latents, torch.tensor(t))
    (_, sigma), (_, sigma_next) = schedule.levels(t), schedule.levels(t_next)
    return latents + (sigma_next - sigma) * output, History(clean, t)


def starting_amplitude(sampler: Sampler, schedule: Schedule, t: float) -> float:
    """How strong the noise is that sampling starts from, at its first step `t`.

    As published: the two Euler samplers start where the training data was, a little below one where the last step still
    holds some signal, if the schedule's first step is the last one of training. All others start from one.
    """
    is_euler = sampler in (euler, euler_ancestral)
    return schedule.levels(t)[1] if is_euler and schedule.config.spacing == "trailing" else 1.0


_PURE_NOISE = 1e-6  # a signal below this is none
_SIGMA_DATA = 0.5
SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "lcm": lcm,
}
"""Every sampler that a pack or a job may name, where the network predicts noise or velocity."""
FLOW_SAMPLERS: dict[str, Sampler] = {"flow_euler": flow_euler}
"""The same where it predicts a flow."""


def samplers_of(config: AnyScheduleConfig) -> Mapping[str, Sampler]:
    """Those that can walk a manifest's schedule."""
    return FLOW_SAMPLERS if isinstance(config, FlowConfig) else SAMPLERS
