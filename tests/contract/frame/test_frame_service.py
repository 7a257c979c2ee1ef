"""The frame service over real gRPC, drawing with a tiny pack: what a caller may rely on."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from fabula.frame.v1 import frame_service_pb2 as pb
from fabula.frame.v1 import frame_service_pb2_grpc as pb_grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from prometheus_client import CollectorRegistry, generate_latest

from services.frame import engine as engine_module
from services.frame.engine import EngineSettings, FrameEngine
from services.frame.metrics import MeteredObserver, PrometheusMeters
from services.frame.scheduler import StepTimes
from services.frame.server import start_server
from services.frame.service import FrameServicer, packs_to_pb
from services.models.drawing import Drawing
from services.models.registry import FrameModel, load_frame_model
from services.models.step import advance
from services.models.tiny import build_tiny_pack
from services.models.world import World

TOKEN = "t" * 64
WAIT_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FrameModel:
    torch.set_num_threads(1)
    return load_frame_model(build_tiny_pack(tmp_path_factory.mktemp("packs") / "tiny", captions=False))


class Service:
    """A running service and a channel to it."""

    def __init__(self, engine: FrameEngine, channel: grpc.aio.Channel, registry: CollectorRegistry) -> None:
        self.engine = engine
        self.channel = channel
        self.registry = registry
        self.stub = pb_grpc.FrameServiceStub(channel)

    def call(self, request: pb.RenderFrameRequest, *metadata: tuple[str, str], token: str | None = TOKEN) -> Any:
        headers = [*metadata, *([("fabula-token", token)] if token is not None else [])]
        return self.stub.RenderFrame(request, metadata=headers, timeout=WAIT_S)

    async def events(self, request: pb.RenderFrameRequest) -> list[pb.RenderFrameResponse]:
        return [event async for event in self.call(request)]

    async def frame(self, request: pb.RenderFrameRequest) -> pb.RenderedFrame:
        return (await self.events(request))[-1].frame

    async def refusal(self, call: Any) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo, status_pb2.Status]:
        """How a call was refused."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in call:
                pass
        details = dict(raised.value.trailing_metadata())["grpc-status-details-bin"]
        status = status_pb2.Status.FromString(details)
        info = error_details_pb2.ErrorInfo()
        status.details[0].Unpack(info)
        assert info.domain == "fabula"
        return raised.value.code(), info, status


