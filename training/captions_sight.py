"""Teaches the captioner's vision tower to see before it learns to speak: the truth of a scene from its picture.

The tower of a LLaVA comes pre-trained; ours has nothing to come from, and learning to see through a language model's
loss is slow. So a few throw-away heads read the scene's labels off the tower's patches: one learned query for the
scene and one for each place from left to right. Only the tower is kept.

Shapes: B pictures, P patches, D tower width, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.toon import scene as world
from training.toon.colours import CLOTH, FUR
from training.toon.scene import MAX_ACTORS, Scene

NOBODY = 0  # class of an empty place, of no prop, of no ground prop

SCENE_LABELS: dict[str, tuple[str, ...]] = {
    "setting": world.SETTINGS,
    "time": world.TIMES,
    "weather": world.WEATHERS,
    "side": world.SIDES,
    "ground_prop": world.PROPS,
}
PLACE_LABELS: dict[str, tuple[str, ...]] = {
    "species": world.SPECIES,
    "colour": tuple(FUR),
    "accessory": world.ACCESSORIES,
    "accessory_colour": tuple(CLOTH),
    "action": world.ACTIONS,
    "mood": world.MOODS,
    "prop": world.PROPS,
}


def targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Class numbers: `scene/<label>` is [B], `place/<label>` is [B, MAX_ACTORS]; 0 stands for nothing."""
    found: dict[str, Tensor] = {}
    for label, values in SCENE_LABELS.items():
        found[f"scene/{label}"] = torch.tensor([_number(values, getattr(scene, label)) for scene in scenes])
    for label, values in PLACE_LABELS.items():
        rows = []
        for scene in scenes:
            row = [_number(values, _place(actor, label)) for actor in scene.actors]
            rows.append(row + [NOBODY] * (MAX_ACTORS - len(row)))
        found[f"place/{label}"] = torch.tensor(rows)
    return found


def _place(actor: world.Actor, label: str) -> str | None:
    value: str | None = getattr(actor, label) if hasattr(actor, label) else getattr(actor.character.look, label)
    return value


def _number(values: Sequence[str], value: str | None) -> int:
    return NOBODY if value is None else 1 + values.index(value)


class Sight(nn.Module):
    """The tower and its throw-away heads."""

    def __init__(self, tower: Any, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.queries_QD = nn.Parameter(torch.randn(1 + MAX_ACTORS, width) / width**0.5)
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, width)
        self.heads = nn.ModuleDict(
            {f"scene/{label}": nn.Linear(width, 1 + len(values)) for label, values in SCENE_LABELS.items()}
            | {f"place/{label}": nn.Linear(width, 1 + len(values)) for label, values in PLACE_LABELS.items()}
        )

    def forward(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits per label: `scene/…` [B, classes], `place/…` [B, MAX_ACTORS, classes]."""
        states = self.tower(pixel_values=pixels_BCHW, output_hidden_states=True).hidden_states[-1]
        patches_BPD = self.norm(states[:, 1:])
        keys_BPD = self.key(patches_BPD)
        weights_BQP = torch.softmax(self.queries_QD @ keys_BPD.transpose(1, 2), dim=-1)
        read_BQD = weights_BQP.to(patches_BPD.dtype) @ patches_BPD
        return {
            name: head(read_BQD[:, 0] if name.startswith("scene/") else read_BQD[:, 1:])
            for name, head in self.heads.items()
        }

    def loss(self, pixels_BCHW: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy over all labels."""
        logits = self.forward(pixels_BCHW)
        losses = [
            nn.functional.cross_entropy(logits[name].flatten(0, -2).float(), truth[name].flatten()) for name in truth
        ]
        return torch.stack(losses).mean()


def accuracy(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Share of right labels; a place counts only where somebody is."""
    found: dict[str, float] = {}
    there = truth["place/species"] != NOBODY
    for name, expected in truth.items():
        right = logits[name].argmax(-1) == expected
        found[name] = (right[there] if name.startswith("place/") else right).float().mean().item()
    return found
