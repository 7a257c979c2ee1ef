"""What a manifest says of value ranges: of latents, reference pictures and noise levels. Costs nothing to import.

`vae` and `schedule` compute with these; whoever only reads a manifest needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

ReferenceRange = Literal["signed", "unit"]


@dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """Normalised latent = (raw − shift) · scale, per latent channel."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}  # when read from a manifest

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.shift) != len(self.scale) or not self.shift:
            raise ValueError("shift and scale need one number per latent channel")
        if any(s <= 0 for s in self.scale):
            raise ValueError("every scale must be positive")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What a pack's manifest says about its noise schedule. The defaults are Stable Diffusion 1.5's.

    Raises ValueError for combinations that cannot work.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}  # when read from a manifest

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    # Rescale so that the last training step holds no signal at all (Lin et al., arXiv 2305.08891). Without it the
    # network learns that pure noise has a known mean brightness and cannot draw very dark or very bright frames.
    zero_terminal_snr: bool = False
    # leading: 1, 26, … 976 (Stable Diffusion). trailing: 24, 49, … 999, needed when the last step must be used.
    spacing: Literal["leading", "trailing"] = "leading"
    steps_offset: int = 1  # added to every leading step
    # Where sampling ends: at a signal of exactly one, or at the level of training step 0 (Stable Diffusion).
    final_step_is_clean: bool = False

    def __post_init__(self) -> None:
        if self.train_steps < 2:
            raise ValueError("train_steps must be at least 2")
        if not 0 < self.beta_start < self.beta_end < 1:
            raise ValueError("0 < beta_start < beta_end < 1 must hold")
        if self.zero_terminal_snr and self.prediction != "v_prediction":
            raise ValueError("zero_terminal_snr needs v_prediction: noise predicted from pure noise says nothing")
        if self.zero_terminal_snr and self.spacing != "trailing":
            raise ValueError("zero_terminal_snr needs trailing spacing, else sampling starts below pure noise")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The same of a network that was trained on straight lines from picture to noise (flow matching).

    Raises ValueError for combinations that cannot work.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}  # when read from a manifest

    kind: Literal["flow"]
    train_steps: int = 1000  # what the network calls pure noise
    # How far the steps are moved towards the noisy end: by a constant, or, the larger the picture and the fewer the
    # steps, the further, by the rule that FLUX.2's authors fitted.
    shift: float = 1.0
    shift_by_size: Literal["no", "flux2"] = "no"

    def __post_init__(self) -> None:
        if self.train_steps < 2:
            raise ValueError("train_steps must be at least 2")
        if not self.shift > 0.0:
            raise ValueError("shift must be positive")
        if self.shift_by_size != "no" and self.shift != 1.0:
            raise ValueError("steps are moved by a constant or by the picture's size, not by both")


AnyScheduleConfig = ScheduleConfig | FlowConfig
