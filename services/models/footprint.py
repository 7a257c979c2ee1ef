"""How much memory drawing with a pack takes, told by the headers of its files before any weight is read.

An estimate from below: the weights to the byte, of the work on one frame only what certainly lies in memory together.
What does not fit by it cannot be drawn with; what fits by it may still be slow where memory is short. Knows no machine:
how much is free is an argument.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.models.errors import PackTooLarge
from services.models.flux2.published import KEEPS_REFERENCES
from services.models.flux2.text import WINDOW
from services.models.flux2.vae import SIDE
from services.models.pack import CaptionerManifest, Manifest

OVERRIDE = "FABULA_FRAME_CHECK_MEMORY=false"
WRITER_OVERRIDE = "FABULA_CAPTION_CHECK_MEMORY=false"
# What the frame service loads of a pack.
_NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "mm_encoder")
# What the caption service does: a published captioner, our own, and the adapters of either.
_WRITER = ("captioner/", "llava/", "adapters/")
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_PART = re.compile(r"[a-z_0-9]+/(diffusion_pytorch_model|model)-\d{5}-of-\d{5}\.safetensors")
_HEADER_BYTES_MAX = 100 << 20
_LEVELS_MAX = 32
_COUNT_MAX = 1 << 20  # of heads, layers or widths, in a config that is no nonsense
_RATIO_MAX = 64.0
_FLOAT32_BYTES = 4
# Widths of a transformer block's feed-forward that are in memory together: its input, both halves of the gated
# projection (4 each), and what they make (4).
_ATTENTION_WIDTHS = 13
_CONVOLUTION_WIDTHS = 3  # of a residual block: input, normalised, output
# The same of a transformer's block that attends and feeds forward side by side: its input, that normalised, the
# projection's queries, keys and values, queries and keys again once they are turned, and what attention makes of them.
_PARALLEL_WIDTHS = 8
_PARALLEL_FEEDS = 3  # of its feed-forward: both halves of the gated projection, and what they make


SealedManifest = Manifest | CaptionerManifest


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that one pack takes."""

    name: str
    weights_bytes: int  # as they are served: the UNet in its arithmetic, all else in float32
    # The largest network as it is stored: while it is loaded it lies in memory once more.
    loading_bytes: int
    working_bytes: int  # of one frame at the pack's size


def footprint(folder: Path, manifest: Manifest, *, unet_bytes: int) -> Footprint:
    """What the pack in `folder` takes with `unet_bytes` bytes a number in the UNet. Reads headers and configs only.

    A file that is damaged counts with its size: checking it is not the business of this.
    """
    weights = loading = 0
    for network in _NETWORKS:
        stored = _stored(manifest, network)
        size = sum(manifest.files[path].size_bytes for path in stored)
        # A transformer's language model is served in its arithmetic, too.
        in_float32 = network == "vae" or (network != "unet" and "transformer/config.json" not in manifest.files)
        width = _FLOAT32_BYTES if in_float32 else unet_bytes
        for path in stored:
            count = _numbers(folder / path)
            weights += manifest.files[path].size_bytes if count is None else count * width
        loading = max(loading, size)
    return Footprint(
        name=manifest.name,
        weights_bytes=weights,
        loading_bytes=loading,
        working_bytes=max(
            _drawing(folder, manifest, unet_bytes),
            _transforming(folder, manifest, unet_bytes),
            _reading(folder, manifest, unet_bytes),
            _decoding(folder, manifest),
        ),
    )


def writer_footprint(folder: Path, manifest: SealedManifest, *, number_bytes: int, cache_bytes: int) -> Footprint:
    """What the captioner of the pack in `folder` takes: its weights, and keys and values of `cache_bytes`."""
    weights = loading = 0
    for path, entry in manifest.files.items():
        if path.startswith(_WRITER) and path.endswith(".safetensors"):
            count = _numbers(folder / path, left_out="")
            weights += entry.size_bytes if count is None else count * number_bytes
            loading = max(loading, entry.size_bytes)
    return Footprint(name=manifest.name, weights_bytes=weights, loading_bytes=loading, working_bytes=cache_bytes)


def check_writer(found: Footprint, *, free_bytes: int, device: str) -> None:
    """Raises PackTooLarge when a captioner does not fit into `free_bytes` of the memory of `device`."""
    if found.weights_bytes + found.working_bytes > free_bytes:
        raise PackTooLarge(
            f"the captioner of pack {found.name!r} does not fit: its weights take {_mib(found.weights_bytes)}, keys "
            f"and values of what is being written {_mib(found.working_bytes)}, and {_mib(free_bytes)} of the "
            f"{device}'s memory are free. Free some, take a smaller captioner, or try all the same with "
            f"{WRITER_OVERRIDE}"
        )


def check_room(footprints: Sequence[Footprint], *, free_bytes: int, host_free_bytes: int | None = None) -> None:
    """Raises PackTooLarge when the packs do not fit together into `free_bytes` of the device.

    `host_free_bytes` is set where the device has a memory of its own: weights pass through the host's.
    """
    if not footprints:
        return
    weights = sum(each.weights_bytes for each in footprints)
    working = max(each.working_bytes for each in footprints)
    loading = max(each.loading_bytes for each in footprints)
    largest = max(footprints, key=lambda each: each.weights_bytes)
    beside = f" (of {', '.join(each.name for each in footprints)} together)" if len(footprints) > 1 else ""
    advice = f"Free some, name fewer or smaller packs in FABULA_FRAME_PACKS, or try all the same with {OVERRIDE}"
    if host_free_bytes is None:
        needed = weights + max(working, loading)
        if needed > free_bytes:
            raise PackTooLarge(
                f"pack {largest.name!r} does not fit: its weights take {_mib(weights)}{beside}, loading or drawing one "
                f"frame {_mib(max(working, loading))} more, and {_mib(free_bytes)} of memory are free. {advice}"
            )
        return
    if weights + working > free_bytes:
        raise PackTooLarge(
            f"pack {largest.name!r} does not fit the GPU: its weights take {_mib(weights)}{beside}, drawing one frame "
            f"{_mib(working)} more, and {_mib(free_bytes)} are free there. {advice}"
        )
    if loading > host_free_bytes:
        raise PackTooLarge(
            f"pack {largest.name!r} cannot be loaded: its largest network takes {_mib(loading)} of the machine's "
            f"memory on its way to the GPU, and {_mib(host_free_bytes)} are free. {advice}"
        )


