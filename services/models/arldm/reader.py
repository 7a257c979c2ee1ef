"""AR-LDM among the other families: its encoders as the frame engine asks for texts, and how a pack of it lies in files.

A frame's text is its whole context (`Context.as_text`): what CLIP makes of its caption, and what BLIP makes of every
earlier frame. The n-th frame of a job is the one with n references: the time table counts from the first of them.
Knows no sampler and no serving.

Shapes: S context states, D their width, one column more for what is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from services.models.arldm.blip import as_blip_sees
from services.models.arldm.checkpoint import BLIP_TOKENIZER, CLIP_TOKENIZER, CONFIG, NETWORKS
from services.models.arldm.model import Memory, Nothing, frame_context
from services.models.arldm.sampling import ArldmModel
from services.models.arldm.text import FILE_NAME, CaptionTokenizer, TokenRows
from services.models.pack import Manifest
from services.models.text_encoder import NO_WORDS, TextChange, Words, ids_with_words

Picture = npt.NDArray[np.uint8]


class ArldmReader:
    """`registry.Texts` and `registry.StoryReader` of one model. Characters teach it words and change no encoder."""

    def __init__(self, model: ArldmModel) -> None:
        self.model = model

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """CLIP's, which reads the frame that is drawn."""
        return self.model.clip_tokenizer

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """None: what a character of it changes is the UNet."""
        return {}

    @property
    def width(self) -> int:
        """Of a learned word: CLIP's vector, and BLIP's behind it."""
        config = self.model.networks.config
        return config.text.width + config.blip.width

    @property
    def given_frames(self) -> int:
        """How many earlier frames it needs at least: it was trained to go on from them."""
        return self.model.networks.config.frame.given_frames

    @property
    def window(self) -> int:
        """Positions of a caption alone."""
        return self.model.window

    @property
    def length(self) -> int:
        """S: the caption, and as many earlier frames as the last frame of a story has."""
        return self.model.window * self.model.networks.config.frame.frames

    def token_ids(self, texts: Sequence[str], words: Words = NO_WORDS) -> Tensor:
        """CLIP's. Raises TextTooLong when a text does not fit."""
        return self.caption_rows(texts, words).ids_BS

    def caption_rows(self, texts: Sequence[str], words: Words = NO_WORDS) -> TokenRows:
        """`[B, S]`, as CLIP reads them. Raises TextTooLong when a text does not fit."""
        own, _ = self.model.networks.halves(words)
        return self.model.clip_tokenizer.rows(texts, self.model.window, own, self.model.networks.config.text.vocab_size)

    def source_rows(self, texts: Sequence[str], words: Words = NO_WORDS) -> TokenRows:
        """`[B, S]`, as BLIP reads them. Raises TextTooLong when a text does not fit."""
        _, own = self.model.networks.halves(words)
        return self.model.blip_tokenizer.rows(texts, self.model.window, own, self.model.networks.config.blip.vocab_size)

    def fitting(self, text: str, words: Words = NO_WORDS) -> str:
        """`text` itself, or as many of its first words as fit BLIP's window, which reads what was."""
        _, own = self.model.networks.halves(words)

        def fits(part: str) -> bool:
            return len(ids_with_words(part, own, self.model.blip_tokenizer.encode, 0)) <= self.model.window - 2

        if fits(text):
            return text
        kept = text.split()[: self.model.window - 2]
        while kept and not fits(" ".join(kept)):
            kept.pop()
        return " ".join(kept)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], words: Words = NO_WORDS, changes: Sequence[TextChange] = ()) -> Tensor:
        """`[B, S, D + 1]`: each text as the first frame of a story; the empty one is nothing at all.

        Raises TextTooLong when a text does not fit.
        """
        if changes:
            raise TypeError("AR-LDM's encoders take no changes")
        return torch.stack([self.contexts(text, (), words)[1] if text else self.contexts("", ())[0] for text in texts])

    @torch.inference_mode()
    def contexts(self, description: str, past: Sequence[tuple[Picture, str]], words: Words = NO_WORDS) -> Tensor:
        """`[2, S, D + 1]`: about nothing, then about the story so far. `past` is pictures with captions, oldest first.

        Nothing hides what the story hides: its empty pictures stand only where the story has some.
        Raises TextTooLong when a text does not fit, and ValueError for more frames than the model knows.
        """
        networks, number = self.model.networks, len(past)
        if number >= networks.config.frame.frames:
            raise ValueError(f"frame {number} of a story: the model knows {networks.config.frame.frames} frames")
        rows = self.caption_rows([description], words).to(networks.device)
        captions = networks.captions(rows, networks.halves(words)[0])
        memory = self._memory(past, words)
        frames = torch.tensor([number], device=networks.device)
        empty = self._nothing.memory(1)
        empty = Memory(empty.states_BFSD[:, :number], empty.real_BFS[:, :number])
        everything = torch.ones_like(rows.real_BS)
        return torch.cat(
            [
                frame_context(self._nothing.caption_SD[None], everything, empty, frames).as_text(self.length),
                frame_context(captions, rows.real_BS, memory, frames).as_text(self.length),
            ]
        )

    def _memory(self, past: Sequence[tuple[Picture, str]], words: Words) -> Memory:
        """Of one story."""
        if not past:
            none = self._nothing.memory(1)
            return Memory(none.states_BFSD[:, :0], none.real_BFS[:, :0])
        networks = self.model.networks
        rows = self.source_rows([caption for _, caption in past], words).to(networks.device)
        pixels = as_blip_sees([picture for picture, _ in past], networks.config.blip.image_size_px)
        states = networks.history(pixels, rows, torch.arange(len(past)), networks.halves(words)[1])
        return Memory(states[None], rows.real_BS[None])

    @functools.cached_property
    def _nothing(self) -> Nothing:
        """The same for every story."""
        return self.model.nothing()


def arldm_files() -> tuple[str, ...]:
    """What a pack of the architecture holds at least, by path."""
    networks = [path for network, file in NETWORKS.items() for path in (f"{network}/{CONFIG}", f"{network}/{file}")]
    return (*networks, f"{CLIP_TOKENIZER}/{FILE_NAME}", f"{BLIP_TOKENIZER}/{FILE_NAME}")


def check_arldm(manifest: Manifest, model: ArldmModel) -> None:
    """Raises ValueError where a manifest promises what the networks do not do."""
    frame, codec = model.networks.config.frame, model.codec
    if not frame.given_frames <= manifest.max_references < frame.frames:
        raise ValueError(
            f"max_references is {manifest.max_references}: the model goes on from at least {frame.given_frames} "
            f"frames and knows {frame.frames} in all"
        )
    for what, numbers in (("shifts", manifest.latents.shift), ("scales", manifest.latents.scale)):
        if len(numbers) != codec.channels:
            raise ValueError(f"the manifest has {len(numbers)} latent {what}, the VAE {codec.channels} channels")
