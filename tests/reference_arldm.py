"""AR-LDM written a second time, straight down, to compare the product with. Shares no code with it.

Source: Pan et al., "Synthesizing Coherent Story with Auto-Regressive Latent Diffusion Models" (arXiv 2211.10950), and
the facts in `MODELS.md` §2. Plain torch over one flat dictionary with the names of the published Lightning checkpoint:
no module, no library of networks, no clever mask, everything for every frame. Slow on purpose.

`layout` lists every name and shape of such a checkpoint; `Reference` computes with one.

Shapes: B stories, F frames of a story, S caption positions, D width of the context; masks here say True = hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that the shapes of the weights do not say, and what is needed to make random ones."""

    unet_channels: tuple[int, ...] = (16, 32)
    unet_attention: tuple[bool, ...] = (True, True)  # per down block
    unet_layers: int = 1
    unet_heads: int = 2
    unet_groups: int = 8
    vae_channels: tuple[int, ...] = (8, 16)
    vae_layers: int = 1
    vae_groups: int = 4
    width: int = 16  # D
    clip_layers: int = 2
    clip_heads: int = 2
    clip_words: int = 40
    positions: int = 11  # S
    vit_width: int = 24
    vit_layers: int = 2
    vit_heads: int = 3
    vit_image: int = 32
    vit_patch: int = 16
    bert_layers: int = 2
    bert_heads: int = 2
    bert_words: int = 36
    bert_positions: int = 32
    frames: int = 5


PUBLISHED = Sizes(
    unet_channels=(320, 640, 1280, 1280),
    unet_attention=(True, True, True, False),
    unet_layers=2,
    unet_heads=8,
    unet_groups=32,
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
    vae_groups=32,
    width=768,
    clip_layers=12,
    clip_heads=12,
    clip_words=49412,
    positions=91,
    vit_width=1024,
    vit_layers=24,
    vit_heads=16,
    vit_image=224,
    vit_patch=16,
    bert_layers=12,
    bert_heads=12,
    bert_words=30525,
    bert_positions=512,
)
"""FlintstonesSV's."""


# What a checkpoint holds.


