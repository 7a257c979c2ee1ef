"""The client against the real story service."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable

import pytest
from fabula.frame.v1 import frame_service_pb2
from fabula_client import (
    AsyncClient,
    Backends,
    CaptionWritten,
    Client,
    FrameFinished,
    FrameProgress,
    IdempotencyKeyReused,
    InvalidArgument,
    NotFound,
    RetryPolicy,
    State,
    StateChanged,
    StoryCancelled,
    StoryEvent,
    Unavailable,
    WaitTimedOut,
    WarningGiven,
    tracing,
)

from tests.contract.story.scripted_services import STEPS, Script, ScriptedServices
from tests.contract.story.story_process import StoryProcess

TRACE_ID = "c" * 32


async def test_a_story_is_created_watched_and_read(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    async with AsyncClient(process.grpc_target) as client:
        with tracing(traceparent=f"00-{TRACE_ID}-{'d' * 16}-01"):
            story = await client.stories.create(image=first_picture, caption="Once upon a time.", frame_count=2, seed=7)
        events = [event async for event in story.watch()]
        assert [event.sequence for event in events if event.sequence] == list(
            range(1, max(event.sequence for event in events) + 1)
        )
        assert [event.frame_index for event in events if isinstance(event, CaptionWritten)] == [1, 2]
        assert any(isinstance(event, FrameProgress) for event in events)
        assert isinstance(events[-1], StateChanged)
        assert events[-1].state is State.SUCCEEDED
        value = await story.wait()
        assert [frame.index for frame in value.frames] == [0, 1, 2]
        assert value.settings.seed == 7
        image = await story.read_image(2)
        assert hashlib.sha256(image).hexdigest() == value.frames[2].image_sha256
        assert await story.read_image(value.frames[2]) == image


def test_the_sync_client_does_the_same(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    with Client(process.grpc_target) as client:
        story = client.stories.create(image=first_picture, caption="Once upon a time.", frame_count=2, seed=7)
        finished = [event.frame.index for event in story.watch() if isinstance(event, FrameFinished)]
        assert finished[-2:] == [1, 2]
        value = story.wait(timeout_s=60)
        assert value.state is State.SUCCEEDED
        assert client.stories.get(story.story_id).frames == value.frames
        assert hashlib.sha256(story.read_image(1)).hexdigest() == value.frames[1].image_sha256
        story.delete()
        with pytest.raises(NotFound) as missing:
            client.stories.get(story.story_id)
        assert missing.value.reason == "STORY_NOT_FOUND"
        assert missing.value.request_id


def test_a_story_is_drawn_in_the_quality_it_was_asked_for(
    process: StoryProcess, script: Script, first_picture: bytes
) -> None:
    with Client(process.grpc_target) as client:
        story = client.stories.create(image=first_picture, caption="Once.", frame_count=1, seed=7, quality="best")
        assert story.wait(timeout_s=60).settings.quality == "best"
        plainly = client.stories.create(image=first_picture, caption="Once.", frame_count=1, seed=7)
        assert plainly.wait(timeout_s=60).settings.quality == "standard"
    drawn = [request.quality for method, request, _ in script.calls if method == "RenderFrame"]
    assert drawn == [frame_service_pb2.QUALITY_BEST, frame_service_pb2.QUALITY_STANDARD]


def test_a_story_tells_what_was_beyond_its_pack(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    script.strange, script.strange_picture = ("robot",), True
    with Client(process.grpc_target) as client:
        story = client.stories.create(image=first_picture, caption="A robot came.", frame_count=1, seed=7)
        told = [event.warning for event in story.watch() if isinstance(event, WarningGiven)]
        value = story.wait(timeout_s=60)
        assert value.state is State.SUCCEEDED
        assert [(each.reason, each.field) for each in story.warnings] == [
            ("WORDS_UNFAMILIAR", "caption"),
            ("PICTURE_UNFAMILIAR", "image"),
        ]
        assert tuple(told) == story.warnings == value.warnings


async def test_both_clients_say_what_there_is(process: StoryProcess, script: Script) -> None:
    script.writers_alone = ["pen"]
    async with AsyncClient(process.grpc_target) as client:
        found = await client.backends()
    toon, other, pen = found
    assert (toon.pack, toon.is_default, toon.digest) == ("toon", True, "toon-drawn")
    assert toon.base_digest == "toon-network"
    assert toon.drawing is not None
    assert (toon.drawing.max_steps, toon.drawing.features) == (60, ("references", "characters", "edit", "insert"))
    assert [(each.quality, each.steps) for each in toon.drawing.qualities] == [
        ("draft", 4),
        ("standard", STEPS),
        ("best", 16),
    ]
    assert [each.tells_stories for each in (toon, other, pen)] == [True, True, False]
    assert found.unavailable_services == ()

    def ask() -> Backends:
        with Client(process.grpc_target) as client:
            return client.backends()

    assert await asyncio.to_thread(ask) == found


async def test_with_both_services_away_nobody_can_say(
    process: StoryProcess, services: ScriptedServices, script: Script
) -> None:
    async with AsyncClient(process.grpc_target, retry=RetryPolicy(attempts=1)) as client:
        assert (await client.backends()).unavailable_services == ()
        await asyncio.to_thread(services.stop)
        try:
            with pytest.raises(Unavailable) as refused:
                await client.backends()
        finally:
            await asyncio.to_thread(services.start)
        assert refused.value.metadata == {"services": "caption,frame"}
    async with AsyncClient(process.grpc_target) as patient:  # tries again by itself until they are back
        assert len(await patient.backends()) > 0


def test_leaving_a_sync_watch_early_leaves_nothing_open(
    process: StoryProcess, script: Script, first_picture: bytes
) -> None:
    with Client(process.grpc_target) as client:
        story = client.stories.create(image=first_picture, caption="Once upon a time.", frame_count=2, seed=7)
        for _ in story.watch():
            break
        assert story.wait(timeout_s=60).state is State.SUCCEEDED
    assert not [thread for thread in threading.enumerate() if thread.name == "fabula-client"]


async def test_the_request_and_trace_ids_arrive(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    async with AsyncClient(process.grpc_target) as client:
        with tracing(traceparent=f"00-{TRACE_ID}-{'d' * 16}-01", request_id="order-17"):
            with pytest.raises(InvalidArgument) as refused:
                await client.stories.create(image=first_picture, caption="")
            assert refused.value.request_id == "order-17"
            story = await client.stories.create(image=first_picture, caption="Once.", frame_count=1, seed=1)
        await story.wait(timeout_s=60)
    traces = {call.trace_id for method, _, call in script.calls if method == "WriteCaption"}
    assert traces == {TRACE_ID}


async def test_errors_say_which_field_and_why(process: StoryProcess, first_picture: bytes) -> None:
    async with AsyncClient(process.grpc_target) as client:
        with pytest.raises(InvalidArgument) as refused:
            await client.stories.create(image=b"this is no picture", caption="Once upon a time.")
        assert refused.value.reason == "IMAGE_UNREADABLE"
        assert [each.field for each in refused.value.field_violations] == ["image"]
        with pytest.raises(InvalidArgument) as refused:
            await client.stories.create(image=first_picture, caption="Once.", frame_count=1000)
        assert refused.value.field_violations


async def test_one_key_is_one_story(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    async with AsyncClient(process.grpc_target) as client:
        given = {"image": first_picture, "frame_count": 1, "seed": 3, "idempotency_key": "the-same"}
        first = await client.stories.create(caption="Once.", **given)
        again = await client.stories.create(caption="Once.", **given)
        assert again.story_id == first.story_id
        with pytest.raises(IdempotencyKeyReused):
            await client.stories.create(caption="Twice.", **given)
        await first.wait(timeout_s=60)


async def test_listing_goes_on_over_pages(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    async with AsyncClient(process.grpc_target) as client:
        made = [
            await client.stories.create(image=first_picture, caption=f"Story {number}.", frame_count=1, seed=number)
            for number in range(5)
        ]
        listed = [story.story_id async for story in client.stories.list(page_size=2)]
        assert listed[:5] == [story.story_id for story in reversed(made)]
        assert len(listed) == len(set(listed))
        for story in made:
            await story.wait(timeout_s=60)


async def test_a_wait_that_runs_out_leaves_the_story_alone(
    process: StoryProcess, script: Script, first_picture: bytes
) -> None:
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def hold(method: str, _frame_index: int) -> None:
        if method == "RenderFrame":
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(gate.wait(), loop))

    script.before = hold
    async with AsyncClient(process.grpc_target) as client:
        story = await client.stories.create(image=first_picture, caption="Once.", frame_count=1, seed=1)
        with pytest.raises(WaitTimedOut, match="goes on"):
            await story.wait(timeout_s=0.3)
        gate.set()
        assert (await story.wait(timeout_s=60)).state is State.SUCCEEDED


async def test_a_cancelled_story_ends_its_waiters(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    script.step_s = 0.2
    async with AsyncClient(process.grpc_target) as client:
        story = await client.stories.create(image=first_picture, caption="Once.", frame_count=3, seed=1)
        waiting = asyncio.create_task(story.wait(timeout_s=60))
        other = await client.stories.get(story.story_id)
        async for event in other.watch():
            if isinstance(event, FrameProgress):
                break
        assert (await other.cancel()).story_id == story.story_id
        with pytest.raises(StoryCancelled) as ended:
            await waiting
        assert ended.value.story.state is State.CANCELLED


async def test_a_watch_survives_kills_of_the_service(
    restartable: Callable[[], StoryProcess], script: Script, first_picture: bytes
) -> None:
    script.step_s = 0.03
    process = restartable()
    kills = 0
    async with AsyncClient(process.grpc_target) as client:
        story = await client.stories.create(image=first_picture, caption="Once.", frame_count=3, seed=7)
        events = []
        async for event in story.watch(patience_s=120):
            events.append(event)
            if isinstance(event, CaptionWritten | FrameFinished) and kills < 3 and len(events) > 4 * kills:
                kills += 1
                process.kill()
                process = await asyncio.to_thread(restartable)
        value = await story.wait(timeout_s=60)
    assert kills == 3
    assert value.state is State.SUCCEEDED
    sequences = [event.sequence for event in events if event.sequence]
    assert sequences == list(range(1, value.last_sequence + 1))  # none missed, none twice
    finished = [event.frame for event in events if isinstance(event, FrameFinished)]
    assert [frame.index for frame in finished if frame.index] == [1, 2, 3]
    assert {frame.image_sha256 for frame in finished} <= {frame.image_sha256 for frame in value.frames}


async def test_a_watch_gives_up_after_its_patience(
    restartable: Callable[[], StoryProcess], script: Script, first_picture: bytes
) -> None:
    script.step_s = 0.5
    process = restartable()
    async with AsyncClient(process.grpc_target) as client:
        story = await client.stories.create(image=first_picture, caption="Once.", frame_count=3, seed=7)
        events = story.watch(patience_s=1.0)
        await anext(events)
        process.kill()
        with pytest.raises(Unavailable):
            await _all(events)


async def _all(events: AsyncIterator[StoryEvent]) -> list[StoryEvent]:
    return [event async for event in events]


async def test_a_call_waits_for_a_service_that_is_coming_back(
    restartable: Callable[[], StoryProcess], script: Script, first_picture: bytes
) -> None:
    process = restartable()
    patient = RetryPolicy(attempts=200, first_pause_s=0.05, longest_pause_s=0.5)
    async with AsyncClient(process.grpc_target, retry=patient, timeout_s=120) as client:
        process.kill()
        creating = asyncio.create_task(
            client.stories.create(image=first_picture, caption="Once.", frame_count=1, seed=7)
        )
        process = await asyncio.to_thread(restartable)
        story = await creating
        assert [each.story_id async for each in client.stories.list()] == [story.story_id]
        assert (await story.wait(timeout_s=60)).state is State.SUCCEEDED


def test_two_watchers_see_the_same_story(process: StoryProcess, script: Script, first_picture: bytes) -> None:
    with Client(process.grpc_target) as client:
        story = client.stories.create(image=first_picture, caption="Once.", frame_count=2, seed=7)
        whole = [event for event in story.watch() if event.sequence]
        rest = [event for event in story.watch(after_sequence=3) if event.sequence]
        assert rest == whole[3:]
        assert list(story.watch(after_sequence=whole[-1].sequence)) == []
