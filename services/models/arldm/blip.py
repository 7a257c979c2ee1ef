"""BLIP's multimodal encoder, which makes AR-LDM's memory of a frame: one vector for each position of its caption.

A vision transformer reads the picture, a BERT with cross-attention reads the caption while looking at it. The layers
are transformers'; how they are put together, which numbers keep their norms from dividing by zero, and what the picture
goes through before are those of the published weights. Knows no story.

Shapes: B frames, P patches and one, S caption positions, D the text's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from services.models.arldm.text import TokenRows
from services.models.shape import config_values

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class BlipShape:
    """The shape of the encoder. The defaults are BLIP-large's."""

    image_size_px: int = 224
    patch_px: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vocab_size: int = 30524
    width: int = 768
    layers: int = 12
    heads: int = 12
    positions: int = 512
    dropout: float = 0.1  # of the text part, while it is trained

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlipShape:
        """Read a `config.json`. Raises ValueError naming a key that is unknown."""
        return cls(**config_values(cls, values, "multimodal encoder"))

    def to_dict(self) -> dict[str, Any]:
        """The same, for `config.json`."""
        return asdict(self)


class Blip(nn.Module):
    """Picture and caption in, the caption's states out."""

    def __init__(self, shape: BlipShape) -> None:
        super().__init__()
        # The norms' epsilons are not the library's defaults: 1e-6 in the vision part, where it assumes 1e-5.
        vision: Any = BlipVisionModel(
            BlipVisionConfig(
                image_size=shape.image_size_px,
                patch_size=shape.patch_px,
                hidden_size=shape.vision_width,
                intermediate_size=4 * shape.vision_width,
                num_hidden_layers=shape.vision_layers,
                num_attention_heads=shape.vision_heads,
                hidden_act="gelu",
                layer_norm_eps=1e-6,
            )
        )
        text: Any = BlipTextModel(
            BlipTextConfig(
                vocab_size=shape.vocab_size,
                hidden_size=shape.width,
                encoder_hidden_size=shape.vision_width,
                intermediate_size=4 * shape.width,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                max_position_embeddings=shape.positions,
                hidden_act="gelu",
                layer_norm_eps=1e-12,
                hidden_dropout_prob=shape.dropout,
                attention_probs_dropout_prob=shape.dropout,
                pad_token_id=0,
                bos_token_id=None,  # text comes with its marks
                eos_token_id=None,
                sep_token_id=None,
                is_decoder=True,  # the library's word for "has cross-attention"; it is never asked to be causal
            ),
            add_pooling_layer=False,
        )
        self.vision = vision
        self.text = text
        self.shape = shape

    def forward(self, pixels_B3HW: Tensor, captions: TokenRows) -> Tensor:
        """`[B, S, D]`. `pixels_B3HW` as `as_blip_sees` makes them."""
        return self.read(self.look(pixels_B3HW), captions)

    def look(self, pixels_B3HW: Tensor) -> Tensor:
        """`[B, P, D']`: what is seen in pictures, whatever their captions say."""
        seen: Tensor = self.vision(pixel_values=pixels_B3HW).last_hidden_state
        return seen

    def read(self, seen_BPD: Tensor, captions: TokenRows) -> Tensor:
        """`[B, S, D]`: captions, read while looking."""
        out: Tensor = self.text(
            input_ids=captions.ids_BS,
            attention_mask=captions.real_BS.long(),
            encoder_hidden_states=seen_BPD,
            is_decoder=False,
        ).last_hidden_state
        return out


def build_blip(shape: BlipShape) -> Blip:
    """An encoder with fresh weights from torch's global generator, in eval mode."""
    blip = Blip(shape)
    blip.eval()
    return blip


def as_blip_sees(pictures: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], size_px: int) -> Tensor:
    """`[B, 3, size, size]`: 8-bit pictures `[H, W, 3]`, each stretched to the square and normalised.

    Pillow resizes, on 8-bit values: its filter widens when shrinking, and tensors resized otherwise differ visibly.
    Raises ValueError for an array that is no such picture.
    """
    rows = []
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise ValueError(f"a picture is 8-bit [height, width, 3], not {picture.dtype} {picture.shape}")
        square = Image.fromarray(picture).resize((size_px, size_px), Image.Resampling.BILINEAR)
        rows.append(torch.from_numpy(np.array(square)))
    values = torch.stack(rows).permute(0, 3, 1, 2).float() / 255.0
    return (values - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


def black(size_px: int) -> Tensor:
    """`[1, 3, size, size]`: the picture that stands for "no picture", black before it is normalised."""
    return as_blip_sees([np.zeros((size_px, size_px, 3), dtype=np.uint8)], size_px)


def as_pictures(pixels_B3HW: Tensor) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Pixels in 0..1 as 8-bit pictures `[H, W, 3]`: what a file would hold, and what later frames are shown."""
    values = pixels_B3HW.detach().float().clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
    return list(values.permute(0, 2, 3, 1).cpu().numpy())
