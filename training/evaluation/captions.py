"""Measures a pack's captioner on held-out stories: does it say who, where and when, and does it look at the picture?

    python -m training.evaluation.captions --pack services/models/packs/toon

Figures (all ratios, 0..1):

    parse            descriptions of true captions that read back: everybody with a species, a setting and a time of day
    names            of those, the ones that name whom the caption names, and nobody who is not in the story so far
    cast             descriptions whose characters are exactly the true ones, named or not
    setting, time    descriptions with the true setting, time of day
    setting_carried  the same where the caption is silent about the setting and the frame before has it
    time_carried     the same for the time of day
    grounded         captions silent about the setting: another story's picture takes its setting into the description
    chain_names      `names` when the caption itself was written by the `story` adapter
    near_copy        written captions that repeat an earlier one of their story (lower is better)
    story_names      written captions in which every name belongs to the story so far

The texts are decoded by plain transformers from the files as they are shipped, with the name lock of serving
(`services.models.cast`). Knows no serving.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from services.models import llava, prompts
from services.models.cast import Cast, name_tokens
from services.models.tokenizer import StoryTokenizer
from training.toon.cast import MAIN, NEW, SIDE_NAMES
from training.toon.grammar import parse
from training.toon.lexicon import SETTING_CUES, TIME_CUES
from training.toon.reading import ParsedDescription
from training.toon.render import render
from training.toon.world import Story, StoryFrame, sample_story

NEAR_COPY_RATIO = 0.9  # difflib's similarity from which two captions count as the same
_ALL_NAMES = sorted({c.name for c in (*MAIN, *NEW) if c.name} | {name for name, _ in SIDE_NAMES})
_NAME = re.compile(r"\b(" + "|".join(_ALL_NAMES) + r")\b")
NAME_LOCK_TRIES, RETRY_TEMPERATURE = 7, 0.7  # as in the caption service
_BUDGET_TOKENS = 352
_ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Question:
    """One prompt and the picture it is about."""

    image_HWC: npt.NDArray[np.uint8]
    prompt: prompts.Prompt
    forbidden_ids: tuple[int, ...] = ()  # the name lock, as it is served


class Captioner:
    """A pack's LLaVA with both adapters, by plain transformers."""

    def __init__(self, pack: Path) -> None:
        self.tokenizer = StoryTokenizer.load(pack / "tokenizer")
        self.models: dict[str, Any] = {
            name: llava.load_adapter(llava.load_base(pack / "llava"), pack / "adapters" / name)
            for name in llava.ADAPTERS
        }
        self.cast = Cast.load(pack)
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
            rows.append([*ids[:place], *[image_id] * self.image_tokens_count, *ids[place + 1 :]])
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
        return [prompts.clean(self.tokenizer.decode(row)) for row in written_BN[:, longest:].tolist()]


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
    def known_names(self) -> set[str]:
        """Everybody named in the captions so far."""
        return names_in(" ".join(self.captions))


def cases(stories_count: int, seed: int, split: str) -> Iterator[Case]:
    """Four cases a story."""
    for number in range(stories_count):
        story = sample_story(seed + number, split=split)
        for index in range(len(story.frames) - 1):
            yield Case(story, index, render(story.frames[index].scene, size_px=128))


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


def says(cues: dict[str, str], text: str) -> bool:
    """Whether a text has any of the cues."""
    return any(re.search(rf"\b(?:{cue})\b", text, re.IGNORECASE) for cue in cues.values())


def is_near_copy(text: str, earlier: Sequence[str]) -> bool:
    """Whether a caption repeats an earlier one."""
    return any(difflib.SequenceMatcher(None, text, other).ratio() >= NEAR_COPY_RATIO for other in earlier)


def ratio(values: Sequence[bool]) -> float:
    """Share of true values; 0 when there are none."""
    return sum(values) / len(values) if values else 0.0


