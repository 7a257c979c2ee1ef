"""What can go wrong with models and packs, each with a stable reason and a message that says what to do.

    ModelError
    ├── TextTooLong          a text does not fit the encoder's window
    ├── AdapterError         something is wrong with a character's weights
    │   ├── AdapterDamaged   the file cannot be read, or its numbers are not finite
    │   ├── AdapterWrongBase it was trained on another UNet
    │   └── AdapterWrongShape     it changes layers that the UNet does not have
    └── PackError            something is wrong with a pack
        ├── PackNotFound     no folder of that name on the search path
        ├── PackManifestInvalid   pack.json is missing, malformed or contradicts itself
        ├── PackFileMissing  a file the manifest lists is not there
        ├── PackFileDamaged  a file's size or digest is not the manifest's
        ├── PackFileUnsafe   a weight file is not safetensors, or a path leaves the folder
        └── PackWeightsMismatch   weights do not fit the network the manifest names

Plain exceptions: they know no transport. The services turn them into statuses.
"""

from __future__ import annotations


class ModelError(Exception):
    """Base of the tree."""

    reason = "MODEL_ERROR"


class TextTooLong(ModelError):
    """A text does not fit the text encoder's window. Shorten it."""

    reason = "TEXT_TOO_LONG"

    def __init__(self, *, token_count: int, limit: int) -> None:
        super().__init__(f"the text has {token_count} tokens and at most {limit} fit; shorten it")
        self.token_count = token_count
        self.limit = limit


class AdapterError(ModelError):
    """Something is wrong with a character's weights."""

    reason = "ADAPTER_ERROR"


class AdapterDamaged(AdapterError):
    """The file cannot be read, or its numbers are not finite. Export it again."""

    reason = "ADAPTER_DAMAGED"


class AdapterWrongBase(AdapterError):
    """The adapter was trained on another UNet. Train it on this pack."""

    reason = "ADAPTER_WRONG_BASE"


class AdapterWrongShape(AdapterError):
    """The adapter changes layers that the UNet does not have, or that have another size there."""

    reason = "ADAPTER_WRONG_SHAPE"


class PackError(ModelError):
    """Something is wrong with a pack."""

    reason = "PACK_ERROR"


class PackNotFound(PackError):
    """No pack of that name on the search path."""

    reason = "PACK_NOT_FOUND"


class PackManifestInvalid(PackError):
    """`pack.json` is missing, malformed, or contradicts itself."""

    reason = "PACK_MANIFEST_INVALID"


class PackFileMissing(PackError):
    """A file the manifest lists is not there. Fetch or build the pack again."""

    reason = "PACK_FILE_MISSING"


class PackFileDamaged(PackError):
    """A file is not the one the manifest describes. Fetch or build the pack again."""

    reason = "PACK_FILE_DAMAGED"


class PackFileUnsafe(PackError):
    """A weight file is not safetensors, or a path leaves the pack's folder. Do not load it."""

    reason = "PACK_FILE_UNSAFE"


class PackWeightsMismatch(PackError):
    """The weights do not fit the network the manifest names."""

    reason = "PACK_WEIGHTS_MISMATCH"
