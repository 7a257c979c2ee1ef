"""Tensors on their way to a device, without holding up the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(values: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers as a tensor on `device`. From pageable memory the host would wait until a GPU has done all before it."""
    return moved(torch.tensor(values), device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on `device`; the host must not write to it again."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
