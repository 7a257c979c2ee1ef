"""Tiny Stable Diffusion checkpoints with random weights, in the published layout, written by diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from services.models.library import Library
from services.models.pack import Pack
from services.models.published import Told, plan_published
from services.models.registry import ARCHITECTURES
from services.models.source import FolderSource

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("d", "o"), ("do", "g</w>")]
START, END = "<|startoftext|>", "<|endoftext|>"
KINDS = ("sd15", "sd2", "sdxl")


def vocabulary() -> dict[str, int]:
    """CLIP's order: the bytes, the bytes that end a word, what merges give, and the marks last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{one}</w>" for one in alphabet), *("".join(pair) for pair in MERGES), START, END]
    return {token: index for index, token in enumerate(tokens)}


def tokenizer(**special: str) -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary(), merges=MERGES, model_max_length=77, **special)


def write_old_tokenizer(folder: Path) -> None:
    """As 1.x was published: no tokenizer.json."""
    for file in folder.iterdir():
        file.unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    told = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


def write_old_names(folder: Path) -> None:
    """As 1.x was published: a prefix, a tensor that is no weight, other names for the autoencoder's attention."""
    text = folder / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name}": value for name, value in load_file(str(text)).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, str(text), metadata={"format": "pt"})
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(str(vae))
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f".0.{new}.", f".0.{old}."): value for name, value in state.items()}
    assert any(".attentions.0.proj_attn.weight" in name for name in state)
    save_file(state, str(vae), metadata={"format": "pt"})


def text_config(**more: Any) -> CLIPTextConfig:
    size = len(vocabulary())
    values = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 32,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
    }
    return CLIPTextConfig(**{**values, **more})


def unet(kind: str, **more: Any) -> UNet2DConditionModel:
    values: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    if kind == "sd2":
        values |= {"attention_head_dim": (2, 4), "use_linear_projection": True}
    if kind == "sdxl":
        values |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": 64,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
        }
    return UNet2DConditionModel(**{**values, **more})


def vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def scheduler(kind: str) -> Any:
    """As the family's is published."""
    if kind == "sd15":
        return PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    if kind == "sd2":
        return DDIMScheduler(
            **BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False, prediction_type="v_prediction"
        )
    return EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)


def pipeline(kind: str, seed: int = 0) -> Any:
    """A pipeline of diffusers' own, in eval mode, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": unet(kind).eval(),
            "vae": vae(0.13025 if kind == "sdxl" else 0.18215).eval(),
            "text_encoder": CLIPTextModel(text_config(hidden_act="gelu" if kind == "sd2" else "quick_gelu")).eval(),
        }
        if kind == "sdxl":
            # Published with the end mark of an older transformers, and a pooled text narrower than a word here.
            config = text_config(hidden_act="gelu", projection_dim=24, eos_token_id=2)
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config).eval()
    parts |= {"scheduler": scheduler(kind), "tokenizer": tokenizer(**({"pad_token": "!"} if kind == "sd2" else {}))}
    if kind == "sdxl":
        pipe: Any = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer(pad_token="!"), add_watermarker=False)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_checkpoint(folder: Path, kind: str, pipe: Any = None) -> Path:
    """The published folder of a kind."""
    (pipeline(kind) if pipe is None else pipe).save_pretrained(str(folder), safe_serialization=True)
    if kind == "sd15":
        write_old_tokenizer(folder / "tokenizer")
        write_old_names(folder)
    return folder


def sealed(checkpoint: Path, folder: Path, family: str) -> Pack:
    """A pack of the checkpoint, made as an installation makes it, called as its folder."""
    source, told = FolderSource(checkpoint), Told(licence="Apache-2.0", name=folder.name, family=family)
    plan = plan_published(source, source.files(), told, ARCHITECTURES)
    return Library(folder.parent, (folder.parent,)).add(plan, source).pack
