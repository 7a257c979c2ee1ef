"""The caption service over a server of the Open Inference Protocol, with the stock tritonclient between them.

One installation's caption service asks another one's inference edge, as it would ask a Triton.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from fabula.caption.v1 import caption_service_pb2 as pb
from fabula.caption.v1 import caption_service_pb2_grpc as pb_grpc

from services.caption.config import CaptionSettings
from services.caption.loading import build_engine
from services.caption.remote import RemoteEngine, RemoteModel
from services.caption.server import start_server
from services.caption.service import CaptionServicer
from services.models.errors import PackManifestInvalid, PackSourceInvalid
from services.models.library import Library
from services.models.pack import Endpoint, load_any_pack, read_manifest
from services.models.published import Told
from services.models.remote import EndpointSource, plan_remote
from services.runtime.channel import ServiceChannel
from services.runtime.config import Installation
from services.runtime.errors import (
    CaptionEmpty,
    CaptionNotWritten,
    CaptionTooLong,
    DeadlineExceeded,
    FabulaError,
    ImageUnreadable,
    PackUnknown,
    QueueFull,
    ShuttingDown,
    Unavailable,
    ValueOutOfRange,
)
from tests.contract.inference.edge import WAIT_S, Edge
from tests.contract.inference.requests import file, noise

TOKEN = "fedcba9876543210" * 4  # another installation's than the edge's
PICTURE = file(noise(1)[0])
PATIENCE_S = 6.0  # of calls that nobody answers: long enough to reach the far service on a busy machine


@pytest.fixture
def remote_edge(new_edge: Callable[..., Edge]) -> Edge:
    return new_edge()


def add_pack(folder: Path, target: str, model: str = "caption/tiny", **told: Any) -> None:
    source = EndpointSource(f"triton://{target}/{model}")
    plan = plan_remote(source, Told(**{"licence": "LicenseRef-test", "name": "far", **told}))
    Library(folder, (folder,)).add(plan, source)


class Service:
    """A caption service whose pack is a server's model, and a way to call it."""

    def __init__(self, engine: RemoteEngine, channel: ServiceChannel) -> None:
        self.engine = engine
        self.channel = channel
        self.stub: Any = pb_grpc.CaptionServiceStub(channel.grpc_channel)

    async def write(self, timeout_s: float = WAIT_S, **fields: Any) -> Any:
        request = pb.WriteCaptionRequest(**{"image": PICTURE, "captions": ["Momo found a red kite."], **fields})
        return await self.channel.call(self.stub.WriteCaption, request, timeout_s=timeout_s)

    async def describe(self, **fields: Any) -> Any:
        plain = {"image": PICTURE, "previous_caption": "Momo found a kite.", "caption": "She let it fly."}
        request = pb.DescribeRequest(**{**plain, **fields})
        return await self.channel.call(self.stub.Describe, request, timeout_s=WAIT_S)


@pytest_asyncio.fixture
async def service(remote_edge: Edge, tmp_path: Path) -> AsyncIterator[Service]:
    add_pack(tmp_path / "packs", remote_edge.target)
    installation = Installation.load(home=tmp_path / "home", packs=str(tmp_path / "packs"))
    settings: dict[str, Any] = {"pack": "far", "also_for": "ink, chalk", "max_running": 3, "max_queued": 1}
    engine = build_engine(CaptionSettings.load(**settings), installation)
    assert isinstance(engine, RemoteEngine)
    await engine.start()
    server, port = await start_server(CaptionServicer(engine, TOKEN), "127.0.0.1:0")
    channel = ServiceChannel(f"127.0.0.1:{port}", application="caption", token=TOKEN)
    yield Service(engine, channel)
    await channel.close()
    await server.stop(None)
    await engine.stop()


class Gate:
    """Holds the far service inside a call, and tells when somebody is in."""

    def __init__(self, edge: Edge) -> None:
        self.inside = threading.Event()
        self.left = threading.Event()
        self.open = threading.Event()
        edge.script.before = self

    async def __call__(self, method: str, index: int) -> None:
        self.inside.set()
        try:
            while not self.open.is_set():  # noqa: ASYNC110 - opened from another thread
                await asyncio.sleep(0.01)
        finally:
            self.left.set()


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S)


async def test_learned_characters_are_told_of_and_their_names_put_back(service: Service, remote_edge: Edge) -> None:
    """The server has never heard of them: their looks go as a description, and the lost name is mended here."""
    rosa = pb.LearnedCharacter(name="Rosa", phrase="a pink pig with a teal hat")
    described = await service.describe(
        caption="Rosa let it fly.", characters=[rosa], earlier_descriptions=["Momo, a brown monkey."]
    )
    assert described.description.endswith(" Rosa, a pink pig with a teal hat, stands nearby.")
    (_, asked, _) = remote_edge.script.calls[-1]
    assert list(asked.earlier_descriptions) == [
        "Rosa, a pink pig with a teal hat, stands there.",
        "Momo, a brown monkey.",
    ]
    with pytest.raises(ValueOutOfRange) as raised:
        await service.describe(characters=[pb.LearnedCharacter()])
    assert raised.value.field_violations[0].field == "characters[0].name"


