"""Noise levels of a diffusion model: how noisy step t is, and what the network is asked for there.

Training (`add_noise`, `target`) and sampling (`split`, `sampling_steps`) are methods over the same formulas.
Knows no network, no sampler and no random number: noise is always an argument.

Shapes: `t` is a tensor of any shape `[...]`; the tensors it belongs to are `[..., C, H, W]`, so one call may hold rows
at different noise levels. Of a `Schedule` it holds integers, and the amplitudes satisfy signal² + noise² = 1; of a
`FlowSchedule` it holds any numbers up to its train steps, and signal + noise = 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from services.models.ranges import FlowConfig
from services.models.ranges import ScheduleConfig as ScheduleConfig
from services.models.transfer import moved

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

    def at(self, latent_pixels: int) -> Schedule:
        """The schedule of a picture of so many latent pixels."""
        return self

    def levels(self, t: float) -> tuple[float, float]:
        """Signal and noise amplitude at step `t`; `CLEAN` gives those at the end of sampling."""
        if t < 0:
            if self.config.final_step_is_clean:
                return 1.0, 0.0
            t = 0
        return float(self._signal_T[int(t)]), float(self._noise_T[int(t)])

    def log_snr(self, t: float) -> float:
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

    def sampling_steps(self, count: int) -> tuple[float, ...]:
        """The `count` training steps that sampling visits, noisiest first. Of this kind they are integers.

        Raises ValueError unless 1 ≤ count ≤ train_steps.
        """
        total = self.config.train_steps
        if not 1 <= count <= total:
            raise ValueError(f"steps must be between 1 and {total}")
        if self.config.spacing == "trailing":
            return tuple(round(total - k * total / count) - 1 for k in range(count))
        stride = total // count
        return tuple(min(k * stride + self.config.steps_offset, total - 1) for k in reversed(range(count)))

    def step_after(self, t: float, count: int) -> float:
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
        signal, sigma = (table_T[index].reshape(shape).to(like.dtype) for table_T in (self._signal_T, self._noise_T))
        return moved(signal, like.device), moved(sigma, like.device)


class FlowSchedule(Schedule):
    """Straight lines from picture to noise (Lipman et al., arXiv 2210.02747): at step t the part t / T is noise.

    The network answers with the line's direction, noise less picture. Steps are real numbers, and where they lie
    depends on the picture's size, so sampling asks `at` first. Immutable.
    """

    def __init__(self, config: FlowConfig, latent_pixels: int = 0) -> None:
        # There is no table, so nothing of the base is built.
        self.flow = config
        self.latent_pixels = latent_pixels

    def at(self, latent_pixels: int) -> FlowSchedule:
        """The schedule of a picture of so many latent pixels."""
        return FlowSchedule(self.flow, latent_pixels)

    def levels(self, t: float) -> tuple[float, float]:
        """Signal and noise amplitude at step `t`; nothing is left of the noise at `CLEAN`."""
        noise = max(float(t), 0.0) / self.flow.train_steps
        return 1.0 - noise, noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The direction of the line: the same all along it."""
        return noise - clean

    def split(self, output: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends of the line on which `noisy` lies, if it goes where `output` says."""
        signal, sigma = self._amplitudes(t, noisy)
        return noisy - sigma * output, noisy + signal * output

    def sampling_steps(self, count: int) -> tuple[float, ...]:
        """The `count` steps that sampling visits, noisiest first.

        In float32 and in the published order of operations, so that they are the published numbers to the bit. Raises
        ValueError unless 1 ≤ count ≤ train_steps, and where the picture's size matters and is not known.
        """
        if not 1 <= count <= self.flow.train_steps:
            raise ValueError(f"steps must be between 1 and {self.flow.train_steps}")
        sigmas = np.linspace(1.0, 1.0 / count, count).astype(np.float32)
        if self.flow.shift_by_size == "flux2":
            if self.latent_pixels < 1:
                raise ValueError("the steps depend on the picture's size: ask `at` for its schedule first")
            shift = math.exp(flux2_shift(self.latent_pixels, count))
            sigmas = shift / (shift + (1.0 / sigmas - 1.0))
        else:
            sigmas = self.flow.shift * sigmas / (1.0 + (self.flow.shift - 1.0) * sigmas)
        return tuple(float(t) for t in sigmas.astype(np.float32) * np.float32(self.flow.train_steps))

    def step_after(self, t: float, count: int) -> float:
        """The step that sampling with `count` steps goes to from `t`; `CLEAN` after the last one."""
        steps = self.sampling_steps(count)
        index = steps.index(t)
        return steps[index + 1] if index + 1 < count else CLEAN

    def _amplitudes(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.to(device="cpu", dtype=torch.float64).clamp_min(0.0) / self.flow.train_steps
        sigma = moved(sigma.reshape(*t.shape, *(1,) * (like.dim() - t.dim())).to(like.dtype), like.device)
        return 1.0 - sigma, sigma


def flux2_shift(latent_pixels: int, count: int) -> float:
    """FLUX.2's shift, as the logarithm that its authors fitted: two lines over the picture's size, and between them.

    One line is of ten steps and one of two hundred; other counts lie on the line through both. Large pictures take the
    second whatever their steps.
    """
    at_200 = 0.00016927 * latent_pixels + 0.45666666
    if latent_pixels > _FLUX2_LARGE:
        return at_200
    at_10 = 8.73809524e-05 * latent_pixels + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * count + (at_200 - 200.0 * slope)


_FLUX2_LARGE = 4300
