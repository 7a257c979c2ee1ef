"""A story over the real wire: what is made, what the services are asked, what watchers see."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time

import grpc
import pytest
from fabula.frame.v1 import frame_service_pb2
from fabula.story.v1 import story_pb2, story_service_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from services.story.plan import derive_seed
from tests.contract.story.pictures import plain
from tests.contract.story.scripted_services import FINGERPRINT, Script
from tests.contract.story.story_process import StoryProcess

State = story_pb2.Story.State


def finish(story: StoryProcess, **fields: object) -> story_pb2.Story:
    made = story.create(plain(), **fields)
    return story.wait_state(made.story_id, State.STATE_SUCCEEDED, State.STATE_FAILED)


def test_a_story_gets_its_frames(story: StoryProcess, script: Script) -> None:
    made = finish(story, frame_count=5, seed=11)
    assert made.state == State.STATE_SUCCEEDED
    assert [frame.index for frame in made.frames] == [0, 1, 2, 3, 4, 5]
    assert made.frames[0].description == made.frames[0].caption == "Once upon a time."
    for frame in made.frames:
        image = story.image(made.story_id, frame.image_sha256)
        assert hashlib.sha256(image).hexdigest() == frame.image_sha256
        over_http = story.http.get(f"/v1/stories/{made.story_id}/images/{frame.image_sha256}")
        assert over_http.content == image
        assert over_http.headers["content-type"] == "image/png"
    for frame in made.frames[1:]:
        assert frame.image_seed == derive_seed(11, frame.index, "image")
        assert frame.caption_seed == derive_seed(11, frame.index, "caption")
        assert frame.description_seed == derive_seed(11, frame.index, "description")
        assert frame.timings.render_duration.ToNanoseconds() == 500_000_000
        assert frame.timings.queue_duration.ToNanoseconds() == 250_000_000
        assert frame.timings.caption_duration.ToNanoseconds() > 0
    # Options left to the pack are known once it has drawn.
    assert (made.settings.steps, made.settings.text_guidance, made.settings.image_guidance) == (8, 7.0, 3.5)


def test_services_are_asked_with_the_right_history(story: StoryProcess, script: Script) -> None:
    made = finish(story, frame_count=5, seed=3, steps=4, text_guidance=0, temperature=0.7, quality="QUALITY_DRAFT")
    frames = made.frames
    images = [story.image(made.story_id, frame.image_sha256) for frame in frames]
    captions = [request for method, request, _ in script.calls if method == "WriteCaption"]
    describes = [request for method, request, _ in script.calls if method == "Describe"]
    renders = [request for method, request, _ in script.calls if method == "RenderFrame"]
    for k in range(1, 6):
        asked = captions[k - 1]
        assert list(asked.captions) == [frame.caption for frame in frames[:k]]
        assert asked.image == images[k - 1]
        assert asked.sampling.temperature == 0.7
        described = describes[k - 1]
        assert (described.previous_caption, described.caption) == (frames[k - 1].caption, frames[k].caption)
        assert described.image == images[k - 1]
        drawn = renders[k - 1]
        first = max(0, k - 3)
        assert [reference.image for reference in drawn.references] == images[first:k]
        assert [reference.description for reference in drawn.references] == [f.description for f in frames[first:k]]
        assert (drawn.description, drawn.seed, drawn.steps) == (frames[k].description, frames[k].image_seed, 4)
        assert (drawn.HasField("text_guidance"), drawn.text_guidance) == (True, 0.0)
        assert not drawn.HasField("image_guidance")
        assert (drawn.pack, frame_service_pb2.Quality.Name(drawn.quality)) == ("toon", "QUALITY_DRAFT")
    assert story_pb2.Quality.Name(made.settings.quality) == "QUALITY_DRAFT"
    assert story.http.get(f"/v1/stories/{made.story_id}").json()["settings"]["quality"] == "draft"


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_pack_is_shown_no_more_than_it_takes(story: StoryProcess, script: Script, room: int) -> None:
    script.max_references = room
    made = finish(story, frame_count=3)
    assert made.state == State.STATE_SUCCEEDED
    images = [story.image(made.story_id, frame.image_sha256) for frame in made.frames]
    renders = [request for method, request, _ in script.calls if method == "RenderFrame"]
    for k, drawn in enumerate(renders, start=1):
        first = max(0, k - room)
        assert [images.index(reference.image) for reference in drawn.references] == list(range(first, k))
        assert [reference.given for reference in drawn.references] == [number == 0 for number in range(first, k)]


def test_ids_trace_and_deadline_reach_the_services(story: StoryProcess, script: Script) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    request = story_service_pb2.CreateStoryRequest(image=plain(), caption="x", frame_count=1, seed=1)
    metadata = (("fabula-request-id", "my-request"), ("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"))
    made = story.stub.CreateStory(request, timeout=30, metadata=metadata).story
    story.wait_state(made.story_id, State.STATE_SUCCEEDED)
    for _, _, call in script.calls:
        assert call.request_id == "my-request"
        assert call.trace_id == trace_id
        assert 0 < call.remaining_s() <= 900


def test_what_is_beyond_the_pack_is_told_once_and_the_story_goes_on(story: StoryProcess, script: Script) -> None:
    script.strange = ("robot", "Then")  # the pack itself writes the second: that is no concern of the user's
    script.strange_picture = True
    made = finish(story, caption="A robot came.", frame_count=3)
    assert len(made.frames) == 4
    assert [(each.reason, each.field, dict(each.metadata)) for each in made.warnings] == [
        ("WORDS_UNFAMILIAR", "caption", {"words": "robot"}),
        ("PICTURE_UNFAMILIAR", "image", {}),
    ]
    assert made.warnings[0].message == "This pack has never drawn: robot."
    given = [[ref.given for ref in asked.references] for method, asked, _ in script.calls if method == "RenderFrame"]
    assert given == [[True], [True, False], [True, False, False]]
    told = [event for event in story.events(made.story_id) if event.HasField("warning_given")]
    assert [event.warning_given.warning for event in told] == list(made.warnings)
    document = story.http.get(f"/v1/stories/{made.story_id}").json()
    assert document["warnings"][0] == {
        "reason": "WORDS_UNFAMILIAR",
        "message": "This pack has never drawn: robot.",
        "field": "caption",
        "metadata": {"words": "robot"},
    }
    stream = story.http.get(f"/v1/stories/{made.story_id}/events").text
    data = [json.loads(line.removeprefix("data:")) for line in stream.splitlines() if line.startswith("data:")]
    assert [each["warning_given"]["warning"] for each in data if "warning_given" in each] == document["warnings"]
    assert stream.count("event: warning_given") == 2


def test_a_familiar_story_has_no_warnings(story: StoryProcess) -> None:
    made = finish(story, frame_count=1)
    assert list(made.warnings) == []
    assert story.http.get(f"/v1/stories/{made.story_id}").json()["warnings"] == []


def test_the_same_seed_makes_the_same_pictures(story: StoryProcess) -> None:
    first, second, other = (finish(story, seed=seed) for seed in (5, 5, 6))
    shas = [[frame.image_sha256 for frame in made.frames] for made in (first, second, other)]
    assert shas[0] == shas[1]
    assert shas[0][1:] != shas[2][1:]


def test_an_unset_seed_is_picked_and_told(story: StoryProcess) -> None:
    request = story_service_pb2.CreateStoryRequest(image=plain(), caption="x", frame_count=1)
    seeds = {story.stub.CreateStory(request, timeout=30).story.settings.seed for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_events_are_gapless_and_tell_the_whole_story(story: StoryProcess) -> None:
    made = story.create(plain(), frame_count=2)
    events = story.events(made.story_id)
    durable = [event for event in events if event.sequence]
    assert [event.sequence for event in durable] == list(range(1, len(durable) + 1))
    assert [event.WhichOneof("event") for event in durable] == [
        "state_changed",
        "state_changed",
        *["caption_written", "description_written", "frame_finished"] * 2,
        "state_changed",
    ]
    assert [event.state_changed.state for event in durable if event.HasField("state_changed")] == [
        State.STATE_QUEUED,
        State.STATE_RUNNING,
        State.STATE_SUCCEEDED,
    ]
    story_now = story.get(made.story_id)
    assert story_now.last_sequence == durable[-1].sequence
    finished = [event.frame_finished.frame for event in durable if event.HasField("frame_finished")]
    assert finished == list(story_now.frames[1:])
    passing = {event.WhichOneof("event") for event in events if not event.sequence}
    assert passing == {"frame_queued", "frame_progress", "frame_preview"}


def test_a_watch_resumes_anywhere_without_gap_or_duplicate(story: StoryProcess, script: Script) -> None:
    script.step_s = 0.01
    made = story.create(plain(), frame_count=2)
    seen: list[int] = []
    while True:  # leave after each durable event and come back
        call = story.watch(made.story_id, after=seen[-1] if seen else 0)
        event = next((message.event for message in call if message.event.sequence), None)
        call.cancel()
        if event is None:
            break
        seen.append(event.sequence)
        if event.HasField("state_changed") and event.state_changed.state == State.STATE_SUCCEEDED:
            break
    everything = [event.sequence for event in story.events(made.story_id) if event.sequence]
    assert seen == everything == list(range(1, len(everything) + 1))
    for after in everything:
        assert [event.sequence for event in story.events(made.story_id, after)] == everything[after:]


def test_many_watchers_see_the_same_log(story: StoryProcess, script: Script) -> None:
    script.step_s = 0.005
    made = story.create(plain(), frame_count=3)
    logs: list[list[int]] = []

    def follow() -> None:
        logs.append([event.sequence for event in story.events(made.story_id) if event.sequence])

    watchers = [threading.Thread(target=follow) for _ in range(8)]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join(60)
    last = story.get(made.story_id).last_sequence
    assert logs == [list(range(1, last + 1))] * 8


def sse(story: StoryProcess, story_id: str, **headers: str) -> list[dict[str, str]]:
    """The events of an SSE stream, as their fields; comments under the field ''."""
    events: list[dict[str, str]] = [{}]
    with story.http.stream("GET", f"/v1/stories/{story_id}/events", headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(":")
                events[-1][name] = value.strip()
            elif events[-1]:
                events.append({})
    return [event for event in events if event]


def test_sse_tells_the_same_events_and_resumes_by_last_event_id(story: StoryProcess) -> None:
    made = story.create(plain(), frame_count=2)
    live = [event for event in sse(story, made.story_id) if "id" in event]
    over_grpc = [event for event in story.events(made.story_id) if event.sequence]
    assert [int(event["id"]) for event in live] == [event.sequence for event in over_grpc]
    assert [event["event"] for event in live] == [event.WhichOneof("event") for event in over_grpc]
    finished = [
        json.loads(event["data"])["frame_finished"]["frame"] for event in live if event["event"] == "frame_finished"
    ]
    assert [frame["image_sha256"] for frame in finished] == [
        frame.image_sha256 for frame in story.get(made.story_id).frames[1:]
    ]
    rest = sse(story, made.story_id, **{"last-event-id": "3"})
    assert [event["id"] for event in rest if "id" in event] == [event["id"] for event in live[3:]]
    done = story.http.get(f"/v1/stories/{made.story_id}/events", headers={"last-event-id": live[-1]["id"]})
    assert done.status_code == 204  # a browser does not come back


def test_a_silent_stream_is_kept_open_by_heartbeats(story: StoryProcess, script: Script) -> None:
    release = threading.Event()

    async def hold(method: str, _index: int) -> None:
        if method == "WriteCaption":
            await asyncio.to_thread(release.wait, 20)

    script.before = hold
    made = story.create(plain(), frame_count=1)
    comments = 0
    with story.http.stream("GET", f"/v1/stories/{made.story_id}/events") as response:
        for line in response.iter_lines():
            comments += line == ": heartbeat"
            if comments == 2:
                release.set()
    assert comments >= 2
    assert story.get(made.story_id).state == State.STATE_SUCCEEDED


def test_http_and_grpc_show_the_same_story(story: StoryProcess) -> None:
    created = story.http.post(
        "/v1/stories",
        files={"image": ("first.png", plain(), "image/png")},
        data={"caption": "A fox finds a map.", "frame_count": "2", "seed": "9", "image_guidance": "2.5"},
    )
    assert created.status_code == 201
    story_id = created.json()["story_id"]
    assert created.headers["location"] == f"/v1/stories/{story_id}"
    over_grpc = story.wait_state(story_id, State.STATE_SUCCEEDED)
    over_http = story.http.get(f"/v1/stories/{story_id}").json()
    assert over_http["state"] == "STATE_SUCCEEDED"
    assert over_http["settings"]["image_guidance"] == over_grpc.settings.image_guidance == 2.5
    assert over_http["settings"]["seed"] == over_grpc.settings.seed == 9
    for document, frame in zip(over_http["frames"], over_grpc.frames, strict=True):
        for name in ("index", "caption", "description", "image_sha256", "width_px", "image_seed", "pack_digest"):
            assert document[name] == getattr(frame, name)
        drawn_with = FINGERPRINT if frame.index else ""
        assert document["engine_fingerprint"] == frame.engine_fingerprint == drawn_with
        assert story.http.get(document["image_url"]).status_code == 200


def test_stories_are_listed_page_by_page_newest_first(story: StoryProcess) -> None:
    made = [story.create(plain(), frame_count=1).story_id for _ in range(5)]
    found: list[str] = []
    token = ""
    while True:
        page = story.stub.ListStories(story_service_pb2.ListStoriesRequest(page_size=2, page_token=token), timeout=10)
        assert len(page.stories) <= 2
        assert all(not listed.frames for listed in page.stories)
        found += [listed.story_id for listed in page.stories]
        token = page.next_page_token
        if not token:
            break
    assert found[:5] == made[::-1]
    assert len(found) == len(set(found))
    over_http = story.http.get("/v1/stories", params={"page_size": 1000}).json()
    assert [listed["story_id"] for listed in over_http["stories"]][: len(found)] == found[:200]
    for story_id in made:
        story.wait_state(story_id, State.STATE_SUCCEEDED)


def test_cancel_stops_within_two_steps_and_keeps_finished_frames(story: StoryProcess, script: Script) -> None:
    async def slowly(method: str, frame_index: int) -> None:
        if (method, frame_index) == ("RenderFrame", 2):
            script.step_s = 0.5

    script.before = slowly
    made = story.create(plain(), frame_count=5, steps=50)
    for message in story.watch(made.story_id):
        if message.event.HasField("frame_progress") and message.event.frame_progress.frame_index == 2:
            break
    cancelled = story.cancel(made.story_id)
    taken = script.steps_taken
    assert cancelled.state == State.STATE_CANCELLED
    deadline = time.monotonic() + 60
    while script.cancelled == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert script.cancelled == 1
    assert script.steps_taken - taken <= 2
    events = [event for event in story.events(made.story_id) if event.sequence]
    assert events[-1].state_changed.state == State.STATE_CANCELLED
    time.sleep(0.5)
    after = story.get(made.story_id)
    assert after.last_sequence == cancelled.last_sequence  # nothing happened since
    assert [bool(frame.image_sha256) for frame in after.frames] == [True, True, False]
    assert story.cancel(made.story_id).last_sequence == cancelled.last_sequence  # and again changes nothing
    assert script.count("WriteCaption") == 2


def test_cancelling_a_finished_story_changes_nothing(story: StoryProcess) -> None:
    made = finish(story, frame_count=1)
    assert story.cancel(made.story_id) == made
    over_http = story.http.post(f"/v1/stories/{made.story_id}:cancel")
    assert over_http.status_code == 200
    assert over_http.json()["state"] == "STATE_SUCCEEDED"


def test_a_deleted_story_is_gone_for_everybody(story: StoryProcess, script: Script) -> None:
    script.step_s = 0.1
    made = story.create(plain(), frame_count=3, request_id="to-be-deleted")
    for message in story.watch(made.story_id):
        if message.event.HasField("frame_progress"):
            break
    story.stub.DeleteStory(story_service_pb2.DeleteStoryRequest(story_id=made.story_id), timeout=10)
    calls = (
        lambda: story.get(made.story_id),
        lambda: story.cancel(made.story_id),
        lambda: story.events(made.story_id),
        lambda: story.image(made.story_id, made.frames[0].image_sha256),
        lambda: story.create(plain(), frame_count=3, request_id="to-be-deleted"),
        lambda: story.stub.DeleteStory(story_service_pb2.DeleteStoryRequest(story_id=made.story_id), timeout=10),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert story.http.get(f"/v1/stories/{made.story_id}").status_code == 404
    listed = story.http.get("/v1/stories").json()["stories"]
    assert made.story_id not in [document["story_id"] for document in listed]
    drawn = script.count("RenderFrame")
    time.sleep(0.3)
    assert script.count("RenderFrame") == drawn


def test_health_reflection_metrics_and_openapi(story: StoryProcess) -> None:
    health = health_pb2_grpc.HealthStub(story.channel)
    for service in ("", "fabula.story.v1.StoryService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert "fabula.story.v1.StoryService" in ProtoReflectionDescriptorDatabase(story.channel).get_services()
    for path in ("/livez", "/readyz", "/healthz"):
        assert story.http.get(path).json()["status"] == "ok"
    finish(story, frame_count=1)
    page = story.http.get("/metrics").text
    for name in ("story_request_duration_seconds", "story_stage_duration_seconds", "story_stories_created_total"):
        assert name in page
    schema = story.http.get("/openapi.json").json()
    assert set(schema["paths"]["/v1/stories"]) == {"post", "get"}
    assert set(schema["paths"]["/v1/stories"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }
    references = set(json.dumps(schema).split('"#/components/schemas/')[1:])
    for reference in references:
        assert reference.split('"')[0] in schema["components"]["schemas"]
