"""AR-LDM against its second implementation (`tests/reference_arldm.py`), and the traps that would break it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from services.models.arldm.blip import as_blip_sees, as_pictures, black
from services.models.arldm.model import Memory, frame_context, guided
from services.models.arldm.sampling import Story, StoryDoesNotFit, draw_stories, frames_of
from services.models.arldm.text import BLIP_MARKS, CLIP_MARKS, CaptionTokenizer, TokenRows
from services.models.arldm.unet import Context
from services.models.errors import TextTooLong
from tests.reference_arldm import blip_picture
from tests.tiny_arldm import (
    CAPTIONS,
    GUIDANCE,
    LATENT,
    SIZES,
    STEPS,
    Both,
    blip_tokenizer,
    both,
    clip_tokenizer,
    drawn_by_hand,
    noise,
    nulls,
    picture,
    rows_by_hand,
    texts_by_hand,
    word_tokenizer,
    worst,
)

S = SIZES.positions
# Of the reference.
GOLDEN = [
    [0.9822, 0.5071, 0.1772],
    [0.8160, 0.4399, 0.4328],
    [0.4722, 0.7904, 0.9291],
    [0.6811, 0.7318, 0.4453],
    [0.7186, 0.4221, 0.3342],
]


@pytest.fixture(scope="module")
def pair() -> Both:
    return both()


@pytest.fixture(scope="module")
def continuation() -> Both:
    return both(given=1)


@pytest.fixture(scope="module")
def drawn(pair: Both) -> tuple[Tensor, Tensor]:
    """The story of `CAPTIONS`: latents and pixels."""
    latents, pixels = draw_stories(pair.model, [Story(captions=CAPTIONS)], noise(1, 5), steps=STEPS, guidance=GUIDANCE)
    return latents[0], pixels[0]


# Parity, from the parts to the whole.


def test_the_tokenizer_gives_the_published_rows() -> None:
    for tokenizer, begin in ((clip_tokenizer(), CLIP_MARKS.begin), (blip_tokenizer(), "[ENC]")):
        ids, real = rows_by_hand(CAPTIONS, tokenizer, begin)
        rows = tokenizer.rows(CAPTIONS, SIZES.positions)
        assert torch.equal(rows.ids_BS, ids)
        assert torch.equal(rows.real_BS, real.bool())


def test_captions_are_clips_states(pair: Both) -> None:
    ids, real = rows_by_hand(CAPTIONS, pair.model.clip_tokenizer, CLIP_MARKS.begin)
    expected = pair.reference.clip(ids, real) + pair.reference.w["modal_type_embeddings.weight"][0]
    found = pair.model.networks.captions(pair.model.clip_tokenizer.rows(CAPTIONS, SIZES.positions))
    assert worst(found[real.bool()], expected[real.bool()]) <= 1e-5
    assert float(expected[real.bool()].std()) > 0.3


def test_history_is_blips_states_of_picture_and_caption(pair: Both) -> None:
    texts = texts_by_hand(CAPTIONS, 5)
    pictures = [picture(i) for i in range(5)]
    seen = torch.stack([blip_picture(p, SIZES.vit_image) for p in pictures])
    real = texts["blip_real_FS"].bool()
    expected = pair.reference.blip(seen, texts["blip_ids_FS"], real, texts["enc_id"])
    w = pair.reference.w
    expected = expected + w["modal_type_embeddings.weight"][1] + w["time_embeddings.weight"][:, None]
    rows = pair.model.blip_tokenizer.rows(CAPTIONS, SIZES.positions)
    found = pair.model.networks.history(as_blip_sees(pictures, SIZES.vit_image), rows, torch.arange(5))
    assert worst(found[real], expected[real]) <= 1e-4


def test_nothing_is_the_published_nothing(pair: Both) -> None:
    enc_id = pair.model.blip_tokenizer.bos_id
    expected = pair.reference.nothing(**nulls(), enc_id=enc_id, slots=5)
    nothing = pair.model.nothing()
    found = torch.cat([nothing.caption_SD, nothing.history_FSD.flatten(0, 1)])
    assert worst(found, expected) <= 1e-4


def test_a_block_masks_like_the_reference(pair: Both) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0"
    block = pair.model.networks.unet.get_submodule(name)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 64, 16, generator=generator), torch.randn(2, 9, SIZES.width, generator=generator)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[0, 4:], hidden[1, ::2] = True, True
    expected = pair.reference.block(f"unet.{name}", x, context, hidden)
    bias = torch.zeros(2, 1, 9).masked_fill(hidden[:, None], -10000.0)
    found = block(x, encoder_hidden_states=context, encoder_attention_mask=bias)
    assert worst(found, expected) <= 1e-5


def one_call(pair: Both, seed: int = 2) -> tuple[Tensor, Tensor, Context, Tensor]:
    """Noisy latents, timesteps, a context with much hidden, and the reference's answer."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, *LATENT, generator=generator)
    t = torch.tensor([980, 40, 0])
    states = torch.randn(3, 66, SIZES.width, generator=generator)
    seen = torch.rand(3, 66, generator=generator) < 0.4
    expected = pair.reference.unet(latents, t, states, ~seen)
    return latents, t, Context(states, seen), expected


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0], ids=["plain", "fused"])
@pytest.mark.parametrize("trimmed", [False, True], ids=["hidden states kept", "dropped"])
def test_one_call_of_the_denoiser(pair: Both, processor: Callable[[], Any], trimmed: bool) -> None:
    latents, t, context, expected = one_call(pair)
    unet = pair.model.networks.unet
    before = dict(unet.attn_processors)
    unet.set_attn_processor(processor())
    try:
        found = pair.model.networks.predict(latents, t, context.trimmed() if trimmed else context)
    finally:
        unet.set_attn_processor(before)
    assert worst(found, expected) <= 1e-4


