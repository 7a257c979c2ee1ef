"""Characters that were learned: their names in descriptions, and what is told of their looks."""

from __future__ import annotations

import pytest

from services.caption.job import Learned
from services.caption.learned import MOST_LEARNED, check_learned, completed, told
from services.models.captions import prompts
from services.runtime.errors import ValueOutOfRange

PIG, OWL = "a pink pig with a teal hat", "a grey owl in a red coat"
CAST = (Learned(name="Rosa", phrase=PIG), Learned(name="Otto", phrase=OWL), Learned(name="Zora"))


@pytest.mark.parametrize(
    ("caption", "description", "mended"),
    [
        ("Rosa ran.", "On the left Rosa, a pink pig with a teal hat, runs.", None),
        ("Pip ran.", "On the left Waiga, a blue elephant with a crown, runs.", None),
        ("Rosalind ran.", "A park.", None),
        ("Rosa ran.", "A park by day.", f"A park by day. Rosa, {PIG}, stands nearby."),
        ("Zora ran.", "A park by day.", "A park by day. Zora stands nearby."),
        (
            "Rosa ran.",
            "On the left Waiga, a blue pig with a crown, runs. Waiga's ball is Waigaish.",
            f"On the left Rosa, {PIG}, runs. Rosa's ball is Waigaish.",
        ),
        # Who is in a caption is nobody's double: neither the one of this frame nor the one of an earlier one.
        (
            "Rosa met Pip.",
            "Pip, an orange cat with a scarf, waves to Mina, a white sheep.",
            f"Pip, an orange cat with a scarf, waves to Mina, a white sheep. Rosa, {PIG}, stands nearby.",
        ),
        (
            "Otto gave Rosa a kite.",
            "Rosa, a pink pig with a teal hat, waves. Chaim, a blue elephant, jumps.",
            f"Rosa, {PIG}, waves. Otto, {OWL}, jumps.",
        ),
        (
            "Otto gave Rosa a kite.",
            "Chaim, a blue elephant, jumps. A duck sits.",
            f"Otto, {OWL}, jumps. A duck sits. Rosa, {PIG}, stands nearby.",
        ),
        # The same one made up twice is two; a third stays, because nobody is missing any more.
        (
            "Otto gave Rosa a kite.",
            "Chaim, a blue cat, jumps. Chaim, a blue cat, sits by Chaim. Chaim, a red cat, eats.",
            f"Otto, {OWL}, jumps. Rosa, {PIG}, sits by Otto. Chaim, a red cat, eats.",
        ),
        ("Rosa, Otto and Zora ran.", "A park.", f"A park. Rosa, {PIG}, stands nearby. Otto, {OWL}, stands nearby."),
    ],
)
def test_whom_a_caption_names_is_in_its_description(caption: str, description: str, mended: str | None) -> None:
    text = completed(description, caption, ["Mina woke."], CAST)
    assert text == (description if mended is None else mended)
    assert completed(text, caption, ["Mina woke."], CAST) == text, "once is enough"
    assert completed(description, caption, ["Mina woke."], ()) == description


@pytest.mark.parametrize(
    ("room", "mended"),
    [
        (200, f"Otto, {OWL}, jumps. Rosa, {PIG}, stands nearby."),
        (60, "Otto, jumps. Rosa stands nearby."),
        (30, "Chaim, a blue cat, jumps."),
        (10, f"Otto, {OWL}, jumps. Rosa, {PIG}, stands nearby."),
    ],
    ids=["all of it", "names alone", "nothing", "it did not fit before either"],
)
def test_a_name_that_does_not_fit_is_left_out_rather_than_a_frame(room: int, mended: str) -> None:
    description = "Chaim, a blue cat, jumps."
    found = completed(description, "Otto met Rosa.", [], CAST, fits=lambda text: len(text) <= room)
    assert found == mended


@pytest.mark.parametrize(
    "phrase", ["a pink pig with a teal top hat", "an old grey owl wearing round glasses", "a fox in a red coat"]
)
def test_looks_are_told_in_words_that_the_look_lock_reads(phrase: str) -> None:
    sentences = told([Learned(name="Rosa", phrase=phrase), Learned(name="Otto", phrase=PIG)])
    assert prompts.told_looks(sentences) == {"Rosa": phrase, "Otto": PIG}
    assert sentences[0] == f"Rosa, {phrase}, stands there."
    assert told([Learned(name="Rosa")]) == ()


@pytest.mark.parametrize(
    ("learned", "field"),
    [
        ([Learned(name="Rosa"), Learned(name=" ")], "characters[1].name"),
        ([Learned(name="R" * 101)], "characters[0].name"),
        ([Learned(name="Rosa", phrase="a" * 1001)], "characters[0].phrase"),
        ([Learned(name="Rosa")] * (MOST_LEARNED + 1), "characters"),
    ],
)
def test_who_cannot_be_told_of_is_refused_by_field(learned: list[Learned], field: str) -> None:
    with pytest.raises(ValueOutOfRange) as raised:
        check_learned(learned)
    assert raised.value.field_violations[0].field == field
    check_learned(CAST)
