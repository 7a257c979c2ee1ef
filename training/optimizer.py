"""Muon for matrices, AdamW for everything else, as one optimizer; and the learning rate over a run.

Muon (Jordan et al. 2024, github.com/KellerJordan/Muon) replaces a matrix's momentum by the nearest semi-orthogonal
matrix, so that every direction moves alike; convolutions count as matrices [out, in·h·w]. Embeddings, gains, biases and
the first and last layers stay with AdamW, as its authors advise. Knows no network but by its parameters' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.precision import fast_dtype

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that pushes singular values towards 1 in five rounds


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """How parameters move."""

    matrix_rate: float = 0.02  # Muon's; 0 gives everything to AdamW
    rate: float = 2e-3  # AdamW's
    weight_decay: float = 0.01
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The learning rate over a run: linear warm-up, flat, then linearly to zero over the last part.

    A run ends after `steps`, or, when `minutes` is given, after that much training time if it comes first; the decay
    follows whichever is nearer its end, so a capped run still ends at zero.
    """

    steps: int
    warmup_steps: int = 50
    decay_share: float = 0.6
    minutes: float | None = None

    def progress(self, step: int, elapsed_s: float) -> float:
        """How much of the run is over, 0..1."""
        by_steps = step / self.steps
        by_time = 0.0 if self.minutes is None else elapsed_s / (self.minutes * 60.0)
        return min(1.0, max(by_steps, by_time))

    def factor(self, step: int, elapsed_s: float) -> float:
        """What the learning rate is multiplied with at `step`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = 1.0 - self.progress(step, elapsed_s)
        return warm * min(1.0, left / self.decay_share)


class MuonAdam(torch.optim.Optimizer):
    """Muon and AdamW side by side; a group's `matrices` says which."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], recipe: OptimizerRecipe, adam_only: Callable[[str], bool]
    ) -> None:
        """`adam_only(name)` keeps a matrix (an embedding, a first or last layer) away from Muon."""
        groups: dict[str, list[nn.Parameter]] = {"matrices": [], "decayed": [], "plain": []}
        for name, parameter in named:
            if parameter.ndim < 2:
                groups["plain"].append(parameter)
            elif recipe.matrix_rate > 0 and not adam_only(name):
                groups["matrices"].append(parameter)
            else:
                groups["decayed"].append(parameter)
        self.recipe = recipe
        settings: list[dict[str, Any]] = [
            {"params": groups["matrices"], "matrices": True, "lr": recipe.matrix_rate, "decay": recipe.weight_decay},
            {"params": groups["decayed"], "matrices": False, "lr": recipe.rate, "decay": recipe.weight_decay},
            {"params": groups["plain"], "matrices": False, "lr": recipe.rate, "decay": 0.0},
        ]
        settings = [group for group in settings if group["params"]]
        super().__init__(settings, {})
        self._full_rates = [group["lr"] for group in self.param_groups]

    def scale_rates(self, factor: float) -> None:
        """Set every group's rate to `factor` times its own full rate."""
        for group, full in zip(self.param_groups, self._full_rates, strict=True):
            group["lr"] = full * factor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["matrices"]:
                self._step_matrices(parameters, group["lr"], group["decay"])
            else:
                self._step_adam(parameters, group["lr"], group["decay"])

    def _step_matrices(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            grad = parameter.grad
            assert grad is not None
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            momentum: Tensor = state["momentum"]
            momentum.lerp_(grad, 1 - self.recipe.momentum)
            direction = grad.lerp(momentum, self.recipe.momentum).flatten(1)
            update = orthogonalised(direction)
            rows, columns = direction.shape
            parameter.mul_(1 - rate * decay)
            parameter.add_(update.view_as(parameter), alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _step_adam(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        first, second = self.recipe.betas
        for parameter in parameters:
            state = self.state[parameter]
            grad = parameter.grad
            assert grad is not None
            if "steps" not in state:
                state["steps"] = torch.zeros(())
                state["mean"] = torch.zeros_like(grad)
                state["square"] = torch.zeros_like(grad)
            state["steps"] += 1
            count = float(state["steps"])
            state["mean"].lerp_(grad, 1 - first)
            state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)
            spread = (state["square"] / (1 - second**count)).sqrt_().add_(1e-8)
            parameter.mul_(1 - rate * decay)
            parameter.addcdiv_(state["mean"], spread, value=-rate / (1 - first**count))


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The semi-orthogonal matrix nearest to `matrix`, roughly (singular values end in about 0.7..1.2)."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(fast_dtype(matrix.device))
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = (x if wide else x.T).to(matrix.dtype)
    return out
