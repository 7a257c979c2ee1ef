"""Stories of 3 to 20 frames, on both backbones: every row sees the frames just before it, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.customization import checks
from services.models.arldm.reader import ArldmReader
from services.models.denoiser import Dropout
from services.models.registry import FrameModel, load_frame_model
from services.models.text_encoder import TextEncoder
from services.models.tiny import build_tiny_pack
from tests.tiny_arldm import SIZES, worst
from tests.tiny_arldm_pack import SIDE_PX, barney, build_arldm_pack, known
from training.customize import customization, toon_customization
from training.lessons import LessonRecipe, Lessons
from training.loop import step_generator
from training.methods.method import EXISTING, NEW, TOTAL
from training.new_story import FEWEST_FRAMES, MOST_FRAMES, STORY_FRAMES, SeenFrame

LENGTHS = (3, 5, 8, 20)
STORYGEN_PX = 64
NOTHING_HIDDEN = Dropout(text=0.0, references=0.0, no_references=0.0)


@pytest.fixture(scope="module")
def storygen(tmp_path_factory: pytest.TempPathFactory) -> FrameModel:
    return load_frame_model(build_tiny_pack(tmp_path_factory.mktemp("pack") / "tiny", captions=False))


@pytest.fixture(scope="module")
def arldm(tmp_path_factory: pytest.TempPathFactory) -> FrameModel:
    return load_frame_model(build_arldm_pack(tmp_path_factory.mktemp("arldm") / "stories"))


def recipe(frames_per_story: int, seen: int = 3) -> LessonRecipe:
    """Nothing is hidden, and StoryGen's rows see `seen` frames."""
    shares = {1: (1.0, 0.0, 0.0), 2: (0.0, 1.0, 0.0), 3: (0.0, 0.0, 1.0)}[seen]
    return LessonRecipe(
        existing_stories=2,
        frames_per_story=frames_per_story,
        references_shares=shares,
        dropout=NOTHING_HIDDEN,
        frame_dropout=0.0,
    )


def test_the_services_checks_take_the_stories_that_training_takes() -> None:
    assert (FEWEST_FRAMES, MOST_FRAMES) == (checks.FEWEST_FRAMES, checks.MOST_FRAMES) == (3, 20)
    assert checks.USUAL_FRAMES == STORY_FRAMES


@pytest.mark.parametrize("length", LENGTHS)
def test_arldms_rows_are_what_is_drawn_with_the_frames_just_before(arldm: FrameModel, length: int) -> None:
    """A row's text is the one that the reader of the frame service makes of the same story."""
    assert isinstance(arldm.text, ArldmReader)
    lessons = Lessons(arldm, [barney(length)], known(length=length), recipe(length))
    batch = lessons.batch(step_generator(0, 0))
    seen_counts = []
    for kind, shelf in ((NEW, lessons.new), (EXISTING, lessons.existing)):
        rows = (batch.kinds_B == kind).nonzero()[:, 0].tolist()
        latents = batch.example.latents_BCHW
        first = next(n for n, own in enumerate(shelf.latents_FCHW) if torch.equal(own, latents[rows[0]]))
        frames = shelf.frames[first : first + length]
        assert len(rows) == len(frames) == length
        for beat, row in enumerate(rows):
            assert torch.equal(latents[row], shelf.latents_FCHW[first + beat])
            past = frames[max(0, beat - (SIZES.frames - 1)) : beat]
            seen_counts.append(len(past))
            expected = arldm.text.contexts(frames[beat].descriptions[0], [(f.pixels, f.descriptions[0]) for f in past])
            assert worst(batch.example.text_BSD[row], expected[1]) <= 1e-5, beat
    assert max(seen_counts) == min(length, SIZES.frames) - 1


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seen", [1, 3])
def test_storygens_rows_see_the_frames_just_before(storygen: FrameModel, length: int, seen: int) -> None:
    assert isinstance(storygen.text, TextEncoder)
    lessons = Lessons(
        storygen, [barney(length, STORYGEN_PX)], known(length=length, side_px=STORYGEN_PX), recipe(length, seen)
    )
    batch = lessons.batch(step_generator(0, 0))
    example = batch.example
    codec = storygen.codec
    for kind, shelf in ((NEW, lessons.new), (EXISTING, lessons.existing)):
        rows = (batch.kinds_B == kind).nonzero()[:, 0].tolist()
        first = next(n for n, own in enumerate(shelf.latents_FCHW) if torch.equal(own, example.latents_BCHW[rows[0]]))
        for beat, row in enumerate(rows):
            here = shelf.frames[first + beat]
            assert worst(example.text_BSD[row], storygen.text.encode([here.descriptions[0]])[0]) <= 1e-5
            assert example.present_BN[row].tolist() == [beat >= back for back in range(seen, 0, -1)]
            for back in range(1, min(beat, seen) + 1):
                before = shelf.frames[first + beat - back]
                latents, text = example.reference_latents_BNCHW[row, -back], example.reference_text_BNSD[row, -back]
                assert worst(latents, codec.encode_references(pixels(before))[0]) <= 1e-5
                assert worst(text, storygen.text.encode([before.descriptions[0]])[0]) <= 1e-5


