"""The name lock."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.models.cast import Cast, name_tokens
from services.models.tokenizer import StoryTokenizer
from services.runtime.config import SHIPPED_PACKS

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


def test_a_saved_cast_comes_back_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    assert Cast.load(tmp_path) == Cast()
    CAST.save(tmp_path)
    assert set(Cast.load(tmp_path).names) == set(CAST.names)


@pytest.mark.parametrize("text", ["[]", '{"names": "Mina"}', '{"names": [1]}', '{"names": [""]}', "{"])
def test_a_malformed_cast_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cast.json").write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 - JSONDecodeError is one too
        Cast.load(tmp_path)
