"""What the methods have in common: the ground they stand on, one step's batch, and the interface.

A method owns what trains (`networks`, and nothing else moves), says what a step's loss is made of, and lays out what it
learned as the bytes that `services.models.lora.read_adapter` reads. Knows no data set, loop or file, and not whether
rows see earlier frames as references or in their texts (`backbones`).

Shapes: B rows, a story's frames one behind the other; P pairs of a row and somebody in it; latents `[.., C, h, w]`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.denoiser import Example, Network, StoryDenoiser
from services.models.lora import BASE_DIGEST
from services.models.registry import FrameModel
from services.models.text_encoder import Words
from training.backbones.backbone import Table
from training.backbones.registry import backbone_of
from training.new_story import Called

NEW, EXISTING, PRIOR = 0, 1, 2
"""Whose story a row is from: the new character's, somebody's whom the network knows, or the network's own."""
TOTAL = "total"
"""The part of a loss that is minimised; the others say what it is made of."""
Parts = dict[str, Tensor]
Stored = Literal["float16", "float32"]
STORED: Mapping[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's rows, complete: what dropout hides is hidden, and all random numbers are drawn."""

    example: Example
    timesteps_B: Tensor
    noise_BCHW: Tensor
    reference_noise_BCHW: Tensor
    kinds_B: Tensor  # NEW, EXISTING or PRIOR
    pairs_P: Tensor  # the row of each pair
    exemplars_PCHW: Tensor  # another picture of somebody who is in that row's frame
    strangers_PCHW: Tensor  # a picture of somebody who is not


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a method changes, or adds to. The networks are frozen; the UNet is this run's own copy."""

    denoiser: StoryDenoiser
    tables: tuple[Table, ...]  # of the text encoders, beside which learned words stand
    latent_shape: tuple[int, int, int]
    called: tuple[Called, ...]  # the new characters; a method that learns words learns their names
    base_digest: str
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the new characters."""
        return tuple(one.name for one in self.called)

    @property
    def unet(self) -> Network:
        """The copy."""
        return self.denoiser.unet


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast parameters move, and how Adam remembers."""

    rate: float
    betas: tuple[float, float] = (0.9, 0.999)


class Method(Protocol):
    """One way to teach a network somebody new."""

    networks: nn.ModuleDict

    @property
    def words(self) -> Words:
        """What stands in descriptions in place of the character's name, now and with its gradient; mostly nothing."""
        ...

    def rates(self, name: str) -> Rates:
        """How fast the parameter of `networks` with this name moves."""
        ...

    def loss(self, batch: Batch) -> Parts:
        """The loss of a step, `TOTAL`, and what it is made of."""
        ...

    def payload(self) -> bytes:
        """What it has learned so far, as a safetensors file."""
        ...


def ground_of(model: FrameModel, called: Sequence[Called], seed: int) -> Ground:
    """The ground for a run on a loaded pack.

    Raises ValueError for a pack whose frames do not see earlier ones: the methods here are for those.
    """
    backbone = backbone_of(model)
    unet: Any = copy.deepcopy(model.denoiser.unet).requires_grad_(False)
    # torch's fused attention is slow backwards on a CPU; the plain one computes the same.
    unet.set_attn_processor(AttnProcessor())
    height, width = (size // model.codec.factor for size in (model.manifest.height_px, model.manifest.width_px))
    return Ground(
        denoiser=StoryDenoiser(unet, model.denoiser.schedule),
        tables=backbone.tables,
        latent_shape=(model.codec.channels, height, width),
        called=tuple(called),
        base_digest=model.base_digest,
        seed=seed,
    )


def answer_to(denoiser: StoryDenoiser, batch: Batch) -> Tensor:
    """The network's answer about a batch, `[B, C, h, w]`."""
    return denoiser.answer(
        batch.example,
        timesteps_B=batch.timesteps_B,
        noise_BCHW=batch.noise_BCHW,
        reference_noise_BCHW=batch.reference_noise_BCHW,
    )


def squared_errors(denoiser: StoryDenoiser, batch: Batch, answer_BCHW: Tensor) -> Tensor:
    """Mean squared error of an answer, per row, `[B]`."""
    target = denoiser.schedule.target(batch.example.latents_BCHW, batch.noise_BCHW, batch.timesteps_B)
    return F.mse_loss(answer_BCHW.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def reconstruction(errors_B: Tensor, kinds_B: Tensor, existing_weight: float, prior_weight: float = 0.0) -> Parts:
    """`mse_new`, `mse_existing` and `mse_prior`, each the mean of its rows, and `mse`: their weighted sum (eq. 5)."""
    parts: Parts = {}
    total = torch.zeros((), device=errors_B.device)
    weights = (("mse_new", NEW, 1.0), ("mse_existing", EXISTING, existing_weight), ("mse_prior", PRIOR, prior_weight))
    for name, kind, weight in weights:
        own = errors_B[kinds_B == kind]
        if len(own):
            parts[name] = own.mean()
            total = total + weight * parts[name]
    return {**parts, "mse": total}


def file_of(tensors: Mapping[str, Tensor], base_digest: str) -> bytes:
    """A safetensors file that says which UNet its weights belong to. Equal tensors give equal bytes."""
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # One entry only: the library writes several in an order that changes with every process.
    payload: bytes = save(kept, metadata={BASE_DIGEST: base_digest})
    return payload


def parameter_names(networks: nn.ModuleDict) -> Any:
    """Names of what trains, sorted: for a card, and for whoever wants to know."""
    return sorted(name for name, value in networks.named_parameters() if value.requires_grad)
