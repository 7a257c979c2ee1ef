"""Measures the texts that a pack's captioner writes about held-out stories, given true pictures and captions.

* `description_parses`          descriptions of true captions that read back: everybody with a species, a place, a time
* `description_names`           those that name whom the caption names, and nobody who is not in the story so far
* `description_cast`            those whose characters are exactly the true ones, named or not
* `description_agrees`          those that agree on who, where and when with what was told or was there before
* `description_grounded`        where both captions of the question are silent about the place: another story's picture
                                takes its place along
* `caption_near_copies`         written captions that repeat an earlier one of their story
* `caption_names`               written captions in which every name belongs to the story
* `…_unguarded`                 the same without name lock and repetition guard

The texts are decoded by plain transformers from the files as they are shipped, with the guards of serving
(`services.models.captions.cast`, `services.models.captions.repetition`). Knows no serving.

    python -m training.evaluation.captions --pack services/models/packs/toon
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from services.models.captions import companions, invention, llava, prompts, repetition, thread
from services.models.captions import looks as look_lock
from services.models.captions import places as place_lock
from services.models.captions.cast import Cast, name_tokens
from services.models.captions.repetition import is_near_copy
from services.models.eyes import load_eyes, new_looks
from services.models.tokenizer import StoryTokenizer
from services.models.world import World
from training.evaluation.figures import Figure, share, table
from training.evaluation.frames import FIRST_SEED, Say
from training.toon.cast import MAIN, NEW, SIDE_NAMES
from training.toon.grammar import describe_plainly, parse
from training.toon.lexicon import SETTING_CUES
from training.toon.reading import ParsedDescription
from training.toon.render import render
from training.toon.stories import TOLD_TIME_CUES, told_value
from training.toon.world import Story, StoryFrame, sample_story

_ALL_NAMES = sorted({c.name for c in (*MAIN, *NEW) if c.name} | {name for name, _ in SIDE_NAMES})
_NAME = re.compile(r"\b(" + "|".join(_ALL_NAMES) + r")\b")
NAME_LOCK_TRIES, CAPTION_TRIES, RETRY_TEMPERATURE = 7, 4, 0.7  # as in the caption service
SERVED_TEMPERATURE = 0.2  # as well; a test compares all four
_BUDGET_TOKENS = 352
_ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Question:
    """One prompt and the picture it is about."""

    image_HWC: npt.NDArray[np.uint8]
    prompt: prompts.Prompt
    forbidden_ids: tuple[int, ...] = ()  # the name lock, as it is served
    begun: str = ""  # the answer's first words


class Captioner:
    """A pack's LLaVA with both adapters, by plain transformers."""

    def __init__(self, pack: Path) -> None:
        self.tokenizer = StoryTokenizer.load(pack / "tokenizer")
        self.models: dict[str, Any] = {
            name: llava.load_adapter(llava.load_base(pack / "llava"), pack / "adapters" / name)
            for name in llava.ADAPTERS
        }
        self.cast = Cast.load(pack)
        self.world, self.eyes = World.load(pack), load_eyes(pack)
        config = self.models[llava.ADAPTERS[0]].config
        self.image_tokens_count: int = config.image_seq_length

    @torch.inference_mode()
    def answer(
        self, adapter: str, questions: Sequence[Question], rows_per_batch: int = 32, temperature: float = 0.0
    ) -> list[str]:
        """Answers, in order; greedy at temperature 0, else sampled from torch's global generator."""
        texts: list[str] = []
        for start in range(0, len(questions), rows_per_batch):
            texts += self._batch(adapter, questions[start : start + rows_per_batch], temperature)
        return texts

    def _batch(self, adapter: str, questions: Sequence[Question], temperature: float) -> list[str]:
        image_id, pad_id = self.tokenizer.image_id, self.tokenizer.pad_id
        rows = []
        for question in questions:
            ids, place = question.prompt.ids, question.prompt.ids.index(image_id)
            begun = self.tokenizer.encode(question.begun)
            rows.append([*ids[:place], *[image_id] * self.image_tokens_count, *ids[place + 1 :], *begun])
        longest = max(len(row) for row in rows)
        ids_BN = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
        mask_BN = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        written_BN = self.models[adapter].generate(
            input_ids=ids_BN,
            attention_mask=mask_BN,
            pixel_values=llava.pixels(np.stack([question.image_HWC for question in questions])),
            do_sample=temperature > 0,
            temperature=temperature or None,
            logits_processor=LogitsProcessorList([_Forbid([question.forbidden_ids for question in questions])]),
            max_new_tokens=_ANSWER_TOKENS,
            eos_token_id=self.tokenizer.eos_id,
            pad_token_id=pad_id,
        )
        written = [self.tokenizer.decode(row) for row in written_BN[:, longest:].tolist()]
        return [
            prompts.clean(question.begun + text if text.strip() else "")
            for question, text in zip(questions, written, strict=True)
        ]

    def next_captions(
        self,
        histories: Sequence[Sequence[str]],
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        temperature: float = 0.0,
        guarded: bool = True,
    ) -> list[str]:
        """The caption after each history, with the guards of a caption unless they are left out."""
        questions = [
            Question(image, prompts.story_prompt(self.tokenizer, list(captions), _BUDGET_TOKENS))
            for captions, image in zip(histories, images, strict=True)
        ]
        texts = self.answer("story", questions, temperature=temperature)
        if not guarded:
            return texts
        faults = [partial(self._caption_faults, captions) for captions in histories]
        tries = [list(questions) for _ in range(CAPTION_TRIES)]
        for row, (text, captions) in enumerate(zip(texts, histories, strict=True)):
            openings = thread.openings(text, captions, self.cast, self.world)
            for number, begun in enumerate(openings, start=CAPTION_TRIES - len(openings)):
                tries[number][row] = replace(questions[row], begun=begun)
        best = self._best_of("story", tries, texts, faults)
        return [self._mended(captions, text) for captions, text in zip(histories, best, strict=True)]

    def _mended(self, captions: Sequence[str], text: str) -> str:
        text = invention.repaired(text, captions, self.world)
        return thread.with_hero(text, captions, self.cast) if thread.loses_thread(text, captions, self.cast) else text

    def _caption_faults(self, captions: Sequence[str], text: str) -> int:
        told = repetition.faults(text, captions) + thread.faults(text, captions, self.cast)
        return told + invention.faults(text, captions, self.world)

    def descriptions(
        self,
        histories: Sequence[Sequence[str]],
        images: Sequence[npt.NDArray[np.uint8]],
        described: Sequence[Sequence[str]],
        *,
        temperature: float = 0.0,
        guarded: bool = True,
    ) -> list[str]:
        """The description of the last caption of each history, with the name lock unless it is left out.

        `described` is what the frames before were described as, as far as they were.
        """
        questions, contexts, looks, places = [], [], [], []
        for (*earlier, before, caption), image, texts in zip(histories, images, described, strict=True):
            context = self.cast.context(earlier, before, caption)
            known = {**prompts.told_looks(texts), **self.world.characters}
            names, others = self.world.whom((*earlier, before), known)
            if names and self.eyes is not None:
                known = {**new_looks(names, others, self.eyes.figures(image), self.eyes.phrase), **known}
            lines = prompts.cast_lines(known, (*earlier, before, caption))
            prompt = prompts.description_prompt(self.tokenizer, before, caption, _BUDGET_TOKENS, lines)
            looks.append(known)
            places.append(self._where(caption, image))
            strangers = self.cast.strangers(context) if guarded else ()
            questions.append(Question(image, prompt, name_tokens(self.tokenizer, strangers, context)))
            contexts.append(context)
        texts = self.answer("descriptive", questions, temperature=temperature)
        if not guarded:
            return texts
        faults = [
            partial(self._description_faults, context, known, at)
            for context, known, at in zip(contexts, looks, places, strict=True)
        ]
        begun = [
            replace(question, begun=at.opening) if at and place_lock.faults(text, at, self.world.places) else question
            for question, text, at in zip(questions, texts, places, strict=True)
        ]
        best = self._best_of("descriptive", [begun] * NAME_LOCK_TRIES, texts, faults)
        return [
            self._described(text, history[-1], pair, known, texts, at)
            for text, history, pair, known, texts, at in zip(
                best, histories, contexts, looks, described, places, strict=True
            )
        ]

    def _described(
        self,
        text: str,
        caption: str,
        context: tuple[str, str],
        looks: Mapping[str, str],
        earlier: Sequence[str],
        at: place_lock.At | None,
    ) -> str:
        if self.eyes is not None:
            text = companions.repaired(text, caption, earlier, self.eyes.shape)
        text = look_lock.repaired(self.cast.repaired(text, *context, looks=looks), looks)
        text = place_lock.repaired(text, at, self.world.places)
        return text if self.eyes is None else companions.repaired(text, caption, earlier, self.eyes.shape)

    def _where(self, caption: str, image_HWC: npt.NDArray[np.uint8]) -> place_lock.At | None:
        word = self.eyes.place(image_HWC) if self.eyes is not None else None
        place = next((one for one in self.world.places if one.split()[-1] == word), None)
        seen = None if place is None else place_lock.At(self.world.there.get(place, "in"), place)
        return place_lock.where(caption, self.world.places, seen)

    def _description_faults(
        self, context: tuple[str, str], looks: Mapping[str, str], at: place_lock.At | None, text: str
    ) -> int:
        names, worn = self.cast.faults(text, *context), look_lock.faults(text, looks)
        return names + worn + place_lock.faults(text, at, self.world.places)

    def _best_of(
        self,
        adapter: str,
        tries: Sequence[Sequence[Question]],
        texts: list[str],
        faults: Sequence[Callable[[str], int]],
    ) -> list[str]:
        """As served: the earliest of those with the fewest faults among a text and what `tries` ask once more."""
        texts = list(texts)
        for questions in tries:
            again = [number for number, text in enumerate(texts) if faults[number](text)]
            sampled = self.answer(adapter, [questions[n] for n in again], temperature=RETRY_TEMPERATURE)
            for number, text in zip(again, sampled, strict=True):
                if text and faults[number](text) < faults[number](texts[number]):
                    texts[number] = text
        return texts


