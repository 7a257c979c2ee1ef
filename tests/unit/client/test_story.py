"""Values from the wire: nothing is lost, nothing is guessed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import get_args

import pytest
from fabula.story.v1 import story_pb2 as pb
from fabula.warning.v1 import warning_pb2
from fabula_client import story as nouns
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def test_a_story_keeps_every_field() -> None:
    message = pb.Story(
        story_id="s1",
        state=pb.Story.STATE_WAITING,
        settings=pb.StorySettings(
            frame_count=4, seed=2**53 - 1, pack="toon", steps=25, text_guidance=7.5, quality=pb.QUALITY_DRAFT
        ),
        frames=[
            pb.Frame(
                index=1,
                caption="c",
                description="d",
                image_sha256="ab",
                width_px=128,
                height_px=128,
                image_seed=3,
                caption_seed=4,
                description_seed=5,
                timings=pb.FrameTimings(render_duration=Duration(seconds=2, nanos=500_000_000)),
                pack_digest="p",
            )
        ],
        create_time=Timestamp(seconds=1_700_000_000),
        error=pb.StoryError(reason="UNAVAILABLE", message="away"),
        last_sequence=9,
        warnings=[
            warning_pb2.Warning(
                reason="WORDS_UNFAMILIAR", message="m", field="caption", metadata={"words": "robot,laser"}
            )
        ],
        characters=[pb.StoryCharacter(name="Rosa", phrase="a pink pig", version_id="ab")],
    )
    story = nouns.story_from_pb(message)
    assert story.state is nouns.State.WAITING
    assert not story.ended
    assert story.settings.seed == 2**53 - 1
    assert story.settings.quality == "draft"
    assert story.created == datetime.fromtimestamp(1_700_000_000, UTC)
    assert story.updated is None
    assert story.error == nouns.Reason(reason="UNAVAILABLE", message="away")
    assert story.warnings == (
        nouns.StoryWarning(reason="WORDS_UNFAMILIAR", message="m", field="caption", metadata={"words": "robot,laser"}),
    )
    assert story.characters == (nouns.StoryCharacter(name="Rosa", phrase="a pink pig", version_id="ab"),)
    frame = story.frames[0]
    assert (frame.image_seed, frame.caption_seed, frame.description_seed) == (3, 4, 5)
    assert frame.timings is not None
    assert frame.timings.total_s == 2.5
    assert not frame.given


def test_an_unset_error_is_none_and_the_given_frame_has_no_timings() -> None:
    story = nouns.story_from_pb(pb.Story(frames=[pb.Frame(index=0)]))
    assert story.error is None
    assert story.warnings == ()
    assert story.frames[0].given
    assert story.frames[0].timings is None


@pytest.mark.parametrize("state", list(pb.Story.State.values()))
def test_every_state_of_the_proto_is_known(state: int) -> None:
    known = nouns.state_from_pb(state)
    assert (known is nouns.State.UNKNOWN) == (state == pb.Story.STATE_UNSPECIFIED)


def test_a_state_of_a_newer_service_is_unknown_and_has_not_ended() -> None:
    assert nouns.state_from_pb(99) is nouns.State.UNKNOWN  # type: ignore[arg-type]
    assert not nouns.State.UNKNOWN.ended


@pytest.mark.parametrize("number", list(pb.Quality.values()))
def test_every_quality_of_the_proto_is_known(number: int) -> None:
    known = nouns.quality_from_pb(number)  # type: ignore[arg-type]
    assert known in get_args(nouns.Quality)
    if number != pb.QUALITY_UNSPECIFIED:
        assert pb.Quality.Value(f"QUALITY_{known.upper()}") == number


def test_an_older_service_means_standard_and_a_newer_one_something_unknown() -> None:
    assert nouns.story_from_pb(pb.Story()).settings.quality == "standard"
    assert nouns.quality_from_pb(99) == "unknown"  # type: ignore[arg-type]


def test_every_event_of_the_proto_has_a_class() -> None:
    for field in pb.StoryEvent.DESCRIPTOR.oneofs_by_name["event"].fields:
        message = pb.StoryEvent(sequence=3, story_id="s1")
        getattr(message, field.name).SetInParent()
        event = nouns.event_from_pb(message)
        assert type(event) is not nouns.StoryEvent, field.name
        assert event.sequence == 3


def test_a_warning_arrives_as_an_event_too() -> None:
    warning = warning_pb2.Warning(reason="NAME_UNFAMILIAR", message="m", field="caption", metadata={"names": "Zed"})
    event = nouns.event_from_pb(pb.StoryEvent(sequence=3, warning_given=pb.WarningGiven(warning=warning)))
    assert isinstance(event, nouns.WarningGiven)
    assert event.warning.metadata == {"names": "Zed"}


def test_an_event_of_a_newer_service_still_counts() -> None:
    event = nouns.event_from_pb(pb.StoryEvent(sequence=7, story_id="s1"))
    assert type(event) is nouns.StoryEvent
    assert event.sequence == 7
