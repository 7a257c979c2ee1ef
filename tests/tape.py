"""A recorder of forwards (`services.models.graphs.Recorder`) for processors, as strict as a GPU's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Asked(Exception):
    """The work wanted an answer of the device, or numbers of the host's, which no recording can have."""


class Tape(TorchDispatchMode):
    """A recorder for processors that freezes what a GPU's freezes: operations and the memory they use, and no Python.

    Between replays other recordings use the same memory, so what a recording left is spoiled before it runs again.
    """

    _FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in self._FORBIDDEN:
            raise Asked(func._schema.name)
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, out))
        return out

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self._operations = []
        with self:
            work()
        # A view lies where it lay, what is written in place writes itself, and the rest is computed anew.
        steps = []
        for func, args, kwargs, out in self._operations:
            given = {memory_of(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            computed = [one for one in tensors_of(out) if memory_of(one) not in given]
            writes = any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.returns)
            if computed or writes:
                steps.append((functools.partial(func, *args, **kwargs), computed))

        def replay() -> None:
            for _, computed in steps:
                for one in computed:
                    one.fill_(torch.nan if one.is_floating_point() else 0)
            for again, computed in steps:
                answers = tensors_of(again())
                for old, new in zip(computed, answers if computed else [], strict=True):
                    old.copy_(new)

        return replay


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_of(out: Any) -> list[Tensor]:
    return [one for one in (out if isinstance(out, tuple | list) else [out]) if isinstance(one, Tensor)]
