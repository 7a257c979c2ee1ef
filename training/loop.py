"""Runs training steps to the end of a recipe, with checkpoints that a later run goes on from (on a CPU bit for bit).

Knows no model: a `Trainee` gives the loss of a batch drawn by a generator that depends on the step alone, so a resumed
run sees what an uninterrupted one would have seen.

What is kept is known to be good. A step that was too large leaves weights like any others, and only the next loss
tells: so a state is kept on the way once the loss and the gradient of the step after it are finite, and at the end when
the weights and what is measured with them are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.optimizer import MuonAdam, OptimizerRecipe, Pace
from training.peers import Peers, joined
from training.precision import default_device, device_of
from training.storage import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    with_prefix,
)

REPORT_EVERY_STEPS = 20
STARTED_FROM = "started_from"  # fact of a checkpoint: the digest of the pack whose weights a run began with


class Trainee(Protocol):
    """What is trained."""

    networks: nn.ModuleDict

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        """The scalar loss of step `step`; all randomness comes from `generator` (CPU)."""
        ...

    def measure(self) -> dict[str, float]:
        """Held-out figures, with the weights that are in `networks` now. One that is not finite says that these are no
        good, and ends a run.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LoopRecipe:
    """How long, how fast, how often to look."""

    pace: Pace
    optimizer: OptimizerRecipe
    seed: int = 0
    ema: float = 0.0  # share of the old average kept each step; 0 keeps no average
    save_every_s: float = 120.0
    measure_every_s: float = 240.0


@dataclass(frozen=True)
class RunResult:
    """How a run ended: steps and training time in all, last held-out figures (of the average if one is kept)."""

    steps: int
    elapsed_s: float
    figures: dict[str, float]


class PeersApart(Exception):
    """The processes of a run do not see the same checkpoint. They need one folder that all of them see."""


class Average:
    """Exponential moving average of the weights. Young averages follow faster, so early checkpoints are usable."""

    def __init__(self, networks: nn.Module, keep: float) -> None:
        self.keep = keep
        self.values = {name: value.detach().clone() for name, value in networks.state_dict().items()}

    @torch.no_grad()
    def follow(self, networks: nn.Module, step: int) -> None:
        keep = min(self.keep, (1 + step) / (10 + step))
        for name, value in networks.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - keep)

    def swapped_into(self, networks: nn.Module) -> dict[str, Tensor]:
        """Put the average into `networks`; returns what was there."""
        held = {name: value.detach().clone() for name, value in networks.state_dict().items()}
        networks.load_state_dict(self.values)
        return held


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The generator of one step: depends on the run's seed, the step and the process, not on what ran before.

    A trainee that divides a step into batches may draw batch `rank` from it instead, whichever process that falls to.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + step + rank * 1_000_000_007)


