"""What a training row of the frame model sees, and that a step learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from services.models.denoiser import Example
from services.models.text_encoder import TextEncoder
from services.models.tiny import byte_tokenizer
from services.models.toon import LATENT_CHANNELS, MAX_REFERENCES, toon_text_encoder
from training import frame
from training.frame import Corpus, FrameTrainee, Texts
from training.loop import step_generator
from training.recipes import toon_frame


class Window:
    """A byte tokenizer whose texts are cut short, so that a few bytes are a description."""

    def __init__(self) -> None:
        inner = byte_tokenizer()
        self.pad_id, self.bos_id, self.eos_id = inner.pad_id, inner.bos_id, inner.eos_id
        self.encode = inner.encode
        self.decode = inner.decode


@pytest.fixture
def trainee() -> FrameTrainee:
    torch.manual_seed(0)
    tokenizer = Window()
    model = toon_text_encoder(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    text = TextEncoder(model, tokenizer, bidirectional=True)
    rows = 4 + 3 * 5  # four single frames, three stories
    latents = (
        np.arange(rows, dtype=np.float16)[:, None, None, None] * np.ones((1, LATENT_CHANNELS, 16, 16), np.float16) / 10
    )
    texts = Texts(
        *(frame.token_rows(text, [f"{kind} {row}" for row in range(rows)]) for kind in ("told", "plain", "caption"))
    )
    figures = np.tile((np.arange(16) < 4).astype(np.uint8), (rows, 16, 1))  # somebody in the left quarter
    corpus = Corpus(latents, texts, stories_from=4, figures=figures, counts=np.full(rows, 2))
    recipe = replace(toon_frame(), single_rows=1, story_rows=3)
    codec = None  # the blank picture's latent is given
    return FrameTrainee(recipe, codec, corpus, corpus, text, torch.zeros(LATENT_CHANNELS, 16, 16))  # type: ignore[arg-type]


def seen_examples(trainee: FrameTrainee, monkeypatch: pytest.MonkeyPatch, rows: int, step: int = 0) -> list[Example]:
    examples: list[Example] = []

    def remember(example: Example, **others: object) -> torch.Tensor:
        examples.append(example)
        return torch.zeros(len(example.latents_BCHW))

    monkeypatch.setattr(trainee.denoiser, "loss", remember)
    trainee._story_loss(trainee.corpus, rows, step_generator(0, step))
    return examples


def frame_numbers(latents: torch.Tensor) -> torch.Tensor:
    return (latents.float().mean(dim=(-1, -2, -3)) * 10).round().long()


def test_references_are_the_frames_before_and_the_newest_is_last(
    trainee: FrameTrainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee.recipe = replace(trainee.recipe, unrelated_share=0.0, references_shares=(0.2, 0.3, 0.5))
    slots_seen = set()
    for step in range(12):
        (example,) = seen_examples(trainee, monkeypatch, 16, step)
        targets, references = frame_numbers(example.latents_BCHW), frame_numbers(example.reference_latents_BNCHW)
        slots = example.present_BN.shape[1]
        slots_seen.add(slots)
        for target, row, present in zip(targets, references, example.present_BN, strict=True):
            beat = (int(target) - 4) % 5
            count = int(present.sum())
            assert count == min(beat, slots)  # as many as the step looks at, where the story has them
            assert present.tolist() == [False] * (slots - count) + [True] * count
            assert row[present].tolist() == [int(target) - distance for distance in range(count, 0, -1)]
    assert slots_seen == {1, 2, MAX_REFERENCES}


def test_an_unrelated_reference_comes_alone(trainee: FrameTrainee, monkeypatch: pytest.MonkeyPatch) -> None:
    trainee.recipe = replace(trainee.recipe, unrelated_share=1.0)
    (example,) = seen_examples(trainee, monkeypatch, 32)
    assert example.present_BN.sum(dim=1).tolist() == [1] * 32
    assert bool(example.present_BN[:, -1].all())
    assert int((frame_numbers(example.latents_BCHW) < 4).sum()) > 0  # single frames too


def test_the_same_step_has_the_same_loss_and_another_step_another(trainee: FrameTrainee) -> None:
    with torch.no_grad():
        first, again = (float(trainee.loss(3, 0.0, step_generator(1, 3))) for _ in range(2))
        other = float(trainee.loss(4, 0.0, step_generator(1, 4)))
    assert first == again
    assert first != other


def test_every_part_of_the_unet_learns_and_the_text_encoder_stays(trainee: FrameTrainee) -> None:
    trainee.networks.train()
    trainee.loss(0, 0.0, step_generator(1, 0)).backward()  # type: ignore[no-untyped-call]
    still = [name for name, p in trainee.networks.named_parameters() if p.grad is None]
    assert still == []
    assert any("attn3" in name for name, _ in trainee.networks.named_parameters())
    assert all(p.grad is None for p in trainee.text.model.parameters())


def test_a_description_that_does_not_fit_is_an_error(trainee: FrameTrainee) -> None:
    from services.models.errors import TextTooLong

    with pytest.raises(TextTooLong):
        frame.token_rows(trainee.text, ["a word " * 40])


def test_an_error_where_a_figure_stands_counts_more(trainee: FrameTrainee) -> None:
    rows = torch.tensor([0, 5])
    trainee.recipe = replace(trainee.recipe, figure_weight=3.0)
    weight = trainee.weight(trainee.corpus, rows)
    assert weight is not None
    assert weight.shape == (2, 1, 16, 16)
    assert weight.mean() == pytest.approx(1.0)
    torch.testing.assert_close(weight[..., :4], 3.0 * weight[..., 4:8])
    trainee.recipe = replace(trainee.recipe, figure_weight=1.0)
    assert trainee.weight(trainee.corpus, rows) is None


def test_crowds_come_as_often_as_the_recipe_says(trainee: FrameTrainee) -> None:
    counts = np.ones(len(trainee.corpus.latents), dtype=np.int64)
    counts[[0, 7]] = 3  # one single frame, and the fourth of a story
    recipe = replace(trainee.recipe, crowd_weights=(1.0, 1.0, 1000.0), unrelated_share=0.5)
    corpus = replace(trainee.corpus, counts=counts)
    crowded = FrameTrainee(recipe, trainee.codec, corpus, corpus, trainee.text, trainee.blank_CHW)
    _, targets = crowded.story_example(corpus, 16, step_generator(0, 0))
    assert set(targets.tolist()) == {0, 7}
