"""Draws the batches of a customization: the new character's story beside one that the network knows.

What the frozen encoders say of pictures and texts is computed once. Every random number of a batch comes from the
generator it is asked with, so a step is the same whenever it is taken. Knows no method and no loop.

Shapes: F frames, V wordings of a description, S text positions, D text width, B rows, N reference slots, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from services.models.denoiser import Dropout, Example, Unconditional, apply_dropout
from services.models.drawing import Pixels, Sketch
from services.models.errors import TextTooLong
from services.models.registry import FrameModel
from services.models.step import draw
from services.models.text_encoder import NO_WORDS, TextEncoder, Words
from training.customize_errors import RecipeInvalid, StoryInvalid
from training.methods.method import EXISTING, NEW, PRIOR, Batch
from training.new_story import STORY_FRAMES, Called, KnownStory, NewStory, SeenFrame

_T = TypeVar("_T")
_TOGETHER = 16  # pictures or texts encoded at a time


@dataclass(frozen=True, kw_only=True)
class LessonRecipe:
    """What a step shows. The defaults are what EpicEvo's paper says, or the most literal reading of it."""

    existing_stories: int = 5  # that a run knows, of which a step shows one: five for each new character
    existing_first_seed: int = 0
    frames_per_story: int = STORY_FRAMES  # rows of a step, twice; fewer cost less
    # How many earlier frames the rows of a step see, as far as their story has them. The newest one says most.
    references_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    dropout: Dropout = field(default_factory=lambda: Dropout(text=0.10, references=0.10, no_references=0.20))
    exemplars: int = 4  # pictures of each character that the discriminator is shown, at most
    prior_seed: int = 0  # of the pictures that the network itself draws, where a method asks for them

    def __post_init__(self) -> None:
        """Raises ValueError for what no batch can be drawn of."""
        if not 1 <= self.frames_per_story <= STORY_FRAMES:
            raise ValueError(f"frames_per_story is 1 to {STORY_FRAMES}")
        if self.existing_stories < 1 or self.exemplars < 1:
            raise ValueError("existing_stories and exemplars are at least 1")


@dataclass(frozen=True)
class _Shelf:
    """Frames one behind the other, encoded."""

    frames: tuple[SeenFrame, ...]
    latents_FCHW: Tensor
    reference_latents_FCHW: Tensor
    ids_FVS: Tensor
    named_ids_FVS: Tensor  # the frame's new character by name alone; the same as `ids_FVS` for everybody else
    states_FVSD: Tensor  # what the encoder says of `ids_FVS` and, behind them, of `named_ids_FVS`