def train(
    trainee: Trainee,
    recipe: LoopRecipe,
    path: Path,
    *,
    adam_only: Callable[[str], bool] = lambda name: False,
    optimizer_of: Callable[[list[tuple[str, nn.Parameter]]], Any] | None = None,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    until_step: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    device: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    peers: Peers | None = None,
) -> RunResult:
    """Train from the checkpoint at `path` (or from nothing) to the end of `recipe`, or to `until_step`.

    `stop` is asked before each step and ends the run where it is; the first process decides for its peers.

    With `peers` (those this process was started with, if None) every process draws batches of its own. A trainee may
    then draw from `generator` alone, or all of them would draw the same. What the first process fails at while the
    others wait (a save, a measurement) ends these with PeerEnded. Raises PeersApart when not all of them find the same
    checkpoint.

    `optimizer_of` makes another optimizer than the recipe's, one that has `scale_rates`, of the parameters by name.
    Computes on `device` (the default one if None) and leaves the networks on the CPU.
    On return `path` holds the last state; `networks` hold the average where one is kept. Raises FloatingPointError when
    a loss, a gradient, or what was learned is not finite: the last checkpoint is then from before, and good.
    """
    peers = joined() if peers is None else peers
    networks = trainee.networks.to(device or default_device())
    named = [(name, p) for name, p in networks.named_parameters() if p.requires_grad]
    optimizer = MuonAdam(named, recipe.optimizer, adam_only) if optimizer_of is None else optimizer_of(named)
    average = Average(networks, recipe.ema) if recipe.ema > 0 else None
    step, before_s, figures = 0, 0.0, {}
    origin: dict[str, Any] = {}
    found = load_checkpoint(path)
    if found is not None:
        origin = {key: found.facts[key] for key in (STARTED_FROM,) if key in found.facts}
        networks.load_state_dict(found.part("networks"))
        restore_optimizer(optimizer, found.part("optimizer"))
        if average is not None:
            average.values = {n: v.to(device_of(networks)) for n, v in found.part("average").items()}
        step, before_s, figures = (
            int(found.facts["step"]),
            float(found.facts["elapsed_s"]),
            dict(found.facts["figures"]),
        )
        say(f"continuing at step {step}, {before_s / 60:.1f} min")
    if peers.most(float(step != int(peers.agreed(float(step))))):
        raise PeersApart(f"the processes find different checkpoints at {path}")
    start = clock()
    saved = measured = start
    saved_step = step

    def elapsed_s() -> float:
        return before_s + clock() - start

    def save(counted: dict[str, Tensor], at_s: float, done: bool) -> None:
        tensors = with_prefix("networks", networks.state_dict() | counted) | with_prefix(
            "optimizer", optimizer_tensors(optimizer)
        )
        if average is not None:
            tensors |= with_prefix("average", average.values)
        facts: dict[str, Any] = {**origin, "step": step, "elapsed_s": at_s, "figures": figures, "done": done}
        save_checkpoint(path, Checkpoint(tensors, facts))

    def look() -> dict[str, float]:
        held = average.swapped_into(networks) if average is not None else None
        networks.eval()
        with torch.no_grad():
            seen = trainee.measure()
        networks.train()
        if held is not None:
            networks.load_state_dict(held)
        say(f"step {step} {elapsed_s() / 60:.1f} min held-out " + " ".join(f"{k} {v:.4f}" for k, v in seen.items()))
        return seen

    networks.train()
    recent: list[float] = []
    last_report, last_step = clock(), step
    stopped = False
    while until_step is None or step < until_step:
        stopped = peers.agreed(float(stop())) > 0.0
        if stopped:
            break
        now_s = peers.agreed(elapsed_s())
        progress, factor = recipe.pace.progress(step, now_s), recipe.pace.factor(step, now_s)
        if progress >= 1.0:
            break
        is_due = step > saved_step and peers.agreed(float(clock() - saved > recipe.save_every_s)) > 0.0
        counted = _counted(networks) if is_due else {}
        loss = trainee.loss(step, progress, step_generator(recipe.seed, step, peers.rank))
        value = float(loss.detach())
        if peers.most(float(not math.isfinite(value))):
            raise FloatingPointError(f"the loss is not finite at step {step}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        peers.share(networks.parameters())
        norm = torch.nn.utils.clip_grad_norm_(networks.parameters(), recipe.optimizer.clip_norm)
        if not math.isfinite(float(norm)):  # of all processes: they share it
            raise FloatingPointError(f"the gradient is not finite at step {step}")
        if is_due:  # nothing has moved since the step before, and from there this one can be taken
            peers.alone(partial(save, counted, now_s, done=False))
            saved, saved_step = clock(), step
        optimizer.scale_rates(factor)
        optimizer.step()
        if average is not None:
            average.follow(networks, step)
        step += 1
        recent.append(value)
        if step % REPORT_EVERY_STEPS == 0 and peers.is_first:
            now = clock()
            rate = (step - last_step) / max(now - last_report, 1e-9)
            mean = sum(recent) / len(recent)
            say(f"step {step} {elapsed_s() / 60:.1f} min loss {mean:.5f} {rate:.2f} steps/s lr x{factor:.2f}")
            recent, last_report, last_step = [], now, step
        if peers.agreed(float(clock() - measured > recipe.measure_every_s)):
            figures = peers.alone(look) or figures
            measured = clock()
    done = (until_step is None and not stopped) or recipe.pace.progress(step, peers.agreed(elapsed_s())) >= 1.0
    figures = peers.alone(look) or figures
    if peers.most(float(not _is_finite(named, figures))):
        raise FloatingPointError(f"what was learned is not finite after step {step}")
    peers.alone(lambda: save({}, elapsed_s(), done))
    if average is not None and done:
        average.swapped_into(networks)
    networks.to("cpu").eval()
    return RunResult(step, elapsed_s(), figures)


def _counted(networks: nn.Module) -> dict[str, Tensor]:
    """What of the networks is no parameter, as it is now: asking for a loss may count something there."""
    parameters = {name for name, _ in networks.named_parameters()}
    return {name: value.clone() for name, value in networks.state_dict().items() if name not in parameters}


def _is_finite(named: list[tuple[str, nn.Parameter]], figures: dict[str, float]) -> bool:
    """Whether weights can be gone on from and used: the figures alone need not ask all of them."""
    return all(map(math.isfinite, figures.values())) and all(bool(weight.isfinite().all()) for _, weight in named)
