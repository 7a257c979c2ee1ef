"""AR-LDM through the frame engine: the numbers of its own sampling loop, served like every other family."""

from __future__ import annotations

import io
import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor

from services.frame import engine as engine_module
from services.frame.engine import EngineSettings, FrameEngine, Ticket
from services.frame.job import EditedImage, Event, FrameJob, Preview, Progress, ReferenceImage, RenderedFrame
from services.models.arldm.checkpoint import convert, load_arldm
from services.models.arldm.model import LATENTS, SCHEDULE
from services.models.arldm.sampling import ArldmModel, Story, draw_stories
from services.models.arldm.unet import Context
from services.models.character import CharacterWeights
from services.models.drawing import Drawing, Pixels, Randomness, Seen, Sketch, begin, finish
from services.models.errors import PackFileMissing, PackManifestInvalid
from services.models.graphs import Graphs
from services.models.pack import MANIFEST, Pack, PackSettings, Sampling, write_pack
from services.models.registry import FrameModel, load_frame_model
from services.models.step import advance
from services.runtime.errors import (
    Cancelled,
    CharacterWeightsUnusable,
    DescriptionTooLong,
    FabulaError,
    TooFewReferences,
    TooManyReferences,
)
from tests.reference_arldm import random_state
from tests.tape import Tape
from tests.tiny_arldm import CAPTIONS, GUIDANCE, SIZES, STEPS, blip_tokenizer, clip_tokenizer, config, worst

from .conftest import picture

WAIT_S = 30.0  # a test that waits so long has failed
SIDE_PX = 32
LATENT = (4, 16, 16)
FRAMES = len(CAPTIONS)


def settings(name: str, **changes: Any) -> PackSettings:
    values = PackSettings(
        name=name,
        architecture="arldm",
        base="nothing",
        licence="Apache-2.0",
        made_by="a test",
        width_px=SIDE_PX,
        height_px=SIDE_PX,
        dtype="float32",
        max_references=FRAMES - 1,
        reference_range="signed",
        latents=LATENTS,
        schedule=SCHEDULE,
        sampling=Sampling(
            sampler="ddim", default_steps=STEPS, default_text_guidance=GUIDANCE, default_image_guidance=1.0
        ),
    )
    return values.model_copy(update=changes)


def converted(folder: Path, given: int = 0) -> Path:
    """A checkpoint in the published layout with random weights, made a folder of ours."""
    save_file(random_state(SIZES, seed=0), str(folder.with_suffix(".safetensors")))
    convert(
        folder.with_suffix(".safetensors"),
        folder,
        clip_tokenizer=clip_tokenizer(),
        blip_tokenizer=blip_tokenizer(),
        config=config(given=given),
    )
    return folder


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pack]:
    """One that draws whole stories, and one that goes on from a given frame."""
    folder = tmp_path_factory.mktemp("arldm")
    return {
        name: write_pack(converted(folder / name, given), settings(name))
        for name, given in (("stories", 0), ("continues", 1))
    }


@pytest.fixture(scope="module")
def own(packs: dict[str, Pack]) -> ArldmModel:
    """As its own sampling loop has it."""
    return load_arldm(packs["stories"].folder)


@pytest.fixture(scope="module")
def models(packs: dict[str, Pack], tiny_model: FrameModel) -> dict[str, FrameModel]:
    return {"tiny": tiny_model, **{name: load_frame_model(pack) for name, pack in packs.items()}}


@pytest.fixture
def engine(models: dict[str, FrameModel]) -> Iterator[FrameEngine]:
    engine = FrameEngine(models, "stories", EngineSettings(max_running=5, max_rows=10))
    engine.start()
    yield engine
    engine.stop()


def noise(seeds: range) -> Tensor:
    """What the engine draws for frames of these seeds, as the loop wants it."""
    return torch.stack([Randomness(seed).normal(*LATENT) for seed in seeds])[None]


def as_png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def drawn_by_its_loop(own: ArldmModel, seeds: range) -> tuple[Tensor, list[Pixels]]:
    latents, pixels = draw_stories(own, [Story(captions=CAPTIONS)], noise(seeds), steps=STEPS, guidance=GUIDANCE)
    bytes_VHW3 = (pixels[0].permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8).numpy()
    return latents[0], list(bytes_VHW3)


def job(number: int = 0, seed: int = 1, past: list[bytes] | None = None, **changes: Any) -> FrameJob:
    """Frame `number` of the story."""
    pictures = [picture(i, SIDE_PX, SIDE_PX) for i in range(number)] if past is None else past
    references = tuple(ReferenceImage(image=p, description=c) for p, c in zip(pictures, CAPTIONS, strict=False))
    return replace(FrameJob(description=CAPTIONS[number], seed=seed, references=references), **changes)


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


