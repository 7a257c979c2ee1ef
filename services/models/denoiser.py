"""One story denoiser: a StoryGen UNet with its noise schedule, and what is trained.

Holds the three rules that make it StoryGen: how noisy a reference is made (`reference_level`), how much each guidance
branch of a frame counts (`guidance`), and what training drops so that those branches exist (`Dropout`). Sampling, which
lives in `drawing.py`, uses the same three.
Knows no text, picture, file, sampler or batch scheduling.

Shapes: B training rows, N reference slots (oldest first, right-aligned: the last slot is the newest frame),
S text positions, D text width; latents are normalised `[.., C, H, W]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from services.models.flux2.transformer import Flux2Network
from services.models.schedule import Schedule
from services.models.stable_diffusion.unet import StableDiffusionUNet
from services.models.storygen import References, StoryGenUNet

Network: TypeAlias = StoryGenUNet | StableDiffusionUNet | Flux2Network
"""What answers. The second kind cannot look at references: its packs take none."""

REFERENCE_LEVEL_DIVISOR = 10
"""References are shown at a tenth of the frame's own noise level, times their distance."""


def reference_level(t: float, distance: int, divisor: int = REFERENCE_LEVEL_DIVISOR) -> int:
    """The noise level of the reference `distance` frames back while the frame is at step `t`: ⌊t/10⌋·distance.

    The newest frame has distance 1, so it is always the clearest (StoryGen, auto-regressive stage).
    """
    return int(t) // divisor * distance


def reference_levels(t: Tensor, count: int) -> Tensor:
    """`[..., count]` levels for `t` of shape `[...]`, oldest reference first: distances count, …, 2, 1."""
    distances = torch.arange(count, 0, -1, device=t.device)
    return torch.div(t, REFERENCE_LEVEL_DIVISOR, rounding_mode="floor")[..., None] * distances


@dataclass(frozen=True, kw_only=True)
class Branches:
    """How much each guidance branch counts. They sum to one; a branch that counts nothing need not be computed.

    `nothing` sees blank references and no text, `images` the references only, `everything` the references and the
    description. Without references there are two: `nothing` and `everything`.
    """

    nothing: float
    images: float
    everything: float


def guidance(image_scale: float, text_scale: float, *, has_references: bool) -> Branches:
    """StoryGen's e_u + s_i·(e_img − e_u) + s_t·(e_all − e_img), gathered by branch.

    Without references e_img is e_u, which leaves plain classifier-free guidance: e_u + s_t·(e_all − e_u).
    """
    if not has_references:
        return Branches(nothing=1.0 - text_scale, images=0.0, everything=text_scale)
    return Branches(nothing=1.0 - image_scale, images=image_scale - text_scale, everything=text_scale)


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """What training hides, so that the guidance branches are all seen. Probabilities per training row."""

    text: float = 0.05  # the description becomes ""
    references: float = 0.10  # all references become blank pictures with the description ""
    # The row is trained as a first frame, with no references at all. StoryGen never does this in its second stage; a
    # network trained from nothing has no first stage to have learned it in.
    no_references: float = 0.10

    def draw(self, rows: int, generator: torch.Generator) -> Dropped:
        """Decide for `rows` rows. One uniform number per row and kind, from a CPU generator."""
        chance = torch.rand(3, rows, generator=generator)
        return Dropped(
            text_B=chance[0] < self.text,
            references_B=chance[1] < self.references,
            no_references_B=chance[2] < self.no_references,
        )


@dataclass(frozen=True)
class Dropped:
    """Which rows of a training batch lose what. CPU booleans `[B]`."""

    text_B: Tensor
    references_B: Tensor
    no_references_B: Tensor


@dataclass(frozen=True, kw_only=True)
class Unconditional:
    """What stands for "nothing": the text "" as `[S, D]`, and the latent of a blank (zero) picture as `[C, H, W]`."""

    text_SD: Tensor
    blank_CHW: Tensor


@dataclass(frozen=True, kw_only=True)
class Example:
    """A training batch, complete: nothing has been dropped and no noise added yet.

    `present_BN` is False for slots a story did not fill (always on the old side); a row may have none.
    """

    latents_BCHW: Tensor
    text_BSD: Tensor
    reference_latents_BNCHW: Tensor
    reference_text_BNSD: Tensor
    present_BN: Tensor


