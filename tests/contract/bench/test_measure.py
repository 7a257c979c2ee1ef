"""The bench measures what a reader sees: a real story process, with scripted services behind it."""

from __future__ import annotations

import pytest
from fabula_client import AsyncClient

from services.runtime.errors import RenderFailed
from tests.bench.__main__ import shipped_first_frames
from tests.bench.installation import Installation
from tests.bench.measure import StoryUnfinished, time_edge, time_stories_at_once, time_story
from tests.contract.story.scripted_services import ScriptedServices
from tests.contract.story.story_process import StoryProcess


@pytest.fixture(scope="module")
def services():
    running = ScriptedServices()
    running.start()
    yield running
    running.close()


@pytest.fixture(scope="module")
def story_process(services, tmp_path_factory):
    process = StoryProcess(tmp_path_factory.mktemp("story"), services.target).start()
    yield process
    assert process.terminate() == 0


@pytest.fixture
def installation(story_process):
    return Installation(home=story_process.home, port_base=int(story_process.http_url.rsplit(":", 1)[1]))


async def test_a_story_is_timed_frame_by_frame(installation):
    first = shipped_first_frames()[0]
    async with AsyncClient(installation.grpc_target) as client:
        timing = await time_story(client, first, frame_count=3, seed=7)
    assert len(timing.frame_s) == timing.frame_count == 3
    assert 0 < timing.first_caption_s <= timing.first_frame_s <= timing.total_s
    assert sum(timing.frame_s) <= timing.total_s


async def test_stories_at_once_take_no_longer_than_the_last_of_them(installation):
    firsts = shipped_first_frames()[:2]
    async with AsyncClient(installation.grpc_target) as client:
        timings, wall_s = await time_stories_at_once(client, firsts, frame_count=2, seed=7)
    assert len(timings) == 2
    assert max(timing.total_s for timing in timings) <= wall_s <= sum(timing.total_s for timing in timings)


async def test_a_story_that_fails_is_no_measurement(installation, services):
    services.script.failures["RenderFrame"] = [RenderFailed() for _ in range(20)]
    try:
        async with AsyncClient(installation.grpc_target) as client:
            with pytest.raises(StoryUnfinished, match="RENDER_FAILED"):
                await time_story(client, shipped_first_frames()[0], frame_count=1, seed=7)
    finally:
        services.script.failures.clear()


async def test_the_edge_is_timed_over_both_protocols(installation):
    first = shipped_first_frames()[0]
    async with AsyncClient(installation.grpc_target) as client:
        story = await client.stories.create(image=first.image, caption=first.caption, frame_count=1, seed=7)
        await story.wait()
        calls = await time_edge(installation, story, first, count=20)
    assert {call.name: len(call.call_s) for call in calls} == {
        "get_story_grpc": 20,
        "get_story_http": 20,
        "create_story_refused": 10,
    }
    assert all(taken > 0 for call in calls for taken in call.call_s)