def _linear(name: str, out: int, into: int, *, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _conv(name: str, out: int, into: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into, size, size)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _resnet(name: str, into: int, out: int, time: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", into)
    yield from _conv(f"{name}.conv1", out, into, 3)
    if time is not None:
        yield from _linear(f"{name}.time_emb_proj", out, time)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out, 3)
    if into != out:
        yield from _conv(f"{name}.conv_shortcut", out, into, 1)


def _spatial(name: str, width: int, context: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm", width)
    yield from _conv(f"{name}.proj_in", width, width, 1)
    block = f"{name}.transformer_blocks.0"
    for number, seen in (("1", width), ("2", context)):
        yield from _norm(f"{block}.norm{number}", width)
        yield from _linear(f"{block}.attn{number}.to_q", width, width, bias=False)
        yield from _linear(f"{block}.attn{number}.to_k", width, seen, bias=False)
        yield from _linear(f"{block}.attn{number}.to_v", width, seen, bias=False)
        yield from _linear(f"{block}.attn{number}.to_out.0", width, width)
    yield from _norm(f"{block}.norm3", width)
    yield from _linear(f"{block}.ff.net.0.proj", 8 * width, width)
    yield from _linear(f"{block}.ff.net.2", width, 4 * width)
    yield from _conv(f"{name}.proj_out", width, width, 1)


def _unet(s: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    channels, time = s.unet_channels, 4 * s.unet_channels[0]
    yield from _conv("unet.conv_in", channels[0], 4, 3)
    yield from _linear("unet.time_embedding.linear_1", time, channels[0])
    yield from _linear("unet.time_embedding.linear_2", time, time)
    skips = [channels[0]]
    here = channels[0]
    for i, out in enumerate(channels):
        name = f"unet.down_blocks.{i}"
        for j in range(s.unet_layers):
            yield from _resnet(f"{name}.resnets.{j}", here, out, time)
            if s.unet_attention[i]:
                yield from _spatial(f"{name}.attentions.{j}", out, s.width)
            here = out
            skips.append(out)
        if i < len(channels) - 1:
            yield from _conv(f"{name}.downsamplers.0.conv", out, out, 3)
            skips.append(out)
    yield from _resnet("unet.mid_block.resnets.0", here, here, time)
    yield from _spatial("unet.mid_block.attentions.0", here, s.width)
    yield from _resnet("unet.mid_block.resnets.1", here, here, time)
    for i, out in enumerate(reversed(channels)):
        name = f"unet.up_blocks.{i}"
        for j in range(s.unet_layers + 1):
            yield from _resnet(f"{name}.resnets.{j}", here + skips.pop(), out, time)
            if s.unet_attention[len(channels) - 1 - i]:
                yield from _spatial(f"{name}.attentions.{j}", out, s.width)
            here = out
        if i < len(channels) - 1:
            yield from _conv(f"{name}.upsamplers.0.conv", out, out, 3)
    yield from _norm("unet.conv_norm_out", here)
    yield from _conv("unet.conv_out", 4, here, 3)


def _vae_mid(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _resnet(f"{name}.resnets.0", width, width, None)
    yield from _norm(f"{name}.attentions.0.group_norm", width)
    for part in ("query", "key", "value", "proj_attn"):  # diffusers 0.7.2
        yield from _linear(f"{name}.attentions.0.{part}", width, width)
    yield from _resnet(f"{name}.resnets.1", width, width, None)


def _vae(s: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    channels = s.vae_channels
    yield from _conv("vae.encoder.conv_in", channels[0], 3, 3)
    here = channels[0]
    for i, out in enumerate(channels):
        for j in range(s.vae_layers):
            yield from _resnet(f"vae.encoder.down_blocks.{i}.resnets.{j}", here, out, None)
            here = out
        if i < len(channels) - 1:
            yield from _conv(f"vae.encoder.down_blocks.{i}.downsamplers.0.conv", out, out, 3)
    yield from _vae_mid("vae.encoder.mid_block", here)
    yield from _norm("vae.encoder.conv_norm_out", here)
    yield from _conv("vae.encoder.conv_out", 8, here, 3)
    yield from _conv("vae.quant_conv", 8, 8, 1)
    yield from _conv("vae.post_quant_conv", 4, 4, 1)
    yield from _conv("vae.decoder.conv_in", here, 4, 3)
    yield from _vae_mid("vae.decoder.mid_block", here)
    for i, out in enumerate(reversed(channels)):
        for j in range(s.vae_layers + 1):
            yield from _resnet(f"vae.decoder.up_blocks.{i}.resnets.{j}", here, out, None)
            here = out
        if i < len(channels) - 1:
            yield from _conv(f"vae.decoder.up_blocks.{i}.upsamplers.0.conv", out, out, 3)
    yield from _norm("vae.decoder.conv_norm_out", here)
    yield from _conv("vae.decoder.conv_out", 3, here, 3)


def _clip(s: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    top = "text_encoder.text_model"
    yield f"{top}.embeddings.position_ids", (1, s.positions)
    yield f"{top}.embeddings.token_embedding.weight", (s.clip_words, s.width)
    yield f"{top}.embeddings.position_embedding.weight", (s.positions, s.width)
    for i in range(s.clip_layers):
        layer = f"{top}.encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{part}", s.width, s.width)
        yield from _norm(f"{layer}.layer_norm1", s.width)
        yield from _linear(f"{layer}.mlp.fc1", 4 * s.width, s.width)
        yield from _linear(f"{layer}.mlp.fc2", s.width, 4 * s.width)
        yield from _norm(f"{layer}.layer_norm2", s.width)
    yield from _norm(f"{top}.final_layer_norm", s.width)


def _vit(s: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    top, width = "mm_encoder.visual_encoder", s.vit_width
    yield f"{top}.cls_token", (1, 1, width)
    yield f"{top}.pos_embed", (1, (s.vit_image // s.vit_patch) ** 2 + 1, width)
    yield from _conv(f"{top}.patch_embed.proj", width, 3, s.vit_patch)
    for i in range(s.vit_layers):
        block = f"{top}.blocks.{i}"
        yield from _norm(f"{block}.norm1", width)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.mlp.fc1", 4 * width, width)
        yield from _linear(f"{block}.mlp.fc2", width, 4 * width)
    yield from _norm(f"{top}.norm", width)


def _bert(s: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    top = "mm_encoder.text_encoder"
    yield f"{top}.embeddings.position_ids", (1, s.bert_positions)
    yield f"{top}.embeddings.word_embeddings.weight", (s.bert_words, s.width)
    yield f"{top}.embeddings.position_embeddings.weight", (s.bert_positions, s.width)
    yield from _norm(f"{top}.embeddings.LayerNorm", s.width)
    for i in range(s.bert_layers):
        layer = f"{top}.encoder.layer.{i}"
        for attention, seen in (("attention", s.width), ("crossattention", s.vit_width)):
            yield from _linear(f"{layer}.{attention}.self.query", s.width, s.width)
            yield from _linear(f"{layer}.{attention}.self.key", s.width, seen)
            yield from _linear(f"{layer}.{attention}.self.value", s.width, seen)
            yield from _linear(f"{layer}.{attention}.output.dense", s.width, s.width)
            yield from _norm(f"{layer}.{attention}.output.LayerNorm", s.width)
        yield from _linear(f"{layer}.intermediate.dense", 4 * s.width, s.width)
        yield from _linear(f"{layer}.output.dense", s.width, 4 * s.width)
        yield from _norm(f"{layer}.output.LayerNorm", s.width)


def layout(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Every name of a published checkpoint, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in (_clip, _vit, _bert, _vae, _unet):
        shapes.update(part(s))
    shapes["modal_type_embeddings.weight"] = (2, s.width)
    shapes["time_embeddings.weight"] = (s.frames, s.width)
    shapes["clip_text_null_token"] = (1, s.positions)
    shapes["blip_text_null_token"] = (1, s.positions)
    shapes["blip_image_null_token"] = (1, 3, s.vit_image, s.vit_image)
    return shapes


_INTEGERS = ("position_ids", "text_null_token")


def random_state(s: Sizes, seed: int) -> State:
    """Weights large enough that every part of the context moves the picture."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in layout(s).items():
        if name.endswith(_INTEGERS):
            state[name] = torch.arange(shape[1])[None] if name.endswith("ids") else torch.zeros(shape).long()
        elif len(shape) == 1:
            state[name] = torch.randn(shape, generator=generator) * 0.1 + float(name.endswith("weight"))
        elif name.endswith("embeddings.weight") or "embed" in name.split(".")[-1] or len(shape) == 3:
            state[name] = torch.randn(shape, generator=generator) * 0.7
        else:
            state[name] = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
    # A trained network's answers to nothing and to the story are close; guidance must not blow these up.
    state["unet.conv_out.weight"] *= 0.25
    return state


# What is computed with it.


def ddim_levels() -> Tensor:
    """The product of 1 − β of Stable Diffusion's thousand steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def blip_picture(picture_HW3: np.ndarray, size: int) -> Tensor:
    """An 8-bit picture as BLIP is shown it: `[3, size, size]`."""
    small = Image.fromarray(picture_HW3).resize((size, size), Image.Resampling.BILINEAR)
    values = torch.tensor(np.asarray(small), dtype=torch.float32).permute(2, 0, 1) / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, hidden: Tensor | None = None) -> Tensor:
    """Explicit softmax attention. `hidden` broadcasts to `[B, heads, Lq, Lk]`."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Reference:
    """A checkpoint and what AR-LDM does with it."""

    def __init__(self, state: State, sizes: Sizes) -> None:
        self.w, self.s = state, sizes

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def layer_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def group_norm(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        return F.group_norm(x, groups, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    # Encoders.

    def clip(self, ids: Tensor, real: Tensor | None) -> Tensor:
        top, length = "text_encoder.text_model", ids.shape[1]
        x = self.w[f"{top}.embeddings.token_embedding.weight"][ids]
        x = x + self.w[f"{top}.embeddings.position_embedding.weight"][:length]
        hidden = torch.ones(length, length).triu(1).bool()[None, None]
        if real is not None:
            hidden = hidden | ~real.bool()[:, None, None, :]
        for i in range(self.s.clip_layers):
            name = f"{top}.encoder.layers.{i}"
            n = self.layer_norm(f"{name}.layer_norm1", x, 1e-5)
            q, k, v = (self.linear(f"{name}.self_attn.{part}_proj", n) for part in "qkv")
            x = x + self.linear(f"{name}.self_attn.out_proj", attend(q, k, v, self.s.clip_heads, hidden))
            n = self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.layer_norm2", x, 1e-5))
            x = x + self.linear(f"{name}.mlp.fc2", n * torch.sigmoid(1.702 * n))
        return self.layer_norm(f"{top}.final_layer_norm", x, 1e-5)

    def vit(self, pictures: Tensor) -> Tensor:
        top = "mm_encoder.visual_encoder"
        patches = self.conv(f"{top}.patch_embed.proj", pictures, stride=self.s.vit_patch).flatten(2).transpose(1, 2)
        x = torch.cat([self.w[f"{top}.cls_token"].expand(len(pictures), -1, -1), patches], dim=1)
        x = x + self.w[f"{top}.pos_embed"]
        for i in range(self.s.vit_layers):
            name = f"{top}.blocks.{i}"
            q, k, v = self.linear(f"{name}.attn.qkv", self.layer_norm(f"{name}.norm1", x, 1e-6)).chunk(3, dim=-1)
            x = x + self.linear(f"{name}.attn.proj", attend(q, k, v, self.s.vit_heads))
            n = self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.norm2", x, 1e-6))
            x = x + self.linear(f"{name}.mlp.fc2", F.gelu(n))
        return self.layer_norm(f"{top}.norm", x, 1e-6)

    def blip(self, pictures: Tensor, ids: Tensor, real: Tensor | None, enc_id: int) -> Tensor:
        top = "mm_encoder.text_encoder"
        seen = self.vit(pictures)
        ids = ids.clone()
        ids[:, 0] = enc_id
        x = self.w[f"{top}.embeddings.word_embeddings.weight"][ids]
        x = x + self.w[f"{top}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.layer_norm(f"{top}.embeddings.LayerNorm", x, 1e-12)
        hidden = None if real is None else ~real.bool()[:, None, None, :]
        for i in range(self.s.bert_layers):
            name = f"{top}.encoder.layer.{i}"
            for attention, context, mask in (("attention", None, hidden), ("crossattention", seen, None)):
                part = f"{name}.{attention}"
                looked_at = x if context is None else context
                q = self.linear(f"{part}.self.query", x)
                k, v = self.linear(f"{part}.self.key", looked_at), self.linear(f"{part}.self.value", looked_at)
                out = self.linear(f"{part}.output.dense", attend(q, k, v, self.s.bert_heads, mask))
                x = self.layer_norm(f"{part}.output.LayerNorm", out + x, 1e-12)
            n = F.gelu(self.linear(f"{name}.intermediate.dense", x))
            x = self.layer_norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", n) + x, 1e-12)
        return x

    # The network and the autoencoder.

    def resnet(self, name: str, x: Tensor, time: Tensor | None, groups: int, eps: float) -> Tensor:
        n = self.conv(f"{name}.conv1", F.silu(self.group_norm(f"{name}.norm1", x, groups, eps)), padding=1)
        if time is not None:
            n = n + self.linear(f"{name}.time_emb_proj", F.silu(time))[:, :, None, None]
        n = self.conv(f"{name}.conv2", F.silu(self.group_norm(f"{name}.norm2", n, groups, eps)), padding=1)
        if f"{name}.conv_shortcut.weight" in self.w:
            x = self.conv(f"{name}.conv_shortcut", x)
        return x + n

    def block(self, name: str, x: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        """A transformer block: self-attention, attention to what `hidden` leaves of the context, a gated layer."""
        for number, seen, mask in (("1", None, None), ("2", context, hidden[:, None, None, :])):
            n = self.layer_norm(f"{name}.norm{number}", x, 1e-5)
            looked_at = n if seen is None else seen
            part = f"{name}.attn{number}"
            q, k, v = (self.linear(f"{part}.to_{p}", y) for p, y in (("q", n), ("k", looked_at), ("v", looked_at)))
            x = x + self.linear(f"{part}.to_out.0", attend(q, k, v, self.s.unet_heads, mask))
        up, gate = self.linear(f"{name}.ff.net.0.proj", self.layer_norm(f"{name}.norm3", x, 1e-5)).chunk(2, dim=-1)
        return x + self.linear(f"{name}.ff.net.2", up * F.gelu(gate))

    def spatial(self, name: str, x: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        n = self.conv(f"{name}.proj_in", self.group_norm(f"{name}.norm", x, self.s.unet_groups, 1e-6))
        height, width = n.shape[-2:]
        n = self.block(f"{name}.transformer_blocks.0", n.flatten(2).transpose(1, 2), context, hidden)
        return x + self.conv(f"{name}.proj_out", n.transpose(1, 2).unflatten(2, (height, width)))

    def unet(self, x: Tensor, t: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        s = self.s
        half = s.unet_channels[0] // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        time = torch.cat([angles.cos(), angles.sin()], dim=1)
        time = self.linear("unet.time_embedding.linear_2", F.silu(self.linear("unet.time_embedding.linear_1", time)))
        x = self.conv("unet.conv_in", x, padding=1)
        skips = [x]
        last = len(s.unet_channels) - 1
        for i in range(last + 1):
            name = f"unet.down_blocks.{i}"
            for j in range(s.unet_layers):
                x = self.resnet(f"{name}.resnets.{j}", x, time, s.unet_groups, 1e-5)
                if s.unet_attention[i]:
                    x = self.spatial(f"{name}.attentions.{j}", x, context, hidden)
                skips.append(x)
            if i < last:
                x = self.conv(f"{name}.downsamplers.0.conv", x, stride=2, padding=1)
                skips.append(x)
        x = self.resnet("unet.mid_block.resnets.0", x, time, s.unet_groups, 1e-5)
        x = self.spatial("unet.mid_block.attentions.0", x, context, hidden)
        x = self.resnet("unet.mid_block.resnets.1", x, time, s.unet_groups, 1e-5)
        for i in range(last + 1):
            name = f"unet.up_blocks.{i}"
            for j in range(s.unet_layers + 1):
                x = self.resnet(f"{name}.resnets.{j}", torch.cat([x, skips.pop()], 1), time, s.unet_groups, 1e-5)
                if s.unet_attention[last - i]:
                    x = self.spatial(f"{name}.attentions.{j}", x, context, hidden)
            if i < last:
                x = self.conv(f"{name}.upsamplers.0.conv", F.interpolate(x, skips[-1].shape[-2:]), padding=1)
        x = F.silu(self.group_norm("unet.conv_norm_out", x, s.unet_groups, 1e-5))
        return self.conv("unet.conv_out", x, padding=1)

    def vae_mid(self, name: str, x: Tensor) -> Tensor:
        x = self.resnet(f"{name}.resnets.0", x, None, self.s.vae_groups, 1e-6)
        part = f"{name}.attentions.0"
        n = self.group_norm(f"{part}.group_norm", x, self.s.vae_groups, 1e-6).flatten(2).transpose(1, 2)
        out = attend(*(self.linear(f"{part}.{p}", n) for p in ("query", "key", "value")), heads=1)
        x = x + self.linear(f"{part}.proj_attn", out).transpose(1, 2).unflatten(2, x.shape[-2:])
        return self.resnet(f"{name}.resnets.1", x, None, self.s.vae_groups, 1e-6)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in 0..1."""
        s = self.s
        x = self.conv("vae.decoder.conv_in", self.conv("vae.post_quant_conv", latents / 0.18215), padding=1)
        x = self.vae_mid("vae.decoder.mid_block", x)
        for i in range(len(s.vae_channels)):
            for j in range(s.vae_layers + 1):
                x = self.resnet(f"vae.decoder.up_blocks.{i}.resnets.{j}", x, None, s.vae_groups, 1e-6)
            if i < len(s.vae_channels) - 1:
                x = self.conv(
                    f"vae.decoder.up_blocks.{i}.upsamplers.0.conv", F.interpolate(x, scale_factor=2.0), padding=1
                )
        x = F.silu(self.group_norm("vae.decoder.conv_norm_out", x, s.vae_groups, 1e-6))
        return (self.conv("vae.decoder.conv_out", x, padding=1) / 2 + 0.5).clamp(0, 1)

    def encode_mean(self, pixels: Tensor) -> Tensor:
        """The mean latents of pixels in 0..1, scaled."""
        s = self.s
        x = self.conv("vae.encoder.conv_in", pixels * 2 - 1, padding=1)
        for i in range(len(s.vae_channels)):
            for j in range(s.vae_layers):
                x = self.resnet(f"vae.encoder.down_blocks.{i}.resnets.{j}", x, None, s.vae_groups, 1e-6)
            if i < len(s.vae_channels) - 1:
                x = self.conv(f"vae.encoder.down_blocks.{i}.downsamplers.0.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.vae_mid("vae.encoder.mid_block", x)
        x = F.silu(self.group_norm("vae.encoder.conv_norm_out", x, s.vae_groups, 1e-6))
        return self.conv("vae.quant_conv", self.conv("vae.encoder.conv_out", x, padding=1))[:, :4] * 0.18215

    # The context, as the published training and sampling build it: V drawn frames, `slots` of history, all of them
    # there for every frame, and a mask that hides what a frame may not see.

    def nothing(self, clip_null: Tensor, blip_null: Tensor, enc_id: int, slots: int) -> Tensor:
        """`[(slots + 1)·S, D]`: what guidance and dropout use instead."""
        black = blip_picture(np.zeros((self.s.vit_image, self.s.vit_image, 3), np.uint8), self.s.vit_image)[None]
        caption = self.clip(clip_null, None)[0] + self.w["modal_type_embeddings.weight"][0]
        history = self.blip(black, blip_null, None, enc_id)[0] + self.w["modal_type_embeddings.weight"][1]
        return torch.cat([caption] + [history + self.w["time_embeddings.weight"][j] for j in range(slots)])

    def contexts(
        self,
        clip_ids_VS: Tensor,
        clip_real_VS: Tensor,
        blip_ids_FS: Tensor,
        blip_real_FS: Tensor,
        pictures_F3HW: Tensor,
        enc_id: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one story: states `[V, (F + 1)·S, D]`, what is hidden `[V, (F + 1)·S]`, and what hides a null row's."""
        drawn, length = clip_ids_VS.shape
        slots = len(blip_ids_FS)
        captions = self.clip(clip_ids_VS, clip_real_VS) + self.w["modal_type_embeddings.weight"][0]
        history = self.blip(pictures_F3HW, blip_ids_FS, blip_real_FS, enc_id)
        history = history + self.w["modal_type_embeddings.weight"][1]
        history = torch.cat([history[j] + self.w["time_embeddings.weight"][j] for j in range(slots)])
        states = torch.stack([torch.cat([captions[i], history]) for i in range(drawn)])
        padding = torch.cat([~clip_real_VS.bool(), ~blip_real_FS.bool().reshape(1, -1).expand(drawn, -1)], dim=1)
        future = torch.zeros_like(padding)
        given = slots - drawn
        for i in range(drawn):
            for j in range(slots):
                if j >= given + i:  # its own picture and later ones
                    future[i, (1 + j) * length : (2 + j) * length] = True
        return states, padding | future, future

    def draw(
        self,
        clip_ids_VS: Tensor,
        clip_real_VS: Tensor,
        blip_ids_FS: Tensor,
        blip_real_FS: Tensor,
        given: list[np.ndarray],
        clip_null: Tensor,
        blip_null: Tensor,
        enc_id: int,
        noise_VCHW: Tensor,
        steps: int,
        guidance: float,
    ) -> tuple[Tensor, Tensor]:
        """One story: latents `[V, C, H, W]` and pixels `[V, 3, H, W]`, frame after frame."""
        size = self.s.vit_image
        # Slots of frames that are still to be drawn hold junk: no frame may see it.
        junk = torch.full((len(blip_ids_FS) - len(given), 3, size, size), 3.0)
        pictures = torch.cat([blip_picture(picture, size)[None] for picture in given] + [junk])
        alphas = ddim_levels()
        drawn_latents, drawn_pixels = [], []
        for i in range(len(clip_ids_VS)):
            states, hidden, future = self.contexts(
                clip_ids_VS, clip_real_VS, blip_ids_FS, blip_real_FS, pictures, enc_id
            )
            null = self.nothing(clip_null, blip_null, enc_id, len(blip_ids_FS))
            context = torch.stack([null, states[i]])
            mask = torch.stack([future[i], hidden[i]])
            x = noise_VCHW[i][None]
            stride = 1000 // steps
            for t in [k * stride for k in reversed(range(steps))]:
                without, within = self.unet(x.repeat(2, 1, 1, 1), torch.tensor([t, t]), context, mask)
                eps = (without + guidance * (within - without))[None]
                a = float(alphas[t])
                a_next = float(alphas[t - stride]) if t - stride >= 0 else 1.0
                clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
                x = math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * eps
            pixels = self.decode(x)
            drawn_latents.append(x[0])
            drawn_pixels.append(pixels[0])
            picture = (pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            pictures[len(given) + i] = blip_picture(picture, size)
        return torch.stack(drawn_latents), torch.stack(drawn_pixels)

    def loss(
        self,
        clip_ids_VS: Tensor,
        clip_real_VS: Tensor,
        blip_ids_FS: Tensor,
        blip_real_FS: Tensor,
        pictures_F3HW: Tensor,
        clip_null: Tensor,
        blip_null: Tensor,
        enc_id: int,
        latents_VCHW: Tensor,
        noise_VCHW: Tensor,
        t_V: Tensor,
        dropped_V: Tensor,
    ) -> Tensor:
        """Of one story, per frame `[V]`."""
        states, hidden, future = self.contexts(
            clip_ids_VS, clip_real_VS, blip_ids_FS, blip_real_FS, pictures_F3HW, enc_id
        )
        null = self.nothing(clip_null, blip_null, enc_id, len(blip_ids_FS))
        states = torch.where(dropped_V[:, None, None], null, states)
        hidden = torch.where(dropped_V[:, None], future, hidden)
        alphas = ddim_levels().float()[t_V][:, None, None, None]
        noisy = alphas.sqrt() * latents_VCHW + (1 - alphas).sqrt() * noise_VCHW
        return (self.unet(noisy, t_V, states, hidden) - noise_VCHW).square().mean(dim=(1, 2, 3))
