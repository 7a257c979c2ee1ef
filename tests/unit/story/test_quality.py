"""How much time a frame is worth: the same three words in every document and message."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from fabula.story.v1 import story_pb2
from fabula.story.v1 import story_service_pb2 as pb

from services.runtime.errors import InvalidArgument
from services.story.api_grpc import story_request_from_pb
from services.story.backends import FrameBackend
from services.story.documents import CreateStoryBody, read_form, read_json_body, story_document
from services.story.intake import check_options
from services.story.protobuf import story_to_pb
from services.story.records import QUALITIES, Options, Quality, State, Story

NUMBERS = {
    "draft": story_pb2.QUALITY_DRAFT,
    "standard": story_pb2.QUALITY_STANDARD,
    "best": story_pb2.QUALITY_BEST,
}


def made(quality: Quality) -> Story:
    options = Options(frame_count=1, seed=1, pack="toon", temperature=0.2, quality=quality)
    return Story(
        story_id="s", state=State.QUEUED, options=options, frames=(), create_us=0, update_us=0, last_sequence=1
    )


def test_every_quality_of_the_proto_has_its_word() -> None:
    assert set(NUMBERS) == set(QUALITIES)
    assert {*NUMBERS.values(), story_pb2.QUALITY_UNSPECIFIED} == set(story_pb2.Quality.values())
    assert dict(story_pb2.Quality.items()) == dict(frame_pb.Quality.items())


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_quality_is_read_and_shown_alike_over_both_protocols(quality: Quality) -> None:
    over_grpc = story_request_from_pb(pb.CreateStoryRequest(image=b"i", caption="c", quality=NUMBERS[quality]))
    over_http = read_json_body(json.dumps({"image": "aQ==", "caption": "c", "quality": quality}).encode(), "")
    as_form = read_form({"caption": "c", "quality": quality}, b"i", "")
    assert over_grpc == over_http == as_form
    assert check_options(over_grpc, default_pack="toon").quality == quality
    assert story_to_pb(made(quality)).settings.quality == NUMBERS[quality]
    assert story_document(made(quality)).settings.quality == quality


def test_who_says_nothing_means_standard() -> None:
    over_grpc = story_request_from_pb(pb.CreateStoryRequest(image=b"i", caption="c"))
    over_http = read_json_body(b'{"image": "aQ==", "caption": "c"}', "")
    assert over_grpc == over_http
    said = story_request_from_pb(pb.CreateStoryRequest(image=b"i", caption="c", quality=story_pb2.QUALITY_STANDARD))
    assert over_grpc.body_sha256() == said.body_sha256()


@pytest.mark.parametrize("number", [4, 99, -1])
def test_a_number_that_is_no_quality_is_refused_by_the_fields_name(number: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_options(story_request_from_pb(pb.CreateStoryRequest(quality=number)), default_pack="toon")
    assert (caught.value.reason, caught.value.metadata["value"]) == ("VALUE_OUT_OF_RANGE", str(number))
    assert [violation.field for violation in caught.value.field_violations] == ["quality"]


@pytest.mark.parametrize("value", [None, 2, True, ["draft"]])
def test_json_that_is_no_word_is_refused_by_the_fields_name(value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_json_body(json.dumps({"image": "", "caption": "c", "quality": value}).encode(), "")
    assert [violation.field for violation in caught.value.field_violations] == ["quality"]


def test_the_schema_says_which_words_there_are() -> None:
    shown = CreateStoryBody.model_json_schema()["properties"]["quality"]
    assert (shown["enum"], shown["default"]) == (["draft", "standard", "best"], "standard")


class Channel:
    """Notes the request and answers with a picture."""

    grpc_channel: Any = None

    async def stream(self, _method: Any, request: Any, *, timeout_s: float) -> AsyncIterator[Any]:
        self.request = request
        frame = frame_pb.RenderedFrame(image=b"p", sha256=hashlib.sha256(b"p").hexdigest())
        yield frame_pb.RenderFrameResponse(frame=frame)


@pytest.mark.parametrize("quality", QUALITIES)
async def test_the_frame_service_is_told(monkeypatch: pytest.MonkeyPatch, quality: Quality) -> None:
    class Stub:
        RenderFrame = None

    monkeypatch.setattr("services.story.backends.frame_grpc.FrameServiceStub", lambda _channel: Stub)
    channel = Channel()
    await FrameBackend(channel, timeout_s=1, preview_every_steps=0).render(  # type: ignore[arg-type]
        frame_index=1,
        pack="toon",
        description="d",
        references=(),
        given=None,
        seed=1,
        steps=None,
        text_guidance=None,
        image_guidance=None,
        quality=quality,
        on_passing=lambda _what: None,
    )
    assert frame_pb.Quality.Name(channel.request.quality) == f"QUALITY_{quality.upper()}"
    assert not channel.request.HasField("text_guidance")
