"""Noise schedule and samplers, against diffusers' schedulers and against themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from torch import Tensor

from services.models import toon
from services.models.samplers import SAMPLERS, History
from services.models.schedule import CLEAN, Schedule, ScheduleConfig

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
STABLE_DIFFUSION = ScheduleConfig()
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def their_ddim(config: ScheduleConfig) -> DDIMScheduler:
    return DDIMScheduler(
        **BETAS,
        clip_sample=False,
        prediction_type=config.prediction,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing=config.spacing,
        steps_offset=config.steps_offset if config.spacing == "leading" else 0,
        set_alpha_to_one=config.final_step_is_clean,
    )


def answer(latents: Tensor, t: int) -> Tensor:
    """A stand-in for the network: smooth in the latents and different at every step."""
    return torch.tanh(latents) * (0.5 + t / 2000)


def seeded(t: int) -> Callable[[], Tensor]:
    """Noise that a sampler may ask for at a step."""
    return lambda: torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(t))


def sample(name: str, config: ScheduleConfig, start: Tensor, count: int) -> Tensor:
    schedule, latents = Schedule(config), start
    history: History | None = None
    for t in schedule.sampling_steps(count):
        t_next = schedule.step_after(t, count)
        latents, history = SAMPLERS[name](schedule, answer(latents, t), latents, t, t_next, history, seeded(t))
    return latents


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, toon.SCHEDULE], ids=["stable-diffusion", "toon"])
@pytest.mark.parametrize("count", [1, 4, 20, 40])  # divisors of 1000: elsewhere diffusers leaves the steps it visits
def test_ddim_gives_the_numbers_of_diffusers(config: ScheduleConfig, count: int) -> None:
    theirs = their_ddim(config)
    theirs.set_timesteps(count)
    assert theirs.timesteps.tolist() == list(Schedule(config).sampling_steps(count))
    start = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = start
    for t in theirs.timesteps:
        expected = theirs.step(answer(expected, int(t)), t, expected).prev_sample
    torch.testing.assert_close(sample("ddim", config, start, count), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("count", [4, 10])
def test_dpm_solver_gives_the_numbers_of_diffusers(count: int) -> None:
    config = ScheduleConfig(final_step_is_clean=True)
    steps = Schedule(config).sampling_steps(count)
    theirs = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    theirs.set_timesteps(timesteps=list(steps))
    start = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = start
    for t in theirs.timesteps:
        expected = theirs.step(answer(expected, int(t)), t, expected).prev_sample
    torch.testing.assert_close(sample("dpm_solver_pp_2m", config, start, count), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, toon.SCHEDULE], ids=["stable-diffusion", "toon"])
def test_euler_walks_the_line_of_ddim(config: ScheduleConfig) -> None:
    start = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample("euler", config, start, 10), sample("ddim", config, start, 10), **CLOSE)


def test_lcm_gives_the_numbers_of_diffusers() -> None:
    config = ScheduleConfig(final_step_is_clean=True)
    schedule, latents = Schedule(config), torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = LCMScheduler(**BETAS, set_alpha_to_one=True)
    steps = [999, 759, 499, 259]
    theirs.set_timesteps(timesteps=steps)
    expected = latents
    for t, t_next in zip(steps, [*steps[1:], CLEAN], strict=True):
        generator = torch.Generator().manual_seed(t)
        expected = theirs.step(answer(expected, t), t, expected, generator=generator).prev_sample
        latents, _ = SAMPLERS["lcm"](schedule, answer(latents, t), latents, t, t_next, None, seeded(t))
    torch.testing.assert_close(latents, expected, **CLOSE)


def test_the_reference_takes_forty_steps_from_976_to_1() -> None:
    schedule = Schedule(STABLE_DIFFUSION)
    steps = schedule.sampling_steps(40)
    assert (steps[0], steps[1], steps[-2], steps[-1], len(steps)) == (976, 951, 26, 1, 40)
    assert schedule.step_after(976, 40) == 951
    assert schedule.step_after(1, 40) == CLEAN


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("config", [STABLE_DIFFUSION, toon.SCHEDULE], ids=["stable-diffusion", "toon"])
def test_samplers_find_the_picture_when_the_network_knows_it(name: str, config: ScheduleConfig) -> None:
    schedule = Schedule(config)
    generator = torch.Generator().manual_seed(0)
    picture, latents = torch.randn(4, 8, 8, generator=generator), torch.randn(4, 8, 8, generator=generator)
    history: History | None = None
    for t in schedule.sampling_steps(12):
        signal, sigma = schedule.levels(t)
        noise = (latents - signal * picture) / sigma
        output = schedule.target(picture, noise, torch.tensor(t))
        t_next = schedule.step_after(t, 12)
        latents, history = SAMPLERS[name](schedule, output, latents, t, t_next, history, seeded(t))
    assert history is not None
    torch.testing.assert_close(history.clean, picture, atol=1e-3, rtol=1e-3)
    if config.final_step_is_clean:
        torch.testing.assert_close(latents, picture, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, toon.SCHEDULE], ids=["stable-diffusion", "toon"])
def test_what_is_trained_is_what_is_split_again(config: ScheduleConfig) -> None:
    schedule = Schedule(config)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 1, 250, 700, 950])
    noisy = schedule.add_noise(clean, noise, t)
    found_clean, found_noise = schedule.split(schedule.target(clean, noise, t), noisy, t)
    torch.testing.assert_close(found_clean, clean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found_noise, noise, atol=1e-3, rtol=1e-3)


def test_zero_terminal_snr_ends_in_pure_noise_and_begins_there() -> None:
    schedule = Schedule(toon.SCHEDULE)
    assert schedule.levels(999) == (0.0, 1.0)
    assert schedule.log_snr(999) == -math.inf
    assert schedule.levels(0) == pytest.approx(Schedule(STABLE_DIFFUSION).levels(0))
    assert schedule.sampling_steps(20)[0] == 999
    assert Schedule(STABLE_DIFFUSION).levels(999)[0] == pytest.approx(0.0683, abs=1e-3)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_step_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        Schedule(STABLE_DIFFUSION).sampling_steps(count)


@pytest.mark.parametrize(
    "wrong",
    [
        {"zero_terminal_snr": True, "spacing": "trailing"},
        {"zero_terminal_snr": True, "prediction": "v_prediction"},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"train_steps": 1},
    ],
)
def test_contradictory_schedules_cannot_be_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        ScheduleConfig(**wrong)
