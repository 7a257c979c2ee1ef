"""What a Stable Diffusion checkpoint says of sampling, and what its authors recommend where no file says it.

For whoever makes a pack of one (`published.py`). Knows no file and no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.models.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the authors of a kind of checkpoint recommend, and no file of it says."""

    is_xl: bool
    side_px: int
    steps: int
    text_guidance: float  # 1: none, and only half the rows


FAMILIES = {
    "sd15": Family(is_xl=False, side_px=512, steps=50, text_guidance=7.5),
    "sd2": Family(is_xl=False, side_px=768, steps=50, text_guidance=7.5),
    "sd-turbo": Family(is_xl=False, side_px=512, steps=1, text_guidance=1.0),
    "sdxl": Family(is_xl=True, side_px=1024, steps=50, text_guidance=5.0),
    "sdxl-turbo": Family(is_xl=True, side_px=512, steps=1, text_guidance=1.0),
}

# PNDM has no counterpart here; DDIM walks the same noise levels.
_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverMultistepScheduler": "dpm_solver_pp_2m",
}
_ENDS_CLEAN = {"euler", "euler_ancestral", "dpm_solver_pp_2m"}  # whatever `set_alpha_to_one` says
# Without a word in the file, what the scheduler's class does.
_SPACINGS = {"ddim": "leading"}
_PLAIN: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "final_sigmas_type": "zero",
    "timestep_type": "discrete",
    "variance_type": None,
}
"""What a scheduler may say of things that our samplers do in one way only."""


def read_scheduler(values: Mapping[str, Any]) -> tuple[ScheduleConfig, str]:
    """The noise schedule and the sampler of a published `scheduler_config.json`.

    Raises ValueError for what we cannot sample as it says: rather nothing than other pictures.
    """
    name = str(values.get("_class_name"))
    if name not in _SAMPLERS:
        raise ValueError(f"no sampler for the scheduler {name!r}; known: {', '.join(sorted(_SAMPLERS))}")
    sampler = _SAMPLERS[name]
    if name == "DDIMScheduler":
        values = {"clip_sample": True, **values}
    for key, wanted in _PLAIN.items():
        if values.get(key, wanted) not in (wanted, None):
            raise ValueError(f"the scheduler's {key} is {values[key]!r}, only {wanted!r} is known here")
    if "beta_schedule" not in values:
        raise ValueError("the scheduler does not name its beta_schedule")
    spacing = values.get("timestep_spacing", _SPACINGS.get(sampler, "linspace"))
    if spacing not in ("leading", "trailing"):
        raise ValueError(f"the scheduler's timestep_spacing is {spacing!r}; known: 'leading', 'trailing'")
    is_clean = sampler in _ENDS_CLEAN or bool(values.get("set_alpha_to_one", name != "PNDMScheduler"))
    prediction = values.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"the scheduler's prediction_type is {prediction!r}; known: 'epsilon', 'v_prediction'")
    config = ScheduleConfig(
        train_steps=int(values["num_train_timesteps"]),
        beta_start=float(values["beta_start"]),
        beta_end=float(values["beta_end"]),
        prediction=prediction,
        zero_terminal_snr=bool(values.get("rescale_betas_zero_snr", False)),
        spacing=spacing,
        steps_offset=int(values.get("steps_offset", 0)),
        final_step_is_clean=is_clean,
    )
    return config, sampler
