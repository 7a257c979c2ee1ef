"""Every string is encodable, and none becomes a special token."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.models.tokenizer import SPECIAL_TOKENS, VOCABULARY_SIZE, StoryTokenizer
from services.runtime.config import SHIPPED_PACKS

TOKENIZER = StoryTokenizer.load(SHIPPED_PACKS / "toon" / "tokenizer")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not TOKENIZER.special_ids & set(ids)


@pytest.mark.parametrize(
    "text", ["Zora", "👩‍👩‍👧 🪁", "مرحبا بالعالم", "שלום", "<image><eos><unk>", "Çağrı", "\x00\x7f", "吾輩は猫"]
)
def test_names_and_scripts_are_ordinary_tokens(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_tokens_have_fixed_ids() -> None:
    assert [TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.image_id, TOKENIZER.eos_id] == [0, 1, 2, 3]
    assert TOKENIZER.vocabulary_size == VOCABULARY_SIZE
    assert TOKENIZER.decode([*range(len(SPECIAL_TOKENS)), *TOKENIZER.encode("a cat"), 99_999]) == "a cat"


def test_ordinary_english_costs_little_more_than_a_token_a_word() -> None:
    text = "Suddenly a dragon landed beside the old lighthouse and whispered a secret to his grandmother."
    assert len(TOKENIZER.encode(text)) <= 2 * len(text.split())


def test_padded_rows_start_and_end_as_encoders_expect() -> None:
    rows = TOKENIZER.pad(["a cat", "a cat " * 20], 8)
    assert rows.ids_BN.shape == rows.mask_BN.shape == (2, 8)
    assert rows.ids_BN[0].tolist() == [1, *TOKENIZER.encode("a cat"), 3, 0, 0, 0, 0]
    assert rows.ids_BN[1, 0] == 1
    assert rows.ids_BN[1, -1] == 3
    assert rows.cut_B == (False, True)
    assert rows.mask_BN.sum(axis=1).tolist() == [4, 8]


def test_a_saved_tokenizer_is_the_same_one(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    again = StoryTokenizer.load(tmp_path)
    assert again.encode("Momo's <image> kite 🪁") == TOKENIZER.encode("Momo's <image> kite 🪁")


def test_what_is_not_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StoryTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        StoryTokenizer.load(tmp_path)
