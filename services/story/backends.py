"""The two services a story needs, as plain calls: text in and out, pixels in and out, no protobuf beyond this file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fabula.caption.v1 import caption_service_pb2 as caption_pb
from fabula.caption.v1 import caption_service_pb2_grpc as caption_grpc
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from fabula.frame.v1 import frame_service_pb2_grpc as frame_grpc
from fabula.warning.v1 import warning_pb2

from services.runtime.channel import ServiceChannel
from services.runtime.errors import ReplicaLost
from services.story.records import (
    FramePreview,
    FrameProgress,
    FrameQueued,
    Passing,
    Quality,
    StoryCharacter,
    StoryWarning,
)

UNLOAD_TIMEOUT_S = 3.0  # whoever deletes a character does not wait longer for a replica to forget it


@dataclass(frozen=True, kw_only=True)
class DrawnFrame:
    """A picture and how it came to be."""

    image: bytes
    width_px: int
    height_px: int
    steps: int
    text_guidance: float
    image_guidance: float
    pack_digest: str
    engine_fingerprint: str
    queue_s: float
    render_s: float
    warnings: tuple[StoryWarning, ...]  # of the given references; `field` is as the service names it


@dataclass(frozen=True, kw_only=True)
class WrittenText:
    """A caption or a description, and what the pack does not know of what it was written from."""

    text: str
    warnings: tuple[StoryWarning, ...]  # `field` is as the service names it


# What a pack does besides drawing a description; the same words as in the proto, without its prefix.
Feature = Literal["references", "history", "characters", "edit", "insert"]


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """How frames of one quality are drawn, unless a story says more."""

    quality: Quality
    steps: int
    text_guidance: float
    image_guidance: float


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a pack draws, and what may be asked of it. Zero and empty: its service does not tell."""

    width_px: int
    height_px: int
    min_side_px: int
    side_multiple_px: int
    max_area_px: int
    default_steps: int
    max_steps: int
    default_text_guidance: float
    default_image_guidance: float
    max_references: int
    features: tuple[Feature, ...]
    samplers: tuple[str, ...]  # the pack's own first
    qualities: tuple[QualitySettings, ...]  # the fastest first


