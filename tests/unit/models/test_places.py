"""The place lock: where a caption says that its frame is, its description is too; else where the last picture is."""

from __future__ import annotations

import pytest

from services.models.captions.places import At, faults, repaired, where

PLACES = ("the forest", "the mountains", "the beach", "the bedroom")
FOREST = At("in", "the forest")


@pytest.mark.parametrize(
    ("caption", "description", "right"),
    [
        ("In the forest, Tiko saw Dot.", "In the mountains by day. Dot cries.", "In the forest by day. Dot cries."),
        ("Tiko ran. At the beach, he sat.", "Tiko sits in the mountains.", "Tiko sits at the beach."),
        ("As the sun went down, in the bedroom, she slept.", "At the beach at sunset.", "In the bedroom at sunset."),
        ('"In the forest," said Dot.', "In the mountains. Dot talks.", "In the forest. Dot talks."),
        ("IN THE FOREST, Dot!", "In the Mountains. Dot.", "In the forest. Dot."),
    ],
)
def test_a_wrong_place_is_a_fault_and_is_mended(caption: str, description: str, right: str) -> None:
    assert faults(description, where(caption, PLACES), PLACES) == 1
    assert repaired(description, where(caption, PLACES), PLACES) == right
    assert faults(right, where(caption, PLACES), PLACES) == 0


@pytest.mark.parametrize(
    "caption",
    [
        "Dot read of a treasure hidden in the forest.",  # somewhere else
        "In the forest, Dot dreamed of the beach.",  # one of two
        "In the forests, Dot ran.",  # another word
        "Into the forest, then!",  # on the way
        "Dot ran.",
        "In the town, Dot ran.",  # no place that is known
    ],
)
def test_what_a_caption_does_not_plainly_say_is_left_to_the_model(caption: str) -> None:
    assert faults("In the mountains. Dot runs.", where(caption, PLACES), PLACES) == 0
    assert repaired("In the mountains. Dot runs.", where(caption, PLACES), PLACES) == "In the mountains. Dot runs."


def test_a_description_that_tells_no_place_or_the_right_one_among_others_is_left_alone() -> None:
    for description in ("Dot runs.", "At the beach. Behind it, in the forest, Dot runs."):
        assert faults(description, FOREST, PLACES) == 0
        assert repaired(description, FOREST, PLACES) == description
    assert where("In the forest, Dot ran.", ()) is None, "a pack that knows no places"


@pytest.mark.parametrize(
    ("caption", "at"),
    [
        ("Dot ran.", FOREST),
        ("Then the rain came, and they held hands.", FOREST),
        ("At the beach, Dot ran.", At("at", "the beach")),
        ("Dot read of a treasure on the beach.", None),  # the place is told, but not whether they are there
        ("They ran into the woods.", None),  # a place that nobody knows by that word
        ("Dot went home.", None),
        ("Tired, she lay in her bed.", None),
        ("She dreamed of mountains.", None),
        ("Dot was at the seaside.", None),
    ],
)
def test_a_caption_that_speaks_of_no_place_is_where_the_picture_is(caption: str, at: At | None) -> None:
    assert where(caption, PLACES, FOREST) == at
    assert where(caption, PLACES) == (at if at != FOREST else None), "nobody sees anything"


def test_a_description_begins_where_it_is() -> None:
    assert At("at", "the beach").opening == "At the beach"
