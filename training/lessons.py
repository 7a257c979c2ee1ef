"""Draws the batches of a customization: the new character's story beside one that the network knows.

What the frozen encoders say of pictures and texts is computed once (`backbones`). Every random number of a batch comes
from the generator it is asked with, so a step is the same whenever it is taken. A story has as many frames as it has;
a row sees those just before it. Knows no method, no loop, and no family of packs.

Shapes: F frames, B rows, P pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from services.models.drawing import Pixels, Sketch
from services.models.errors import TextTooLong
from services.models.registry import FrameModel
from services.models.step import draw
from services.models.text_encoder import NO_WORDS, Words
from training.backbones.backbone import Row, Shelf, Told
from training.backbones.registry import backbone_of
from training.customize_errors import RecipeInvalid, StoryInvalid
from training.lesson_recipe import LessonRecipe as LessonRecipe
from training.methods.method import EXISTING, NEW, PRIOR, Batch
from training.new_story import STORY_FRAMES, KnownStory, NewStory, SeenFrame

_T = TypeVar("_T")


class _Story(NamedTuple):
    """Where a story stands on its shelf."""

    first: int
    length: int


class _Place(NamedTuple):
    """A frame of a story that a step shows."""

    kind: int
    first: int  # of the story
    beat: int


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
        RecipeInvalid where there are no stories of others, or a prior is asked of a pack that draws no first frame.
        """
        if not existing:
            raise RecipeInvalid("a run needs stories of those whom the network knows")
        self.backbone, self.device = backbone_of(model), model.device
        self.recipe, self.named_share = recipe, named_share
        self.schedule = model.denoiser.schedule
        given = self.backbone.given_frames
        if short := [story for story in existing if len(story.frames) <= given]:
            raise RecipeInvalid(
                f"the pack goes on from {given} given frames, and a known story has {len(short[0].frames)}"
            )
        if with_prior and given:
            raise RecipeInvalid(
                f"the prior loss wants pictures drawn without earlier ones, and {model.manifest.name!r} goes on from "
                f"{given}: set prior_weight to 0"
            )
        frames = [frame for story in new for frame in story.frames]
        called = [story.called for story in new for _ in story.frames]
        try:
            self.new: Shelf = self.backbone.shelf(frames, words, called)
        except TextTooLong as error:
            raise StoryInvalid(f"a description of somebody new does not fit: {error}", field="frames") from None
        self.existing: Shelf = self.backbone.shelf([frame for story in existing for frame in story.frames])
        self._stories = {NEW: _stories(new), EXISTING: _stories(existing)}
        self.prior: Shelf | None = None
        if with_prior:
            general = [who.by_noun(frame.descriptions[0]) for who, frame in zip(called, frames, strict=True)]
            drawn = [_drawn(model, text, recipe.prior_seed + number) for number, text in enumerate(general)]
            own = [
                SeenFrame(id=f"prior:{n}", pixels=pixels, caption=text, descriptions=(text,), characters=frozenset())
                for n, (text, pixels) in enumerate(zip(general, drawn, strict=True))
            ]
            self.prior = self.backbone.shelf(own)
        self._gallery = self._galleries({story.id for story in new})

    def _galleries(self, taught: Collection[str]) -> dict[str, list[tuple[int, int]]]:
        """Where pictures of each character are, as (kind, frame): the first few of each.

        Of those who are `taught`, from the new stories; of all others from the known ones, even where they stand in a
        lesson, whose picture would show the discriminator somebody new for somebody old. From the other kind only
        where that is all there is of somebody.
        """
        found: dict[str, dict[int, list[tuple[int, int]]]] = {}
        for kind, shelf in ((NEW, self.new), (EXISTING, self.existing)):
            for number, frame in enumerate(shelf.frames):
                for one in frame.characters:
                    found.setdefault(one, {NEW: [], EXISTING: []})[kind].append((kind, number))
        gallery: dict[str, list[tuple[int, int]]] = {}
        for one, places in found.items():
            own, other = (NEW, EXISTING) if one in taught else (EXISTING, NEW)
            # One more than are shown: a frame is never beside itself where there is another.
            gallery[one] = (places[own] or places[other])[: self.recipe.exemplars + 1]
        return gallery

    @property
    def frames(self) -> tuple[SeenFrame, ...]:
        """Every frame of the world that a run sees."""
        return (*self.new.frames, *self.existing.frames)

    def batch(self, generator: torch.Generator, words: Words = NO_WORDS, *, varied: bool = True) -> Batch:
        """One step: frames of one new story, of one known story, and of the prior where there is one.

        Without `varied`, for measuring: frames of the first of both, in their first wording, nothing hidden.
        """
        count = self.recipe.frames_per_story if varied else STORY_FRAMES
        story = int(torch.randint(len(self._stories[EXISTING]), (1,), generator=generator)) if varied else 0
        taught = self._stories[NEW][self._taught(generator) if varied else 0]
        places: list[_Place] = []
        kinds = [(NEW, taught), (EXISTING, self._stories[EXISTING][story])]
        kinds += [(PRIOR, taught)] if self.prior is not None else []
        given = self.backbone.given_frames
        for kind, (first, length) in kinds:
            beats = sorted(torch.randperm(length - given, generator=generator)[:count].tolist())
            places += [_Place(kind, first, given + beat) for beat in beats]
        chosen = float(torch.rand(1, generator=generator))
        slots = self.backbone.slots(self.recipe, chosen if varied else 0.0)
        wordings = torch.rand(len(places), slots + 1, generator=generator)
        by_name = torch.rand(len(places), generator=generator) < self.named_share
        if not varied:
            wordings, by_name = torch.zeros_like(wordings), torch.full_like(by_name, self.named_share == 1.0)
        rows = self._rows(places, slots, wordings.tolist(), by_name.tolist())
        example = self.backbone.example(rows, slots, words)
        steps = self.schedule.config.train_steps
        # The noise levels of a batch are spread evenly: each is uniform, and their mean less noisy.
        spread = torch.randperm(len(rows), generator=generator) + torch.rand(len(rows), generator=generator)
        timesteps = (spread / len(rows) * steps).long().clamp_max(steps - 1)
        shape = example.latents_BCHW.shape
        noise, reference_noise = (torch.randn(shape, generator=generator) for _ in range(2))
        if varied:
            example = self.backbone.hidden(example, rows, self.recipe, generator)
        pairs, exemplars, strangers = self._pairs(places, generator)
        return Batch(
            example=example,
            timesteps_B=timesteps.to(self.device),
            noise_BCHW=noise.to(self.device),
            reference_noise_BCHW=reference_noise.to(self.device),
            kinds_B=torch.tensor([place.kind for place in places], device=self.device),
            pairs_P=torch.tensor(pairs, dtype=torch.long, device=self.device),
            exemplars_PCHW=exemplars,
            strangers_PCHW=strangers,
        )

    def _taught(self, generator: torch.Generator) -> int:
        """Whose turn it is."""
        count = len(self._stories[NEW])
        return int(torch.randint(count, (1,), generator=generator)) if count > 1 else 0

    def _of(self, kind: int) -> Shelf:
        shelf = {NEW: self.new, EXISTING: self.existing, PRIOR: self.prior}[kind]
        assert shelf is not None
        return shelf

    def _rows(
        self, places: Sequence[_Place], slots: int, chances: Sequence[Sequence[float]], by_name: Sequence[bool]
    ) -> list[Row]:
        """Each frame with those before it in its story, as many as there are slots. The prior's stand alone."""
        rows = []
        for (kind, first, beat), own, named in zip(places, chances, by_name, strict=True):
            seen = 0 if kind == PRIOR else min(beat, slots)
            earlier = [Told(first + beat - back, own[1 + slots - back]) for back in range(seen, 0, -1)]
            drawn = Told(first + beat, own[0])
            rows.append(Row(shelf=self._of(kind), drawn=drawn, earlier=tuple(earlier), named=named))
        return rows

    def _pairs(self, places: Sequence[_Place], generator: torch.Generator) -> tuple[list[int], Tensor, Tensor]:
        """A pair for each character of each row: another picture of them, and one of somebody who is not there."""
        pairs: list[int] = []
        exemplars, strangers = [], []
        everybody = sorted(self._gallery)
        for number, (kind, first, beat) in enumerate(places):
            shown = self._of(kind).frames[first + beat].characters
            for one in sorted(shown):
                chances = torch.rand(3, generator=generator).tolist()
                elsewhere = [place for place in self._gallery[one] if place != (kind, first + beat)]
                of_them = (elsewhere or self._gallery[one])[: self.recipe.exemplars]
                # A picture in which they stand beside somebody else is no picture without them.
                without = {
                    other: [place for place in self._gallery[other] if one not in self._frame(place).characters]
                    for other in everybody
                    if other not in shown
                }
                others = [other for other in without if without[other]]
                wrong = without[_picked(others, chances[1])] if others else of_them
                pairs.append(number)
                exemplars.append(self._latents(_picked(of_them, chances[0])))
                strangers.append(self._latents(_picked(wrong, chances[2])))
        if not pairs:
            none = self.new.latents_FCHW[:0]
            return pairs, none, none
        return pairs, torch.stack(exemplars), torch.stack(strangers)

    def _frame(self, place: tuple[int, int]) -> SeenFrame:
        return self._of(place[0]).frames[place[1]]

    def _latents(self, place: tuple[int, int]) -> Tensor:
        return self._of(place[0]).latents_FCHW[place[1]]


def _stories(stories: Sequence[NewStory] | Sequence[KnownStory]) -> tuple[_Story, ...]:
    """Of stories one behind the other."""
    found, first = [], 0
    for story in stories:
        found.append(_Story(first, len(story.frames)))
        first += len(story.frames)
    return tuple(found)


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