async def start(model: FrameModel, settings: EngineSettings, world: World | None = None) -> AsyncIterator[Service]:
    registry = CollectorRegistry()
    observer = MeteredObserver(PrometheusMeters(registry))
    engine = FrameEngine({"tiny": model}, "tiny", settings, observer, worlds={"tiny": world} if world else None)
    engine.start()
    server, port = await start_server(FrameServicer(engine, TOKEN), "127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Service(engine, channel, registry)
    await server.stop(None)
    engine.stop()


@pytest.fixture
async def service(model: FrameModel) -> AsyncIterator[Service]:
    async for started in start(model, EngineSettings()):
        yield started


@pytest.fixture
async def small_service(model: FrameModel) -> AsyncIterator[Service]:
    """Draws one frame at a time and lets one wait."""
    async for started in start(model, EngineSettings(max_running=1, max_queued=1)):
        yield started


class Steps:
    """Counts the steps of each seed, and holds the engine before a step when told to."""

    def __init__(self) -> None:
        self.count: dict[int, int] = {}
        self.hold_after: int | None = None  # so many steps of any one seed
        self._released = threading.Event()

    def release(self) -> None:
        """Hold nothing any more."""
        self._released.set()

    def __call__(self, model: FrameModel, drawings: Sequence[Drawing], *rest: Any, **more: Any) -> int:
        if self.hold_after is not None and max(self.count.values(), default=0) >= self.hold_after:
            assert self._released.wait(WAIT_S)
        for drawing in drawings:
            self.count[drawing.sketch.seed] = self.count.get(drawing.sketch.seed, 0) + 1
        return advance(model, drawings, *rest, **more)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    counter = Steps()
    monkeypatch.setattr(engine_module, "advance", counter)
    yield counter
    counter.release()


def picture(seed: int = 0) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def request(seed: int = 1, earlier: int = 1, **fields: Any) -> pb.RenderFrameRequest:
    """A small job with `earlier` references, and any field replaced."""
    references = [pb.Reference(image=picture(i), description=f"frame {i}") for i in range(earlier)]
    base = {"description": "a fox and a lamp", "seed": seed, "references": references}
    return pb.RenderFrameRequest(**{**base, **fields})


async def until(condition: Callable[[], bool]) -> None:
    """Wait for the other side to notice something."""
    for _ in range(int(WAIT_S * 100)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


async def test_progress_previews_and_at_last_the_picture(service: Service) -> None:
    events = await service.events(request(earlier=3, preview_every_steps=2))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["queued", "progress", "progress", "preview", "progress", "progress", "frame"]
    assert [e.progress.step for e in events if e.WhichOneof("event") == "progress"] == [1, 2, 3, 4]
    preview = next(e.preview for e in events if e.WhichOneof("event") == "preview")
    assert Image.open(io.BytesIO(preview.image)).format == "WEBP"
    frame = events[-1].frame
    image = Image.open(io.BytesIO(frame.image))
    assert (image.format, image.size) == ("PNG", (64, 64))
    assert frame.sha256 == hashlib.sha256(frame.image).hexdigest()
    assert (frame.width_px, frame.height_px, frame.seed, frame.steps) == (64, 64, 1, 4)
    assert (frame.text_guidance, frame.image_guidance) == (2.0, 1.5)
    assert frame.pack_digest == service.engine.models["tiny"].manifest.digest
    assert frame.render_s > 0


async def test_a_given_picture_far_from_what_the_pack_draws_is_told_of(model: FrameModel) -> None:
    world = World(characters={"Pip": "an orange cat"}, familiar_gain_db=1.0)  # random weights gain nothing on noise
    async for service in start(model, EngineSettings(), world):
        given = pb.Reference(image=picture(0), description="a photograph", given=True)
        (told,) = (await service.frame(request(references=[given]))).warnings
        assert (told.reason, told.field) == ("PICTURE_UNFAMILIAR", "references[0].image")
        assert "Pip (an orange cat)" in told.message
        assert float(told.metadata["gain_db"]) < 1.0
        assert list((await service.frame(request())).warnings) == []


async def test_same_request_same_bytes_and_another_seed_others(service: Service) -> None:
    first, again = [await service.frame(request(seed=5)) for _ in range(2)]
    assert first.image == again.image
    assert (await service.frame(request(seed=6))).sha256 != first.sha256
    assert (await service.frame(request(seed=5, earlier=0))).sha256 != first.sha256


async def test_a_frame_may_be_made_of_a_picture(service: Service) -> None:
    edit = pb.EditedImage(image=picture(7))
    events = await service.events(request(steps=10, edit=edit))
    assert [e.progress.step_count for e in events if e.WhichOneof("event") == "progress"] == [5] * 5
    frame = events[-1].frame
    assert (frame.steps, frame.edit_strength) == (10, 0.5)  # a strength that is not set is the report's
    again = await service.frame(request(steps=10, edit=edit))
    assert again.sha256 == frame.sha256
    others = [
        request(steps=10),
        request(steps=10, edit=pb.EditedImage(image=picture(8))),
        request(steps=10, edit=pb.EditedImage(image=picture(7), strength=0.2)),
        request(steps=10, edit=edit, description="a boat"),
    ]
    drawn = [await service.frame(other) for other in others]
    assert len({frame.sha256, *(each.sha256 for each in drawn)}) == 5
    assert [each.edit_strength for each in drawn] == [0.0, 0.5, 0.2, 0.5]


@pytest.mark.parametrize(
    ("edit", "reason", "field"),
    [
        (pb.EditedImage(), "IMAGE_MISSING", "edit.image"),
        (pb.EditedImage(image=b"no picture"), "IMAGE_UNREADABLE", "edit.image"),
        (pb.EditedImage(image=bytes((8 << 20) + 1)), "IMAGE_TOO_LARGE", "edit.image"),
        (pb.EditedImage(image=picture(), strength=0.0), "VALUE_OUT_OF_RANGE", "edit.strength"),
        (pb.EditedImage(image=picture(), strength=1.01), "VALUE_OUT_OF_RANGE", "edit.strength"),
        (pb.EditedImage(image=picture(), strength=float("nan")), "VALUE_OUT_OF_RANGE", "edit.strength"),
    ],
)
async def test_what_cannot_be_edited_is_refused_by_name(
    service: Service, steps: Steps, edit: pb.EditedImage, reason: str, field: str
) -> None:
    code, info, status = await service.refusal(service.call(request(edit=edit)))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert field in str(status)
    assert not steps.count


async def test_a_frame_between_two_looks_at_both_alike(service: Service) -> None:
    def between(*distances: int) -> pb.RenderFrameRequest:
        both = [pb.Reference(image=picture(i), description=f"frame {i}", distance=d) for i, d in enumerate(distances)]
        return request(references=both)

    alike = await service.frame(between(1, 1))
    by_place = await service.frame(between(0, 0))
    assert (await service.frame(between(2, 1))).sha256 == by_place.sha256 != alike.sha256
    code, info, status = await service.refusal(service.call(between(1, 4)))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "VALUE_OUT_OF_RANGE")
    assert "references[1].distance" in str(status)


async def test_what_is_asked_for_is_what_is_told(service: Service) -> None:
    frame = await service.frame(
        request(width_px=96, height_px=32, steps=2, text_guidance=0.0, image_guidance=0.0, seed=2**64 - 1)
    )
    assert Image.open(io.BytesIO(frame.image)).size == (96, 32)
    assert (frame.steps, frame.text_guidance, frame.image_guidance, frame.seed) == (2, 0.0, 0.0, 2**64 - 1)


@pytest.mark.parametrize(
    ("quality", "count"),
    [
        (pb.QUALITY_UNSPECIFIED, 4),
        (pb.QUALITY_DRAFT, 2),
        (pb.QUALITY_STANDARD, 4),
        (pb.QUALITY_BEST, 8),
        (99, 4),  # a newer peer's
    ],
)
async def test_a_quality_is_what_the_pack_says_it_is(service: Service, quality: Any, count: int) -> None:
    assert (await service.frame(request(quality=quality))).steps == count
    assert (await service.frame(request(steps=3, quality=quality))).steps == 3, "what is said exactly counts more"


async def test_requests_in_flight_are_drawn_together(service: Service, steps: Steps) -> None:
    steps.hold_after = 0
    calls = [asyncio.create_task(service.frame(request(seed=i, earlier=i % 4))) for i in range(8)]
    await until(lambda: len(service.engine.tickets) == 8)
    steps.release()
    frames = await asyncio.gather(*calls)
    assert len({frame.sha256 for frame in frames}) == 8
    page = generate_latest(service.registry).decode()
    assert 'frame_jobs_total{outcome="rendered"} 8.0' in page
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in page.splitlines() if not line.startswith("#")}
    assert values["frame_steps_total"] <= 8  # the first may be a step or four ahead; alone it would be 32
    rows = [values[f'frame_rows_total{{kind="{kind}"}}'] for kind in ("frame", "reference")]
    # 4 steps; 0, 1, 2 and 3 earlier frames, two jobs of each: every branch, every reference and its blank.
    assert rows == [4 * (2 + 3 + 3 + 3) * 2, 4 * (0 + 2 + 4 + 6) * 2]
    assert values["frame_job_steps_total"] == 8 * 4


