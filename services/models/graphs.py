"""Forwards that are recorded once for each shape and then replayed: no work of the host's for each of their kernels.

    graphs = Graphs(CudaRecorder(), tell=lambda what: ...)
    answer, = graphs.run("predict", work, {"latents": …, "timesteps": …})

On a GPU a narrow forward of hundreds of small kernels takes as long as the host needs to launch them. A CUDA graph
launches all of them at once, but always at the same addresses and in the same shapes. So rows are copied into buffers
that stay, filled up to one of a few counts (`ROWS`), and what the forward reads besides them has its addresses in the
recording's key. The second forward of a key is recorded; the first one, as every one that is not recorded, runs as it
is, on the filled up rows, so that its numbers are those of a replay. What a recording answers is compared with that
once. Where recording does not work, or answers something else, everything runs as it is from then on. That is told, and
so is memory that ran out, for which all recordings are given up.

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
BYTES_MAX = 4 << 30  # of the buffers of one network's recordings
_TOLERANCE = 1e-2  # of the largest number, between a replay and the forward as it is: bfloat16 sums in another order

Inputs: TypeAlias = Mapping[str, Tensor]
"""By name, one row each: `[B, …]`, on the device."""
Outputs: TypeAlias = tuple[Tensor, ...]
"""`[B, …]` each, in the inputs' order of rows."""
Work: TypeAlias = Callable[[Inputs], Outputs]


class Recorder(Protocol):
    """What a device has for it."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does `work` again, to the same memory. `work` need not be done when this returns. May raise."""


class CudaRecorder:
    """CUDA graphs, all in one pool of memory. One for a process.

    cuBLAS keeps a workspace for each stream, which lies in the pool of whoever captured first and which all graphs of
    the stream use: a pool that went before the others' graphs would take theirs with it.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As `Recorder` says. Other threads may use the device meanwhile: the one that decodes does."""
        if self._pool is None or self._stream is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        before = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except BaseException:
            # torch leaves the capture's stream only where the capture ends well; its pool is not to be used again.
            torch.cuda.set_stream(before)
            self._pool = self._stream = None
            raise
        return graph.replay


@dataclass(frozen=True)
class _Reads:
    """What a forward reads besides its inputs: numbers that say where that lies, and names of what it has of it."""

    places: tuple[int, ...]
    parts: frozenset[str]


@dataclass
class _Family:
    """Inputs of the same shapes, but for their rows; all its recordings use the same buffers."""

    inputs: dict[str, Tensor]
    outputs: Outputs = ()
    recordings: dict[int, tuple[_Reads, Callable[[], None]]] = field(default_factory=dict)  # by row count
    seen: dict[int, _Reads] = field(default_factory=dict)  # likewise: run once as they are

    @property
    def rows_max(self) -> int:
        """How many rows the buffers hold."""
        return len(next(iter(self.inputs.values())))

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(one.nbytes for one in (*self.inputs.values(), *self.outputs))


class Graphs:
    """The recordings of one network."""

    def __init__(
        self, recorder: Recorder, *, tell: Callable[[str], None] = lambda _: None, bytes_max: int = BYTES_MAX
    ) -> None:
        """`tell` hears why recordings were given up; `is_broken` says whether for good."""
        self._recorder, self._tell, self._bytes_max = recorder, tell, bytes_max
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
        places: Sequence[int] = (),
        parts: frozenset[str] = frozenset(),
    ) -> Outputs:
        """What `work(inputs)` answers. It may lie where the next call will write: use it, or copy it, before that.

        `kind` names what `work` does. A work of the same kind does the same to its inputs, without asking the device
        for anything, and reads besides them only what never moves, what lies where `places` say (addresses and
        lengths), and what `parts` name: a recording that read more of these serves as well.
        """
        rows = len(next(iter(inputs.values())))
        if self.is_broken or rows > ROWS[-1]:
            return work(inputs)
        try:
            return self._run(kind, work, inputs, rows, _Reads(tuple(places), parts))
        except torch.OutOfMemoryError:
            self._families.clear()
            self._tell("memory ran out")
        # Not in the handler: the error holds the memory of the forward that failed.
        return work(inputs)

    def _run(self, kind: str, work: Work, inputs: Inputs, rows: int, reads: _Reads) -> Outputs:
        count = ROWS[bisect_left(ROWS, rows)]
        family = self._family(kind, inputs, count)
        given = _filled(family.inputs, inputs, count)
        read, replay = family.recordings.get(count, (None, None))
        if read is not None and replay is not None and read.places == reads.places and reads.parts <= read.parts:
            replay()
            self.replayed_count += 1
            return tuple(output[:rows] for output in family.outputs)
        outputs = work(given)
        if family.seen.get(count) == reads:
            self._record(family, count, lambda: work(given), outputs, reads)
        else:
            family.recordings.pop(count, None)  # what it read has moved
            family.seen[count] = reads
        return tuple(output[:rows] for output in outputs)

    def _family(self, kind: str, inputs: Inputs, count: int) -> _Family:
        key = (kind, *((name, one.shape[1:], one.dtype) for name, one in inputs.items()))
        family = self._families.get(key)
        if family is None or family.rows_max < count:
            family = self._families[key] = _Family({name: _buffer(one, count) for name, one in inputs.items()})
        self._families.move_to_end(key)
        while len(self._families) > 1 and sum(one.nbytes for one in self._families.values()) > self._bytes_max:
            self._families.popitem(last=False)
        return family

    def _record(
        self, family: _Family, count: int, work: Callable[[], Outputs], expected: Outputs, reads: _Reads
    ) -> None:
        if not family.outputs:
            family.outputs = tuple(_buffer(one, family.rows_max) for one in expected)

        def into_buffers() -> None:
            # A graph that kept its answers would keep their memory from all others of its pool.
            for buffer, answer in zip(family.outputs, work(), strict=True):
                buffer[:count] = answer

        try:
            replay = self._recorder.record(into_buffers)
            for buffer in family.outputs:
                buffer.zero_()
            replay()
            agrees = all(_agree(buffer[:count], one) for buffer, one in zip(family.outputs, expected, strict=True))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the forward works without it
            self._break(f"{type(error).__name__}: {error}")
            return
        if not agrees:
            self._break("a replay answered something else")
            return
        family.recordings[count] = (reads, replay)
        self.recorded_count += 1

    def _break(self, why: str) -> None:
        self.is_broken = True
        self._families.clear()
        self._tell(why)


def _buffer(like: Tensor, rows: int) -> Tensor:
    """Zeros for so many rows, laid out as those of `like`."""
    channels_last = (
        like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((rows, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=layout).zero_()


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
