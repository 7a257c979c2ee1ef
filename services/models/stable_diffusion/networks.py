"""The networks of a Stable Diffusion pack: 1.x, 2.x, XL and their Turbo kin, in diffusers' published layout.

    unet/ vae/ text_encoder/ tokenizer/            config.json + safetensors
    text_encoder_2/ tokenizer_2/                   XL only
    model_index.json                               XL: what stands for "no text"

Every frame is drawn from its description alone. How the noise goes is the manifest's business. Knows no
sampler and no serving.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from services.models.pack import Pack
from services.models.stable_diffusion.text import ClipTokenizer, Penultimate, TwoTextEncoders
from services.models.stable_diffusion.unet import PIXELS_PER_LATENT, build_stable_diffusion_unet
from services.models.text_encoder import TextEncoder
from services.models.vae import Codec
from services.models.weights import load_weights

CONFIG = "config.json"
INDEX = "model_index.json"
UNET_WEIGHTS = VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"
_TEXT_PREFIX = "text_model."
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Networks:
    """What draws: the UNet in the engine's arithmetic, the rest in float32."""

    unet: Any  # a StableDiffusionUNet, or a StoryGenUNet in the same surroundings
    codec: Codec
    text: TextEncoder | TwoTextEncoders


def load_networks(pack: Pack, device: torch.device, dtype: torch.dtype, *, is_xl: bool) -> Networks:
    """The networks of a checked pack.

    Raises ValueError for configurations that are none of this family's or do not fit each other, PackFileMissing, or
    PackWeightsMismatch.
    """
    if pack.manifest.max_references:
        raise ValueError("max_references must be 0: these networks do not look at earlier frames")
    build = functools.partial(build_stable_diffusion_unet, is_xl=is_xl)
    return load_published(pack, device, dtype, build, is_xl=is_xl)


def load_published(
    pack: Pack,
    device: torch.device,
    dtype: torch.dtype,
    build_unet: Callable[[Mapping[str, Any]], Any],
    *,
    is_xl: bool = False,
) -> Networks:
    """The networks of a published layout around any UNet that reads its texts; `build_unet` gets its `config.json`.

    Raises as `load_networks`.
    """
    # Built without memory: the file's weights become the network's.
    with torch.device("meta"):
        unet = build_unet(read_json(pack, f"unet/{CONFIG}"))
        vae = build_published_vae(read_json(pack, f"vae/{CONFIG}"))
    load_weights(unet, pack.path(f"unet/{UNET_WEIGHTS}"), assign=True)
    load_weights(vae, pack.path(f"vae/{VAE_WEIGHTS}"), _with_new_attention, assign=True)
    text = _two_texts(pack, device) if is_xl else _one_text(pack, device)
    for network in (unet, vae):
        network.requires_grad_(False)
    codec = Codec(
        # Published half-precision autoencoders give black pictures; this one runs once a frame.
        nn.Module.to(vae, device, torch.float32),
        pack.manifest.latents,
        reference_range=pack.manifest.reference_range,
        sample_latents=pack.manifest.sample_latents,
    )
    _check_fit(pack, unet, codec, text)
    return Networks(nn.Module.to(unet, device, dtype), codec, text)


def build_published_vae(values: Mapping[str, Any]) -> Any:
    """The autoencoder of a published `config.json`, in eval mode. Raises ValueError for a key that is unknown."""
    kept = {name: value for name, value in values.items() if not name.startswith("_")}
    known = set(inspect.signature(AutoencoderKL.__init__).parameters) - {"self"}
    if unknown := sorted(set(kept) - known):
        raise ValueError(f"unknown keys in the config of the VAE: {', '.join(unknown)}")
    vae: Any = AutoencoderKL(**kept)
    vae.eval()
    return vae


def read_json(pack: Pack, relative: str) -> dict[str, Any]:
    """A JSON object of the pack. Raises PackFileMissing, and ValueError for what is none."""
    document = json.loads(pack.path(relative).read_bytes())
    if not isinstance(document, dict):
        raise ValueError(f"{relative} is not a JSON object")
    return document


