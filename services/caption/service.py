"""The caption service's RPCs, and the process parts around them: from protobuf, engine, to protobuf.

The same `CaptionServicer` runs under plain grpc.aio (`python -m services.caption`) and as a Ray Serve deployment
(`app`). What may go wrong becomes a status in `services.runtime.rpc`; no foreign exception leaves the process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import structlog
from fabula.caption.v1 import caption_service_pb2 as pb
from fabula.caption.v1 import caption_service_pb2_grpc as pb_grpc
from fabula.warning.v1 import warning_pb2

from services.caption.config import CaptionSettings
from services.caption.job import TEMPERATURE_DEFAULT, DescribeJob, Finish, Learned, Sampling, StoryJob, Written
from services.caption.metrics import ServeObserver
from services.models.world import Unfamiliar, World
from services.runtime.config import Installation
from services.runtime.errors import EngineDead
from services.runtime.rpc import unary_method
from services.runtime.telemetry import configure_logging

if TYPE_CHECKING:
    # Ray builds the application in a process of its own, which needs neither torch nor vLLM.
    from services.caption.engine import CaptionEngine
    from services.caption.remote import RemoteEngine

    Engine = CaptionEngine | RemoteEngine

log = structlog.get_logger("fabula.caption")


class CaptionServicer(pb_grpc.CaptionServiceServicer):  # type: ignore[misc]
    """CaptionService over an engine. `token` is the installation's; None switches the check off.

    Captions that go beyond what the engine's pack knows are answered with warnings.
    """

    def __init__(self, engine: Engine, token: str | None) -> None:
        self.engine = engine
        self.token = token

    @unary_method(pb.WriteCaptionResponse)
    async def WriteCaption(self, request: pb.WriteCaptionRequest, context: Any) -> pb.WriteCaptionResponse:
        """The next story caption."""
        written = await self.engine.write_caption(story_job_from_pb(request))
        warnings = story_warnings(self.engine.model.world, request)
        return pb.WriteCaptionResponse(caption=written.text, warnings=warnings, **cost_to_pb(written))

    @unary_method(pb.DescribeResponse)
    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        """The description of a caption."""
        written = await self.engine.describe(describe_job_from_pb(request))
        warnings = description_warnings(self.engine.model.world, request)
        return pb.DescribeResponse(description=written.text, warnings=warnings, **cost_to_pb(written))

    @unary_method(pb.ListPacksResponse)
    async def ListPacks(self, request: pb.ListPacksRequest, context: Any) -> pb.ListPacksResponse:
        """The one pack this service has loaded, under every name that it writes for."""
        model = self.engine.model
        names = dict.fromkeys((model.pack_name, *model.also_called))
        packs = [pb.Pack(name=name, digest=model.pack_digest, architecture=model.architecture) for name in names]
        return pb.ListPacksResponse(packs=packs)


def story_job_from_pb(request: pb.WriteCaptionRequest) -> StoryJob:
    """The job of a request. Raises ValueOutOfRange."""
    return StoryJob(
        image=request.image,
        captions=tuple(request.captions),
        learned=learned_from_pb(request.characters),
        pack=request.pack,
        sampling=sampling_from_pb(request.sampling),
    )


def describe_job_from_pb(request: pb.DescribeRequest) -> DescribeJob:
    """The job of a request. Raises ValueOutOfRange."""
    return DescribeJob(
        image=request.image,
        previous_caption=request.previous_caption,
        caption=request.caption,
        earlier_captions=tuple(request.earlier_captions),
        earlier_descriptions=tuple(request.earlier_descriptions),
        learned=learned_from_pb(request.characters),
        pack=request.pack,
        sampling=sampling_from_pb(request.sampling),
    )


def learned_from_pb(messages: Iterable[pb.LearnedCharacter]) -> tuple[Learned, ...]:
    """The characters that a story has learned."""
    return tuple(Learned(name=each.name, phrase=each.phrase) for each in messages)


def sampling_from_pb(message: pb.Sampling) -> Sampling:
    """Sampling options with the defaults in place of what is unset. Raises ValueOutOfRange."""
    return Sampling(
        temperature=message.temperature if message.HasField("temperature") else TEMPERATURE_DEFAULT,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        seed=message.seed,
        max_tokens=message.max_tokens,
    )


def cost_to_pb(written: Written) -> dict[str, Any]:
    """The fields that both responses share."""
    finish = {Finish.STOP: pb.FINISH_REASON_STOP, Finish.LENGTH: pb.FINISH_REASON_LENGTH}[written.finish]
    usage = pb.Usage(
        prompt_tokens=written.prompt_tokens,
        completion_tokens=written.completion_tokens,
        duration_s=written.duration_s,
    )
    return {"finish_reason": finish, "usage": usage, "pack_digest": written.pack_digest}


def story_warnings(world: World, request: pb.WriteCaptionRequest) -> list[warning_pb2.Warning]:
    """What the pack does not know of the newest caption: those before it were newest once, and warned about then."""
    newest = len(request.captions) - 1
    return [warning_to_pb(each) for each in world.unfamiliar_texts(request.captions[newest], f"captions[{newest}]")]


def description_warnings(world: World, request: pb.DescribeRequest) -> list[warning_pb2.Warning]:
    """What the pack does not know of either caption."""
    texts = {"previous_caption": request.previous_caption, "caption": request.caption}
    return [warning_to_pb(each) for name, text in texts.items() for each in world.unfamiliar_texts(text, name)]


def warning_to_pb(told: Unfamiliar) -> warning_pb2.Warning:
    """The warning of a response."""
    return warning_pb2.Warning(reason=told.reason, message=told.message, field=told.field, metadata=dict(told.metadata))


class CaptionDeployment(CaptionServicer):
    """The servicer as a Ray Serve replica. Constructed means warmed; a dead engine ends the process."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        """Ray Serve awaits this before it calls the replica ready."""
        installation = Installation.load()
        configure_logging("caption", installation.log_level)
        chosen = CaptionSettings.load(**settings)
        from services.caption.loading import build_engine

        # Ray would pickle the exception, and every process that reads it would import vLLM to do so.
        try:
            engine = await asyncio.to_thread(build_engine, chosen, installation, ServeObserver())
            await engine.start(warm_up=chosen.warm_up)
        except Exception as error:
            log.exception("caption_cannot_start")
            raise RuntimeError(f"the caption service cannot start: {type(error).__name__}: {error}") from None
        super().__init__(engine, installation.read_token())
        log.info("caption_ready", pack=chosen.pack)

    async def check_health(self) -> None:
        """Called by Ray Serve every few seconds.

        A dead engine does not come back, and Serve waits for several failures before it replaces a replica: ending the
        process is heard at once. Requests in flight have got their REPLICA_LOST or ENGINE_DEAD by then.
        """
        try:
            self.engine.check_health()
        except EngineDead as error:
            log.error("caption_engine_dead", message=error.message)
            os._exit(1)

    async def __del__(self) -> None:
        """Called by Ray Serve when the replica has drained."""
        if (engine := getattr(self, "engine", None)) is not None:
            await engine.stop()


def app(args: dict[str, Any]) -> Any:
    """The Ray Serve application. `args` are CaptionSettings' fields and win over the environment."""
    from ray import serve

    settings = CaptionSettings.load(**args)
    deployment = serve.deployment(
        CaptionDeployment,
        name="CaptionDeployment",
        # All that the engine takes, and some more: so the engine is who refuses, at once and with advice.
        max_ongoing_requests=settings.max_running + settings.max_queued + 16,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if settings.device == "cuda" else 0},
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=20.0,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployment.bind(settings.model_dump())
