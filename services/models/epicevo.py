"""EpicEvo's losses: what makes a story model draw somebody new without forgetting who is there already.

Three are added up (Wang et al., "Evolving Storytelling", ACM MM 2024, eq. 5 to 11): the denoiser's own squared error, a
discriminator's doubt whether a frame shows the character of a reference picture, and the distance to the network as it
was before. Pure functions over tensors and one small network; the forms that the paper leaves open are arguments, with
their numbers in `EpicEvoWeights`. Knows no UNet, data, optimizer or file.

Shapes: B rows; P pairs of a frame and a reference picture of somebody in it; latents `[.., C, h, w]`, normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from services.models.schedule import Schedule

LevelWeight = Literal["uniform", "signal", "below"]
_WIDTHS = (64, 128, 256, 512)
_SMALLEST = 2  # along each side of what the linear layer reads
_NORM_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class EpicEvoWeights:
    """How much each loss counts. The paper's λ₁ and λ₂: .75 and .5 for Flintstones, .25 and .25 for Pororo.

    Raises ValueError for weights that are none.
    """

    adversarial: float = 0.25  # λ₁
    distillation: float = 0.25  # λ₂; a large one pulls the new character back to those the teacher knows
    # At high noise the one-step estimate is mush that no discriminator need be asked about. The paper takes all levels
    # alike ("uniform"); "signal" weighs by ᾱ, "below" leaves out what is noisier than `level_max`.
    levels: LevelWeight = "uniform"
    level_max: int = 999
    # A discriminator that is never shown a real frame with somebody else's picture may ignore that picture. The paper
    # does not show it one.
    mismatch_negatives: bool = False

    def __post_init__(self) -> None:
        if self.adversarial < 0.0 or self.distillation < 0.0:
            raise ValueError("the weights of EpicEvo's losses must not be negative")
        if self.level_max < 0:
            raise ValueError("level_max is a noise level, at least 0")


class Discriminator(nn.Module):
    """Does this frame show whom the reference picture shows? Both are latents, side by side as channels.

    Four convolutions that halve the picture and a linear layer to one logit. Where latents are so small that fewer make
    them 2×2, there are fewer.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        """For latents of `channels`; fresh weights from torch's global generator. Raises ValueError below 4×4."""
        super().__init__()
        if min(height, width) < 2 * _SMALLEST:
            raise ValueError(f"latents of {height}×{width} are too small to be told apart")
        layers: list[nn.Module] = []
        before = 2 * channels
        for after in _WIDTHS:
            if min(height, width) < 2 * _SMALLEST:
                break
            layers += [
                nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1),
                nn.GroupNorm(_NORM_GROUPS, after),
                nn.LeakyReLU(0.2),
            ]
            before, height, width = after, height // 2, width // 2
        self.body = nn.Sequential(*layers)
        self.logit = nn.Linear(before * height * width, 1)

    def forward(self, frames_PCHW: Tensor, references_PCHW: Tensor) -> Tensor:
        """Logits `[P]`: above zero where the frame is believed to show the reference's character."""
        seen = self.body(torch.cat([frames_PCHW, references_PCHW], dim=1))
        out: Tensor = self.logit(seen.flatten(1))[:, 0]
        return out

    def unmoved(self, frames_PCHW: Tensor, references_PCHW: Tensor) -> Tensor:
        """The same logits, without a gradient for the discriminator's own weights: what the generator learns from."""
        weights = {name: value.detach() for name, value in self.named_parameters()}
        out: Tensor = functional_call(self, weights, (frames_PCHW, references_PCHW))
        return out


def clean_estimate(schedule: Schedule, answer_BCHW: Tensor, noisy_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
    """The clean latents that one answer of the network stands for, ẑ₀ (eq. 9, read as DDIM has it)."""
    return schedule.split(answer_BCHW, noisy_BCHW, timesteps_B)[0]


def level_weights(schedule: Schedule, timesteps_P: Tensor, weights: EpicEvoWeights) -> Tensor:
    """How much the discriminator's view of each pair counts, `[P]`, at its row's noise level."""
    if weights.levels == "uniform":
        return torch.ones(timesteps_P.shape, device=timesteps_P.device)
    if weights.levels == "below":
        return (timesteps_P <= weights.level_max).float()
    signal = [schedule.levels(t)[0] ** 2 for t in timesteps_P.tolist()]
    return torch.tensor(signal, device=timesteps_P.device)


def generator_loss(logits_P: Tensor, weights_P: Tensor) -> Tensor:
    """−log D(ẑ₀, z_r), the mean over pairs (eq. 7): small where the discriminator takes the estimate for a frame."""
    return (F.softplus(-logits_P) * weights_P).mean()


def discriminator_loss(
    real_P: Tensor, estimated_P: Tensor, weights_P: Tensor, mismatched_P: Tensor | None = None
) -> Tensor:
    """−log D(z₀, z_r) − log(1 − D(ẑ₀, z_r)), the mean over pairs (eq. 8, to be made small).

    With `mismatched_P`, real frames beside somebody else's picture, those and the estimates are half of what is to be
    refused each, so that accepting and refusing go on counting alike.
    """
    refused = F.softplus(estimated_P)
    if mismatched_P is not None:
        refused = (refused + F.softplus(mismatched_P)) / 2
    return ((F.softplus(-real_P) + refused) * weights_P).mean()


def distillation_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """How far the network's answers have gone from what they were, mean square (eq. 10)."""
    return F.mse_loss(student_BCHW.float(), teacher_BCHW.float())


def combined(parts: Mapping[str, Tensor], weights: EpicEvoWeights) -> Tensor:
    """L = L_mse + λ₁·L_adv + λ₂·L_distill (eq. 11), of the parts `mse`, `adversarial` and `distillation`.

    A part that is not there counts nothing: whose weight is zero need not be computed.
    """
    total = parts["mse"]
    if "adversarial" in parts:
        total = total + weights.adversarial * parts["adversarial"]
    if "distillation" in parts:
        total = total + weights.distillation * parts["distillation"]
    return total
