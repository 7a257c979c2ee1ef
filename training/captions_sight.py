"""Teaches the captioner's vision tower to see before it learns to speak: the truth of a scene from its picture.

The tower of a LLaVA comes pre-trained; ours has nothing to come from, and learning to see through a language model's
loss is slow. So a throw-away `Reader` answers the world's questions from the tower's patches, of the cast and of
strangers with any look at all. Only the tower is kept.

Shapes: B pictures, P patches, D tower width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from training.questions import Reader

_HEADS = 4  # of the reader: a figure's fur and its hat lie in different patches


class Sight(nn.Module):
    """The tower and the reader of its patches."""

    def __init__(self, tower: Any, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.norm = nn.LayerNorm(width)
        self.reader = Reader(width, _HEADS)

    def forward(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits: `[B, slots, words]` per slot question, `[B, words]` per scene question."""
        states = self.tower(pixel_values=pixels_BCHW, output_hidden_states=True).hidden_states[-1]
        said: dict[str, Tensor] = self.reader(self.norm(states[:, 1:]))
        return said
