"""What an installation says it can do, alike over gRPC and HTTP, and with a service away."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from fabula.story.v1 import backend_pb2 as pb
from fabula.story.v1 import story_pb2, story_service_pb2
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2

from tests.contract.story.scripted_services import STEPS, Script, ScriptedServices
from tests.contract.story.story_process import StoryProcess

NOWHERE = "127.0.0.1:1"  # nobody listens there


def asked(story: StoryProcess) -> story_service_pb2.ListBackendsResponse:
    return story.stub.ListBackends(story_service_pb2.ListBackendsRequest(), timeout=30)


def asked_over_http(story: StoryProcess) -> dict[str, Any]:
    answer = story.http.get("/v1/backends")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def as_document(message: story_service_pb2.ListBackendsResponse) -> dict[str, Any]:
    """The gRPC answer in HTTP's words."""
    document = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    for backend in document["backends"]:
        if (drawing := backend.setdefault("drawing", None)) is not None:
            drawing["max_area_px"] = int(drawing["max_area_px"])  # JSON of protobuf writes 64 bits as text
            drawing["features"] = [name.removeprefix("FEATURE_").lower() for name in drawing["features"]]
            for each in drawing["qualities"]:
                each["quality"] = each["quality"].removeprefix("QUALITY_").lower()
    return document


def until(condition: Callable[[], bool]) -> None:
    """Wait for services that come back: they are looked for again every second or so."""
    for _ in range(600):
        with contextlib.suppress(grpc.RpcError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError("it never happened")


def test_everything_that_a_pack_can_do_is_told(story: StoryProcess) -> None:
    answer = asked(story)
    assert [backend.pack for backend in answer.backends] == ["toon", "other"], "the default one first"
    assert not answer.unavailable_services
    assert answer.backends[0] == pb.Backend(
        pack="toon",
        digest="toon-drawn",
        architecture="storygen",
        is_default=True,
        writes=True,
        tells_stories=True,
        base_digest="toon-network",
        drawing=pb.Drawing(
            width_px=32,
            height_px=40,
            min_side_px=16,
            side_multiple_px=8,
            max_area_px=5120,
            default_steps=STEPS,
            max_steps=60,
            default_text_guidance=7.0,
            default_image_guidance=3.5,
            max_references=3,
            features=[pb.FEATURE_REFERENCES, pb.FEATURE_CHARACTERS, pb.FEATURE_EDIT, pb.FEATURE_INSERT],
            samplers=["ddim", "euler"],
            qualities=[
                pb.QualitySettings(quality=story_pb2.QUALITY_DRAFT, steps=4, text_guidance=1.0, image_guidance=1.25),
                pb.QualitySettings(
                    quality=story_pb2.QUALITY_STANDARD, steps=STEPS, text_guidance=7.0, image_guidance=1.25
                ),
                pb.QualitySettings(quality=story_pb2.QUALITY_BEST, steps=16, text_guidance=7.5, image_guidance=1.25),
            ],
        ),
    )


def test_both_edges_say_the_same(story: StoryProcess, script: Script) -> None:
    script.writers_alone, script.drawers_alone = ["pen"], ["brush"]
    document = asked_over_http(story)
    assert document == as_document(asked(story))
    assert document["backends"][0]["drawing"]["features"] == ["references", "characters", "edit", "insert"]


def test_a_pack_that_only_one_service_has_tells_no_stories(story: StoryProcess, script: Script) -> None:
    script.writers_alone, script.drawers_alone = ["pen"], ["brush"]
    answer = asked(story)
    assert [backend.pack for backend in answer.backends] == ["toon", "brush", "other", "pen"]
    _, brush, _, pen = answer.backends
    assert (brush.writes, brush.tells_stories, brush.HasField("drawing")) == (False, False, True)
    assert (pen.writes, pen.tells_stories, pen.HasField("drawing")) == (True, False, False)
    assert (pen.digest, pen.architecture) == ("pen-written", "llava")


@pytest.mark.parametrize(("away", "draws", "writes"), [("caption", True, False), ("frame", False, True)])
def test_a_silent_service_is_named_and_the_other_one_counts(
    new_story: Callable[..., StoryProcess], away: str, draws: bool, writes: bool
) -> None:
    story = new_story(**{f"STORY_{away.upper()}_TARGET": NOWHERE})
    answer = asked(story)
    assert list(answer.unavailable_services) == [away]
    assert [backend.pack for backend in answer.backends] == ["toon", "other"]
    for backend in answer.backends:
        assert (backend.HasField("drawing"), backend.writes, backend.tells_stories) == (draws, writes, False)
    assert asked_over_http(story) == as_document(answer)


def test_with_both_services_away_nobody_can_say(story: StoryProcess, services: ScriptedServices) -> None:
    before = asked(story)
    services.stop()
    try:
        with pytest.raises(grpc.RpcError) as refused:
            asked(story)
        over_http = story.http.get("/v1/backends")
    finally:
        services.start()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    status = status_pb2.Status.FromString(dict(refused.value.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, dict(info.metadata)) == ("UNAVAILABLE", {"services": "caption,frame"})
    assert over_http.status_code == 503
    assert over_http.headers["content-type"] == "application/problem+json"
    assert "retry-after" in over_http.headers
    assert (over_http.json()["reason"], over_http.json()["metadata"]) == ("UNAVAILABLE", {"services": "caption,frame"})
    until(lambda: asked(story) == before)


def test_the_openapi_document_describes_the_answer(story: StoryProcess) -> None:
    schema = story.http.get("/openapi.json").json()
    operation = schema["paths"]["/v1/backends"]["get"]
    content = operation["responses"]["200"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/BackendListDocument"}
    parts = schema["components"]["schemas"]
    document = asked_over_http(story)
    for name, value in (
        ("BackendListDocument", document),
        ("BackendDocument", document["backends"][0]),
        ("DrawingDocument", document["backends"][0]["drawing"]),
        ("QualitySettingsDocument", document["backends"][0]["drawing"]["qualities"][0]),
    ):
        assert set(parts[name]["properties"]) == set(value) == set(parts[name]["required"])