def test_a_story_through_the_engine_is_its_own_loops(
    engine: FrameEngine, own: ArldmModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, pictures = drawn_by_its_loop(own, range(FRAMES))
    found: list[Tensor] = []

    def remember(model: FrameModel, drawings: Sequence[Drawing]) -> list[Pixels]:
        found.extend(drawing.latents_CHW.clone() for drawing in drawings)
        return finish(model, drawings)

    monkeypatch.setattr(engine_module, "finish", remember)
    past: list[bytes] = []
    for number in range(FRAMES):
        drawn = frame(engine, job(number, seed=number, past=past))
        assert worst(found[-1], expected[number]) <= 1e-4, number
        assert np.abs(pixels_of(drawn) - pictures[number].astype(np.int16)).max() <= 1
        past.append(as_png(pictures[number]))


def test_frames_of_all_lengths_share_their_steps(models: dict[str, FrameModel], own: ArldmModel) -> None:
    """One forward holds the first frame of a story and the last of another, with contexts of unlike length."""
    expected, pictures = drawn_by_its_loop(own, range(FRAMES))
    sketches = [
        Sketch(
            description=CAPTIONS[number],
            seed=number,
            width_px=SIDE_PX,
            height_px=SIDE_PX,
            steps=STEPS,
            text_guidance=GUIDANCE,
            image_guidance=1.0,
            references=tuple(Seen(pixels=pictures[i], description=CAPTIONS[i]) for i in range(number)),
        )
        for number in range(FRAMES)
    ]
    drawings = [begin(models["stories"], sketch) for sketch in sketches]
    while not drawings[0].finished:
        rows = advance(models["stories"], drawings)
        assert (rows.main, rows.computed, rows.found) == (2 * FRAMES, 0, 0)  # nothing about nothing, twice a frame
    for drawing, latents in zip(drawings, expected, strict=True):
        assert worst(drawing.latents_CHW, latents) <= 1e-4


def test_the_past_counts_in_its_order(models: dict[str, FrameModel]) -> None:
    reader = models["stories"].reader
    assert reader is not None
    one, two = (np.asarray(Image.open(io.BytesIO(picture(i, SIDE_PX, SIDE_PX)))) for i in range(2))
    past = [(one, CAPTIONS[0]), (two, CAPTIONS[1])]
    about = reader.contexts(CAPTIONS[2], past)
    others = [past[::-1], past[:1], [(two, CAPTIONS[0]), past[1]], [(one, CAPTIONS[3]), past[1]]]
    assert all(not torch.equal(about[1], reader.contexts(CAPTIONS[2], other)[1]) for other in others)
    nothing = reader.contexts(CAPTIONS[3], others[2])[0]
    assert torch.equal(about[0], nothing)  # guidance steers away from the same, whatever the story is
    with pytest.raises(ValueError, match="knows 5 frames"):
        reader.contexts("wilma", [past[0]] * FRAMES)


def test_a_context_is_the_same_as_a_text() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 6, 3, generator=generator)
    seen = torch.tensor([[True, False, True, False, False, False], [True, True, True, True, False, False]])
    text = Context(states, seen).as_text(length=5)
    assert text.shape == (2, 5, 4)
    assert torch.equal(text[0, :2, :3], states[0, [0, 2]])
    assert text[0, 2:].abs().sum() == 0.0  # what is hidden leaves nothing
    back = Context.from_text(text)
    assert back.seen_BK.sum(dim=1).tolist() == [2, 4]
    assert back.states_BKD.shape == (2, 4, 3)
    with pytest.raises(ValueError, match="more than 3"):
        Context(states, seen).as_text(length=3)


def test_jobs_are_drawn_side_by_side_as_alone(engine: FrameEngine) -> None:
    engine.warm_up()
    tiny = FrameJob(description="a fox", seed=5, pack="tiny", steps=4, width_px=64, height_px=64)
    jobs = [
        job(0, 1),
        job(4, 2, steps=6),
        job(2, 3, text_guidance=1.0, sampler="euler"),
        job(1, 4, pack="continues"),
        replace(tiny, references=(ReferenceImage(image=picture(), description="a fox"),)),
    ]
    alone = [frame(engine, one) for one in jobs]
    together = [rest(events)[-1] for _, events in [submit(engine, one) for one in jobs]]
    for one, two in zip(alone, together, strict=True):
        assert isinstance(two, RenderedFrame)
        assert np.abs(pixels_of(two) - pixels_of(one)).max() <= 1


def test_strictly_the_same_job_gives_the_same_bytes(models: dict[str, FrameModel]) -> None:
    engine = FrameEngine(models, "stories", EngineSettings(max_running=3, strict=True))
    engine.start()
    try:
        alone = frame(engine, job(2))
        crowd = [submit(engine, other) for other in (job(2), job(4, 7), job(0, 8))]
        beside = rest(crowd[0][1])[-1]
        assert isinstance(beside, RenderedFrame)
        assert beside.sha256 == alone.sha256
        assert frame(engine, job(2, 9)).sha256 != alone.sha256
    finally:
        engine.stop()


