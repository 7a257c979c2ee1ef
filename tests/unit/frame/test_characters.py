"""Characters with weights of their own, drawn together by one engine."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from services.frame import engine as engine_module
from services.frame.engine import EngineSettings, FrameEngine, _Silence
from services.frame.job import FrameJob, RenderedFrame
from services.frame.sketch import MAX_STEPS, sketch_of
from services.models.character import CharacterWeights
from services.models.graphs import Graphs
from services.models.lora import ALPHA, BASE_DIGEST, AdapterSlots, adapted_layers, read_adapter
from services.models.pack import QualitySettings
from services.models.quality import Quality
from services.models.registry import FrameModel, load_frame_model
from services.models.tiny import build_tiny_pack
from services.runtime.errors import (
    CharacterWeightsUnknown,
    CharacterWeightsUnusable,
    FabulaError,
    InvalidArgument,
    QueueFull,
    RenderFailed,
    ValueOutOfRange,
)
from tests.tape import Tape

from .test_engine import WAIT_S, Gate, Inbox, gate, job, running  # noqa: F401 - a fixture


def weights(model: FrameModel, seed: int, rank: int = 2, size: float = 0.5, base: str = "") -> bytes:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in adapted_layers(model.denoiser.unet).items():
        if "attn" in name:
            state[f"{name}.lora_A.weight"] = size * torch.randn(rank, layer.weight.shape[1], generator=generator)
            state[f"{name}.lora_B.weight"] = size * torch.randn(layer.weight.shape[0], rank, generator=generator)
    return save(state, metadata={ALPHA: str(rank), BASE_DIGEST: base or model.base_digest})


class Files(dict[str, bytes]):
    """Files by digest, and how often each was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def keep(self, payload: bytes) -> str:
        digest = hashlib.sha256(payload).hexdigest()
        self[digest] = payload
        return digest

    def fetch(self, digest: str) -> bytes:
        self.asked.append(digest)
        if digest not in self:
            raise CharacterWeightsUnknown(metadata={"digest": digest})
        return self[digest]


@pytest.fixture
def files() -> Files:
    return Files()


@pytest.fixture
def started(tiny_model: FrameModel, files: Files) -> Any:
    engines: list[FrameEngine] = []

    def start(**settings: Any) -> FrameEngine:
        engine = FrameEngine({"tiny": tiny_model}, "tiny", EngineSettings(**settings), fetch=files.fetch)
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.stop()


def wearing(seed: int, *digests: str, scale: float = 1.0, **changes: Any) -> FrameJob:
    return job(seed, characters=tuple(CharacterWeights(d, scale) for d in digests), **changes)


def test_jobs_of_different_characters_are_drawn_together_as_each_alone(
    tiny_model: FrameModel,
    files: Files,
    started: Callable[..., FrameEngine],
    gate: Gate,  # noqa: F811
) -> None:
    digests = [files.keep(weights(tiny_model, seed)) for seed in range(3)]
    jobs = [job(9, references=1), *(wearing(9, d, references=1) for d in digests), wearing(9, *digests[:2])]
    gate.open()
    engine = started(max_running=5)
    alone = [Inbox(engine, one).frame().image for one in jobs]
    assert len(set(alone)) == len(jobs), "each has its own look"
    before = len(gate.turns)
    together = [Inbox(engine, one) for one in jobs]
    images = [inbox.frame().image for inbox in together]
    assert max(len(turn) for turn in gate.turns[before:]) >= 4
    assert [_differs(a, b) for a, b in zip(alone, images, strict=True)] == [False] * len(jobs)
    assert sorted(files.asked) == sorted(digests), "each file was read once"


def _differs(a: bytes, b: bytes) -> bool:
    """By more than a level: a batch's last bits may round the other way."""
    left, right = (np.asarray(Image.open(io.BytesIO(one))).astype(int) for one in (a, b))
    return bool(np.abs(left - right).max() > 1)


