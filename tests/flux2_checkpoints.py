"""Tiny FLUX.2 Klein checkpoints with random weights, in the published layout, written by diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from services.models.pack import Pack, PackSettings, Sampling, write_pack
from services.models.ranges import FlowConfig, LatentScaling

KINDS = {"flux2-klein": Flux2KleinPipeline, "flux2-klein-kv": Flux2KleinKVPipeline}
CHANNELS = 16  # of a latent pixel: 2×2 of the autoencoder's four
WIDTH = 16  # of the text encoder
SIDE_PX = 64
START, END, FILL = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("c", "a"), ("ca", "t"), ("Ċ", "Ċ")]
CHAT = (
    "{% for each in messages %}<|im_start|>{{ each.role }}\n{{ each.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SCHEDULE = FlowConfig(kind="flow", shift_by_size="flux2")


def tokenizer() -> Qwen2Tokenizer:
    """As the published one: bytes, what merges give, and marks."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES), FILL, START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    own = Qwen2Tokenizer(vocab=vocab, merges=MERGES, pad_token=FILL, eos_token=END, unk_token=FILL)
    own.add_special_tokens({"additional_special_tokens": [START, END]})
    own.chat_template = CHAT
    return own


def transformer(**more: Any) -> Flux2Transformer2DModel:
    values: dict[str, Any] = {
        "in_channels": CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * WIDTH,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    own = Flux2Transformer2DModel(**{**values, **more})
    with torch.no_grad():
        for weight in own.parameters():
            if weight.ndim == 2:
                weight.mul_(3.0)  # as they are made, texts and earlier frames hardly count
    return own


def vae() -> AutoencoderKLFlux2:
    """With statistics that are not those of a fresh one."""
    own = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=1,
        latent_channels=CHANNELS // 4,
        norm_num_groups=4,
        sample_size=SIDE_PX,
    )
    own.bn.running_mean.copy_(torch.randn(CHANNELS) * 0.3)
    own.bn.running_var.copy_(torch.rand(CHANNELS) + 0.5)
    return own


def text_encoder(vocab_size: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.3,  # else all texts look alike
    )
    return Qwen3ForCausalLM(config)


def pipeline(kind: str, seed: int = 0, *, is_distilled: bool = False) -> Any:
    """A pipeline of diffusers' own, in eval mode, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        parts: dict[str, Any] = {
            "transformer": transformer().eval(),
            "vae": vae().eval(),
            "text_encoder": text_encoder(len(words)).eval(),
        }
    if kind == "flux2-klein":
        parts["is_distilled"] = is_distilled
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe: Any = KINDS[kind](**parts, scheduler=scheduler, tokenizer=words)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_checkpoint(folder: Path, pipe: Any, *, parts: int = 1) -> Path:
    """The published folder; the text encoder in so many files."""
    pipe.save_pretrained(str(folder), safe_serialization=True)
    if parts > 1:
        whole = folder / "text_encoder" / "model.safetensors"
        state = load_file(str(whole))
        whole.unlink()
        names = sorted(state)
        named: dict[str, str] = {}
        for number in range(parts):
            file = f"model-{number + 1:05d}-of-{parts:05d}.safetensors"
            own = names[number::parts]
            save_file({name: state[name] for name in own}, str(whole.with_name(file)), metadata={"format": "pt"})
            named |= dict.fromkeys(own, file)
        index = {"metadata": {}, "weight_map": named}
        whole.with_name("model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def settings(name: str, kind: str = "flux2-klein", **changes: Any) -> PackSettings:
    """Of a pack that draws at a size for tests."""
    values = PackSettings(
        name=name,
        architecture=kind,
        base="nothing",
        licence="Apache-2.0",
        made_by="a test",
        width_px=SIDE_PX,
        height_px=SIDE_PX,
        dtype="float32",
        max_references=3,
        reference_range="signed",
        sample_latents=False,
        latents=LatentScaling(shift=(0.0,) * CHANNELS, scale=(1.0,) * CHANNELS),
        schedule=SCHEDULE,
        sampling=Sampling(sampler="flow_euler", default_steps=4, default_text_guidance=4.0, default_image_guidance=1.0),
    )
    return values.model_copy(update=changes)


def sealed(folder: Path, kind: str, pipe: Any, **changes: Any) -> Pack:
    """A pack of a pipeline, called as its folder."""
    write_checkpoint(folder, pipe)
    return write_pack(folder, settings(folder.name, kind, **changes))
