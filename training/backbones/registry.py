"""Every backbone by its packs' architecture. Adding one adds a file and a line here; nothing else learns its name."""

from __future__ import annotations

from collections.abc import Callable

from services.models.registry import FrameModel
from training.backbones.arldm import ArldmBackbone
from training.backbones.backbone import Backbone
from training.backbones.storygen import StoryGenBackbone

BACKBONES: dict[str, Callable[[FrameModel], Backbone]] = {"arldm": ArldmBackbone, "storygen": StoryGenBackbone}


def backbone_of(model: FrameModel) -> Backbone:
    """The backbone of a loaded pack. Raises ValueError for a pack whose frames do not see earlier ones."""
    found = BACKBONES.get(model.manifest.architecture)
    if found is None:
        name, architecture = model.manifest.name, model.manifest.architecture
        raise ValueError(
            f"a character is taught to {' and '.join(sorted(BACKBONES))} packs, and {name!r} is a {architecture} pack"
        )
    return found(model)
