"""EpicEvo's losses, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from services.models.epicevo import (
    Discriminator,
    EpicEvoWeights,
    clean_estimate,
    combined,
    discriminator_loss,
    distillation_loss,
    generator_loss,
    level_weights,
)
from services.models.schedule import Schedule, ScheduleConfig

EPSILON = Schedule(ScheduleConfig())
VELOCITY = Schedule(ScheduleConfig(prediction="v_prediction", zero_terminal_snr=True, spacing="trailing"))


@pytest.mark.parametrize(("size", "convolutions"), [(4, 1), (8, 2), (16, 3), (32, 4), (64, 4)])
def test_a_discriminator_has_four_convolutions_and_fewer_where_latents_are_small(size: int, convolutions: int) -> None:
    torch.manual_seed(0)
    judge = Discriminator(4, size, size)
    found = [layer for layer in judge.body if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in found] == [64, 128, 256, 512][:convolutions]
    assert found[0].in_channels == 8, "a frame and a reference, side by side"
    assert all((layer.kernel_size, layer.stride) == ((4, 4), (2, 2)) for layer in found)
    logits = judge(torch.randn(3, 4, size, size), torch.randn(3, 4, size, size))
    assert logits.shape == (3,)


def test_a_discriminator_takes_pictures_that_are_not_square() -> None:
    judge = Discriminator(4, 16, 24)
    assert judge(torch.randn(2, 4, 16, 24), torch.randn(2, 4, 16, 24)).shape == (2,)
    with pytest.raises(ValueError, match="too small"):
        Discriminator(4, 2, 16)


def test_a_discriminator_looks_at_both_pictures() -> None:
    torch.manual_seed(0)
    judge = Discriminator(4, 8, 8)
    frame, reference, other = (torch.randn(1, 4, 8, 8) for _ in range(3))
    answer = judge(frame, reference)
    assert not torch.equal(judge(other, reference), answer)
    assert not torch.equal(judge(frame, other), answer)


def test_what_the_generator_learns_from_does_not_move_the_discriminator() -> None:
    torch.manual_seed(0)
    judge = Discriminator(4, 8, 8)
    estimate = torch.randn(2, 4, 8, 8, requires_grad=True)
    reference = torch.randn(2, 4, 8, 8)
    logits = judge.unmoved(estimate, reference)
    torch.testing.assert_close(logits, judge(estimate, reference))
    generator_loss(logits, torch.ones(2)).backward()  # type: ignore[no-untyped-call]
    assert estimate.grad is not None
    assert float(estimate.grad.abs().sum()) > 0
    assert all(value.grad is None for value in judge.parameters())


@pytest.mark.parametrize("schedule", [EPSILON, VELOCITY])
def test_a_right_answer_gives_the_clean_latents_back(schedule: Schedule) -> None:
    clean, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    timesteps = torch.tensor([0, 300, 600, 900])
    noisy = schedule.add_noise(clean, noise, timesteps)
    right = schedule.target(clean, noise, timesteps)
    torch.testing.assert_close(clean_estimate(schedule, right, noisy, timesteps), clean, atol=1e-4, rtol=1e-4)


def test_an_estimate_by_hand() -> None:
    timesteps = torch.tensor([500])
    noisy, answer = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 0.5)
    signal, sigma = EPSILON.levels(500)
    assert float(clean_estimate(EPSILON, answer, noisy, timesteps)) == pytest.approx((2.0 - sigma * 0.5) / signal)
    signal, sigma = VELOCITY.levels(500)
    assert float(clean_estimate(VELOCITY, answer, noisy, timesteps)) == pytest.approx(signal * 2.0 - sigma * 0.5)


def test_from_pure_noise_the_estimate_is_the_answer_and_not_infinite() -> None:
    noisy, answer = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 0.5)
    assert float(clean_estimate(VELOCITY, answer, noisy, torch.tensor([999]))) == pytest.approx(-0.5)


def test_the_generators_loss_by_hand() -> None:
    logits = torch.tensor([0.0, math.log(3.0)])  # D is 1/2 and 3/4
    assert float(generator_loss(logits, torch.ones(2))) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    assert float(generator_loss(logits, torch.tensor([0.0, 0.5]))) == pytest.approx(0.5 * math.log(4 / 3) / 2)


def test_the_discriminators_loss_by_hand() -> None:
    real, estimated = torch.tensor([math.log(3.0)]), torch.tensor([math.log(1 / 3)])  # 3/4 and 1/4
    by_hand = -math.log(3 / 4) - math.log(1 - 1 / 4)
    assert float(discriminator_loss(real, estimated, torch.ones(1))) == pytest.approx(by_hand)
    mismatched = torch.tensor([0.0])  # 1/2
    by_hand = -math.log(3 / 4) - (math.log(1 - 1 / 4) + math.log(1 / 2)) / 2
    assert float(discriminator_loss(real, estimated, torch.ones(1), mismatched)) == pytest.approx(by_hand)
    assert float(discriminator_loss(real, estimated, torch.zeros(1), mismatched)) == 0.0


def test_a_hopeless_generator_still_has_a_gradient() -> None:
    logits = torch.tensor([-30.0], requires_grad=True)
    generator_loss(logits, torch.ones(1)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert float(logits.grad) == pytest.approx(-1.0), "log(1 - D) would have none here"


def test_levels_count_alike_or_by_their_signal_or_up_to_a_noise() -> None:
    timesteps = torch.tensor([0, 500, 999])
    assert level_weights(EPSILON, timesteps, EpicEvoWeights()).tolist() == [1.0, 1.0, 1.0]
    by_signal = level_weights(EPSILON, timesteps, EpicEvoWeights(levels="signal")).tolist()
    assert by_signal == pytest.approx([EPSILON.levels(t)[0] ** 2 for t in (0, 500, 999)])
    below = level_weights(EPSILON, timesteps, EpicEvoWeights(levels="below", level_max=500))
    assert below.tolist() == [1.0, 1.0, 0.0]


def test_distillation_is_the_mean_square_distance() -> None:
    student, teacher = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.0, 4.0]]]])
    assert float(distillation_loss(student, teacher)) == pytest.approx((1 + 4) / 2)


def test_all_three_together_by_hand() -> None:
    weights = EpicEvoWeights(adversarial=0.75, distillation=0.5)
    parts = {name: torch.tensor(value) for name, value in (("mse", 1.0), ("adversarial", 2.0), ("distillation", 4.0))}
    assert float(combined(parts, weights)) == pytest.approx(1.0 + 0.75 * 2.0 + 0.5 * 4.0)
    assert float(combined({"mse": parts["mse"]}, weights)) == 1.0
    with pytest.raises(ValueError, match="negative"):
        EpicEvoWeights(distillation=-0.1)
