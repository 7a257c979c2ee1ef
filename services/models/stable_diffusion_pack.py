"""From a checkpoint folder in diffusers' layout to a pack: what is needed is linked or copied, and sealed.

    python -m services.models.stable_diffusion_pack sd-turbo CHECKPOINT packs/sd-turbo --licence NAME

Everything that the manifest says of sampling is read from the checkpoint's own scheduler and autoencoder; what no file
says (how many steps, how much guidance, which size) comes from `FAMILIES`. Fetches nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from services.models.errors import PackError, PackFileMissing, PackManifestInvalid
from services.models.pack import MANIFEST, Pack, PackSettings, Sampling, write_pack
from services.models.registry import load_frame_model
from services.models.schedule import ScheduleConfig
from services.models.vae import LatentScaling

_INDEX = "model_index.json"
_CONFIG = "config.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_DTYPES: dict[str, Literal["float16", "bfloat16", "float32"]] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


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


def seal_checkpoint(
    checkpoint: Path,
    folder: Path,
    family: str,
    *,
    name: str,
    licence: str,
    base: str = "",
    created: datetime | None = None,
) -> Pack:
    """Make `folder` a pack of the checkpoint, checked and loaded once. Weights are linked where the disk allows it.

    Raises PackManifestInvalid for a checkpoint that is none of ours, PackFileMissing for one that lacks a file (weights
    are safetensors, in one file each), PackWeightsMismatch, or FileExistsError when `folder` holds something.
    """
    settings = pack_settings(checkpoint, family, name=name, licence=licence, base=base)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    encoders = ("", "_2") if FAMILIES[family].is_xl else ("",)
    _place(checkpoint / _INDEX, folder / _INDEX)
    _place(checkpoint / _SCHEDULER, folder / _SCHEDULER)
    for network in ("unet", "vae", *(f"text_encoder{which}" for which in encoders)):
        _place(checkpoint / network / _CONFIG, folder / network / _CONFIG)
        weights = _weights(checkpoint, network)
        _place(weights, folder / network / f"{weights.name.split('.')[0]}.safetensors")
    for which in encoders:
        for file in _TOKENIZER:
            if (checkpoint / f"tokenizer{which}" / file).is_file():
                _place(checkpoint / f"tokenizer{which}" / file, folder / f"tokenizer{which}" / file)
    pack = write_pack(folder, settings, created=created)
    try:
        load_frame_model(pack, dtype=torch.float16)
    except BaseException:
        (folder / MANIFEST).unlink()  # a pack that cannot be loaded must not look sealed
        raise
    return pack


def pack_settings(checkpoint: Path, family: str, *, name: str, licence: str, base: str = "") -> PackSettings:
    """What the manifest will say. Raises PackManifestInvalid or PackFileMissing."""
    if family not in FAMILIES:
        raise PackManifestInvalid(f"no family {family!r}; known: {', '.join(sorted(FAMILIES))}")
    kind = FAMILIES[family]
    is_xl = (checkpoint / "text_encoder_2").is_dir()
    if is_xl != kind.is_xl:
        raise PackManifestInvalid(f"{checkpoint.name} has {'two text encoders' if is_xl else 'one text encoder'}")
    try:
        schedule, sampler = read_scheduler(_json(checkpoint / _SCHEDULER))
        return PackSettings(
            name=name,
            architecture="stable-diffusion-xl" if is_xl else "stable-diffusion",
            base=base or checkpoint.name,
            licence=licence,
            made_by=f"python -m services.models.stable_diffusion_pack {family}",
            width_px=kind.side_px,
            height_px=kind.side_px,
            dtype=_dtype(_weights(checkpoint, "unet")),
            max_references=0,
            reference_range="signed",
            latents=_latents(_json(checkpoint / "vae" / _CONFIG)),
            schedule=schedule,
            sampling=Sampling(
                sampler=sampler,
                default_steps=kind.steps,
                default_text_guidance=kind.text_guidance,
                default_image_guidance=1.0,
            ),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise PackManifestInvalid(f"{checkpoint.name}: {error}") from None


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


def _latents(vae: Mapping[str, Any]) -> LatentScaling:
    """Normalised latents as the UNet was trained on them: one factor, and per channel what a VAE says of itself."""
    channels, scaling = int(vae.get("latent_channels", 4)), float(vae.get("scaling_factor", 0.18215))
    mean = vae.get("latents_mean") or [0.0] * channels
    deviation = vae.get("latents_std") or [1.0] * channels
    return LatentScaling(shift=tuple(map(float, mean)), scale=tuple(scaling / float(one) for one in deviation))


def _weights(checkpoint: Path, network: str) -> Path:
    """A network's safetensors file: the full one, else the half-precision one."""
    stem = _WEIGHTS[network.removesuffix("_2")]
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (checkpoint / network / name).is_file():
            return checkpoint / network / name
    raise PackFileMissing(f"{checkpoint.name} has no {network}/{stem}.safetensors; other formats are not read")


def _dtype(weights: Path) -> Literal["float16", "bfloat16", "float32"]:
    """Of a file's first tensor."""
    try:
        with safe_open(str(weights), framework="pt") as file:
            stored = str(file.get_slice(next(iter(file.keys()))).get_dtype())
    except (SafetensorError, StopIteration) as error:
        raise ValueError(f"{weights.name} is no safetensors file with weights: {error}") from None
    if stored not in _DTYPES:
        raise ValueError(f"{weights.name} holds {stored} numbers; known: {', '.join(sorted(_DTYPES))}")
    return _DTYPES[stored]


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError:
        raise PackFileMissing(f"no {path.parent.name}/{path.name} in the checkpoint") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path.parent.name}/{path.name} is not a JSON object")
    return document


def _place(source: Path, target: Path) -> None:
    """The file at `target`: the same one where they share a disk, else a copy."""
    if not source.is_file():
        raise PackFileMissing(f"no {source.parent.name}/{source.name} in the checkpoint")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # what a download cache holds are links themselves
    except OSError:
        shutil.copyfile(source, target)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m services.models.stable_diffusion_pack")
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("checkpoint", type=Path, help="a folder with model_index.json, unet/, vae/, …")
    parser.add_argument("folder", type=Path, help="the pack's folder; its name is the pack's")
    parser.add_argument("--licence", required=True, help="an SPDX expression, or LicenseRef-…")
    parser.add_argument("--base", default="", help="what the checkpoint is called; its folder's name without it")
    given = parser.parse_args()
    try:
        pack = seal_checkpoint(
            given.checkpoint,
            given.folder,
            given.family,
            name=given.folder.name,
            licence=given.licence,
            base=given.base,
        )
    except (PackError, FileExistsError) as error:
        print(f"not sealed: {error}", file=sys.stderr)
        return 1
    print(f"{pack.name} {pack.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
