"""The story process is killed (`kill -9`) at every moment that matters: nothing is lost and nothing done twice."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from fabula.story.v1 import story_pb2

from tests.contract.story import pictures
from tests.contract.story.scripted_services import Script, ScriptedServices
from tests.contract.story.story_process import StoryProcess

State = story_pb2.Story.State
FAILING = str(Path(__file__).with_name("failing_story.py"))
FRAMES = 3
SEED = 21


@pytest.fixture(scope="module")
def services() -> Iterator[ScriptedServices]:
    running = ScriptedServices()
    running.start()
    yield running
    running.close()


@pytest.fixture
def script(services: ScriptedServices) -> Script:
    services.script.__init__()  # type: ignore[misc]  # the servicers hold on to this very object
    return services.script


@pytest.fixture(scope="module")
def uninterrupted(services: ScriptedServices, tmp_path_factory: pytest.TempPathFactory) -> story_pb2.Story:
    """The story as it is when nothing happens."""
    story = StoryProcess(tmp_path_factory.mktemp("uninterrupted"), services.target).start()
    try:
        made = story.create(pictures.plain(), frame_count=FRAMES, seed=SEED)
        return story.wait_state(made.story_id, State.STATE_SUCCEEDED)
    finally:
        story.kill()


def check(
    story: StoryProcess, story_id: str, script: Script, uninterrupted: story_pb2.Story, *, finished_before: int
) -> None:
    """The story ends as if nothing had happened, and what was finished before the crash was made once."""
    done = story.wait_state(story_id, State.STATE_SUCCEEDED)
    pairs = [(frame.caption, frame.description, frame.image_sha256, frame.image_seed) for frame in done.frames]
    assert pairs == [(f.caption, f.description, f.image_sha256, f.image_seed) for f in uninterrupted.frames]
    for frame in done.frames:
        assert story.image(story_id, frame.image_sha256)
    for index in range(1, finished_before + 1):
        for method in ("WriteCaption", "Describe", "RenderFrame"):
            assert script.computed[method, index] == 1, (method, index)
    for (method, index), count in script.computed.items():
        assert count <= 2, (method, index)  # only the step that was interrupted may have run again
    events = [event for event in story.events(story_id) if event.sequence]
    assert [event.sequence for event in events] == list(range(1, done.last_sequence + 1))
    told = [event.WhichOneof("event") for event in events if not event.HasField("state_changed")]
    assert told == ["caption_written", "description_written", "frame_finished"] * FRAMES
    states = [event.state_changed.state for event in events if event.HasField("state_changed")]
    assert (states[0], states[-1]) == (State.STATE_QUEUED, State.STATE_SUCCEEDED)
    assert states.count(State.STATE_SUCCEEDED) == 1


@pytest.mark.parametrize("method", ["WriteCaption", "Describe", "RenderFrame"])
def test_killed_while_a_service_works(
    services: ScriptedServices, script: Script, uninterrupted: story_pb2.Story, tmp_path: Path, method: str
) -> None:
    arrived = threading.Event()

    async def hang_once(called: str, index: int) -> None:
        if called == method and index == 2 and not arrived.is_set():
            arrived.set()
            await asyncio.Event().wait()

    script.before = hang_once
    story = StoryProcess(tmp_path, services.target).start()
    made = story.create(pictures.plain(), frame_count=FRAMES, seed=SEED)
    assert arrived.wait(30)
    before = story.get(made.story_id)
    assert story.process is not None
    family = psutil.Process(story.process.pid).children(recursive=True)
    story.kill()
    assert not psutil.wait_procs(family, timeout=5)[1]  # the picture decoder goes with it
    story.start()
    try:
        check(story, made.story_id, script, uninterrupted, finished_before=1)
        assert story.get(made.story_id).frames[1] == before.frames[1]
    finally:
        story.kill()


def test_killed_at_every_moment_of_one_story(
    services: ScriptedServices, script: Script, uninterrupted: story_pb2.Story, tmp_path: Path
) -> None:
    """Nine lives. Each but the last ends at the next moment of the second frame, or of the story's end."""
    lives = [
        ("caption-received", 2),  # the first of this life is the first frame's
        ("caption-committed", 1),
        ("description-committed", 1),
        ("picture-received", 1),
        ("before-commit", 1),
        ("after-commit", 1),
        ("before-end", 1),
        ("after-end", 1),
    ]
    story_id = ""
    for moment, count in lives:
        doomed = StoryProcess(tmp_path, services.target, command=(FAILING, moment, str(count))).start(wait=not story_id)
        if not story_id:
            story_id = doomed.create(pictures.plain(), frame_count=FRAMES, seed=SEED).story_id
        doomed.wait_dead()
    story = StoryProcess(tmp_path, services.target).start()
    try:
        check(story, story_id, script, uninterrupted, finished_before=1)
        # What was received and not yet kept is asked for again; what was kept never is.
        computed = {(method, index): count for (method, index), count in script.computed.items() if count > 1}
        assert computed == {("WriteCaption", 2): 2, ("RenderFrame", 2): 2}
    finally:
        story.kill()


