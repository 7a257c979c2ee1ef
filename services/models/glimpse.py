"""Latents to a rough picture in no time: one convolution, fitted by least squares, for previews on the way.

The autoencoder's decoder costs most of a denoising step and a preview is looked at for a moment. Every latent with its
eight neighbours says, linearly, what its patch of pixels looks like: sharp enough to see who stands where. A pack may
bring such a map (`preview/model.safetensors`, a few dozen kilobytes); one without it decodes smaller latents instead.

Shapes: C latent channels, h and w latent size, f pixels per latent along each side.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

FILE = "preview/model.safetensors"
_AROUND = 3  # latents along each side that a patch is read from


class Glimpse:
    """The map of one pack's latents."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """`weight` is `[3·f², C, 3, 3]`, `bias` `[3·f²]`. Raises ValueError for other shapes."""
        patch_px = round((weight.shape[0] / 3) ** 0.5)
        if weight.shape[2:] != (_AROUND, _AROUND) or 3 * patch_px**2 != weight.shape[0]:
            raise ValueError(f"a map from latents to patches is [3·f², C, 3, 3], not {list(weight.shape)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{weight.shape[0]} values a patch need as many biases, not {list(bias.shape)}")
        self._weight, self._bias = weight.float(), bias.float()
        self.patch_px = patch_px

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self._weight.shape[1])

    def to(self, device: torch.device) -> Glimpse:
        """The same there."""
        return Glimpse(self._weight.to(device), self._bias.to(device))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels in 0..1, `[B, 3, h·f, w·f]`, of normalised latents."""
        patches = F.conv2d(_framed(latents_BCHW.float()), self._weight, self._bias)
        return F.pixel_shuffle(patches, self.patch_px).clamp(0.0, 1.0)

    def save(self, pack_folder: Path) -> None:
        """Write it into a pack's folder, before the pack is sealed."""
        path = pack_folder / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"weight": self._weight.half().contiguous(), "bias": self._bias.half().contiguous()}, str(path))


def fitted_glimpse(latents_NCHW: Tensor, pixels_N3HW: Tensor, patch_px: int) -> Glimpse:
    """The map that is least wrong, in squares, about pictures (0..1) and their normalised latents."""
    channels = latents_NCHW.shape[1]
    seen = F.unfold(_framed(latents_NCHW.float()), _AROUND).transpose(1, 2).flatten(0, 1)  # [N·h·w, C·9]
    seen = torch.cat([seen, torch.ones(len(seen), 1)], dim=1).double()
    wanted = F.pixel_unshuffle(pixels_N3HW, patch_px).flatten(2).transpose(1, 2).flatten(0, 1).double()
    # A thousandth of the diagonal keeps rare latents from being trusted too much.
    normal = seen.T @ seen
    normal += 1e-3 * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
    solution = torch.linalg.solve(normal, seen.T @ wanted).float()
    return Glimpse(solution[:-1].T.reshape(-1, channels, _AROUND, _AROUND), solution[-1])


def load_glimpse(path: Path) -> Glimpse:
    """Read a pack's. Raises ValueError when it is not one."""
    try:
        tensors = load_file(str(path))
        return Glimpse(tensors["weight"], tensors["bias"])
    except (OSError, KeyError, IndexError, SafetensorError) as error:
        raise ValueError(f"{path.name} is no map from latents to patches: {error}") from error


def _framed(latents_BCHW: Tensor) -> Tensor:
    """With a border that repeats the outermost latents: there is no black frame around a picture."""
    return F.pad(latents_BCHW, (1, 1, 1, 1), mode="replicate")
