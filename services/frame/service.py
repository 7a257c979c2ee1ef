"""The frame service's RPCs, and the process parts around them: from protobuf, engine, to protobuf.

The same `FrameServicer` runs under plain grpc.aio (`python -m services.frame`) and as a Ray Serve deployment (`app`).
What may go wrong becomes a status in `services.runtime.rpc`; no foreign exception leaves the process.

Importing this does not import torch: besides the replica, Ray imports it in a process of its own that only builds the
application, and that one should cost neither eight seconds of start nor half a gigabyte.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import structlog
from fabula.frame.v1 import frame_service_pb2 as pb
from fabula.frame.v1 import frame_service_pb2_grpc as pb_grpc
from fabula.warning.v1 import warning_pb2

from services.frame.config import FrameSettings
from services.frame.job import EditedImage, Event, FrameJob, Preview, Progress, Queued, ReferenceImage, RenderedFrame
from services.frame.metrics import MeteredObserver, ServeMeters
from services.frame.scheduler import Priority
from services.models.character import CharacterWeights
from services.models.quality import Quality
from services.models.world import Unfamiliar
from services.runtime.call import current_call
from services.runtime.config import Installation
from services.runtime.errors import ValueOutOfRange
from services.runtime.rpc import stream_method, unary_method
from services.runtime.store import SHA256
from services.runtime.telemetry import configure_logging

if TYPE_CHECKING:
    from services.frame.engine import FrameEngine
    from services.frame.remote import RemoteFrames

log = structlog.get_logger("fabula.frame")


class FrameServicer(pb_grpc.FrameServiceServicer):  # type: ignore[misc]
    """FrameService over an engine. `token` is the installation's; None switches the check off.

    `remotes` are packs, by name, that a server draws with: see `remote.py`.
    """

    def __init__(
        self, engine: FrameEngine, token: str | None, remotes: Mapping[str, RemoteFrames] | None = None
    ) -> None:
        self.engine = engine
        self.token = token
        self.remotes = dict(remotes or {})

    @stream_method(pb.RenderFrameResponse)
    async def RenderFrame(self, request: pb.RenderFrameRequest, context: Any) -> AsyncIterator[pb.RenderFrameResponse]:
        """Draws one frame; the last message is the picture."""
        if (remote := self.remotes.get(request.pack)) is not None:
            async with aclosing(remote.render(request)) as messages:  # type: ignore[type-var]
                async for message in messages:
                    yield message
            return
        async with aclosing(self.engine.render(job_from_pb(request))) as events:
            async for event in events:
                yield event_to_pb(event)

    @unary_method(pb.ListPacksResponse)
    async def ListPacks(self, request: pb.ListPacksRequest, context: Any) -> pb.ListPacksResponse:
        """The loaded packs, the default first; then those on servers that answer."""
        response = packs_to_pb(self.engine)
        told = await asyncio.gather(*(remote.pack() for remote in self.remotes.values()))
        response.packs.extend(pack for pack in told if pack is not None)
        return response

    @unary_method(pb.UnloadCharacterResponse)
    async def UnloadCharacter(self, request: pb.UnloadCharacterRequest, context: Any) -> pb.UnloadCharacterResponse:
        """Puts a character's weights out of memory."""
        if not SHA256.fullmatch(request.digest):
            raise ValueOutOfRange("a digest is 64 lower-case hex digits", field="digest")
        return pb.UnloadCharacterResponse(was_loaded=self.engine.unload(request.digest))


def job_from_pb(request: pb.RenderFrameRequest) -> FrameJob:
    """The job of a request, due when the current call is."""
    call = current_call()
    return FrameJob(
        description=request.description,
        seed=request.seed,
        pack=request.pack,
        references=tuple(
            ReferenceImage(image=r.image, description=r.description, given=r.given, distance=r.distance)
            for r in request.references
        ),
        width_px=request.width_px,
        height_px=request.height_px,
        steps=request.steps,
        text_guidance=request.text_guidance if request.HasField("text_guidance") else None,
        image_guidance=request.image_guidance if request.HasField("image_guidance") else None,
        quality=_QUALITIES.get(request.quality, Quality.STANDARD),
        sampler=request.sampler,
        edit=_edit_from_pb(request.edit) if request.HasField("edit") else None,
        preview_every_steps=request.preview_every_steps,
        characters=tuple(
            CharacterWeights(c.digest, c.scale if c.HasField("scale") else 1.0) for c in request.characters
        ),
        tenant=checked_tenant(request.tenant),
        priority=_PRIORITIES.get(request.priority, Priority.STANDARD),  # a newer peer's is nobody's loss
        deadline_s=call.deadline_s if call is not None else None,
    )


def _edit_from_pb(edit: pb.EditedImage) -> EditedImage:
    if not edit.HasField("strength"):
        return EditedImage(image=edit.image)
    return EditedImage(image=edit.image, strength=edit.strength)


_PRIORITIES = {pb.PRIORITY_BATCH: Priority.BATCH, pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE}
_QUALITIES = {pb.QUALITY_DRAFT: Quality.DRAFT, pb.QUALITY_BEST: Quality.BEST}
TENANT_CHARACTERS_MAX = 255


