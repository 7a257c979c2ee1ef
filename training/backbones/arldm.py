"""AR-LDM's rows: earlier frames, as BLIP tells picture and caption together, stand in the text of the one drawn.

What CLIP and BLIP say is computed once, without the vector of the place in a row's history, which is added when the
row is made: a frame is fourth of one row and first of another. A row sees the frames just before it, as many as the
tables have places for, and the oldest of them is number 0, as when frames are drawn. Texts with a word that is learned
are read anew, with a gradient for both encoders' halves of it. Knows no method.

Shapes: F frames, V wordings of a description (twice: then by name alone), S text positions, P patches, D width, B rows,
N places of a history.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from services.models.arldm.blip import as_blip_sees
from services.models.arldm.model import Arldm, Dropout, Memory, frame_context
from services.models.arldm.reader import ArldmReader
from services.models.arldm.text import TokenRows
from services.models.denoiser import Example
from services.models.registry import FrameModel
from services.models.text_encoder import NO_WORDS, Words
from training.backbones.backbone import TOGETHER, Row, Shelf, Table, Told, chosen, latents_of, pixels_of, wordings
from training.lesson_recipe import LessonRecipe
from training.new_story import Called, SeenFrame


@dataclass(frozen=True)
class ArldmShelf(Shelf):
    """Frames as AR-LDM sees them."""

    seen_FPD: Tensor  # by BLIP, in the pictures
    captions: TokenRows  # [F, V, S], CLIP's
    sources: TokenRows  # [F, V, S], BLIP's
    captions_FVSD: Tensor
    history_FVSD: Tensor  # of no place in a history yet
    holds_words_FV: Tensor  # CPU; whether a text has a word that is learned


class _Asked(NamedTuple):
    """One wording of one frame."""

    shelf: ArldmShelf
    frame: int
    wording: int


class ArldmBackbone:
    """`Backbone` of one loaded pack."""

    def __init__(self, model: FrameModel) -> None:
        """Raises ValueError for a pack whose networks are another family's."""
        if not isinstance(model.text, ArldmReader):
            raise ValueError(f"{model.manifest.name!r} is no arldm pack")
        self._reader, self._model = model.text, model
        self._networks: Arldm = model.text.model.networks
        for encoder in (self._networks.text_encoder, self._networks.mm_encoder):
            encoder.requires_grad_(False)
            encoder.eval()

    @property
    def given_frames(self) -> int:
        return self._reader.given_frames

    @property
    def history(self) -> int:
        """N: how many earlier frames a row sees at most."""
        return min(self._model.manifest.max_references, self._networks.config.frame.frames - 1)

    @property
    def tables(self) -> tuple[Table, ...]:
        own, encoders = self._reader.model, (self._networks.text_encoder, self._networks.mm_encoder.text)
        known = [encoder.get_input_embeddings().weight.detach().float() for encoder in encoders]
        return Table(known[0], own.clip_tokenizer.encode), Table(known[1], own.blip_tokenizer.encode)

    def slots(self, recipe: LessonRecipe, chance: float) -> int:
        return self.history

    @torch.no_grad()
    def shelf(
        self, frames: Sequence[SeenFrame], words: Words = NO_WORDS, called: Sequence[Called] | None = None
    ) -> ArldmShelf:
        config = self._networks.config
        texts = [text for told, named in zip(*wordings(frames, called), strict=True) for text in (*told, *named)]
        captions, sources = self._reader.caption_rows(texts, words), self._reader.source_rows(texts, words)
        held = (captions.ids_BS >= config.text.vocab_size).any(1) | (sources.ids_BS >= config.blip.vocab_size).any(1)
        looked = [
            self._networks.mm_encoder.look(part.to(self._networks.device))
            for part in torch.split(as_blip_sees([one.pixels for one in frames], config.blip.image_size_px), TOGETHER)
        ]
        each = len(texts) // len(frames)
        seen_FPD = torch.cat(looked).float()
        clip_words, blip_words = self._networks.halves(words)
        states, told = [], []
        for start in range(0, len(texts), TOGETHER):
            part = slice(start, start + TOGETHER)
            states.append(self._networks.captions(_rows(captions, part), clip_words).float())
            pictures = seen_FPD[torch.arange(len(texts))[part] // each]
            told.append(self._networks.told(pictures, _rows(sources, part), blip_words).float())
        shape = (len(frames), each)
        return ArldmShelf(
            frames=tuple(frames),
            latents_FCHW=latents_of(self._model.codec, pixels_of(frames, self._model.device)),
            learns_words=bool(words),
            seen_FPD=seen_FPD,
            captions=_shaped(captions, shape),
            sources=_shaped(sources, shape),
            captions_FVSD=_unrolled(torch.cat(states), shape),
            history_FVSD=_unrolled(torch.cat(told), shape),
            holds_words_FV=held.view(shape),
        )

    def example(self, rows: Sequence[Row], slots: int, words: Words) -> Example:
        latents = torch.stack([row.shelf.latents_FCHW[row.drawn.frame] for row in rows])
        drawn = [_asked(row, row.drawn) for row in rows]
        captions = self._captions(drawn, words)
        real = torch.stack([one.shelf.captions.real_BS[one.frame, one.wording] for one in drawn]).to(captions.device)
        memory = self._memory(rows, slots, words, like_BSD=captions)
        counts = torch.tensor([len(row.earlier) for row in rows], device=captions.device)
        return Example(
            latents_BCHW=latents,
            text_BSD=frame_context(captions, real, memory, counts).as_text(self._length),
            # There is nothing to look at: the text says it all.
            reference_latents_BNCHW=latents.new_zeros((len(rows), 0, *latents.shape[1:])),
            reference_text_BNSD=captions.new_zeros((len(rows), 0, *captions.shape[1:])),
            present_BN=torch.zeros(len(rows), 0, dtype=torch.bool, device=latents.device),
        )

    def hidden(
        self, example: Example, rows: Sequence[Row], recipe: LessonRecipe, generator: torch.Generator
    ) -> Example:
        gone = Dropout(rate=recipe.frame_dropout).draw(1, len(rows), generator)[0].to(example.text_BSD.device)
        nothing = torch.stack([self._nothing[len(row.earlier)] for row in rows])
        return replace(example, text_BSD=torch.where(gone[:, None, None], nothing, example.text_BSD))

    @property
    def _length(self) -> int:
        """Positions of a row's text: its caption, and each place of its history."""
        return self._reader.model.window * (1 + self.history)

    @functools.cached_property
    def _nothing(self) -> Tensor:
        """`[N + 1, length, D + 1]`: what a row without a story sees, by how many earlier frames it would have seen."""
        with torch.no_grad():  # the reader's own is an inference tensor, which no gradient may pass
            nothing = self._reader.model.nothing()
        counts = torch.arange(self.history + 1, device=nothing.caption_SD.device)
        captions = nothing.caption_SD.expand(len(counts), -1, -1)
        real = torch.ones(captions.shape[:2], dtype=torch.bool, device=captions.device)
        memory = nothing.memory(len(counts))
        memory = Memory(memory.states_BFSD[:, : self.history], memory.real_BFS[:, : self.history])
        return frame_context(captions, real, memory, counts).as_text(self._length)

    def _captions(self, asked: Sequence[_Asked], words: Words) -> Tensor:
        """`[B, S, D]`: wordings as captions of frames that are drawn."""
        states = [one.shelf.captions_FVSD[one.frame, one.wording] for one in asked]
        if anew := _with_words(asked, words):
            rows = _gathered([(asked[n].shelf.captions, asked[n]) for n in anew])
            fresh = self._networks.captions(rows, self._networks.halves(words)[0]).float()
            for number, state in zip(anew, fresh, strict=True):
                states[number] = state
        return torch.stack(states)

    def _memory(self, rows: Sequence[Row], slots: int, words: Words, like_BSD: Tensor) -> Memory:
        """What rows see of earlier frames, each history from place 0 on."""
        asked = [_asked(row, one) for row in rows for one in row.earlier]
        places = torch.tensor([place for row in rows for place in range(len(row.earlier))], dtype=torch.long)
        owners = torch.tensor([n for n, row in enumerate(rows) for _ in row.earlier], dtype=torch.long)
        states_BFSD = like_BSD.new_zeros((len(rows), slots, *like_BSD.shape[1:]))
        real_BFS = torch.zeros(states_BFSD.shape[:3], dtype=torch.bool, device=like_BSD.device)
        if not asked:
            return Memory(states_BFSD, real_BFS)
        states = [one.shelf.history_FVSD[one.frame, one.wording] for one in asked]
        if anew := _with_words(asked, words):
            seen = torch.stack([asked[n].shelf.seen_FPD[asked[n].frame] for n in anew])
            sources = _gathered([(asked[n].shelf.sources, asked[n]) for n in anew])
            fresh = self._networks.told(seen, sources, self._networks.halves(words)[1]).float()
            for number, state in zip(anew, fresh, strict=True):
                states[number] = state
        placed = self._networks.placed(torch.stack(states), places).float()
        real = torch.stack([one.shelf.sources.real_BS[one.frame, one.wording] for one in asked])
        index = (owners.to(placed.device), places.to(placed.device))
        return Memory(states_BFSD.index_put(index, placed), real_BFS.index_put(index, real.to(placed.device)))


def _asked(row: Row, told: Told) -> _Asked:
    assert isinstance(row.shelf, ArldmShelf)
    count = row.shelf.holds_words_FV.shape[1] // 2
    return _Asked(row.shelf, told.frame, chosen(told.chance, count) + count * row.named)


def _with_words(asked: Sequence[_Asked], words: Words) -> list[int]:
    """Which of them have a word that is learned."""
    if not words:
        return []
    return [
        number
        for number, one in enumerate(asked)
        if one.shelf.learns_words and bool(one.shelf.holds_words_FV[one.frame, one.wording])
    ]


def _rows(rows: TokenRows, part: slice) -> TokenRows:
    return TokenRows(rows.ids_BS[part], rows.real_BS[part])


def _shaped(rows: TokenRows, shape: tuple[int, int]) -> TokenRows:
    return TokenRows(_unrolled(rows.ids_BS, shape), _unrolled(rows.real_BS, shape))


def _unrolled(values: Tensor, shape: tuple[int, int]) -> Tensor:
    return values.view(*shape, *values.shape[1:])


def _gathered(places: Sequence[tuple[TokenRows, _Asked]]) -> TokenRows:
    """One wording of each, `[B, S]`."""
    return TokenRows(
        torch.stack([rows.ids_BS[one.frame, one.wording] for rows, one in places]),
        torch.stack([rows.real_BS[one.frame, one.wording] for rows, one in places]),
    )
