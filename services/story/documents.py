"""The JSON that HTTP speaks: the same nouns and field names as the protos; times as RFC 3339, durations as seconds.

Numbers are JSON numbers: every seed is below 2^53.
"""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.runtime.errors import FabulaError, FieldViolation, ImageUnreadable, InvalidArgument, UnknownField
from services.story.backends import Backends, Feature
from services.story.editing import EditRequest, InsertRequest
from services.story.intake import StoryRequest
from services.story.records import (
    DEFAULT_QUALITY,
    QUALITIES,
    Event,
    Frame,
    FrameEdited,
    FrameFinished,
    FrameInserted,
    FramePreview,
    Quality,
    StateChanged,
    Story,
    StoryWarning,
    WarningGiven,
    kind_of,
)

Body = TypeVar("Body", bound=BaseModel)
StateName = Literal[
    "STATE_QUEUED", "STATE_RUNNING", "STATE_WAITING", "STATE_SUCCEEDED", "STATE_FAILED", "STATE_CANCELLED"
]


class CreateStoryBody(BaseModel):
    """Asks for a story. What is left out has its default."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(
        default="",
        description="The first picture, base64: PNG, JPEG, WebP, GIF or TIFF, at most 8 MiB.",
        json_schema_extra={"contentEncoding": "base64"},
    )
    caption: str = Field(default="", description="The first story caption, 1 to 1000 characters.")
    frame_count: int | None = Field(default=None, description="Frames to add, 1 to 20. Default 4.")
    seed: int | None = Field(default=None, description="Below 2^53. Left out: the server picks one.")
    pack: str = Field(default="", description="Empty means the default pack.")
    steps: int | None = Field(default=None, description="Denoising steps a frame, 1 to 100. Default: the pack's.")
    text_guidance: float | None = Field(default=None, description="0 to 30. Default: the pack's.")
    image_guidance: float | None = Field(default=None, description="0 to 30. Default: the pack's.")
    temperature: float | None = Field(default=None, description="Of the captions, 0 to 2. Default 0.2.")
    quality: str = Field(  # checked with the other options, to be refused as they are
        default=DEFAULT_QUALITY,
        description="How much time a frame is worth. draft is fastest, best takes longest. Steps and guidance that are "
        "set count more.",
        json_schema_extra={"enum": list(QUALITIES)},
    )
    characters: list[str] = Field(
        default=[],
        description="Published characters, at most eight: names, which stand for the newest version on the pack, or "
        "version ids. Frames that name them are drawn with their weights.",
    )


class CreateStoryForm(CreateStoryBody):
    """The same as a form: the picture is a file."""

    image: str = Field(default="", description="The first picture.", json_schema_extra={"format": "binary"})


class StorySettingsDocument(BaseModel):
    """What the story was asked for, defaults filled in. Null: the pack's default, known once a frame is drawn."""

    frame_count: int
    seed: int
    pack: str
    steps: int | None
    text_guidance: float | None
    image_guidance: float | None
    temperature: float
    quality: Quality


class StoryCharacterDocument(BaseModel):
    """Somebody who was learned, as the story has them."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    phrase: str = Field(description="What they look like.")
    version_id: str = Field(description="The published version that is drawn.")


class StoryErrorDocument(BaseModel):
    """Why a story stopped or waits."""

    reason: str
    message: str


class WarningDocument(BaseModel):
    """What the pack does not know of the given picture or caption. The story goes on all the same."""

    reason: str = Field(description="Stable: WORDS_UNFAMILIAR, NAME_UNFAMILIAR or PICTURE_UNFAMILIAR. More may come.")
    message: str = Field(description="What the pack does not know and what it does know, for a person.")
    field: str = Field(description="What it is about: caption or image.")
    metadata: dict[str, str]


class FrameTimingsDocument(BaseModel):
    """Where a frame's time went, in seconds."""

    caption_s: float | None
    description_s: float | None
    queue_s: float | None
    render_s: float | None


class FrameDocument(BaseModel):
    """One frame; what is not made yet is empty."""

    index: int
    caption: str
    description: str
    image_sha256: str
    image_url: str = Field(description="Path of the picture on this edge; empty while it is not drawn.")
    width_px: int
    height_px: int
    image_seed: int
    caption_seed: int
    description_seed: int
    timings: FrameTimingsDocument | None
    pack_digest: str
    engine_fingerprint: str
    create_time: datetime | None
    version: int = Field(description="1 as the story made it, one more with each edit.")
    stale: bool = Field(description="An earlier frame was edited since: the two may no longer agree.")
    edit_strength: float = Field(description="How much of the version before was drawn anew; 0: made of noise.")


