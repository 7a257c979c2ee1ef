"""The published StoryGen checkpoint as it is: its UNet among the networks of a Stable Diffusion 1.x checkpoint.

`storygen.py` has the network; here its published `config.json` is read, which says much that StoryGen's code never
varies. What says otherwise is refused: it would be another network under the same keys. Knows no sampler.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from services.models.pack import Pack
from services.models.stable_diffusion.networks import CONFIG, Networks, load_published
from services.models.storygen import StoryGenConfig, StoryGenUNet, build_storygen

_TEXT_CONFIG = f"text_encoder/{CONFIG}"


def is_published_storygen(pack: Pack) -> bool:
    """Whether the text encoder of a pack is described in its library's words instead of ours."""
    if _TEXT_CONFIG not in pack.manifest.files:
        return False
    try:
        document = json.loads(pack.path(_TEXT_CONFIG).read_bytes())
    except ValueError:  # what is no JSON has its own error where it is read in earnest
        return False
    return isinstance(document, dict) and "hidden_size" in document


def load_storygen_networks(pack: Pack, device: torch.device, dtype: torch.dtype) -> Networks:
    """The networks of a checked pack in the published layout.

    Raises ValueError for configurations that are none of StoryGen's, PackFileMissing, or PackWeightsMismatch.
    """
    return load_published(pack, device, dtype, build_published_storygen)


def build_published_storygen(values: Mapping[str, Any]) -> StoryGenUNet:
    """The network of a published `config.json`, with fresh weights.

    Raises ValueError for a key that is unknown, and for one whose value is another than StoryGen's.
    """
    kept = {name: value for name, value in values.items() if not name.startswith("_")}
    ours = {each.name for each in fields(StoryGenConfig)}
    fixed = {
        name: parameter.default
        for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
        if name != "self" and name not in ours
    }
    for name in sorted(kept.keys() - ours):
        if name not in fixed:
            raise ValueError(f"unknown keys in the config of the UNet: {name}")
        if kept[name] != fixed[name]:
            raise ValueError(f"{name} of the UNet is {kept[name]!r}, StoryGen's is {fixed[name]!r}")
    return build_storygen(StoryGenConfig.from_dict({name: kept[name] for name in kept.keys() & ours}))
