"""Takes the figures of a running Fabula, through its client and its HTTP. Knows no target and prints nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from fabula_client import (
    AsyncClient,
    AsyncStory,
    CaptionWritten,
    FrameFinished,
    InvalidArgument,
    RetryPolicy,
    State,
    StateChanged,
)

from tests.bench.installation import Installation
from tests.bench.report import CallTimings, StoryTiming

WARM_CALLS = 20  # not counted: connections, caches, first imports


class StoryUnfinished(Exception):
    """A story of the bench did not succeed, so there is nothing to measure."""


@dataclass(frozen=True, kw_only=True)
class FirstFrame:
    """What a story begins with."""

    image: Path
    caption: str


async def time_story(client: AsyncClient, first: FirstFrame, *, frame_count: int, seed: int) -> StoryTiming:
    """Makes one story and follows it as a reader does. Raises StoryUnfinished."""
    began = time.monotonic()
    story = await client.stories.create(image=first.image, caption=first.caption, frame_count=frame_count, seed=seed)
    first_caption_s: float | None = None
    finished_s: list[float] = []
    async for event in story.watch():
        now_s = time.monotonic() - began
        if isinstance(event, CaptionWritten) and first_caption_s is None:
            first_caption_s = now_s
        elif isinstance(event, FrameFinished) and not event.frame.given:
            finished_s.append(now_s)
        elif isinstance(event, StateChanged) and event.state.ended and event.state is not State.SUCCEEDED:
            why = f": {event.error.reason} {event.error.message}" if event.error else ""
            raise StoryUnfinished(f"story {story.story_id} ended as {event.state}{why}")
    total_s = time.monotonic() - began
    if first_caption_s is None or len(finished_s) != frame_count:
        raise StoryUnfinished(f"story {story.story_id} gave {len(finished_s)} of {frame_count} frames")
    starts = [0.0, *finished_s[:-1]]
    return StoryTiming(
        frame_count=frame_count,
        first_caption_s=first_caption_s,
        first_frame_s=finished_s[0],
        total_s=total_s,
        frame_s=tuple(end - start for start, end in zip(starts, finished_s, strict=True)),
    )


async def time_stories_at_once(
    client: AsyncClient, firsts: list[FirstFrame], *, frame_count: int, seed: int
) -> tuple[tuple[StoryTiming, ...], float]:
    """Makes all stories at the same moment; their timings, and the seconds until the last had ended."""
    began = time.monotonic()
    timings = await asyncio.gather(
        *(time_story(client, first, frame_count=frame_count, seed=seed + i) for i, first in enumerate(firsts))
    )
    return tuple(timings), time.monotonic() - began


async def time_edge(
    installation: Installation, story: AsyncStory, first: FirstFrame, *, count: int
) -> list[CallTimings]:
    """What the edge itself costs: calls that no model has a part in, one after the other, the client's time included.

    A refused CreateStory is the whole way of one, picture decoding included, up to where it would be stored.
    """
    picture = first.image.read_bytes()
    path = f"/v1/stories/{story.story_id}"
    patient = RetryPolicy(attempts=1)
    async with (
        AsyncClient(installation.grpc_target, retry=patient) as client,
        httpx.AsyncClient(base_url=installation.http_url) as http,
    ):

        async def get_grpc() -> None:
            await client.stories.get(story.story_id)

        async def get_http() -> None:
            (await http.get(path)).raise_for_status()

        async def refuse_grpc() -> None:
            try:
                await client.stories.create(image=picture, caption=first.caption, frame_count=1000)
            except InvalidArgument:
                return
            raise StoryUnfinished("a story of 1000 frames was accepted")

        return [
            await time_calls("get_story_grpc", get_grpc, count=count),
            await time_calls("get_story_http", get_http, count=count),
            await time_calls("create_story_refused", refuse_grpc, count=max(10, count // 5)),
        ]


async def time_calls(name: str, call: Callable[[], Awaitable[None]], *, count: int) -> CallTimings:
    """Times `count` calls in a row, after some that warm the way."""
    for _ in range(WARM_CALLS):
        await call()
    taken: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - began)
    return CallTimings(name=name, call_s=tuple(taken))
