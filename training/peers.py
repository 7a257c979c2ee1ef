"""Several processes that train one network together: each on batches of its own, all with the mean of their gradients.

On two cores two processes of one thread compute a fifth more than one process of two threads; on a machine with several
GPUs each has its own. Started as torch.distributed expects it, by `torchrun --nproc-per-node 2 -m training.frame`, or
by hand with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Without them a process trains alone.

The first process writes checkpoints and measures; what depends on the clock, the rate and the end, it decides for all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Peers:
    """The processes of a run, this one being number `rank` of `count`."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def is_first(self) -> bool:
        """This one writes and measures."""
        return self.rank == 0

    def agreed(self, value: float) -> float:
        """The first process's `value`."""
        if self.count == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(told, src=0)
        return float(told)

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
        flat = torch.cat([grad.flatten().float().cpu() for grad in own])  # one message instead of hundreds
        dist.all_reduce(flat)
        flat /= self.count
        parts = torch.split(flat, [grad.numel() for grad in own])
        for grad, mean in zip(own, parts, strict=True):
            grad.copy_(mean.view_as(grad))


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
