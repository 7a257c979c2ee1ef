"""The invention guard: names that are nobody's, and whose they must be."""

from __future__ import annotations

import pytest

from services.models.captions.invention import faults, invented, repaired
from services.models.world import World

WORLD = World(
    words=(
        "waved",
        "came",
        "early",
        "thought",
        "park",
        "kite",
        "courage",
        "give",
        "held",
        "dropped",
        "is",
        "sun",
        "far",
    ),
    characters={"Pip": "an orange cat"},
    names=("Chu",),
)
STORY = ("Rosa waved to Pip in the park.",)


@pytest.mark.parametrize(
    ("text", "made_up"),
    [
        ("Naiprux came early.", ("Naiprux",)),
        ("In the park, Chais thought of Weeck, and Chais waved.", ("Chais", "Weeck")),
        ("Rosa came early to give Pip courage.", ()),  # of the story, of the cast
        ("Chu came early.", ()),  # of the names the pack has read
        ("Kite in hand, she waved.", ()),  # a word that begins a sentence
        ("The sun came early.", ()),
    ],
)
def test_a_name_is_made_up_that_neither_story_nor_pack_knows(text: str, made_up: tuple[str, ...]) -> None:
    assert invented(text, STORY, WORLD) == made_up
    assert faults(text, STORY, WORLD) == len(made_up)


def test_a_made_up_name_is_that_of_whom_the_pack_does_not_know() -> None:
    assert (
        repaired("Naiprux came early. Naiprux's kite is far.", STORY, WORLD) == "Rosa came early. Rosa's kite is far."
    )
    assert repaired("Chais came, and Weeck waved.", STORY, WORLD) == "Rosa came, and Weeck waved."
    two = (*STORY, "Then Kiri came.")
    assert repaired("Chais came, and Weeck waved.", two, WORLD) == "Rosa came, and Kiri waved."


def test_nobody_is_named_twice_and_nobody_is_dragged_in() -> None:
    assert repaired("Rosa gave it to Naiprux.", STORY, WORLD) == "Rosa gave it to Naiprux."
    assert repaired("Naiprux came early.", ("Pip waved in the park.",), WORLD) == "Naiprux came early."


@pytest.mark.parametrize(
    ("learned", "text", "told"),
    [
        (("Kite",), "Pip held Kite.", "Pip held Kite."),  # somebody's name, although the pack knows kites
        (("Kite", "Rosa"), "Kite came early.", "Kite came early."),
        (("Rosa Lee",), "Naiprux waved to Zumbel.", "Rosa Lee waved to Zumbel."),  # one person, not two
        (("Rosa Lee",), "Rosa came early.", "Rosa came early."),  # short for her
        (("Anna-Lena",), "Naiprux came early.", "Anna-Lena came early."),
        (("Kiri", "Rosa"), "Naiprux came early.", "Rosa came early."),  # whom the story named comes first
        (("Ro\\1",), "Naiprux came early.", "Ro\\1 came early."),
    ],
)
def test_a_learned_name_is_one_person_whatever_its_words_mean(learned: tuple[str, ...], text: str, told: str) -> None:
    story = STORY if "Rosa" in learned else ("Pip waved in the park.",)
    assert repaired(text, story, WORLD, learned) == told
    assert not faults(told.replace("Zumbel", "Pip"), story, WORLD, learned)


def test_a_pack_that_does_not_say_what_it_knows_may_name_whom_it_likes() -> None:
    assert faults("Naiprux came early.", STORY, World()) == 0
    assert repaired("Naiprux came early.", STORY, World()) == "Naiprux came early."