def checked_tenant(tenant: str) -> str:
    """The tenant's name. Raises ValueOutOfRange when it is too long to be one."""
    if len(tenant) > TENANT_CHARACTERS_MAX:
        raise ValueOutOfRange(f"a tenant has at most {TENANT_CHARACTERS_MAX} characters", field="tenant")
    return tenant


def event_to_pb(event: Event) -> pb.RenderFrameResponse:
    """One message of the stream."""
    match event:
        case Queued():
            return pb.RenderFrameResponse(queued=pb.Queued(ahead_count=event.ahead_count))
        case Progress():
            progress = pb.Progress(step=event.step, step_count=event.step_count, eta_s=event.eta_s)
            return pb.RenderFrameResponse(progress=progress)
        case Preview():
            return pb.RenderFrameResponse(preview=pb.Preview(image=event.image, step=event.step))
        case RenderedFrame():
            sketch = event.sketch
            frame = pb.RenderedFrame(
                image=event.image,
                sha256=event.sha256,
                width_px=sketch.width_px,
                height_px=sketch.height_px,
                seed=sketch.seed,
                steps=sketch.steps,
                text_guidance=sketch.text_guidance,
                image_guidance=sketch.image_guidance,
                pack_digest=event.pack_digest,
                fingerprint=event.fingerprint,
                sampler=sketch.sampler,
                edit_strength=0.0 if sketch.edit is None else sketch.edit.strength,
                queue_s=event.queue_s,
                render_s=event.render_s,
                warnings=[warning_to_pb(each) for each in event.warnings],
            )
            return pb.RenderFrameResponse(frame=frame)


def warning_to_pb(told: Unfamiliar) -> warning_pb2.Warning:
    """The warning of a frame."""
    return warning_pb2.Warning(reason=told.reason, message=told.message, field=told.field, metadata=dict(told.metadata))


def packs_to_pb(engine: FrameEngine) -> pb.ListPacksResponse:
    """The engine's packs, the default first."""
    names = sorted(engine.models, key=lambda name: (name != engine.default_pack, name))
    return pb.ListPacksResponse(packs=[_pack_to_pb(engine, name) for name in names])


def _pack_to_pb(engine: FrameEngine, name: str) -> pb.Pack:
    from services.frame.sketch import limits_of, quality_of  # torch comes with it; the engine has it already

    model = engine.models[name]
    manifest = model.manifest
    limits = limits_of(model)
    qualities = {quality: quality_of(model, quality) for quality in Quality}
    offered = {
        pb.FEATURE_REFERENCES: manifest.max_references > 0,
        pb.FEATURE_HISTORY: model.reader is not None,
        pb.FEATURE_CHARACTERS: engine.has_characters,
        pb.FEATURE_EDIT: True,
        # What reads a history was trained to see only what came before.
        pb.FEATURE_INSERT: manifest.max_references > 1 and model.reader is None,
    }
    return pb.Pack(
        name=name,
        digest=manifest.digest,
        base_digest=model.base_digest,
        architecture=manifest.architecture,
        width_px=manifest.width_px,
        height_px=manifest.height_px,
        default_steps=qualities[Quality.STANDARD].steps,
        max_references=manifest.max_references,
        default_text_guidance=manifest.sampling.default_text_guidance,
        default_image_guidance=manifest.sampling.default_image_guidance,
        features=[feature for feature, is_offered in offered.items() if is_offered],
        min_side_px=limits.min_side_px,
        side_multiple_px=limits.side_multiple_px,
        max_area_px=limits.max_area_px,
        max_steps=limits.max_steps,
        samplers=limits.samplers,
        qualities=[
            pb.QualitySettings(
                quality=f"QUALITY_{quality.name}",
                steps=settings.steps,
                text_guidance=settings.text_guidance,
                image_guidance=settings.image_guidance,
            )
            for quality, settings in qualities.items()
        ],
    )


class FrameDeployment(FrameServicer):
    """The servicer as a Ray Serve replica. Constructed means warmed; unhealthy means replaced."""

    def __init__(self, settings: dict[str, Any]) -> None:
        installation = Installation.load()
        configure_logging("frame", installation.log_level)
        try:
            from services.frame.loading import load_engine, load_remotes

            chosen = FrameSettings.load(**settings)
            engine = load_engine(chosen, installation, observer=MeteredObserver(ServeMeters()))
        # Ray would pickle the exception and every process that reads it would import torch to do so.
        except Exception as error:
            log.exception("frame_cannot_start")
            raise RuntimeError(f"the frame service cannot start: {type(error).__name__}: {error}") from None
        super().__init__(engine, installation.read_token(), load_remotes(chosen, installation))

    async def check_health(self) -> None:
        """Called by Ray Serve every few seconds."""
        if not self.engine.is_healthy:
            raise RuntimeError("the frame engine's thread has died or hangs")

    def __del__(self) -> None:
        if (engine := getattr(self, "engine", None)) is not None:
            engine.stop(timeout_s=2.0)


def app(args: dict[str, Any]) -> Any:
    """The Ray Serve application. `args` are FrameSettings' fields and win over the environment."""
    from ray import serve

    settings = FrameSettings.load(**args)
    deployment = serve.deployment(
        FrameDeployment,
        name="FrameDeployment",
        # All that the engine takes, and some more: so the engine is who refuses, at once and with advice.
        max_ongoing_requests=settings.max_running + settings.max_queued + 16,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if settings.device == "cuda" else 0},
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=20.0,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployment.bind(settings.model_dump())