class _Forbid(LogitsProcessor):  # type: ignore[misc]
    """Rows of tokens that are never written."""

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        self._rows = [row for row, forbidden in enumerate(ids) for _ in forbidden]
        self._columns = [index for forbidden in ids for index in forbidden]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[self._rows, self._columns] = -torch.inf
        return scores


@dataclass(frozen=True)
class Case:
    """One step of a story: frame `index` is given, frame `index + 1` is to be told."""

    story: Story
    index: int
    image_HWC: npt.NDArray[np.uint8]

    @property
    def now(self) -> StoryFrame:
        """The frame that is there."""
        return self.story.frames[self.index]

    @property
    def following(self) -> StoryFrame:
        """The frame that comes."""
        return self.story.frames[self.index + 1]

    @property
    def captions(self) -> list[str]:
        """The captions so far."""
        return [frame.caption for frame in self.story.frames[: self.index + 1]]

    @property
    def described(self) -> list[str]:
        """What the pack's own frames so far were described as: all but the first, which is given."""
        return [describe_plainly(frame.scene) for frame in self.story.frames[1 : self.index + 1]]

    @property
    def known_names(self) -> set[str]:
        """Everybody named in the captions so far."""
        return names_in(" ".join(self.captions))


def cases_of(story: Story) -> list[Case]:
    """Four cases a story."""
    return [
        Case(story, index, render(story.frames[index].scene, size_px=128)) for index in range(len(story.frames) - 1)
    ]


