"""The training loop learns, and a run that was interrupted ends exactly like one that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.loop import STARTED_FROM, LoopRecipe, step_generator, train
from training.optimizer import MuonAdam, OptimizerRecipe, Pace, orthogonalised
from training.storage import Checkpoint, load_checkpoint, save_checkpoint, with_prefix

RECIPE = LoopRecipe(
    pace=Pace(steps=60, warmup_steps=5, decay_share=0.5),
    optimizer=OptimizerRecipe(matrix_rate=0.05, rate=0.02),
    seed=7,
    ema=0.9,
    save_every_s=1e9,
    measure_every_s=1e9,
)


class Line:
    """Learns y = tanh(3x) from points that depend on the step's generator."""

    def __init__(self, broken_at: int = -1) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
        self.networks = nn.ModuleDict({"net": net})
        self.net = net
        self.broken_at = broken_at

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        x = torch.randn(16, 4, generator=generator)
        value = (self.net(x) - torch.tanh(3 * x)).square().mean()
        return value * float("nan") if step == self.broken_at else value

    def measure(self) -> dict[str, float]:
        x = torch.linspace(-1, 1, 32).reshape(8, 4)
        return {"error": float((self.net(x) - torch.tanh(3 * x)).square().mean())}


def quiet(line: str) -> None:
    """Says nothing."""


def test_a_run_learns(tmp_path: Path) -> None:
    before = Line().measure()["error"]
    result = train(Line(), RECIPE, tmp_path / "line.safetensors", say=quiet, device="cpu")
    assert result.steps == 60
    assert result.figures["error"] < before / 4


@pytest.mark.parametrize("stop", [1, 23, 59])
def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(tmp_path: Path, stop: int) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    train(Line(), RECIPE, whole, say=quiet, device="cpu")
    train(Line(), RECIPE, broken, say=quiet, until_step=stop, device="cpu")
    train(Line(), RECIPE, broken, say=quiet, device="cpu")
    one, other = load_checkpoint(whole), load_checkpoint(broken)
    assert one is not None
    assert other is not None
    assert one.tensors.keys() == other.tensors.keys()
    for name, value in one.tensors.items():
        assert torch.equal(value, other.tensors[name]), name
    assert one.facts["figures"] == other.facts["figures"]


def test_a_finished_run_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "line.safetensors"
    train(Line(), RECIPE, path, say=quiet, device="cpu")
    again = train(Line(broken_at=60), RECIPE, path, say=quiet, device="cpu")
    assert again.steps == 60


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_state(tmp_path: Path) -> None:
    path = tmp_path / "line.safetensors"
    train(Line(), RECIPE, path, say=quiet, until_step=10, device="cpu")
    with pytest.raises(FloatingPointError, match="step 12"):
        train(Line(broken_at=12), RECIPE, path, say=quiet, device="cpu")
    kept = load_checkpoint(path)
    assert kept is not None
    assert kept.facts["step"] == 10


class Leaping(torch.optim.SGD):
    """Its steps are small but for one, whose gradient is as good as any: only the loss after it tells."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], leaps_at: int) -> None:
        super().__init__([parameter for _, parameter in named], lr=1e-3)
        self.leaps_at, self.taken = leaps_at, 0

    def scale_rates(self, factor: float) -> None:
        """Its rate never changes."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        self.taken += 1
        if self.taken == self.leaps_at:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data *= 1e30


class Counting(Line):
    """Counts, as a part of its networks, how many losses were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.networks.register_buffer("asked", torch.zeros((), dtype=torch.int64))

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        self.networks.asked += 1
        return super().loss(step, progress, generator)


def leap(path: Path, *, until_step: int | None = None, steps: int = 8, stop_at: int | None = None) -> Checkpoint:
    """A run whose fourth step leaps, and which is kept as often as can be. Returns what is kept of it."""
    recipe = replace(RECIPE, pace=Pace(steps=steps), ema=0.0, save_every_s=0.0)
    now, asked, line = iter(range(10_000)), iter(range(10_000)), Counting()
    with pytest.raises(FloatingPointError, match="4"):
        train(
            line,
            recipe,
            path,
            optimizer_of=lambda named: Leaping(named, leaps_at=4),
            say=quiet,
            until_step=until_step,
            stop=lambda: next(asked) == stop_at,
            device="cpu",
            clock=lambda: float(next(now)),
        )
    kept = load_checkpoint(path)
    assert kept is not None
    return kept


@pytest.mark.parametrize(
    "ends",
    [{}, {"until_step": 4}, {"steps": 4}, {"stop_at": 4}],
    ids=["by the next loss", "where it was to", "with the leap", "when it is told to"],
)
def test_what_is_kept_is_from_before_a_step_that_was_too_large(tmp_path: Path, ends: dict[str, int]) -> None:
    path = tmp_path / "line.safetensors"
    kept = leap(path, **ends)
    assert kept.facts["step"] == 3
    again = Counting()
    again.networks.load_state_dict(kept.part("networks"))
    assert bool(again.loss(3, 0.0, step_generator(RECIPE.seed, 3)).isfinite())
    # A smaller step leads on from there.
    result = train(again, replace(RECIPE, ema=0.0), path, optimizer_of=small_steps, say=quiet, device="cpu")
    assert result.steps == 60
    assert int(again.networks.asked) == 60  # none is counted twice


def small_steps(named: list[tuple[str, nn.Parameter]]) -> Leaping:
    return Leaping(named, leaps_at=-1)


class Infinite(Line):
    """From one step on its loss has no end, or its gradient."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__()
        self.step, self.what = step, what

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        value = super().loss(step, progress, generator)
        if step < self.step:
            return value
        return value + float("inf") if self.what == "loss" else value + (value - value.detach()).abs().sqrt()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_state_that_cannot_be_gone_on_from_is_not_kept(tmp_path: Path, what: str) -> None:
    path, now = tmp_path / "line.safetensors", iter(range(10_000))
    with pytest.raises(FloatingPointError, match=f"the {what} is not finite at step 5"):
        train(
            Infinite(5, what),
            replace(RECIPE, save_every_s=0.0),
            path,
            say=quiet,
            device="cpu",
            clock=lambda: float(next(now)),
        )
    kept = load_checkpoint(path)
    assert kept is not None
    assert kept.facts["step"] == 4


