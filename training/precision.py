"""Chooses where training computes and in which arithmetic: bfloat16 where the hardware multiplies it, else float32.

Emulated bfloat16 is not a little slower: without AVX512-BF16 its products run at a hundredth of float32's speed.
"""

from __future__ import annotations

import torch
from torch import nn


def on_gpu() -> bool:
    """Whether training here runs on a GPU."""
    return torch.cuda.is_available()


def default_device() -> str:
    """Where training computes unless told otherwise."""
    return "cuda" if on_gpu() else "cpu"


def device_of(networks: nn.Module) -> torch.device:
    """Where the weights of `networks` lie, and therefore where its batches must go."""
    return next(networks.parameters()).device


def fast_dtype(device: torch.device) -> torch.dtype:
    """The fastest type for matrix products on `device`."""
    if device.type == "cuda":
        multiplied = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        multiplied = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if multiplied else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """A context in which products on `device` run in its fastest type."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) is torch.bfloat16)