def evaluate(pack: Path, stories_count: int = 50, seed: int = 0, split: str = "test") -> dict[str, float]:
    """The figures named at the top of this module, over `4 * stories_count` cases."""
    captioner = Captioner(pack)
    tokenizer = captioner.tokenizer
    found = list(cases(stories_count, seed, split))

    def describe(captions: Sequence[str], images: Sequence[npt.NDArray[np.uint8]]) -> list[str]:
        questions = []
        for case, caption, image in zip(found, captions, images, strict=True):
            prompt = prompts.description_prompt(tokenizer, case.now.caption, caption, _BUDGET_TOKENS)
            strangers = captioner.cast.strangers((case.now.caption, caption))
            questions.append(Question(image, prompt, name_tokens(tokenizer, strangers, (case.now.caption, caption))))
        texts = captioner.answer("descriptive", questions)
        torch.manual_seed(seed)
        for _ in range(NAME_LOCK_TRIES):  # as served: the best of some more tries where somebody is missing
            faults = [
                captioner.cast.faults(text, case.now.caption, caption)
                for case, text, caption in zip(found, texts, captions, strict=True)
            ]
            again = [number for number, count in enumerate(faults) if count]
            sampled = captioner.answer("descriptive", [questions[n] for n in again], temperature=RETRY_TEMPERATURE)
            for number, text in zip(again, sampled, strict=True):
                if captioner.cast.faults(text, found[number].now.caption, captions[number]) < faults[number]:
                    texts[number] = text
        return texts

    own_images = [case.image_HWC for case in found]
    true_captions = [case.following.caption for case in found]
    told = describe(true_captions, own_images)
    read = [parse(text) for text in told]
    written = captioner.answer(
        "story",
        [Question(case.image_HWC, prompts.story_prompt(tokenizer, case.captions, _BUDGET_TOKENS)) for case in found],
    )
    chained = describe(written, own_images)

    # The same questions over the next story's pictures: a description that follows them has looked.
    swapped = found[4:] + found[:4]
    over_swapped = [parse(text) for text in describe(true_captions, [case.image_HWC for case in swapped])]

    quiet_place = [not says(SETTING_CUES, caption) for caption in true_captions]
    quiet_time = [not says(TIME_CUES, caption) for caption in true_captions]
    rows = list(zip(found, read, strict=True))
    return {
        "parse": ratio([is_whole(one) for one in read]),
        "names": ratio(
            [
                is_whole(one) and names_agree(text, case.following.caption, case.known_names)
                for (case, one), text in zip(rows, told, strict=True)
            ]
        ),
        "cast": ratio(
            [
                sorted(map(str, one.characters)) == sorted(case.following.scene.labels()["characters"])
                for case, one in rows
            ]
        ),
        "setting": ratio([one.setting == case.following.scene.setting for case, one in rows]),
        "time": ratio([one.time == case.following.scene.time for case, one in rows]),
        "setting_carried": ratio(
            [
                one.setting == case.now.scene.setting
                for (case, one), quiet in zip(rows, quiet_place, strict=True)
                if quiet and case.now.scene.setting == case.following.scene.setting
            ]
        ),
        "time_carried": ratio(
            [
                one.time == case.now.scene.time
                for (case, one), quiet in zip(rows, quiet_time, strict=True)
                if quiet and case.now.scene.time == case.following.scene.time
            ]
        ),
        "grounded": ratio(
            [
                one.setting == other.now.scene.setting
                for one, case, other, quiet in zip(over_swapped, found, swapped, quiet_place, strict=True)
                if quiet
                and case.now.scene.setting == case.following.scene.setting
                and other.now.scene.setting != case.now.scene.setting
            ]
        ),
        "chain_names": ratio(
            [
                is_whole(parse(text)) and names_agree(text, caption, case.known_names)
                for case, caption, text in zip(found, written, chained, strict=True)
            ]
        ),
        "near_copy": ratio([is_near_copy(text, case.captions) for case, text in zip(found, written, strict=True)]),
        "story_names": ratio([names_in(text) <= story_names(case) for case, text in zip(found, written, strict=True)]),
    }


def story_names(case: Case) -> set[str]:
    """Everybody in the story who has a name: a new friend may come in."""
    return {a.character.name for frame in case.story.frames for a in frame.scene.actors if a.character.name}


def main() -> None:
    """Print the figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--stories", type=int, default=50)
    parser.add_argument("--split", default="test")
    arguments = parser.parse_args()
    figures = evaluate(arguments.pack, arguments.stories, split=arguments.split)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
