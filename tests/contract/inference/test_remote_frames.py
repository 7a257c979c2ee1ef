"""The frame service over a server of the Open Inference Protocol, with the stock tritonclient between them.

One installation's frame service passes the frames of a pack on to another one's inference edge, as to a Triton.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from fabula.frame.v1 import frame_service_pb2 as pb
from fabula.frame.v1 import frame_service_pb2_grpc as pb_grpc
from PIL import Image

from services.frame.config import FrameSettings
from services.frame.engine import EngineSettings, FrameEngine
from services.frame.loading import load_engine, load_remotes
from services.frame.remote import RemoteFrames
from services.frame.server import start_server
from services.frame.service import FrameServicer
from services.models.errors import PackManifestInvalid, PackSourceInvalid, PackUnsupported
from services.models.library import Library
from services.models.pack import Endpoint, read_manifest
from services.models.published import Told
from services.models.registry import FrameModel
from services.models.remote import EndpointSource, plan_remote
from services.runtime.channel import ServiceChannel
from services.runtime.config import Installation
from services.runtime.errors import (
    CharacterWeightsUnknown,
    DeadlineExceeded,
    DescriptionTooLong,
    FabulaError,
    ImageUnreadable,
    PackUnknown,
    QueueFull,
    RenderFailed,
    Unavailable,
    ValueOutOfRange,
)
from tests.contract.inference.edge import WAIT_S, Edge
from tests.contract.inference.requests import file, noise

TOKEN = "fedcba9876543210" * 4  # another installation's than the edge's
PATIENCE_S = 6.0  # of calls that nobody answers: long enough to reach the far service on a busy machine


def add_pack(folder: Path, target: str, model: str = "frame/tiny", name: str = "far", **told: Any) -> None:
    source = EndpointSource(f"triton://{target}/{model}")
    plan = plan_remote(source, Told(**{"licence": "LicenseRef-test", "name": name, **told}))
    Library(folder, (folder,)).add(plan, source)


class Service:
    """A frame service with a pack of its own, which nobody draws with here, and one on a server."""

    def __init__(self, channel: ServiceChannel) -> None:
        self.channel = channel
        self.stub: Any = pb_grpc.FrameServiceStub(channel.grpc_channel)

    async def messages(self, timeout_s: float = WAIT_S, **fields: Any) -> list[Any]:
        request = pb.RenderFrameRequest(**{"pack": "far", "description": "a fox", "seed": 5, "steps": 3, **fields})
        return [m async for m in self.channel.stream(self.stub.RenderFrame, request, timeout_s=timeout_s)]

    async def frame(self, **fields: Any) -> Any:
        return (await self.messages(**fields))[-1].frame


@pytest.fixture
def remote_edge(new_edge: Callable[..., Edge]) -> Edge:
    return new_edge(max_running=1, max_queued=1)


@pytest_asyncio.fixture
async def service(remote_edge: Edge, model: FrameModel, tmp_path: Path) -> AsyncIterator[Service]:
    add_pack(tmp_path / "packs", remote_edge.target)
    installation = Installation.load(home=tmp_path / "home", packs=str(tmp_path / "packs"))
    remotes = load_remotes(FrameSettings.load(packs="far"), installation)
    own = FrameEngine({"own": model}, "own", EngineSettings())
    own.start()
    server, port = await start_server(FrameServicer(own, TOKEN, remotes), "127.0.0.1:0")
    channel = ServiceChannel(f"127.0.0.1:{port}", application="frame", token=TOKEN)
    yield Service(channel)
    await channel.close()
    await server.stop(None)
    await asyncio.to_thread(own.stop)
    for remote in remotes.values():
        await remote.close()


def far_frame(edge: Edge, **fields: Any) -> bytes:
    """What the far installation's own frame service draws."""

    async def draw() -> bytes:
        stub: Any = pb_grpc.FrameServiceStub(edge.channels[1].grpc_channel)
        request = pb.RenderFrameRequest(**{"pack": "tiny", "description": "a fox", "seed": 5, "steps": 3, **fields})
        last: Any = None
        async for message in edge.channels[1].stream(stub.RenderFrame, request, timeout_s=WAIT_S):
            last = message
        return bytes(last.frame.image)

    return edge.run(draw)


