"""The client for programs without an event loop: the async client on a loop in a thread of its own. No rule lives here.

with Client() as client:
    story = client.stories.create(image="first.png", caption="Pip finds a kite.", frame_count=4, seed=7)
    for event in story.watch():
        print(event)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from fabula_client.aio import DEFAULT_TARGET, DRAWING_TIMEOUT_S, AsyncClient, AsyncStories, AsyncStory, ImageSource
from fabula_client.backends import Backends
from fabula_client.calls import Metadata
from fabula_client.characters_sync import Characters
from fabula_client.retrying import RetryPolicy
from fabula_client.story import Frame, Quality, State, Story, StoryEvent, StoryWarning

T = TypeVar("T")


class _Loop:
    """An event loop in a daemon thread, and the way in."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fabula-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Does the work on the loop and waits for it. An interrupt (Ctrl-C) cancels the work."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """The items, fetched one by one; leaving the iteration early ends it over there too."""

        async def following() -> T:
            return await anext(items)

        try:
            while True:
                try:
                    item = self.run(following())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            closing: Callable[[], Coroutine[Any, Any, None]] | None = getattr(items, "aclose", None)
            if closing is not None and not self._loop.is_closed():
                self.run(closing())

    def close(self) -> None:
        """Stops the loop and its thread. May be called twice."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class Client:
    """A connection to one Fabula. Use it as a context manager, or call `close`. See AsyncClient for the arguments."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        metadata: Metadata = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._core = AsyncClient(target, timeout_s=timeout_s, retry=retry, metadata=metadata, credentials=credentials)
        self._loop = _Loop()
        self.stories = Stories(self._loop, self._core.stories)
        self.characters = Characters(self._loop, self._core.characters)

    def backends(self, *, timeout_s: float | None = None) -> Backends:
        """What this Fabula can do now. See AsyncClient.backends."""
        return self._loop.run(self._core.backends(timeout_s=timeout_s))

    def close(self) -> None:
        """Closes the connection; stories go on."""
        try:
            self._loop.run(self._core.close())
        finally:
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stories:
    """The stories of one Fabula. See AsyncStories."""

    def __init__(self, loop: _Loop, core: AsyncStories) -> None:
        self._loop = loop
        self._core = core

    def create(
        self,
        *,
        image: ImageSource,
        caption: str,
        frame_count: int | None = None,
        seed: int | None = None,
        pack: str = "",
        steps: int | None = None,
        text_guidance: float | None = None,
        image_guidance: float | None = None,
        temperature: float | None = None,
        quality: Quality = "standard",
        characters: Sequence[str] = (),
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> StoryHandle:
        """Starts a story. See AsyncStories.create."""
        story = self._core.create(
            image=image,
            caption=caption,
            frame_count=frame_count,
            seed=seed,
            pack=pack,
            steps=steps,
            text_guidance=text_guidance,
            image_guidance=image_guidance,
            temperature=temperature,
            quality=quality,
            characters=characters,
            idempotency_key=idempotency_key,
            timeout_s=timeout_s,
        )
        return StoryHandle(self._loop, self._loop.run(story))

    def get(self, story_id: str, *, timeout_s: float | None = None) -> StoryHandle:
        """Reads a story. See AsyncStories.get."""
        return StoryHandle(self._loop, self._loop.run(self._core.get(story_id, timeout_s=timeout_s)))

    def list(self, *, page_size: int = 0, timeout_s: float | None = None) -> Iterator[StoryHandle]:
        """Every story, newest first. See AsyncStories.list."""
        for story in self._loop.iterate(self._core.list(page_size=page_size, timeout_s=timeout_s)):
            yield StoryHandle(self._loop, story)


class StoryHandle:
    """One story: what was last read of it, and what can be done with it. See AsyncStory."""

    def __init__(self, loop: _Loop, core: AsyncStory) -> None:
        self._loop = loop
        self._core = core

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.story_id} {self.state}>"

    @property
    def value(self) -> Story:
        """What was last read of it."""
        return self._core.value

    @property
    def story_id(self) -> str:
        """Its id."""
        return self._core.story_id

    @property
    def state(self) -> State:
        """Its state when it was last read."""
        return self._core.state

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The frames it had when it was last read."""
        return self._core.frames

    @property
    def warnings(self) -> tuple[StoryWarning, ...]:
        """What the pack did not know of what it was given. See AsyncStory.warnings."""
        return self._core.warnings

    def refresh(self, *, timeout_s: float | None = None) -> Story:
        """Reads it again. See AsyncStory.refresh."""
        return self._loop.run(self._core.refresh(timeout_s=timeout_s))

    def watch(self, *, after_sequence: int = 0, patience_s: float = 120.0) -> Iterator[StoryEvent]:
        """Follows it until it ends, across broken connections. See AsyncStory.watch."""
        return self._loop.iterate(self._core.watch(after_sequence=after_sequence, patience_s=patience_s))

    def wait(self, *, timeout_s: float | None = None, check: bool = True) -> Story:
        """Waits until it has ended. See AsyncStory.wait."""
        return self._loop.run(self._core.wait(timeout_s=timeout_s, check=check))

    def cancel(self, *, timeout_s: float | None = None) -> Story:
        """Stops it. See AsyncStory.cancel."""
        return self._loop.run(self._core.cancel(timeout_s=timeout_s))

    def edit_frame(
        self,
        index: int,
        *,
        strength: float | None = None,
        caption: str | None = None,
        description: str | None = None,
        seed: int | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = DRAWING_TIMEOUT_S,
    ) -> Story:
        """Draws a frame again, made of its own picture. See AsyncStory.edit_frame."""
        return self._loop.run(
            self._core.edit_frame(
                index,
                strength=strength,
                caption=caption,
                description=description,
                seed=seed,
                idempotency_key=idempotency_key,
                timeout_s=timeout_s,
            )
        )

    def insert_frame(
        self,
        after_index: int,
        *,
        caption: str,
        description: str | None = None,
        seed: int | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = DRAWING_TIMEOUT_S,
    ) -> Story:
        """Puts a new frame between two. See AsyncStory.insert_frame."""
        return self._loop.run(
            self._core.insert_frame(
                after_index,
                caption=caption,
                description=description,
                seed=seed,
                idempotency_key=idempotency_key,
                timeout_s=timeout_s,
            )
        )

    def delete(self, *, timeout_s: float | None = None) -> None:
        """Deletes it. See AsyncStory.delete."""
        self._loop.run(self._core.delete(timeout_s=timeout_s))

    def read_image(self, frame: Frame | int | str, *, timeout_s: float | None = None) -> bytes:
        """The PNG of a frame. See AsyncStory.read_image."""
        return self._loop.run(self._core.read_image(frame, timeout_s=timeout_s))
