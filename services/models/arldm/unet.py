"""AR-LDM's UNet: Stable Diffusion's, looking at a context of which each row may see a part.

A context travels as states with a mask (`Context`), or as one text (`as_text`): the states that are seen, and in one
more column of each which row of it is one. So rows of stories of unlike length share a forward as those of any other
family do. Knows no caption, picture, file or sampler.

Shapes: B rows, K context states, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from services.models.stable_diffusion.unet import StableDiffusionUNet


@dataclass(frozen=True)
class Context:
    """What rows of the UNet look at: states, and which of them each row may see (True: seen). Each must see one."""

    states_BKD: Tensor
    seen_BK: Tensor

    def __post_init__(self) -> None:
        """Raises ValueError when the mask is not of these states: the library below would pad it and go on."""
        if self.seen_BK.dtype != torch.bool or self.seen_BK.shape != self.states_BKD.shape[:2]:
            raise ValueError(
                f"the mask is {self.seen_BK.dtype} {tuple(self.seen_BK.shape)} "
                f"and the states are {tuple(self.states_BKD.shape)}"
            )

    def trimmed(self) -> Context:
        """The same to look at, and less of it: hidden states dropped, rows filled up to the longest.

        Attention over K states of which some are hidden is attention over the others, in their order.
        """
        longest = int(self.seen_BK.sum(dim=1).max())
        if longest == self.seen_BK.shape[1]:
            return self
        kept_BK = self.seen_BK.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        index = kept_BK[:, :, None].expand(-1, -1, self.states_BKD.shape[2])
        return Context(self.states_BKD.gather(1, index), self.seen_BK.gather(1, kept_BK))

    @classmethod
    def joined(cls, *contexts: Context) -> Context:
        """The rows of several, one after another; shorter contexts are filled with hidden states."""
        longest = max(context.seen_BK.shape[1] for context in contexts)
        states, seen = [], []
        for context in contexts:
            short = longest - context.seen_BK.shape[1]
            states.append(F.pad(context.states_BKD, (0, 0, 0, short)))
            seen.append(F.pad(context.seen_BK, (0, short), value=False))
        return cls(torch.cat(states), torch.cat(seen))

    def as_text(self, length: int) -> Tensor:
        """`[B, length, D + 1]`: what is seen, zeros behind it, and in the last column 1 for what is seen.

        Raises ValueError when a row sees more than `length` states.
        """
        seen = self.trimmed()
        short = length - seen.seen_BK.shape[1]
        if short < 0:
            raise ValueError(f"a row sees {seen.seen_BK.shape[1]} states, more than {length}")
        told_BK1 = seen.seen_BK[..., None].to(seen.states_BKD.dtype)
        # What is hidden may hold anything; a text must not, for the same story must give the same text.
        return F.pad(torch.cat([seen.states_BKD * told_BK1, told_BK1], dim=2), (0, 0, 0, short))

    @classmethod
    def from_text(cls, text_BSD: Tensor) -> Context:
        """What `as_text` was made of, trimmed to the longest row."""
        return cls(text_BSD[..., :-1], text_BSD[..., -1] > 0.5).trimmed()


class ArldmUNet(StableDiffusionUNet):
    """The network, with Stable Diffusion's names. A row's text is a `Context.as_text`."""

    def answer(self, latents_BCHW: Tensor, timesteps_B: Tensor, context: Context) -> Tensor:
        """`[B, C, H, W]`: the noise that each row believes it sees."""
        words_BKD, told = self._shown(context, latents_BCHW.dtype)
        out: Tensor = self(latents_BCHW, timesteps_B, words_BKD, **told, return_dict=False)[0]
        return out

    def _told(self, latents_BCHW: Tensor, text_BSD: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self._shown(Context.from_text(text_BSD), latents_BCHW.dtype)

    @staticmethod
    def _shown(context: Context, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
        # diffusers makes a mask m the bias (1 − m)·(−10000), which a large state can outweigh; −∞ it cannot.
        mask_BK = torch.ones_like(context.seen_BK, dtype=dtype).masked_fill(~context.seen_BK, -torch.inf)
        return context.states_BKD.to(dtype), {"encoder_attention_mask": mask_BK}
