"""A training row holds exactly the prompts of serving, side by side and blind to each other."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from services.models.captions import llava, prompts
from services.models.tokenizer import StoryTokenizer
from services.runtime.config import SHIPPED_PACKS
from training.captions_data import (
    IGNORED,
    Frame,
    Row,
    RowRecipe,
    Stories,
    _row,
    batch,
    moved_to,
    rename,
    story_row,
    tale_row,
)
from training.toon.grammar import describe_plainly, parse, phrase
from training.toon.lexicon import SETTING_CUES
from training.toon.stories import told_value
from training.toon.world import sample_story

TOKENIZER = StoryTokenizer.load(SHIPPED_PACKS / "toon" / "tokenizer")
RECIPE = RowRecipe(image_tokens_count=4)
QUESTIONS = [
    (prompts.picture_prompt(TOKENIZER), "A cat sits."),
    (prompts.story_prompt(TOKENIZER, ["Mina ran.", "She fell."], 385), "She got up."),
    (prompts.description_prompt(TOKENIZER, "She fell.", "She got up.", 385), "Mina, a rabbit, stands."),
]


def row(*numbers: int) -> Row:
    """A row with some of the questions."""
    image_HWC = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return _row(image_HWC, [QUESTIONS[number] for number in numbers], RECIPE, TOKENIZER)


def test_each_question_reads_what_it_would_read_alone() -> None:
    together = batch([row(0, 1, 2)], TOKENIZER.pad_id)
    segments = np.array(row(0, 1, 2).segments)
    for number in range(3):
        alone = batch([row(number)], TOKENIZER.pad_id)
        seen = (segments == 0) | (segments == number + 1)
        assert (together.ids_BN[0, seen] == alone.ids_BN[0]).all()
        assert (together.positions_BN[0, seen] == alone.positions_BN[0]).all()
        assert (together.labels_BN[0, seen] == alone.labels_BN[0]).all()
        own = np.flatnonzero(segments == number + 1)
        visible = together.visible_B1NN[0, 0, own]
        assert not visible[:, ~seen].any()
        assert (visible[:, seen] == alone.visible_B1NN[0, 0, -len(own) :]).all()


def test_the_prompt_is_the_one_of_serving_with_the_image_token_repeated() -> None:
    prompt = QUESTIONS[1][0].ids
    expected = list(prompt)
    place = expected.index(TOKENIZER.image_id)
    expected[place : place + 1] = [TOKENIZER.image_id] * 4
    assert list(row(1).ids[: len(expected)]) == expected


def test_only_the_answer_is_learned() -> None:
    one = row(2)
    answer = prompts.answer_ids(TOKENIZER, QUESTIONS[2][1])
    assert list(one.labels) == [IGNORED] * (len(one.ids) - len(answer)) + answer


def test_the_model_honours_the_mask() -> None:
    """transformers must take our mask as it is: else a question would see its neighbours' answers in training only."""
    import torch

    from training.captions import answer_loss

    model = llava.build(llava.TINY, TOKENIZER, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)  # fresh weights hardly look at their context; these do
        given = batch([row(0, 1, 2)], TOKENIZER.pad_id)
        together = answer_loss(model, given).item()
        total, count = 0.0, 0
        for number in range(3):
            tokens = len(prompts.answer_ids(TOKENIZER, QUESTIONS[number][1]))
            total += tokens * answer_loss(model, batch([row(number)], TOKENIZER.pad_id)).item()
            count += tokens
        unmasked = answer_loss(
            model, replace(given, visible_B1NN=np.tri(len(row(0, 1, 2).ids), dtype=bool)[None, None])
        )
    assert together == pytest.approx(total / count, rel=0.003)
    assert together != pytest.approx(unmasked.item(), rel=0.01)


def test_names_are_replaced_as_whole_words() -> None:
    assert rename(["Mina met Minaret.", "Mina's kite"], {"Mina": "Zork"}) == ["Zork met Minaret.", "Zork's kite"]


def test_a_tale_is_the_story_question_without_its_picture() -> None:
    captions = ["Mina ran.", "She fell."]
    tale = tale_row(captions, RECIPE, TOKENIZER, random.Random(0))
    asked = prompts.story_prompt(TOKENIZER, captions[:1], 385).ids
    answer = prompts.answer_ids(TOKENIZER, captions[1])
    place = asked.index(TOKENIZER.image_id)
    assert list(tale.ids) == [*asked[:place], *asked[place + 1 :], *answer]
    assert list(tale.labels[-len(answer) :]) == answer
    # Every word stands where it will stand behind a picture.
    assert list(tale.positions) == [*range(place), *range(place + 4, place + 4 + len(tale.ids) - place)]


