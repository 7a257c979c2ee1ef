"""Keeps the normalised latents of a shelf of pictures, so that the frame model never runs the autoencoder.

The latents' names carry a fingerprint of the encoder: another one gives another file. The scaling that makes them about
unit variance is measured here, once, and goes into the pack.

Shapes: N pictures, latents `[N, C, h, w]` float16, posterior means.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL

from services.models.vae import Codec, LatentScaling
from training.pictures import Pixels, ShelfRecipe, shelf
from training.precision import autocast
from training.storage import training_dir

Latents = npt.NDArray[np.float16]
_SCALING_PICTURES = 1024


def fingerprint(vae: AutoencoderKL) -> str:
    """Eight hex digits that change when the encoder's weights do."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        if not name.startswith(("encoder.", "quant_conv.")):
            continue
        digest.update(name.encode() + value.detach().float().numpy().tobytes())
    return digest.hexdigest()[:8]


def _pixels(pictures: Pixels) -> torch.Tensor:
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255.0


def measure_scaling(vae: Any, pictures: Pixels, batch: int = 32) -> LatentScaling:
    """Mean and spread of each latent channel over `pictures`."""
    with torch.no_grad():
        means = [
            vae.encode(_pixels(pictures[first : first + batch]) * 2 - 1, return_dict=False)[0].mean
            for first in range(0, len(pictures), batch)
        ]
    values = torch.cat(means).transpose(0, 1).flatten(1)
    return LatentScaling(
        shift=tuple(round(float(v), 5) for v in values.mean(dim=1)),
        scale=tuple(round(float(1 / v), 5) for v in values.std(dim=1)),
    )


def scaling_of(vae: AutoencoderKL, pictures: Pixels, folder: Path | None = None) -> LatentScaling:
    """The scaling of this autoencoder, measured on the first pictures and then kept."""
    path = (folder or training_dir()) / "latents" / f"scaling-{fingerprint(vae)}.json"
    if path.exists():
        raw = json.loads(path.read_text())
        return LatentScaling(shift=tuple(raw["shift"]), scale=tuple(raw["scale"]))
    scaling = measure_scaling(vae, pictures[:_SCALING_PICTURES])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"shift": scaling.shift, "scale": scaling.scale}))
    part.replace(path)
    return scaling


def latents_of(
    recipe: ShelfRecipe, vae: AutoencoderKL, codec: Codec, folder: Path | None = None, batch: int = 32
) -> Latents:
    """The normalised latents of a shelf, read from the cache or encoded now."""
    home = (folder or training_dir()) / "latents"
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"{fingerprint(vae)}-{recipe.file_name}"
    if not path.exists():
        pictures = shelf(recipe, folder=folder)
        with torch.no_grad(), autocast(torch.device("cpu")):
            chunks = [
                codec.encode(_pixels(pictures[first : first + batch])).to(torch.float16).numpy()
                for first in range(0, len(pictures), batch)
            ]
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            np.save(file, np.concatenate(chunks))
        part.replace(path)
    latents: Latents = np.load(path)
    return latents