def test_a_process_that_was_only_frozen_cannot_do_harm(
    services: ScriptedServices, script: Script, uninterrupted: story_pb2.Story, tmp_path: Path
) -> None:
    """Its lease runs out, another takes over and finishes; then it wakes up in the middle of its old work."""
    script.step_s = 0.1
    frozen = StoryProcess(tmp_path, services.target, STORY_LEASE_S="4").start()
    made = frozen.create(pictures.plain(), frame_count=FRAMES, seed=SEED)
    for message in frozen.watch(made.story_id):
        if message.event.HasField("frame_progress") and message.event.frame_progress.frame_index == 2:
            break
    assert frozen.process is not None
    frozen.process.send_signal(signal.SIGSTOP)
    other = StoryProcess(tmp_path, services.target, STORY_LEASE_S="4").start()
    try:
        done = other.wait_state(made.story_id, State.STATE_SUCCEEDED)
        frozen.process.send_signal(signal.SIGCONT)
        time.sleep(2)
        assert frozen.get(made.story_id) == other.get(made.story_id) == done
        check(other, made.story_id, script, uninterrupted, finished_before=1)
    finally:
        other.kill()
        frozen.kill()


@pytest.mark.parametrize("moment", ["story-committed", "before-hand-over", "after-hand-over"])
def test_killed_before_the_answer(
    services: ScriptedServices, script: Script, uninterrupted: story_pb2.Story, tmp_path: Path, moment: str
) -> None:
    """The client never hears that its story was taken. It asks again with the same request id and gets that story."""
    doomed = StoryProcess(tmp_path, services.target, command=(FAILING, moment, "1")).start()
    with pytest.raises(grpc.RpcError) as caught:
        doomed.create(pictures.plain(), frame_count=FRAMES, seed=SEED, request_id="r")
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    doomed.wait_dead()
    story = StoryProcess(tmp_path, services.target).start()
    try:
        made = story.create(pictures.plain(), frame_count=FRAMES, seed=SEED, request_id="r")
        assert [listed["story_id"] for listed in story.http.get("/v1/stories").json()["stories"]] == [made.story_id]
        check(story, made.story_id, script, uninterrupted, finished_before=FRAMES)
    finally:
        story.kill()


def test_killed_again_and_again_at_random(
    services: ScriptedServices, script: Script, uninterrupted: story_pb2.Story, tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    script.step_s = 0.03
    story = StoryProcess(tmp_path, services.target).start()
    made = [story.create(pictures.plain(), frame_count=FRAMES, seed=SEED).story_id for _ in range(3)]
    try:
        for _ in range(4):
            time.sleep(chance.uniform(0.1, 1.2))
            story.kill()
            story.start()
        for story_id in made:
            done = story.wait_state(story_id, State.STATE_SUCCEEDED)
            assert [frame.image_sha256 for frame in done.frames] == [f.image_sha256 for f in uninterrupted.frames]
            events = [event for event in story.events(story_id) if event.sequence]
            assert [event.sequence for event in events] == list(range(1, done.last_sequence + 1))
            finished = [event.frame_finished.frame.index for event in events if event.HasField("frame_finished")]
            assert finished == [1, 2, 3]
    finally:
        story.kill()