async def test_both_questions_are_asked_with_everything_they_hold(service: Service, remote_edge: Edge) -> None:
    sampling = pb.Sampling(temperature=0.5, top_p=0.75, seed=11, max_tokens=20)
    story = await service.write(captions=["Momo slept.", "Momo found a kite."], sampling=sampling)
    described = await service.describe(
        earlier_captions=["Momo slept."], earlier_descriptions=["Momo, a brown monkey."], sampling=sampling
    )
    assert story.caption.startswith("Then came frame 2")
    assert described.description.startswith("A drawing of frame 0")
    (_, asked, call), (_, asked_too, _) = remote_edge.script.calls
    assert list(asked.captions) == ["Momo slept.", "Momo found a kite."]
    assert (asked.sampling.temperature, asked.sampling.top_p) == (0.5, 0.75)
    assert (asked.sampling.seed, asked.sampling.max_tokens) == (11, 20)
    assert (asked_too.previous_caption, asked_too.caption) == ("Momo found a kite.", "She let it fly.")
    assert list(asked_too.earlier_captions) == ["Momo slept."]
    assert list(asked_too.earlier_descriptions) == ["Momo, a brown monkey."]
    assert call.remaining_s() <= WAIT_S
    assert story.pack_digest == service.engine.model.pack_digest != ""
    assert story.usage.duration_s > 0


async def test_the_same_seed_gives_the_same_text(service: Service) -> None:
    texts = [(await service.write(sampling=pb.Sampling(seed=seed))).caption for seed in (1, 1, 2, 2**64 - 1, 2**64 - 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4] not in texts[:3]


async def test_the_pack_is_listed_under_every_name_it_writes_for(service: Service) -> None:
    listed = await service.channel.call(service.stub.ListPacks, pb.ListPacksRequest(), timeout_s=WAIT_S)
    assert [(each.name, each.architecture) for each in listed.packs] == [
        ("far", "remote-captioner"),
        ("ink", "remote-captioner"),
        ("chalk", "remote-captioner"),
    ]
    assert (await service.write(pack="chalk")).caption
    with pytest.raises(PackUnknown):
        await service.write(pack="toon")


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"image": b"no picture"}, ImageUnreadable, "image"),
        ({"captions": []}, CaptionEmpty, "captions"),
        ({"captions": ["a", " "]}, CaptionEmpty, "captions[1]"),
        ({"captions": ["a", "x" * 1500]}, CaptionTooLong, "captions[1]"),  # for us it would do; the server says no
        ({"sampling": pb.Sampling(temperature=3.0)}, ValueOutOfRange, "sampling.temperature"),
    ],
)
async def test_bad_input_is_refused_in_our_own_words(
    service: Service, fields: dict[str, Any], error: type[FabulaError], field: str
) -> None:
    with pytest.raises(error) as raised:
        await service.write(**fields)
    assert raised.value.field_violations[0].field == field


async def test_a_field_that_the_server_refuses_has_our_name_in_a_description_too(service: Service) -> None:
    with pytest.raises(CaptionTooLong) as raised:
        await service.describe(earlier_captions=["a", "b"], previous_caption="x" * 1500)
    assert raised.value.field_violations[0].field == "previous_caption"
    with pytest.raises(CaptionTooLong) as raised:
        await service.describe(earlier_captions=["a", "x" * 1500])
    assert raised.value.field_violations[0].field == "earlier_captions[1]"


@pytest.mark.parametrize("error", [QueueFull(retry_after_s=7.0), Unavailable("gone"), CaptionNotWritten("silence")])
async def test_what_the_server_says_of_itself_keeps_its_reason(
    service: Service, remote_edge: Edge, error: FabulaError
) -> None:
    remote_edge.script.failures["WriteCaption"].append(error)
    with pytest.raises(type(error)) as raised:
        await service.write()
    assert raised.value.reason == error.reason
    assert raised.value.retry_after_s == error.retry_after_s
    assert (await service.write()).caption, "the next may find it well"


async def test_a_deadline_is_the_servers_too(service: Service, remote_edge: Edge) -> None:
    gate = Gate(remote_edge)
    with pytest.raises(DeadlineExceeded):
        await service.write(timeout_s=PATIENCE_S)
    await until(gate.left)
    assert not gate.open.is_set(), "nobody let it go: it was told to stop"
    assert remote_edge.script.computed.total() == 0


