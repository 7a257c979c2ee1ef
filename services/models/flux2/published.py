"""From a published FLUX.2 Klein checkpoint in diffusers' layout to a plan for adding it.

    model_index.json  transformer/  vae/  text_encoder/  tokenizer/  scheduler/

Its files are kept as they are, large networks in their parts. Reads only configurations and headers of weights. Knows
no network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from services.models.errors import PackFileUnsafe, PackSourceInvalid, PackUnsupported
from services.models.library import PackPlan, WantedFile, check_architecture
from services.models.pack import PackSettings, Sampling
from services.models.published import INDEX, PICKLES, Told, pack_name, read_header, read_json, stored_dtype
from services.models.ranges import FlowConfig, LatentScaling
from services.models.source import Source, SourceFile

KEEPS_REFERENCES = "flux2-klein-kv"
PIPELINES = {"Flux2KleinPipeline": "flux2-klein", "Flux2KleinKVPipeline": KEEPS_REFERENCES}
"""A published pipeline's class → the architecture that draws with it."""

SIDE_PX = 1024  # what the pipelines draw unless told otherwise
# As the other packs that look at earlier frames. The network was shown more, and each costs as much as the frame.
REFERENCES = 3
DISTILLED = (4, 1.0)  # steps and guidance, as published
PLAIN = (50, 4.0)
_CONFIG = "config.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_TOKENIZER_TOO = ("chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
_LATENTS_IN_A_SQUARE = 4
_ONE_WAY: dict[str, Any] = {
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
"""What a scheduler may say of things that our sampler does in one way only."""


def plan_flux2(
    source: Source,
    files: Mapping[str, SourceFile],
    told: Told,
    index: Mapping[str, Any],
    architectures: Collection[str],
) -> PackPlan:
    """How to add a checkpoint whose `model_index.json` names one of `PIPELINES`.

    Raises PackSourceInvalid, PackUnsupported, PackFileUnsafe, PackSourceUnreadable.
    """
    architecture = PIPELINES[str(index["_class_name"])]
    check_architecture(architecture, architectures)
    if told.family not in ("", architecture):
        raise PackSourceInvalid(f"{source.name} is a {architecture}, and {told.family} is not")
    if told.reference_range not in (None, "signed"):
        raise PackSourceInvalid(f"{source.name} is a {architecture}: its references are always signed")
    weights = {network: _weights(source, files, network) for network in _STEMS}
    taken = [INDEX, _SCHEDULER]
    for network, own in weights.items():
        taken += [f"{network}/{_CONFIG}", *own]
    taken += [f"tokenizer/{name}" for name in _TOKENIZER]
    if missing := [path for path in taken if path not in files]:
        raise PackSourceInvalid(f"{source.name} has no {missing[0]}")
    taken += [path for path in (f"tokenizer/{name}" for name in _TOKENIZER_TOO) if path in files]
    steps, guidance = DISTILLED if index.get("is_distilled") or architecture == KEEPS_REFERENCES else PLAIN
    header = read_header(source, files, weights["transformer"][0])
    try:
        settings = PackSettings(
            name=told.name or pack_name(source.name),
            architecture=architecture,
            base=told.base or source.name,
            licence=told.licence,
            made_by=told.made_by,
            width_px=SIDE_PX,
            height_px=SIDE_PX,
            dtype=stored_dtype(source, header),
            max_references=REFERENCES,
            reference_range="signed",
            sample_latents=False,
            latents=_no_scaling(source, files),
            schedule=_schedule(source, files),
            sampling=Sampling(
                sampler="flow_euler",
                default_steps=steps if told.steps is None else told.steps,
                default_text_guidance=guidance if told.text_guidance is None else told.text_guidance,
                default_image_guidance=1.0 if told.image_guidance is None else told.image_guidance,
            ),
        )
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'manifest'}: {e['msg']}" for e in error.errors())
        raise PackSourceInvalid(f"{source.name}: {faults}") from None
    left = sorted(set(files) - set(taken))
    shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    return PackPlan(
        name=settings.name,
        architecture=architecture,
        files=tuple(WantedFile(path=path, source_path=path, file=files[path]) for path in taken),
        settings=settings,
        notes=(f"left out, because nothing here reads it: {shown}",) if left else (),
    )


def read_flow_scheduler(values: Mapping[str, Any]) -> FlowConfig:
    """The noise schedule of a published `scheduler_config.json`.

    Raises ValueError for what we cannot sample as it says: rather nothing than other pictures.
    """
    if (name := values.get("_class_name")) != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"no sampler for the scheduler {name!r}; known: FlowMatchEulerDiscreteScheduler")
    for key, wanted in _ONE_WAY.items():
        if values.get(key, wanted) not in (wanted, None):
            raise ValueError(f"the scheduler's {key} is {values[key]!r}, only {wanted!r} is known here")
    steps = int(values.get("num_train_timesteps", 1000))
    if values.get("use_dynamic_shifting", False):
        return FlowConfig(kind="flow", train_steps=steps, shift_by_size="flux2")
    return FlowConfig(kind="flow", train_steps=steps, shift=float(values.get("shift", 1.0)))


def _schedule(source: Source, files: Mapping[str, SourceFile]) -> FlowConfig:
    try:
        return read_flow_scheduler(read_json(source, files, _SCHEDULER))
    except (ValueError, TypeError) as error:
        raise PackUnsupported(
            f"this version cannot sample as {source.name} says: {error}. Nothing was copied"
        ) from None


def _no_scaling(source: Source, files: Mapping[str, SourceFile]) -> LatentScaling:
    """None at all: this autoencoder keeps its own among its weights."""
    try:
        count = int(read_json(source, files, f"vae/{_CONFIG}").get("latent_channels", 32)) * _LATENTS_IN_A_SQUARE
        return LatentScaling(shift=(0.0,) * count, scale=(1.0,) * count)
    except (ValueError, TypeError) as error:
        raise PackSourceInvalid(f"vae/{_CONFIG} of {source.name} is no autoencoder's: {error}") from None


def _weights(source: Source, files: Mapping[str, SourceFile], network: str) -> tuple[str, ...]:
    """A network's files of safetensors: one, or those that its index names."""
    stem = f"{network}/{_STEMS[network]}"
    if f"{stem}.safetensors" in files:
        return (f"{stem}.safetensors",)
    if f"{stem}.safetensors.index.json" not in files:
        if any(path.startswith(f"{network}/") and path.endswith(PICKLES) for path in files):
            raise PackFileUnsafe(
                f"the weights of {network} in {source.name} are pickles, which can run code. Make them safetensors "
                "first: `fabula pack convert FOLDER OUT`, then add OUT"
            )
        raise PackSourceInvalid(f"{source.name} has no {stem}.safetensors")
    named = read_json(source, files, f"{stem}.safetensors.index.json", bytes_max=_INDEX_BYTES_MAX).get("weight_map")
    parts = sorted({str(part) for part in named.values()}) if isinstance(named, dict) else []
    paths = tuple(f"{network}/{part}" for part in parts)
    if not paths or any(not (p.startswith(f"{stem}-") and p.endswith(".safetensors") and p in files) for p in paths):
        raise PackSourceInvalid(f"{stem}.safetensors.index.json of {source.name} does not name the parts beside it")
    return paths


_INDEX_BYTES_MAX = 16 << 20
