"""A wider network that computes the same, whose new channels can become different ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.models.vae import VaeShape, build_vae
from training.widen import widened

NARROW = VaeShape(
    block_out_channels=(4, 8, 4), layers_per_block=1, norm_num_groups=2, sample_size=32, latent_channels=2
)


def test_the_wider_decoder_decodes_the_same_and_its_copies_part() -> None:
    torch.manual_seed(0)
    before = build_vae(NARROW)
    for parameter in before.parameters():  # norms and biases too, which fresh networks have at one and zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    after = build_vae(replace(NARROW, decoder_block_out_channels=(8, 16, 4)))
    after.load_state_dict(widened(after.state_dict(), before.state_dict(), torch.Generator().manual_seed(1)))
    latents = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(after.decode(latents).sample, before.decode(latents).sample, atol=1e-5, rtol=1e-4)
    pictures = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(after.encode(pictures).latent_dist.mean, before.encode(pictures).latent_dist.mean)
    weight = after.decoder.up_blocks[2].resnets[0].conv2.weight
    after.decode(latents).sample.square().mean().backward()
    assert weight.grad is not None
    assert not torch.allclose(weight.grad[0], weight.grad[1])


def test_what_is_no_multiple_is_refused() -> None:
    before, after = build_vae(NARROW), build_vae(replace(NARROW, decoder_block_out_channels=(8, 12, 4)))
    with pytest.raises(ValueError, match="does not stretch"):
        widened(after.state_dict(), before.state_dict(), torch.Generator())


def test_a_decoder_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks and the encoder 3"):
        replace(NARROW, decoder_block_out_channels=(8, 8))
