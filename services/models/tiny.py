"""A complete pack with tiny random networks, made by the code that makes the real ones. For tests of every layer above.

build_tiny_pack(folder / "tiny", seed=0)
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from services.models.captions.llava import export_tiny
from services.models.pack import Pack, PackSettings, Sampling, write_pack
from services.models.registry import save_network
from services.models.schedule import ScheduleConfig
from services.models.storygen import StoryGenConfig, build_storygen
from services.models.text_encoder import TextShape, build_text_encoder
from services.models.tokenizer import SPECIAL_TOKENS, StoryTokenizer
from services.models.vae import LatentScaling, VaeShape, build_vae
from services.models.world import World

UNET = StoryGenConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=8,
)
VAE = VaeShape(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=64)


def byte_tokenizer() -> StoryTokenizer:
    """The pack tokenizer before any training: one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return StoryTokenizer(tokenizer)


def build_tiny_pack(
    folder: Path,
    seed: int = 0,
    *,
    name: str = "tiny",
    captions: bool = True,
    world: World | None = None,
    positions: int = 96,
) -> Pack:
    """Write a pack of random weights to `folder` (made if need be; must hold no pack yet) and return it checked.

    `captions=False` leaves the LLaVA out, which halves the time. `world` is what the pack says it knows; without one it
    never warns. `positions` is the text encoder's window, in bytes. Same arguments, same digest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(folder / "tokenizer")
    text_shape = TextShape(vocab_size=tokenizer.vocabulary_size, width=16, layers=1, heads=2, positions=positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet: Any = build_storygen(UNET)
        vae: Any = build_vae(VAE)
        text: Any = build_text_encoder(
            text_shape, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
        )
    save_network(folder / "unet", unet, UNET, torch.float16)
    save_network(folder / "vae", vae, VAE, torch.float16)
    save_network(folder / "text_encoder", text, text_shape, torch.float16)
    if captions:
        export_tiny(folder, tokenizer, seed)
    if world is not None:
        world.save(folder)
    (folder / "MODEL_CARD.md").write_text("# tiny\n\nRandom weights, for tests. It draws noise.\n", encoding="utf-8")
    settings = PackSettings(
        name=name,
        architecture="storygen",
        base="nothing",
        licence="Apache-2.0",
        made_by="services.models.tiny.build_tiny_pack",
        width_px=64,
        height_px=64,
        max_references=3,
        reference_range="signed",
        latents=LatentScaling(shift=(0.0,) * 4, scale=(1.0,) * 4),
        schedule=ScheduleConfig(
            prediction="v_prediction", zero_terminal_snr=True, spacing="trailing", final_step_is_clean=True
        ),
        sampling=Sampling(sampler="ddim", default_steps=4, default_text_guidance=2.0, default_image_guidance=1.5),
    )
    return write_pack(folder, settings, created=datetime(2026, 1, 1, tzinfo=UTC))