@dataclass(frozen=True, kw_only=True)
class LoadedPack:
    """A pack as one service has it."""

    name: str
    digest: str
    architecture: str
    drawing: Drawing | None = None  # None from the caption service
    base_digest: str = ""  # of the network that draws; empty where its service does not tell it


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A pack as both services together have it."""

    pack: str
    digest: str  # the frame service's, where both have it
    architecture: str
    is_default: bool  # of stories that name none
    drawing: Drawing | None  # None: the frame service has not got it, or is silent
    writes: bool  # False: the caption service has not got it, or is silent
    base_digest: str = ""  # of the network that draws; empty where the frame service does not tell it

    @property
    def tells_stories(self) -> bool:
        """Whether a story can be told with it now."""
        return self.drawing is not None and self.writes


@dataclass(frozen=True, kw_only=True)
class Backends:
    """What an installation can do now."""

    backends: tuple[Backend, ...]  # the default first, then by name
    unavailable_services: tuple[str, ...]  # what only they know is missing


class CaptionBackend:
    """Writes captions and descriptions. Every method raises FabulaError."""

    def __init__(self, channel: ServiceChannel, *, timeout_s: float) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._stub = caption_grpc.CaptionServiceStub(channel.grpc_channel)

    async def write_caption(
        self,
        *,
        pack: str,
        image: bytes,
        captions: Sequence[str],
        characters: Iterable[StoryCharacter],
        seed: int,
        temperature: float,
    ) -> WrittenText:
        """The caption after `captions`, of which the last belongs to `image`; `characters` belong to the story, too."""
        request = caption_pb.WriteCaptionRequest(
            pack=pack,
            image=image,
            captions=captions,
            characters=_learned(characters),
            sampling=caption_pb.Sampling(temperature=temperature, seed=seed),
        )
        response = await self._channel.call(self._stub.WriteCaption, request, timeout_s=self._timeout_s)
        return WrittenText(text=response.caption, warnings=_warnings(response.warnings))

    async def describe(
        self,
        *,
        pack: str,
        image: bytes,
        previous_caption: str,
        caption: str,
        earlier_captions: Sequence[str],
        earlier_descriptions: Sequence[str],
        characters: Iterable[StoryCharacter],
        seed: int,
        temperature: float,
    ) -> WrittenText:
        """The description of `caption`; `image` and `previous_caption` are the frame before it.

        It names those of `characters` whom `caption` names.
        """
        request = caption_pb.DescribeRequest(
            pack=pack,
            image=image,
            previous_caption=previous_caption,
            caption=caption,
            earlier_captions=earlier_captions,
            earlier_descriptions=earlier_descriptions,
            characters=_learned(characters),
            sampling=caption_pb.Sampling(temperature=temperature, seed=seed),
        )
        response = await self._channel.call(self._stub.Describe, request, timeout_s=self._timeout_s)
        return WrittenText(text=response.description, warnings=_warnings(response.warnings))

    async def packs(self, *, timeout_s: float) -> tuple[str, ...]:
        """Names of the loaded packs, the default first."""
        return tuple(pack.name for pack in await self.loaded(timeout_s=timeout_s))

    async def loaded(self, *, timeout_s: float) -> tuple[LoadedPack, ...]:
        """The loaded packs, the default first."""
        response = await self._channel.call(self._stub.ListPacks, caption_pb.ListPacksRequest(), timeout_s=timeout_s)
        return tuple(
            LoadedPack(name=pack.name, digest=pack.digest, architecture=pack.architecture) for pack in response.packs
        )


class FrameBackend:
    """Draws frames. Every method raises FabulaError."""

    def __init__(self, channel: ServiceChannel, *, timeout_s: float, preview_every_steps: int) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._preview_every_steps = preview_every_steps
        self._stub = frame_grpc.FrameServiceStub(channel.grpc_channel)

    async def render(
        self,
        *,
        frame_index: int,
        pack: str,
        description: str,
        references: Sequence[tuple[bytes, str]],
        given: int | None,
        seed: int,
        steps: int | None,
        text_guidance: float | None,
        image_guidance: float | None,
        quality: Quality,
        on_passing: Callable[[Passing], None],
        distances: Sequence[int] = (),
        characters: Sequence[str] = (),
        edit: tuple[bytes, float] | None = None,
    ) -> DrawnFrame:
        """One picture. `references` are other pictures of the story with their descriptions, oldest first; the one
        numbered `given` is a user's own. `distances` are theirs in frames, where they are not those just before.
        `characters` are digests of the weights of those who are in it.
        `edit` is the picture that it is made of, and how much of that is drawn anew. Of the references the oldest are
        left out that the pack has no room for.

        `on_passing` hears of queue, progress and previews. Cancelling the task cancels the job.
        """
        dropped = max(0, len(references) - await self._room(pack)) if references else 0
        references, distances = references[dropped:], distances[dropped:]
        given = None if given is None or given < dropped else given - dropped
        request = frame_pb.RenderFrameRequest(
            pack=pack,
            description=description,
            references=[
                frame_pb.Reference(image=image, description=text, given=number == given, distance=distance)
                for number, ((image, text), distance) in enumerate(
                    zip(references, distances or (0,) * len(references), strict=True)
                )
            ],
            seed=seed,
            steps=steps or 0,
            text_guidance=text_guidance,
            image_guidance=image_guidance,
            preview_every_steps=self._preview_every_steps,
            quality=f"QUALITY_{quality.upper()}",
            characters=[frame_pb.CharacterWeights(digest=digest) for digest in characters],
            edit=None if edit is None else frame_pb.EditedImage(image=edit[0], strength=edit[1]),
        )
        drawn: DrawnFrame | None = None
        started = time.monotonic()
        async for message in self._channel.stream(self._stub.RenderFrame, request, timeout_s=self._timeout_s):
            match message.WhichOneof("event"):
                case "queued":
                    on_passing(FrameQueued(frame_index=frame_index, ahead_count=message.queued.ahead_count))
                case "progress":
                    progress = message.progress
                    on_passing(
                        FrameProgress(
                            frame_index=frame_index,
                            step=progress.step,
                            step_count=progress.step_count,
                            eta_s=progress.eta_s,
                        )
                    )
                case "preview":
                    preview = message.preview
                    on_passing(FramePreview(frame_index=frame_index, image=preview.image, step=preview.step))
                case "frame":
                    drawn = _drawn(message.frame, time.monotonic() - started)
                case _:
                    continue  # the empty message that closes a failed stream; its status follows
        if drawn is None:
            raise ReplicaLost("the frame service ended its answer before the picture")
        return drawn

    async def packs(self, *, timeout_s: float) -> tuple[str, ...]:
        """Names of the loaded packs, the default first."""
        return tuple(pack.name for pack in await self.loaded(timeout_s=timeout_s))

    async def _room(self, pack: str) -> int:
        """How many references it takes now. Not remembered: a few milliseconds are nothing beside a picture."""
        found = await self.loaded(timeout_s=self._timeout_s)
        rooms = {each.name: each.drawing.max_references for each in found if each.drawing}
        return rooms.get(pack, 0)  # the service itself refuses a pack that it has not got

    async def loaded(self, *, timeout_s: float) -> tuple[LoadedPack, ...]:
        """The loaded packs and how they draw, the default first."""
        response = await self._channel.call(self._stub.ListPacks, frame_pb.ListPacksRequest(), timeout_s=timeout_s)
        return tuple(
            LoadedPack(
                name=pack.name,
                digest=pack.digest,
                architecture=pack.architecture,
                drawing=_drawing(pack),
                base_digest=pack.base_digest,
            )
            for pack in response.packs
        )

    async def unload(self, digest: str) -> None:
        """Puts a character's weights out of the memory of the replica that answers. Jobs that wear them are finished.

        Where there are several replicas, the others keep them until they need the room.
        """
        request = frame_pb.UnloadCharacterRequest(digest=digest)
        await self._channel.call(self._stub.UnloadCharacter, request, timeout_s=UNLOAD_TIMEOUT_S)


# What is not here is a newer service's: nobody at this edge could ask for it.
_FEATURES: dict[int, Feature] = {
    frame_pb.FEATURE_REFERENCES: "references",
    frame_pb.FEATURE_HISTORY: "history",
    frame_pb.FEATURE_CHARACTERS: "characters",
    frame_pb.FEATURE_EDIT: "edit",
    frame_pb.FEATURE_INSERT: "insert",
}
_QUALITIES: dict[int, Quality] = {
    frame_pb.QUALITY_DRAFT: "draft",
    frame_pb.QUALITY_STANDARD: "standard",
    frame_pb.QUALITY_BEST: "best",
}


def _drawing(pack: frame_pb.Pack) -> Drawing:
    return Drawing(
        width_px=pack.width_px,
        height_px=pack.height_px,
        min_side_px=pack.min_side_px,
        side_multiple_px=pack.side_multiple_px,
        max_area_px=pack.max_area_px,
        default_steps=pack.default_steps,
        max_steps=pack.max_steps,
        default_text_guidance=pack.default_text_guidance,
        default_image_guidance=pack.default_image_guidance,
        max_references=pack.max_references,
        features=tuple(_FEATURES[feature] for feature in pack.features if feature in _FEATURES),
        samplers=tuple(pack.samplers),
        qualities=tuple(
            QualitySettings(
                quality=_QUALITIES[each.quality],
                steps=each.steps,
                text_guidance=each.text_guidance,
                image_guidance=each.image_guidance,
            )
            for each in pack.qualities
            if each.quality in _QUALITIES
        ),
    )


def _drawn(frame: frame_pb.RenderedFrame, elapsed_s: float) -> DrawnFrame:
    if hashlib.sha256(frame.image).hexdigest() != frame.sha256:
        raise ReplicaLost("the picture was damaged on its way")
    return DrawnFrame(
        image=frame.image,
        width_px=frame.width_px,
        height_px=frame.height_px,
        steps=frame.steps,
        text_guidance=frame.text_guidance,
        image_guidance=frame.image_guidance,
        pack_digest=frame.pack_digest,
        engine_fingerprint=frame.fingerprint,
        queue_s=frame.queue_s,
        render_s=frame.render_s or elapsed_s,
        warnings=_warnings(frame.warnings),
    )


def _learned(characters: Iterable[StoryCharacter]) -> list[caption_pb.LearnedCharacter]:
    return [caption_pb.LearnedCharacter(name=one.name, phrase=one.phrase) for one in characters]


def _warnings(messages: Iterable[warning_pb2.Warning]) -> tuple[StoryWarning, ...]:
    return tuple(
        StoryWarning(reason=each.reason, message=each.message, field=each.field, metadata=dict(each.metadata))
        for each in messages
    )