async def test_the_packs_own_limit_holds_where_the_caller_has_none(remote_edge: Edge) -> None:
    model = RemoteModel(pack_name="far", pack_digest="d", architecture="remote-captioner")
    engine = RemoteEngine(model, Endpoint(address=remote_edge.target, model="caption/tiny", timeout_s=PATIENCE_S))
    await engine.start()
    gate = Gate(remote_edge)
    from services.caption.job import StoryJob

    with pytest.raises(DeadlineExceeded):
        await engine.write_caption(StoryJob(image=PICTURE, captions=("Momo slept.",)))
    await until(gate.left)
    await engine.stop()


async def test_a_cancelled_call_ends_the_servers_work(service: Service, remote_edge: Edge) -> None:
    gate = Gate(remote_edge)
    call = asyncio.create_task(service.write())
    await until(gate.inside)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(gate.left)
    assert remote_edge.script.computed.total() == 0
    while service.engine.unfinished_count:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)


async def test_one_request_too_many_is_refused_here(service: Service, remote_edge: Edge) -> None:
    gate = Gate(remote_edge)
    calls = [asyncio.create_task(service.write()) for _ in range(4)]
    while service.engine.unfinished_count < 4:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    with pytest.raises(QueueFull):
        await service.write()
    gate.open.set()
    assert all([(await call).caption for call in calls])


async def test_a_server_that_goes_away_is_unavailable_and_does_not_end_the_service(
    service: Service, remote_edge: Edge
) -> None:
    remote_edge.run(lambda: remote_edge.grpc.stop(0))
    with pytest.raises(Unavailable):
        await service.write()
    service.engine.check_health()


async def test_stopping_ends_calls_in_flight(service: Service, remote_edge: Edge) -> None:
    gate = Gate(remote_edge)
    call = asyncio.create_task(service.write())
    await until(gate.inside)
    await service.engine.stop()
    with pytest.raises(ShuttingDown):
        await call
    await until(gate.left)


async def start(target: str, model: str) -> None:
    described = RemoteModel(pack_name="far", pack_digest="d", architecture="remote-captioner")
    engine = RemoteEngine(described, Endpoint(address=target, model=model, timeout_s=5.0))
    await engine.start()
    await engine.stop()


@pytest.mark.parametrize(
    ("named", "said"), [("caption/nowhere", "not loaded|not ready"), ("frame/tiny", "has no CAPTIONS, IMAGE, TEXT")]
)
async def test_a_model_that_cannot_write_is_found_out_at_the_start(remote_edge: Edge, named: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        await start(remote_edge.target, named)


async def test_an_address_where_nobody_answers_is_found_out_at_the_start() -> None:
    with pytest.raises(RuntimeError, match=r"caption/tiny on 127.0.0.1:9 cannot write captions: UNAVAILABLE"):
        await start("127.0.0.1:9", "caption/tiny")


def test_a_pack_of_a_server_has_no_files_and_says_where_it_is(tmp_path: Path) -> None:
    add_pack(tmp_path, "captions.example:8001", base="llava-1.5-13b-hf")
    manifest: Any = load_any_pack(tmp_path / "far").manifest
    assert (manifest.architecture, manifest.base, manifest.files) == ("remote-captioner", "llava-1.5-13b-hf", {})
    assert manifest.endpoint == Endpoint(address="captions.example:8001", model="caption/tiny")
    with pytest.raises(PackManifestInvalid, match="it has no weights here"):
        read_manifest(tmp_path / "far")
    assert EndpointSource("tritons://h:1/m").endpoint.tls


@pytest.mark.parametrize("place", ["triton://host/model", "triton://host:1", "triton://:1/m", "triton://a b:1/m"])
def test_an_address_that_is_none_is_refused(place: str) -> None:
    with pytest.raises(PackSourceInvalid):
        EndpointSource(place)


@pytest.mark.parametrize("told", [{"licence": ""}, {"licence": "MIT", "steps": 3}, {"licence": "MIT", "name": "A b"}])
def test_what_is_told_must_make_sense(told: dict[str, Any]) -> None:
    with pytest.raises(PackSourceInvalid):
        plan_remote(EndpointSource("triton://h:1/m"), Told(**told))


async def test_an_answer_without_a_text_is_none(monkeypatch: pytest.MonkeyPatch, remote_edge: Edge) -> None:
    described = RemoteModel(pack_name="far", pack_digest="d", architecture="remote-captioner")
    engine = RemoteEngine(described, Endpoint(address=remote_edge.target, model="caption/tiny"))
    await engine.start()
    from services.caption.job import StoryJob

    job = StoryJob(image=PICTURE, captions=("Momo slept.",))
    for array in (None, [b" \x00"], [b"a", b"b"]):

        async def infer(*_: Any, answer: Any = array, **__: Any) -> Any:
            import numpy as np

            values = None if answer is None else np.array(answer, dtype=np.object_)
            return SimpleNamespace(as_numpy=lambda name: values, get_response=lambda: SimpleNamespace(parameters={}))

        monkeypatch.setattr(engine._server._client, "infer", infer)
        with pytest.raises(CaptionNotWritten):
            await engine.write_caption(job)
    await engine.stop()