def test_more_characters_than_slots_come_and_go(
    tiny_model: FrameModel, files: Files, started: Callable[..., FrameEngine]
) -> None:
    digests = [files.keep(weights(tiny_model, seed)) for seed in range(6)]
    engine = started(max_running=1)
    first = [Inbox(engine, wearing(1, d)).frame().sha256 for d in digests]
    assert [Inbox(engine, wearing(1, d)).frame().sha256 for d in digests] == first
    assert len(set(first)) == 6


def test_a_scale_of_nothing_is_nobody(
    tiny_model: FrameModel, files: Files, started: Callable[..., FrameEngine]
) -> None:
    digest = files.keep(weights(tiny_model, 1))
    engine = started(max_running=1)
    assert Inbox(engine, wearing(1, digest, scale=0.0)).frame().sha256 == Inbox(engine, job(1)).frame().sha256


def test_unusable_weights_are_refused_before_they_touch_a_batch(
    tiny_model: FrameModel, files: Files, started: Callable[..., FrameEngine]
) -> None:
    good = weights(tiny_model, 1)
    bad = {
        "ADAPTER_DAMAGED": files.keep(good[:-7]),
        "ADAPTER_WRONG_BASE": files.keep(weights(tiny_model, 1, base="0" * 64)),
        "ADAPTER_WRONG_SHAPE": files.keep(weights(tiny_model, 1, rank=17)),
    }
    files["e" * 64] = good
    engine = started(max_running=2)
    for cause, digest in (*bad.items(), ("ADAPTER_DAMAGED", "e" * 64)):
        with pytest.raises(CharacterWeightsUnusable) as refused:
            engine.submit(wearing(1, digest), lambda _: None)
        assert refused.value.metadata["cause"] == cause
    with pytest.raises(CharacterWeightsUnknown):
        engine.submit(wearing(1, "f" * 64), lambda _: None)
    assert not engine.tickets
    assert Inbox(engine, wearing(1, files.keep(good))).frame().image


