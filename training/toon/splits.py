"""The wall between the splits.

Two things are held out of "train" and "validation". Whole characters: `cast.NEW` occurs in "new" only. Combinations:
one in ten of all (character, setting, action, prop) quadruples, chosen by a stable hash, occurs in "test" only, where
every frame or story has at least one. So scores on "test" and "new" are generalisation and not recall.
"""

from __future__ import annotations

from training.toon.cast import NEW
from training.toon.scene import Actor, Scene
from training.toon.seeding import stable_number

SPLITS = ("train", "validation", "test", "new")
HELD_OUT_SHARE = 0.10
_NEW_IDS = frozenset(character.id for character in NEW)


def checked(split: str) -> str:
    """Return `split`. Raises `ValueError` when there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, not one of {', '.join(SPLITS)}")
    return split


def is_held_out(actor: Actor, setting: str) -> bool:
    """Tell whether this actor's (character, setting, action, prop) is one of those kept for "test"."""
    key = stable_number("held out", actor.character.id, setting, actor.action, actor.prop)
    return key % 10_000 < HELD_OUT_SHARE * 10_000


def belongs(scenes: tuple[Scene, ...], split: str) -> bool:
    """Tell whether a frame (one scene) or a story (five) may occur in `split`; `ValueError` for no such split."""
    checked(split)
    new = any(actor.character.id in _NEW_IDS for scene in scenes for actor in scene.actors)
    held_out = any(is_held_out(actor, scene.setting) for scene in scenes for actor in scene.actors)
    if split == "new":
        return new
    if new:
        return False
    return held_out if split == "test" else not held_out
