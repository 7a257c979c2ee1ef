"""Trains the pack's small CLIP: how well a picture and a text fit. Used by metrics only, never to draw.

    python -m training.clip [--minutes 4]

Shapes: B pairs of a picture and its description.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from services.models.eyes import as_input
from services.models.tokenizer import StoryTokenizer
from training.command import run_arguments, run_parser
from training.loop import LoopRecipe, RunResult, train
from training.pictures import ShelfRecipe, shelf
from training.precision import autocast, device_of, on_gpu
from training.storage import load_checkpoint, training_dir
from training.tokenizer import TOKENIZER_FOLDER

CHECKPOINT = "clip.safetensors"
TEXT_POSITIONS = 96


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    """What the CLIP is trained on."""

    loop: LoopRecipe
    pairs: ShelfRecipe
    held_out: ShelfRecipe
    batch: int = 64


def fresh_clip(tokenizer: StoryTokenizer) -> Any:
    """A CLIP with fresh weights: 128 px in 64 patches, the pack's tokenizer, a common space of 128 numbers."""
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocabulary_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_POSITIONS,
        projection_dim=128,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=128,
        patch_size=16,
        projection_dim=128,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


class ClipTrainee:
    """A CLIP in training."""

    def __init__(self, model: Any, tokenizer: StoryTokenizer, recipe: ClipRecipe, folder: Path | None = None) -> None:
        self.model = model
        self.networks = nn.ModuleDict({"clip": model})
        self.recipe = recipe
        self.pictures = shelf(recipe.pairs, folder=folder)
        self.held_out = shelf(recipe.held_out, folder=folder)
        self.tokens = self._tokens(tokenizer, recipe.pairs)
        self.held_out_tokens = self._tokens(tokenizer, recipe.held_out)

    @staticmethod
    def _tokens(tokenizer: StoryTokenizer, recipe: ShelfRecipe) -> tuple[Tensor, Tensor]:
        padded = tokenizer.pad([frame.description for frame in recipe.frames(recipe.seeds)], TEXT_POSITIONS)
        return torch.from_numpy(padded.ids_BN), torch.from_numpy(padded.mask_BN).long()

    def _logits(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        device = device_of(self.networks)
        out = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), pixel_values=pixels.to(device))
        logits: Tensor = out.logits_per_image.float()
        return logits

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.pictures), (self.recipe.batch,), generator=generator)
        ids, mask = self.tokens
        with autocast(device_of(self.networks)):
            logits = self._logits(as_input(self.pictures[rows.numpy()]), ids[rows], mask[rows])
        wanted = torch.arange(len(rows), device=logits.device)
        return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2

    def measure(self) -> dict[str, float]:
        """Share of held-out pictures whose own description, out of 100, fits best."""
        ids, mask = self.held_out_tokens
        logits = self._logits(as_input(np.asarray(self.held_out[:100])), ids[:100], mask[:100])
        return {"own_text_of_100": float((logits.argmax(dim=1).cpu() == torch.arange(len(logits))).float().mean())}


def train_clip(recipe: ClipRecipe) -> tuple[Any, RunResult]:
    """Train, or continue, the CLIP; its checkpoint is `clip.safetensors` in the training folder."""
    torch.manual_seed(recipe.loop.seed)
    tokenizer = StoryTokenizer.load(TOKENIZER_FOLDER)
    model = fresh_clip(tokenizer)
    result = train(
        ClipTrainee(model, tokenizer, recipe),
        recipe.loop,
        training_dir() / CHECKPOINT,
        adam_only=lambda name: "embedding" in name or "projection" in name,
    )
    return model, result


def trained_clip(path: Path | None = None) -> Any:
    """The CLIP of the training folder. Raises FileNotFoundError when there is none."""
    found = load_checkpoint(path or training_dir() / CHECKPOINT)
    if found is None:
        raise FileNotFoundError("no trained CLIP: run `python -m training.clip`")
    model = fresh_clip(StoryTokenizer.load(TOKENIZER_FOLDER))
    weights = found.part("average") or found.part("networks")
    model.load_state_dict({n.removeprefix("clip."): v for n, v in weights.items()})
    model.eval()
    return model


def export_clip(model: Any, folder: Path) -> None:
    """Write `config.json` and float16 weights as transformers' `CLIPModel.from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = "float16"
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(str(folder))
    state = {n: v.detach().half().contiguous() for n, v in model.state_dict().items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})


def main() -> None:
    """Train the toon pack's CLIP."""
    from training.recipes import toon_clip

    arguments = run_arguments(run_parser(__doc__))
    _, result = train_clip(toon_clip(arguments.minutes, gpu=on_gpu()))
    print(f"clip: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}")


if __name__ == "__main__":
    main()
