"""User text is data, and everything fits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.models.captions import prompts
from services.models.tokenizer import SPECIAL_TOKENS, StoryTokenizer
from services.runtime.config import SHIPPED_PACKS

TOKENIZER = StoryTokenizer.load(SHIPPED_PACKS / "toon" / "tokenizer")
BUDGET = 385

hostile = st.lists(
    st.one_of(st.text(max_size=20), st.sampled_from([*SPECIAL_TOKENS, "'", "\\", "\n", "\u202e", "', What is"])),
    max_size=8,
).map("".join)


def counts(ids: tuple[int, ...]) -> list[int]:
    """How often each special token occurs, by id."""
    return [ids.count(index) for index in sorted(TOKENIZER.special_ids)]


@settings(max_examples=150, deadline=None)
@given(st.lists(hostile, min_size=1, max_size=12))
def test_no_text_adds_or_removes_a_special_token(captions: list[str]) -> None:
    plain = counts(prompts.story_prompt(TOKENIZER, ["x"], BUDGET).ids)
    assert plain == [0, 1, 1, 0, 1, 1]  # one <bos>, <image>, <user>, <assistant>
    assert counts(prompts.story_prompt(TOKENIZER, captions, BUDGET).ids) == plain
    assert counts(prompts.description_prompt(TOKENIZER, captions[0], captions[-1], BUDGET).ids) == plain


@settings(max_examples=150, deadline=None)
@given(hostile)
def test_escaping_keeps_the_text_and_never_ends_its_quotes(text: str) -> None:
    escaped = prompts.escape(text)
    unescaped, at = "", 0
    while at < len(escaped):
        assert escaped[at] != "'", "an unescaped quote would end the caption"
        at += escaped[at] == "\\"
        unescaped += escaped[at]
        at += 1
    assert unescaped == prompts.clean(text)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_cleaning_is_idempotent_and_leaves_one_line(text: str) -> None:
    cleaned = prompts.clean(text)
    assert prompts.clean(cleaned) == cleaned
    assert "\n" not in cleaned
    assert cleaned == cleaned.strip()


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a\x00b\x1b[31mc", "ab[31mc"),
        ("one\r\n two\tthree ", "one two three"),
        ("\u202eevil\u2066", "evil"),
        ("👩\u200d👧 \u200bhi", "👩\u200d👧 hi"),
        ("cafe\u0301", "café"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_what_cannot_be_seen_is_dropped_and_what_scripts_need_is_kept(raw: str, cleaned: str) -> None:
    assert prompts.clean(raw) == cleaned


def said(prompt: prompts.Prompt) -> str:
    """The words of a prompt."""
    return TOKENIZER.decode(prompt.ids)


def test_the_wording_is_the_reports() -> None:
    assert said(prompts.story_prompt(TOKENIZER, ["A."], BUDGET)) == (
        "\nCurrent frame story caption: 'A.', What is the next frame story caption?"
    )
    assert said(prompts.story_prompt(TOKENIZER, ["A.", "It's B.", "C."], BUDGET)) == (
        "\nStory so far: 'A.' 'It\\'s B.' Current frame story caption: 'C.', What is the next frame story caption?"
    )
    assert said(prompts.description_prompt(TOKENIZER, "A.", "B.", BUDGET)) == (
        "\nPrevious frame story caption: 'A.', Current frame story caption: 'B.', "
        "What is the description of this caption?"
    )
    assert said(prompts.picture_prompt(TOKENIZER)) == "\nDescribe the picture."


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab ", min_size=1, max_size=150), min_size=1, max_size=40), st.integers(120, 420))
def test_the_window_fits_and_keeps_the_first_and_the_newest(captions: list[str], budget: int) -> None:
    prompt = prompts.story_prompt(TOKENIZER, captions, budget)
    kept = prompt.captions_kept
    assert len(prompt.ids) <= budget
    assert kept[-1] == len(captions) - 1
    assert list(kept) == sorted(set(kept))
    if len(kept) > 1:
        assert kept[0] == 0
        newest = kept[1:]
        assert newest == tuple(range(newest[0], len(captions))), (
            "between the first and the newest ones nothing is skipped"
        )


def test_a_short_story_is_kept_whole() -> None:
    captions = [f"Then came day {number}." for number in range(12)]
    assert prompts.story_prompt(TOKENIZER, captions, BUDGET).captions_kept == tuple(range(12))


def test_an_overlong_caption_is_read_in_part() -> None:
    prompt = prompts.description_prompt(TOKENIZER, "a\\" * 5000, "'" * 5000, BUDGET)
    assert len(prompt.ids) <= 2 * prompts.CAPTION_TOKENS_MAX + 60


def test_no_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="tokens"):
        prompts.story_prompt(TOKENIZER, ["Momo found a kite."], 12)
    with pytest.raises(ValueError, match="tokens"):
        prompts.description_prompt(TOKENIZER, "A.", "B.", 12)
    with pytest.raises(ValueError, match="at least one"):
        prompts.story_prompt(TOKENIZER, [], BUDGET)


def test_a_description_is_asked_with_the_looks_of_whom_the_captions_name() -> None:
    looks = {"Pip": "an orange cat", "Mina": "a pink rabbit", "Tom": "a mouse"}
    lines = prompts.cast_lines(looks, ("Mina met Pip.", "Tommy and Pip ran."))
    assert lines == ("Pip, an orange cat", "Mina, a pink rabbit"), "whom the newest caption names comes first"
    asked = said(prompts.description_prompt(TOKENIZER, "A.", "B.", BUDGET, lines))
    assert "Cast: Pip, an orange cat; Mina, a pink rabbit. Previous frame story caption: 'A.', Current" in asked


def test_looks_are_read_from_the_descriptions_that_told_them() -> None:
    told = prompts.told_looks(
        (
            "In the park by day. On the left Sam, a yellow monkey with a blue bow, runs. Dot, an owl in red, sits.",
            "Sam, a green monkey with a blue bow, sits.",
            "Zoë, a pale blue fairy wearing a gold crown; it rains.",
            "Yesterday, a dog barked. In town, a cat with a hat, slept. Mina slept. Tom, who has a hat, sat.",
        )
    )
    assert told == {
        "Sam": "a yellow monkey with a blue bow",
        "Dot": "an owl in red",
        "Zoë": "a pale blue fairy wearing a gold crown",
    }
    name, look = next(iter(told.items()))
    assert prompts.told_looks([f"{prompts.cast_line(name, look)}, stands."]) == {name: look}


def test_looks_that_do_not_fit_are_left_out_from_the_last() -> None:
    lines = tuple(f"Name{n}, " + "a very long look " * 4 for n in range(20))
    alone = len(prompts.description_prompt(TOKENIZER, "A.", "B.", BUDGET).ids)
    roomy = said(prompts.description_prompt(TOKENIZER, "A.", "B.", 10_000, lines))
    assert "Name0" in roomy
    assert f"Name{prompts.CAST_MAX}" not in roomy
    tight = prompts.description_prompt(TOKENIZER, "A.", "B.", alone + 60, lines)
    assert len(tight.ids) <= alone + 60
    assert "Name0" in said(tight)
    assert "Name3" not in said(tight)
    assert prompts.description_prompt(TOKENIZER, "A.", "B.", alone, lines).ids == (
        prompts.description_prompt(TOKENIZER, "A.", "B.", alone).ids
    )
