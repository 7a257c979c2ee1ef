"""From a published checkpoint in diffusers' layout to a plan for adding it: what to copy, what its manifest will say.

    model_index.json  unet/  vae/  text_encoder/ [text_encoder_2/]  tokenizer/ [tokenizer_2/]  scheduler/

Its files are kept as they are. What the manifest says is read from them: from the keys of the UNet (StoryGen's has
`attn3`), the autoencoder's and the scheduler's own configuration; what no file says is told by whoever adds it, or
taken from what the authors of its family recommend. Reads only configurations and the header of one weight file, so
what cannot be drawn with is refused before anything is copied. Knows no network.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from services.models.errors import PackFileUnsafe, PackSourceInvalid, PackUnsupported
from services.models.library import PackPlan, WantedFile, check_architecture
from services.models.pack import PackSettings, Sampling
from services.models.source import Source, SourceFile, read_start
from services.models.stable_diffusion.pack import FAMILIES, read_scheduler
from services.models.vae import LatentScaling, ReferenceRange

INDEX = "model_index.json"
_CONFIG = "config.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
_TEXT_STEM = "model"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_CONFIG_BYTES_MAX = 1 << 20
_HEADER_BYTES_MAX = 100 << 20  # safetensors' own limit
DTYPES: dict[str, Literal["float16", "bfloat16", "float32"]] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_PIPELINES = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionImg2ImgPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
    "StableDiffusionXLImg2ImgPipeline": "stable-diffusion-xl",
}
"""A published pipeline's class → the architecture that draws with it. Others are no architecture of ours."""

STORYGEN = "storygen"
STORYGEN_REFERENCES = 3  # the published weights were trained with up to so many
STORYGEN_STEPS = 40
STORYGEN_TEXT_GUIDANCE = 7.0
STORYGEN_IMAGE_GUIDANCE = 3.5


@dataclass(frozen=True, kw_only=True)
class Told:
    """What whoever adds a checkpoint says of it."""

    licence: str
    name: str = ""  # empty: made from the source's name
    base: str = ""  # empty: the source's name
    family: str = ""  # a name of `FAMILIES`, or an architecture that is a family by itself; empty: guessed
    reference_range: ReferenceRange | None = None  # None: "unit" for StoryGen, "signed" for the rest
    steps: int | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    made_by: str = "fabula pack add"


def plan_published(
    source: Source, files: Mapping[str, SourceFile], told: Told, architectures: Collection[str]
) -> PackPlan:
    """How to add a published checkpoint.

    Raises PackSourceInvalid, PackUnsupported, PackFileUnsafe, PackSourceUnreadable.
    """
    index = read_json(source, files, INDEX) if INDEX in files else {}
    if not index and "unet/config.json" not in files:
        raise PackSourceInvalid(
            f"{source.name} holds neither a pack.json nor a published checkpoint (model_index.json, unet/, vae/, …)"
        )
    if not told.licence:
        raise PackSourceInvalid(
            f"{source.name} has no pack.json: say under which licence its weights are published, "
            "for example --licence MIT or --licence LicenseRef-name"
        )
    # They read with the functions of this module.
    from services.models.flux2.published import PIPELINES as FLUX2_PIPELINES
    from services.models.flux2.published import plan_flux2

    if index.get("_class_name") in FLUX2_PIPELINES:
        return plan_flux2(source, files, told, index, architectures)
    name = told.name or pack_name(source.name)
    if not index or index.get("_class_name") in _PIPELINES:
        unet_weights = _weights(source, files, "unet")
        header = read_header(source, files, unet_weights)
        architecture = _architecture(index, header)
    else:
        # Before its files are looked at: that it has no UNet, say, is no news about a pipeline that nobody knows.
        architecture = str(index.get("_class_name"))
    if architecture not in architectures and index.get("_class_name") not in _PIPELINES:
        raise PackUnsupported(
            f"{source.name} is a {architecture}; this version draws with "
            f"{', '.join(sorted({*_PIPELINES, *FLUX2_PIPELINES, 'StoryGen'}))}. Nothing was copied"
        )
    check_architecture(architecture, architectures)
    wanted, notes = _wanted(source, files, architecture, index)
    try:
        settings = _settings(source, files, told, name=name, architecture=architecture, header=header)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'manifest'}: {e['msg']}" for e in error.errors())
        raise PackSourceInvalid(f"{source.name}: {faults}") from None
    return PackPlan(name=name, architecture=architecture, files=wanted, settings=settings, notes=notes)


