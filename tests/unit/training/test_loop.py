"""The training loop learns, and a run that was interrupted ends exactly like one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.loop import STARTED_FROM, LoopRecipe, train
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
