"""Teaches a LoRA to draw without guidance, so that a step is one row instead of two: the pack's `draft` quality.

The toon pack's solver needs four steps; what a draft can still save is the second row of each of them. So the student
is the frame model with a LoRA, and learns what the frame model answers *with* guidance (Meng et al., "On Distillation
of Guided Diffusion Models", arXiv 2210.03142, their first stage, for one guidance scale). It looks at earlier frames
with the LoRA on, because that is how it is served.

    python -m training.draft [--minutes 20] [--threads 1]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.denoiser import Example, guidance
from services.models.lora import ALPHA, BASE_DIGEST
from training.command import run_arguments, run_parser
from training.frame import FrameRecipe, FrameTrainee, frame_trainee, trained_frame
from training.loop import STARTED_FROM, LoopRecipe, RunResult, train
from training.precision import autocast, default_device, on_gpu
from training.storage import Checkpoint, load_checkpoint, save_checkpoint, training_dir, with_prefix

CHECKPOINT = "draft.safetensors"
_NAME = "draft"
_LAYERS = r".*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"  # of every attention and feed-forward


@dataclass(frozen=True, kw_only=True)
class DraftRecipe:
    """What the LoRA learns, and from what."""

    loop: LoopRecipe
    frame: FrameRecipe  # its pictures and texts
    text_guidance: float
    image_guidance: float
    steps: int  # what a draft takes: half of the rows are at exactly these noise levels
    rank: int = 16
    rows: int = 24
    held_out_rows: int = 64


class DraftTrainee:
    """A LoRA in training; the network under it stays as it is."""

    def __init__(self, base: FrameTrainee, recipe: DraftRecipe) -> None:
        self.base, self.recipe = base, recipe
        unet: Any = base.denoiser.unet
        unet.requires_grad_(False)
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=_LAYERS)
        inject_adapter_in_model(config, unet, adapter_name=_NAME)
        unet.to(default_device())
        self.layers = {name: one for name, one in unet.named_modules() if isinstance(one, LoraLayer)}
        self.networks = nn.ModuleDict(
            {
                f"{name}.{part}".replace(".", "/"): getattr(one, part)[_NAME]
                for name, one in self.layers.items()
                for part in ("lora_A", "lora_B")
            }
        )
        branches = guidance(recipe.image_guidance, recipe.text_guidance, has_references=True)
        if branches.nothing != 0.0:
            raise ValueError("a draft is taught from rows that see their references: image guidance must be 1")
        self.branches = branches
        self.levels = torch.tensor(base.denoiser.schedule.sampling_steps(recipe.steps))

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        """How far the student is from the guided answer, mean square."""
        with autocast(self.base.device):
            example, _ = self.base.story_example(self.base.corpus, self.recipe.rows, generator)
            return self._distance(example, generator).mean()

    def _distance(self, example: Example, generator: torch.Generator, *, bare: bool = False) -> Tensor:
        timesteps, noise, reference_noise = self.base.noise(generator, example.latents_BCHW)
        served = self.levels[torch.randint(len(self.levels), timesteps.shape, generator=generator)]
        often = torch.rand(timesteps.shape, generator=generator) < 0.5
        timesteps = torch.where(often, served, timesteps.cpu()).to(timesteps.device)
        wanted = self._guided(example, timesteps, noise, reference_noise)
        with self._bare() if bare else nullcontext():
            answer = self.base.denoiser.answer(
                example, timesteps_B=timesteps, noise_BCHW=noise, reference_noise_BCHW=reference_noise
            )
        return F.mse_loss(answer.float(), wanted.float(), reduction="none").mean(dim=(1, 2, 3))

    @torch.no_grad()
    def _guided(self, example: Example, timesteps_B: Tensor, noise: Tensor, reference_noise: Tensor) -> Tensor:
        """The network's own answer with guidance: with and without the text, both seeing the references."""
        nothing = self.base.states(self.base.nothing_ids_S[None]).to(example.text_BSD)
        untold = replace(example, text_BSD=nothing.expand_as(example.text_BSD))
        with self._bare():
            images, everything = (
                self.base.denoiser.answer(
                    one, timesteps_B=timesteps_B, noise_BCHW=noise, reference_noise_BCHW=reference_noise
                )
                for one in (untold, example)
            )
        return self.branches.images * images + self.branches.everything * everything

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The network without the LoRA."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    def measure(self) -> dict[str, float]:
        """The same on held-out stories, and how far the network without guidance is."""
        example, _ = self.base.story_example(
            self.base.held_out, self.recipe.held_out_rows, torch.Generator().manual_seed(0), varied=False
        )
        with autocast(self.base.device):
            student = float(self._distance(example, torch.Generator().manual_seed(1)).mean())
            unguided = float(self._distance(example, torch.Generator().manual_seed(1), bare=True).mean())
        return {"loss": student, "unguided": unguided}


def draft_trainee(recipe: DraftRecipe) -> DraftTrainee:
    """Everything ready to train. Raises FileNotFoundError when there is no trained frame model."""
    base = frame_trainee(recipe.frame)
    base.denoiser.unet.load_state_dict(trained_frame())
    return DraftTrainee(base, recipe)


def train_draft(recipe: DraftRecipe) -> RunResult:
    """Train, or continue, the LoRA; its checkpoint is `draft.safetensors` in the training folder."""
    torch.manual_seed(recipe.loop.seed)
    path, taught_by = training_dir() / CHECKPOINT, fingerprint(trained_frame())
    found = load_checkpoint(path)
    if found is not None and found.facts.get(STARTED_FROM) != taught_by:
        raise ValueError(f"{path} is about another frame model: move it away to start anew")
    trainee = draft_trainee(recipe)
    if found is None:  # the run then goes on from here, and remembers who teaches
        weights = trainee.networks.state_dict()
        facts = {"step": 0, "elapsed_s": 0.0, "figures": {}, "done": False, STARTED_FROM: taught_by}
        save_checkpoint(path, Checkpoint(with_prefix("networks", weights) | with_prefix("average", weights), facts))
    return train(trainee, recipe.loop, path)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """64 hex digits of a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def export_draft(file: Path, unet: Mapping[str, Tensor], base_digest: str, rank: int) -> None:
    """Write the trained LoRA as `services.models.lora` reads it, for the pack's UNet with these weights.

    Raises FileNotFoundError when there is none, and ValueError when it was taught by another UNet.
    """
    found = load_checkpoint(training_dir() / CHECKPOINT)
    if found is None:
        raise FileNotFoundError("no trained draft: run `python -m training.draft`")
    if found.facts.get(STARTED_FROM) != fingerprint(unet):
        raise ValueError("the trained draft is about another frame model: run `python -m training.draft` anew")
    weights = found.part("average") or found.part("networks")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name.replace("/", "."): value.half().contiguous() for name, value in weights.items()},
        str(file),
        metadata={ALPHA: str(rank), BASE_DIGEST: base_digest},
    )


def main() -> None:
    """Train the toon pack's draft LoRA."""
    from training.recipes import toon_draft

    arguments = run_arguments(run_parser(__doc__))
    result = train_draft(toon_draft(arguments.minutes, gpu=on_gpu()))
    print(f"draft: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}")


if __name__ == "__main__":
    main()
