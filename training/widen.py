"""Makes a network wider without changing what it computes, so that a run goes on instead of starting again.

Every channel becomes several equal ones (Chen, Goodfellow and Shlens 2016, Net2Net); whoever reads them divides its
weight among them. It is divided at random, or all copies would learn the same for ever. A group of channels that are
normalised together keeps its members, so the number of groups must stay what it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SHORTCUT = ".conv_shortcut."
_ATTENTION = ".attentions."  # its softmax divides by its width: copies would change it


def widened(fresh: Mapping[str, Tensor], known: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """`known`, stretched to the shapes of `fresh`: tensors `[out]`, or `[out, in, …]`.

    A shortcut that two blocks of one width no longer need is left out: then, and only then, it computes something else.
    Raises ValueError when a name differs otherwise or a width is not a multiple of what it was.
    """
    if wrong := sorted(n for n in fresh.keys() ^ known.keys() if n in fresh or _SHORTCUT not in n):
        raise ValueError(f"not the same network: {wrong[:3]}")
    return {
        name: _stretched(name, value.shape, known[name].to(value.dtype), generator) for name, value in fresh.items()
    }


def _stretched(name: str, shape: torch.Size, old: Tensor, generator: torch.Generator) -> Tensor:
    times = [a // b for a, b in zip(shape, old.shape, strict=False)]
    if len(shape) != old.ndim or any(b * t != a for a, b, t in zip(shape, old.shape, times, strict=True)):
        raise ValueError(f"{name}: {tuple(old.shape)} does not stretch to {tuple(shape)}")
    if times[2:].count(1) != len(times[2:]) or (_ATTENTION in name and any(t > 1 for t in times)):
        raise ValueError(f"{name}: only a convolution's channels can be more, not {tuple(old.shape)} to {tuple(shape)}")
    if old.ndim == 0 or not any(t > 1 for t in times):
        return old.clone()
    new = old.repeat_interleave(times[0], dim=0)
    if old.ndim > 1 and times[1] > 1:
        shares = 0.5 + torch.rand(new.shape[0], old.shape[1], times[1], generator=generator)
        shares = shares / shares.sum(dim=2, keepdim=True)
        trailing = [1] * (old.ndim - 2)
        new = new.repeat_interleave(times[1], dim=1) * shares.flatten(1).view(new.shape[0], -1, *trailing)
    return new
