"""Trains the pack's autoencoder: pictures to 16×16×16 latents and back.

It sees thousands of looks and gradings that no character of the cast has, so that new characters can be drawn without
training it again. First crops (many small pictures for the price of one), then whole frames. Afterwards the decoder may
go on learning alone while the frame model already trains: latents stay what they are.

    python -m training.vae [--minutes 20] [--threads 2]
    python -m training.vae --decoder
    python -m training.vae --near services/models/packs/toon    # a pack's autoencoder goes on without its frame model
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.eyes import Eyes
from services.models.pack import load_pack
from services.models.registry import load_frame_model
from services.models.toon import toon_vae as fresh_vae
from services.models.vae import Codec
from training.command import run_arguments, run_parser
from training.eyes import trained_eyes
from training.loop import LoopRecipe, RunResult, train
from training.pictures import FIGURES_SHRINK, Pixels, ShelfRecipe, shelf
from training.precision import autocast, device_of, on_gpu
from training.storage import load_checkpoint, training_dir
from training.widen import widened

NEAR_WEIGHT = 0.3
CHECKPOINT = "vae.safetensors"
DECODER_CHECKPOINT = "decoder.safetensors"
_ENCODING = ("encoder.", "quant_conv.")


@dataclass(frozen=True, kw_only=True)
class VaeRecipe:
    """What the autoencoder is trained on and for."""

    loop: LoopRecipe
    shelves: tuple[ShelfRecipe, ...]
    held_out: tuple[tuple[str, ShelfRecipe], ...]  # name of the figure, pictures
    batch: int = 4  # whole frames; crops come four times as many
    crops_share: float = 0.6  # of the run
    crop_px: int = 64
    kl_weight: float = 1e-4  # per latent value: keeps latents bounded and smooth without blurring the picture
    square_weight: float = 1.0
    absolute_weight: float = 1.0
    figure_weight: float = 1.0  # of a pixel with a figure against one without: that is where looks are told apart
    edge_weight: float = 1.0  # of the gradient loss, once the crops are over; outlines are what faces are made of
    seen_weight: float = 0.0  # of what the pack's eyes (`training.eyes`) see in the decoded frame
    read_weight: float = 0.0  # of what they read off it: see `misread`
    near_weight: float = 0.0  # keeps latents close to a pack's, so that its frame model can go on: see `--near`
    decoder_only: bool = False  # keep the encoder of a finished run as it is


def picture_batch(
    shelves: list[tuple[Pixels, Pixels]], rows: int, generator: torch.Generator, crop_px: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pictures of all shelves alike, `[rows, 3, h, w]` in −1..1, and where figures are in them, `[rows, 1, h, w]`.

    Each is cut at its own place when `crop_px` is given. A shelf comes with its figures' masks.
    """
    counts = [len(pictures) for pictures, _ in shelves]
    picks = torch.randint(sum(counts), (rows,), generator=generator).tolist()
    size = shelves[0][0].shape[1]
    room = 0 if crop_px is None else size - crop_px
    corners = torch.randint(room + 1, (rows, 2), generator=generator).tolist()
    out, masks = [], []
    for pick, (top, left) in zip(picks, corners, strict=True):
        which = 0
        while pick >= counts[which]:
            pick -= counts[which]
            which += 1
        extent = crop_px or size
        pictures, figures = shelves[which]
        window = slice(top, top + extent), slice(left, left + extent)
        out.append(pictures[pick][window])
        masks.append(figures[pick].repeat(FIGURES_SHRINK, axis=0).repeat(FIGURES_SHRINK, axis=1)[window])
    pixels = torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)
    return pixels.float().div_(127.5).sub_(1.0), torch.from_numpy(np.stack(masks))[:, None].float()


