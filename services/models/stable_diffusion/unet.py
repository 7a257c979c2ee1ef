"""The UNets of Stable Diffusion 1.x, 2.x, XL and their Turbo kin, in the form the frame engine steps.

The network is diffusers' own, with its names, so that adapters fit by name. It cannot look at earlier frames. What XL
is told besides a text's words, the pooled vector, comes as the last row of the text; the sizes it is told follow from
the latents.

Shapes: B rows, S text positions (XL: one more, the pooled vector's), D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from services.models.storygen import References

if TYPE_CHECKING:  # diffusers exports its classes lazily, which hides their base from the type checker
    _Base: TypeAlias = nn.Module
else:
    _Base = UNet2DConditionModel

PIXELS_PER_LATENT = 8  # along each side, of every autoencoder that was trained with these
SIZE_NUMBERS = 6  # XL is told the original size, where it was cropped, and the wanted size: two numbers each
_BLIND = "a Stable Diffusion UNet does not look at earlier frames"
_FIXED = {
    "class_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "num_class_embeds": None,
    "center_input_sample": False,
}
"""What another value of would ask for inputs, or arithmetic, that the engine does not give."""


class StableDiffusionUNet(_Base):
    """The network. Rows are independent: each has its own timestep and text, and no operation mixes them."""

    @property
    def pooled_width(self) -> int:
        """Of the vector that XL reads in the text's last row; 0 for a network that reads none."""
        config: Any = self.config
        if config.addition_embed_type is None:
            return 0
        return int(config.projection_class_embeddings_input_dim - SIZE_NUMBERS * config.addition_time_embed_dim)

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BSD: Tensor, references: References | None = None
    ) -> Tensor:
        """`[B, C, H, W]`: the network's answer, noise or velocity as its schedule says.

        Here as below, references raise TypeError.
        """
        _refuse(references)
        words_BSD, told = self._told(latents_BCHW, text_BSD)
        out: Tensor = self(latents_BCHW, timesteps_B, words_BSD, **told, return_dict=False)[0]
        return out

    def predict_and_keep(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BSD: Tensor, references: References | None = None
    ) -> tuple[Tensor, Tensor]:
        """`predict`, and the states `[B, C', h, w]` that entered the last block: all that the deep blocks made."""
        deep: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            deep.append(named["hidden_states"] if "hidden_states" in named else given[0])

        up_blocks: Any = self.up_blocks
        hook = up_blocks[-1].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            answer = self.predict(latents_BCHW, timesteps_B, text_BSD, references)
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
    ) -> Tensor:
        """`predict` with the deep blocks' states of an earlier step, as `StoryGenUNet.predict_shallow` does it."""
        _refuse(references)
        net: Any = self  # torch types a module's children as tensors, too
        words_BSD, told = self._told(latents_BCHW, text_BSD)
        time = net.time_embedding(net.get_time_embed(sample=latents_BCHW, timestep=timesteps_B))
        extra = told.get("added_cond_kwargs", {})
        added = net.get_aug_embed(emb=time, encoder_hidden_states=words_BSD, added_cond_kwargs=extra)
        time = time if added is None else time + added
        first, last = net.down_blocks[0], net.up_blocks[-1]
        states = net.conv_in(latents_BCHW)
        _, skipped = first(states, time, **_for(first, words_BSD, told))
        skips = (states, *skipped)[: len(last.resnets)]
        states = last(deep_BCHW, skips, time, **_for(last, words_BSD, told))
        if net.conv_norm_out:
            states = net.conv_act(net.conv_norm_out(states))
        out: Tensor = net.conv_out(states)
        return out

    def features(self, latents_RCHW: Tensor, timesteps_R: Tensor, text_RSD: Tensor) -> NoReturn:
        """Raises TypeError: a pack of these takes no references, so nobody asks."""
        raise TypeError(_BLIND)

    def project(self, features: Mapping[str, Tensor]) -> NoReturn:
        """Raises TypeError, as `features`."""
        raise TypeError(_BLIND)

    def _told(self, latents_BCHW: Tensor, text_BSD: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The words' vectors, and what `forward` is told besides them, by its arguments' names.

        XL is told that the picture is whole and of the size that is drawn.
        """
        width = self.pooled_width
        if not width:
            return text_BSD, {}
        height_px, width_px = (side * PIXELS_PER_LATENT for side in latents_BCHW.shape[2:])
        # Filled on the device: copied from the host, the numbers could not be part of a recording (`models/graphs.py`).
        sides = [text_BSD.new_full((1,), side, dtype=torch.float32) for side in (height_px, width_px)]
        cropped = text_BSD.new_zeros(2, dtype=torch.float32)
        sizes = torch.cat([*sides, cropped, *sides])
        pooled_BD = text_BSD[:, -1, :width]
        told = {"text_embeds": pooled_BD, "time_ids": sizes.expand(len(text_BSD), -1)}
        return text_BSD[:, :-1], {"added_cond_kwargs": told}


def _refuse(references: References | None) -> None:
    if references is not None:
        raise TypeError(_BLIND)


def _for(block: nn.Module, words_BSD: Tensor, told: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that only a block with attention takes. What masks words is a bias there, as `forward` makes it."""
    if not getattr(block, "has_cross_attention", False):
        return {}
    mask_BS = told.get("encoder_attention_mask")
    bias_B1S = None if mask_BS is None else ((1.0 - mask_BS) * -10000.0)[:, None]
    return {"encoder_hidden_states": words_BSD, "encoder_attention_mask": bias_B1S}


def build_stable_diffusion_unet(values: Mapping[str, Any], *, is_xl: bool) -> StableDiffusionUNet:
    """The network of a published `config.json`, with fresh weights, in eval mode.

    Build it under `torch.device("meta")` to see its keys without its memory. Raises ValueError for a key that is
    unknown and for a network that is none of these: one that fills masks, or that is told its guidance.
    """
    kept = {name: value for name, value in values.items() if not name.startswith("_")}
    known = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    if unknown := sorted(set(kept) - known):
        raise ValueError(f"unknown keys in the config of the UNet: {', '.join(unknown)}")
    wanted = {**_FIXED, "addition_embed_type": "text_time" if is_xl else None}
    for name, value in wanted.items():
        if kept.get(name, value) != value or (name == "addition_embed_type" and kept.get(name) != value):
            raise ValueError(f"{name} of the UNet is {kept.get(name)!r}, this architecture's is {value!r}")
    unet: StableDiffusionUNet = StableDiffusionUNet(**kept)
    if is_xl and unet.pooled_width < 1:
        raise ValueError("the UNet's projection_class_embeddings_input_dim leaves no room for a pooled text")
    unet.eval()
    return unet