async def test_the_picture_is_the_servers_to_the_byte(service: Service, remote_edge: Edge) -> None:
    frame = await service.frame()
    assert frame.image == await asyncio.to_thread(far_frame, remote_edge)
    assert frame.sha256 == hashlib.sha256(frame.image).hexdigest()
    assert (frame.width_px, frame.height_px, frame.seed, frame.steps) == (64, 64, 5, 3)
    assert frame.fingerprint
    assert frame.render_s > 0


async def test_everything_that_is_asked_for_arrives(service: Service, remote_edge: Edge) -> None:
    digest = remote_edge.files.keep_character(remote_edge.model, seed=1)
    frame = await service.frame(
        seed=2**53 - 1,
        width_px=96,
        height_px=64,
        steps=4,
        text_guidance=3.0,
        image_guidance=0.0,
        sampler="euler",
        references=[pb.Reference(image=file(noise(1)[0]), description="a lamp")],
        characters=[pb.CharacterWeights(digest=digest, scale=0.5)],
    )
    asked = remote_edge.steps.jobs[2**53 - 1]
    assert (asked.width_px, asked.height_px, asked.steps, asked.sampler) == (96, 64, 4, "euler")
    assert (asked.text_guidance, asked.image_guidance) == (3.0, 0.0)
    assert [each.description for each in asked.references] == ["a lamp"]
    assert [(each.digest, each.scale) for each in asked.characters] == [(digest, 0.5)]
    assert Image.open(io.BytesIO(frame.image)).size == (96, 64)
    assert (frame.steps, frame.sampler, frame.text_guidance, frame.image_guidance) == (4, "euler", 3.0, 0.0)


@pytest.mark.parametrize("preview_every", [0, 1])
@pytest.mark.parametrize("strength", [0.25, None])
async def test_a_frame_is_made_of_a_picture_there(
    service: Service, remote_edge: Edge, strength: float | None, preview_every: int
) -> None:
    edit = pb.EditedImage(image=file(noise(3)[0]), strength=strength)
    frame = await service.frame(steps=4, edit=edit, preview_every_steps=preview_every)
    asked = remote_edge.steps.jobs[5]
    assert asked.edit is not None
    assert np.array_equal(asked.edit.pixels, noise(3)[0])
    assert asked.edit.strength == frame.edit_strength == (strength or 0.5)
    assert asked.steps_taken == (1 if strength else 2)
    assert frame.image == await asyncio.to_thread(far_frame, remote_edge, steps=4, edit=edit)
    assert frame.image != (await service.frame(steps=4)).image


async def test_references_are_as_far_away_there_as_they_are_said_to_be(service: Service, remote_edge: Edge) -> None:
    def references(*distances: int) -> list[Any]:
        return [
            pb.Reference(image=file(noise(number)[0]), description=f"{number}", distance=distance)
            for number, distance in enumerate(distances)
        ]

    pictures = []
    for distances in ((0, 0), (1, 1), (3, 0)):
        frame = await service.frame(references=references(*distances))
        assert tuple(seen.distance for seen in remote_edge.steps.jobs[5].references) == distances
        assert frame.image == await asyncio.to_thread(far_frame, remote_edge, references=references(*distances))
        pictures.append(frame.image)
    assert len(set(pictures)) == 3


