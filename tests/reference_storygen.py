"""StoryGen written a second time, straight down, to compare the product with. Shares no code with it.

Source: Liu et al., "Intelligent Grimm" (arXiv 2306.00973), and the facts in `MODELS.md` §1. Plain torch over one flat
dictionary with the names of the published folders (`unet.…`, `vae.…`, `text_encoder.…`), on the second implementation
of Stable Diffusion 1.x in `reference_arldm.py`. Every row is computed in every guidance branch, one reference after the
other, as the published pipeline does it. Slow on purpose.

Shapes: N references, oldest first; C channels, h and w of latents; S text positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference_arldm import Reference, Sizes, State, attend, ddim_levels

Stage = Literal["auto-regressive", "multi-image-condition"]
NOISE_PARTS = 20.0  # bounds of the logarithm of a posterior's variance
SCALE = 0.18215


class Numbers(NamedTuple):
    """Every random number of a frame."""

    start_CHW: Tensor
    reference_noise_CHW: Tensor  # one for all references and all steps
    blank_CHW: Tensor  # of the blank picture's posterior
    pictures_NCHW: Tensor  # of the references' posteriors


class StoryGen(Reference):
    """A checkpoint and what StoryGen does with it. `left` is what blocks left in the last call of the network."""

    def __init__(self, state: State, sizes: Sizes) -> None:
        super().__init__(state, sizes)
        self.left: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] | None = None

    def block(self, name: str, x: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        """With references, two branches that both carry the residual; nothing normalises what is looked at."""

        def branch(number: int, norm: int, seen: Tensor | None) -> Tensor:
            n = self.layer_norm(f"{name}.norm{norm}", h, 1e-5)
            looked_at = n if seen is None else seen
            part = f"{name}.attn{number}"
            q, k, v = (self.linear(f"{part}.to_{p}", y) for p, y in (("q", n), ("k", looked_at), ("v", looked_at)))
            return self.linear(f"{part}.to_out.0", attend(q, k, v, self.s.unet_heads)) + h

        h = x
        h = branch(1, 1, None)
        self.left[name.removeprefix("unet.")] = h
        out = branch(2, 2, context)
        if self.seen is not None:
            out = out + branch(3, 4, self.seen[name.removeprefix("unet.")])
        up, gate = self.linear(f"{name}.ff.net.0.proj", self.layer_norm(f"{name}.norm3", out, 1e-5)).chunk(2, dim=-1)
        return out + self.linear(f"{name}.ff.net.2", up * F.gelu(gate))

    def call(self, x: Tensor, t: int, text: Tensor, seen: dict[str, Tensor] | None = None) -> Tensor:
        """The network's answer about rows that all stand at step `t`."""
        self.left, self.seen = {}, seen
        nothing_hidden = torch.zeros(text.shape[:2], dtype=torch.bool)
        return self.unet(x, torch.full((len(x),), t), text, nothing_hidden)

    def encode(self, values: Tensor, noise: Tensor) -> Tensor:
        """Latents drawn from the posterior of pictures, in whatever range their values are."""
        s = self.s
        x = self.conv("vae.encoder.conv_in", values, padding=1)
        for i in range(len(s.vae_channels)):
            for j in range(s.vae_layers):
                x = self.resnet(f"vae.encoder.down_blocks.{i}.resnets.{j}", x, None, s.vae_groups, 1e-6)
            if i < len(s.vae_channels) - 1:
                x = self.conv(f"vae.encoder.down_blocks.{i}.downsamplers.0.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.vae_mid("vae.encoder.mid_block", x)
        x = F.silu(self.group_norm("vae.encoder.conv_norm_out", x, s.vae_groups, 1e-6))
        moments = self.conv("vae.quant_conv", self.conv("vae.encoder.conv_out", x, padding=1))
        mean, log_variance = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, NOISE_PARTS))
        return (mean + deviation * noise) * SCALE

    def draw(
        self,
        *,
        prompt_ids: Tensor,
        empty_ids: Tensor,
        previous_ids: Sequence[Tensor],
        pictures_N3HW: Tensor,  # 0..1: the published weights were trained on such references
        numbers: Numbers,
        steps: int,
        text_scale: float,
        image_scale: float,
        stage: Stage = "auto-regressive",
    ) -> Tensor:
        """Latents of one frame, `[C, h, w]`. Token ids are `[S]`."""
        levels = ddim_levels()
        uncond, prompt = (self.clip(ids[None], None) for ids in (empty_ids, prompt_ids))
        previous = [self.clip(ids[None], None) for ids in previous_ids]
        count = len(previous)
        zero = images = torch.empty(0)
        if count:
            zero = self.encode(torch.zeros_like(pictures_N3HW[:1]), numbers.blank_CHW[None])
            images = self.encode(pictures_N3HW, numbers.pictures_NCHW)

        def noised(clean: Tensor, level: int) -> Tensor:
            signal, noise = levels[level].sqrt().float(), (1 - levels[level]).sqrt().float()
            return signal * clean + noise * numbers.reference_noise_CHW

        x = numbers.start_CHW[None]
        stride = 1000 // steps
        for t in range((steps - 1) * stride + 1, 0, -stride):
            seen = None
            if count:
                parts: list[dict[str, Tensor]] = []
                for i in range(count):
                    level = t // 10 * (count - i if stage == "auto-regressive" else 1)
                    picture = noised(images[i : i + 1], level)
                    rows = torch.cat([noised(zero, level), picture, picture])
                    self.call(rows, level, torch.cat([uncond, previous[i], previous[i]]))
                    parts.append(self.left)
                seen = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
            answers = self.call(torch.cat([x, x, x]), t, torch.cat([uncond, uncond, prompt]), seen)
            e_u, e_img, e_all = answers.chunk(3)
            noise = e_u + image_scale * (e_img - e_u) + text_scale * (e_all - e_img)
            here, there = levels[t], levels[max(t - stride, 0)]
            clean = (x - (1 - here).sqrt() * noise) / here.sqrt()
            x = (there.sqrt() * clean + (1 - there).sqrt() * noise).float()
        return x[0]
