"""Forwards that are recorded once for each shape and then replayed: no work of the host's for each of their kernels.

    graphs = Graphs(CudaRecorder(), broken=lambda why: ...)
    answer, = graphs.run("predict", work, {"latents": …, "timesteps": …})

On a GPU a narrow forward of hundreds of small kernels takes as long as the host needs to launch them. A CUDA graph
launches all of them at once, but always at the same addresses and in the same shapes. So rows are copied into buffers
that stay, filled up to one of a few counts (`ROWS`), and what the forward reads besides them has its addresses in the
graph's key. The second forward of a key is recorded; the first one, as every one that is not recorded, runs as it is,
on the filled up rows, so that its numbers are those of a replay. What a recording answers is compared with that once.
Where recording does not work, or answers something else, everything runs as it is from then on, and `broken` is told.

Knows nothing of what it records. Not thread-safe: who steps the network records it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
"""Row counts that are recorded. Wider forwards run as they are: their kernels take longer than launching them."""
FAMILIES_MAX = 32  # shapes of inputs, but for the rows, whose recordings are kept
_TOLERANCE = 1e-2  # of the largest number, between a replay and the forward as it is: bfloat16 sums in another order

Inputs: TypeAlias = Mapping[str, Tensor]
"""By name, one row each: `[B, …]`, on the device."""
Outputs: TypeAlias = tuple[Tensor, ...]
"""`[B, …]` each, in the inputs' order of rows."""
Work: TypeAlias = Callable[[Inputs], Outputs]


class Recorder(Protocol):
    """What a device has for it."""

    def record(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """What does `work` again on what then lies in its inputs, and where that leaves its answers. May raise."""


class CudaRecorder:
    """CUDA graphs, in one pool of memory: a replay's answers are read before the next one is made."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """As `Recorder` says. Other threads may use the device meanwhile: the one that decodes does."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = work()
        return graph.replay, outputs


@dataclass(frozen=True)
class _Recording:
    """One forward of one row count."""

    addresses: tuple[int, ...]
    parts: frozenset[str]
    replay: Callable[[], None]
    outputs: Outputs


@dataclass
class _Family:
    """Inputs of the same shapes, but for their rows."""

    buffers: dict[str, Tensor]
    recordings: dict[int, _Recording] = field(default_factory=dict)  # by row count
    seen: dict[int, tuple[tuple[int, ...], frozenset[str]]] = field(default_factory=dict)  # likewise, run as it was


class Graphs:
    """The recordings of one network."""

    def __init__(self, recorder: Recorder, *, broken: Callable[[str], None] = lambda _: None) -> None:
        """`broken` is told why, once, when nothing will be recorded any more."""
        self._recorder, self._tell_broken = recorder, broken
        self._families: OrderedDict[tuple[object, ...], _Family] = OrderedDict()  # used longest ago first
        self.is_broken = False
        self.recorded_count = 0
        self.replayed_count = 0

    def run(
        self,
        kind: str,
        work: Work,
        inputs: Inputs,
        *,
        addresses: Sequence[int] = (),
        parts: frozenset[str] = frozenset(),
    ) -> Outputs:
        """What `work(inputs)` answers. It may lie where the next call will write: use it, or copy it, before that.

        `kind` names what `work` does; a work of the same kind does the same to its inputs, and reads besides them only
        what never moves, what lies at `addresses`, and what `parts` names: a recording that read more serves as well.
        """
        rows = len(next(iter(inputs.values())))
        if self.is_broken or rows > ROWS[-1]:
            return work(inputs)
        count = ROWS[bisect_left(ROWS, rows)]
        family = self._family(kind, inputs)
        given = _filled(family.buffers, inputs, count)
        reads = (tuple(addresses), parts)
        recording = family.recordings.get(count)
        if recording is not None and recording.addresses == reads[0] and parts <= recording.parts:
            recording.replay()
            self.replayed_count += 1
            return tuple(output[:rows] for output in recording.outputs)
        outputs = work(given)
        if family.seen.get(count) == reads:
            self._record(family, count, lambda: work(given), outputs, reads)
        else:
            family.recordings.pop(count, None)  # what it read has moved
            family.seen[count] = reads
        return tuple(output[:rows] for output in outputs)

    def _family(self, kind: str, inputs: Inputs) -> _Family:
        key = (kind, *((name, one.shape[1:], one.dtype) for name, one in inputs.items()))
        family = self._families.get(key)
        if family is None:
            family = self._families[key] = _Family(
                {name: one.new_zeros((ROWS[-1], *one.shape[1:])) for name, one in inputs.items()}
            )
        self._families.move_to_end(key)
        while len(self._families) > FAMILIES_MAX:
            self._families.popitem(last=False)
        return family

    def _record(
        self,
        family: _Family,
        count: int,
        work: Callable[[], Outputs],
        expected: Outputs,
        reads: tuple[tuple[int, ...], frozenset[str]],
    ) -> None:
        try:
            replay, outputs = self._recorder.record(work)
            replay()
            agrees = len(outputs) == len(expected) and all(map(_agree, outputs, expected))
        except Exception as error:  # noqa: BLE001 - whatever it is, the forward works without it
            self._break(f"{type(error).__name__}: {error}")
            return
        if not agrees:
            self._break("a replay answered something else")
            return
        family.recordings[count] = _Recording(*reads, replay, outputs)
        self.recorded_count += 1

    def _break(self, why: str) -> None:
        self.is_broken = True
        self._families.clear()
        self._tell_broken(why)


def _filled(buffers: Mapping[str, Tensor], inputs: Inputs, count: int) -> dict[str, Tensor]:
    """The inputs in their buffers; rows that nobody asked for are the first one again, whose numbers do no harm."""
    given = {}
    for name, one in inputs.items():
        buffer = buffers[name]
        buffer[: len(one)] = one
        buffer[len(one) : count] = one[:1]
        given[name] = buffer[:count]
    return given


def _agree(one: Tensor, other: Tensor) -> bool:
    """They are the same but for rounding; what is not a number in both, too."""
    one, other = one.float(), other.float()
    finite = other[other.isfinite()]
    largest = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=_TOLERANCE * max(largest, 1e-6), equal_nan=True)
