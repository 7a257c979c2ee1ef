"""Several processes that train one network together: each on batches of its own, all with the mean of their gradients.

On two cores two processes of one thread compute a fifth more than one process of two threads; on a machine with several
GPUs each has its own. Started as torch.distributed expects it, by `torchrun --nproc-per-node 2 -m training.frame`, by
Ray Train (`customize_ray`), or by hand with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Without them a process
trains alone.

The first process writes checkpoints and measures; what depends on the clock, the rate and the end, it decides for all.
Processes meet in the calls here, so all must make the same ones in the same order: what one does that may fail, or take
long, it does in `alone` or `together`, and no other waits for a process that has gone. Knows no network and no Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_T = TypeVar("_T")


class PeerEnded(Exception):
    """Another process of the run has met its end, so this one ends, too. That one says why."""


class Peers:
    """The processes of a run, this one being number `rank` of `count`."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self.has_parted = False  # one has failed at something, and all know it

    @property
    def is_first(self) -> bool:
        """This one writes and measures."""
        return self.rank == 0

    def batches(self, count: int) -> range:
        """The numbers of those among a step's `count` batches that are this process's.

        Raises ValueError when they cannot be shared out evenly: then their mean were not the mean of all.
        """
        own, left = divmod(count, self.count)
        if left or not own:
            raise ValueError(f"{count} batches of a step cannot be shared out evenly among {self.count} processes")
        return range(self.rank * own, (self.rank + 1) * own)

    def agreed(self, value: float) -> float:
        """The first process's `value`."""
        if self.count == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=_device())
        dist.broadcast(told, src=0)
        return float(told)

    def most(self, value: float) -> float:
        """The largest `value` of any process."""
        if self.count == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=_device())
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return float(told)

    def means(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over all processes."""
        if self.count == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(told)
        shared: list[float] = (told / self.count).tolist()
        return shared

    def alone(self, what: Callable[[], _T]) -> _T | None:
        """The first process does `what` while the others wait: its answer there, None elsewhere.

        Raises what `what` raises there, and PeerEnded elsewhere.
        """
        if self.count == 1:
            return what()
        answer, went_well = None, False
        try:
            if self.is_first:
                answer = what()
            went_well = True
        finally:
            self.has_parted = self.agreed(float(went_well)) == 0.0
        if self.has_parted:
            raise PeerEnded
        return answer

    def together(self, what: Callable[[], _T]) -> _T:
        """Every process does `what`, which must meet no other itself.

        Raises what `what` raises here, and PeerEnded where only others failed.
        """
        if self.count == 1:
            return what()
        went_well = False
        try:
            answer = what()
            went_well = True
        finally:
            self.has_parted = self.most(float(not went_well)) > 0.0
        if self.has_parted:
            raise PeerEnded
        return answer

    @torch.no_grad()
    def share(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every gradient the mean over all processes.

        All processes must have gradients of the same parameters.
        """
        if self.count == 1:
            return
        own: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not own:
            return
        device = _device()
        flat = torch.cat([grad.flatten().float().to(device) for grad in own])  # one message instead of hundreds
        dist.all_reduce(flat)
        flat /= self.count
        parts = torch.split(flat, [grad.numel() for grad in own])
        for grad, mean in zip(own, parts, strict=True):
            grad.copy_(mean.view_as(grad))


def _device() -> str:
    """Where messages must lie: NCCL takes no others than those of a GPU, gloo is for those of the CPU."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def joined() -> Peers:
    """The run this process was started in; alone when it was started like any other program."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Peers()
    if torch.cuda.is_available():  # each process a GPU of its own
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Peers(dist.get_rank(), dist.get_world_size())
