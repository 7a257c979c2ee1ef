"""What can go wrong with models and packs, each with a stable reason and a message that says what to do.

    ModelError
    ├── TextTooLong          a text does not fit the encoder's window
    ├── AdapterError         something is wrong with a character's weights
    │   ├── AdapterDamaged   the file cannot be read, or its numbers are not finite
    │   ├── AdapterWrongBase it was trained on another UNet
    │   ├── AdapterWrongShape     it changes layers that the UNet does not have
    │   ├── AdapterTooLarge  there is no room for it beside the network
    │   └── AdapterNotWritable    the form of file that was asked for has no place for it
    ├── ConversionError      old weights were not made safetensors
    │   ├── WeightsUnsafe    the file asks for more than weights: it could run code
    │   ├── WeightsUnreadable     it is cut off, of another kind, or holds what safetensors cannot
    │   ├── WeightsTooLarge  reading it took more memory or time than a file of its size may
    │   └── ConversionRefused     there is nothing to convert, or its result would replace something
    └── PackError            something is wrong with a pack
        ├── PackNotFound     no folder of that name on the search path
        ├── PackManifestInvalid   pack.json is missing, malformed or contradicts itself
        ├── PackFileMissing  a file the manifest lists is not there
        ├── PackFileDamaged  a file's size or digest is not the manifest's
        ├── PackFileUnsafe   a weight file is not safetensors, or a path leaves the folder
        ├── PackWeightsMismatch   weights do not fit the network the manifest names
        ├── PackTooLarge     its weights and one frame's work do not fit the memory there is
        ├── PackUnsupported  this version cannot draw with it
        ├── PackNameTaken    another pack has that name
        ├── PackBusy         another process adds it right now
        ├── PackInUse        the settings name it
        ├── PackDiskFull     there is no room for it
        ├── PackSourceInvalid     what is to be added is no pack and no published checkpoint
        ├── PackSourceUnreadable  where it is to come from does not answer, or cannot be read
        └── PackFetchNotAllowed   it lies on the hub, and nobody said that it may be fetched

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


class AdapterTooLarge(AdapterError):
    """There is no room for the adapter beside the network. Give the stacks more, or have fewer slots."""

    reason = "ADAPTER_TOO_LARGE"


class AdapterNotWritable(AdapterError):
    """The form of file that was asked for has no place for what the adapter holds. Write it in another form."""

    reason = "ADAPTER_NOT_WRITABLE"


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


class PackTooLarge(PackError):
    """The pack's weights and the work on one frame, or on captions, do not fit the memory there is."""

    reason = "PACK_TOO_LARGE"


class PackUnsupported(PackError):
    """This version cannot draw with such a pack."""

    reason = "PACK_UNSUPPORTED"


class PackNameTaken(PackError):
    """Another pack has that name. Remove it first, or choose another name."""

    reason = "PACK_NAME_TAKEN"


class PackBusy(PackError):
    """Another process adds this pack right now. Wait for it."""

    reason = "PACK_BUSY"


class PackInUse(PackError):
    """The settings name this pack. Change them first."""

    reason = "PACK_IN_USE"


class PackDiskFull(PackError):
    """There is no room for the pack. Nothing of it is visible."""

    reason = "PACK_DISK_FULL"


class PackSourceInvalid(PackError):
    """What is to be added is neither a pack nor a published checkpoint that can become one."""

    reason = "PACK_SOURCE_INVALID"


class PackSourceUnreadable(PackError):
    """Where the pack is to come from does not answer, or cannot be read. What arrived is kept; try again."""

    reason = "PACK_SOURCE_UNREADABLE"


class PackFetchNotAllowed(PackError):
    """The pack lies on the hub, and nothing is fetched from there unless it is asked for."""

    reason = "PACK_FETCH_NOT_ALLOWED"


class ConversionError(ModelError):
    """Weights in an old format were not made safetensors."""

    reason = "CONVERSION_ERROR"


class WeightsUnsafe(ConversionError):
    """The file asks for more than weights when it is read: it could run code. It was not converted."""

    reason = "WEIGHTS_UNSAFE"


class WeightsUnreadable(ConversionError):
    """The file is cut off, no file of weights at all, or holds what safetensors cannot."""

    reason = "WEIGHTS_UNREADABLE"


class WeightsTooLarge(ConversionError):
    """Reading the file took more memory or time than a file of its size may need."""

    reason = "WEIGHTS_TOO_LARGE"


class ConversionRefused(ConversionError):
    """There is nothing to convert, or its result would replace something that is there."""

    reason = "CONVERSION_REFUSED"
