"""The engine with a pack that draws every frame from its description alone, beside one that looks back."""

from __future__ import annotations

import io
import queue
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from services.frame.engine import EngineSettings, FrameEngine, Ticket
from services.frame.job import EditedImage, Event, FrameJob, Preview, Progress, ReferenceImage, RenderedFrame
from services.models.registry import FrameModel, load_frame_model
from services.runtime.errors import (
    Cancelled,
    DescriptionTooLong,
    FabulaError,
    ImageUnreadable,
    TooManyReferences,
    ValueOutOfRange,
)
from tests.stable_diffusion_checkpoints import sealed, write_checkpoint

from .conftest import picture

WAIT_S = 30.0  # a test that waits so long has failed
KINDS = ("sd15", "sdxl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: FrameModel) -> dict[str, FrameModel]:
    folder = tmp_path_factory.mktemp("packs")
    found = {"tiny": tiny_model}
    for kind in KINDS:
        checkpoint = write_checkpoint(folder / "published" / kind, kind)
        model = load_frame_model(sealed(checkpoint, folder / kind, kind))
        assert model.manifest.max_references == 0
        small = model.manifest.model_copy(update={"width_px": 64, "height_px": 64})  # a warm-up is of the pack's size
        found[kind] = replace(model, manifest=small)
    return found


@pytest.fixture
def engine(models: dict[str, FrameModel]) -> Iterator[FrameEngine]:
    engine = FrameEngine(models, "tiny", EngineSettings(max_running=3))
    engine.start()
    yield engine
    engine.stop()


def job(pack: str, seed: int = 1, **changes: Any) -> FrameJob:
    base = FrameJob(description=f"the cat and lamp {seed}", seed=seed, pack=pack, steps=4, width_px=64, height_px=64)
    return replace(base, **changes)


def submit(engine: FrameEngine, one: FrameJob) -> tuple[Ticket, queue.Queue[Event | FabulaError]]:
    events: queue.Queue[Event | FabulaError] = queue.Queue()
    return engine.submit(one, events.put), events


def rest(events: queue.Queue[Event | FabulaError]) -> list[Event | FabulaError]:
    """All that comes, the last word included."""
    seen: list[Event | FabulaError] = []
    while not seen or not isinstance(seen[-1], RenderedFrame | FabulaError):
        seen.append(events.get(timeout=WAIT_S))
    return seen


def pixels(frame: RenderedFrame) -> npt.NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(frame.image)), dtype=np.int16)


def frame(engine: FrameEngine, one: FrameJob) -> RenderedFrame:
    last = rest(submit(engine, one)[1])[-1]
    assert isinstance(last, RenderedFrame)
    return last


def test_jobs_of_all_packs_are_drawn_side_by_side_as_alone(engine: FrameEngine) -> None:
    engine.warm_up()  # counts a row's operations too
    jobs = [
        job("sd15", 1),
        job("sdxl", 2, steps=3),
        job("tiny", 3, references=(ReferenceImage(image=picture(), description="frame"),)),
        job("sd15", 4, steps=6, text_guidance=1.0, sampler="euler_ancestral"),
        job("sdxl", 5, width_px=96),
    ]
    alone = [frame(engine, one) for one in jobs]
    together = [rest(events)[-1] for _, events in [submit(engine, one) for one in jobs]]
    for one, two in zip(alone, together, strict=True):
        assert isinstance(two, RenderedFrame)
        assert replace(two.sketch, references=()) == replace(one.sketch, references=())
        assert np.abs(pixels(two) - pixels(one)).max() <= 1
    assert len({one.pack_digest for one in alone}) == 3


def test_strictly_the_same_job_gives_the_same_bytes(models: dict[str, FrameModel]) -> None:
    engine = FrameEngine(models, "sdxl", EngineSettings(max_running=3, strict=True))
    engine.start()
    try:
        one = job("sdxl", sampler="euler_ancestral")
        alone = frame(engine, one)
        crowd = [submit(engine, other) for other in (one, job("sdxl", 2), job("sd15", 3))]
        beside = rest(crowd[0][1])[-1]
        assert isinstance(beside, RenderedFrame)
        assert beside.sha256 == alone.sha256
        assert frame(engine, replace(one, seed=9)).sha256 != alone.sha256
    finally:
        engine.stop()


@pytest.mark.parametrize("pack", KINDS)
def test_it_tells_of_progress_and_shows_previews(engine: FrameEngine, pack: str) -> None:
    seen = rest(submit(engine, job(pack, preview_every_steps=2))[1])
    assert [one.step for one in seen if isinstance(one, Progress)] == [1, 2, 3, 4]
    previews = [one for one in seen if isinstance(one, Preview)]
    assert [one.step for one in previews] == [2]
    assert previews[0].image.startswith(b"RIFF")


@pytest.mark.parametrize("pack", KINDS)
def test_a_cancelled_job_leaves_and_others_go_on(engine: FrameEngine, pack: str) -> None:
    ticket, events = submit(engine, job(pack, steps=200))
    _, others = submit(engine, job(pack, 2, steps=20))
    while not isinstance(events.get(timeout=WAIT_S), Progress):
        pass
    ticket.cancel()
    last = rest(events)
    assert isinstance(last[-1], Cancelled)
    assert sum(isinstance(one, Progress) for one in last) < 199
    assert isinstance(rest(others)[-1], RenderedFrame)


@pytest.mark.parametrize("pack", KINDS)
def test_what_it_cannot_draw_is_refused_by_name(engine: FrameEngine, pack: str) -> None:
    seen = (ReferenceImage(image=picture(), description="frame"),)
    with pytest.raises(TooManyReferences):
        submit(engine, job(pack, references=seen))
    with pytest.raises(DescriptionTooLong) as refused:
        submit(engine, job(pack, description="cat " * 76))
    assert refused.value.metadata["limit"] == "75"
    with pytest.raises(ValueOutOfRange) as wrong:
        submit(engine, job(pack, width_px=68))
    assert wrong.value.field_violations[0].field == "width_px"


@pytest.mark.parametrize("pack", [*KINDS, "tiny"])
def test_a_frame_may_be_made_of_a_picture(engine: FrameEngine, pack: str) -> None:
    given = picture(seed=5, width_px=100, height_px=80)  # cut and resized as references are
    seen = rest(submit(engine, job(pack, steps=10, edit=EditedImage(image=given, strength=0.3)))[1])
    assert [one.step_count for one in seen if isinstance(one, Progress)] == [3, 3, 3]
    weak, half = (
        frame(engine, job(pack, steps=10, text_guidance=1.0, edit=EditedImage(image=given, strength=strength)))
        for strength in (0.1, 0.9)
    )
    assert weak.sha256 != half.sha256
    assert weak.sketch.edit is not None
    assert weak.sketch.edit.pixels.shape == (64, 64, 3)
    original = weak.sketch.edit.pixels.astype(np.int16)
    assert np.abs(pixels(weak) - original).mean() != np.abs(pixels(half) - original).mean()


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, float("nan")])
def test_an_edit_of_no_strength_is_refused(engine: FrameEngine, strength: float) -> None:
    with pytest.raises(ValueOutOfRange) as wrong:
        submit(engine, job("sd15", edit=EditedImage(image=picture(), strength=strength)))
    assert wrong.value.field_violations[0].field == "edit.strength"
    with pytest.raises(ImageUnreadable) as unreadable:
        submit(engine, job("sd15", edit=EditedImage(image=b"no picture")))
    assert unreadable.value.field_violations[0].field == "edit.image"