def names_in(text: str) -> set[str]:
    """Names of the cast that occur in a text."""
    return set(_NAME.findall(text))


def is_whole(description: ParsedDescription) -> bool:
    """Whether a description says who (a species, or a name of the cast, which says it), where and when."""
    return (
        bool(description.actors)
        and all(actor.species is not None or actor.id is not None for actor in description.actors)
        and description.setting is not None
        and description.time is not None
    )


def names_agree(text: str, caption: str, known: set[str]) -> bool:
    """Whether a description names whom the caption names, and nobody from elsewhere."""
    named, called = names_in(text), names_in(caption)
    return called <= named <= (called | known)


def expected(caption: str, setting_before: str | None, time_before: str | None) -> tuple[str | None, str | None]:
    """Where and when a caption's picture is: as it tells, or else as before."""
    place, when = told_value(SETTING_CUES, caption), told_value(TOLD_TIME_CUES, caption)
    return place or setting_before, when or time_before


def caption_figures(captioner: Captioner, stories: Sequence[Story], seed: int, say: Say) -> list[Figure]:
    """The figures named at the top of this module, over four cases a story."""
    torch.manual_seed(seed)
    found = [case for story in stories for case in cases_of(story)]
    histories = [[*case.captions, case.following.caption] for case in found]
    own = [case.image_HWC for case in found]
    described = [case.described for case in found]
    told = captioner.descriptions(histories, own, described)
    bare = captioner.descriptions(histories, own, described, guarded=False)
    say(f"texts: {len(told)} descriptions of true captions")
    # The same questions over the next story's pictures: a description that follows them has looked.
    swapped = found[4:] + found[:4]
    over = [case.image_HWC for case in swapped]
    elsewhere = [parse(text) for text in captioner.descriptions(histories, over, described)]
    histories = [case.captions for case in found]
    written = captioner.next_captions(histories, own, temperature=SERVED_TEMPERATURE)
    unguarded = captioner.next_captions(histories, own, temperature=SERVED_TEMPERATURE, guarded=False)
    say(f"texts: {len(written)} captions")
    read = [parse(text) for text in told]
    grounded = [
        other.setting == case.now.scene.setting
        for other, case, asked in zip(elsewhere, swapped, found, strict=True)
        if not any(told_value(SETTING_CUES, text) for text in (asked.now.caption, asked.following.caption))
        and case.now.scene.setting != asked.now.scene.setting
    ]
    agrees = []
    for case, text, one in zip(found, told, read, strict=True):
        place, when = expected(case.following.caption, case.now.scene.setting, case.now.scene.time)
        agreed = names_agree(text, case.following.caption, case.known_names)
        agrees.append(agreed and one.setting == place and one.time == when)

    def named(texts: Sequence[str]) -> list[bool]:
        return [
            is_whole(parse(text)) and names_agree(text, case.following.caption, case.known_names)
            for case, text in zip(found, texts, strict=True)
        ]

    def copies(texts: Sequence[str]) -> list[bool]:
        return [is_near_copy(text, case.captions) for case, text in zip(found, texts, strict=True)]

    return [
        share("description_parses", [is_whole(one) for one in read], 0.98),
        share("description_names", named(told), 0.97),
        share("description_names_unguarded", named(bare)),
        share(
            "description_cast",
            [
                sorted(map(str, one.characters)) == sorted(case.following.scene.labels()["characters"])
                for case, one in zip(found, read, strict=True)
            ],
        ),
        share("description_agrees", agrees, 0.92),
        share("description_grounded", grounded, 0.80),
        share("caption_near_copies", copies(written), 0.03, at_most=True),
        share("caption_near_copies_unguarded", copies(unguarded)),
        share("caption_names", [names_in(text) <= story_names(c) for c, text in zip(found, written, strict=True)]),
    ]


def story_names(case: Case) -> set[str]:
    """Everybody in the story who has a name: a new friend may come in."""
    return {a.character.name for frame in case.story.frames for a in frame.scene.actors if a.character.name}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--stories", type=int, default=50)
    parser.add_argument("--split", default="test")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stories = [sample_story(FIRST_SEED + number, split=arguments.split) for number in range(arguments.stories)]
    print(table(caption_figures(Captioner(arguments.pack), stories, 0, print)))


if __name__ == "__main__":
    main()
