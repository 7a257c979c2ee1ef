"""Changes of a frozen UNet's layers that are learned beside it: low-rank ones, and whole differences.

They are added after each layer, as `services.models.lora.AdapterSlots` adds them when a frame is drawn, so what is
trained is what is served; and taken off for a moment (`off`) they leave the network as it was, which is EpicEvo's
teacher. Knows no method.

Shapes: I inputs, O outputs, r rank of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.lora import LowRank

EVERY_ATTENTION = r".*\.attn[123]\.(to_q|to_k|to_v|to_out\.0)|.*\.ff\.net\.(0\.proj|2)"
"""Attention to oneself, to the text and to earlier frames, and the feed-forward of every block."""
TEXT_KEYS_AND_VALUES = r".*\.attn2\.to_[kv]"


class _Added:
    """What torch calls after a layer."""

    def __init__(self, owner: LayerChanges, name: str) -> None:
        self._owner, self._name = owner, name

    def __call__(self, _: nn.Module, given: tuple[Any, ...], answer: Tensor) -> Tensor:
        return answer + self._owner.added(self._name, given[0]) if self._owner.is_on else answer


class LayerChanges(nn.Module):
    """Parameters by layer, `layers` in the network's own names."""

    def __init__(self, unet: nn.Module, pattern: str) -> None:
        """Of the linear layers whose whole name matches. Raises ValueError where there is none."""
        super().__init__()
        self.is_on = True
        found: dict[str, nn.Linear] = {
            name: module
            for name, module in unet.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)
        }
        if not found:
            raise ValueError(f"the UNet has no layers {pattern}")
        self.layers = tuple(found)
        self.parts = nn.ModuleDict({_key(name): nn.ParameterDict(self.fresh(layer)) for name, layer in found.items()})
        for name, layer in found.items():
            layer.register_forward_hook(_Added(self, name))

    def fresh(self, layer: nn.Linear) -> Mapping[str, nn.Parameter]:
        """One layer's parameters, which change nothing yet."""
        raise NotImplementedError

    def added(self, name: str, given: Tensor) -> Tensor:
        """What a layer's answer gains."""
        raise NotImplementedError

    def of(self, name: str) -> Any:
        """One layer's parameters."""
        return self.parts[_key(name)]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network without the changes."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True


class LowRankChanges(LayerChanges):
    """up · down of rank r beside each layer (Hu et al., "LoRA"). Down starts as noise of variance 1/r, up as zero."""

    def __init__(self, unet: nn.Module, pattern: str, rank: int, generator: torch.Generator) -> None:
        """Raises ValueError where there is no such layer, or for a rank below one."""
        if rank < 1:
            raise ValueError("a rank is at least 1")
        self._rank, self._generator = rank, generator
        super().__init__(unet, pattern)

    def fresh(self, layer: nn.Linear) -> Mapping[str, nn.Parameter]:
        down_rI = torch.randn(self._rank, layer.in_features, generator=self._generator) / self._rank**0.5
        up_Or = torch.zeros(layer.out_features, self._rank)
        return {"down": nn.Parameter(down_rI), "up": nn.Parameter(up_Or)}

    def added(self, name: str, given: Tensor) -> Tensor:
        own = self.of(name)
        return F.linear(F.linear(given, own["down"]), own["up"])

    def factors(self) -> dict[str, LowRank]:
        """What is learned, by layer. Alpha is the rank: the product counts as it is."""
        return {
            name: LowRank(self.of(name)["down"].detach().cpu(), self.of(name)["up"].detach().cpu(), float(self._rank))
            for name in self.layers
        }


class WholeChanges(LayerChanges):
    """A difference of each layer's whole weight (Kumari et al., "Custom Diffusion"). Starts as zero."""

    def fresh(self, layer: nn.Linear) -> Mapping[str, nn.Parameter]:
        return {"delta": nn.Parameter(torch.zeros_like(layer.weight))}

    def added(self, name: str, given: Tensor) -> Tensor:
        return F.linear(given, self.of(name)["delta"])

    def deltas(self) -> dict[str, Tensor]:
        """What is learned, `[O, I]` by layer."""
        return {name: self.of(name)["delta"].detach().cpu() for name in self.layers}


def _key(name: str) -> str:
    """A layer's name where torch allows no points."""
    return name.replace(".", "/")
