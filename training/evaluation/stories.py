"""Measures whole stories that a pack tells alone: its captions, descriptions and frames, from one true frame on.

* `story_identity` frames 2 to 5 whose description names the hero: is the hero there, with the right look?
* `story_agrees` descriptions that agree with the story so far on who, where and when;
* `story_near_copies` captions that repeat an earlier one, `story_drops_hero` stories that never name the hero again;
* `story_arc` stories in which the world's grammar finds a setup, a turn and an ending, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from services.models.captions.repetition import is_near_copy
from services.models.drawing import Pixels, Seen
from services.models.registry import FrameModel
from training.evaluation.arcs import drops_hero, has_arc
from training.evaluation.captions import SERVED_TEMPERATURE, Captioner, expected, names_agree, names_in
from training.evaluation.figures import Figure, share
from training.evaluation.frames import MAX_REFERENCES, Say, Task, draw_all
from training.evaluation.judge import Judge
from training.toon.reading import parse
from training.toon.render import render
from training.toon.stories import STORY_LENGTH, Story


@dataclass
class Told:
    """A story on its way: the first frame is true, the others are the pack's."""

    story: Story
    captions: list[str]
    descriptions: list[str]  # the first is the world's, to compare with; the product knows its caption alone
    pictures: list[Pixels] = field(default_factory=list)

    @property
    def references(self) -> tuple[Seen, ...]:
        """What the next frame looks at."""
        texts = [self.captions[0], *self.descriptions[1:]]
        seen = [Seen(pixels=p, description=d) for p, d in zip(self.pictures, texts, strict=True)]
        return tuple(seen[-MAX_REFERENCES:])


def tell(
    model: FrameModel, captioner: Captioner, stories: Sequence[Story], seed: int, say: Say, *, guarded: bool = True
) -> list[Told]:
    """Continue each story's true first frame by four of the pack's own, as the product does."""
    size_px = model.manifest.width_px
    told = [
        Told(s, [s.frames[0].caption], [s.frames[0].description], [render(s.frames[0].scene, size_px)]) for s in stories
    ]
    torch.manual_seed(seed)
    for beat in range(1, STORY_LENGTH):
        newest = [one.pictures[-1] for one in told]
        captions = captioner.next_captions(
            [one.captions for one in told], newest, temperature=SERVED_TEMPERATURE, guarded=guarded
        )
        histories = [[*one.captions, caption] for one, caption in zip(told, captions, strict=True)]
        described = [one.descriptions[1:] for one in told]
        descriptions = captioner.descriptions(
            histories, newest, described, temperature=SERVED_TEMPERATURE, guarded=guarded
        )
        tasks = [
            Task(one.story.frames[beat].scene, description, 1_000_000 * seed + 1000 * number + beat, one.references)
            for number, (one, description) in enumerate(zip(told, descriptions, strict=True))
        ]
        pictures = draw_all(model, tasks)
        for one, caption, description, picture in zip(told, captions, descriptions, pictures, strict=True):
            one.captions.append(caption)
            one.descriptions.append(description)
            one.pictures.append(picture)
        say(f"stories: frame {beat + 1} of {len(told)} stories")
    return told


def story_figures(told: Sequence[Told], judge: Judge) -> list[Figure]:
    """The figures named at the top of this module."""
    same: list[bool] = []
    agrees: list[bool] = []
    copies: list[bool] = []
    for one in told:
        hero = one.story.hero
        look = (hero.look.species, hero.look.colour, hero.look.accessory, hero.look.accessory_colour)
        verdicts = judge.verdicts(one.pictures[1:])
        for beat, verdict in enumerate(verdicts, start=1):
            caption, description = one.captions[beat], one.descriptions[beat]
            if hero.name in names_in(description):
                same.append(any(figure.look == look or figure.who == hero.id for figure in verdict.figures))
            said, before = parse(description), parse(one.descriptions[beat - 1])
            place, when = expected(caption, before.setting, before.time)
            known = names_in(" ".join(one.captions[:beat]))
            agrees.append(names_agree(description, caption, known) and said.setting == place and said.time == when)
            copies.append(is_near_copy(caption, one.captions[:beat]))
    return [
        share("story_identity", same, 0.88),
        share("story_agrees", agrees, 0.92),
        share("story_near_copies", copies, 0.03, at_most=True),
        share("story_drops_hero", [drops_hero(o.captions, str(o.story.hero.name)) for o in told], 0.03, at_most=True),
        share("story_arc", [has_arc(one.captions) for one in told], 0.80),
    ]
