"""Pictures to latents and back: an AutoencoderKL with the value ranges around it.

`Codec` is the one place where pixels become latents: it knows the normalisation of the latents and which value range
reference pictures have, so training and serving cannot disagree. Knows no file and no pack.

Shapes: pixels `[B, 3, H, W]` in 0..1; latents `[B, C, H/f, W/f]`, normalised to about unit variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor

from services.models.ranges import LatentScaling as LatentScaling
from services.models.ranges import ReferenceRange as ReferenceRange
from services.models.shape import config_values


@dataclass(frozen=True, kw_only=True)
class VaeShape:
    """The shape of an autoencoder, in diffusers' field names. It shrinks a picture by 2^(blocks − 1).

    `decoder_block_out_channels` is ours: a decoder of its own width, which can learn on without changing a latent.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    sample_size: int
    latent_channels: int = 4
    decoder_block_out_channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError when the decoder would give pictures of another size."""
        wide = self.decoder_block_out_channels
        if wide is not None and len(wide) != len(self.block_out_channels):
            raise ValueError(
                f"the decoder of the VAE has {len(wide)} blocks and the encoder {len(self.block_out_channels)}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VaeShape:
        """Read a `config.json`. Raises ValueError naming a key that is unknown or missing."""
        return cls(**config_values(cls, values, "VAE"))

    def to_dict(self) -> dict[str, Any]:
        """The same, for `config.json`: without what only we know where it says nothing."""
        values = asdict(self)
        if self.decoder_block_out_channels is None:
            del values["decoder_block_out_channels"]
        return values


def build_vae(shape: VaeShape) -> AutoencoderKL:
    """An autoencoder with fresh weights from torch's global generator, in eval mode."""
    depth = len(shape.block_out_channels)
    up_blocks = ("UpDecoderBlock2D",) * depth
    vae: Any = AutoencoderKL(
        **replace(shape, decoder_block_out_channels=None).to_dict(),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=up_blocks,
    )
    if shape.decoder_block_out_channels is not None:
        vae.decoder = Decoder(
            in_channels=shape.latent_channels,
            out_channels=3,
            up_block_types=up_blocks,
            block_out_channels=shape.decoder_block_out_channels,
            layers_per_block=shape.layers_per_block,
            norm_num_groups=shape.norm_num_groups,
        )
    vae.eval()
    return vae


class Codec:
    """An autoencoder with the ranges it is used with."""

    def __init__(
        self,
        vae: Any,
        scaling: LatentScaling,
        *,
        reference_range: ReferenceRange = "signed",
        sample_latents: bool = True,
    ) -> None:
        self.vae = vae
        self.reference_range = reference_range
        self.sample_latents = sample_latents
        weight = next(self.vae.parameters())
        self._shift = torch.tensor(scaling.shift, device=weight.device, dtype=weight.dtype)[:, None, None]
        self._scale = torch.tensor(scaling.scale, device=weight.device, dtype=weight.dtype)[:, None, None]

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.vae.config.latent_channels)

    def encode(self, pixels_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents of pictures to be *drawn* (training targets): the network sees them in −1..1.

        `noise`, standard normal in the latents' shape, draws from the posterior; without it the mean is taken.
        """
        return self._encode(pixels_BCHW * 2.0 - 1.0, noise)

    def normalised(self, raw_BCHW: Tensor) -> Tensor:
        """Latents as the encoder gives them, shifted and scaled."""
        out: Tensor = (raw_BCHW - self._shift) * self._scale
        return out.float()

    def raw(self, latents_BCHW: Tensor) -> Tensor:
        """The opposite of `normalised`: latents as the decoder wants them."""
        return latents_BCHW.to(self._scale.dtype) / self._scale + self._shift

    def encode_references(self, pixels_BCHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents of pictures to *look at*.

        Published StoryGen weights were trained with references in 0..1 while targets are in −1..1 (`unit`).
        """
        return self._encode(pixels_BCHW if self.reference_range == "unit" else pixels_BCHW * 2.0 - 1.0, noise)

    @property
    def blank_value(self) -> float:
        """Of every pixel of a picture to look at, 0..1, that is zero after the value range is applied."""
        return 0.0 if self.reference_range == "unit" else 0.5

    def encode_blank(self, height_px: int, width_px: int, noise: Tensor | None = None) -> Tensor:
        """`[1, C, h, w]`: the picture that stands for "no picture": zero *after* the value range is applied."""
        blank = torch.zeros(1, 3, height_px, width_px, device=self._shift.device, dtype=self._shift.dtype)
        return self._encode(blank, noise)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels in 0..1."""
        pixels: Tensor = self.vae.decode(self.raw(latents_BCHW), return_dict=False)[0]
        return (pixels.float() * 0.5 + 0.5).clamp(0.0, 1.0)

    def _encode(self, values_BCHW: Tensor, noise: Tensor | None) -> Tensor:
        posterior = self.vae.encode(values_BCHW.to(self._shift.dtype), return_dict=False)[0]
        raw = posterior.mean
        if noise is not None and self.sample_latents:
            raw = raw + posterior.std * noise.to(raw)
        return self.normalised(raw)