class EditFrameBody(BaseModel):
    """Asks to draw a frame again, made of its own picture. What is left out stays, or has its default."""

    model_config = ConfigDict(extra="forbid")

    strength: float | None = Field(
        default=None, description="How much of the picture is drawn anew, above 0 and at most 1. Default 0.5."
    )
    caption: str | None = Field(default=None, description="The frame's new caption. Default: the old one.")
    description: str | None = Field(
        default=None,
        description="What to draw. Default: what the caption service makes of a new caption, else the old one.",
    )
    seed: int | None = Field(default=None, description="Below 2^53. Default: derived from the story's.")


class InsertFrameBody(BaseModel):
    """Asks for a new frame between two."""

    model_config = ConfigDict(extra="forbid")

    caption: str = Field(default="", description="The new frame's caption, 1 to 1000 characters.")
    description: str | None = Field(
        default=None, description="What to draw. Default: what the caption service makes of the caption."
    )
    seed: int | None = Field(default=None, description="Below 2^53. Default: derived from the story's.")


class StoryDocument(BaseModel):
    """One story as it stands."""

    story_id: str
    state: StateName
    settings: StorySettingsDocument
    frames: list[FrameDocument]
    create_time: datetime
    update_time: datetime
    error: StoryErrorDocument | None
    last_sequence: int
    warnings: list[WarningDocument] = Field(
        default=[], description="At most one for each reason and field, in the order noticed. Empty in lists."
    )
    earlier_versions: list[FrameDocument] = Field(
        default=[], description="Frames as they were before edits, by index, then by version. Empty in lists."
    )
    characters: list[StoryCharacterDocument] = Field(
        default=[], description="Who was learned and is told of, in the order asked for."
    )


class StoryListDocument(BaseModel):
    """A page of stories, newest first, without frames. An empty token is the end."""

    stories: list[StoryDocument]
    next_page_token: str


class QualitySettingsDocument(BaseModel):
    """How frames of one quality are drawn, unless a request says more."""

    model_config = ConfigDict(from_attributes=True)

    quality: Quality
    steps: int
    text_guidance: float
    image_guidance: float


class DrawingDocument(BaseModel):
    """How a pack draws, and what may be asked of it. 0 and []: the frame service is of a version that does not tell."""

    model_config = ConfigDict(from_attributes=True)

    width_px: int = Field(description="Its own width, which stories have.")
    height_px: int = Field(description="Its own height, which stories have.")
    min_side_px: int = Field(description="Least width and least height of a single frame.")
    side_multiple_px: int = Field(description="Width and height are multiples of it.")
    max_area_px: int = Field(description="Most pixels of a frame: its width times its height.")
    default_steps: int
    max_steps: int = Field(description="Most steps that a story may ask for.")
    default_text_guidance: float
    default_image_guidance: float
    max_references: int = Field(description="Most earlier frames it looks at; 0: each frame is drawn for itself.")
    features: list[Feature] = Field(description="Only what can be asked for is here. More may come.")
    samplers: list[str] = Field(description="Its own is the first.")
    qualities: list[QualitySettingsDocument] = Field(description="The fastest first.")


class BackendDocument(BaseModel):
    """A pack as the services of this installation have it."""

    model_config = ConfigDict(from_attributes=True)

    pack: str
    digest: str = Field(description="Of its manifest: changes when any weight changes.")
    architecture: str
    is_default: bool = Field(description="Whether this is the pack of a story that names none.")
    drawing: DrawingDocument | None = Field(description="Null: the frame service has not got it, or is silent.")
    writes: bool = Field(description="False: the caption service has not got it, or is silent.")
    tells_stories: bool = Field(description="It draws and writes, so a story can be told with it now.")
    base_digest: str = Field(description="Of the network that draws, as learned characters name it. Empty: not told.")


class BackendListDocument(BaseModel):
    """What this installation can do now: its packs, the default one first, then by name."""

    model_config = ConfigDict(from_attributes=True)

    backends: list[BackendDocument]
    unavailable_services: list[str] = Field(
        description="caption or frame, where it did not answer. What only it knows is missing."
    )