async def test_a_characters_weights_leave_when_told(service: Service) -> None:
    def unload(digest: str) -> Any:
        request = pb.UnloadCharacterRequest(digest=digest)
        return service.stub.UnloadCharacter(request, metadata=[("fabula-token", TOKEN)], timeout=WAIT_S)

    assert not (await unload("a" * 64)).was_loaded
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await unload("A" * 64)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("empty description", {"description": " \n"}, "DESCRIPTION_EMPTY", "description"),
    ("long description", {"description": "x" * 200}, "DESCRIPTION_TOO_LONG", "description"),
    ("unknown pack", {"pack": "oil-painting"}, "PACK_UNKNOWN", "pack"),
    ("odd width", {"width_px": 63}, "VALUE_OUT_OF_RANGE", "width_px"),
    ("huge frame", {"width_px": 4096, "height_px": 4096}, "VALUE_OUT_OF_RANGE", "width_px"),
    ("too many steps", {"steps": 100_000}, "VALUE_OUT_OF_RANGE", "steps"),
    ("negative guidance", {"text_guidance": -1.0}, "VALUE_OUT_OF_RANGE", "text_guidance"),
    ("guidance is not a number", {"image_guidance": float("nan")}, "VALUE_OUT_OF_RANGE", "image_guidance"),
    ("four references", {"references": [pb.Reference(image=picture())] * 4}, "TOO_MANY_REFERENCES", "references"),
    ("not a picture", {"references": [pb.Reference(image=b"GIF89a")]}, "IMAGE_UNREADABLE", "references[0].image"),
    ("cut picture", {"references": [pb.Reference(image=picture()[:99])]}, "IMAGE_UNREADABLE", "references[0].image"),
    ("no picture", {"references": [pb.Reference(description="x")]}, "IMAGE_MISSING", "references[0].image"),
    (
        "heavy picture",
        {"references": [pb.Reference(image=picture()), pb.Reference(image=b"x" * (9 << 20))]},
        "IMAGE_TOO_LARGE",
        "references[1].image",
    ),
]