def test_a_tale_learns_the_captions_it_reads_too() -> None:
    tale = tale_row(["Mina ran.", "She fell.", "She got up."], RECIPE, TOKENIZER, random.Random(1))
    learned = TOKENIZER.decode([index for index in tale.labels if index != IGNORED])
    assert "Mina ran." in learned


def test_rows_with_and_without_a_picture_are_not_mixed() -> None:
    tale = tale_row(["Mina ran.", "She fell."], RECIPE, TOKENIZER, random.Random(0))
    assert batch([tale, tale], TOKENIZER.pad_id).images_BHWC is None
    with pytest.raises(ValueError, match="picture"):
        batch([tale, row(0)], TOKENIZER.pad_id)


def test_the_question_tells_what_those_look_like_whom_the_captions_name() -> None:
    story = sample_story(3)
    drawn = [Frame(number, f.scene, f.caption, f.description) for number, f in enumerate(story.frames)]
    stories = Stories(np.zeros((5, 32, 32, 3), np.uint8), (tuple(drawn),))
    recipe = replace(RECIPE, tasks=("descriptive",), rename_ratio=0.0, looks_ratio=1.0)
    for index in range(4):
        row = story_row(stories, drawn, index, recipe, TOKENIZER, random.Random(0))
        question = TOKENIZER.decode([i for i in row.ids if i != TOKENIZER.image_id])
        for actor in drawn[index + 1].scene.actors:
            name = str(actor.character.name)
            if re.search(rf"\b{name}\b", f"{drawn[index].caption} {drawn[index + 1].caption}"):
                assert f"{name}, {phrase(actor.character.look)}" in question.partition("Previous")[0]


def test_an_invented_name_has_the_look_of_whom_it_stands_for() -> None:
    drawn = [Frame(n, f.scene, f.caption, f.description) for n, f in enumerate(sample_story(3).frames)]
    stories = Stories(np.zeros((5, 32, 32, 3), np.uint8), (tuple(drawn),))
    recipe = replace(RECIPE, tasks=("descriptive",), rename_ratio=1.0, looks_ratio=1.0)
    row = story_row(stories, drawn, 0, recipe, TOKENIZER, random.Random(0))
    question = TOKENIZER.decode([i for i in row.ids if i != TOKENIZER.image_id])
    assert "Cast:" in question
    assert not any(name in question for frame in drawn for name in frame.names)


def test_the_picture_says_where_it_is_when_the_captions_do_not() -> None:
    frames = [
        Frame(number, f.scene, f.caption, f.description)
        for seed in range(40)
        for number, f in enumerate(sample_story(seed).frames)
    ]
    pairs = [(a, b) for a, b in pairwise(frames) if b.picture > 0]
    other = replace(frames[0].scene, setting="kitchen", time="night", side="left", weather="clear")
    moved = [(moved_to(other, now, following), now, following) for now, following in pairs]
    open_ones = [(scene, now, following) for scene, now, following in moved if scene is not None]
    assert 0.1 < len(open_ones) / len(moved) < 0.95
    for scene, now, following in open_ones:
        assert (scene.setting, scene.side) == ("kitchen", "left")
        assert scene.actors == following.scene.actors
        assert parse(describe_plainly(scene)).setting == "kitchen"
        assert scene.time in ("night", following.scene.time)
        assert told_value(SETTING_CUES, f"{now.caption} {following.caption}") is None
    told = [following for scene, _, following in moved if told_value(SETTING_CUES, following.caption)]
    assert told
    assert all(scene is None for scene, _, following in moved if following in told)


def test_a_row_over_another_picture_is_described_as_being_there() -> None:
    stories_ = [
        tuple(
            Frame(number * 5 + n, f.scene, f.caption, f.description) for n, f in enumerate(sample_story(number).frames)
        )
        for number in range(30)
    ]
    images = np.zeros((150, 32, 32, 3), np.uint8)
    images[:] = np.arange(150, dtype=np.uint8)[:, None, None, None]
    stories = Stories(images, tuple(stories_))
    recipe = replace(RECIPE, tasks=("descriptive",), rename_ratio=0.0, elsewhere_ratio=1.0)
    places = {frame.picture: frame.scene.setting for story in stories_ for frame in story}
    seen = 0
    for number, story in enumerate(stories_):
        rng = random.Random(number)
        row = story_row(stories, story, 1, recipe, TOKENIZER, rng)
        answer = TOKENIZER.decode([index for index in row.labels if index not in (IGNORED, TOKENIZER.eos_id)])
        assert row.image_HWC is not None
        picture = int(np.median(row.image_HWC))
        if picture in places and abs(picture - story[1].picture) > 20 and row.image_HWC.std() == 0:
            seen += 1
            assert parse(answer).setting == places[picture]
    assert seen >= 3
