"""Adam with a rate, a memory and a limit on the gradient of its own for each group of parameters.

A discriminator moves faster than what it judges, and its large gradients must not make the other's steps smaller. Knows
no network but by its parameters' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from training.methods.method import Rates


class GroupedAdam(torch.optim.Adam):
    """Plain Adam (Kingma and Ba), no weight decay; parameters of the same `Rates` are a group."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], rates: Callable[[str], Rates], clip_norm: float
    ) -> None:
        """`clip_norm` is what a group's gradient may be long at most."""
        groups: dict[Rates, list[nn.Parameter]] = {}
        for name, parameter in named:
            groups.setdefault(rates(name), []).append(parameter)
        super().__init__([{"params": own, "lr": one.rate, "betas": one.betas} for one, own in groups.items()])
        self._clip_norm = clip_norm
        self._full_rates = [group["lr"] for group in self.param_groups]

    def scale_rates(self, factor: float) -> None:
        """Set every group's rate to `factor` times its own full rate."""
        for group, full in zip(self.param_groups, self._full_rates, strict=True):
            group["lr"] = full * factor

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Raises FloatingPointError, and moves nothing, when a gradient is not finite: no checkpoint must ever hold what
        such a step would leave.
        """
        for group in self.param_groups:
            try:
                nn.utils.clip_grad_norm_(group["params"], self._clip_norm, error_if_nonfinite=True)
            except RuntimeError as error:
                raise FloatingPointError("a gradient is not finite") from error
        super().step()
