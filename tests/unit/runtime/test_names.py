"""Whom a text names."""

from __future__ import annotations

import pytest

from services.runtime.names import named

NAMES = ("Rosa", "Otto", "Rosa Lee", "Zo\u00e9", "R.2")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Rosa's hat, and Rosa.", ("Rosa",)),
        ("Rosalind waves to rosa.", ()),
        ("Otto waves to Rosa Lee, not to Rosa.", ("Otto", "Rosa Lee", "Rosa")),
        ("Zoe\u0301 runs from R.2, and R72 stays.", ("Zo\u00e9", "R.2")),
        ("", ()),
    ],
)
def test_names_are_found_as_whole_words_in_their_order(text: str, found: tuple[str, ...]) -> None:
    assert named(NAMES, text) == found
    assert named((), text) == ()
