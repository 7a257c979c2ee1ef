"""The place lock: where a caption says that its frame is, its description is too."""

from __future__ import annotations

import pytest

from services.models.captions.places import faults, repaired

PLACES = ("the forest", "the mountains", "the beach", "the bedroom")


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
    assert faults(description, caption, PLACES) == 1
    assert repaired(description, caption, PLACES) == right
    assert faults(right, caption, PLACES) == 0


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
    assert faults("In the mountains. Dot runs.", caption, PLACES) == 0
    assert repaired("In the mountains. Dot runs.", caption, PLACES) == "In the mountains. Dot runs."


def test_a_description_that_tells_no_place_or_the_right_one_among_others_is_left_alone() -> None:
    for description in ("Dot runs.", "At the beach. Behind it, in the forest, Dot runs."):
        assert faults(description, "In the forest, Dot ran.", PLACES) == 0
        assert repaired(description, "In the forest, Dot ran.", PLACES) == description
    assert faults("In the mountains. Dot runs.", "In the forest, Dot ran.", ()) == 0, "a pack that knows no places"