class OfAStranger:
    """A server whose model draws, and knows neither edits nor distances."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], dict[str, Any]]] = []

    async def check(self, *, inputs: Any, outputs: Any, limit_s: float) -> frozenset[str]:
        return frozenset({"PROMPT", "REFERENCE_IMAGES", "REFERENCE_DESCRIPTIONS"})

    async def facts(self, limit_s: float) -> dict[str, str]:
        return {"max_references": "3"}

    async def infer(self, tensors: Any, outputs: Any, parameters: Any, **told: Any) -> Any:
        self.asked.append(([tensor.name() for tensor in tensors], parameters))
        picture = np.array([file(noise(1)[0])], dtype=np.object_)
        return SimpleNamespace(as_numpy=lambda name: picture, get_response=lambda: SimpleNamespace(parameters={}))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"edit": pb.EditedImage(image=b"x")}, "edit"),
        ({"references": [pb.Reference(image=b"x"), pb.Reference(image=b"x", distance=1)]}, "references[1].distance"),
    ],
)
async def test_a_stranger_is_asked_for_nothing_that_its_model_has_no_input_for(
    fields: dict[str, Any], field: str
) -> None:
    remote = RemoteFrames("far", "d", "remote-frames", Endpoint(address="127.0.0.1:9", model="pictures"))
    stranger: Any = OfAStranger()
    remote._server = stranger
    pack = await remote.pack()
    assert pack is not None
    assert list(pack.features) == [pb.FEATURE_REFERENCES]
    with pytest.raises(ValueOutOfRange, match="the server's model pictures has no") as raised:
        [message async for message in remote.render(pb.RenderFrameRequest(description="a fox", **fields))]
    assert raised.value.field_violations[0].field == field
    assert not stranger.asked
    plain = pb.RenderFrameRequest(description="a fox", references=[pb.Reference(image=b"x", description="y")])
    messages = [message async for message in remote.render(plain)]
    assert messages[-1].frame.image
    assert stranger.asked == [(["PROMPT", "REFERENCE_IMAGES", "REFERENCE_DESCRIPTIONS"], {"seed": 0})]


async def test_a_server_that_is_away_is_not_asked_what_it_takes_for_ever() -> None:
    remote = RemoteFrames("far", "d", "remote-frames", Endpoint(address="127.0.0.1:9", model="frame/tiny"))
    request = pb.RenderFrameRequest(description="a fox", edit=pb.EditedImage(image=b"x"))
    with pytest.raises(Unavailable):
        [message async for message in remote.render(request)]
    await remote.close()


async def test_qualities_are_the_servers(service: Service) -> None:
    steps = [
        (await service.frame(steps=0, quality=quality)).steps for quality in (pb.QUALITY_DRAFT, 0, pb.QUALITY_BEST)
    ]
    assert steps == [2, 4, 8]


async def test_one_seed_is_one_picture_and_any_seed_is_welcome(service: Service) -> None:
    pictures = [(await service.frame(seed=seed)).image for seed in (5, 5, 6, 2**64 - 1, 2**64 - 1)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert pictures[3] == pictures[4] not in pictures[:3]


async def test_previews_come_before_the_picture(service: Service) -> None:
    messages = await service.messages(steps=6, preview_every_steps=2)
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds == ["queued", "preview", "preview", "frame"]
    assert [message.preview.step for message in messages[1:3]] == [2, 4]
    assert Image.open(io.BytesIO(messages[1].preview.image)).format == "WEBP"
    assert messages[-1].frame.image == (await service.frame(steps=6)).image


async def test_the_pack_is_listed_as_its_server_tells_it(service: Service, remote_edge: Edge) -> None:
    listed = await service.channel.call(service.stub.ListPacks, pb.ListPacksRequest(), timeout_s=WAIT_S)
    own, far = listed.packs
    assert (own.name, far.name, far.architecture) == ("own", "far", "remote-frames")
    for name in ("width_px", "height_px", "default_steps", "max_references", "max_steps", "max_area_px", "min_side_px"):
        assert getattr(far, name) == getattr(own, name)
    assert (far.default_text_guidance, far.default_image_guidance) == (2.0, 1.5)
    assert set(far.features) == set(own.features)
    assert far.digest not in ("", own.digest)


async def test_a_server_that_is_away_is_unavailable_and_its_pack_is_not_listed(
    service: Service, remote_edge: Edge
) -> None:
    remote_edge.run(lambda: remote_edge.grpc.stop(0))
    with pytest.raises(Unavailable):
        await service.frame()
    listed = await service.channel.call(service.stub.ListPacks, pb.ListPacksRequest(), timeout_s=WAIT_S)
    assert [pack.name for pack in listed.packs] == ["own"]


@pytest.mark.parametrize("preview_every", [0, 1])
@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"description": "x" * 5000}, DescriptionTooLong, "description"),
        ({"references": [pb.Reference(image=b"x")]}, ImageUnreadable, "references[0].image"),
        ({"width_px": 7}, ValueOutOfRange, "width_px"),
        ({"edit": pb.EditedImage(image=b"x")}, ImageUnreadable, "edit.image"),
        ({"edit": pb.EditedImage(image=file(noise(1)[0]), strength=1.5)}, ValueOutOfRange, "edit.strength"),
        (
            {"references": [pb.Reference(image=file(noise(1)[0]), distance=4)]},
            ValueOutOfRange,
            "references[0].distance",
        ),
        ({"references": [pb.Reference(image=b"x", distance=256)]}, ValueOutOfRange, "references[0].distance"),
    ],
)
async def test_bad_input_is_refused_in_our_own_words(
    service: Service, fields: dict[str, Any], error: type[FabulaError], field: str, preview_every: int
) -> None:
    with pytest.raises(error) as raised:
        await service.frame(preview_every_steps=preview_every, **fields)
    # On a stream a refusal is a line, and says its field only where it begins with it.
    if not (preview_every and field == "width_px"):
        assert raised.value.field_violations[0].field == field


async def test_weights_that_the_server_does_not_have_are_named(service: Service) -> None:
    with pytest.raises(CharacterWeightsUnknown):
        await service.frame(characters=[pb.CharacterWeights(digest="ab" * 32)])


async def test_a_pack_that_is_nowhere_is_the_engines_to_refuse(service: Service) -> None:
    with pytest.raises(PackUnknown):
        await service.frame(pack="nowhere")


@pytest.mark.parametrize("preview_every", [0, 1])
async def test_a_cancelled_call_ends_the_servers_work(service: Service, remote_edge: Edge, preview_every: int) -> None:
    remote_edge.steps.hold_after = 0
    call = asyncio.create_task(service.frame(steps=40, preview_every_steps=preview_every))
    assert await asyncio.to_thread(remote_edge.steps.held.wait, WAIT_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    remote_edge.steps.release()
    while remote_edge.engine.tickets:  # noqa: ASYNC110 - the engine's thread tells nobody
        await asyncio.sleep(0.01)
    assert remote_edge.steps.count[5] < 40


async def test_a_deadline_is_the_servers_too(service: Service, remote_edge: Edge) -> None:
    remote_edge.steps.hold_after = 0
    with pytest.raises(DeadlineExceeded):
        await service.frame(timeout_s=PATIENCE_S)
    remote_edge.steps.release()


async def test_a_full_server_says_so_with_its_advice(service: Service, remote_edge: Edge) -> None:
    remote_edge.steps.hold_after = 0
    calls = [asyncio.create_task(service.frame(seed=seed)) for seed in (1, 2)]
    assert await asyncio.to_thread(remote_edge.steps.held.wait, WAIT_S)
    while len(remote_edge.engine.tickets) < 2:  # noqa: ASYNC110 - the second may still be on its way
        await asyncio.sleep(0.01)
    with pytest.raises(QueueFull) as raised:
        await service.frame(seed=3)
    assert raised.value.retry_after_s is not None
    remote_edge.steps.release()
    assert all([(await call).image for call in calls])


@pytest.mark.parametrize("image", [None, b"", b"no picture", file(noise(1)[0], "JPEG"), file(noise(1)[0])[:200]])
async def test_an_answer_that_is_no_picture_is_none(image: bytes | None) -> None:
    remote = RemoteFrames("far", "d", "remote-frames", Endpoint(address="127.0.0.1:9", model="frame/tiny"))

    async def infer(*_: Any, **__: Any) -> Any:
        values = None if image is None else np.array([image], dtype=np.object_)
        return SimpleNamespace(as_numpy=lambda name: values, get_response=lambda: SimpleNamespace(parameters={}))

    remote._server.infer = infer  # type: ignore[method-assign]
    with pytest.raises(RenderFailed):
        [message async for message in remote.render(pb.RenderFrameRequest(description="a fox"))]


def test_a_pack_of_a_server_is_not_drawn_with_here(tmp_path: Path) -> None:
    packs = tmp_path / "packs"
    add_pack(packs, "frames.example:8001")
    add_pack(packs, "frames.example:8001", model="stories", name="words")
    add_pack(packs, "frames.example:8001", model="pictures", name="told", family="remote-frames")
    with pytest.raises(PackManifestInvalid, match="it has no weights here"):
        read_manifest(packs / "far")
    installation = Installation.load(home=tmp_path / "home", packs=str(packs))
    with pytest.raises(PackUnsupported, match="on servers only"):
        load_engine(FrameSettings.load(packs="far"), installation)
    with pytest.raises(PackUnsupported, match="'words' is a remote-captioner: it does not draw"):
        load_remotes(FrameSettings.load(packs="far,words"), installation)
    assert list(load_remotes(FrameSettings.load(packs="far,told"), installation)) == ["far", "told"]
    with pytest.raises(PackSourceInvalid, match="no family 'sdxl'"):
        plan_remote(EndpointSource("triton://h:1/m"), Told(licence="MIT", family="sdxl"))
