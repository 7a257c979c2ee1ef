"""The text encoder learns to read: what it is asked, and that it sees both ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.models.text_encoder import TextEncoder, TextShape, build_text_encoder
from services.models.tiny import byte_tokenizer
from training.loop import step_generator
from training.questions import EMPTY, SCENE_QUESTIONS, SLOT_QUESTIONS, answer_loss, answers, right
from training.recipes import toon_text
from training.text import TextTrainee, fresh_text
from training.toon.world import sample_frame


def encoder(*, bidirectional: bool) -> TextEncoder:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = TextShape(
        vocab_size=tokenizer.vocabulary_size, width=16, layers=2, heads=2, positions=24, bidirectional=bidirectional
    )
    model = build_text_encoder(shape, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    return TextEncoder(model, tokenizer, bidirectional=shape.bidirectional)


@pytest.fixture(scope="module")
def trainee() -> TextTrainee:
    torch.manual_seed(0)
    return TextTrainee(fresh_text(), replace(toon_text(), batch=4, held_out_count=8))


@torch.no_grad()
def test_a_word_sees_what_comes_after_it_only_when_it_may() -> None:
    for bidirectional in (False, True):
        text = encoder(bidirectional=bidirectional)
        left, right_ = text.encode(["Pip left"])[0], text.encode(["Pip rear"])[0]
        assert torch.allclose(left[2], right_[2], atol=1e-5) is not bidirectional  # the state of "i"


@torch.no_grad()
def test_padding_changes_no_words_state() -> None:
    text = encoder(bidirectional=True)
    ids = text.token_ids(["Pip runs"])
    whole, cut = text.states(ids)[0], text.states(ids[:, :10])[0]
    assert torch.allclose(whole[:10], cut, atol=1e-5)


def test_a_shape_without_the_field_reads_forwards_only() -> None:
    old = {"vocab_size": 8, "width": 8, "layers": 1, "heads": 1, "positions": 8}
    assert TextShape.from_dict(old).bidirectional is False
    shape = replace(TextShape.from_dict(old), bidirectional=True)
    assert TextShape.from_dict(shape.to_dict()) == shape


def test_every_question_has_the_scenes_answer() -> None:
    scenes = [sample_frame(seed).scene for seed in range(12)]
    wanted = answers(scenes)
    for row, scene in enumerate(scenes):
        for slot in range(3):
            for name, words in SLOT_QUESTIONS.items():
                number = int(wanted[name][row, slot])
                if slot >= len(scene.actors):
                    assert number == EMPTY
                elif name in ("action", "mood"):
                    assert words[number] == getattr(scene.actors[slot], name)
                elif name == "colour":
                    assert words[number] == scene.actors[slot].character.look.colour
        for name in ("setting", "time", "side", "weather"):
            assert SCENE_QUESTIONS[name][int(wanted[name][row])] == getattr(scene, name)


def test_empty_slots_are_neither_learned_nor_counted() -> None:
    scene = next(s for s in (sample_frame(seed).scene for seed in range(99)) if len(s.actors) == 1)
    wanted = answers([scene])
    logits = {name: torch.nn.functional.one_hot(true.clamp_min(0), 32).float() * 50 for name, true in wanted.items()}
    assert float(answer_loss(logits, wanted)) == pytest.approx(0.0, abs=1e-4)
    hits, faultless = right(logits, wanted)
    assert hits["action"].tolist() == [1.0]
    assert faultless.tolist() == [True]
    logits["action"][0, 0] = -logits["action"][0, 0]
    assert right(logits, wanted)[1].tolist() == [False]


def test_a_step_reads_descriptions_that_no_other_step_reads(trainee: TextTrainee) -> None:
    seen: list[list[str]] = []
    logits = trainee._logits

    def remember(texts: list[str]) -> dict[str, torch.Tensor]:
        seen.append(texts)
        return logits(texts)

    trainee._logits = remember  # type: ignore[method-assign]
    with torch.no_grad():
        drawn = ((0, 0), (1, 0), (0, 0), (0, 1))  # the last by another process
        losses = [float(trainee.loss(step, 0.0, step_generator(0, step, rank))) for step, rank in drawn]
    assert seen[0] == seen[2]
    assert losses[0] == losses[2]
    assert not set(seen[0]) & set(seen[1])
    assert not set(seen[0]) & set(seen[3])


def test_every_part_learns(trainee: TextTrainee) -> None:
    trainee.loss(0, 0.0, step_generator(0, 0)).backward()  # type: ignore[no-untyped-call]
    still = [name for name, p in trainee.networks.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in still if "position" not in name] == []


def test_held_out_descriptions_are_of_held_out_combinations(trainee: TextTrainee) -> None:
    figures = trainee.measure()
    assert {"whole", "action", "mood", "setting", "present"} <= figures.keys()
    assert all(0.0 <= value <= 1.0 for value in figures.values())
    assert trainee.held_out[""][0].description == sample_frame(0, split="test").description
