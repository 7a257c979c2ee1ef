"""Checkpoints in published shapes and layouts, with random weights: speed and memory do not depend on their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from services.models.storygen import StoryGenConfig, build_storygen
from tests.stable_diffusion_checkpoints import BETAS, text_config, tokenizer

Kind = Literal["storygen", "sd15", "sdxl"]
_UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_CLIP_LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_BIG = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def write_full_size(folder: Path, kind: Kind, dtype: torch.dtype) -> None:
    """Stable Diffusion 1.5, the same with StoryGen's UNet, or XL; as diffusers saves it."""
    torch.manual_seed(0)
    storygen = StoryGenConfig()
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(**(_SDXL if kind == "sdxl" else _plain(storygen))),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=1024 if kind == "sdxl" else 512,
                scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
            ),
            "text_encoder": CLIPTextModel(_clip(hidden_act="quick_gelu", projection_dim=768, **_CLIP_LARGE)),
        }
        if kind == "sdxl":
            config = _clip(hidden_act="gelu", projection_dim=1280, **_CLIP_BIG)
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    for network in parts.values():
        _fill(network, dtype)
    if kind == "sdxl":
        scheduler: Any = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
        tokenizers = {"tokenizer": tokenizer(), "tokenizer_2": tokenizer(pad_token="!")}
        pipe: Any = StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=scheduler, add_watermarker=False)
    else:
        scheduler = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
        none: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, tokenizer=tokenizer(), scheduler=scheduler, **none)
    pipe.save_pretrained(str(folder), safe_serialization=True)
    if kind == "storygen":
        with torch.device("meta"):
            own: Any = build_storygen(storygen)
        _fill(own, dtype)
        save_file(own.state_dict(), str(folder / _UNET_FILE), metadata={"format": "pt"})


def _plain(config: StoryGenConfig) -> dict[str, Any]:
    """What diffusers' own network of the same shape is built with."""
    return {name: value for name, value in config.to_dict().items() if name in UNet2DConditionModel().config}


def _clip(**more: Any) -> Any:
    return text_config(vocab_size=49408, **more)


def _fill(network: Any, dtype: torch.dtype) -> None:
    network.to_empty(device="cpu").to(dtype)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