class ProblemDocument(BaseModel):
    """RFC 9457. `reason` is the stable name of what went wrong, the same as over gRPC."""

    type: str
    title: str
    status: int
    detail: str
    reason: str
    metadata: dict[str, str] = {}
    errors: list[dict[str, str]] = Field(default=[], description="Fields that are wrong: field, description.")
    retry_after_s: float | None = Field(default=None, description="Set only when trying again can work.")


class EventDocument(BaseModel):
    """The data of one server-sent event; the event's name says which of the last fields is set."""

    sequence: int = Field(description="Place in the story's log; 0 for passing events. Also the event's id.")
    story_id: str
    event_time: datetime
    state_changed: dict[str, Any] | None = Field(default=None, description="state, error")
    caption_written: dict[str, Any] | None = Field(default=None, description="frame_index, caption")
    description_written: dict[str, Any] | None = Field(default=None, description="frame_index, description")
    frame_finished: dict[str, Any] | None = Field(default=None, description="frame")
    warning_given: dict[str, Any] | None = Field(default=None, description="warning")
    frame_edited: dict[str, Any] | None = Field(default=None, description="frame, stale_frame_indexes")
    frame_inserted: dict[str, Any] | None = Field(default=None, description="frame")
    frame_queued: dict[str, Any] | None = Field(default=None, description="frame_index, ahead_count")
    frame_progress: dict[str, Any] | None = Field(default=None, description="frame_index, step, step_count, eta_s")
    frame_preview: dict[str, Any] | None = Field(default=None, description="frame_index, image (base64 WebP), step")


class HealthDocument(BaseModel):
    """How the process is."""

    status: Literal["ok", "unavailable"]
    detail: str = ""


def read_json_body(data: bytes, request_id: str) -> StoryRequest:
    """A CreateStory request from JSON. Raises UnknownField, InvalidArgument, ImageUnreadable."""
    try:
        body = CreateStoryBody.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise refusal(error) from None
    try:
        image = base64.b64decode(body.image, validate=True)
    except (binascii.Error, ValueError):
        raise ImageUnreadable("image is not base64", field="image") from None
    return _request(body, image, request_id)


def read_edit_body(data: bytes, story_id: str, index: int, request_id: str) -> EditRequest:
    """An EditFrame request from JSON; no body asks for the defaults. Raises UnknownField, InvalidArgument."""
    body = _read(EditFrameBody, data)
    return EditRequest(story_id=story_id, frame_index=index, request_id=request_id, **body.model_dump())


def read_insert_body(data: bytes, story_id: str, after_index: int, request_id: str) -> InsertRequest:
    """An InsertFrame request from JSON. Raises UnknownField, InvalidArgument."""
    body = _read(InsertFrameBody, data)
    return InsertRequest(story_id=story_id, after_frame_index=after_index, request_id=request_id, **body.model_dump())


def _read(kind: type[Body], data: bytes) -> Body:
    try:
        return kind.model_validate_json(data or b"{}", strict=True)
    except ValidationError as error:
        raise refusal(error) from None


def read_form(fields: dict[str, str | list[str]], image: bytes, request_id: str) -> StoryRequest:
    """A CreateStory request from a form. Raises UnknownField, InvalidArgument."""
    try:
        body = CreateStoryForm.model_validate(fields)
    except ValidationError as error:
        raise refusal(error) from None
    return _request(body, image, request_id)


def _request(body: CreateStoryBody, image: bytes, request_id: str) -> StoryRequest:
    values = {name: getattr(body, name) for name in CreateStoryBody.model_fields if name != "image"}
    return StoryRequest(image=image, request_id=request_id, **{**values, "characters": tuple(body.characters)})


