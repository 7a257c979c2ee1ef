"""DreamBooth (Ruiz et al.): the whole UNet learns the character's name, and the text encoder stays.

The prior loss, off as in EpicEvo's comparison, keeps the character's kind from becoming the character: its rows are
pictures that the network itself drew of the same descriptions with "a penguin" where the name stood.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from services.models.text_encoder import NO_WORDS, Words
from training.methods.method import (
    STORED,
    TOTAL,
    Batch,
    Ground,
    Parts,
    Rates,
    Stored,
    answer_to,
    file_of,
    reconstruction,
    squared_errors,
)


@dataclass(frozen=True, kw_only=True)
class DreamBoothRecipe:
    """The published rate is 5e-6, for 400 steps, or 800 with the prior loss of weight 1."""

    rate: float = 5e-6
    existing_weight: float = 1.0
    prior_weight: float = 0.0  # 0: no prior rows are drawn or trained on
    named_share: float = 1.0  # of the new frames' descriptions: with the name alone, without the look
    stored: Stored = "float16"


class DreamBooth:
    """The method."""

    def __init__(self, ground: Ground, recipe: DreamBoothRecipe) -> None:
        self.ground, self.recipe = ground, recipe
        self.networks = nn.ModuleDict({"unet": ground.unet.requires_grad_(True)})

    @property
    def words(self) -> Words:
        return NO_WORDS

    def rates(self, name: str) -> Rates:
        return Rates(rate=self.recipe.rate)

    def loss(self, batch: Batch) -> Parts:
        answer = answer_to(self.ground.denoiser, batch)
        errors = squared_errors(self.ground.denoiser, batch, answer)
        parts = reconstruction(errors, batch.kinds_B, self.recipe.existing_weight, self.recipe.prior_weight)
        return {**parts, TOTAL: parts["mse"]}

    def payload(self) -> bytes:
        return whole_file(self.ground, self.recipe.stored)


def whole_file(ground: Ground, stored: Stored) -> bytes:
    """Every weight of the UNet, in the pack's own layout."""
    state = {name: value.to(STORED[stored]) for name, value in ground.unet.state_dict().items()}
    return file_of(state, ground.base_digest)
