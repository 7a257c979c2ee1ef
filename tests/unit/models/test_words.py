"""Words that a character taught the text encoder: where they stand, and what stands there."""

from __future__ import annotations

import pytest
import torch

from services.models.errors import TextTooLong
from services.models.registry import FrameModel


def test_a_word_is_replaced_where_it_stands_alone(tiny_model: FrameModel) -> None:
    text = tiny_model.text
    behind = text.model.config.vocab_size
    words = {"Zoe": torch.zeros(2, text.width), "<dog>": torch.ones(1, text.width)}

    def learned(said: str) -> list[int]:
        return [int(i) - behind for i in text.token_ids([said], words)[0] if i >= behind]

    assert learned("Zoe runs.") == [0, 1]
    assert learned("A <dog>, Zoe's <dog>") == [2, 0, 1, 2]
    assert learned("Zoey and MyZoe and Zo e") == []
    (row,) = text.token_ids(["Zoe runs."], words).tolist()
    assert row[3 : 3 + len(text.tokenizer.encode(" runs."))] == text.tokenizer.encode(" runs.")


def test_its_vectors_stand_in_the_embedding(tiny_model: FrameModel) -> None:
    text = tiny_model.text
    table = text.model.get_input_embeddings().weight
    (only,) = text.tokenizer.encode("a")
    as_it_is = text.encode(["a b"])
    assert torch.allclose(text.encode(["Zoe b"], {"Zoe": table[only][None]}), as_it_is, atol=1e-6)
    assert not torch.allclose(text.encode(["Zoe b"], {"Zoe": table[only].flip(0)[None]}), as_it_is, atol=1e-3)
    assert torch.equal(text.encode(["a b"]), as_it_is), "nothing of it stays behind"


def test_learned_vectors_count_for_the_window(tiny_model: FrameModel) -> None:
    text = tiny_model.text
    words = {"Zoe": torch.zeros(text.window - 3, text.width)}
    said = "Zoe runs and runs and runs."
    with pytest.raises(TextTooLong):
        text.token_ids([said], words)
    assert text.fitting(said, words).startswith("Zoe")
    text.token_ids([text.fitting(said, words)], words)
    assert text.fitting("Zoe.", {"Zoe": torch.zeros(2, text.width)}) == "Zoe."


@pytest.mark.parametrize(
    "text", ["Once upon a time a fox found a lamp. " * 15, "Kite. " * 120, "日本語" * 80, "a" * 500]
)
@pytest.mark.parametrize("learned", [False, True])
def test_of_a_text_that_is_too_long_a_beginning_fits(tiny_model: FrameModel, text: str, learned: bool) -> None:
    encoder = tiny_model.text
    words = {"Zoe": torch.zeros(4, encoder.width)} if learned else {}
    fitted = encoder.fitting(text, words)
    assert text.startswith(fitted)
    encoder.token_ids([fitted], words)
    if not learned:
        assert len(encoder.tokenizer.encode(fitted)) > encoder.window - 8, "no more than needed is lost"


def test_learned_words_that_do_not_fit_even_once_leave_nothing(tiny_model: FrameModel) -> None:
    words = {"Zoe": torch.zeros(4, tiny_model.text.width)}
    assert tiny_model.text.fitting(",".join(["Zoe"] * 40), words) == ""