def test_a_state_that_is_kept_on_the_way_is_the_one_that_ends_like_an_unbroken_run(tmp_path: Path) -> None:
    """Killed as the next step begins to move: what was kept with that step's loss says nothing of the step."""

    class Killed(BaseException):
        """What nobody catches."""

    class Dying(MuonAdam):
        def step(self, closure: None = None) -> None:
            if self.state and float(next(iter(self.state.values())).get("steps", torch.zeros(()))) >= 7:
                raise Killed
            super().step()

    whole, broken, now = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors", iter(range(10_000))
    recipe = replace(RECIPE, save_every_s=0.0, optimizer=OptimizerRecipe(matrix_rate=0.0, rate=0.02))
    train(Counting(), recipe, whole, say=quiet, device="cpu")
    with pytest.raises(Killed):
        train(
            Counting(),
            recipe,
            broken,
            optimizer_of=lambda named: Dying(named, recipe.optimizer, lambda name: False),
            say=quiet,
            device="cpu",
            clock=lambda: float(next(now)),
        )
    kept = load_checkpoint(broken)
    assert kept is not None
    assert kept.facts["step"] == int(kept.tensors["networks.asked"]) == 7
    train(Counting(), recipe, broken, say=quiet, device="cpu")
    one, other = load_checkpoint(whole), load_checkpoint(broken)
    assert one is not None
    assert other is not None
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def test_a_cap_on_minutes_ends_a_run_at_rate_zero(tmp_path: Path) -> None:
    now = iter(range(10_000))
    recipe = LoopRecipe(
        pace=Pace(steps=1_000_000, minutes=1.0), optimizer=OptimizerRecipe(), save_every_s=1e9, measure_every_s=1e9
    )
    result = train(
        Line(), recipe, tmp_path / "line.safetensors", say=quiet, clock=lambda: float(next(now)), device="cpu"
    )
    assert 0 < result.steps < 60
    assert recipe.pace.factor(result.steps, 60.0) == 0.0


def test_the_pace_warms_up_holds_and_decays_to_zero() -> None:
    pace = Pace(steps=100, warmup_steps=10, decay_share=0.5)
    assert pace.factor(0, 0.0) == pytest.approx(0.1)
    assert pace.factor(9, 0.0) == pytest.approx(1.0)
    assert pace.factor(50, 0.0) == pytest.approx(1.0)
    assert pace.factor(75, 0.0) == pytest.approx(0.5)
    assert pace.factor(100, 0.0) == 0.0


def test_orthogonalising_makes_all_directions_alike() -> None:
    torch.manual_seed(0)
    for shape in ((8, 32), (32, 8), (16, 16)):
        matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1.5, shape[1]))
        values = torch.linalg.svdvals(orthogonalised(matrix, rounds=8).float())
        assert float(values.min()) > 0.4
        assert float(values.max()) < 1.4


def test_only_the_parameters_that_may_go_to_muon() -> None:
    named = [(name, nn.Parameter(torch.randn(4, 4))) for name in ("body.weight", "embedding.weight")]
    named.append(("body.bias", nn.Parameter(torch.randn(4))))
    optimizer = MuonAdam(named, OptimizerRecipe(), adam_only=lambda name: "embedding" in name)
    by_kind = {group["matrices"]: group for group in optimizer.param_groups if group["matrices"]}
    assert [id(p) for p in by_kind[True]["params"]] == [id(named[0][1])]
    optimizer.scale_rates(0.5)
    assert by_kind[True]["lr"] == pytest.approx(OptimizerRecipe().matrix_rate / 2)


def test_a_run_that_began_with_a_packs_weights_says_so_to_its_end(tmp_path: Path) -> None:
    path, line = tmp_path / "line.safetensors", Line()
    facts = {"step": 0, "elapsed_s": 0.0, "figures": {}, "done": False, STARTED_FROM: "0198ad98"}
    weights = line.networks.state_dict()
    save_checkpoint(path, Checkpoint(with_prefix("networks", weights) | with_prefix("average", weights), facts))
    train(Line(), RECIPE, path, say=quiet, device="cpu")
    ended = load_checkpoint(path)
    assert ended is not None
    assert ended.facts["step"] == 60
    assert ended.facts[STARTED_FROM] == "0198ad98"