def _stored(manifest: Manifest, network: str) -> list[str]:
    """A network's file of weights, or its parts; none where the pack has no such network."""
    plain = [f"{network}/{name}" for name in _WEIGHTS if f"{network}/{name}" in manifest.files]
    return plain[:1] or [path for path in manifest.files if _PART.fullmatch(path) and path.startswith(f"{network}/")]


def _drawing(folder: Path, manifest: Manifest, unet_bytes: int) -> int:
    """One forward of one frame: the widest level of the UNet."""
    config = _json(folder / "unet" / "config.json")
    widths, kinds = _widths(config, "block_out_channels"), config.get("down_block_types")
    if not widths or not isinstance(kinds, list) or len(kinds) != len(widths):
        return 0
    rows = 3 if manifest.max_references else 2
    pixels = _latent_pixels(folder, manifest)
    levels = (
        pixels // 4**level * width * (_ATTENTION_WIDTHS if "Attn" in str(kind) else _CONVOLUTION_WIDTHS)
        for level, (width, kind) in enumerate(zip(widths, kinds, strict=True))
    )
    return int(rows * max(levels) * unet_bytes)


def _transforming(folder: Path, manifest: Manifest, unet_bytes: int) -> int:
    """One forward of FLUX.2's transformer about a frame that sees as many earlier ones as the pack takes.

    Every block works on every token: those of the text, of the picture and, in the first kind, of the earlier frames.
    The second kind keeps of these the keys and values of all blocks, and its forward copies them for each row.
    """
    config = _json(folder / "transformer" / "config.json")
    width = _whole(config, "num_attention_heads") * _whole(config, "attention_head_dim")
    blocks = _whole(config, "num_layers") + _whole(config, "num_single_layers")
    ratio = config.get("mlp_ratio")
    if not width or not isinstance(ratio, int | float) or not 0 < ratio < _RATIO_MAX:
        return 0
    rows = _guided_rows(manifest)
    picture = _latent_pixels(folder, manifest, side=SIDE)
    earlier = manifest.max_references * picture
    kept = 0
    if manifest.architecture == KEEPS_REFERENCES:
        kept = (1 + rows) * blocks * 2 * width * earlier
        earlier = 0
    alive = _PARALLEL_WIDTHS * width + _PARALLEL_FEEDS * int(width * ratio)
    return int((rows * (WINDOW + picture + earlier) * alive + kept) * unet_bytes)


def _reading(folder: Path, manifest: Manifest, unet_bytes: int) -> int:
    """The states of all layers of FLUX.2's language model, which gives them at once: of nothing and a description."""
    if "transformer/config.json" not in manifest.files:
        return 0
    config = _json(folder / "text_encoder" / "config.json")
    states = _whole(config, "num_hidden_layers") + 1
    return 2 * states * WINDOW * _whole(config, "hidden_size") * unet_bytes


def _guided_rows(manifest: Manifest) -> int:
    """Of a forward that is drawn as the pack's author says: without guidance one, else two."""
    return 1 if manifest.sampling.default_text_guidance == 1.0 else 2


def _decoding(folder: Path, manifest: Manifest) -> int:
    """One picture through the decoder's last block, at full size and in float32."""
    config = _json(folder / "vae" / "config.json")
    widths = _widths(config, "decoder_block_out_channels") or _widths(config, "block_out_channels")
    if not widths:
        return 0
    entering = widths[1] if len(widths) > 1 else widths[0]
    return manifest.width_px * manifest.height_px * (entering + 2 * widths[0]) * _FLOAT32_BYTES


def _latent_pixels(folder: Path, manifest: Manifest, *, side: int = 1) -> int:
    """Of a picture; `side`: how many of the autoencoder's latents a latent pixel is long."""
    widths = _widths(_json(folder / "vae" / "config.json"), "block_out_channels")
    factor = side * (2 ** (len(widths) - 1) if widths else 8)
    return math.ceil(manifest.width_px / factor) * math.ceil(manifest.height_px / factor)


def _widths(config: Mapping[str, Any], key: str) -> list[int]:
    """A network's widths by level; empty where its config does not say."""
    value = config.get(key)
    if not isinstance(value, list) or len(value) > _LEVELS_MAX:
        return []
    return value if all(isinstance(each, int) and each > 0 for each in value) else []


def _whole(config: Mapping[str, Any], key: str) -> int:
    """A count; 0 where a config does not say."""
    value = config.get(key)
    return value if isinstance(value, int) and 0 < value < _COUNT_MAX else 0


def _numbers(path: Path, *, left_out: str = "lm_head.") -> int | None:
    """How many numbers of a safetensors file are loaded; None if its header cannot be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(path.stat().st_size, _HEADER_BYTES_MAX):
                return None
            header = json.loads(file.read(length))
        # What says a language model's next word is not loaded where only its states are read.
        loaded = [
            values
            for name, values in header.items()
            if name != "__metadata__" and not (left_out and name.startswith(left_out))
        ]
        shapes = [values["shape"] for values in loaded]
        return sum(math.prod(int(side) for side in shape) for shape in shapes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