def _architecture(index: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    if any(".attn3." in key for key in header):
        return STORYGEN
    return _PIPELINES.get(str(index.get("_class_name", "StableDiffusionPipeline")), "")


def _settings(
    source: Source,
    files: Mapping[str, SourceFile],
    told: Told,
    *,
    name: str,
    architecture: str,
    header: Mapping[str, Any],
) -> PackSettings:
    unet = read_json(source, files, f"unet/{_CONFIG}")
    vae = read_json(source, files, f"vae/{_CONFIG}")
    try:
        schedule, sampler = read_scheduler(read_json(source, files, _SCHEDULER))
    except (ValueError, TypeError, KeyError) as error:
        raise PackUnsupported(
            f"this version cannot sample as {source.name} says: {error}. Nothing was copied"
        ) from None
    if architecture == STORYGEN:
        if told.family not in ("", STORYGEN):
            raise PackSourceInvalid(f"{source.name} is a StoryGen, and {told.family} is not")
        steps, text, image = STORYGEN_STEPS, STORYGEN_TEXT_GUIDANCE, STORYGEN_IMAGE_GUIDANCE
        references, side_px = STORYGEN_REFERENCES, 512
    else:
        family = told.family or _family(architecture, unet, is_distilled=schedule.spacing == "trailing")
        if family not in FAMILIES:
            raise PackSourceInvalid(f"no family {family!r}; known: {', '.join(sorted(FAMILIES))}")
        kind = FAMILIES[family]
        if kind.is_xl != (architecture == "stable-diffusion-xl"):
            raise PackSourceInvalid(f"{source.name} is of the architecture {architecture}, and {family} is not")
        steps, text, image = kind.steps, kind.text_guidance, 1.0
        references, side_px = 0, kind.side_px
    try:
        blocks = vae["block_out_channels"]
        channels = int(vae.get("latent_channels", 4))
        scaling = float(vae.get("scaling_factor", 0.18215))
        mean = vae.get("latents_mean") or [0.0] * channels
        deviation = vae.get("latents_std") or [1.0] * channels
        latents = LatentScaling(shift=tuple(map(float, mean)), scale=tuple(scaling / float(each) for each in deviation))
        if isinstance(unet.get("sample_size"), int):
            side_px = unet["sample_size"] * 2 ** (len(blocks) - 1)
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise PackSourceInvalid(f"vae/{_CONFIG} of {source.name} is no autoencoder's: {error}") from None
    default_range: ReferenceRange = "unit" if architecture == STORYGEN else "signed"
    return PackSettings(
        name=name,
        architecture=architecture,
        base=told.base or source.name,
        licence=told.licence,
        made_by=told.made_by,
        width_px=side_px,
        height_px=side_px,
        dtype=stored_dtype(source, header),
        max_references=references,
        reference_range=told.reference_range or default_range,
        latents=latents,
        schedule=schedule,
        sampling=Sampling(
            sampler=sampler,
            default_steps=steps if told.steps is None else told.steps,
            default_text_guidance=text if told.text_guidance is None else told.text_guidance,
            default_image_guidance=image if told.image_guidance is None else told.image_guidance,
        ),
    )


def _family(architecture: str, unet: Mapping[str, Any], *, is_distilled: bool) -> str:
    """The family that a checkpoint looks like. Only distilled ones are published with trailing steps."""
    if architecture == "stable-diffusion-xl":
        return "sdxl-turbo" if is_distilled else "sdxl"
    if is_distilled:
        return "sd-turbo"
    return "sd2" if unet.get("cross_attention_dim") == 1024 else "sd15"


def _wanted(
    source: Source, files: Mapping[str, SourceFile], architecture: str, index: Mapping[str, Any]
) -> tuple[tuple[WantedFile, ...], tuple[str, ...]]:
    """The files that the networks of an architecture need, under the names that its loader looks for."""
    endings = ("", "_2") if architecture == "stable-diffusion-xl" else ("",)
    pairs = [(INDEX, INDEX)] if index else []
    pairs.append((_SCHEDULER, _SCHEDULER))
    notes = []
    for network in ("unet", "vae", *(f"text_encoder{ending}" for ending in endings)):
        weights = _weights(source, files, network)
        plain = f"{network}/{_STEMS.get(network, _TEXT_STEM)}.safetensors"
        if weights != plain:
            notes.append(f"{weights} became {plain}: there is none in full precision")
        pairs += [(f"{network}/{_CONFIG}", f"{network}/{_CONFIG}"), (weights, plain)]
    for ending in endings:
        folder = f"tokenizer{ending}"
        found = [f"{folder}/{name}" for name in _TOKENIZER_FILES if f"{folder}/{name}" in files]
        if f"{folder}/tokenizer.json" not in found and not {f"{folder}/vocab.json", f"{folder}/merges.txt"} <= {*found}:
            raise PackSourceInvalid(f"{source.name} has no {folder}/tokenizer.json, nor vocab.json with merges.txt")
        pairs += [(path, path) for path in found]
    for taken, _ in pairs:
        if taken not in files:
            raise PackSourceInvalid(f"{source.name} has no {taken}")
    left = sorted(set(files) - {taken for taken, _ in pairs})
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        notes.append(f"left out, because nothing here reads it: {shown}")
    wanted = tuple(WantedFile(path=path, source_path=taken, file=files[taken]) for taken, path in pairs)
    return wanted, tuple(notes)


def _weights(source: Source, files: Mapping[str, SourceFile], network: str) -> str:
    """A network's file of safetensors: the full one, else the half-precision one."""
    stem = _STEMS.get(network, _TEXT_STEM)
    for name in (f"{network}/{stem}.safetensors", f"{network}/{stem}.fp16.safetensors"):
        if name in files:
            return name
    own = [path for path in files if path.startswith(f"{network}/")]
    if any(path.endswith(PICKLES) for path in own):
        raise PackFileUnsafe(
            f"the weights of {network} in {source.name} are pickles, which can run code. Make them safetensors first: "
            "`fabula pack convert FOLDER OUT`, then add OUT"
        )
    if any(path.endswith(".safetensors.index.json") for path in own):
        raise PackUnsupported(f"{network} of {source.name} is split into several files, which this version cannot read")
    raise PackSourceInvalid(f"{source.name} has no {network}/{stem}.safetensors")


def read_header(source: Source, files: Mapping[str, SourceFile], path: str) -> dict[str, Any]:
    """What a safetensors file says of its tensors, without reading one."""
    size = files[path].size_bytes
    start = read_start(source, path, 8) if size > 8 else b""
    (length,) = struct.unpack("<Q", start) if len(start) == 8 else (0,)
    if not 2 <= length <= min(size - 8, _HEADER_BYTES_MAX):
        raise PackFileUnsafe(f"{path} of {source.name} is not a safetensors file, whatever its name says")
    try:
        document = json.loads(read_start(source, path, length, start=8))
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise PackFileUnsafe(f"{path} of {source.name} is not a safetensors file, whatever its name says")
    return {name: values for name, values in document.items() if name != "__metadata__"}


def stored_dtype(source: Source, header: Mapping[str, Any]) -> Literal["float16", "bfloat16", "float32"]:
    """Of a file's first tensor."""
    values: Any = next(iter(header.values()), None)
    stored = str(values.get("dtype")) if isinstance(values, dict) else ""
    if stored not in DTYPES:
        known = ", ".join(sorted(DTYPES))
        raise PackUnsupported(f"{source.name} is stored as {stored}; this version reads {known}")
    return DTYPES[stored]


def read_json(
    source: Source, files: Mapping[str, SourceFile], path: str, *, bytes_max: int = _CONFIG_BYTES_MAX
) -> dict[str, Any]:
    """A file that holds a JSON object. Raises PackSourceInvalid."""
    if path not in files:
        raise PackSourceInvalid(f"{source.name} has no {path}")
    try:
        document = json.loads(read_start(source, path, bytes_max + 1)) if files[path].size_bytes else None
    except ValueError:
        document = None
    if not isinstance(document, dict) or files[path].size_bytes > bytes_max:
        raise PackSourceInvalid(f"{path} of {source.name} is not a JSON object")
    return document


def pack_name(text: str) -> str:
    """A pack's name out of a folder's, a bucket's or a hub's."""
    last = text.partition("@")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:63] or "pack"
