"""What an installation can do, put together from what its two services say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fabula.frame.v1 import frame_service_pb2 as frame_pb

from services.runtime.errors import DeadlineExceeded, FabulaError, ReplicaLost, Unavailable
from services.story.api import StoryApi
from services.story.backends import Drawing, FrameBackend, LoadedPack
from services.story.config import StorySettings
from services.story.events import Broadcaster
from services.story.intake import MOST_STEPS, PACK_CHECK_TIMEOUT_S

WAIT_S = 30.0


def drawing(**changes: Any) -> Drawing:
    known: dict[str, Any] = {
        "width_px": 64,
        "height_px": 64,
        "min_side_px": 32,
        "side_multiple_px": 8,
        "max_area_px": 16384,
        "default_steps": 4,
        "max_steps": 50,
        "default_text_guidance": 2.0,
        "default_image_guidance": 1.5,
        "max_references": 3,
        "features": (),
        "samplers": ("ddim",),
        "qualities": (),
    }
    return Drawing(**{**known, **changes})


def drawer(name: str, **changes: Any) -> LoadedPack:
    return LoadedPack(name=name, digest=f"{name}-drawn", architecture="storygen", drawing=drawing(**changes))


def writer(name: str) -> LoadedPack:
    return LoadedPack(name=name, digest=f"{name}-written", architecture="llava")


class Service:
    """Answers with packs or with an error, once everybody it waits for was asked too."""

    def __init__(self, *packs: LoadedPack, error: FabulaError | None = None) -> None:
        self.packs = packs
        self.error = error
        self.entered = asyncio.Event()
        self.waits_for: Service | None = None
        self.timeouts_s: list[float] = []

    async def loaded(self, *, timeout_s: float) -> tuple[LoadedPack, ...]:
        self.timeouts_s.append(timeout_s)
        self.entered.set()
        if self.waits_for is not None:
            await asyncio.wait_for(self.waits_for.entered.wait(), WAIT_S)
        if self.error is not None:
            raise self.error
        return self.packs


def api(caption: Service, frame: Service, default_pack: str = "toon") -> StoryApi:
    untouched: Any = None  # to use one is an AttributeError
    return StoryApi(
        repository=untouched,
        store=untouched,
        workflows=untouched,
        broadcaster=Broadcaster(),
        sandbox=untouched,
        packs=untouched,
        characters=untouched,
        caption=caption,  # type: ignore[arg-type]
        frame=frame,  # type: ignore[arg-type]
        settings=StorySettings(default_pack=default_pack),
    )


async def test_both_services_are_asked_at_the_same_time_and_not_for_long() -> None:
    caption, frame = Service(writer("toon")), Service(drawer("toon"))
    caption.waits_for, frame.waits_for = frame, caption  # one after the other would wait for ever
    found = await api(caption, frame).backends()
    assert [backend.tells_stories for backend in found.backends] == [True]
    assert caption.timeouts_s == frame.timeouts_s == [PACK_CHECK_TIMEOUT_S]


async def test_the_default_is_the_pack_of_a_story_that_names_none() -> None:
    names = ("ink", "chalk", "toon")
    caption, frame = Service(*map(writer, names)), Service(*map(drawer, names))
    found = await api(caption, frame, default_pack="ink").backends()
    assert [(backend.pack, backend.is_default) for backend in found.backends] == [
        ("ink", True),
        ("chalk", False),
        ("toon", False),
    ]
    found = await api(caption, frame, default_pack="elsewhere").backends()
    assert not any(backend.is_default for backend in found.backends)


@pytest.mark.parametrize("steps", [20, MOST_STEPS, 200])
async def test_no_more_steps_are_told_than_a_story_may_ask_for(steps: int) -> None:
    found = await api(Service(), Service(drawer("toon", max_steps=steps))).backends()
    (backend,) = found.backends
    assert backend.drawing is not None
    assert backend.drawing.max_steps == min(steps, MOST_STEPS)


@pytest.mark.parametrize("error", [Unavailable(), ReplicaLost(), DeadlineExceeded()])
async def test_whatever_keeps_a_service_from_answering_it_is_named(error: FabulaError) -> None:
    found = await api(Service(error=error), Service(drawer("toon"))).backends()
    assert (found.unavailable_services, [each.writes for each in found.backends]) == (("caption",), [False])
    found = await api(Service(writer("toon")), Service(error=error)).backends()
    assert (found.unavailable_services, [each.drawing for each in found.backends]) == (("frame",), [None])
    with pytest.raises(Unavailable) as caught:
        await api(Service(error=error), Service(error=error)).backends()
    assert caught.value.metadata["services"] == "caption,frame"


async def test_services_without_packs_have_answered() -> None:
    found = await api(Service(), Service()).backends()
    assert (found.backends, found.unavailable_services) == ((), ())


class Channel:
    """Answers ListPacks with what it was given."""

    grpc_channel: Any

    def __init__(self, *packs: frame_pb.Pack) -> None:
        self.grpc_channel = self
        self.packs = packs

    def unary_unary(self, *_: Any, **__: Any) -> None: ...
    def unary_stream(self, *_: Any, **__: Any) -> None: ...

    async def call(self, method: Any, request: Any, *, timeout_s: float) -> frame_pb.ListPacksResponse:
        return frame_pb.ListPacksResponse(packs=self.packs)


async def test_what_a_newer_frame_service_tells_besides_is_left_out() -> None:
    pack = frame_pb.Pack(
        name="toon",
        features=[frame_pb.FEATURE_REFERENCES, 99, frame_pb.FEATURE_UNSPECIFIED],
        qualities=[frame_pb.QualitySettings(quality=number, steps=1) for number in (99, frame_pb.QUALITY_BEST)],
    )
    backend = FrameBackend(Channel(pack), timeout_s=1, preview_every_steps=0)  # type: ignore[arg-type]
    (loaded,) = await backend.loaded(timeout_s=1)
    assert loaded.drawing is not None
    assert loaded.drawing.features == ("references",)
    assert [each.quality for each in loaded.drawing.qualities] == ["best"]


async def test_every_feature_and_quality_of_the_frame_service_is_known_here() -> None:
    features = [number for number in frame_pb.Feature.values() if number]
    qualities = [number for number in frame_pb.Quality.values() if number]
    pack = frame_pb.Pack(
        name="toon",
        features=features,
        qualities=[frame_pb.QualitySettings(quality=number, steps=1) for number in qualities],
    )
    backend = FrameBackend(Channel(pack), timeout_s=1, preview_every_steps=0)  # type: ignore[arg-type]
    (loaded,) = await backend.loaded(timeout_s=1)
    assert loaded.drawing is not None
    words = [frame_pb.Feature.Name(number).removeprefix("FEATURE_").lower() for number in features]
    assert list(loaded.drawing.features) == words
    assert len(loaded.drawing.qualities) == len(qualities)
