"""The name lock."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from services.models.captions.cast import Cast, name_tokens
from services.models.tokenizer import StoryTokenizer
from services.runtime.config import SHIPPED_PACKS
from training.toon.grammar import describe
from training.toon.reading import parse
from training.toon.world import sample_story

CAST = Cast(("Mina", "Pip", "Bruno"))
TOKENIZER = StoryTokenizer.load(SHIPPED_PACKS / "toon" / "tokenizer")


def test_strangers_are_those_whom_no_text_mentions() -> None:
    assert CAST.strangers(["Mina's kite", "Pipa and Bruno's friend"]) == {"Pip"}
    assert CAST.strangers(["She flew it.", "Zora laughed."]) == frozenset()


def test_only_whole_name_tokens_are_locked() -> None:
    tokens = name_tokens(TOKENIZER, ["Mina", "Zzyxqo"])
    assert {TOKENIZER.decode([index]).strip() for index in tokens} == {"Mina"}


def test_a_name_that_begins_like_a_strangers_can_be_written() -> None:
    caption = "Mina met Tommy."
    (tom,) = TOKENIZER.encode(" Tom")
    assert tom in TOKENIZER.encode(" Tommy"), "else this test says nothing"
    assert tom in name_tokens(TOKENIZER, ["Tom"])
    assert tom not in name_tokens(TOKENIZER, ["Tom"], (caption,))


def test_a_stranger_of_several_tokens_is_found_afterwards() -> None:
    cast = Cast(("Mina", "Pip", "Daisy"))
    assert len(TOKENIZER.encode(" Daisy")) > 1, "else it could be forbidden"
    assert cast.faults("Mina and Pip play.", "Pip slept.", "Mina met Pip.") == 0
    assert cast.faults("Mina, Pip and Daisy play.", "Pip slept.", "Mina met Pip.") == 1
    assert cast.faults("Mina and Daisy play, Daisy sings.", "Pip slept.", "Mina met Pip.") == 3


def test_a_name_inside_somebody_elses_word_is_not_the_casts() -> None:
    assert CAST.mentioned("Pip-Squeak, O'Pip and Pipa met Mina-Lou.") == frozenset()
    assert CAST.mentioned("(Pip) 'Mina' Bruno—at last.") == {"Pip", "Mina", "Bruno"}


REPAIRS = {
    "nothing is wrong": ("Mina waves to Pip.", "Mina met Pip.", "Mina waves to Pip."),
    "doubled, one missing": ("Mina waves to Mina.", "Mina met Pip.", "Mina waves to Pip."),
    "doubled, its possessive": ("Mina holds Mina's kite.", "Mina met Pip.", "Mina holds Pip's kite."),
    "three times, two missing": ("Mina, Mina, Mina.", "Mina met Pip and Gus.", "Mina, Pip, Gus."),
    "doubled, nobody missing": ("Mina waves. Mina smiles.", "Mina left.", "Mina waves. Somebody smiles."),
    "a stranger, one missing": ("Mina and Daisy play.", "Mina met Pip.", "Mina and Pip play."),
    "a stranger's possessive": ("Daisy's kite flies; Mina runs.", "Mina met Gus.", "Gus's kite flies; Mina runs."),
    "a possessive without an s": ("Boris' kite flies; Mina runs.", "Mina met Pip.", "Pip's kite flies; Mina runs."),
    "a name in quotes": ("A sign says 'Boris' in red; Mina runs.", "Mina met Pip.",
                         "A sign says 'Pip' in red; Mina runs."),
    "a curly possessive": ("Mina holds Daisy’s kite.", "Mina met Pip.", "Mina holds Pip’s kite."),
    "a stranger, nobody missing": ("Mina and Daisy play.", "Mina sang.", "Mina and somebody play."),
    "a stranger's thing, nobody missing": ("Mina holds Daisy's kite.", "Mina sang.", "Mina holds somebody's kite."),
    "a stranger with looks after": ("Daisy, a red fox in a cap, runs. Mina sits.", "Mina sang.",
                                    "A red fox in a cap, runs. Mina sits."),
    "a stranger with looks before": ("On the left the red fox Daisy in a cap runs. Mina sits.", "Mina sang.",
                                     "On the left the red fox in a cap runs. Mina sits."),
    "a stranger behind a place": ("On the right side Daisy in a cap runs. Mina sits.", "Mina sang.",
                                  "On the right side somebody in a cap runs. Mina sits."),
    "a stranger before the doubled": ("Mina waves to Mina. Daisy runs.", "Mina met Pip.",
                                      "Mina waves to somebody. Pip runs."),
    "a stranger twice": ("Daisy runs and Daisy sings. Mina sits.", "Mina met Pip.",
                         "Pip runs and somebody sings. Mina sits."),
    "somebody missing": ("A red fox runs", "Pip ran.", "A red fox runs. Pip stands nearby."),
    "several missing, in the caption's order": ("A red fox runs!", "Pip ran to Mina.",
                                                "A red fox runs! Pip stands nearby. Mina stands nearby."),
    "a caption that only says she": ("Daisy runs.", "She ran.", "Bruno runs."),
    "a user's own names": ("Zora and Zora play with Pip-Squeak and Daisy.", "Zora met Pip.",
                           "Zora and Zora play with Pip-Squeak and Pip."),
    "a user's own longer name": ("Mary Rose and Mary Rose wave to Rose Bell and Rose Bell.",
                                 "Mary Rose and Rose Bell wave to Mina.",
                                 "Mary Rose and Mary Rose wave to Rose Bell and Rose Bell. Mina stands nearby."),
}  # fmt: skip


@pytest.mark.parametrize(("description", "caption", "repaired"), REPAIRS.values(), ids=REPAIRS)
def test_a_description_gets_the_names_it_should_have(description: str, caption: str, repaired: str) -> None:
    cast = Cast(("Mina", "Pip", "Bruno", "Daisy", "Gus", "Boris", "Rose"))
    assert cast.repaired(description, "Bruno slept.", caption) == repaired
    if "Mary Rose" not in description:  # our Rose counts as named twice, and theirs is not ours to touch
        assert cast.faults(repaired, "Bruno slept.", caption) == 0
    assert cast.repaired(repaired, "Bruno slept.", caption) == repaired, "one pass does all"


def test_captions_that_name_nobody_make_nobody_a_stranger() -> None:
    assert CAST.repaired("Mina waves to Pip.", "He slept.", "She woke.") == "Mina waves to Pip."


def test_a_cast_of_nobody_repairs_nothing() -> None:
    assert Cast().repaired("Mina and Mina wave.", "Pip slept.", "Pip woke.") == "Mina and Mina wave."


def test_a_repair_that_does_not_fit_is_left() -> None:
    def repaired(description: str, caption: str, characters_max: int) -> str:
        return CAST.repaired(description, "Mina slept.", caption, lambda text: len(text) <= characters_max)

    assert repaired("A fox runs.", "Pip and Bruno ran.", 31) == "A fox runs. Pip stands nearby."
    assert repaired("A fox runs.", "Bruno and Pip ran.", 31) == "A fox runs. Pip stands nearby."
    assert repaired("A fox runs.", "Pip and Bruno ran.", 29) == "A fox runs."
    assert repaired("Mina, Mina.", "Mina met Bruno.", 12) == "Mina, Bruno."
    assert repaired("Mina, Mina.", "Mina met Bruno.", 11) == "Mina, Mina."
    assert repaired("Mina, Mina.", "Mina met Bruno.", 5) == "Mina, Bruno.", "it is cut anyway, and named right"


def test_who_is_added_reads_back_as_somebody_who_stands() -> None:
    description = "In the park in the daytime. Mina, a red fox with a blue cap, holds a kite. The sun is on the left"
    read = parse(CAST.repaired(description, "Mina slept.", "Pip met Bruno and Mina."))
    assert [(actor.name, actor.action) for actor in read.actors] == [
        ("Mina", "hold"),
        ("Pip", "stand"),
        ("Bruno", "stand"),
    ]
    assert (read.setting, read.time, read.side, read.ground_prop) == ("park", "day", "left", None)


def test_descriptions_of_another_story_are_repaired_and_keep_everything_but_the_names() -> None:
    cast = Cast.load(SHIPPED_PACKS / "toon")
    repairs = 0
    for seed in range(40):
        told, asked = sample_story(seed), sample_story(seed + 1000)
        for number in range(1, len(told.frames)):
            description = describe(told.frames[number].scene, random.Random(seed))
            captions = asked.frames[number - 1].caption, asked.frames[number].caption
            repaired = cast.repaired(description, *captions)
            repairs += repaired != description
            assert cast.faults(repaired, *captions) == 0
            before, after = parse(description), parse(repaired)
            assert cast.mentioned(captions[1]) <= set(after.names)
            assert (after.setting, after.time, after.side, after.weather, after.ground_prop) == (
                before.setting,
                before.time,
                before.side,
                before.weather,
                before.ground_prop,
            )
    assert repairs > 50, "else this test says nothing"


def test_a_saved_cast_comes_back_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    assert Cast.load(tmp_path) == Cast()
    CAST.save(tmp_path)
    assert set(Cast.load(tmp_path).names) == set(CAST.names)


@pytest.mark.parametrize("text", ["[]", '{"names": "Mina"}', '{"names": [1]}', '{"names": [""]}', "{"])
def test_a_malformed_cast_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cast.json").write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 - JSONDecodeError is one too
        Cast.load(tmp_path)