def test_weights_that_could_not_be_laid_out_once_can_be_the_next_time(
    tiny_model: FrameModel, files: Files, started: Callable[..., FrameEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = files.keep(weights(tiny_model, 1))
    engine = started(max_running=2)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterSlots, "put", lambda *_: (_ for _ in ()).throw(MemoryError()))
        assert isinstance(Inbox(engine, wearing(1, digest)).last(), RenderFailed)
    assert Inbox(engine, job(1)).frame().image, "the engine lives on"
    assert Inbox(engine, wearing(1, digest)).frame().sha256 != Inbox(engine, job(1)).frame().sha256


def test_an_engine_without_a_store_knows_no_weights(tiny_model: FrameModel) -> None:
    with running(tiny_model) as engine, pytest.raises(CharacterWeightsUnknown):
        engine.submit(wearing(1, "a" * 64), lambda _: None)


@pytest.mark.parametrize(
    "characters",
    [
        (("A" * 64, 1.0),),
        (("a" * 63, 1.0),),
        (("a" * 64, float("nan")),),
        (("a" * 64, 2.1),),
        (("a" * 64, -0.1),),
        (("a" * 64, 1.0), ("a" * 64, 1.0)),
        (("a" * 64, 1.0), ("b" * 64, 1.0), ("c" * 64, 1.0)),
    ],
)
def test_bad_characters_are_named(tiny_model: FrameModel, characters: tuple[tuple[str, float], ...]) -> None:
    given = tuple(CharacterWeights(*one) for one in characters)
    with running(tiny_model) as engine, pytest.raises(ValueOutOfRange, match=r"character|digest") as refused:
        engine.submit(job(1, characters=given), lambda _: None)
    assert isinstance(refused.value, InvalidArgument)
    assert isinstance(refused.value, FabulaError)


def test_too_few_slots_are_a_wrong_setting() -> None:
    with pytest.raises(ValueError, match="slots"):
        EngineSettings(max_running=4, adapter_slots=7)


def test_weights_leave_when_told_and_come_back_when_wanted(
    tiny_model: FrameModel, files: Files, started: Callable[..., FrameEngine]
) -> None:
    digest = files.keep(weights(tiny_model, 1))
    engine = started(max_running=2)
    assert not engine.unload(digest), "it was never here"
    first = Inbox(engine, wearing(1, digest)).frame()
    assert engine.unload(digest)
    Inbox(engine, job(2)).frame()
    assert engine._tables["tiny"].resident == ()
    assert engine.models["tiny"].slots is not None
    assert engine.models["tiny"].slots.held == {}
    assert not engine.unload(digest)
    assert Inbox(engine, wearing(1, digest)).frame().sha256 == first.sha256
    assert files.asked == [digest, digest]


def test_weights_that_are_worn_leave_with_the_last_who_wears_them(
    tiny_model: FrameModel,
    files: Files,
    started: Callable[..., FrameEngine],
    gate: Gate,  # noqa: F811
) -> None:
    digest = files.keep(weights(tiny_model, 1))
    engine = started(max_running=2)
    worn, other = Inbox(engine, wearing(1, digest, references=1)), Inbox(engine, job(2, steps=12))
    gate.wait()
    gate.step()
    assert engine.unload(digest)
    gate.step()
    assert engine._tables["tiny"].resident == (digest,), "nobody's picture changes on the way"
    gate.open()
    picture = worn.frame()
    other.frame()
    assert engine._tables["tiny"].resident == ()
    again = Inbox(engine, wearing(1, digest, references=1)).frame()
    assert not _differs(again.image, picture.image)


def test_who_watches_is_told_of_weights(tiny_model: FrameModel, files: Files) -> None:
    class Watcher(_Silence):
        def __init__(self) -> None:
            self.told: list[tuple[int, int]] = []

        def adapters_changed(self, *, resident: int, kept_bytes: int, loads: int) -> None:
            assert kept_bytes > 0
            self.told.append((resident, loads))

    digests = [files.keep(weights(tiny_model, seed)) for seed in range(2)]
    watcher = Watcher()
    engine = FrameEngine({"tiny": tiny_model}, "tiny", observer=watcher, fetch=files.fetch)
    engine.start()
    try:
        for digest in (*digests, digests[0]):
            Inbox(engine, wearing(1, digest)).frame()
    finally:
        engine.stop()
    assert sum(loads for _, loads in watcher.told) == 2
    assert watcher.told[-1][0] == 2


def a_whole_unet(model: FrameModel, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save(
        {
            name: (value + 0.1 * torch.randn(value.shape, generator=generator)).contiguous()
            for name, value in model.denoiser.unet.state_dict().items()
        }
    )


def test_whole_unets_are_drawn_in_forwards_of_their_own_beside_the_others(
    tiny_model: FrameModel,
    files: Files,
    started: Callable[..., FrameEngine],
    gate: Gate,  # noqa: F811
) -> None:
    whole = [files.keep(a_whole_unet(tiny_model, seed)) for seed in (1, 2)]
    light = files.keep(weights(tiny_model, 3))
    jobs = [
        job(9, references=2),
        wearing(9, light, references=2),
        wearing(9, whole[0], references=2),
        wearing(8, whole[0], references=2),
        wearing(9, whole[1], references=2),
    ]
    gate.open()
    engine = started(max_running=5)
    alone = [Inbox(engine, one).frame().image for one in jobs]
    assert len(set(alone)) == len(jobs), "each has its own look"
    before = len(gate.turns)
    images = [inbox.frame().image for inbox in [Inbox(engine, one) for one in jobs]]
    assert max(len(turn) for turn in gate.turns[before:]) == 2, "those of one network, and no others"
    assert [_differs(a, b) for a, b in zip(alone, images, strict=True)] == [False] * len(jobs)
    assert sorted(files.asked) == sorted([*whole, light]), "each file was read once"


def test_recorded_forwards_draw_everybody_as_others_do(
    tiny_model: FrameModel, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, light, other = files.keep(a_whole_unet(tiny_model, 1)), *(files.keep(weights(tiny_model, n)) for n in (3, 4))
    jobs = [
        job(9, references=2),
        wearing(9, light, references=2),
        wearing(9, whole, references=2),
        wearing(7, light, other, references=1),
        job(8),
    ]
    later = [wearing(9, other, references=2, scale=0.5), job(9, references=2), wearing(9, light, references=2)]
    alone = [job(8), wearing(8, whole)]  # nothing tells their forwards apart but whose network they are
    # As on a GPU: no merged weights, which are drawn with as they are.
    monkeypatch.setattr(engine_module, "AdapterSlots", functools.partial(AdapterSlots, merged_bytes=0))

    def drawn(graphs: Graphs | None) -> list[bytes]:
        model = replace(tiny_model, graphs=graphs)
        with running(model, EngineSettings(max_running=5), fetch=files.fetch) as engine:
            images = [inbox.frame().image for inbox in [Inbox(engine, one) for one in jobs]]
            assert engine.unload(light)
            images += [inbox.frame().image for inbox in [Inbox(engine, one) for one in later]]
            return images + [Inbox(engine, one).frame().image for one in alone]

    graphs = Graphs(Tape())
    plain, recorded = drawn(None), drawn(graphs)
    assert graphs.replayed_count
    assert not graphs.is_broken
    assert [_differs(a, b) for a, b in zip(plain, recorded, strict=True)] == [False] * len(plain)
    assert not _differs(recorded[1], recorded[-3]), "the same character, loaded again"


def test_a_whole_unet_counts_fully_and_beside_nobody_elses(
    tiny_model: FrameModel, files: Files, started: Callable[..., FrameEngine]
) -> None:
    whole, light = files.keep(a_whole_unet(tiny_model, 1)), files.keep(weights(tiny_model, 3))
    engine = started(max_running=2)
    for refused in (wearing(1, whole, scale=0.5), wearing(1, whole, light), wearing(1, light, whole)):
        with pytest.raises(CharacterWeightsUnusable, match="counts fully") as error:
            engine.submit(refused, lambda _: None)
        assert error.value.metadata["cause"] == "NOT_COMBINABLE"
    assert not engine.tickets


def a_word(model: FrameModel, word: str, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save({f"words.{word}": 3.0 * torch.randn(2, model.text.width, generator=generator)})


def test_a_learned_word_stands_for_its_character_and_only_where_it_is_said(
    tiny_model: FrameModel, files: Files, started: Callable[..., FrameEngine]
) -> None:
    zoe, other = (files.keep(a_word(tiny_model, "Zoe", seed)) for seed in (1, 2))
    with_layers = files.keep(weights(tiny_model, 3))
    engine = started(max_running=4)

    def picture(description: str, *digests: str) -> str:
        return Inbox(engine, wearing(4, *digests, description=description)).frame().sha256

    said = "A dog and Zoe run."
    looks = [picture(said), picture(said, zoe), picture(said, other), picture(said, zoe, with_layers)]
    assert len(set(looks)) == 4
    assert picture("A dog and Zoey run.", zoe) == picture("A dog and Zoey run.")
    with pytest.raises(CharacterWeightsUnusable, match="two characters of the frame taught the word 'Zoe'"):
        engine.submit(wearing(1, zoe, other, description=said), lambda _: None)


def test_a_whole_unet_may_bring_company_that_only_taught_a_word(
    tiny_model: FrameModel, files: Files, started: Callable[..., FrameEngine]
) -> None:
    whole, zoe = files.keep(a_whole_unet(tiny_model, 1)), files.keep(a_word(tiny_model, "Zoe", 1))
    engine = started(max_running=1)
    jobs = [wearing(4, *digests, description="Zoe runs.") for digests in ((whole,), (whole, zoe))]
    assert len({Inbox(engine, one).frame().sha256 for one in jobs}) == 2


@pytest.fixture
def drafting(tiny_model: FrameModel) -> FrameModel:
    """A pack with an adapter for drafts."""
    own = read_adapter(weights(tiny_model, 5), tiny_model.denoiser.unet, base_digest=tiny_model.base_digest)
    draft = QualitySettings(steps=2, text_guidance=1.0, image_guidance=1.0, adapter="draft/adapter.safetensors")
    sampling = tiny_model.manifest.sampling.model_copy(update={"qualities": {"draft": draft}})
    manifest = tiny_model.manifest.model_copy(update={"sampling": sampling})
    return replace(tiny_model, manifest=manifest, adapters={draft.adapter: own})


def test_a_draft_takes_the_packs_steps_and_wears_its_adapter(drafting: FrameModel, files: Files) -> None:
    character, whole = files.keep(weights(drafting, 6)), files.keep(a_whole_unet(drafting, 1))
    engine = FrameEngine({"tiny": drafting}, "tiny", EngineSettings(max_running=2), fetch=files.fetch)
    engine.start()
    try:
        draft = Inbox(engine, job(1, quality=Quality.DRAFT)).frame()
        own = drafting.adapters["draft/adapter.safetensors"].digest
        assert (draft.sketch.steps, draft.sketch.text_guidance) == (2, 1.0)
        assert [one.digest for one in draft.sketch.characters] == [own]
        plain = Inbox(engine, job(1, steps=2, text_guidance=1.0, image_guidance=1.0)).frame()
        assert draft.sha256 != plain.sha256
        same = Inbox(
            engine, wearing(1, files.keep(weights(drafting, 5)), steps=2, text_guidance=1.0, image_guidance=1.0)
        )
        assert draft.sha256 == same.frame().sha256
        both = Inbox(engine, wearing(1, character, quality=Quality.DRAFT)).frame().sketch
        assert [one.digest for one in both.characters] == [character, own]
        mine = Inbox(engine, job(1, quality=Quality.DRAFT, steps=3, text_guidance=2.0)).frame().sketch
        assert (mine.steps, mine.text_guidance) == (3, 2.0)
        alone = Inbox(engine, wearing(1, whole, quality=Quality.DRAFT)).frame().sketch
        assert (alone.steps, alone.text_guidance) == (2, drafting.manifest.sampling.default_text_guidance)
        assert [one.digest for one in alone.characters] == [whole], "the adapter is of another UNet"
        assert Inbox(engine, job(1, quality=Quality.BEST)).frame().sketch.steps == 8
    finally:
        engine.stop()


def test_a_draft_and_everybodys_characters_find_room(drafting: FrameModel, files: Files) -> None:
    digests = [files.keep(weights(drafting, seed)) for seed in range(10, 14)]
    engine = FrameEngine({"tiny": drafting}, "tiny", EngineSettings(max_running=2), fetch=files.fetch)
    engine.start()
    try:
        jobs = [wearing(1, *digests[:2], quality=Quality.DRAFT), wearing(1, *digests[2:], quality=Quality.DRAFT)]
        for inbox in [Inbox(engine, one) for one in jobs]:
            assert inbox.frame().sketch.steps == 2
    finally:
        engine.stop()


def test_only_so_many_foreign_unets_are_in_memory_for_jobs(
    tiny_model: FrameModel,
    files: Files,
    started: Callable[..., FrameEngine],
    gate: Gate,  # noqa: F811
) -> None:
    digests = [files.keep(a_whole_unet(tiny_model, seed)) for seed in range(3)]
    engine = started(max_running=1, networks_max=2)
    held = [Inbox(engine, wearing(seed, digest)) for seed, digest in enumerate(digests[:2])]
    with pytest.raises(QueueFull):
        engine.submit(wearing(3, digests[2]), lambda _: None)
    held.append(Inbox(engine, wearing(4, digests[0])))  # one that is there anyway
    gate.open()
    for inbox in held:
        assert inbox.frame().image
    assert Inbox(engine, wearing(3, digests[2])).frame().image


async def test_a_store_that_does_not_answer_holds_up_nobody_else(tiny_model: FrameModel, files: Files) -> None:
    """However many wait for weights, those without any, or whose weights are here, are drawn."""
    release, here, cold = threading.Event(), files.keep(weights(tiny_model, 1)), files.keep(weights(tiny_model, 2))

    def fetch(digest: str) -> bytes:
        if digest == cold:
            assert release.wait(WAIT_S)
        return files.fetch(digest)

    async def drawn(one: FrameJob) -> RenderedFrame:
        (frame,) = [event async for event in engine.render(one) if isinstance(event, RenderedFrame)]
        return frame

    engine = FrameEngine({"tiny": tiny_model}, "tiny", EngineSettings(max_running=2, max_queued=8), fetch=fetch)
    engine.start()
    try:
        await drawn(wearing(1, here))
        waiting = [asyncio.create_task(drawn(wearing(seed, cold))) for seed in range(9)]
        await asyncio.sleep(0)
        for one in (job(1), wearing(3, here)):
            assert (await asyncio.wait_for(drawn(one), WAIT_S)).image
        waiting.append(asyncio.create_task(drawn(wearing(9, cold))))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):  # those who wait for the store count
            await drawn(job(2))
        release.set()
        for frame in await asyncio.gather(*waiting):
            assert frame.image
        assert files.asked.count(cold) == 1
        assert engine._arriving == 0
    finally:
        release.set()
        engine.stop()


async def test_a_job_that_is_refused_gives_its_networks_place_back(tiny_model: FrameModel, files: Files) -> None:
    one, other = (files.keep(a_whole_unet(tiny_model, seed)) for seed in (1, 2))
    engine = FrameEngine({"tiny": tiny_model}, "tiny", EngineSettings(networks_max=1), fetch=files.fetch)
    engine.start()
    try:
        for digest in (one, other, one):
            with pytest.raises(ValueOutOfRange):
                engine.submit(wearing(1, digest, steps=100_000), lambda _: None)
            assert Inbox(engine, wearing(1, digest)).frame().image
    finally:
        engine.stop()


def test_networks_that_are_drawn_are_not_read_again(
    tiny_model: FrameModel,
    files: Files,
    started: Callable[..., FrameEngine],
    gate: Gate,  # noqa: F811
) -> None:
    """Each is larger than what is kept, and both are asked for in turn."""
    digests = [files.keep(a_whole_unet(tiny_model, seed)) for seed in range(2)]
    engine = started(max_running=1, networks_max=2, adapters_bytes=1000)
    held = [Inbox(engine, wearing(seed, digests[seed % 2])) for seed in range(6)]
    assert len({id(inbox.ticket.model.denoiser.unet) for inbox in held}) == 2
    gate.open()
    for inbox in held:
        assert inbox.frame().image
    assert len(files.asked) == 2


def test_the_best_quality_takes_no_more_steps_than_the_service_draws(tiny_model: FrameModel) -> None:
    sampling = tiny_model.manifest.sampling.model_copy(update={"default_steps": 120})
    slow = replace(tiny_model, manifest=tiny_model.manifest.model_copy(update={"sampling": sampling}))
    assert sketch_of(job(1, quality=Quality.BEST, steps=0), slow).steps == MAX_STEPS


def test_in_bfloat16_characters_share_forwards_as_well(tmp_path: Path, files: Files) -> None:
    """A GPU's arithmetic: what each draws alone and among others differs by its rounding, and by nobody's weights."""
    half = load_frame_model(build_tiny_pack(tmp_path / "tiny", captions=False), dtype=torch.bfloat16)
    digests = [files.keep(weights(half, seed, size=0.2)) for seed in range(3)]
    jobs = [job(9, references=2, steps=4), *(wearing(9, d, references=1, steps=4) for d in digests)]
    engine = FrameEngine({"tiny": half}, "tiny", EngineSettings(max_running=4), fetch=files.fetch)
    engine.start()
    try:
        alone = [pixels_of(Inbox(engine, one).frame()) for one in jobs]
        together = [pixels_of(inbox.frame()) for inbox in [Inbox(engine, one) for one in jobs]]
    finally:
        engine.stop()
    apart = [[float(np.abs(a - b).mean()) for b in together] for a in alone]
    for number, row in enumerate(apart):
        others = [value for place, value in enumerate(row) if place != number]
        assert row[number] <= 2.0, "levels of 255, as a mean"
        assert row[number] < 0.25 * min(others), "each is itself"


def pixels_of(frame: RenderedFrame) -> npt.NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(frame.image))).astype(np.int64)
