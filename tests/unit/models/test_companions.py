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