def test_fused_attention_is_what_runs(pair: Both) -> None:
    """What the test above calls fused is what the model uses without being told."""
    assert {type(p) for p in pair.model.networks.unet.attn_processors.values()} == {AttnProcessor2_0}


def test_a_lost_mask_would_be_seen(pair: Both) -> None:
    latents, t, context, expected = one_call(pair)
    everything = Context(context.states_BKD, torch.ones_like(context.seen_BK))
    assert worst(pair.model.networks.predict(latents, t, everything), expected) > 1e-2


def rounds_safely(expected_pixels: Tensor, error: float) -> bool:
    """Whether pictures that differ by `error` are the same in 8 bits; if not, later frames rightly differ by more."""
    shown = expected_pixels[:-1] * 255.0
    return float((shown % 1.0 - 0.5).abs().min()) > 255.0 * error


def test_visualization_draws_what_the_reference_draws(pair: Both, drawn: tuple[Tensor, Tensor]) -> None:
    expected_latents, expected_pixels = drawn_by_hand(pair.reference, CAPTIONS, [], noise(1, 5)[0])
    assert rounds_safely(expected_pixels, worst(drawn[1], expected_pixels))
    assert worst(drawn[0], expected_latents) <= 1e-4
    assert worst(drawn[1], expected_pixels) <= 1e-4
    assert float(expected_pixels.std()) > 0.1


def test_continuation_draws_what_the_reference_draws(continuation: Both) -> None:
    start, first = noise(1, 4), picture(9)
    expected_latents, expected_pixels = drawn_by_hand(continuation.reference, CAPTIONS, [first], start[0])
    story = Story(captions=CAPTIONS, given=(first,))
    latents, pixels = draw_stories(continuation.model, [story], start, steps=STEPS, guidance=GUIDANCE)
    assert rounds_safely(expected_pixels, worst(pixels[0], expected_pixels))
    assert worst(latents[0], expected_latents) <= 1e-4
    assert worst(pixels[0], expected_pixels) <= 1e-4


def test_hidden_states_may_stay_in_the_context(pair: Both, drawn: tuple[Tensor, Tensor]) -> None:
    latents, pixels = draw_stories(
        pair.model, [Story(captions=CAPTIONS)], noise(1, 5), steps=STEPS, guidance=GUIDANCE, keep_hidden=True
    )
    assert rounds_safely(drawn[1], worst(pixels[0], drawn[1]))
    assert worst(latents[0], drawn[0]) <= 1e-4


def test_dropping_hidden_states_changes_no_answer(pair: Both) -> None:
    latents, t, context, _ = one_call(pair)
    kept, dropped = (pair.model.networks.predict(latents, t, c) for c in (context, context.trimmed()))
    assert context.trimmed().seen_BK.shape[1] < context.seen_BK.shape[1]
    assert worst(kept, dropped) <= 1e-5


