"""Noise levels of a diffusion model: how noisy step t is, and what the network is asked for there.

Training (`add_noise`, `target`) and sampling (`split`, `sampling_steps`) are methods over the same formulas.
Knows no network, no sampler and no random number: noise is always an argument.

Shapes: `t` is an integer tensor of any shape `[...]`; the tensors it belongs to are `[..., C, H, W]`, so one call may
hold rows at different noise levels. `signal` and `noise` amplitudes satisfy signal² + noise² = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.models.ranges import ScheduleConfig as ScheduleConfig

CLEAN = -1
"""The step after the last one: no noise left (or as little as `final_step_is_clean` says)."""


class Schedule:
    """A scaled-linear noise schedule. Immutable; its tables live on the CPU in float64."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_steps, dtype=torch.float64)
        signal = torch.cumprod(1.0 - betas.square(), dim=0).sqrt()
        if config.zero_terminal_snr:
            first, last = signal[0].clone(), signal[-1].clone()
            signal = (signal - last) * first / (first - last)
        self._signal_T = signal
        self._noise_T = (1.0 - signal.square()).clamp_min(0.0).sqrt()

    def levels(self, t: int) -> tuple[float, float]:
        """Signal and noise amplitude at step `t`; `CLEAN` gives those at the end of sampling."""
        if t < 0:
            if self.config.final_step_is_clean:
                return 1.0, 0.0
            t = 0
        return float(self._signal_T[t]), float(self._noise_T[t])

    def log_snr(self, t: int) -> float:
        """Half the log signal-to-noise ratio, log(signal/noise), at step `t`; infinite where one of them is zero."""
        signal, noise = self.levels(t)
        if noise == 0.0:
            return math.inf
        return math.log(signal / noise) if signal > 0.0 else -math.inf

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `clean` looks like at noise level `t`."""
        signal, sigma = self._amplitudes(t, clean)
        return signal * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer for `add_noise(clean, noise, t)`."""
        if self.config.prediction == "epsilon":
            return noise
        signal, sigma = self._amplitudes(t, clean)
        return signal * noise - sigma * clean

    def split(self, output: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The clean tensor and the noise that the network's `output` says `noisy` is made of."""
        signal, sigma = self._amplitudes(t, noisy)
        if self.config.prediction == "epsilon":
            return (noisy - sigma * output) / signal, output
        return signal * noisy - sigma * output, sigma * noisy + signal * output

    def sampling_steps(self, count: int) -> tuple[int, ...]:
        """The `count` training steps that sampling visits, noisiest first.

        Raises ValueError unless 1 ≤ count ≤ train_steps.
        """
        total = self.config.train_steps
        if not 1 <= count <= total:
            raise ValueError(f"steps must be between 1 and {total}")
        if self.config.spacing == "trailing":
            return tuple(round(total - k * total / count) - 1 for k in range(count))
        stride = total // count
        return tuple(min(k * stride + self.config.steps_offset, total - 1) for k in reversed(range(count)))

    def step_after(self, t: int, count: int) -> int:
        """The training step that sampling with `count` steps goes to from `t`; `CLEAN` after the last one."""
        if self.config.spacing == "leading":
            # The stride below the step, as Stable Diffusion's DDIM takes it: equal to the next visited step except at
            # the end, and kept so that published packs give the published numbers.
            return max(t - self.config.train_steps // count, CLEAN)
        steps = self.sampling_steps(count)
        index = steps.index(t)
        return steps[index + 1] if index + 1 < count else CLEAN

    def _amplitudes(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        index = t.to(device="cpu", dtype=torch.long)
        shape = (*t.shape, *(1,) * (like.dim() - t.dim()))
        signal = self._signal_T[index].reshape(shape).to(device=like.device, dtype=like.dtype)
        sigma = self._noise_T[index].reshape(shape).to(device=like.device, dtype=like.dtype)
        return signal, sigma
