"""Typed client of Fabula, async and sync: one picture and one sentence become a story.

    from fabula_client import Client

    with Client() as client:
        story = client.stories.create(image="first.png", caption="Pip finds a kite.", frame_count=4, seed=7)
        for event in story.watch():
            print(event)
        open("frame1.png", "wb").write(story.read_image(1))

Calls are tried again only when that is safe and can help (`retrying`), `watch` survives restarts of the service, and
every error says what to do (`errors`). Depends on grpcio and Fabula's protos only.
"""

from fabula_client.aio import DEFAULT_TARGET, AsyncClient, AsyncStories, AsyncStory
from fabula_client.backends import Backend, Backends, Drawing, Feature, QualitySettings
from fabula_client.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FabulaError,
    FailedPrecondition,
    FieldViolation,
    IdempotencyKeyReused,
    ImageCorrupt,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServerError,
    StoryCancelled,
    StoryFailed,
    Unauthenticated,
    Unavailable,
    WaitTimedOut,
)
from fabula_client.retrying import RetryPolicy
from fabula_client.story import (
    CaptionWritten,
    DescriptionWritten,
    Frame,
    FrameEdited,
    FrameFinished,
    FrameInserted,
    FramePreview,
    FrameProgress,
    FrameQueued,
    FrameTimings,
    Quality,
    Reason,
    State,
    StateChanged,
    Story,
    StoryEvent,
    StorySettings,
    StoryWarning,
    WarningGiven,
)
from fabula_client.sync import Client, Stories, StoryHandle
from fabula_client.tracing import tracing

__all__ = [
    "DEFAULT_TARGET",
    "AsyncClient",
    "AsyncStories",
    "AsyncStory",
    "Backend",
    "Backends",
    "Cancelled",
    "CaptionWritten",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "DescriptionWritten",
    "Drawing",
    "FabulaError",
    "FailedPrecondition",
    "Feature",
    "FieldViolation",
    "Frame",
    "FrameEdited",
    "FrameFinished",
    "FrameInserted",
    "FramePreview",
    "FrameProgress",
    "FrameQueued",
    "FrameTimings",
    "IdempotencyKeyReused",
    "ImageCorrupt",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "Quality",
    "QualitySettings",
    "Reason",
    "ResourceExhausted",
    "RetryPolicy",
    "ServerError",
    "State",
    "StateChanged",
    "Stories",
    "Story",
    "StoryCancelled",
    "StoryEvent",
    "StoryFailed",
    "StoryHandle",
    "StorySettings",
    "StoryWarning",
    "Unauthenticated",
    "Unavailable",
    "WaitTimedOut",
    "WarningGiven",
    "tracing",
]