def gradients(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and lower neighbour."""
    return pixels_BCHW[..., :, 1:] - pixels_BCHW[..., :, :-1], pixels_BCHW[..., 1:, :] - pixels_BCHW[..., :-1, :]


def psnr_db(mean_square_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures in −1..1 (peak 2)."""
    return 10.0 * torch.log10(4.0 / mean_square_error.clamp_min(1e-10))


def psnr_of_pictures(vae: AutoencoderKL, pictures: Pixels, batch: int = 16) -> tuple[Pixels, list[float]]:
    """`decode(mean of encode)` of each picture, as served, and its PSNR in decibels."""
    values, decoded = [], []
    device = device_of(vae)
    with torch.no_grad():
        for first in range(0, len(pictures), batch):
            pixels = torch.from_numpy(np.array(pictures[first : first + batch])).permute(0, 3, 1, 2).float() / 127.5 - 1
            pixels = pixels.to(device)
            again = vae.decode(vae.encode(pixels, return_dict=False)[0].mean, return_dict=False)[0].clamp(-1, 1)
            values.append(psnr_db((again - pixels).square().mean(dim=(1, 2, 3))))
            decoded.append(again.add(1.0).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(decoded), [float(v) for v in torch.cat(values)]


def reconstruction_psnr_db(vae: AutoencoderKL, pictures: Pixels) -> float:
    """Mean over pictures of `psnr_of_pictures`."""
    return float(np.mean(psnr_of_pictures(vae, pictures)[1]))


def misread(eyes: Eyes, true_BCHW: Tensor, seen_BCHW: Tensor) -> Tensor:
    """How far what eyes read off pictures is from what they read off the true ones, in nats a question.

    Small things say who somebody is: the colour of a pair of glasses is a dozen pixels, and an answer of its own.
    """
    with torch.no_grad():
        wanted = eyes.read(true_BCHW)
    count_B = wanted["count"].argmax(dim=1) + 1
    said = eyes.read(seen_BCHW, count_B)
    there_BK = torch.arange(eyes.shape.figures_max, device=count_B.device) < count_B[:, None]
    parts = []
    for name, logits in said.items():
        aims = (logits.float().log_softmax(dim=-1), wanted[name].float().log_softmax(dim=-1))
        apart = F.kl_div(*aims, log_target=True, reduction="none").sum(dim=-1)
        parts.append(apart[there_BK].mean() if apart.ndim > 1 else apart.mean())
    return torch.stack(parts).mean()


class VaeTrainee:
    """An autoencoder in training."""

    def __init__(
        self,
        vae: AutoencoderKL,
        recipe: VaeRecipe,
        folder: Path | None = None,
        workers: int = 1,
        near: Codec | None = None,
    ) -> None:
        """`near` is whose latents the new ones stay close to, as far as the recipe says."""
        self.networks = nn.ModuleDict({"vae": vae})
        self.near = near
        self.eyes = trained_eyes(folder).requires_grad_(False) if recipe.seen_weight > 0 else None
        self.vae: Any = vae
        self.recipe = recipe
        self.shelves = [
            (shelf(s, workers, folder), shelf(replace(s, masks=True), workers, folder)) for s in recipe.shelves
        ]
        self.held_out = [(name, shelf(s, workers, folder)) for name, s in recipe.held_out]
        if recipe.decoder_only:
            for name, parameter in vae.named_parameters():
                parameter.requires_grad_(not name.startswith(_ENCODING))

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        recipe = self.recipe
        crops = progress < recipe.crops_share
        size = int(self.shelves[0][0].shape[1])
        rows = recipe.batch * (size // recipe.crop_px) ** 2 if crops else recipe.batch
        pixels, figures = picture_batch(self.shelves, rows, generator, recipe.crop_px if crops else None)
        device = device_of(self.networks)
        pixels = pixels.to(device)
        weight = 1.0 + (recipe.figure_weight - 1.0) * figures.to(device)
        weight = weight / weight.mean()
        with autocast(device):
            with torch.set_grad_enabled(not recipe.decoder_only):
                posterior = self.vae.encode(pixels, return_dict=False)[0]
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(device)
            again = self.vae.decode(latents, return_dict=False)[0].float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        loss = (
            recipe.square_weight * (weight * (again - pixels).square()).mean()
            + recipe.absolute_weight * (weight * (again - pixels).abs()).mean()
            + recipe.kl_weight * kl
        )
        if self.near is not None and not recipe.decoder_only:
            was = self.near.encode(pixels.cpu() * 0.5 + 0.5).to(device)
            kept = mean[:, : self.near.channels].cpu()  # channels that are new since then are free
            loss = loss + recipe.near_weight * (self.near.normalised(kept).to(device) - was).square().mean()
        if not crops and self.eyes is not None:
            eyes = self.eyes.to(device)
            true, seen = eyes.cells(pixels).detach(), eyes.cells(again)
            loss = loss + recipe.seen_weight * (seen - true).square().mean() / true.var()
            if recipe.read_weight > 0:
                loss = loss + recipe.read_weight * misread(eyes, true, seen)
        if not crops:
            edges = zip(gradients(again), gradients(pixels), strict=True)
            loss = loss + recipe.edge_weight * sum((F.l1_loss(a, b) for a, b in edges), torch.zeros((), device=device))
        out: Tensor = loss
        return out

    def measure(self) -> dict[str, float]:
        return {f"{name}_psnr_db": reconstruction_psnr_db(self.vae, pictures) for name, pictures in self.held_out}


def train_vae(recipe: VaeRecipe, workers: int = 1, near: Codec | None = None) -> RunResult:
    """Train, or continue, the autoencoder or its decoder; the checkpoint lies in the training folder.

    Raises FileNotFoundError when only the decoder is to learn and there is no finished autoencoder, and when eyes are
    to help that were not trained yet.
    """
    torch.manual_seed(recipe.loop.seed)
    vae = encoding_vae() if recipe.decoder_only else fresh_vae()
    # First and last convolutions see pixels and latents, not features.
    return train(
        VaeTrainee(vae, recipe, workers=workers, near=near),
        recipe.loop,
        training_dir() / (DECODER_CHECKPOINT if recipe.decoder_only else CHECKPOINT),
        adam_only=lambda name: any(part in name for part in ("conv_in", "conv_out", "quant_conv")),
    )


def _from_checkpoint(path: Path) -> AutoencoderKL | None:
    found = load_checkpoint(path)
    if found is None:
        return None
    vae = fresh_vae()
    known = {n.removeprefix("vae."): v for n, v in (found.part("average") or found.part("networks")).items()}
    vae.load_state_dict(widened(vae.state_dict(), known, torch.Generator().manual_seed(0)))
    vae.eval()
    return vae


def encoding_vae(folder: Path | None = None) -> AutoencoderKL:
    """The autoencoder that latents are made with (averaged weights, eval mode).

    From a run with a narrower decoder comes a wider one that computes the same. Raises FileNotFoundError.
    """
    vae = _from_checkpoint((folder or training_dir()) / CHECKPOINT)
    if vae is None:
        raise FileNotFoundError("no trained autoencoder: run `python -m training.vae`")
    return vae


def trained_vae(folder: Path | None = None) -> AutoencoderKL:
    """The same with the decoder that learned on, where there is one. Raises FileNotFoundError."""
    home = folder or training_dir()
    return _from_checkpoint(home / DECODER_CHECKPOINT) or encoding_vae(home)


def main() -> None:
    """Train the toon pack's autoencoder."""
    from training.recipes import toon_decoder, toon_vae

    parser = run_parser(__doc__)
    parser.add_argument("--decoder", action="store_true", help="let the decoder of a finished run learn on")
    parser.add_argument("--near", type=Path, help="a pack whose latents the new ones are kept close to")
    arguments = run_arguments(parser)
    recipe = (toon_decoder if arguments.decoder else toon_vae)(arguments.minutes, gpu=on_gpu())
    near = None
    if arguments.near is not None:
        recipe, near = replace(recipe, near_weight=NEAR_WEIGHT), load_frame_model(load_pack(arguments.near)).codec
        near.vae.requires_grad_(False)
    result = train_vae(recipe, near=near)
    print(f"vae: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}")


if __name__ == "__main__":
    main()
