"""Records to protobuf messages of the public API, field by field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fabula.story.v1 import backend_pb2
from fabula.story.v1 import story_pb2 as pb
from fabula.warning.v1 import warning_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.story.backends import Backend, Drawing, Feature
from services.story.records import (
    CaptionWritten,
    DescriptionWritten,
    Event,
    Frame,
    FrameEdited,
    FrameFinished,
    FrameInserted,
    FramePreview,
    FrameProgress,
    FrameQueued,
    Quality,
    State,
    StateChanged,
    Story,
    StoryWarning,
    WarningGiven,
)


def story_to_pb(story: Story) -> Any:
    """The whole story. Options that only the first drawn frame will reveal are zero until then."""
    options = story.options
    return pb.Story(
        story_id=story.story_id,
        state=state_to_pb(story.state),
        settings=pb.StorySettings(
            frame_count=options.frame_count,
            seed=options.seed,
            pack=options.pack,
            steps=options.steps or 0,
            text_guidance=options.text_guidance or 0.0,
            image_guidance=options.image_guidance or 0.0,
            temperature=options.temperature,
            quality=quality_to_pb(options.quality),
        ),
        frames=[frame_to_pb(frame) for frame in story.frames],
        create_time=timestamp(story.create_us),
        update_time=timestamp(story.update_us),
        error=error_to_pb(story.reason, story.message),
        last_sequence=story.last_sequence,
        warnings=[warning_to_pb(each) for each in story.warnings],
        earlier_versions=[frame_to_pb(frame) for frame in story.earlier_versions],
        characters=[
            pb.StoryCharacter(name=one.name, phrase=one.phrase, version_id=one.version_id) for one in options.characters
        ],
    )


def frame_to_pb(frame: Frame) -> Any:
    """One frame; what is not made yet is empty."""
    message = pb.Frame(
        index=frame.index,
        caption=frame.caption,
        description=frame.description or "",
        image_sha256=frame.image_sha256 or "",
        width_px=frame.width_px,
        height_px=frame.height_px,
        image_seed=frame.image_seed,
        caption_seed=frame.caption_seed,
        description_seed=frame.description_seed,
        pack_digest=frame.pack_digest,
        engine_fingerprint=frame.engine_fingerprint,
        version=frame.version,
        stale=frame.stale,
        edit_strength=frame.edit_strength,
    )
    if frame.create_us is not None:
        message.create_time.CopyFrom(timestamp(frame.create_us))
    for name, seconds in (
        ("caption_duration", frame.caption_s),
        ("description_duration", frame.description_s),
        ("queue_duration", frame.queue_s),
        ("render_duration", frame.render_s),
    ):
        if seconds is not None:
            getattr(message.timings, name).CopyFrom(duration(seconds))
    return message


def event_to_pb(event: Event) -> Any:
    """One event, durable or passing."""
    message = pb.StoryEvent(sequence=event.sequence, story_id=event.story_id, event_time=timestamp(event.time_us))
    match event.what:
        case StateChanged(state=state, reason=reason, message=text):
            message.state_changed.CopyFrom(pb.StateChanged(state=state_to_pb(state), error=error_to_pb(reason, text)))
        case CaptionWritten(frame_index=index, caption=caption):
            message.caption_written.CopyFrom(pb.CaptionWritten(frame_index=index, caption=caption))
        case DescriptionWritten(frame_index=index, description=description):
            message.description_written.CopyFrom(pb.DescriptionWritten(frame_index=index, description=description))
        case FrameFinished(frame=frame):
            message.frame_finished.CopyFrom(pb.FrameFinished(frame=frame_to_pb(frame)))
        case WarningGiven(warning=warning):
            message.warning_given.CopyFrom(pb.WarningGiven(warning=warning_to_pb(warning)))
        case FrameEdited(frame=frame, stale_frame_indexes=stale):
            edited = pb.FrameEdited(frame=frame_to_pb(frame), stale_frame_indexes=stale)
            message.frame_edited.CopyFrom(edited)
        case FrameInserted(frame=frame):
            message.frame_inserted.CopyFrom(pb.FrameInserted(frame=frame_to_pb(frame)))
        case FrameQueued(frame_index=index, ahead_count=ahead):
            message.frame_queued.CopyFrom(pb.FrameQueued(frame_index=index, ahead_count=ahead))
        case FrameProgress(frame_index=index, step=step, step_count=count, eta_s=eta_s):
            progress = pb.FrameProgress(frame_index=index, step=step, step_count=count, eta=duration(eta_s))
            message.frame_progress.CopyFrom(progress)
        case FramePreview(frame_index=index, image=image, step=step):
            message.frame_preview.CopyFrom(pb.FramePreview(frame_index=index, image=image, step=step))
    return message


def state_to_pb(state: State) -> Any:
    """The enum value."""
    return pb.Story.State.Value(f"STATE_{state.value}")


def quality_to_pb(quality: Quality) -> Any:
    """The enum value."""
    return pb.Quality.Value(f"QUALITY_{quality.upper()}")


def error_to_pb(reason: str, message: str) -> Any:
    """Why a story failed or waits; None when it does neither."""
    return pb.StoryError(reason=reason, message=message) if reason else None


def warning_to_pb(told: StoryWarning) -> Any:
    """One warning."""
    return warning_pb2.Warning(reason=told.reason, message=told.message, field=told.field, metadata=dict(told.metadata))


def backends_to_pb(backends: Iterable[Backend]) -> list[Any]:
    """The packs of an installation."""
    return [
        backend_pb2.Backend(
            pack=each.pack,
            digest=each.digest,
            architecture=each.architecture,
            is_default=each.is_default,
            drawing=drawing_to_pb(each.drawing) if each.drawing else None,
            writes=each.writes,
            tells_stories=each.tells_stories,
            base_digest=each.base_digest,
        )
        for each in backends
    ]


def drawing_to_pb(drawing: Drawing) -> Any:
    """How a pack draws."""
    return backend_pb2.Drawing(
        width_px=drawing.width_px,
        height_px=drawing.height_px,
        min_side_px=drawing.min_side_px,
        side_multiple_px=drawing.side_multiple_px,
        max_area_px=drawing.max_area_px,
        default_steps=drawing.default_steps,
        max_steps=drawing.max_steps,
        default_text_guidance=drawing.default_text_guidance,
        default_image_guidance=drawing.default_image_guidance,
        max_references=drawing.max_references,
        features=[feature_to_pb(feature) for feature in drawing.features],
        samplers=drawing.samplers,
        qualities=[
            backend_pb2.QualitySettings(
                quality=quality_to_pb(each.quality),
                steps=each.steps,
                text_guidance=each.text_guidance,
                image_guidance=each.image_guidance,
            )
            for each in drawing.qualities
        ],
    )


def feature_to_pb(feature: Feature) -> Any:
    """The enum value."""
    return backend_pb2.Feature.Value(f"FEATURE_{feature.upper()}")


def timestamp(us: int) -> Timestamp:
    """Microseconds since 1970 UTC as a Timestamp."""
    stamp = Timestamp()
    stamp.FromMicroseconds(us)
    return stamp


def duration(seconds: float) -> Duration:
    """Seconds as a Duration."""
    span = Duration()
    span.FromNanoseconds(int(seconds * 1e9))
    return span
