"""Weights from a safetensors file into a network, or a word on why they do not fit.

Knows no pack and no particular network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from services.models.errors import PackWeightsMismatch

Renamed = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A file's tensors by the names that the network has for them."""


def load_weights(module: nn.Module, path: Path, renamed: Renamed = dict, *, assign: bool = False) -> None:
    """Fill a network from a safetensors file, converting to its dtype.

    With `assign` the file's tensors become the network's, of the file's dtype: for one that was built on the meta
    device, so that its weights are in memory once. Raises PackWeightsMismatch naming what is missing, unknown or of the
    wrong shape.
    """
    load_parts(module, (path,), renamed, assign=assign)


def load_parts(module: nn.Module, paths: Sequence[Path], renamed: Renamed = dict, *, assign: bool = False) -> None:
    """`load_weights` of a network whose tensors lie in several files. Raises PackWeightsMismatch for one in two."""
    path = paths[0]
    parts: dict[str, Tensor] = {}
    for part in paths:
        try:
            own = load_file(str(part))
        except SafetensorError as error:
            raise PackWeightsMismatch(f"{part.name} of {part.parent.name}: {error}") from None
        if twice := sorted(parts.keys() & own.keys()):
            raise PackWeightsMismatch(f"{part.name} of {part.parent.name}: {twice[0]} lies in another part, too")
        parts |= own
    found = renamed(parts)
    wanted = module.state_dict()
    faults = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    faults += [f"{name} is unknown" for name in sorted(found.keys() - wanted.keys())]
    faults += [
        f"{name} is {tuple(found[name].shape)} and should be {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise PackWeightsMismatch(f"{path.name} of {path.parent.name}: {'; '.join(faults[:5])}{more}")
    module.load_state_dict(found, assign=assign)