class StoryDenoiser:
    """A network and the schedule it was (or is being) trained with."""

    def __init__(self, unet: Network, schedule: Schedule) -> None:
        self.unet = unet
        self.schedule = schedule

    def loss(
        self,
        example: Example,
        *,
        timesteps_B: Tensor,
        noise_BCHW: Tensor,
        reference_noise_BCHW: Tensor,
        dropped: Dropped | None = None,
        unconditional: Unconditional | None = None,
        weight_B1HW: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error per row, `[B]`, of the network's answer at `timesteps_B`.

        `weight_B1HW` is what the error at each place counts; everywhere alike without it.

        All references of a row share one noise (as in sampling) at their own levels. The reference passes give no
        gradient: as in StoryGen, features are something to look at, not something to shape.
        Raises ValueError when something is to be dropped and `unconditional` is not given.
        """
        if dropped is not None:
            if unconditional is None:
                raise ValueError("dropping text or references needs `unconditional`")
            example = apply_dropout(example, dropped, unconditional)
        target = self.schedule.target(example.latents_BCHW, noise_BCHW, timesteps_B)
        answer = self.answer(
            example, timesteps_B=timesteps_B, noise_BCHW=noise_BCHW, reference_noise_BCHW=reference_noise_BCHW
        )
        error = F.mse_loss(answer.float(), target.float(), reduction="none")
        return (error if weight_B1HW is None else error * weight_B1HW).mean(dim=(1, 2, 3))

    def answer(
        self, example: Example, *, timesteps_B: Tensor, noise_BCHW: Tensor, reference_noise_BCHW: Tensor
    ) -> Tensor:
        """The network's answer, `[B, C, H, W]`, about the example with noise added. Shared noise as in `loss`."""
        noisy = self.schedule.add_noise(example.latents_BCHW, noise_BCHW, timesteps_B)
        references = self._training_references(example, timesteps_B, reference_noise_BCHW)
        return self.unet.predict(noisy, timesteps_B, example.text_BSD, references)

    def _training_references(self, example: Example, timesteps_B: Tensor, noise_BCHW: Tensor) -> References | None:
        """What the slots that are filled leave; empty ones cost nothing."""
        present_BN = example.present_BN
        if not bool(present_BN.any()):
            return None
        batch, slots = present_BN.shape
        levels_BN = reference_levels(timesteps_B, slots)
        filled = present_BN.reshape(-1).nonzero().squeeze(1)
        noise = noise_BCHW[filled // slots]
        levels_R = levels_BN.reshape(-1)[filled]
        noisy = self.schedule.add_noise(example.reference_latents_BNCHW.flatten(0, 1)[filled], noise, levels_R)
        with torch.no_grad():
            features = self.unet.features(noisy, levels_R, example.reference_text_BNSD.flatten(0, 1)[filled])
        rows = torch.zeros(batch * slots, dtype=torch.long, device=filled.device)
        rows[filled] = torch.arange(len(filled), device=filled.device)
        full = len(filled) == batch * slots
        return References(self.unet.project(features), rows.view(batch, slots), None if full else present_BN)


def apply_dropout(example: Example, dropped: Dropped, unconditional: Unconditional) -> Example:
    """The batch with dropped rows replaced by what guidance will use in their place."""
    device = example.latents_BCHW.device
    text_B, references_B, none_B = (
        mask.to(device) for mask in (dropped.text_B, dropped.references_B, dropped.no_references_B)
    )
    blank = unconditional.blank_CHW.to(example.reference_latents_BNCHW)
    nothing = unconditional.text_SD.to(example.text_BSD)
    return Example(
        latents_BCHW=example.latents_BCHW,
        text_BSD=torch.where(text_B[:, None, None], nothing, example.text_BSD),
        reference_latents_BNCHW=torch.where(
            references_B[:, None, None, None, None], blank, example.reference_latents_BNCHW
        ),
        reference_text_BNSD=torch.where(references_B[:, None, None, None], nothing, example.reference_text_BNSD),
        present_BN=example.present_BN & ~none_B[:, None],
    )
