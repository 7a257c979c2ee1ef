"""The networks of a FLUX.2 Klein pack, in diffusers' published layout.

    transformer/ vae/ text_encoder/ tokenizer/     config.json + safetensors, of large ones in parts with their index
    model_index.json                               whether it was distilled: the manifest's steps and guidance say so

How the noise goes is the manifest's business. Knows no sampler and no serving.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from services.models.flux2.text import QwenTexts, QwenTokenizer
from services.models.flux2.transformer import Flux2Network, build_flux2
from services.models.flux2.vae import Flux2Codec, build_flux2_vae
from services.models.pack import Manifest, Pack
from services.models.ranges import FlowConfig
from services.models.weights import load_parts

CONFIG = "config.json"
TRANSFORMER, VAE, TEXT_ENCODER, TOKENIZER = "transformer", "vae", "text_encoder", "tokenizer"
STEMS = {TRANSFORMER: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", TEXT_ENCODER: "model"}
_TEXT_PREFIX, _HEAD = "model.", "lm_head."


@dataclass(frozen=True)
class Networks:
    """What draws: transformer and text encoder in the engine's arithmetic, the autoencoder in float32."""

    transformer: Flux2Network
    codec: Flux2Codec
    text: QwenTexts


def load_flux2_networks(pack: Pack, device: torch.device, dtype: torch.dtype, *, keeps_references: bool) -> Networks:
    """The networks of a checked pack; `keeps_references` as in `build_flux2`.

    Raises ValueError for configurations that are none of this family's or do not fit each other, PackFileMissing, or
    PackWeightsMismatch.
    """
    # Built without memory: the files' weights become the networks'.
    with torch.device("meta"):
        transformer: Any = build_flux2(_json(pack, f"{TRANSFORMER}/{CONFIG}"), keeps_references=keeps_references)
        vae = build_flux2_vae(_json(pack, f"{VAE}/{CONFIG}"))
    for network, name in ((transformer, TRANSFORMER), (vae, VAE)):
        load_parts(network, [pack.path(path) for path in weight_files(pack.manifest, name)], assign=True)
        network.requires_grad_(False)
    codec = Flux2Codec(nn.Module.to(vae, device, torch.float32))
    text = QwenTexts(_text_model(pack, device, dtype), QwenTokenizer(pack.folder / TOKENIZER))
    _check_fit(transformer, codec, text)
    return Networks(nn.Module.to(transformer, device, dtype), codec, text)


def weight_files(manifest: Manifest, network: str) -> tuple[str, ...]:
    """A network's files of weights: one, or its parts in order."""
    start, end = f"{network}/{STEMS[network]}", ".safetensors"
    plain = f"{start}{end}"
    if plain in manifest.files:
        return (plain,)
    parts = sorted(path for path in manifest.files if path.startswith(f"{start}-") and path.endswith(end))
    return tuple(parts) or (plain,)  # who opens it says that it is missing


def transformer_files(manifest: Manifest) -> tuple[str, ...]:
    """Those of what a character's weights are a change of."""
    return weight_files(manifest, TRANSFORMER)


def check_flux2(manifest: Manifest) -> FlowConfig:
    """The schedule of a manifest. Raises ValueError where it says of noise or latents what is not this family's."""
    if not isinstance(manifest.schedule, FlowConfig):
        raise ValueError("the schedule must be a flow's: the transformer predicts one")
    if set(manifest.latents.shift) != {0.0} or set(manifest.latents.scale) != {1.0}:
        raise ValueError("latents must have shift 0 and scale 1: the autoencoder keeps its own")
    if manifest.reference_range != "signed" or manifest.sample_latents:
        raise ValueError('reference_range must be "signed" and sample_latents false, as it was trained')
    return manifest.schedule


def _text_model(pack: Pack, device: torch.device, dtype: torch.dtype) -> Any:
    """The language model without what would say the next word."""
    document = _json(pack, f"{TEXT_ENCODER}/{CONFIG}")
    if document.get("model_type") != "qwen3":
        raise ValueError(f"the text encoder is a {document.get('model_type')!r}, this architecture's is 'qwen3'")
    try:
        config = Qwen3Config.from_dict(document)
    except Exception as error:  # noqa: BLE001 - the library raises what it likes for a config that contradicts itself
        raise ValueError(f"the config of the text encoder: {error}") from None
    with torch.device("meta"):
        model: Any = Qwen3Model(config)
    files = [pack.path(path) for path in weight_files(pack.manifest, TEXT_ENCODER)]
    load_parts(model, files, _without_head, assign=True)
    # The turns that stand for positions are no weights: computed here, and in float32 whatever the arithmetic.
    turns, model.rotary_emb = type(model.rotary_emb), nn.Identity()
    nn.Module.to(model, device, dtype)
    model.rotary_emb = turns(config).to(device)
    model.requires_grad_(False)
    model.eval()
    return model


def _without_head(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_TEXT_PREFIX): value for name, value in found.items() if not name.startswith(_HEAD)}


def _json(pack: Pack, relative: str) -> dict[str, Any]:
    document = json.loads(pack.path(relative).read_bytes())
    if not isinstance(document, dict):
        raise ValueError(f"{relative} is not a JSON object")
    return document


def _check_fit(transformer: Any, codec: Flux2Codec, text: QwenTexts) -> None:
    """Raises ValueError where the networks do not fit each other: each alone would load without complaint."""
    config = transformer.config
    if config.in_channels != codec.channels:
        raise ValueError(f"the transformer reads {config.in_channels} channels, the autoencoder makes {codec.channels}")
    if config.joint_attention_dim != text.states_width:
        raise ValueError(
            f"the transformer reads texts {config.joint_attention_dim} wide, the text encoder's are {text.states_width}"
        )
