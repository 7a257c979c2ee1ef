"""The shapes of the toon pack's networks: small enough for two CPU cores, the same architectures as the big ones.

A shape is chosen once and kept; retraining is free, another shape is another pack. Costs count attention too.
Knows no data, training or file.

| network | shape | parameters | cost |
| --- | --- | --- | --- |
| UNet | 16×16 latents, widths 96 and 160, 7 transformer blocks | 7.9 M | a row 1.61 GFLOP, 2.09 with 3 references |
| text encoder | CLIP text, 192 wide, 4 layers, 96 positions | 2.2 M | 0.37 GFLOP a text |
| VAE | 8× smaller, 8 channels, widths 16/32/64/96 | 1.7 M | encode 0.75, decode 2.31 GFLOP |
"""

from __future__ import annotations

from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from services.models.schedule import ScheduleConfig
from services.models.storygen import StoryGenConfig
from services.models.text_encoder import TextShape, build_text_encoder
from services.models.vae import VaeShape, build_vae

FRAME_PX = 128
MAX_REFERENCES = 3
TEXT_POSITIONS = 96
# Four numbers for 8×8 pixels lose eyes and hand-held props: an outline drawing has more detail than a photograph.
LATENT_CHANNELS = 16

UNET = StoryGenConfig(
    sample_size=16,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    block_out_channels=(96, 160),
    # References are looked at on both scales: the 16×16 one carries what a copied accessory looks like.
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=192,
    attention_head_dim=(3, 5),  # heads of 32
    norm_num_groups=32,
)

TEXT = TextShape(vocab_size=2048, width=192, layers=4, heads=6, positions=TEXT_POSITIONS, bidirectional=True)

VAE = VaeShape(
    block_out_channels=(16, 32, 64, 96),
    layers_per_block=1,
    norm_num_groups=16,
    sample_size=FRAME_PX,
    latent_channels=LATENT_CHANNELS,
    decoder_block_out_channels=(32, 64, 64, 96),  # fine lines are drawn in its last two blocks
)

# v-prediction from pure noise: a night scene and a snow field must both be reachable, and few steps must do.
SCHEDULE = ScheduleConfig(
    prediction="v_prediction", zero_terminal_snr=True, spacing="trailing", final_step_is_clean=True
)


def toon_text_encoder(*, bos_id: int, eos_id: int, pad_id: int) -> CLIPTextModel:
    """The text encoder with fresh weights, for a tokenizer with these marks."""
    return build_text_encoder(TEXT, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)


def toon_vae() -> AutoencoderKL:
    """The VAE with fresh weights."""
    return build_vae(VAE)