def test_it_tells_of_progress_and_shows_previews(engine: FrameEngine) -> None:
    seen = rest(submit(engine, job(1, preview_every_steps=2))[1])
    assert [one.step for one in seen if isinstance(one, Progress)] == [1, 2, 3, 4]
    assert [one.step for one in seen if isinstance(one, Preview)] == [2]


def test_a_cancelled_job_leaves_and_others_go_on(engine: FrameEngine) -> None:
    ticket, events = submit(engine, job(3, steps=200))
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


def test_deep_blocks_may_be_used_twice(models: dict[str, FrameModel]) -> None:
    engine = FrameEngine(models, "stories", EngineSettings(deep_every=2))
    engine.start()
    try:
        reused = frame(engine, job(2))
    finally:
        engine.stop()
    assert reused.sketch.deep_every == 2
    drawing = begin(models["stories"], reused.sketch)
    advance(models["stories"], [drawing])
    deep, text = drawing.deep[2], drawing.description_SD[None]
    given = (drawing.latents_CHW[None], torch.tensor([drawing.steps[1]]), text)
    unet = models["stories"].denoiser.unet
    with torch.no_grad():
        whole, kept = unet.predict_and_keep(*given)
        assert worst(unet.predict_shallow(*given, kept), whole) <= 1e-5  # with its own deep states it is the network
        assert worst(unet.predict_shallow(*given, deep[None]), whole) > 1e-5


def test_what_it_cannot_draw_is_refused_by_name(engine: FrameEngine) -> None:
    with pytest.raises(TooManyReferences):
        submit(engine, job(0, past=[picture()] * FRAMES, references=job(4).references * 2))
    with pytest.raises(TooFewReferences) as refused:
        submit(engine, job(0, pack="continues"))
    assert refused.value.field_violations[0].field == "references"
    with pytest.raises(DescriptionTooLong) as long:
        submit(engine, job(0, description="fred " * 100))
    assert long.value.metadata["limit"] == str(SIZES.positions - 2)
    # Of an earlier frame's caption the beginning will do.
    told = (ReferenceImage(image=picture(), description="fred " * 100),)
    cut = frame(engine, job(1, references=told)).sketch.references[0].description
    assert cut == " ".join(["fred"] * (SIZES.positions - 2))


def test_characters_change_its_unet_and_nothing_else(models: dict[str, FrameModel]) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = models["stories"].denoiser.unet.get_submodule(layer).weight
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(size, generator=generator) for size in ((2, weight.shape[1]), (weight.shape[0], 2)))
    files = {
        "a" * 64: save({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}),
        "b" * 64: save({"words.Zoe": torch.ones(1, SIZES.width)}),
    }

    digests = {name: _digest(data) for name, data in files.items()}
    by_digest = {digests[name]: data for name, data in files.items()}
    engine = FrameEngine(models, "stories", EngineSettings(), fetch=by_digest.__getitem__)
    engine.start()
    try:
        plain = frame(engine, job(2))
        weak, full = (
            frame(engine, job(2, characters=(CharacterWeights(digests["a" * 64], scale),))) for scale in (0.0, 1.0)
        )
        assert np.abs(pixels_of(weak) - pixels_of(plain)).max() <= 1
        assert np.abs(pixels_of(full) - pixels_of(plain)).max() > 1
        with pytest.raises(CharacterWeightsUnusable):
            submit(engine, job(2, characters=(CharacterWeights(digests["b" * 64], 1.0),)))
    finally:
        engine.stop()


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_references": FRAMES}, "max_references"),
        ({"latents": LATENTS.__class__(shift=(0.0,) * 3, scale=(1.0,) * 3)}, "latent shifts"),
    ],
)
def test_a_manifest_that_promises_too_much_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    pack = write_pack(converted(tmp_path / "stories"), settings("stories", **changes))
    with pytest.raises(PackManifestInvalid, match=named):
        load_frame_model(pack)


def test_a_file_that_the_manifest_does_not_list_is_not_read(tmp_path: Path) -> None:
    folder = converted(tmp_path / "stories")
    hidden = folder / "blip_tokenizer" / "tokenizer.json"
    data = hidden.read_bytes()
    hidden.unlink()
    pack = write_pack(folder, settings("stories"))
    hidden.write_bytes(data)
    assert (folder / MANIFEST).is_file()
    with pytest.raises(PackFileMissing, match="blip_tokenizer"):
        load_frame_model(pack)


def test_forwards_that_ask_their_texts_how_long_they_are_are_not_recorded(models: dict[str, FrameModel]) -> None:
    with pytest.raises(ValueError, match="cannot be recorded"):
        replace(models["stories"], graphs=Graphs(Tape()))
