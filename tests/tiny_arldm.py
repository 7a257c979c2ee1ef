"""A tiny AR-LDM twice, the product's and the reference's, with the same weights; and what tests ask both of."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor

from services.models.arldm.blip import BlipShape
from services.models.arldm.checkpoint import assemble, from_lightning
from services.models.arldm.model import LATENTS, SCHEDULE, ArldmConfig, FrameShape
from services.models.arldm.sampling import ArldmModel
from services.models.arldm.text import BLIP_MARKS, CLIP_MARKS, CaptionTokenizer
from services.models.schedule import Schedule
from services.models.storygen import StoryGenConfig
from services.models.text_encoder import TextShape
from services.models.vae import Codec, VaeShape
from tests.reference_arldm import Reference, Sizes, random_state

SIZES = Sizes()
WORDS = (
    *("fred", "barney", "wilma", "sits", "runs", "in", "the", "kitchen", "garden"),
    *("and", "laughs", "while", "dino", "eats", "his", "red", "car"),
)
CAPTIONS = (
    "fred sits in the kitchen",
    "wilma laughs",
    "fred and wilma runs in the garden",
    "dino eats the red car",
    "barney laughs while fred runs",
)
LATENT = (4, 8, 8)
STEPS, GUIDANCE = 4, 6.0


def word_tokenizer(marks: tuple[str, ...], lead: tuple[str, ...]) -> tokenizers.Tokenizer:
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*lead, *marks, "[UNK]", *WORDS)))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(dict.fromkeys(marks)))
    return tokenizer


def clip_tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer(word_tokenizer((CLIP_MARKS.begin, CLIP_MARKS.end), ("!",)), CLIP_MARKS)


def blip_tokenizer() -> CaptionTokenizer:
    marks = ("[PAD]", "[CLS]", "[SEP]", "[ENC]")
    return CaptionTokenizer(word_tokenizer(marks, ()), BLIP_MARKS)


def config(sizes: Sizes = SIZES, given: int = 0) -> ArldmConfig:
    """The reference's sizes in the product's words. What tables say is left wrong: a checkpoint has the last word."""
    return ArldmConfig(
        unet=StoryGenConfig(
            sample_size=8,
            block_out_channels=sizes.unet_channels,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in sizes.unet_attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(sizes.unet_attention)),
            layers_per_block=sizes.unet_layers,
            cross_attention_dim=sizes.width,
            attention_head_dim=sizes.unet_heads,
            norm_num_groups=sizes.unet_groups,
        ),
        vae=VaeShape(
            block_out_channels=sizes.vae_channels,
            layers_per_block=sizes.vae_layers,
            norm_num_groups=sizes.vae_groups,
            sample_size=16,
        ),
        text=TextShape(vocab_size=2, width=sizes.width, layers=sizes.clip_layers, heads=sizes.clip_heads, positions=2),
        blip=BlipShape(
            image_size_px=sizes.vit_image,
            patch_px=sizes.vit_patch,
            vision_width=sizes.vit_width,
            vision_layers=sizes.vit_layers,
            vision_heads=sizes.vit_heads,
            vocab_size=2,
            width=sizes.width,
            layers=sizes.bert_layers,
            heads=sizes.bert_heads,
            positions=4,
        ),
        frame=FrameShape(width=sizes.width, frames=2, given_frames=given),
    )


class Both(NamedTuple):
    model: ArldmModel
    reference: Reference


def both(given: int = 0, seed: int = 0) -> Both:
    state = random_state(SIZES, seed)
    sized, states = from_lightning(state, config(given=given))
    networks, vae = assemble(sized, states)
    networks.requires_grad_(False)
    codec = Codec(vae, LATENTS)
    model = ArldmModel(networks, codec, Schedule(SCHEDULE), clip_tokenizer(), blip_tokenizer())
    return Both(model, Reference(state, SIZES))


def picture(seed: int, height: int = 20, width: int = 28) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def noise(stories: int, frames: int, seed: int = 0) -> Tensor:
    return torch.randn(stories, frames, *LATENT, generator=torch.Generator().manual_seed(seed))


def rows_by_hand(captions: tuple[str, ...], tokenizer: CaptionTokenizer, begin: str) -> tuple[Tensor, Tensor]:
    """What the published tokenizers give: marks around the words, padding to the window, ones where it is real."""
    to_id = tokenizer._tokenizer.token_to_id
    ids = torch.full((len(captions), SIZES.positions), to_id(tokenizer.marks.pad))
    real = torch.zeros(len(captions), SIZES.positions, dtype=torch.long)
    for row, caption in enumerate(captions):
        tokens = [begin, *caption.split(), tokenizer.marks.end]
        ids[row, : len(tokens)] = torch.tensor([to_id(token) for token in tokens])
        real[row, : len(tokens)] = 1
    return ids, real


def texts_by_hand(captions: tuple[str, ...], drawn: int) -> dict[str, Any]:
    clip, blip = clip_tokenizer(), blip_tokenizer()
    clip_ids, clip_real = rows_by_hand(captions[-drawn:], clip, CLIP_MARKS.begin)
    # BLIP's own tokenizer begins with [CLS]; the encoder puts [ENC] in its place.
    blip_ids, blip_real = rows_by_hand(captions, blip, "[CLS]")
    return {
        "clip_ids_VS": clip_ids,
        "clip_real_VS": clip_real,
        "blip_ids_FS": blip_ids,
        "blip_real_FS": blip_real,
        "enc_id": blip._tokenizer.token_to_id("[ENC]"),
    }


def nulls() -> dict[str, Any]:
    return {
        "clip_null": rows_by_hand(("",), clip_tokenizer(), CLIP_MARKS.begin)[0],
        "blip_null": rows_by_hand(("",), blip_tokenizer(), "[CLS]")[0],
    }


def drawn_by_hand(
    reference: Reference, captions: tuple[str, ...], given: list[Any], start: Tensor
) -> tuple[Tensor, Tensor]:
    return reference.draw(
        **texts_by_hand(captions, len(start)), given=given, **nulls(), noise_VCHW=start, steps=STEPS, guidance=GUIDANCE
    )


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())
