"""StoryGen's rows: earlier frames are pictures under noise with captions, which the UNet reads in passes of their own.

Those passes give no gradient, so a word that is learned learns from the descriptions of drawn frames alone. Knows no
method.

Shapes: F frames, V wordings of a description, S text positions, D text width, B rows, N reference slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.models.denoiser import Example, Unconditional, apply_dropout
from services.models.registry import FrameModel
from services.models.storygen import StoryGenUNet
from services.models.text_encoder import NO_WORDS, TextEncoder, Words
from training.backbones.backbone import TOGETHER, Row, Shelf, Table, Told, chosen, latents_of, pixels_of, wordings
from training.lesson_recipe import LessonRecipe
from training.new_story import Called, SeenFrame


@dataclass(frozen=True)
class StoryGenShelf(Shelf):
    """Frames as StoryGen sees them."""

    reference_latents_FCHW: Tensor
    ids_FVS: Tensor
    named_ids_FVS: Tensor  # the frame's new character by name alone; the same as `ids_FVS` for everybody else
    states_FVSD: Tensor  # what the encoder says of `ids_FVS` and, behind them, of `named_ids_FVS`


class StoryGenBackbone:
    """`Backbone` of one loaded pack."""

    given_frames = 0

    def __init__(self, model: FrameModel) -> None:
        """Raises ValueError for a pack whose networks are another family's."""
        if not isinstance(model.text, TextEncoder) or not isinstance(model.denoiser.unet, StoryGenUNet):
            raise ValueError(f"{model.manifest.name!r} is no storygen pack")
        self._text, self._model = model.text, model
        self._text.model.requires_grad_(False)

    @property
    def tables(self) -> tuple[Table, ...]:
        known_VD: Tensor = self._text.model.get_input_embeddings().weight.detach().float()
        return (Table(known_VD, self._text.tokenizer.encode),)

    def slots(self, recipe: LessonRecipe, chance: float) -> int:
        one, two, _ = recipe.references_shares
        return min(1 + (chance > one) + (chance > one + two), self._model.manifest.max_references)

    @torch.no_grad()
    def shelf(
        self, frames: Sequence[SeenFrame], words: Words = NO_WORDS, called: Sequence[Called] | None = None
    ) -> StoryGenShelf:
        codec, both = self._model.codec, wordings(frames, called)
        ids, named_ids = (
            self._text.token_ids([text for own in told for text in own], words).view(len(frames), len(told[0]), -1)
            for told in both
        )
        parts = pixels_of(frames, self._model.device)
        all_ids = torch.cat([ids, named_ids], dim=1)
        rows = torch.split(all_ids.flatten(0, 1), TOGETHER)
        states = torch.cat([self._text.states(part, words).float() for part in rows])
        return StoryGenShelf(
            frames=tuple(frames),
            latents_FCHW=latents_of(codec, parts),
            learns_words=bool(words),
            reference_latents_FCHW=torch.cat([codec.encode_references(part) for part in parts]).float(),
            ids_FVS=ids,
            named_ids_FVS=named_ids,
            states_FVSD=states.view(*all_ids.shape, -1),
        )

    def example(self, rows: Sequence[Row], slots: int, words: Words) -> Example:
        latents = torch.stack([row.shelf.latents_FCHW[row.drawn.frame] for row in rows])
        texts = torch.stack([self._state(_own(row), row.drawn, row.named, words) for row in rows])
        seen = latents.new_zeros((len(rows), slots, *latents.shape[1:]))
        seen_texts = texts.new_zeros((len(rows), slots, *texts.shape[1:]))
        present = torch.zeros(len(rows), slots, dtype=torch.bool, device=latents.device)
        for number, row in enumerate(rows):
            for slot, one in enumerate(row.earlier, start=slots - len(row.earlier)):  # the newest is in the last slot
                seen[number, slot] = _own(row).reference_latents_FCHW[one.frame]
                with torch.no_grad():
                    seen_texts[number, slot] = self._state(_own(row), one, row.named, words)
                present[number, slot] = True
        return Example(
            latents_BCHW=latents,
            text_BSD=texts,
            reference_latents_BNCHW=seen,
            reference_text_BNSD=seen_texts,
            present_BN=present,
        )

    def hidden(
        self, example: Example, rows: Sequence[Row], recipe: LessonRecipe, generator: torch.Generator
    ) -> Example:
        return apply_dropout(example, recipe.dropout.draw(len(rows), generator), self._unconditional)

    @functools.cached_property
    def _unconditional(self) -> Unconditional:
        manifest = self._model.manifest
        with torch.no_grad():
            return Unconditional(
                text_SD=self._text.encode([""])[0].float(),
                blank_CHW=self._model.codec.encode_blank(manifest.height_px, manifest.width_px)[0].float(),
            )

    def _state(self, shelf: StoryGenShelf, told: Told, named: bool, words: Words) -> Tensor:
        """What the encoder says of one wording of a frame's description, `[S, D]`."""
        count = shelf.ids_FVS.shape[1]
        wording = chosen(told.chance, count)
        if shelf.learns_words:
            ids = (shelf.named_ids_FVS if named else shelf.ids_FVS)[told.frame, wording]
            return self._text.states(ids[None], words)[0].float()
        return shelf.states_FVSD[told.frame, wording + count * named]


def _own(row: Row) -> StoryGenShelf:
    assert isinstance(row.shelf, StoryGenShelf)
    return row.shelf
