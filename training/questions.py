"""The questions that a scene answers: of each actor from left to right, and of the whole scene.

The text encoder learns to answer them from a description, the judge from a picture; both with `Answers` on top.

Shapes: B scenes, slots are actors from left to right, W width of what the answers are read from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.eyes import Answers
from training.toon.cast import MAIN
from training.toon.colours import CLOTH, FUR
from training.toon.scene import (
    ACCESSORIES,
    ACTIONS,
    MAX_ACTORS,
    MOODS,
    PROPS,
    SETTINGS,
    SIDES,
    SPECIES,
    TIMES,
    WEATHERS,
    Actor,
    Scene,
)

CAST = tuple(character.id for character in MAIN)
SOMEBODY_ELSE = "somebody else"
NO_PROP = "none"
SLOT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "who": (*CAST, SOMEBODY_ELSE),
    "species": SPECIES,
    "colour": tuple(FUR),
    "accessory": ACCESSORIES,
    "accessory_colour": tuple(CLOTH),
    "action": ACTIONS,
    "mood": MOODS,
    "prop": (*PROPS, NO_PROP),
}
SCENE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "setting": SETTINGS,
    "time": TIMES,
    "side": SIDES,
    "weather": WEATHERS,
    "ground_prop": (*PROPS, NO_PROP),
}
PRESENT = "present"  # of each slot: does anybody stand there?
EMPTY = -100  # what cross-entropy ignores: an empty slot has no species


def slot_answers(actor: Actor) -> dict[str, str]:
    """The answers to `SLOT_QUESTIONS` for somebody."""
    look = actor.character.look
    return {
        "who": actor.character.id if actor.character.id in CAST else SOMEBODY_ELSE,
        "species": look.species,
        "colour": look.colour,
        "accessory": look.accessory,
        "accessory_colour": look.accessory_colour,
        "action": actor.action,
        "mood": actor.mood,
        "prop": actor.prop or NO_PROP,
    }


def scene_answers(scene: Scene) -> dict[str, str]:
    """The answers to `SCENE_QUESTIONS`."""
    return {
        "setting": scene.setting,
        "time": scene.time,
        "side": scene.side,
        "weather": scene.weather,
        "ground_prop": scene.ground_prop or NO_PROP,
    }


def answers(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Class numbers: `[B, slots]` for slot questions (`EMPTY` where nobody stands), `[B]` for scene questions.

    `PRESENT` is 1 where somebody stands.
    """
    out: dict[str, Tensor] = {}
    said = [[slot_answers(actor) for actor in scene.actors] for scene in scenes]
    for name, words in SLOT_QUESTIONS.items():
        rows = [[words.index(slot[name]) for slot in slots] + [EMPTY] * (MAX_ACTORS - len(slots)) for slots in said]
        out[name] = torch.tensor(rows)
    for name, words in SCENE_QUESTIONS.items():
        out[name] = torch.tensor([words.index(scene_answers(scene)[name]) for scene in scenes])
    out[PRESENT] = (out["species"] != EMPTY).long()
    return out


class Reader(nn.Module):
    """Asks states: a learned query per slot and one for the scene, then a linear answer per question."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(MAX_ACTORS + 1, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.answers = Answers(width, {**SLOT_QUESTIONS, PRESENT: ("nobody", "somebody")}, SCENE_QUESTIONS)

    def forward(self, states_BSD: Tensor, padding_BS: Tensor | None = None) -> dict[str, Tensor]:
        """Logits: `[B, slots, words]` per slot question, `[B, words]` per scene question.

        `states_BSD` are a description's positions or a picture's patches; where `padding_BS` is true there is nothing.
        """
        query = self.query[None].expand(len(states_BSD), -1, -1)
        read, _ = self.attention(query, states_BSD, states_BSD, key_padding_mask=padding_BS, need_weights=False)
        read = self.norm(read)
        said: dict[str, Tensor] = self.answers(read[:, :MAX_ACTORS], read[:, MAX_ACTORS])
        return said


def answer_loss(logits: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Sum over the questions of the mean cross-entropy."""
    total = torch.zeros(())
    for name, true in wanted.items():
        said = logits[name].float()
        total = total.to(said.device) + F.cross_entropy(
            said.flatten(0, -2), true.flatten().to(said.device), ignore_index=EMPTY
        )
    return total


def right(logits: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Per question which answers are right (empty slots left out), and `[B]`: which scenes are read without mistake."""
    hits = {}
    faultless = torch.ones(len(next(iter(wanted.values()))), dtype=torch.bool)
    for name, true in wanted.items():
        hit = (logits[name].argmax(dim=-1).cpu() == true) | (true == EMPTY)
        hits[name] = hit[true != EMPTY].float()
        faultless &= hit if hit.ndim == 1 else hit.all(dim=1)
    return hits, faultless
