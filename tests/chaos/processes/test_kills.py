"""Processes are killed without warning while a story is told: it is finished all the same and nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fabula_client import Client, FrameFinished, FrameProgress, State, StoryEvent, StoryHandle

from tests.e2e.local import START_S, LocalInstallation, first_frame, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FRAMES = 3
STEPS = 40  # enough that a kill falls between two of them


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalInstallation]:
    made = LocalInstallation(tmp_path_factory.mktemp("kills"))
    try:
        made.up()
        yield made
    finally:
        made.run("down")


def ready(installation: LocalInstallation) -> bool:
    return installation.run("status", "--json").returncode == 0


def tell_and_disturb(client: Client, disturb: Callable[[], None]) -> tuple[StoryHandle, list[StoryEvent]]:
    """Starts a story, disturbs it in the middle of its second frame, and follows it to its end."""
    image, caption = first_frame()
    story = client.stories.create(image=image, caption=caption, frame_count=FRAMES, seed=7, steps=STEPS)
    events, disturbed = [], False
    for event in story.watch(patience_s=START_S):
        events.append(event)
        if not disturbed and isinstance(event, FrameProgress) and event.frame_index == 2:
            disturbed = True
            disturb()
    assert disturbed
    story.refresh()
    return story, events


def check_whole(story: StoryHandle, events: list[StoryEvent]) -> None:
    """The story ended well, every event was told once, and no finished frame was made again."""
    assert story.state is State.SUCCEEDED, story.value.error
    assert [frame.index for frame in story.frames] == list(range(FRAMES + 1))
    durable = [event.sequence for event in events if event.sequence]
    assert durable == list(range(1, len(durable) + 1))
    finished = {event.frame.index: event.frame.image_sha256 for event in events if isinstance(event, FrameFinished)}
    assert finished == {frame.index: frame.image_sha256 for frame in story.frames if frame.index in finished}
    assert set(finished) >= set(range(1, FRAMES + 1))


@pytest.mark.parametrize("victim", ["services.story", "ServeReplica:frame", "ServeReplica:caption"])
def test_what_is_killed_is_replaced_and_the_story_goes_on(installation: LocalInstallation, victim: str) -> None:
    with Client(installation.grpc) as client:
        killed = installation.one(victim)
        story, events = tell_and_disturb(client, killed.kill)
        check_whole(story, events)
    assert not killed.alive
    until(lambda: ready(installation), START_S)
    assert installation.one(victim) != killed


def test_a_dead_ray_node_is_started_again_and_the_story_goes_on(installation: LocalInstallation) -> None:
    with Client(installation.grpc) as client:
        killed = installation.one("raylet")
        before = installation.sightings()
        story, events = tell_and_disturb(client, killed.kill)
        check_whole(story, events)
    until(lambda: ready(installation), START_S)
    survivors = {each.name for each in before if each.alive}
    assert survivors == {"services.runtime.cluster", "services.story"}


def test_after_the_supervisor_is_killed_down_finds_everything_and_up_goes_on(
    installation: LocalInstallation, tmp_path: Path
) -> None:
    image, caption = first_frame()
    with Client(installation.grpc) as client:
        story = client.stories.create(image=image, caption=caption, frame_count=FRAMES, seed=7, steps=STEPS)
        for event in story.watch():
            if isinstance(event, FrameProgress) and event.frame_index == 2:
                break
        story_id, first = story.story_id, story.refresh().frames[1]
    seen = installation.sightings()
    installation.one("services.runtime.cluster").kill()
    installation.down()
    assert [each for each in seen if each.alive] == []
    assert installation.strangers() == []

    installation.up()
    with Client(installation.grpc) as client:
        story = client.stories.get(story_id)
        assert story.wait(timeout_s=START_S).state is State.SUCCEEDED
        assert story.frames[1] == first  # what was finished before is what it was
    installation.down()
    assert installation.strangers() == []
