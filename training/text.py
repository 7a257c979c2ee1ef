"""Trains the pack's text encoder to read descriptions, before any picture is drawn from them.

Pixels are a poor teacher of language: which of two characters jumps is worth little of a picture's error, so a network
that learns both at once draws the average pose. Here the encoder answers, slot by slot from left to right, who stands
there, looking how, doing what, and where and when all that is; descriptions cost nothing and never run out. The frame
model then learns to draw from its states, which no longer change.

    python -m training.text [--minutes 30] [--threads 1]

Shapes: B descriptions, S positions, D width; slots are the actors from left to right, and the scene comes last.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.models.text_encoder import TextEncoder
from services.models.tokenizer import StoryTokenizer
from services.models.toon import TEXT, toon_text_encoder
from training.command import run_arguments, run_parser
from training.loop import LoopRecipe, RunResult, train
from training.precision import autocast, device_of, on_gpu
from training.questions import Answers, answer_loss, answers, right
from training.storage import load_checkpoint, training_dir
from training.tokenizer import TOKENIZER_FOLDER
from training.toon.grammar import describe
from training.toon.scene import MAX_ACTORS
from training.toon.world import sample_frame

CHECKPOINT = "text.safetensors"


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """What the text encoder learns to read."""

    loop: LoopRecipe
    batch: int = 48
    first_seed: int = 1_000_000  # of the frames whose descriptions are read; no other stage draws these
    held_out_count: int = 400


class Reader(nn.Module):
    """Asks the states: a learned query per slot and one for the scene, then a linear answer per question."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(MAX_ACTORS + 1, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.answers = Answers(width, present=True)

    def forward(self, states_BSD: Tensor, padding_BS: Tensor) -> dict[str, Tensor]:
        """Logits: `[B, slots, words]` per slot question, `[B, words]` per scene question."""
        query = self.query[None].expand(len(states_BSD), -1, -1)
        read, _ = self.attention(query, states_BSD, states_BSD, key_padding_mask=padding_BS, need_weights=False)
        read = self.norm(read)
        said: dict[str, Tensor] = self.answers(read[:, :MAX_ACTORS], read[:, MAX_ACTORS])
        return said


class TextTrainee:
    """A text encoder learning to read."""

    def __init__(self, text: TextEncoder, recipe: TextRecipe) -> None:
        self.text = text
        self.recipe = recipe
        model: Any = text.model
        model.set_attn_implementation("eager")  # torch's fused attention is slow backwards on a CPU
        self.reader = Reader(TEXT.width, TEXT.heads)
        self.networks = nn.ModuleDict({"text": text.model, "reader": self.reader})
        frames = [sample_frame(seed, split="test") for seed in range(recipe.held_out_count)]
        self.held_out = [(f.scene, f.description) for f in frames]

    def _logits(self, texts: list[str]) -> dict[str, Tensor]:
        ids = self.text.token_ids(texts)
        padding = ids == self.text.tokenizer.pad_id
        longest = int((~padding).sum(dim=1).max())
        ids, padding = ids[:, :longest], padding[:, :longest]
        device = device_of(self.networks)
        with autocast(device):
            logits: dict[str, Tensor] = self.reader(self.text.states(ids), padding.to(device))
        return logits

    def loss(self, step: int, progress: float, generator: torch.Generator) -> Tensor:
        first = self.recipe.first_seed + step * self.recipe.batch
        scenes = [sample_frame(seed).scene for seed in range(first, first + self.recipe.batch)]
        logits = self._logits([describe(s, random.Random(first + row)) for row, s in enumerate(scenes)])
        return answer_loss(logits, answers(scenes))

    def measure(self) -> dict[str, float]:
        """Share of right answers on held-out combinations; `whole`: of descriptions read without any mistake."""
        hits: dict[str, list[Tensor]] = {"whole": []}
        for first in range(0, len(self.held_out), 100):
            part = self.held_out[first : first + 100]
            told, faultless = right(self._logits([text for _, text in part]), answers([scene for scene, _ in part]))
            hits["whole"].append(faultless.float())
            for name, hit in told.items():
                hits.setdefault(name, []).append(hit)
        return {name: float(torch.cat(values).mean()) for name, values in hits.items()}


def fresh_text() -> TextEncoder:
    """The pack's text encoder with fresh weights and the pack's tokenizer."""
    tokenizer = StoryTokenizer.load(TOKENIZER_FOLDER)
    model = toon_text_encoder(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    return TextEncoder(model, tokenizer, bidirectional=TEXT.bidirectional)


def train_text(recipe: TextRecipe) -> RunResult:
    """Train, or continue, the text encoder; its checkpoint is `text.safetensors` in the training folder."""
    torch.manual_seed(recipe.loop.seed)
    trainee = TextTrainee(fresh_text(), recipe)
    return train(
        trainee,
        recipe.loop,
        training_dir() / CHECKPOINT,
        adam_only=lambda name: "embedding" in name or "heads" in name or name.endswith("query"),
    )


def trained_text() -> TextEncoder:
    """The text encoder that learned to read (averaged weights). Raises FileNotFoundError."""
    found = load_checkpoint(training_dir() / CHECKPOINT)
    if found is None:
        raise FileNotFoundError("no trained text encoder: run `python -m training.text`")
    text = fresh_text()
    weights = found.part("average") or found.part("networks")
    text.model.load_state_dict({n.removeprefix("text."): v for n, v in weights.items() if n.startswith("text.")})
    text.model.eval()
    return text


def main() -> None:
    """Train the toon pack's text encoder."""
    from training.recipes import toon_text

    arguments = run_arguments(run_parser(__doc__))
    result = train_text(toon_text(arguments.minutes, gpu=on_gpu()))
    print(f"text: {result.steps} steps, {result.elapsed_s / 60:.1f} min, {result.figures}")


if __name__ == "__main__":
    main()
