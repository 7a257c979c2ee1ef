"""Processes that train together end where one process with all their batches would."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.loop import step_generator, train
from training.peers import Peers, joined
from training.storage import load_checkpoint

from .test_loop import RECIPE, Line, quiet

COUNT = 2


class Both(Line):
    """One process that draws the batches of all."""

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        losses = [super(Both, self).loss(step, progress, step_generator(RECIPE.seed, step, r)) for r in range(COUNT)]
        return torch.stack(losses).mean()


def _peer(rank: int, port: int, folder: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    line = Line()
    train(line, RECIPE, Path(folder) / "line.safetensors", say=quiet, device="cpu", until_step=30)
    torch.save(line.net.state_dict(), Path(folder) / f"peer-{rank}.pt")


def test_two_processes_are_one_with_both_batches(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_peer, args=(rank, port, str(tmp_path))) for rank in range(COUNT)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    alone = Both()
    train(alone, RECIPE, tmp_path / "alone.safetensors", say=quiet, device="cpu", until_step=30)
    found = load_checkpoint(tmp_path / "line.safetensors")
    assert found is not None
    assert found.facts["step"] == 30
    peers = [torch.load(tmp_path / f"peer-{rank}.pt", weights_only=True) for rank in range(COUNT)]
    for name, value in alone.net.state_dict().items():
        assert torch.equal(peers[0][name], peers[1][name])
        torch.testing.assert_close(peers[0][name], value, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found.part("networks")[f"net.{name}"], value, atol=1e-4, rtol=1e-3)


def test_a_process_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    peers = joined()
    assert (peers.count, peers.is_first, peers.agreed(2.5)) == (1, True, 2.5)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 2.0])
    peers.share([weight])
    assert weight.grad.tolist() == [1.0, 2.0]
    assert not Peers(rank=1, count=2).is_first
