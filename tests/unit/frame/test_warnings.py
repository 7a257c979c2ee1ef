"""A given picture that is far from what the pack draws is told of, once measured, and never at the frame's expense."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import pytest

from services.frame import engine as engine_module
from services.frame.engine import FrameEngine
from services.frame.job import Event, FrameJob, ReferenceImage, RenderedFrame
from services.models.drawing import Pixels
from services.models.registry import FrameModel
from services.models.vae import Codec
from services.models.world import World
from services.runtime.errors import FabulaError

from .conftest import picture

WAIT_S = 30.0
WORLD = World(characters={"Pip": "an orange cat"}, places=("the beach",), familiar_gain_db=2.0)


class Measure:
    """Stands for the autoencoder's gain: what it was asked, and what it says."""

    def __init__(self) -> None:
        self.gain_db = 0.5
        self.error: Exception | None = None
        self.asked: list[bytes] = []

    def __call__(self, codec: Codec, pixels: Pixels) -> float:
        self.asked.append(pixels.tobytes())
        if self.error is not None:
            raise self.error
        return self.gain_db


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    stand_in = Measure()
    monkeypatch.setattr(engine_module, "gain_over_shrinking_db", stand_in)
    return stand_in


@pytest.fixture
def draw(tiny_model: FrameModel) -> Iterator[Callable[..., RenderedFrame]]:
    engines: list[FrameEngine] = []

    def draw(*given: bool, world: World | None = WORLD, first_picture: int = 0, seed: int = 1) -> RenderedFrame:
        """One frame with a reference for every argument; all calls with WORLD share an engine."""
        if not engines or world is not WORLD:
            engines.append(FrameEngine({"tiny": tiny_model}, "tiny", worlds={"tiny": world} if world else None))
            engines[-1].start()
        references = tuple(
            ReferenceImage(image=picture(first_picture + index), description="", given=each)
            for index, each in enumerate(given)
        )
        last: queue.Queue[Event | FabulaError] = queue.Queue()
        engines[-1].submit(FrameJob(description="a fox", seed=seed, references=references, steps=1), last.put)
        while not isinstance(event := last.get(timeout=WAIT_S), RenderedFrame):
            assert not isinstance(event, FabulaError), event
        return event

    yield draw
    for engine in engines:
        engine.stop()


def test_a_strange_given_picture_is_told_of(measure: Measure, draw: Callable[..., RenderedFrame]) -> None:
    (told,) = draw(True, False, False).warnings
    assert (told.reason, told.field) == ("PICTURE_UNFAMILIAR", "references[0].image")
    assert told.metadata == {"gain_db": "0.5", "familiar_gain_db": "2.0"}


def test_a_familiar_one_is_not(measure: Measure, draw: Callable[..., RenderedFrame]) -> None:
    measure.gain_db = 3.0
    assert draw(True).warnings == ()
    assert len(measure.asked) == 1


def test_frames_of_our_own_are_not_measured(measure: Measure, draw: Callable[..., RenderedFrame]) -> None:
    assert draw(False, False).warnings == ()
    assert draw().warnings == ()
    assert measure.asked == []


def test_only_the_first_given_picture_is_measured_and_only_once(
    measure: Measure, draw: Callable[..., RenderedFrame]
) -> None:
    frames = [draw(False, True, True, seed=seed) for seed in range(3)]
    assert [each.field for frame in frames for each in frame.warnings] == ["references[1].image"] * 3
    assert len(measure.asked) == 1
    draw(True, first_picture=7)
    assert len(set(measure.asked)) == 2


def test_what_is_remembered_is_bounded(
    measure: Measure, draw: Callable[..., RenderedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "GAINS_REMEMBERED", 2)
    for number in (1, 2, 3, 3, 2, 1):
        draw(True, first_picture=number)
    assert len(measure.asked) == 4  # 3 and 2 were remembered, 1 had been forgotten


def test_a_measure_that_fails_costs_no_frame(measure: Measure, draw: Callable[..., RenderedFrame]) -> None:
    measure.error = RuntimeError("out of memory")
    assert draw(True).warnings == ()


@pytest.mark.parametrize("world", [None, World(words=("kite",))])
def test_a_pack_without_a_level_measures_nothing(
    measure: Measure, draw: Callable[..., RenderedFrame], world: World | None
) -> None:
    assert draw(True, world=world).warnings == ()
    assert measure.asked == []


def test_warning_or_not_the_picture_is_the_same(measure: Measure, draw: Callable[..., RenderedFrame]) -> None:
    assert draw(True).sha256 == draw(False).sha256
