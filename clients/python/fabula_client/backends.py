"""What an installation can do: its packs, and what may be asked of each. Frozen values, made from protobuf; they know
no connection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fabula.story.v1 import backend_pb2 as pb
from fabula.story.v1 import story_service_pb2

from fabula_client.story import quality_from_pb

# What a pack does besides drawing a description.
Feature = Literal["references", "history", "characters", "edit", "insert"]


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """How frames of one quality are drawn, unless a request says more."""

    quality: str  # one of Quality; "unknown" is one newer than this client
    steps: int
    text_guidance: float
    image_guidance: float


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a pack draws, and what may be asked of it. Limits and lists that an older service does not tell are zero and
    empty."""

    width_px: int  # the pack's own, which stories have
    height_px: int
    min_side_px: int  # of a single frame
    side_multiple_px: int  # width and height are multiples of it
    max_area_px: int  # width times height
    default_steps: int
    max_steps: int  # that a story may ask for
    default_text_guidance: float
    default_image_guidance: float
    max_references: int  # earlier frames it looks at; 0: each frame is drawn for itself
    features: tuple[Feature, ...]  # only what can be asked for; those newer than this client are left out
    samplers: tuple[str, ...]  # its own first
    qualities: tuple[QualitySettings, ...]  # the fastest first


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A pack as the services of an installation have it."""

    pack: str  # what `stories.create` takes
    digest: str  # of its manifest: changes when any weight changes
    architecture: str
    is_default: bool  # of stories that name none
    drawing: Drawing | None  # None: the frame service has not got it, or is silent
    writes: bool  # False: the caption service has not got it, or is silent
    tells_stories: bool  # it draws and writes, so a story can be told with it now
    base_digest: str = ""  # of the network that draws, as `CharacterVersion` names it; empty: not told


@dataclass(frozen=True, kw_only=True)
class Backends:
    """What an installation could do when it was asked. Iterating gives its packs."""

    backends: tuple[Backend, ...]  # the default first, then by name
    unavailable_services: tuple[str, ...]  # "caption" or "frame", where it was silent; what only it knows is missing

    def __iter__(self) -> Iterator[Backend]:
        return iter(self.backends)

    def __len__(self) -> int:
        return len(self.backends)


def backends_from_pb(message: story_service_pb2.ListBackendsResponse) -> Backends:
    """What an installation can do, from the wire."""
    return Backends(
        backends=tuple(backend_from_pb(each) for each in message.backends),
        unavailable_services=tuple(message.unavailable_services),
    )


def backend_from_pb(message: pb.Backend) -> Backend:
    """A pack from the wire."""
    return Backend(
        pack=message.pack,
        digest=message.digest,
        architecture=message.architecture,
        is_default=message.is_default,
        drawing=_drawing(message.drawing) if message.HasField("drawing") else None,
        writes=message.writes,
        tells_stories=message.tells_stories,
        base_digest=message.base_digest,
    )


def _drawing(message: pb.Drawing) -> Drawing:
    return Drawing(
        width_px=message.width_px,
        height_px=message.height_px,
        min_side_px=message.min_side_px,
        side_multiple_px=message.side_multiple_px,
        max_area_px=message.max_area_px,
        default_steps=message.default_steps,
        max_steps=message.max_steps,
        default_text_guidance=message.default_text_guidance,
        default_image_guidance=message.default_image_guidance,
        max_references=message.max_references,
        features=tuple(_FEATURES[number] for number in message.features if number in _FEATURES),
        samplers=tuple(message.samplers),
        qualities=tuple(
            QualitySettings(
                quality=quality_from_pb(each.quality),
                steps=each.steps,
                text_guidance=each.text_guidance,
                image_guidance=each.image_guidance,
            )
            for each in message.qualities
        ),
    )


_FEATURES: dict[int, Feature] = {
    pb.FEATURE_REFERENCES: "references",
    pb.FEATURE_HISTORY: "history",
    pb.FEATURE_CHARACTERS: "characters",
    pb.FEATURE_EDIT: "edit",
    pb.FEATURE_INSERT: "insert",
}
