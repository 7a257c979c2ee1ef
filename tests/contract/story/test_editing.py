"""Frames drawn again and frames between two, over the real wire: what is asked of the services, what is kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from fabula.story.v1 import story_pb2
from fabula.story.v1 import story_service_pb2 as pb
from google.rpc import error_details_pb2, status_pb2

from services.runtime.errors import Unavailable
from services.story.plan import derive_seed
from tests.contract.story.pictures import plain
from tests.contract.story.scripted_services import Script
from tests.contract.story.story_process import StoryProcess

State = story_pb2.Story.State


@pytest.fixture
def made(story: StoryProcess, script: Script) -> story_pb2.Story:
    """A finished story of a given frame and four more, and a script that has forgotten how it was made."""
    started = story.create(plain(), frame_count=4, seed=11)
    finished = story.wait_state(started.story_id, State.STATE_SUCCEEDED, State.STATE_FAILED)
    assert finished.state == State.STATE_SUCCEEDED
    script.calls.clear()
    return finished


def edit(story: StoryProcess, story_id: str, index: int, **fields: Any) -> story_pb2.Story:
    return story.stub.EditFrame(pb.EditFrameRequest(story_id=story_id, frame_index=index, **fields), timeout=60).story


def insert(story: StoryProcess, story_id: str, after: int, **fields: Any) -> story_pb2.Story:
    wanted = {"caption": "In between, frame 9 came.", **fields}
    request = pb.InsertFrameRequest(story_id=story_id, after_frame_index=after, **wanted)
    return story.stub.InsertFrame(request, timeout=60).story


def asked(script: Script, method: str) -> list[Any]:
    return [request for called, request, _ in script.calls if called == method]


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and field of a refused call."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    details = dict(raised.value.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    return raised.value.code(), info.reason, info.metadata.get("field", "")


def test_a_frame_is_drawn_again_from_its_own_picture(
    story: StoryProcess, script: Script, made: story_pb2.Story
) -> None:
    old = made.frames[2]
    now = edit(story, made.story_id, 2)
    (drawn,) = asked(script, "RenderFrame")
    assert drawn.edit.image == story.image(made.story_id, old.image_sha256)
    assert drawn.edit.strength == 0.5  # the report's
    assert (drawn.description, drawn.pack) == (old.description, "toon")
    assert [r.image for r in drawn.references] == [
        story.image(made.story_id, frame.image_sha256) for frame in made.frames[:2]
    ]
    assert [r.given for r in drawn.references] == [True, False]
    assert not asked(script, "Describe")
    new = now.frames[2]
    assert new.image_seed == drawn.seed == derive_seed(11, 2, "edit/2/image")
    assert (new.version, new.edit_strength, new.caption) == (2, 0.5, old.caption)
    assert new.image_sha256 != old.image_sha256
    assert story.image(made.story_id, new.image_sha256) != story.image(made.story_id, old.image_sha256)
    assert [frame.stale for frame in now.frames] == [False, False, False, True, True]
    assert list(now.earlier_versions) == [old]  # as it was, its picture can be read above
    assert list(now.frames[:2]) == list(made.frames[:2])
    assert story.get(made.story_id) == now
    assert now.state == State.STATE_SUCCEEDED


def test_a_new_caption_is_described_anew(story: StoryProcess, script: Script, made: story_pb2.Story) -> None:
    now = edit(story, made.story_id, 3, caption="  Then  frame 3 was all different. ", strength=0.8)
    (described,) = asked(script, "Describe")
    assert (described.previous_caption, described.caption) == (
        made.frames[2].caption,
        "Then frame 3 was all different.",
    )
    assert described.image == story.image(made.story_id, made.frames[2].image_sha256)
    assert list(described.earlier_captions) == [frame.caption for frame in made.frames[:2]]
    assert described.sampling.seed == now.frames[3].description_seed == derive_seed(11, 3, "edit/2/description")
    (drawn,) = asked(script, "RenderFrame")
    assert (drawn.description, drawn.edit.strength) == (now.frames[3].description, 0.8)
    assert now.frames[3].caption == "Then frame 3 was all different."
    assert now.frames[3].description != made.frames[3].description
    script.calls.clear()
    told = edit(story, made.story_id, 3, caption="Again.", description="A red frame 3 .", seed=5).frames[3]
    assert (told.description, told.caption, told.version, told.image_seed) == ("A red frame 3 .", "Again.", 3, 5)
    assert not asked(script, "Describe")
    assert [(f.index, f.version) for f in story.get(made.story_id).earlier_versions] == [(3, 1), (3, 2)]


def test_the_given_frame_can_be_edited_too(story: StoryProcess, script: Script, made: story_pb2.Story) -> None:
    now = edit(story, made.story_id, 0, caption="Another beginning.")
    assert now.frames[0].description == now.frames[0].caption == "Another beginning."
    assert not list(asked(script, "RenderFrame")[0].references)
    assert [frame.stale for frame in now.frames] == [False, True, True, True, True]
    script.calls.clear()
    edit(story, made.story_id, 1)
    # The first picture is no longer the user's own: nobody is to be warned of what a pack drew itself.
    assert [reference.given for reference in asked(script, "RenderFrame")[0].references] == [False]


def test_editing_is_logged_after_the_storys_end(story: StoryProcess, made: story_pb2.Story) -> None:
    now = edit(story, made.story_id, 1)
    later = insert(story, made.story_id, 0)
    events = story.events(made.story_id, after=made.last_sequence)
    assert [event.WhichOneof("event") for event in events] == ["frame_edited", "frame_inserted"]
    assert [event.sequence for event in events] == [now.last_sequence, later.last_sequence]
    assert events[0].frame_edited.frame == now.frames[1]
    assert list(events[0].frame_edited.stale_frame_indexes) == [2, 3, 4]
    assert events[1].frame_inserted.frame == later.frames[1]
    over_http = story.http.get(
        f"/v1/stories/{made.story_id}/events", params={"after_sequence": made.last_sequence}
    ).text
    assert "event: frame_edited" in over_http
    assert '"stale_frame_indexes":[2,3,4]' in over_http


def test_a_new_frame_agrees_with_both_neighbours(story: StoryProcess, script: Script, made: story_pb2.Story) -> None:
    now = insert(story, made.story_id, 2)
    (described,), (drawn,) = asked(script, "Describe"), asked(script, "RenderFrame")
    assert (described.previous_caption, described.caption) == (made.frames[2].caption, "In between, frame 9 came.")
    shown = [made.frames[1], made.frames[2], made.frames[3]]
    assert [r.image for r in drawn.references] == [story.image(made.story_id, f.image_sha256) for f in shown]
    assert [r.description for r in drawn.references] == [f.description for f in shown]
    assert [r.distance for r in drawn.references] == [2, 1, 1]
    assert not drawn.HasField("edit")
    assert [frame.index for frame in now.frames] == [0, 1, 2, 3, 4, 5]
    new = now.frames[3]
    assert (new.caption, new.description, new.version) == ("In between, frame 9 came.", drawn.description, 1)
    assert new.image_seed == drawn.seed == derive_seed(11, 3, f"insert/{made.last_sequence}/image")
    moved = [story_pb2.Frame.FromString(frame.SerializeToString()) for frame in made.frames[3:]]
    for frame in moved:
        frame.index += 1
    assert list(now.frames[4:]) == moved  # nothing of them was made of the new one
    again = insert(story, made.story_id, 2, description="Told, frame 9 .")
    assert again.frames[3].description == "Told, frame 9 ."
    assert again.frames[3].image_seed != new.image_seed
    assert again.frames[4].image_sha256 == new.image_sha256


def test_versions_move_with_their_frames(story: StoryProcess, made: story_pb2.Story) -> None:
    edit(story, made.story_id, 3)
    edit(story, made.story_id, 1)
    now = insert(story, made.story_id, 2)
    assert [(frame.index, frame.version) for frame in now.earlier_versions] == [(1, 1), (4, 1)]
    assert (now.frames[4].version, now.frames[3].version) == (2, 1)
    assert now.earlier_versions[1].image_sha256 == made.frames[3].image_sha256
    assert edit(story, made.story_id, 4).frames[4].version == 3


@pytest.mark.parametrize(
    ("missing", "room", "expected"),
    [
        ({frame_pb.FEATURE_INSERT}, 3, [(0, 0), (1, 0), (2, 0)]),  # what reads a history sees what was
        (set(), 2, [(2, 1), (3, 1)]),
        (set(), 1, [(2, 0)]),
        ({frame_pb.FEATURE_INSERT}, 0, []),  # the report's: each for itself
    ],
)
def test_what_a_pack_cannot_look_at_is_not_shown(
    story: StoryProcess,
    script: Script,
    made: story_pb2.Story,
    missing: set[int],
    room: int,
    expected: list[tuple[int, int]],
) -> None:
    script.features_missing, script.max_references = missing, room
    insert(story, made.story_id, 2)
    (drawn,) = asked(script, "RenderFrame")
    images = [story.image(made.story_id, frame.image_sha256) for frame in made.frames]
    assert [(images.index(r.image), r.distance) for r in drawn.references] == expected


def test_the_same_request_changes_nothing_again(story: StoryProcess, script: Script, made: story_pb2.Story) -> None:
    for call, other in (
        (lambda **more: edit(story, made.story_id, 2, request_id=f"e-{made.story_id}", **more), {"strength": 0.9}),
        (lambda **more: insert(story, made.story_id, 0, request_id=f"i-{made.story_id}", **more), {"seed": 3}),
    ):
        first = call()
        script.calls.clear()
        assert call() == first
        assert not script.calls
        code, reason, _ = refusal(lambda call=call, other=other: call(**other))
        assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED")


def test_a_call_that_failed_has_changed_nothing(story: StoryProcess, script: Script, made: story_pb2.Story) -> None:
    script.failures["RenderFrame"] = [Unavailable("the frame service is away")]
    code, _, _ = refusal(lambda: edit(story, made.story_id, 2, request_id=f"f-{made.story_id}"))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert story.get(made.story_id) == made
    drawn_first = asked(script, "RenderFrame")[0].seed
    now = edit(story, made.story_id, 2, request_id=f"f-{made.story_id}")
    assert now.frames[2].image_seed == drawn_first  # the same picture as it would have been


def test_of_two_edits_at_once_one_is_kept(story: StoryProcess, script: Script, made: story_pb2.Story) -> None:
    both = threading.Barrier(2, timeout=30)

    async def meet(method: str, _index: int) -> None:
        if method == "RenderFrame":
            await asyncio.to_thread(both.wait)

    script.before = meet
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(edit, story, made.story_id, 2, seed=seed) for seed in (1, 2)]
        outcomes = [call.exception() for call in calls]
    assert sum(error is None for error in outcomes) == 1
    (lost,) = [error for error in outcomes if error is not None]

    def again() -> None:
        raise lost

    assert refusal(again)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "STALE_PARENT")
    now = story.get(made.story_id)
    assert (now.frames[2].version, len(now.earlier_versions)) == (2, 1)


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"strength": 0.0}, "VALUE_OUT_OF_RANGE", "strength"),
        ({"strength": 1.5}, "VALUE_OUT_OF_RANGE", "strength"),
        ({"strength": float("nan")}, "VALUE_OUT_OF_RANGE", "strength"),
        ({"seed": 2**53}, "VALUE_OUT_OF_RANGE", "seed"),
        ({"caption": ""}, "CAPTION_EMPTY", "caption"),
        ({"description": " "}, "CAPTION_EMPTY", "description"),
        ({"description": "x" * 1001}, "CAPTION_TOO_LONG", "description"),
        ({"request_id": "é"}, "REQUEST_ID_INVALID", "request_id"),
    ],
)
def test_bad_edits_are_refused_by_name(
    story: StoryProcess, script: Script, made: story_pb2.Story, fields: dict[str, Any], reason: str, field: str
) -> None:
    code, found, named = refusal(lambda: edit(story, made.story_id, 2, **fields))
    assert (code, found, named) == (grpc.StatusCode.INVALID_ARGUMENT, reason, field)
    assert not script.calls


def test_what_is_not_there_cannot_be_changed(story: StoryProcess, script: Script, made: story_pb2.Story) -> None:
    not_found = (grpc.StatusCode.NOT_FOUND, "FRAME_NOT_FOUND")
    assert refusal(lambda: edit(story, made.story_id, 5))[:2] == not_found
    assert refusal(lambda: insert(story, made.story_id, 4))[:2] == not_found  # nothing comes after the last
    for story_id in ("nothing", "0" * 8 + "-0000-0000-0000-" + "0" * 12):
        code, reason, _ = refusal(lambda story_id=story_id: edit(story, story_id, 0))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "STORY_NOT_FOUND")
    script.features_missing = {frame_pb.FEATURE_EDIT}
    code, reason, _ = refusal(lambda: edit(story, made.story_id, 2))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "FEATURE_MISSING")
    script.features_missing, script.packs = set(), ["other"]
    code, reason, _ = refusal(lambda: edit(story, made.story_id, 2))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PACK_UNKNOWN")
    assert story.get(made.story_id) == made


def test_a_story_that_is_being_made_is_left_alone(story: StoryProcess, script: Script) -> None:
    script.step_s = 0.2
    running = story.create(plain(), frame_count=20)
    story.wait_state(running.story_id, State.STATE_RUNNING)
    code, reason, _ = refusal(lambda: edit(story, running.story_id, 0))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORY_NOT_ENDED")
    story.cancel(running.story_id)
    script.step_s = 0.0
    assert edit(story, running.story_id, 0).frames[0].version == 2  # what was finished can be changed


def test_a_full_story_takes_no_more(story: StoryProcess, script: Script) -> None:
    started = story.create(plain(), frame_count=20)
    full = story.wait_state(started.story_id, State.STATE_SUCCEEDED, State.STATE_FAILED)
    code, reason, _ = refusal(lambda: insert(story, full.story_id, 3))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORY_TOO_LONG")


def test_a_client_that_hangs_up_stops_the_drawing(story: StoryProcess, script: Script, made: story_pb2.Story) -> None:
    script.step_s = 0.2
    call = story.stub.EditFrame.future(pb.EditFrameRequest(story_id=made.story_id, frame_index=1), timeout=60)
    for _ in range(600):
        if script.steps_taken and asked(script, "RenderFrame"):
            break
        threading.Event().wait(0.05)
    call.cancel()
    for _ in range(600):
        if script.cancelled:
            break
        threading.Event().wait(0.05)
    assert script.cancelled == 1
    assert story.get(made.story_id) == made


def test_both_over_http(story: StoryProcess, made: story_pb2.Story) -> None:
    path = f"/v1/stories/{made.story_id}/frames"
    edited = story.http.post(f"{path}/2:edit", json={"strength": 0.25, "caption": "Frame 2 anew."})
    assert edited.status_code == 200, edited.text
    document = edited.json()
    assert [frame["version"] for frame in document["frames"]] == [1, 1, 2, 1, 1]
    assert (document["frames"][2]["edit_strength"], document["frames"][3]["stale"]) == (0.25, True)
    (old,) = document["earlier_versions"]
    assert story.http.get(old["image_url"]).content == story.image(made.story_id, made.frames[2].image_sha256)
    key = {"idempotency-key": f"h-{made.story_id}"}
    inserted = [story.http.post(f"{path}/0:insertAfter", json={"caption": "Frame 1 b."}, headers=key) for _ in "12"]
    assert [answer.status_code for answer in inserted] == [200, 200]
    assert inserted[0].json() == inserted[1].json()
    assert [frame["caption"] for frame in inserted[0].json()["frames"]][1] == "Frame 1 b."
    assert story.http.post(f"{path}/1:edit").json()["frames"][1]["edit_strength"] == 0.5  # no body: the defaults
    for wrong, status, reason in (
        (("2:edit", {"strong": 1}), 400, "UNKNOWN_FIELD"),
        (("2:edit", {"strength": 2.0}), 400, "VALUE_OUT_OF_RANGE"),
        (("2:edit", {"strength": "much"}), 400, "INVALID_ARGUMENT"),
        (("9:edit", {}), 404, "FRAME_NOT_FOUND"),
        (("-1:edit", {}), 400, "INVALID_ARGUMENT"),
        (("2:insertAfter", {}), 400, "CAPTION_EMPTY"),
    ):
        answer = story.http.post(f"{path}/{wrong[0]}", json=wrong[1])
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), wrong
    paths = story.http.get("/openapi.json").json()["paths"]
    assert "/v1/stories/{story_id}/frames/{index}:edit" in paths
    assert "/v1/stories/{story_id}/frames/{index}:insertAfter" in paths


def test_pictures_of_versions_are_kept_as_long_as_the_story(story: StoryProcess, made: story_pb2.Story) -> None:
    edit(story, made.story_id, 2)
    story.stub.DeleteStory(pb.DeleteStoryRequest(story_id=made.story_id))
    code, reason, _ = refusal(lambda: story.image(made.story_id, made.frames[2].image_sha256))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "STORY_NOT_FOUND")
