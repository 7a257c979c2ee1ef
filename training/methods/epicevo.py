"""EpicEvo (Wang et al., ACM MM 2024): squared error, a discriminator's doubt, the distance to the network as it was.

The discriminator is shown frames beside another picture of somebody who is in them, and learns to tell true frames from
the network's one-step estimates of them; the network learns to be taken for true. Both move in every step, from the
same state. What is learned is the whole UNet, as published, or a LoRA. The formulas stand in `services.models.epicevo`.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from services.models.denoiser import StoryDenoiser
from services.models.epicevo import (
    Discriminator,
    EpicEvoWeights,
    clean_estimate,
    combined,
    discriminator_loss,
    distillation_loss,
    generator_loss,
    level_weights,
)
from services.models.text_encoder import NO_WORDS, Words
from training.methods.changes import EVERY_ATTENTION, LowRankChanges
from training.methods.dreambooth import whole_file
from training.methods.lora import low_rank_file
from training.methods.method import (
    EXISTING,
    TOTAL,
    Batch,
    Ground,
    Parts,
    Rates,
    Stored,
    answer_to,
    reconstruction,
    squared_errors,
)
from training.methods.words import LearnedWords


@dataclass(frozen=True, kw_only=True)
class EpicEvoRecipe:
    """The published numbers; what the paper leaves open has the value that reads it most literally."""

    weights: EpicEvoWeights = field(default_factory=EpicEvoWeights)
    learns: Literal["unet", "lora"] = "unet"
    rank: int = 16  # of the LoRA
    layers: str = EVERY_ATTENTION
    rate: float = 1e-5
    discriminator_rate: float = 1e-4
    discriminator_betas: tuple[float, float] = (0.5, 0.999)
    existing_weight: float = 1.0
    distil_on: Literal["all", "existing"] = "all"  # the teacher knows nothing of the new character
    named_share: float = 0.0  # the phrase, not a name, is what the character is called by
    word_rate: float = 0.0  # above 0 the name becomes a word, which starts as the phrase; for a LoRA
    stored: Stored = "float16"


class EpicEvo:
    """The method."""

    def __init__(self, ground: Ground, recipe: EpicEvoRecipe) -> None:
        self.ground, self.recipe = ground, recipe
        self.change: LowRankChanges | None = None
        self.teacher = ground.denoiser
        if recipe.learns == "lora":
            generator = torch.Generator().manual_seed(ground.seed)
            self.change = LowRankChanges(ground.unet, recipe.layers, recipe.rank, generator)
            learner: nn.Module = self.change
        else:
            if recipe.weights.distillation > 0.0:
                self.teacher = StoryDenoiser(copy.deepcopy(ground.unet), ground.denoiser.schedule)
            learner = ground.unet.requires_grad_(True)
        self.networks = nn.ModuleDict({recipe.learns: learner})
        self.word: LearnedWords | None = None
        if recipe.word_rate > 0.0:
            if recipe.learns != "lora":
                raise ValueError("a file of a whole UNet has no place for a word: word_rate is for a LoRA")
            self.word = self.networks["word"] = LearnedWords.of_phrases(ground.tables, ground.called)
        self.discriminator: Discriminator | None = None
        if recipe.weights.adversarial > 0.0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(ground.seed)
                self.discriminator = Discriminator(*ground.latent_shape)
            self.networks["discriminator"] = self.discriminator

    @property
    def words(self) -> Words:
        return NO_WORDS if self.word is None else self.word.words

    def rates(self, name: str) -> Rates:
        if name.startswith("word."):
            return Rates(rate=self.recipe.word_rate)
        if name.startswith("discriminator."):
            return Rates(rate=self.recipe.discriminator_rate, betas=self.recipe.discriminator_betas)
        return Rates(rate=self.recipe.rate)

    def loss(self, batch: Batch) -> Parts:
        schedule, weights = self.ground.denoiser.schedule, self.recipe.weights
        answer = answer_to(self.ground.denoiser, batch)
        errors = squared_errors(self.ground.denoiser, batch, answer)
        parts = reconstruction(errors, batch.kinds_B, self.recipe.existing_weight)
        judged = torch.zeros((), device=answer.device)
        if self.discriminator is not None and len(batch.pairs_P):
            noisy = schedule.add_noise(batch.example.latents_BCHW, batch.noise_BCHW, batch.timesteps_B)
            estimate = clean_estimate(schedule, answer.float(), noisy, batch.timesteps_B)
            parts["adversarial"], parts["discriminator"] = self._adversarial(self.discriminator, batch, estimate)
            judged = parts["discriminator"]
        if weights.distillation > 0.0:
            taught = self._taught(batch)
            rows = batch.kinds_B == EXISTING if self.recipe.distil_on == "existing" else slice(None)
            parts["distillation"] = distillation_loss(answer[rows], taught[rows])
        # One backward pass serves both: the discriminator's loss reaches its weights alone, the other never does.
        return {**parts, TOTAL: combined(parts, weights) + judged}

    def _adversarial(self, judge: Discriminator, batch: Batch, estimate_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's loss and the discriminator's."""
        exemplars, rows = batch.exemplars_PCHW, batch.pairs_P
        weights_P = level_weights(self.ground.denoiser.schedule, batch.timesteps_B[rows], self.recipe.weights)
        true, estimated = batch.example.latents_BCHW[rows], estimate_BCHW[rows]
        refused = judge(true, batch.strangers_PCHW) if self.recipe.weights.mismatch_negatives else None
        return (
            generator_loss(judge.unmoved(estimated, exemplars), weights_P),
            discriminator_loss(judge(true, exemplars), judge(estimated.detach(), exemplars), weights_P, refused),
        )

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Tensor:
        """What the network said before it learned anything."""
        with nullcontext() if self.change is None else self.change.off():
            return answer_to(self.teacher, batch)

    def payload(self) -> bytes:
        if self.change is not None:
            return low_rank_file(self.change, self.ground.base_digest, self.recipe.stored, self.words)
        return whole_file(self.ground, self.recipe.stored)
