"""Companions without a name keep their looks."""

from __future__ import annotations

import pytest

from services.models.captions.companions import repaired
from services.models.eyes import EyesShape

SHAPE = EyesShape(
    figure={
        "species": ["pig", "penguin", "dragon", "owl"],
        "colour": ["green", "grey", "orange"],
        "accessory": ["cap", "top hat", "glasses"],
        "accessory_colour": ["red", "blue"],
    },
    scene={},
    plural=["glasses"],
)
PIG = (
    "In the park. On the left Pip, an orange owl with a red cap, sits. On the right a green pig with a red cap stands."
)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("A green pig with a blue top hat runs.", "A green pig with a red cap runs."),
        ("A grey pig wearing a red cap runs.", "A green pig wearing a red cap runs."),
        ("Today a green dragon with a red cap runs.", "Today a green pig with a red cap runs."),
        ("A green pig with a red cap runs.", "A green pig with a red cap runs."),
        ("An orange pig with blue glasses runs.", "An orange pig with blue glasses runs."),  # one part is chance
        ("Pip, a green pig with a blue cap, runs.", "Pip, a green pig with a blue cap, runs."),  # the look lock's
        ("A green pigeon with a blue top hat runs.", "A green pigeon with a blue top hat runs."),
        (
            "A green pig with a red cap and a green pig with a blue cap run.",
            "A green pig with a red cap and a green pig with a blue cap run.",  # who was there is there
        ),
        (
            "A green pig with a blue cap and a grey pig with a red cap run.",
            "A green pig with a red cap and a grey pig with a red cap run.",  # nobody comes twice
        ),
    ],
)
def test_who_was_there_looks_as_before(said: str, kept: str) -> None:
    assert repaired(said, "They ran.", [PIG, "In the town. Pip, an orange owl with a red cap, sits."], SHAPE) == kept


def test_whom_the_caption_tells_of_is_somebody_new() -> None:
    said = "A green dragon with a red cap runs."
    assert repaired(said, "Then a dragon came.", [PIG], SHAPE) == said
    assert repaired(said, "Then two Dragons came.", [PIG], SHAPE) == said
    assert repaired(said, "Then somebody came.", [PIG], SHAPE) != said


def test_where_it_could_be_either_nothing_is_changed() -> None:
    earlier = [PIG, "A green pig with blue glasses sits."]
    assert repaired("A green pig with a blue top hat runs.", "", earlier, SHAPE).startswith(
        "A green pig with blue glass"
    )
    assert repaired("A green pig with a red top hat runs.", "", earlier, SHAPE).startswith("A green pig with a red cap")
    alike = "A green pig with blue glasses and a green pig with a red cap sit."
    assert repaired("A green pig with a red top hat runs.", "", [alike], SHAPE).startswith("A green pig with a red cap")
    tie = "A green pig with a red top hat and a green pig with a blue cap sit."
    said = "A green pig with a red cap and an owl run."
    assert repaired(said, "", [tie], SHAPE) == said


def test_articles_and_plurals_are_right() -> None:
    earlier = ["An orange owl with blue glasses sits."]
    assert repaired("A grey owl with blue glasses runs.", "", earlier, SHAPE) == "An orange owl with blue glasses runs."
    assert (
        repaired("An orange owl with a blue cap runs.", "", earlier, SHAPE) == "An orange owl with blue glasses runs."
    )
    assert repaired("And an orange owl in a blue cap.", "", earlier, SHAPE) == "And an orange owl in blue glasses."


def test_without_anybody_before_everything_stays() -> None:
    assert repaired("A grey owl with blue glasses runs.", "", [], SHAPE) == "A grey owl with blue glasses runs."


BOTH = (
    "On the left an orange owl with blue glasses stands happily. On the right Pip, a green pig with a red cap, points."
)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "In the park. On the left Pip, a green pig with a red cap, jumps, laughing. The sun is on the right.",
            "In the park. On the left Pip, a green pig with a red cap, jumps, laughing."
            " On the right an orange owl with blue glasses jumps, laughing. The sun is on the right.",
        ),
        (
            "In the park. Pip, a green pig with a red cap, runs.",  # nobody says where: as before
            "In the park. On the left an orange owl with blue glasses runs."
            " On the right Pip, a green pig with a red cap, runs.",
        ),
        (
            "An orange owl with blue glasses sits. It rains.",
            "On the left an orange owl with blue glasses sits."
            " On the right Pip, a green pig with a red cap, sits. It rains.",
        ),
        (
            "An orange owl with a blue cap sits.",  # first the looks, then who is missing
            "On the left an orange owl with blue glasses sits. On the right Pip, a green pig with a red cap, sits.",
        ),
        ("Dot, a grey owl with a blue cap, runs.", "Dot, a grey owl with a blue cap, runs."),  # somebody else
        ("In the park Pip, a green pig with a red cap, runs.", "In the park Pip, a green pig with a red cap, runs."),
        ("In the park at night.", "In the park at night."),
        (BOTH, BOTH),
    ],
)
def test_they_are_both_who_were_there(said: str, kept: str) -> None:
    assert repaired(said, "Then they laughed.", ["A grey owl with a red cap runs.", BOTH], SHAPE) == kept


@pytest.mark.parametrize("caption", ["Pip laughed.", '"They are late," said Pip.', "“Are they there?” asked Pip."])
def test_a_caption_of_one_leaves_one_alone(caption: str) -> None:
    said = "Pip, a green pig with a red cap, runs."
    assert repaired(said, caption, [BOTH], SHAPE) == said


@pytest.mark.parametrize(
    "before",
    ["", "Pip, a green pig with a red cap, sits.", f"{BOTH} In the middle a grey penguin with a red cap runs."],
)
def test_where_two_were_not_there_nobody_joins(before: str) -> None:
    said = "Pip, a green pig with a red cap, runs."
    assert repaired(said, "They ran.", [BOTH, before], SHAPE) == said
