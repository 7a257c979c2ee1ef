"""StoryGen's UNet: Stable Diffusion's UNet whose transformer blocks also look at earlier frames.

Each transformer block gains `attn3` and `norm4`. A reference pass (`features`) runs the same network over a noised
earlier frame and keeps each block's hidden states; `project` makes them `attn3`'s keys and values, once however many
frames look at them; a main pass (`predict`) hands these back to the block they came from.
Source: Liu et al., "Intelligent Grimm" (StoryGen); the layout of the published checkpoint is kept: 798 keys for the
Stable Diffusion 1.5 configuration.

Blocks are matched by their place in the network, never by the size of their input, so any picture size works.
Nothing is remembered between calls: features travel as arguments.

Shapes: B main rows, R reference rows, N reference slots of a main row, L latent pixels of a block, D its width,
S text positions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.shape import config_values

if TYPE_CHECKING:  # diffusers exports its classes lazily, which hides their base from the type checker
    _Base: TypeAlias = nn.Module
else:
    _Base = UNet2DConditionModel

_ARGUMENT = "storygen"  # our entry in diffusers' cross_attention_kwargs, which every transformer block receives


@dataclass(frozen=True, kw_only=True)
class StoryGenConfig:
    """The shape of a StoryGen UNet, in diffusers' own field names. The defaults are Stable Diffusion 1.5's."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8  # diffusers' misnomer: the number of heads, per block if a tuple
    norm_num_groups: int = 32

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StoryGenConfig:
        """Read a `config.json`. Raises ValueError naming a key that is unknown."""
        return cls(**config_values(cls, values, "UNet"))

    def to_dict(self) -> dict[str, Any]:
        """The same, for `config.json`."""
        return asdict(self)