def refusal(error: ValidationError) -> InvalidArgument:
    """What is wrong with a body or a form, every field of it."""
    found = error.errors(include_url=False, include_input=False)
    violations = tuple(FieldViolation(".".join(map(str, item["loc"])), item["msg"]) for item in found)
    unknown = [item for item in found if item["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(".".join(map(str, item["loc"])) for item in unknown)
        return UnknownField(
            f"there is no field {names}; check its spelling", metadata={"field": names}, field_violations=violations
        )
    text = "; ".join(f"{violation.field or 'body'}: {violation.description}" for violation in violations)
    return InvalidArgument(text, field_violations=violations)


def problem(error: FabulaError) -> ProblemDocument:
    """An error as RFC 9457 has it."""
    return ProblemDocument(
        type=f"urn:fabula:error:{error.reason}",
        title=(type(error).__doc__ or "").strip().split("\n", 1)[0],
        status=error.http_status,
        detail=error.message,
        reason=error.reason,
        metadata=error.metadata,
        errors=[{"field": v.field, "description": v.description} for v in error.field_violations],
        retry_after_s=error.retry_after_s,
    )


def story_document(story: Story) -> StoryDocument:
    """One story."""
    options = story.options
    return StoryDocument(
        story_id=story.story_id,
        state=f"STATE_{story.state.value}",  # type: ignore[arg-type]  # one of StateName, by construction
        settings=StorySettingsDocument(**{name: getattr(options, name) for name in StorySettingsDocument.model_fields}),
        frames=[frame_document(story.story_id, frame) for frame in story.frames],
        create_time=_time(story.create_us),
        update_time=_time(story.update_us),
        error=StoryErrorDocument(reason=story.reason, message=story.message) if story.reason else None,
        last_sequence=story.last_sequence,
        warnings=[warning_document(each) for each in story.warnings],
        earlier_versions=[frame_document(story.story_id, frame) for frame in story.earlier_versions],
        characters=[StoryCharacterDocument.model_validate(one) for one in options.characters],
    )


def warning_document(told: StoryWarning) -> WarningDocument:
    """One warning."""
    return WarningDocument(reason=told.reason, message=told.message, field=told.field, metadata=dict(told.metadata))


def frame_document(story_id: str, frame: Frame) -> FrameDocument:
    """One frame."""
    drawn_by_us = frame.caption_s is not None
    return FrameDocument(
        index=frame.index,
        caption=frame.caption,
        description=frame.description or "",
        image_sha256=frame.image_sha256 or "",
        image_url=f"/v1/stories/{story_id}/images/{frame.image_sha256}" if frame.image_sha256 else "",
        width_px=frame.width_px,
        height_px=frame.height_px,
        image_seed=frame.image_seed,
        caption_seed=frame.caption_seed,
        description_seed=frame.description_seed,
        timings=FrameTimingsDocument(**{name: getattr(frame, name) for name in FrameTimingsDocument.model_fields})
        if drawn_by_us
        else None,
        pack_digest=frame.pack_digest,
        engine_fingerprint=frame.engine_fingerprint,
        create_time=None if frame.create_us is None else _time(frame.create_us),
        version=frame.version,
        stale=frame.stale,
        edit_strength=frame.edit_strength,
    )


def event_document(event: Event) -> dict[str, Any]:
    """One event, only the field that is set."""
    what = event.what
    content: dict[str, Any]
    match what:
        case StateChanged(state=state, reason=reason, message=message):
            content = {
                "state": f"STATE_{state.value}",
                "error": {"reason": reason, "message": message} if reason else None,
            }
        case FrameFinished(frame=frame):
            content = {"frame": frame_document(event.story_id, frame).model_dump(mode="json")}
        case FrameEdited(frame=frame, stale_frame_indexes=stale):
            edited = frame_document(event.story_id, frame).model_dump(mode="json")
            content = {"frame": edited, "stale_frame_indexes": list(stale)}
        case FrameInserted(frame=frame):
            content = {"frame": frame_document(event.story_id, frame).model_dump(mode="json")}
        case WarningGiven(warning=warning):
            content = {"warning": warning_document(warning).model_dump(mode="json")}
        case FramePreview(frame_index=index, image=image, step=step):
            content = {"frame_index": index, "image": base64.b64encode(image).decode(), "step": step}
        case _:
            content = {name: getattr(what, name) for name in what.__dataclass_fields__}
    return {
        "sequence": event.sequence,
        "story_id": event.story_id,
        "event_time": _time(event.time_us).isoformat(),
        kind_of(what): content,
    }


def backends_document(found: Backends) -> BackendListDocument:
    """What the installation can do."""
    return BackendListDocument.model_validate(found)


def _time(us: int) -> datetime:
    return datetime.fromtimestamp(us / 1e6, UTC)
