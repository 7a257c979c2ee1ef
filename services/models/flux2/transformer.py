"""FLUX.2 Klein's transformer, in the form the frame engine steps.

The network is diffusers' own, with its names, so that adapters fit by name. It reads a sequence: the text, the picture
that is drawn, and every earlier frame as it is, without noise and without its caption. Which of the tokens is which is
told by where they stand: a position has four numbers, of the picture, its row, its column and the word. The picture
that is drawn has number 0, and earlier frames 10, 20, … in their order.

Klein looks at earlier frames in every forward. Its second kind (`Flux2KvNetwork`) was trained so that their tokens see
nobody else and know no noise level: what they leave in every block, keys and values, is computed once a frame.
Knows no text, picture, file, sampler or batch scheduling.

Shapes: B rows, R earlier frames, N of them that a row sees, C channels of a latent pixel (2×2 of the autoencoder's),
L latent pixels of a picture, S text positions, D width of the text's vectors, H heads, K width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVParallelSelfAttnProcessor,
)
from torch import Tensor, nn

from services.models.storygen import KeyValue, References

if TYPE_CHECKING:  # diffusers exports its classes lazily, which hides their base from the type checker
    _Base: TypeAlias = nn.Module
else:
    _Base = Flux2Transformer2DModel

PICTURES = "pictures"  # the only block of what an earlier frame leaves: its own tokens
BETWEEN_PICTURES = 10  # positions along the first axis from one picture to the next
_TRAIN_STEPS = 1000.0  # the network's own: it is told the part of them that is noise
_WHOLE = "a diffusion transformer has no deep blocks of its own: every block works at full size"
_FIXED = {"patch_size": 1, "out_channels": None, "guidance_embeds": False}
"""What another value of would ask for inputs, or arithmetic, that the engine does not give."""


class Flux2Network(_Base):
    """The network. Rows are independent: each has its own timestep, text and earlier frames, and none mixes them."""

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BSD: Tensor, references: References | None = None
    ) -> Tensor:
        """`[B, C, H, W]`: the direction from picture to noise.

        A row sees its earlier frames in the order of its slots, and all rows as many. (Tokens that nobody may look at
        would cost as much as the others.) Raises ValueError where they do not.
        """
        height, width = latents_BCHW.shape[2:]
        tokens = packed(latents_BCHW)
        count = 0
        if references is not None:
            _check_alike(references)
            seen_BNLC = references.projected[PICTURES].key[references.rows_BN].to(tokens)
            count = seen_BNLC.shape[1]
            tokens = torch.cat([tokens, seen_BNLC.flatten(1, 2)], dim=1)
        positions = picture_positions([0, *earlier(count)], height, width)
        out = self._forward(tokens, positions, timesteps_B, text_BSD)
        return unpacked(out[:, : height * width], height, width)

    def predict_and_keep(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BSD: Tensor, references: References | None = None
    ) -> NoReturn:
        """Raises TypeError: who draws with it uses no block's states twice (`FrameModel.has_deep_blocks`)."""
        raise TypeError(_WHOLE)

    def predict_shallow(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BSD: Tensor,
        deep_BCHW: Tensor,
        references: References | None = None,
    ) -> NoReturn:
        """Raises TypeError, as `predict_and_keep`."""
        raise TypeError(_WHOLE)

    def features(self, latents_RCHW: Tensor, timesteps_R: Tensor, text_RSD: Tensor) -> dict[str, Tensor]:
        """What the earlier frames of one frame leave: their tokens, `[R, L, C]`. Neither noise nor text counts."""
        return {PICTURES: packed(latents_RCHW)}

    def project(self, features: Mapping[str, Tensor]) -> dict[str, KeyValue]:
        """The same for `References`; there is nothing to compute once."""
        return {name: KeyValue(tokens, tokens[..., :0]) for name, tokens in features.items()}

    def _forward(
        self,
        tokens_BLC: Tensor,
        positions_L4: Tensor,
        timesteps_B: Tensor,
        text_BSD: Tensor,
        **more: Any,
    ) -> Tensor:
        """diffusers' forward; the tokens' answers, `[B, L, C]`."""
        device = tokens_BLC.device
        out: Tensor = self(
            hidden_states=tokens_BLC,
            encoder_hidden_states=text_BSD,
            timestep=timesteps_B.to(torch.float32) / _TRAIN_STEPS,
            img_ids=positions_L4.to(device),
            txt_ids=text_positions(text_BSD.shape[1]).to(device),
            return_dict=False,
            **more,
        )[0]
        return out


