"""Every method by name. Adding one adds a file and a line here; nothing else learns its name."""

from __future__ import annotations

from typing import Any, NamedTuple

from training.methods.custom_diffusion import CustomDiffusion, CustomDiffusionRecipe
from training.methods.dreambooth import DreamBooth, DreamBoothRecipe
from training.methods.epicevo import EpicEvo, EpicEvoRecipe
from training.methods.lora import Lora, LoraRecipe
from training.methods.method import Ground, Method
from training.methods.textual_inversion import TextualInversion, TextualInversionRecipe

MethodRecipe = EpicEvoRecipe | DreamBoothRecipe | CustomDiffusionRecipe | TextualInversionRecipe | LoraRecipe


class Entry(NamedTuple):
    """A method and its recipe."""

    method: Any
    recipe: Any


METHODS: dict[str, Entry] = {
    "custom-diffusion": Entry(CustomDiffusion, CustomDiffusionRecipe),
    "dreambooth": Entry(DreamBooth, DreamBoothRecipe),
    "epicevo": Entry(EpicEvo, EpicEvoRecipe),
    "lora": Entry(Lora, LoraRecipe),
    "textual-inversion": Entry(TextualInversion, TextualInversionRecipe),
}


def name_of(recipe: MethodRecipe) -> str:
    """The name of the method that a recipe is for."""
    return next(name for name, entry in METHODS.items() if entry.recipe is type(recipe))


def method_of(ground: Ground, recipe: MethodRecipe) -> Method:
    """The method of a recipe, ready to train. Raises ValueError for what the ground has no place for."""
    made: Method = METHODS[name_of(recipe)].method(ground, recipe)
    return made