class Lessons:
    """All frames of a run, and the batches drawn of them."""

    def __init__(
        self,
        model: FrameModel,
        new: Sequence[NewStory],
        existing: Sequence[KnownStory],
        recipe: LessonRecipe,
        *,
        named_share: float = 0.0,
        words: Words = NO_WORDS,
        with_prior: bool = False,
    ) -> None:
        """A step shows one of the `new` stories.

        `words` are those that a method learns: whose descriptions hold one are encoded anew in every batch.

        Raises StoryInvalid for a description of the new story that does not fit the text encoder's window, and
        RecipeInvalid where there are no stories of others.
        """
        if not existing:
            raise RecipeInvalid("a run needs stories of those whom the network knows")
        assert isinstance(model.text, TextEncoder)
        self.text, self.codec, self.device = model.text, model.codec, model.device
        self.recipe, self.named_share = recipe, named_share
        self.schedule = model.denoiser.schedule
        self._learns_words = bool(words)
        manifest = model.manifest
        frames = [frame for story in new for frame in story.frames]
        called = [story.called for story in new for _ in story.frames]
        try:
            self.new = self._shelf(frames, words, called)
        except TextTooLong as error:
            raise StoryInvalid(f"a description of somebody new does not fit: {error}", field="frames") from None
        self.existing = self._shelf([frame for story in existing for frame in story.frames])
        self.prior: _Shelf | None = None
        if with_prior:
            general = [who.by_noun(frame.descriptions[0]) for who, frame in zip(called, frames, strict=True)]
            drawn = [_drawn(model, text, recipe.prior_seed + number) for number, text in enumerate(general)]
            own = [
                SeenFrame(id=f"prior:{n}", pixels=pixels, caption=text, descriptions=(text,), characters=frozenset())
                for n, (text, pixels) in enumerate(zip(general, drawn, strict=True))
            ]
            self.prior = self._shelf(own)
        with torch.no_grad():
            self.nothing_SD = self.text.encode([""])[0].float()
            self.blank_CHW = self.codec.encode_blank(manifest.height_px, manifest.width_px)[0].float()
        self._gallery = self._galleries()

    def _shelf(
        self, frames: Sequence[SeenFrame], words: Words = NO_WORDS, called: Sequence[Called] | None = None
    ) -> _Shelf:
        """`words` may stand in descriptions of new stories alone; `called` is how each frame's new one is."""
        most = max(len(frame.descriptions) for frame in frames)
        wordings = [frame.descriptions[number % len(frame.descriptions)] for frame in frames for number in range(most)]
        named = wordings
        if called is not None:
            named = [called[number // most].by_name(text) for number, text in enumerate(wordings)]
        ids, named_ids = (self.text.token_ids(texts, words).view(len(frames), most, -1) for texts in (wordings, named))
        pixels = torch.from_numpy(np.stack([frame.pixels for frame in frames])).permute(0, 3, 1, 2).float() / 255.0
        with torch.no_grad():
            parts = [part.to(self.device) for part in torch.split(pixels, _TOGETHER)]
            latents = torch.cat([self.codec.encode(part) for part in parts]).float()
            seen = torch.cat([self.codec.encode_references(part) for part in parts]).float()
            both = torch.cat([ids, named_ids], dim=1)
            rows = torch.split(both.flatten(0, 1), _TOGETHER)
            states = torch.cat([self.text.states(part, words).float() for part in rows])
        return _Shelf(tuple(frames), latents, seen, ids, named_ids, states.view(*both.shape, -1))

    def _galleries(self) -> dict[str, list[tuple[int, int]]]:
        """Where pictures of each character are, as (kind, frame): the first few of each."""
        found: dict[str, list[tuple[int, int]]] = {}
        for kind, shelf in ((NEW, self.new), (EXISTING, self.existing)):
            for number, frame in enumerate(shelf.frames):
                for one in sorted(frame.characters):
                    found.setdefault(one, []).append((kind, number))
        # One more than are shown: a frame is never beside itself where there is another.
        return {one: places[: self.recipe.exemplars + 1] for one, places in found.items()}

    @property
    def frames(self) -> tuple[SeenFrame, ...]:
        """Every frame of the world that a run sees."""
        return (*self.new.frames, *self.existing.frames)

    def batch(self, generator: torch.Generator, words: Words = NO_WORDS, *, varied: bool = True) -> Batch:
        """One step: frames of one new story, of one known story, and of the prior where there is one.

        Without `varied`, for measuring: all frames of the first of both, in their first wording, nothing hidden.
        """
        count = self.recipe.frames_per_story if varied else STORY_FRAMES
        stories_count = len(self.existing.frames) // STORY_FRAMES
        story = int(torch.randint(stories_count, (1,), generator=generator)) if varied else 0
        taught = self._taught(generator) if varied else 0
        rows: list[tuple[int, int, int]] = []  # kind, first frame of the story, beat
        kinds = [(NEW, taught * STORY_FRAMES), (EXISTING, story * STORY_FRAMES)]
        kinds += [(PRIOR, taught * STORY_FRAMES)] if self.prior is not None else []
        for kind, first in kinds:
            beats = sorted(torch.randperm(STORY_FRAMES, generator=generator)[:count].tolist())
            rows += [(kind, first, beat) for beat in beats]
        one, two, _ = self.recipe.references_shares
        chosen = float(torch.rand(1, generator=generator))
        wish = 1 + (chosen > one) + (chosen > one + two) if varied else 1
        wordings = torch.rand(len(rows), wish + 1, generator=generator)
        by_name = torch.rand(len(rows), generator=generator) < self.named_share
        if not varied:
            wordings, by_name = torch.zeros_like(wordings), torch.full_like(by_name, self.named_share == 1.0)
        example = self._example(rows, wish, wordings, by_name, words)
        steps = self.schedule.config.train_steps
        # The noise levels of a batch are spread evenly: each is uniform, and their mean less noisy.
        spread = torch.randperm(len(rows), generator=generator) + torch.rand(len(rows), generator=generator)
        timesteps = (spread / len(rows) * steps).long().clamp_max(steps - 1)
        shape = example.latents_BCHW.shape
        noise, reference_noise = (torch.randn(shape, generator=generator) for _ in range(2))
        if varied:
            hidden = self.recipe.dropout.draw(len(rows), generator)
            example = apply_dropout(example, hidden, Unconditional(text_SD=self.nothing_SD, blank_CHW=self.blank_CHW))
        pairs, exemplars, strangers = self._pairs(rows, generator)
        return Batch(
            example=example,
            timesteps_B=timesteps.to(self.device),
            noise_BCHW=noise.to(self.device),
            reference_noise_BCHW=reference_noise.to(self.device),
            kinds_B=torch.tensor([kind for kind, _, _ in rows], device=self.device),
            pairs_P=torch.tensor(pairs, dtype=torch.long, device=self.device),
            exemplars_PCHW=exemplars,
            strangers_PCHW=strangers,
        )

    def _taught(self, generator: torch.Generator) -> int:
        """Whose turn it is."""
        count = len(self.new.frames) // STORY_FRAMES
        return int(torch.randint(count, (1,), generator=generator)) if count > 1 else 0

    def _of(self, kind: int) -> _Shelf:
        shelf = {NEW: self.new, EXISTING: self.existing, PRIOR: self.prior}[kind]
        assert shelf is not None
        return shelf

    def _example(
        self, rows: Sequence[tuple[int, int, int]], slots: int, chances: Tensor, by_name: Tensor, words: Words
    ) -> Example:
        """Rows with the frames before them, the newest in the last slot. What the prior draws stands alone."""
        latents, texts, present = [], [], torch.zeros(len(rows), slots, dtype=torch.bool)
        seen, seen_texts = [], []
        for number, (kind, first, beat) in enumerate(rows):
            shelf, named = self._of(kind), bool(by_name[number])
            latents.append(shelf.latents_FCHW[first + beat])
            texts.append(self._state(shelf, kind, first + beat, float(chances[number, 0]), named, words))
            for slot in range(slots):
                distance = slots - slot
                present[number, slot] = kind != PRIOR and beat >= distance
                earlier = first + beat - distance if present[number, slot] else first
                seen.append(shelf.reference_latents_FCHW[earlier])
                chance = float(chances[number, 1 + slot])
                with torch.no_grad():  # reference passes give no gradient either
                    seen_texts.append(self._state(shelf, kind, earlier, chance, named, words))
        shape = (len(rows), slots)
        return Example(
            latents_BCHW=torch.stack(latents),
            text_BSD=torch.stack(texts),
            reference_latents_BNCHW=torch.stack(seen).view(*shape, *latents[0].shape),
            reference_text_BNSD=torch.stack(seen_texts).view(*shape, *texts[0].shape),
            present_BN=present.to(self.device),
        )

    def _state(self, shelf: _Shelf, kind: int, frame: int, chance: float, named: bool, words: Words) -> Tensor:
        """What the encoder says of one wording of a frame's description, `[S, D]`."""
        count = shelf.ids_FVS.shape[1]
        wording = min(int(chance * count), count - 1)
        if kind == NEW and self._learns_words:
            ids = (shelf.named_ids_FVS if named else shelf.ids_FVS)[frame, wording]
            return self.text.states(ids[None], words)[0].float()
        return shelf.states_FVSD[frame, wording + count * named]

    def _pairs(
        self, rows: Sequence[tuple[int, int, int]], generator: torch.Generator
    ) -> tuple[list[int], Tensor, Tensor]:
        """A pair for each character of each row: another picture of them, and one of somebody who is not there."""
        pairs: list[int] = []
        exemplars, strangers = [], []
        everybody = sorted(self._gallery)
        for number, (kind, first, beat) in enumerate(rows):
            shown = self._of(kind).frames[first + beat].characters
            for one in sorted(shown):
                chances = torch.rand(3, generator=generator).tolist()
                places = [place for place in self._gallery[one] if place != (kind, first + beat)]
                places = (places or self._gallery[one])[: self.recipe.exemplars]
                # A picture in which they stand beside somebody else is no picture without them.
                without = {
                    other: [place for place in self._gallery[other] if one not in self._frame(place).characters]
                    for other in everybody
                    if other not in shown
                }
                others = [other for other in without if without[other]]
                wrong = without[_picked(others, chances[1])] if others else places
                pairs.append(number)
                exemplars.append(self._latents(_picked(places, chances[0])))
                strangers.append(self._latents(_picked(wrong, chances[2])))
        if not pairs:
            none = self.new.reference_latents_FCHW[:0]
            return pairs, none, none
        return pairs, torch.stack(exemplars), torch.stack(strangers)

    def _frame(self, place: tuple[int, int]) -> SeenFrame:
        return self._of(place[0]).frames[place[1]]

    def _latents(self, place: tuple[int, int]) -> Tensor:
        return self._of(place[0]).latents_FCHW[place[1]]


def _picked(values: Sequence[_T], chance: float) -> _T:
    return values[min(int(chance * len(values)), len(values) - 1)]


def _drawn(model: FrameModel, description: str, seed: int) -> Pixels:
    """A picture as the pack draws it by default, of a description alone."""
    sampling, manifest = model.manifest.sampling, model.manifest
    return draw(
        model,
        Sketch(
            description=description,
            seed=seed,
            width_px=manifest.width_px,
            height_px=manifest.height_px,
            steps=sampling.default_steps,
            text_guidance=sampling.default_text_guidance,
            image_guidance=sampling.default_image_guidance,
        ),
    )
