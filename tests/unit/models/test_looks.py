"""The look lock: looks that a description gets wrong, and how they are mended."""

from __future__ import annotations

import pytest

from services.models.captions.looks import faults, repaired

LOOKS = {"Tessa": "a red duck with a teal top hat", "Pip": "an orange cat with a blue scarf"}
RIGHT = "On the beach. Tessa, a red duck with a teal top hat, runs. Pip, an orange cat with a blue scarf, sits."


@pytest.mark.parametrize(
    ("description", "count"),
    [
        (RIGHT, 0),
        (RIGHT.replace("with a teal", "wearing a teal"), 0),
        (RIGHT.replace("red duck", "green dragon"), 1),
        (RIGHT.replace("red duck", "red cat").replace("blue scarf", "blue cap"), 2),
        ("Zoe, a pink rabbit with a yellow bow, runs.", 0),  # nobody has said what Zoe looks like
        ("Tessa runs.", 0),
        (f"{RIGHT} A red duck with a teal top hat jumps.", 1),
        (f"{RIGHT} On the right, a red duck with a teal top hat jumps.", 1),
    ],
)
def test_wrong_looks_are_counted(description: str, count: int) -> None:
    assert faults(description, LOOKS) == count


def test_wrong_looks_become_the_known_ones() -> None:
    wrong = RIGHT.replace("red duck", "green dragon").replace("blue scarf", "blue cap")
    assert repaired(wrong, LOOKS) == RIGHT
    assert repaired(RIGHT, LOOKS) == RIGHT


def test_a_sentence_about_a_double_is_left_out() -> None:
    assert repaired(f"{RIGHT} On the right, a red duck with a teal top hat jumps.", LOOKS) == RIGHT
    beside = RIGHT.replace("runs.", "runs beside a red duck with a teal top hat.")
    assert repaired(beside, LOOKS) == beside  # nothing could be left out of it


def test_two_who_look_alike_double_nothing() -> None:
    twins = {"Tessa": LOOKS["Tessa"], "Tom": LOOKS["Tessa"]}
    both = "Tessa, a red duck with a teal top hat, runs. Tom, a red duck with a teal top hat, sits."
    assert faults(both, twins) == 0
    assert faults(f"{both} A red duck with a teal top hat jumps.", twins) == 1
