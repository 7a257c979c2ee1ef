"""FLUX.2's pictures to latents and back: an autoencoder whose latents are taken in squares of 2×2.

A latent pixel of the transformer is four of the autoencoder's, one after another in its channels, and normalised by the
mean and deviation that the autoencoder itself keeps. Knows no file and no pack.

Shapes: pixels `[B, 3, H, W]` in 0..1; the autoencoder's latents `[B, c, 2h, 2w]`; ours `[B, 4c, h, w]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional as F

from services.models.ranges import LatentScaling
from services.models.vae import Codec

SIDE = 2  # latents of the autoencoder along each side of one of ours


class Flux2Codec(Codec):
    """The autoencoder with the ranges it is used with. A picture's latents are the mean of what it says."""

    def __init__(self, vae: Any) -> None:
        deviation = (vae.bn.running_var.double() + vae.config.batch_norm_eps).sqrt()
        scaling = LatentScaling(shift=tuple(vae.bn.running_mean.tolist()), scale=tuple((1.0 / deviation).tolist()))
        super().__init__(vae, scaling, sample_latents=False)

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return SIDE * super().factor

    @property
    def channels(self) -> int:
        """Latent channels."""
        return SIDE * SIDE * super().channels

    def normalised(self, raw_BCHW: Tensor) -> Tensor:
        """Latents as the encoder gives them, in squares, shifted and scaled."""
        return super().normalised(F.pixel_unshuffle(raw_BCHW, SIDE))

    def raw(self, latents_BCHW: Tensor) -> Tensor:
        """The opposite of `normalised`: latents as the decoder wants them."""
        return F.pixel_shuffle(super().raw(latents_BCHW), SIDE)


def build_flux2_vae(values: Mapping[str, Any]) -> Any:
    """The autoencoder of a published `config.json`, in eval mode. Raises ValueError for what is another."""
    kept = {name: value for name, value in values.items() if not name.startswith("_")}
    known = set(inspect.signature(AutoencoderKLFlux2.__init__).parameters) - {"self"}
    if unknown := sorted(set(kept) - known):
        raise ValueError(f"unknown keys in the config of the VAE: {', '.join(unknown)}")
    if tuple(kept.get("patch_size", (SIDE, SIDE))) != (SIDE, SIDE):
        raise ValueError(f"patch_size of the VAE is {kept['patch_size']!r}, this architecture's is {[SIDE, SIDE]!r}")
    vae: Any = AutoencoderKLFlux2(**kept)
    vae.eval()
    return vae