def test_latents_are_the_published_latents(pair: Both) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    assert worst(pair.model.codec.encode(pixels), pair.reference.encode_mean(pixels)) <= 1e-5


def test_golden_numbers(drawn: tuple[Tensor, Tensor]) -> None:
    """One pixel of each frame, as the reference drew it when this was written."""
    assert worst(drawn[1][:, :, 3, 5], torch.tensor(GOLDEN)) <= 1e-3


# The rules, one by one: each of these fails when its trap is fallen into again.


def seen_by(model: Any, stories: list[Story], start: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """The contexts of each frame's calls, hidden states kept."""
    contexts: list[Context] = []
    predict = model.networks.predict

    def spy(latents: Tensor, t: Tensor, context: Context) -> Tensor:
        contexts.append(context)
        return predict(latents, t, context)

    monkeypatch.setattr(model.networks, "predict", spy, raising=False)
    draw_stories(model, stories, start, steps=1, keep_hidden=True)
    monkeypatch.undo()
    return contexts


def test_nothing_hides_no_padding_and_every_later_frame(pair: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = seen_by(pair.model, [Story(captions=CAPTIONS)], noise(1, 5), monkeypatch)
    enc_id = pair.model.blip_tokenizer.bos_id
    expected = pair.reference.nothing(**nulls(), enc_id=enc_id, slots=5)
    for k, context in enumerate(contexts):
        assert torch.equal(context.seen_BK[0], torch.arange(6 * S) < (1 + k) * S)
        assert worst(context.states_BKD[0], expected) <= 1e-4


def test_a_frame_sees_its_words_and_those_of_earlier_frames(pair: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = seen_by(pair.model, [Story(captions=CAPTIONS)], noise(1, 5), monkeypatch)
    words = [len(caption.split()) + 2 for caption in CAPTIONS]
    for k, context in enumerate(contexts):
        slots = context.seen_BK[1].view(6, S)
        assert slots.sum(dim=1).tolist() == [words[k], *words[:k], *[0] * (5 - k)]


def test_given_frames_are_seen_by_all(continuation: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(captions=CAPTIONS, given=(picture(9),))
    contexts = seen_by(continuation.model, [story], noise(1, 4), monkeypatch)
    words = [len(caption.split()) + 2 for caption in CAPTIONS]
    for i, context in enumerate(contexts):
        slots = context.seen_BK[1].view(6, S)
        assert slots.sum(dim=1).tolist() == [words[1 + i], *words[: 1 + i], *[0] * (4 - i)]
        assert torch.equal(context.seen_BK[0], torch.arange(6 * S) < (2 + i) * S)


def test_later_captions_do_not_leak(pair: Both, drawn: tuple[Tensor, Tensor]) -> None:
    other = (*CAPTIONS[:2], "dino sits", "barney eats", "the red car runs")
    latents, _ = draw_stories(pair.model, [Story(captions=other)], noise(1, 5), steps=STEPS, guidance=GUIDANCE)
    assert worst(latents[0, :2], drawn[0][:2]) <= 1e-5
    assert worst(latents[0, 2:], drawn[0][2:]) > 1e-2


def test_earlier_captions_and_pictures_matter(continuation: Both) -> None:
    def second(caption: str, first: Any) -> Tensor:
        story = Story(captions=(caption, CAPTIONS[1]), given=(first,))
        return draw_stories(continuation.model, [story], noise(1, 1), steps=2)[0]

    base = second(CAPTIONS[0], picture(9))
    assert worst(base, second("dino eats", picture(9))) > 1e-2
    assert worst(base, second(CAPTIONS[0], picture(10))) > 1e-3


def test_slots_still_to_be_drawn_may_hold_anything(pair: Both) -> None:
    """True pictures of frames to come must not help a sampler, and junk must not hurt it."""
    generator = torch.Generator().manual_seed(4)
    captions = torch.randn(1, S, SIZES.width, generator=generator)
    states = torch.randn(1, 5, S, SIZES.width, generator=generator)
    real = torch.ones(1, 5, S, dtype=torch.bool)
    junk = states.clone()
    junk[:, 2:] = 1e4
    latents, t = torch.randn(1, *LATENT, generator=generator), torch.tensor([500])
    answers = [
        pair.model.networks.predict(
            latents, t, frame_context(captions, torch.ones(1, S, dtype=torch.bool), Memory(s, real), torch.tensor([2]))
        )
        for s in (states, junk)
    ]
    assert worst(*answers) <= 1e-5


def test_stories_beside_each_other_do_not_mix(pair: Both, drawn: tuple[Tensor, Tensor]) -> None:
    """And frames come story by story, not frame by frame."""
    start, other = noise(1, 5), Story(captions=tuple(reversed(CAPTIONS)))
    apart = noise(1, 5, seed=77)
    stories = [other, Story(captions=CAPTIONS)]
    latents, _ = draw_stories(pair.model, stories, torch.cat([apart, start]), steps=STEPS, guidance=GUIDANCE)
    assert latents.shape == (2, 5, *LATENT)
    assert worst(latents[1], drawn[0]) <= 1e-4
    alone, _ = draw_stories(
        pair.model,
        [dataclasses.replace(other, captions=other.captions[:1])],
        apart[:, :1],
        steps=STEPS,
        guidance=GUIDANCE,
    )
    assert worst(latents[0, 0], alone[0, 0]) <= 1e-4


def test_a_frame_can_be_drawn_again(pair: Both, drawn: tuple[Tensor, Tensor]) -> None:
    """The pictures before it are all that it knows of its past."""
    story = Story(captions=CAPTIONS, given=tuple(as_pictures(drawn[1][:3])))
    latents, _ = draw_stories(pair.model, [story], noise(1, 5)[:, 3:], steps=STEPS, guidance=GUIDANCE)
    assert worst(latents[0], drawn[0][3:]) <= 1e-4


def test_guidance_of_one_leaves_the_story_alone() -> None:
    without, within = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guided(without, within, 1.0), within)
    torch.testing.assert_close(guided(without, within, 6.0), 6.0 * within - 5.0 * without)


def test_sampling_visits_the_published_steps(pair: Both) -> None:
    schedule = pair.model.schedule
    assert schedule.sampling_steps(50) == tuple(range(980, -1, -20))
    assert schedule.sampling_steps(250) == tuple(range(996, -1, -4))
    assert schedule.levels(schedule.step_after(0, 50)) == (1.0, 0.0)


def test_the_norms_have_the_published_epsilons(pair: Both) -> None:
    """The library's default in the vision part is ten times that: too small a change for a comparison to see."""
    blip = pair.model.networks.mm_encoder
    norms = [(n, m.eps) for n, m in blip.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {eps for name, eps in norms if name.startswith("vision.")} == {1e-6}
    assert {eps for name, eps in norms if name.startswith("text.")} == {1e-12}


def test_a_mask_of_other_states_is_refused() -> None:
    """diffusers would pad it."""
    with pytest.raises(ValueError, match="the mask is"):
        Context(torch.zeros(1, 6, 4), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="the mask is"):
        Context(torch.zeros(1, 6, 4), torch.ones(1, 6))


def test_contexts_of_different_lengths_join_and_keep_their_answers(pair: Both) -> None:
    latents, t, context, expected = one_call(pair)
    parts = [Context(context.states_BKD[i : i + 1], context.seen_BK[i : i + 1]).trimmed() for i in range(3)]
    assert len({part.seen_BK.shape[1] for part in parts}) > 1
    assert worst(pair.model.networks.predict(latents, t, Context.joined(*parts)), expected) <= 1e-4


# Texts and pictures at the edge.


def test_a_caption_that_does_not_fit_is_refused_by_name(pair: Both) -> None:
    fits = " ".join(["fred"] * (S - 2))
    assert pair.model.clip_tokenizer.rows([fits], S).real_BS.all()
    with pytest.raises(TextTooLong, match=f"{S - 1} tokens and at most {S - 2}") as caught:
        draw_stories(pair.model, [Story(captions=("fred", fits + " sits"))], noise(1, 2))
    assert caught.value.reason == "TEXT_TOO_LONG"
    assert pair.model.clip_tokenizer.window_for(["fred", fits + " sits"]) == S + 1


def test_padding_is_known_though_clip_pads_with_its_end_mark() -> None:
    rows = clip_tokenizer().rows(["fred sits"], S)
    assert rows.real_BS.sum() == 4
    assert int((rows.ids_BS == rows.ids_BS[0, 3]).sum()) == S - 3


def test_encoding_leaves_the_callers_ids_alone(pair: Both) -> None:
    """The published encoder writes its mark into the batch it is given."""
    rows = pair.model.blip_tokenizer.rows(["fred sits"], S)
    before = rows.ids_BS.clone()
    pair.model.networks.history(black(SIZES.vit_image), rows, torch.tensor([0]))
    assert torch.equal(rows.ids_BS, before)


@pytest.mark.parametrize("tokenizer", [clip_tokenizer(), blip_tokenizer()], ids=["clip", "blip"])
def test_a_mark_in_a_caption_is_only_letters(tokenizer: CaptionTokenizer) -> None:
    marks = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert not marks & set(tokenizer.encode("fred [ENC] <|endoftext|> [SEP] [PAD] <|startoftext|>"))


def test_only_words_that_are_missing_are_added() -> None:
    tokenizer = clip_tokenizer()
    size = tokenizer.vocabulary_size
    grown = tokenizer.with_words(["fred", "slate", "betty"])
    assert grown.vocabulary_size == size + 2
    assert grown.encode("betty and slate") == [size + 1, *tokenizer.encode("and"), size]
    assert grown.encode("fred") == tokenizer.encode("fred")
    assert tokenizer.vocabulary_size == size


def test_a_tokenizer_needs_its_marks() -> None:
    with pytest.raises(ValueError, match=r"\[ENC\]"):
        CaptionTokenizer(word_tokenizer(("[PAD]", "[CLS]", "[SEP]"), ()), BLIP_MARKS)


def test_a_tokenizer_with_more_words_than_the_table_is_refused(pair: Both) -> None:
    words = [f"word{i}" for i in range(SIZES.clip_words)]
    with pytest.raises(ValueError, match="40 rows"):
        dataclasses.replace(pair.model, clip_tokenizer=clip_tokenizer().with_words(words))


def test_token_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="what is real"):
        TokenRows(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("height", [16, 200])
def test_pictures_are_resized_as_files_are(height: int) -> None:
    shown = picture(3, height=height, width=90)
    assert torch.equal(as_blip_sees([shown], 32)[0], blip_picture(shown, 32))


def test_pictures_are_clamped_and_rounded_before_they_are_looked_at() -> None:
    pixels = torch.tensor([-0.5, 0.0, 0.4999, 0.5, 1.0, 7.0])[None, None, None].expand(1, 3, 1, 6)
    assert as_pictures(pixels)[0][0, :, 0].tolist() == [0, 0, 127, 128, 255, 255]


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_picture_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="a picture is 8-bit"):
        as_blip_sees([wrong], 32)


def test_black_is_black_before_it_is_normalised() -> None:
    assert torch.equal(black(32)[0], blip_picture(np.zeros((5, 7, 3), np.uint8), 32))
    assert float(black(32).abs().min()) > 1.0


@pytest.mark.parametrize(
    ("given", "captions", "pictures", "said"),
    [
        (0, 6, 0, "6 frames and the model knows 5"),
        (1, 5, 0, "continues 1 given pictures and was given 0"),
        (0, 2, 2, "nothing is left to draw"),
    ],
)
def test_a_story_that_does_not_fit_is_refused(
    pair: Both, continuation: Both, given: int, captions: int, pictures: int, said: str
) -> None:
    model = (pair, continuation)[given].model
    story = Story(captions=("fred",) * captions, given=(picture(1),) * pictures)
    with pytest.raises(StoryDoesNotFit, match=said) as caught:
        frames_of(model, [story], noise(1, max(captions - pictures, 1)))
    assert caught.value.reason == "STORY_DOES_NOT_FIT"


def test_noise_says_how_many_frames_are_drawn(pair: Both) -> None:
    with pytest.raises(ValueError, match="noise is"):
        frames_of(pair.model, [Story(captions=CAPTIONS)], noise(1, 4))
    with pytest.raises(ValueError, match="same number of frames"):
        frames_of(pair.model, [Story(captions=CAPTIONS), Story(captions=CAPTIONS[:2])], noise(2, 5))
    with pytest.raises(ValueError, match="no story"):
        frames_of(pair.model, [], noise(1, 5))


def test_frames_come_one_at_a_time_and_leave_no_mode_behind(pair: Both) -> None:
    frames = frames_of(pair.model, [Story(captions=CAPTIONS[:2])], noise(1, 2), steps=1)
    assert next(frames).number == 0
    assert not torch.is_inference_mode_enabled()
    assert [frame.number for frame in frames] == [1]