class Flux2KvNetwork(Flux2Network):
    """The kind whose earlier frames are read once a frame: they see each other, and neither the text nor the noise."""

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BSD: Tensor, references: References | None = None
    ) -> Tensor:
        """As `Flux2Network`."""
        if references is None:
            return super().predict(latents_BCHW, timesteps_B, text_BSD)
        _check_alike(references)
        height, width = latents_BCHW.shape[2:]
        net: Any = self  # torch types a module's children as tensors, too
        heads = net.config.num_attention_heads
        cache = Flux2KVCache(len(net.transformer_blocks), len(net.single_transformer_blocks))
        cache.num_ref_tokens = references.rows_BN.shape[1] * height * width
        for name, layer in _layers(cache):
            seen = (part[references.rows_BN].flatten(1, 2) for part in references.projected[name])
            layer.store(*(part.view(*part.shape[:2], heads, -1).to(latents_BCHW.dtype) for part in seen))
        out = self._forward(
            packed(latents_BCHW),
            picture_positions([0], height, width),
            timesteps_B,
            text_BSD,
            kv_cache=cache,
            kv_cache_mode="cached",
        )
        return unpacked(out, height, width)

    def features(self, latents_RCHW: Tensor, timesteps_R: Tensor, text_RSD: Tensor) -> dict[str, Tensor]:
        """What the earlier frames of one frame leave together, `[R, L, 2·H·K]` by block: keys, and behind them values.

        They are all that their tokens see. The text that is asked for is one that nobody reads.
        """
        rows, _, height, width = latents_RCHW.shape
        net: Any = self
        own_tokens = packed(latents_RCHW)
        out = net(
            hidden_states=own_tokens.flatten(0, 1)[None],
            encoder_hidden_states=text_RSD[:1, :1],
            timestep=torch.zeros(1, device=own_tokens.device),
            img_ids=picture_positions(earlier(rows), height, width).to(own_tokens.device),
            txt_ids=text_positions(1).to(own_tokens.device),
            return_dict=False,
            kv_cache_mode="extract",
            num_ref_tokens=rows * height * width,
        )
        kept = {}
        for name, layer in _layers(out[1]):
            both = torch.cat([part[0].flatten(1) for part in layer.get()], dim=1)
            kept[name] = both.view(rows, height * width, -1)
        return kept

    def project(self, features: Mapping[str, Tensor]) -> dict[str, KeyValue]:
        """The same for `References`."""
        return {name: KeyValue(*both.chunk(2, dim=-1)) for name, both in features.items()}


def packed(latents_BCHW: Tensor) -> Tensor:
    """`[B, L, C]`: a token for every latent pixel, row by row."""
    return latents_BCHW.flatten(2).transpose(1, 2)


def unpacked(tokens_BLC: Tensor, height: int, width: int) -> Tensor:
    """The opposite of `packed`."""
    return tokens_BLC.transpose(1, 2).reshape(len(tokens_BLC), -1, height, width)


def earlier(count: int) -> list[int]:
    """Where so many earlier frames stand along the first axis."""
    return [BETWEEN_PICTURES * (number + 1) for number in range(count)]


def picture_positions(places: Sequence[int], height: int, width: int) -> Tensor:
    """`[len(places) · L, 4]`: of pictures of one size, one after another."""
    return torch.cartesian_prod(torch.tensor(places), torch.arange(height), torch.arange(width), torch.arange(1))


def text_positions(length: int) -> Tensor:
    """`[S, 4]`: a text's, which has no place but its order."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(length))


def _check_alike(references: References) -> None:
    if references.present_BN is not None:
        raise ValueError("rows that see unlike numbers of pictures cannot share a forward of this network")


def _layers(cache: Any) -> Iterator[tuple[str, Any]]:
    """A cache's blocks with the names that we give them."""
    for kind, layers in (("double", cache.double_block_caches), ("single", cache.single_block_caches)):
        for number, layer in enumerate(layers):
            yield f"{kind}.{number}", layer


def build_flux2(values: Mapping[str, Any], *, keeps_references: bool) -> Flux2Network:
    """The network of a published `config.json`, with fresh weights, in eval mode; `keeps_references`: the second kind.

    Build it under `torch.device("meta")` to see its keys without its memory. Raises ValueError for a key that is
    unknown and for a network that is none of these: one that is told its guidance.
    """
    kept = {name: value for name, value in values.items() if not name.startswith("_")}
    known = set(inspect.signature(Flux2Transformer2DModel.__init__).parameters) - {"self"}
    if unknown := sorted(set(kept) - known):
        raise ValueError(f"unknown keys in the config of the transformer: {', '.join(unknown)}")
    for name, value in _FIXED.items():
        # diffusers' own default of `guidance_embeds` is another, so it must be said.
        if kept.get(name, value) != value or (name == "guidance_embeds" and name not in kept):
            raise ValueError(f"{name} of the transformer is {kept.get(name)!r}, this architecture's is {value!r}")
    network: Any = Flux2KvNetwork(**kept) if keeps_references else Flux2Network(**kept)
    if len(network.config.axes_dims_rope) != 4:
        raise ValueError("axes_dims_rope of the transformer must have four numbers, one for each of a position's")
    if keeps_references:
        for block in network.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in network.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    network.eval()
    built: Flux2Network = network
    return built