def _one_text(pack: Pack, device: torch.device) -> TextEncoder:
    tokenizer = _tokenizer(pack, "tokenizer")
    return TextEncoder(_text_model(pack, "text_encoder", device), tokenizer)


def _two_texts(pack: Pack, device: torch.device) -> TwoTextEncoders:
    nothing_is_zero = read_json(pack, INDEX).get("force_zeros_for_empty_prompt", True)
    if not isinstance(nothing_is_zero, bool):
        raise ValueError(f"force_zeros_for_empty_prompt in {INDEX} is no boolean")
    one, two = _tokenizer(pack, "tokenizer"), _tokenizer(pack, "tokenizer_2")
    one_model = _text_model(pack, "text_encoder", device)
    two_model = _text_model(pack, "text_encoder_2", device, with_projection=True)
    first: Any = Penultimate(one_model, eos_id=one.eos_id)
    second: Any = Penultimate(two_model.text_model, eos_id=two.eos_id, projection=two_model.text_projection)
    return TwoTextEncoders(
        TextEncoder(first, one, adapted=one_model),
        TextEncoder(second, two, adapted=two_model),
        nothing_is_zero=nothing_is_zero,
    )


def _tokenizer(pack: Pack, folder: str) -> ClipTokenizer:
    # Only files that the manifest lists lie in a pack's folder.
    return ClipTokenizer(pack.folder / folder)


def _text_model(pack: Pack, folder: str, device: torch.device, *, with_projection: bool = False) -> Any:
    config = CLIPTextConfig.from_dict(read_json(pack, f"{folder}/{CONFIG}"))
    with torch.device("meta"):
        model: Any = CLIPTextModelWithProjection(config) if with_projection else CLIPTextModel(config)
    load_weights(
        model,
        pack.path(f"{folder}/{TEXT_WEIGHTS}"),
        _as_published if with_projection else _without_prefix,
        assign=True,
    )
    for module in model.modules():
        if getattr(module, "position_ids", None) is not None:  # no weight, so still without memory
            module.position_ids = torch.arange(config.max_position_embeddings)[None]
    model.requires_grad_(False)
    model.eval()
    return nn.Module.to(model, device, torch.float32)


def _as_published(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the numbers of the positions, which older files hold as if they were learned."""
    return {name: value for name, value in found.items() if not name.endswith("position_ids")}


def _without_prefix(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text model's tensors, by the names that it has for them itself."""
    return {name.removeprefix(_TEXT_PREFIX): value for name, value in _as_published(found).items()}


def _with_new_attention(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors; files of 1.x have older names for its attention."""
    renamed = {}
    for name, value in found.items():
        if ".attentions." in name:
            for old, new in _OLD_ATTENTION.items():
                name = name.replace(old, new)
        renamed[name] = value
    return renamed


def _check_fit(pack: Pack, unet: Any, codec: Codec, text: TextEncoder | TwoTextEncoders) -> None:
    """Raises ValueError where the networks do not fit each other: each alone would load without complaint."""
    config: Any = unet.config
    latents = {
        "the VAE's latent channels": codec.channels,
        "the manifest's latent shifts": len(pack.manifest.latents.shift),
        "the manifest's latent scales": len(pack.manifest.latents.scale),
        "the UNet's input channels": config.in_channels,
        "the UNet's output channels": config.out_channels,
    }
    if len(set(latents.values())) > 1:
        raise ValueError(f"latent channels differ: {', '.join(f'{what} are {n}' for what, n in latents.items())}")
    if config.cross_attention_dim != text.width:
        raise ValueError(f"the UNet reads texts {config.cross_attention_dim} wide, the text encoder's are {text.width}")
    if isinstance(text, TwoTextEncoders):
        second: Any = text.second.model
        if unet.pooled_width != second.projection.out_features:
            raise ValueError(
                f"the UNet reads a pooled text {unet.pooled_width} wide, the text encoder's is "
                f"{second.projection.out_features}"
            )
        if codec.factor != PIXELS_PER_LATENT:
            raise ValueError(f"a latent is {codec.factor} pixels wide, the UNet is told sizes at {PIXELS_PER_LATENT}")