class KeyValue(NamedTuple):
    """One block's features as its `attn3` reads them, `[R, L, C]` each."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class References:
    """What reference passes left, and which main row looks at which of them.

    `projected` is `project`'s, by block. `rows_BN` gives, per main row, the reference rows it sees;
    `present_BN` is False where a slot is empty (its row number is then ignored). None means all slots are filled.
    """

    projected: Mapping[str, KeyValue]
    rows_BN: Tensor
    present_BN: Tensor | None = None


Told: TypeAlias = Mapping[str, KeyValue]
"""By block, texts as its `attn2` reads them, `[B, S, C]` each: `StoryGenUNet.read`."""


class _Enough(Exception):
    """The last block has left its features: what comes after it would only make a picture that nobody looks at."""


@dataclass
class _Pass:
    """What the blocks of one forward need: where to put features, or which to look at."""

    collected: dict[str, Tensor] | None = None
    blocks_count: int = 0  # that are to leave features
    references: References | None = None
    told: Told | None = None  # else each block reads the texts itself
    # The same for all blocks of a main pass, so computed once.
    any_present_B: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.references is not None and self.references.present_BN is not None:
            self.any_present_B = self.references.present_BN.any(dim=1)


class ReferenceAttention(nn.Module):
    """Attention from a frame to the features of earlier frames, with diffusers' parameter names.

    Keys and values are projected once per reference row and shared by all main rows that look at it, the guidance
    branches of one frame and, where the row is the same, other frames.
    """

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(0.0)])

    def project(self, features_RLD: Tensor) -> KeyValue:
        """Keys and values of a reference pass."""
        return KeyValue(self.to_k(features_RLD), self.to_v(features_RLD))

    def forward(self, query_BLD: Tensor, seen: KeyValue, rows_BN: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """`[B, L, D]`. Rows of `mask_BN` must hold at least one True."""
        batch, length, _ = query_BLD.shape
        tokens, slots = seen.key.shape[1], rows_BN.shape[1]
        query = self.to_q(query_BLD).view(batch, length, self.heads, -1).transpose(1, 2)
        key, value = self._gather(seen.key, rows_BN), self._gather(seen.value, rows_BN)
        mask = None
        if mask_BN is not None:
            mask = mask_BN[:, :, None].expand(batch, slots, tokens).reshape(batch, 1, 1, slots * tokens)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.to_out[0](attended.transpose(1, 2).reshape(batch, length, -1))
        return out

    def _gather(self, projected_RLC: Tensor, rows_BN: Tensor) -> Tensor:
        """`[B, heads, N·L, C/heads]`: the slots of a row side by side, as if they were one long context."""
        batch, slots = rows_BN.shape
        picked = projected_RLC[rows_BN.reshape(-1)]
        return picked.view(batch, slots * picked.shape[1], self.heads, -1).transpose(1, 2)


class StoryGenBlock(nn.Module):
    """A transformer block that also attends to reference features. Keeps the parameter names of the block it replaces.

    With references the residual counts twice (h_text + h_image, each with its own h): the published weights were
    trained so, and therefore "blank references" is not the same as "no references".
    """

    def __init__(self, plain: BasicTransformerBlock, key: str) -> None:
        super().__init__()
        self.key = key
        self.norm1, self.attn1 = plain.norm1, plain.attn1
        self.norm2, self.attn2 = plain.norm2, plain.attn2
        self.norm3, self.ff = plain.norm3, plain.ff
        self.attn3 = ReferenceAttention(plain.dim, plain.num_attention_heads, plain.attention_head_dim)
        self.norm4 = nn.LayerNorm(plain.dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """`[B, L, D]` in and out. Same arguments as the block it replaces, which does not use the last two either."""
        current: _Pass = (cross_attention_kwargs or {}).get(_ARGUMENT) or _Pass()
        h: Tensor = hidden_states + self.attn1(self.norm1(hidden_states), attention_mask=attention_mask)
        if current.collected is not None:
            current.collected[self.key] = h
            if len(current.collected) == current.blocks_count:
                raise _Enough
        if current.told is None:
            text = self.attn2(
                self.norm2(h), encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
            )
        else:
            text = self._text_branch(h, current.told[self.key])
        combined = text + h
        if current.references is not None:
            combined = combined + self._image_branch(h, current.references, current.any_present_B)
        out: Tensor = combined + self.ff(self.norm3(combined))
        return out

    def _text_branch(self, h: Tensor, told: KeyValue) -> Tensor:
        """What `attn2` computes, from keys and values that are there already."""
        query, key, value = (
            one.unflatten(-1, (self.attn2.heads, -1)).transpose(1, 2)
            for one in (self.attn2.to_q(self.norm2(h)), told.key, told.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.attn2.to_out[0](attended.transpose(1, 2).flatten(2))
        return out

    def _image_branch(self, h: Tensor, references: References, any_present_B: Tensor | None) -> Tensor:
        mask_BN = references.present_BN
        if mask_BN is not None and any_present_B is not None:
            # A row without any reference still goes through the arithmetic of its batch; letting it attend to
            # something keeps its softmax defined, and its result is thrown away below.
            mask_BN = mask_BN | ~any_present_B[:, None]
        image: Tensor = self.attn3(self.norm4(h), references.projected[self.key], references.rows_BN, mask_BN) + h
        if any_present_B is None:
            return image
        kept: Tensor = torch.where(any_present_B[:, None, None], image, torch.zeros_like(image))
        return kept


class StoryGenUNet(_Base):
    """The network. `features` for earlier frames, `predict` for the frame being drawn.

    Rows are independent: each has its own timestep, text and references, and no operation mixes them.
    """

    # Keeps the parent's signature visible: diffusers reads it to know which config keys exist.
    @functools.wraps(_Base.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, module in list(self.named_modules()):
            if isinstance(module, BasicTransformerBlock):
                parent, _, child = name.rpartition(".")
                self.get_submodule(parent).register_module(child, StoryGenBlock(module, key=name))

    @property
    def block_keys(self) -> tuple[str, ...]:
        """The keys of `features`: each block's place in the network."""
        return tuple(block.key for block in self._blocks)

    @functools.cached_property
    def _blocks(self) -> tuple[StoryGenBlock, ...]:
        return tuple(module for module in self.modules() if isinstance(module, StoryGenBlock))

    def read(self, text_TSD: Tensor) -> dict[str, KeyValue]:
        """Texts as every block reads them. They depend on no step, so a frame needs them once: `told` of the others."""
        return {block.key: KeyValue(block.attn2.to_k(text_TSD), block.attn2.to_v(text_TSD)) for block in self._blocks}

    def features(
        self, latents_RCHW: Tensor, timesteps_R: Tensor, text_RSD: Tensor, told: Told | None = None
    ) -> dict[str, Tensor]:
        """Reference pass: per block `[R, L, D]`, the states after self-attention and before the text, un-normalised."""
        collected: dict[str, Tensor] = {}
        current = _Pass(collected=collected, blocks_count=len(self._blocks), told=told)
        with contextlib.suppress(_Enough):
            self(latents_RCHW, timesteps_R, text_RSD, cross_attention_kwargs={_ARGUMENT: current}, return_dict=False)
        return collected

    def project(self, features: Mapping[str, Tensor]) -> dict[str, KeyValue]:
        """What `References` hold: each block's keys and values, with its own `attn3`."""
        return {block.key: block.attn3.project(features[block.key]) for block in self._blocks}

    def predict(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BSD: Tensor,
        references: References | None = None,
        told: Told | None = None,
    ) -> Tensor:
        """`[B, C, H, W]`: the network's answer, noise or velocity as its schedule says."""
        current = _Pass(references=references, told=told)
        out: Tensor = self(
            latents_BCHW, timesteps_B, text_BSD, cross_attention_kwargs={_ARGUMENT: current}, return_dict=False
        )[0]
        return out

    def predict_and_keep(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BSD: Tensor,
        references: References | None = None,
        told: Told | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`predict`, and the states `[B, C', h, w]` that entered the last block: all that the deep blocks made."""
        deep: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            deep.append(named["hidden_states"] if "hidden_states" in named else given[0])

        up_blocks: Any = self.up_blocks
        hook = up_blocks[-1].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            answer = self.predict(latents_BCHW, timesteps_B, text_BSD, references, told)
        finally:
            hook.remove()
        return answer, deep[0]

    def predict_shallow(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BSD: Tensor,
        deep_BCHW: Tensor,
        references: References | None = None,
        told: Told | None = None,
    ) -> Tensor:
        """`predict` with the deep blocks' states of an earlier step: only the first and the last block are computed.

        Ma et al., "DeepCache" (arXiv 2312.00858), with the branch at the outermost skip connection.
        """
        shared: dict[str, Any] = {
            "encoder_hidden_states": text_BSD,
            "cross_attention_kwargs": {_ARGUMENT: _Pass(references=references, told=told)},
        }
        net: Any = self  # torch types a module's children as tensors, too
        time = net.time_embedding(net.get_time_embed(sample=latents_BCHW, timestep=timesteps_B))
        first, last = net.down_blocks[0], net.up_blocks[-1]
        states = net.conv_in(latents_BCHW)
        _, skipped = first(states, time, **_for(first, shared))
        # What the first block shrank belongs to the deeper blocks.
        skips = (states, *skipped)[: len(last.resnets)]
        states = last(deep_BCHW, skips, time, **_for(last, shared))
        if net.conv_norm_out:
            states = net.conv_act(net.conv_norm_out(states))
        out: Tensor = net.conv_out(states)
        return out

    def start_references_from_self_attention(self) -> None:
        """Copy `attn1` into `attn3` and `norm1` into `norm4`, as StoryGen does when it starts from a plain UNet."""
        for block in self.modules():
            if isinstance(block, StoryGenBlock):
                block.attn3.load_state_dict(block.attn1.state_dict())
                block.norm4.load_state_dict(block.norm1.state_dict())


def _for(block: nn.Module, shared: dict[str, Any]) -> dict[str, Any]:
    """The arguments that only a block with attention takes."""
    return shared if getattr(block, "has_cross_attention", False) else {}


def build_storygen(config: StoryGenConfig) -> StoryGenUNet:
    """A StoryGen UNet with fresh weights from torch's global generator, in eval mode.

    Build it under `torch.device("meta")` to see its keys without its memory.
    """
    unet: StoryGenUNet = StoryGenUNet(**config.to_dict())
    unet.eval()
    return unet
