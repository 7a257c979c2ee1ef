"""How familiar a picture is to a pack: what its autoencoder gains over merely shrinking the picture.

An autoencoder that has seen one world keeps that world's outlines and flat colours although it shrinks a picture eight
times; with anything else it does no better than a smaller picture would. So the measure is

    gain_db = PSNR(picture, decoded(encoded(picture))) - PSNR(picture, shrunk four times and enlarged again)

The first term alone does not tell the two apart: easy pictures are kept well whatever they show. With the toon pack,
128 px, 220 renders of its world have 21 to 28 dB, and 20 photographs, 50 gradients and textures and a crayon drawing
11 to 28 dB. Of the gain, the former have 2.8 to 9.2 dB, JPEG files included, and the latter at most 1.6 dB, but for one
photograph of coins, 3.2 dB. Other cartoons lie between: flat colours and outlines are what it is about.

Knows no pack, no file and no threshold: `world.World.familiar_gain_db` is that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from services.models.drawing import Pixels
from services.models.vae import Codec

SHRINK_FACTOR = 4
_LEAST_ERROR = 1e-6  # 60 dB: above that, both are perfect


@torch.inference_mode()
def gain_over_shrinking_db(codec: Codec, pixels: Pixels) -> float:
    """The gain on one picture `[H, W, 3]`, whose sides are multiples of the codec's factor. No randomness."""
    weight = next(codec.vae.parameters())
    values = torch.from_numpy(pixels.copy()).to(weight.device).permute(2, 0, 1)[None].float() / 255.0
    return psnr_db(values, codec.decode(codec.encode(values))) - psnr_db(values, _shrunk(values))


def psnr_db(first_BCHW: Tensor, second_BCHW: Tensor) -> float:
    """Peak signal to noise of pictures in 0..1, at most 60 dB."""
    error = F.mse_loss(first_BCHW.float(), second_BCHW.float()).clamp_min(_LEAST_ERROR)
    return float(-10.0 * torch.log10(error))


def _shrunk(values_BCHW: Tensor) -> Tensor:
    small = F.avg_pool2d(values_BCHW, SHRINK_FACTOR)
    return F.interpolate(small, size=values_BCHW.shape[-2:], mode="bicubic", align_corners=False).clamp(0.0, 1.0)