@pytest.mark.parametrize(("fields", "reason", "field"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
async def test_bad_input_has_a_stable_reason_and_names_its_field(
    service: Service, fields: dict[str, Any], reason: str, field: str
) -> None:
    code, info, status = await service.refusal(service.call(request(**fields)))
    assert (code, info.reason, info.metadata["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, reason, field)
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert bad.field_violations[0].field == field
    assert (await service.frame(request())).image  # and nothing else is disturbed


@pytest.mark.parametrize("token", [None, "", "x" * 64, TOKEN[:-1]])
async def test_without_the_installation_token_nothing_is_drawn(
    service: Service, steps: Steps, token: str | None
) -> None:
    code, info, _ = await service.refusal(service.call(request(), token=token))
    assert (code, info.reason) == (grpc.StatusCode.UNAUTHENTICATED, "INSTALLATION_TOKEN_INVALID")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.stub.ListPacks(pb.ListPacksRequest())
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not steps.count


async def test_cancelling_the_call_stops_the_job_within_two_steps(service: Service, steps: Steps) -> None:
    steps.hold_after = 5
    call = service.call(request(seed=1, steps=200))
    async for event in call:
        if event.progress.step == 3:
            break
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await anext(aiter(call))
    # Cancelled while the engine is held, or gone already where the call was quicker than the fifth step.
    await until(lambda: all(ticket.cancelled for ticket in service.engine.tickets))
    steps.release()
    assert (await service.frame(request(seed=2))).image
    assert steps.count[1] <= 5 + 2


async def test_one_cancelled_call_leaves_the_others_alone(service: Service, steps: Steps) -> None:
    alone = await service.frame(request(seed=2))
    call = service.call(request(seed=1, steps=50))
    other = asyncio.create_task(service.frame(request(seed=2)))
    await anext(aiter(call))
    call.cancel()
    assert (await other).width_px == alone.width_px
    assert steps.count[2] == 8


async def test_overload_is_refused_at_once_with_advice(small_service: Service, steps: Steps) -> None:
    steps.hold_after = 0
    running = asyncio.create_task(small_service.frame(request(seed=1)))
    await until(lambda: bool(small_service.engine.tickets))
    waiting = small_service.call(request(seed=2))
    queued = await anext(aiter(waiting))
    assert queued.queued.ahead_count == 1
    code, info, status = await small_service.refusal(small_service.call(request(seed=3)))
    assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    advice = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(advice) for detail in status.details)
    assert advice.retry_delay.ToNanoseconds() >= 1e9
    steps.release()
    assert (await running).image
    assert [event async for event in waiting][-1].frame.image
    assert 3 not in steps.count


async def test_a_deadline_that_has_passed_starts_nothing(service: Service, steps: Steps) -> None:
    code, info, _ = await service.refusal(service.call(request(), ("fabula-timeout-ms", "0")))
    assert (code, info.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert not steps.count


async def test_a_deadline_ends_what_is_being_drawn(service: Service, steps: Steps) -> None:
    steps.hold_after = 0
    code, info, _ = await service.refusal(service.call(request(seed=1), ("fabula-timeout-ms", "300")))
    steps.release()
    assert (code, info.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert (await service.frame(request(seed=2))).image
    assert steps.count.get(1, 0) <= 2


async def test_a_bug_is_told_as_an_id_and_never_with_its_insides(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any) -> Any:
        raise RuntimeError("/home/me/secret.py line 3")

    monkeypatch.setattr(engine_module, "sketch_of", bug)
    code, info, status = await service.refusal(service.call(request()))
    assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in str(status)
    assert info.metadata["error_id"]


async def test_a_frame_that_cannot_be_drawn_fails_by_name(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory at 0x7f")

    monkeypatch.setattr(engine_module, "advance", fails)
    code, info, status = await service.refusal(service.call(request()))
    assert (code, info.reason) == (grpc.StatusCode.INTERNAL, "RENDER_FAILED")
    assert "0x7f" not in str(status)


async def test_packs_are_listed_with_what_they_take(service: Service) -> None:
    response = await service.stub.ListPacks(pb.ListPacksRequest(), metadata=[("fabula-token", TOKEN)])
    (pack,) = response.packs
    manifest = service.engine.models["tiny"].manifest
    assert (pack.name, pack.digest, pack.architecture) == ("tiny", manifest.digest, "storygen")
    assert pack.base_digest == manifest.files["unet/diffusion_pytorch_model.safetensors"].sha256
    assert (pack.width_px, pack.height_px, pack.default_steps, pack.max_references) == (64, 64, 4, 3)
    assert (pack.default_text_guidance, pack.default_image_guidance) == (2.0, 1.5)


async def list_packs(service: Service) -> list[pb.Pack]:
    return list((await service.stub.ListPacks(pb.ListPacksRequest(), metadata=[("fabula-token", TOKEN)])).packs)


async def test_the_limits_that_are_told_are_those_that_hold(service: Service) -> None:
    (pack,) = await list_packs(service)
    side, multiple = pack.min_side_px, pack.side_multiple_px
    smallest = await service.frame(request(earlier=0, steps=1, width_px=side, height_px=side))
    assert (smallest.width_px, smallest.height_px) == (side, side)
    most = service.stub.RenderFrame(
        request(earlier=0, steps=pack.max_steps, width_px=side, height_px=side), metadata=[("fabula-token", TOKEN)]
    )
    assert (await anext(aiter(most))).HasField("queued")  # it is taken; drawing it would take long
    most.cancel()
    long_px = pack.max_area_px // side
    largest = await service.frame(request(earlier=0, steps=1, width_px=long_px, height_px=side))
    assert largest.width_px * largest.height_px == pack.max_area_px
    for beyond in (
        {"width_px": side - multiple},
        {"width_px": side + multiple - 1},
        {"width_px": long_px + multiple, "height_px": side},
        {"steps": pack.max_steps + 1},
    ):
        code, info, _ = await service.refusal(service.call(request(earlier=0, **beyond)))
        assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "VALUE_OUT_OF_RANGE"), beyond


async def test_the_samplers_and_qualities_that_are_told_are_those_that_draw(service: Service) -> None:
    (pack,) = await list_packs(service)
    assert pack.samplers[0] == (await service.frame(request(earlier=0, steps=1))).sampler == "ddim"
    for sampler in pack.samplers:
        assert (await service.frame(request(earlier=0, steps=1, sampler=sampler))).sampler == sampler
    assert [told.quality for told in pack.qualities] == [pb.QUALITY_DRAFT, pb.QUALITY_STANDARD, pb.QUALITY_BEST]
    for told in pack.qualities:
        frame = await service.frame(request(earlier=0, quality=told.quality))
        assert (frame.steps, frame.text_guidance, frame.image_guidance) == (
            told.steps,
            told.text_guidance,
            told.image_guidance,
        )
    assert pack.qualities[1].steps == pack.default_steps


async def test_only_what_can_be_asked_for_is_a_feature(model: FrameModel) -> None:
    alone = replace(model, manifest=model.manifest.model_copy(update={"name": "alone", "max_references": 0}))
    engine = FrameEngine({"tiny": model, "alone": alone}, "tiny")
    assert [(pack.name, list(pack.features)) for pack in packs_to_pb(engine).packs] == [
        ("tiny", [pb.FEATURE_REFERENCES, pb.FEATURE_EDIT, pb.FEATURE_INSERT]),
        ("alone", [pb.FEATURE_EDIT]),
    ]
    engine = FrameEngine({"alone": alone}, "alone", fetch=lambda digest: b"")
    (pack,) = packs_to_pb(engine).packs
    assert list(pack.features) == [pb.FEATURE_CHARACTERS, pb.FEATURE_EDIT]


async def test_no_quality_takes_more_steps_than_the_pack_has(model: FrameModel) -> None:
    slow = model.manifest.sampling.model_copy(update={"default_steps": 150})
    engine = FrameEngine(
        {"slow": replace(model, manifest=model.manifest.model_copy(update={"sampling": slow}))}, "slow"
    )
    (pack,) = packs_to_pb(engine).packs
    assert [told.steps for told in pack.qualities] == [75, 150, pack.max_steps]


async def test_health_is_served_for_probes(service: Service) -> None:
    health = health_pb2_grpc.HealthStub(service.channel)
    for name in ("", "fabula.frame.v1.FrameService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_unknown_weights_and_long_tenants_are_refused_by_name(service: Service, steps: Steps) -> None:
    unknown = request(characters=[pb.CharacterWeights(digest="a" * 64)])
    code, info, _ = await service.refusal(service.call(unknown))
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "CHARACTER_WEIGHTS_UNKNOWN")
    crooked = request(characters=[pb.CharacterWeights(digest="a" * 64, scale=-1.0)])
    code, info, _ = await service.refusal(service.call(crooked))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "VALUE_OUT_OF_RANGE")
    code, info, _ = await service.refusal(service.call(request(tenant="t" * 256)))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "VALUE_OUT_OF_RANGE")
    assert not steps.count


async def test_a_frame_that_would_be_late_is_refused_at_once_with_advice(
    service: Service, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepTimes, "predict", lambda *_: 10.0)
    code, info, _ = await service.refusal(service.call(request(seed=2, steps=4), ("fabula-timeout-ms", "20000")))
    assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE")
    assert info.metadata["predicted_s"] == "40.0"
    page = generate_latest(service.registry).decode()
    assert 'frame_refused_jobs_total{reason="deadline"} 1.0' in page
    assert not steps.count
