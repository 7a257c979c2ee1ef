"""The repetition guard's rules."""

from __future__ import annotations

import pytest

from services.models.captions.repetition import NEAR_COPY_RATIO, faults, is_near_copy, repeats_itself

EARLIER = ("Once upon a time Mina found a red kite.", "She let it fly over the hill.")


@pytest.mark.parametrize(
    "text",
    [
        "She let it fly over the hill.",
        "SHE LET IT FLY OVER THE HILL!",
        "She let it fly over the hills.",
        "Once upon a time Mina found a red kit.",
    ],
)
def test_a_caption_that_nearly_copies_an_earlier_one_is_found(text: str) -> None:
    assert is_near_copy(text, EARLIER)
    assert faults(text, EARLIER) == 1


def test_a_caption_that_only_sounds_like_an_earlier_one_is_not_a_copy() -> None:
    assert not is_near_copy("Then she lost the red kite and let Mina cry.", EARLIER)
    assert not is_near_copy("She let it fly.", ())


def test_the_ratio_is_where_a_copy_begins() -> None:
    ten, changed = "abcdefghij", "abcdefghiX"
    assert is_near_copy(changed, [ten]) is (NEAR_COPY_RATIO <= 0.9)
    assert not is_near_copy("abcdefghXY", [ten])


def test_a_long_copy_is_found_although_its_letters_are_all_frequent() -> None:
    text = "the bear and the hare ate a red pear near the deer and the bear had a beard " * 6
    assert is_near_copy(f"But {text}", [text])


@pytest.mark.parametrize(
    "text",
    [
        "He ran. He ran.",
        "He ran! The sun set. he  RAN...",
        '"Stop!" cried Pip. "Stop!" And he stopped.',
        "The red kite and Mina saw the red kite and laughed.",
        "The red kite flew. Then the, red KITE flew.",
        "ha ha ha ha ha",
        "彼は走った。彼は走った。",
    ],
)
def test_a_caption_that_repeats_itself_is_found(text: str) -> None:
    assert repeats_itself(text)
    assert faults(text, ()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "Mina saw the red kite, and the red kite saw Mina.",
        "He ran and he ran and she ran.",
        "It cost 3.5 or 2.5 and not 1.5 coins.",
        "Don't stop! I don't.",
    ],
)
def test_a_caption_that_says_a_few_words_again_is_left_alone(text: str) -> None:
    assert not repeats_itself(text)


def test_a_caption_can_break_both_rules() -> None:
    assert faults("He ran. He ran.", ["He ran. He ran!"]) == 2
    assert faults("Pip flew to the moon.", EARLIER) == 0