def pixels(frame: SeenFrame) -> torch.Tensor:
    return torch.from_numpy(np.asarray(frame.pixels)).permute(2, 0, 1)[None].float() / 255.0


@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_costs_as_much_however_long_the_story_is(arldm: FrameModel, length: int) -> None:
    lessons = Lessons(arldm, [barney(length)], known(), replace(recipe(1), frames_per_story=STORY_FRAMES))
    shown = set()
    for step in range(40):
        batch = lessons.batch(step_generator(0, step))
        own = batch.example.latents_BCHW[batch.kinds_B == NEW]
        assert len(own) == min(length, STORY_FRAMES)
        numbers = [next(n for n, one in enumerate(lessons.new.latents_FCHW) if torch.equal(one, row)) for row in own]
        assert numbers == sorted(set(numbers))  # each once, in their order
        shown |= set(numbers)
    assert shown == set(range(length))  # every frame has its turn
    measured = lessons.batch(step_generator(0, 0), varied=False)
    assert int((measured.kinds_B == NEW).sum()) == min(length, STORY_FRAMES)


def test_stories_of_unlike_length_are_taught_jointly_and_never_mixed(arldm: FrameModel) -> None:
    stories = [barney(3), replace(barney(8), id="zoe", name="zoe", frames=renamed(8))]
    lessons = Lessons(arldm, stories, known(), recipe(MOST_FRAMES))
    counts = set()
    for step in range(8):
        batch = lessons.batch(step_generator(0, step))
        counts.add(int((batch.kinds_B == NEW).sum()))
        rows = batch.example.text_BSD[batch.kinds_B == NEW]
        assert int((rows[0, :, -1] > 0.5).sum()) <= SIZES.positions  # the first frame of either sees nothing before it
    assert counts == {3, 8}


def renamed(length: int) -> tuple[SeenFrame, ...]:
    """Other pictures of somebody else, who looks as Barney does."""
    return tuple(
        replace(
            frame,
            id=f"zoe:{number}",
            pixels=255 - frame.pixels,
            descriptions=(frame.descriptions[0].replace("barney", "zoe"),),
            characters=frozenset({"zoe"}),
        )
        for number, frame in enumerate(barney(length).frames)
    )


def exemplar_kinds(lessons: Lessons) -> dict[str, set[int]]:
    """By character, of which kind the pictures are that the discriminator is shown of them, over some steps."""
    latents = {NEW: lessons.new.latents_FCHW, EXISTING: lessons.existing.latents_FCHW}
    shelves = {NEW: lessons.new, EXISTING: lessons.existing}

    def place(one: torch.Tensor) -> tuple[int, int]:
        return next((k, n) for k, own in latents.items() for n, its in enumerate(own) if torch.equal(its, one))

    kinds: dict[str, set[int]] = {}
    for step in range(12):
        batch = lessons.batch(step_generator(0, step))
        pairs = iter(zip(batch.pairs_P.tolist(), batch.exemplars_PCHW, strict=True))
        for row, own in enumerate(batch.example.latents_BCHW):
            kind, number = place(own)
            for who in sorted(shelves[kind].frames[number].characters):  # a pair for each, in this order
                of_row, exemplar = next(pairs)
                assert of_row == row
                shown, at = place(exemplar)
                assert who in shelves[shown].frames[at].characters
                kinds.setdefault(who, set()).add(shown)
        assert next(pairs, None) is None
    return kinds


def test_an_old_character_in_a_lesson_is_shown_by_pictures_without_the_new_one(arldm: FrameModel) -> None:
    """New characters by their lessons, old ones by what was pretrained on, as the paper is read (MODELS.md)."""
    lesson = barney()
    beside = ("fred", "fred", "dino", "dino", "fred")
    frames = tuple(
        replace(frame, characters=frame.characters | {who}) for frame, who in zip(lesson.frames, beside, strict=True)
    )
    lessons = Lessons(arldm, [replace(lesson, frames=frames)], known(), recipe(STORY_FRAMES))
    # Of Dino there is no picture but those of the lesson.
    expected = {"barney": {NEW}, "fred": {EXISTING}, "wilma": {EXISTING}, "dino": {NEW}}
    assert exemplar_kinds(lessons) == expected


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", ["storygen", "arldm"])
def test_a_story_of_any_length_is_learned_from(
    storygen: FrameModel, arldm: FrameModel, family: str, length: int, tmp_path: Path
) -> None:
    model, side_px = (storygen, STORYGEN_PX) if family == "storygen" else (arldm, SIDE_PX)
    start = toon_customization("epicevo")
    run = replace(start, steps=2, lessons=replace(start.lessons, existing_stories=2))
    trainee = customization(model, barney(length, side_px), known(side_px=side_px), run)
    parts = trainee.parts(step_generator(0, 0))
    parts[TOTAL].backward()  # type: ignore[no-untyped-call]
    assert all(bool(value.detach().isfinite()) for value in parts.values())
    assert {"mse_new", "mse_existing", "adversarial", "discriminator", "distillation"} <= set(parts)
    moved = [value.grad for value in trainee.networks.parameters() if value.grad is not None]
    assert all(bool(one.isfinite().all()) for one in moved)
    assert any(bool(one.any()) for one in moved)
