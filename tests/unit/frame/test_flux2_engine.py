"""FLUX.2 Klein through the frame engine: the numbers of diffusers' pipelines, served like every other family."""

from __future__ import annotations

import copy
import hashlib
import io
import queue
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from services.frame.engine import EngineSettings, FrameEngine, Ticket
from services.frame.job import EditedImage, Event, FrameJob, Preview, Progress, ReferenceImage, RenderedFrame
from services.frame.service import packs_to_pb
from services.frame.sketch import limits_of
from services.models.character import CharacterWeights
from services.models.denoiser import StoryDenoiser
from services.models.drawing import Randomness, begin, finish
from services.models.registry import FrameModel, load_frame_model
from services.models.step import advance
from services.runtime.errors import (
    Cancelled,
    CharacterWeightsUnusable,
    DescriptionTooLong,
    FabulaError,
    TooManyReferences,
    ValueOutOfRange,
)
from tests.flux2_checkpoints import CHANNELS, KINDS, SIDE_PX, pipeline, sealed

from .conftest import picture

WAIT_S = 30.0  # a test that waits so long has failed
KLEIN, KV = KINDS
LAYERS = (
    "transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    "double_stream_modulation_img.linear",
)


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {kind: pipeline(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(
    pipes: dict[str, Any], tiny_model: FrameModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, FrameModel]:
    folder = tmp_path_factory.mktemp("flux2")
    packs = {kind: sealed(folder / kind, kind, pipe) for kind, pipe in pipes.items()}
    return {"tiny": tiny_model, **{kind: load_frame_model(pack) for kind, pack in packs.items()}}


@pytest.fixture
def engine(models: dict[str, FrameModel]) -> Iterator[FrameEngine]:
    engine = FrameEngine(models, KLEIN, EngineSettings(max_running=5, max_rows=10))
    engine.start()
    yield engine
    engine.stop()


def job(references: int = 0, seed: int = 1, **changes: Any) -> FrameJob:
    seen = tuple(
        ReferenceImage(image=picture(i, SIDE_PX, SIDE_PX), description="an earlier frame") for i in range(references)
    )
    return replace(FrameJob(description="the cat at night", seed=seed, references=seen), **changes)


def submit(engine: FrameEngine, one: FrameJob) -> tuple[Ticket, queue.Queue[Event | FabulaError]]:
    events: queue.Queue[Event | FabulaError] = queue.Queue()
    return engine.submit(one, events.put), events


def rest(events: queue.Queue[Event | FabulaError]) -> list[Event | FabulaError]:
    """All that comes, the last word included."""
    seen: list[Event | FabulaError] = []
    while not seen or not isinstance(seen[-1], RenderedFrame | FabulaError):
        seen.append(events.get(timeout=WAIT_S))
    return seen


def frame(engine: FrameEngine, one: FrameJob) -> RenderedFrame:
    last = rest(submit(engine, one)[1])[-1]
    assert isinstance(last, RenderedFrame), last
    return last


def pixels_of(frame: RenderedFrame) -> npt.NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(frame.image)), dtype=np.int16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("references", [0, 1, 3])
def test_frames_are_the_pipelines(engine: FrameEngine, pipes: dict[str, Any], kind: str, references: int) -> None:
    one = job(references, pack=kind, text_guidance=1.0 if kind == KV else None)
    shown = [Image.open(io.BytesIO(each.image)) for each in one.references]
    expected = pipes[kind](
        image=shown or None,
        prompt=one.description,
        height=SIDE_PX,
        width=SIDE_PX,
        num_inference_steps=4,
        latents=Randomness(one.seed).normal(1, CHANNELS, SIDE_PX // 16, SIDE_PX // 16),
        output_type="np",
    ).images[0]
    drawn = frame(engine, one)
    assert (drawn.sketch.steps, drawn.sketch.sampler) == (4, "flow_euler")
    assert np.abs(pixels_of(drawn) - expected * 255.0).max() <= 1.0


def test_jobs_are_drawn_side_by_side_as_alone(engine: FrameEngine) -> None:
    engine.warm_up()
    tiny = FrameJob(description="a fox", seed=5, pack="tiny", steps=4, width_px=64, height_px=64)
    jobs = [
        job(2, 1),
        job(1, 2, steps=6),
        job(0, 3, text_guidance=1.0),
        job(3, 4, pack=KV),
        job(2, 5, width_px=96),
        replace(tiny, references=(ReferenceImage(image=picture(), description="a fox"),)),
    ]
    alone = [frame(engine, one) for one in jobs]
    together = [rest(events)[-1] for _, events in [submit(engine, one) for one in jobs]]
    for one, two in zip(alone, together, strict=True):
        assert isinstance(two, RenderedFrame)
        assert np.abs(pixels_of(two) - pixels_of(one)).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_strictly_the_same_job_gives_the_same_bytes(models: dict[str, FrameModel], kind: str) -> None:
    engine = FrameEngine(models, kind, EngineSettings(max_running=3, strict=True))
    engine.start()
    try:
        alone = frame(engine, job(2))
        crowd = [submit(engine, other) for other in (job(2), job(1, 7), job(0, 8))]
        beside = rest(crowd[0][1])[-1]
        assert isinstance(beside, RenderedFrame)
        assert beside.sha256 == alone.sha256
        assert frame(engine, job(2, 9)).sha256 != alone.sha256
    finally:
        engine.stop()


def test_it_tells_of_progress_and_shows_previews(engine: FrameEngine) -> None:
    seen = rest(submit(engine, job(1, preview_every_steps=2))[1])
    assert [one.step for one in seen if isinstance(one, Progress)] == [1, 2, 3, 4]
    (shown,) = (one for one in seen if isinstance(one, Preview))
    assert shown.step == 2
    assert Image.open(io.BytesIO(shown.image)).size == (SIDE_PX, SIDE_PX)


def test_a_cancelled_job_leaves_and_others_go_on(engine: FrameEngine) -> None:
    ticket, events = submit(engine, job(2, steps=200))
    _, others = submit(engine, job(1, 2, steps=20))
    while not isinstance(events.get(timeout=WAIT_S), Progress):
        pass
    ticket.cancel()
    last = rest(events)
    assert isinstance(last[-1], Cancelled)
    assert sum(isinstance(one, Progress) for one in last) < 199
    assert isinstance(rest(others)[-1], RenderedFrame)


def test_a_frame_may_be_made_of_a_picture(engine: FrameEngine) -> None:
    edit = EditedImage(image=picture(9, SIDE_PX, SIDE_PX), strength=0.5)
    seen = rest(submit(engine, job(2, edit=edit))[1])
    assert [one.step_count for one in seen if isinstance(one, Progress)] == [2, 2]
    assert isinstance(seen[-1], RenderedFrame)
    assert seen[-1].sha256 != frame(engine, job(2)).sha256


def test_an_engine_that_uses_deep_blocks_twice_draws_it_as_ever(
    models: dict[str, FrameModel], engine: FrameEngine
) -> None:
    other = FrameEngine(models, KLEIN, EngineSettings(deep_every=2))
    other.start()
    try:
        other.warm_up()  # which counts what rows cost
        drawn = frame(other, job(1))
    finally:
        other.stop()
    assert drawn.sketch.deep_every == 1
    assert np.abs(pixels_of(drawn) - pixels_of(frame(engine, job(1)))).max() <= 1


def test_what_it_cannot_draw_is_refused_by_name(engine: FrameEngine) -> None:
    with pytest.raises(TooManyReferences):
        submit(engine, job(4))
    with pytest.raises(ValueOutOfRange, match="no sampler 'ddim'; known: flow_euler"):
        submit(engine, job(sampler="ddim"))
    with pytest.raises(ValueOutOfRange, match="no sampler 'flow_euler'; known: ddim"):
        submit(engine, job(pack="tiny", sampler="flow_euler"))
    with pytest.raises(ValueOutOfRange, match="multiple of 16"):
        submit(engine, job(width_px=72))
    with pytest.raises(DescriptionTooLong):
        submit(engine, job(description="fred " * 1000))


def test_what_it_offers_is_told(engine: FrameEngine) -> None:
    told = {pack.name: pack for pack in packs_to_pb(engine).packs}
    pack = told[KLEIN]
    assert (pack.default_steps, pack.max_references, pack.side_multiple_px) == (4, 3, 16)
    assert list(pack.samplers) == ["flow_euler"] == list(limits_of(engine.models[KLEIN]).samplers)
    assert "flow_euler" not in told["tiny"].samplers


@pytest.mark.parametrize("kind", KINDS)
def test_characters_change_its_transformer(models: dict[str, FrameModel], kind: str) -> None:
    """A frame with a character is that of a network whose weights are the character's; so are earlier frames seen."""
    model = models[kind]
    merged: Any = copy.deepcopy(model.denoiser.unet)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    with torch.no_grad():
        for layer in LAYERS:
            weight = merged.get_submodule(layer).weight
            down, up = (
                torch.randn(size, generator=generator) * 0.2 for size in ((2, weight.shape[1]), (weight.shape[0], 2))
            )
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            weight += up @ down
    data = save(tensors)
    words = save({"words.Zoe": torch.ones(1, 16)})
    files = {hashlib.sha256(each).hexdigest(): each for each in (data, words)}
    zoe, other = files
    own = replace(model, denoiser=StoryDenoiser(merged, model.denoiser.schedule))
    engine = FrameEngine(models, kind, EngineSettings(), fetch=files.__getitem__)
    engine.start()
    try:
        plain = frame(engine, job(2))
        jobs = [job(2, characters=(CharacterWeights(zoe, 1.0),)), job(2), job(1, 4)]
        drawn = [rest(events)[-1] for _, events in [submit(engine, one) for one in jobs]]
        assert all(isinstance(each, RenderedFrame) for each in drawn)
        wearing, beside = (pixels_of(each) for each in drawn[:2] if isinstance(each, RenderedFrame))
        with pytest.raises(CharacterWeightsUnusable):
            submit(engine, job(2, characters=(CharacterWeights(other, 1.0),)))
    finally:
        engine.stop()
    drawing = begin(own, replace(plain.sketch, seed=1))
    while not drawing.finished:
        advance(own, [drawing])
    assert np.abs(wearing - finish(own, [drawing])[0].astype(np.int16)).max() <= 1
    assert np.abs(wearing - pixels_of(plain)).max() > 1
    assert np.abs(beside - pixels_of(plain)).max() <= 1
