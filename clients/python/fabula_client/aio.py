"""The async client. `sync.py` is the same with the waiting done for you.

async with AsyncClient() as client:
    story = await client.stories.create(image="first.png", caption="Pip finds a kite.", frame_count=4, seed=7)
    async for event in story.watch():
        print(event)
    picture = await story.read_image(1)
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import grpc
from fabula.story.v1 import story_pb2
from fabula.story.v1 import story_service_pb2 as pb
from fabula.story.v1.story_service_pb2_grpc import StoryServiceStub

from fabula_client.backends import Backends, backends_from_pb
from fabula_client.calls import MOST_IMAGE_BYTES, Connection, Metadata
from fabula_client.characters_aio import AsyncCharacters
from fabula_client.errors import (
    FieldViolation,
    ImageCorrupt,
    InvalidArgument,
    NotFound,
    StoryCancelled,
    StoryFailed,
    Unavailable,
    WaitTimedOut,
)
from fabula_client.retrying import RetryPolicy
from fabula_client.story import (
    Frame,
    Quality,
    State,
    StateChanged,
    Story,
    StoryEvent,
    StoryWarning,
    event_from_pb,
    story_from_pb,
)

DEFAULT_TARGET = "127.0.0.1:8471"
DRAWING_TIMEOUT_S = 600.0  # of calls that answer with a picture: they wait for room and for every step
ImageSource = bytes | str | os.PathLike[str]


class AsyncClient:
    """A connection to one Fabula. Use it as an async context manager, or call `close`."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
        metadata: Metadata = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`target` is host:port of the story service's gRPC. `timeout_s` bounds each call, all its tries together.

        `metadata` goes with every call. `credentials` make it TLS.
        """
        self._connection = Connection(
            target, timeout_s=timeout_s, retry=retry or RetryPolicy(), metadata=metadata, credentials=credentials
        )
        self.stories = AsyncStories(self._connection)
        self.characters = AsyncCharacters(self._connection)

    async def backends(self, *, timeout_s: float | None = None) -> Backends:
        """What this Fabula can do now: its packs, and what may be asked of each. Raises Unavailable when none of its
        services can say; while one of two is silent, `unavailable_services` names it."""
        stub = StoryServiceStub(self._connection.channel)
        answer = await self._connection.call(stub.ListBackends, pb.ListBackendsRequest(), timeout_s=timeout_s)
        return backends_from_pb(answer)

    async def close(self) -> None:
        """Closes the connection; calls in flight are cancelled, stories go on."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncStories:
    """The stories of one Fabula."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create(
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
    ) -> AsyncStory:
        """Starts a story from a first picture (bytes or a path) and its caption. Once this returns, the story is
        never lost.

        `frame_count` is 1 to 20 frames to add (4 if unset); `seed` is below 2^53 (the server picks one if unset);
        `steps` 1 to 100, guidance 0 to 30 and `temperature` 0 to 2 are the pack's defaults if unset.
        `quality` says how much time a frame is worth: draft is fastest, best takes longest; `steps` and guidance that
        are set count more.
        `characters` are published ones, at most eight: a name, which stands for its newest version on the pack, or a
        version's id. Frames that name them are drawn as they were learned. Raises NotFound (CHARACTER_NOT_FOUND) and
        FailedPrecondition (CHARACTER_OF_ANOTHER_PACK, FEATURE_MISSING) for one that cannot be.
        `idempotency_key` names this request: the same key with the same body gives the same story. Without one, a
        fresh key makes the retries of this call safe. Raises InvalidArgument, IdempotencyKeyReused,
        ResourceExhausted, Unavailable, and OSError for an unreadable path. A picture has at most 8 MiB; a larger one
        is refused here, as the service would (IMAGE_TOO_LARGE): the transport might not even carry it.
        """
        picture = await asyncio.to_thread(_read_picture, image)
        request = pb.CreateStoryRequest(
            request_id=idempotency_key or str(uuid.uuid4()),
            image=picture,
            caption=caption,
            frame_count=frame_count,
            seed=seed,
            pack=pack,
            steps=steps,
            text_guidance=text_guidance,
            image_guidance=image_guidance,
            temperature=temperature,
            quality=_quality_to_pb(quality),
            characters=(characters,) if isinstance(characters, str) else characters,  # no letters of one name
        )
        answer = await self._connection.call(self._stub.CreateStory, request, timeout_s=timeout_s)
        return AsyncStory(self._connection, story_from_pb(answer.story))

    async def get(self, story_id: str, *, timeout_s: float | None = None) -> AsyncStory:
        """Reads a story. Raises NotFound."""
        answer = await self._connection.call(
            self._stub.GetStory, pb.GetStoryRequest(story_id=story_id), timeout_s=timeout_s
        )
        return AsyncStory(self._connection, story_from_pb(answer.story))

    async def list(self, *, page_size: int = 0, timeout_s: float | None = None) -> AsyncIterator[AsyncStory]:
        """Every story, newest first and without frames; asks for page after page as you go. `timeout_s` is per page."""
        token = ""
        while True:
            answer = await self._connection.call(
                self._stub.ListStories,
                pb.ListStoriesRequest(page_size=page_size, page_token=token),
                timeout_s=timeout_s,
            )
            for story in answer.stories:
                yield AsyncStory(self._connection, story_from_pb(story))
            token = answer.next_page_token
            if not token:
                return

    @property
    def _stub(self) -> StoryServiceStub:
        return StoryServiceStub(self._connection.channel)


class AsyncStory:
    """One story: what was last read of it (`value`), and what can be done with it."""

    def __init__(self, connection: Connection, value: Story) -> None:
        self._connection = connection
        self.value = value

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.story_id} {self.state}>"

    @property
    def story_id(self) -> str:
        """Its id."""
        return self.value.story_id

    @property
    def state(self) -> State:
        """Its state when it was last read."""
        return self.value.state

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The frames it had when it was last read."""
        return self.value.frames

    @property
    def warnings(self) -> tuple[StoryWarning, ...]:
        """What the pack did not know of what it was given, as far as that was noticed when it was last read."""
        return self.value.warnings

    async def refresh(self, *, timeout_s: float | None = None) -> Story:
        """Reads it again. Raises NotFound when it was deleted."""
        request = pb.GetStoryRequest(story_id=self.story_id)
        answer = await self._connection.call(self._stub.GetStory, request, timeout_s=timeout_s)
        self.value = story_from_pb(answer.story)
        return self.value

    async def watch(self, *, after_sequence: int = 0, patience_s: float = 120.0) -> AsyncIterator[StoryEvent]:
        """What happened after `after_sequence` (0: from the start), then what happens, until the story ends.

        A broken connection is taken up again where it broke: no durable event is missed or given twice. Raises
        Unavailable once the service has not been reached for `patience_s`, NotFound when the story is deleted.
        """
        last, failures, pause = after_sequence, 0, 0.0
        lost_at = time.monotonic()  # when the service was last seen to go
        while True:
            request = pb.WatchStoryRequest(story_id=self.story_id, after_sequence=last)
            error: Unavailable | None = None
            opened_at, heard = time.monotonic(), False
            try:
                try:
                    async for message in self._connection.stream(self._stub.WatchStory, request):
                        failures, heard = 0, True
                        event = event_from_pb(message.event)
                        if 0 < event.sequence <= last:
                            continue  # replayed by a service that counts differently than we asked; seen already
                        last = event.sequence or last
                        yield event
                        if isinstance(event, StateChanged) and event.state.ended:
                            return
                finally:
                    # A story that waits is silent, so a stream that stood for as long as the pause before it was at
                    # the service too. Where nobody answers, a try fails at once.
                    now = time.monotonic()
                    if heard or now - opened_at >= pause:
                        lost_at = now
                if (await self.refresh()).ended and self.value.last_sequence <= last:
                    return  # the end was before `after_sequence`
            except Unavailable as caught:
                error = caught
            # The service is away, or closed the stream early because it stops.
            failures += 1
            pause = self._connection.retry.pause_s(failures, random.random())
            if time.monotonic() + pause - lost_at > patience_s:
                raise error or Unavailable("the stream of events keeps ending before the story does")
            await asyncio.sleep(pause)

    async def wait(self, *, timeout_s: float | None = None, check: bool = True) -> Story:
        """Waits until the story has ended, and reads it.

        Raises WaitTimedOut after `timeout_s` (the story goes on) and, unless `check` is False, StoryFailed or
        StoryCancelled.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if not self.value.ended:
                    async for _ in self.watch(after_sequence=self.value.last_sequence):
                        pass
                await self.refresh()
        except TimeoutError:
            raise WaitTimedOut(f"story {self.story_id} had not ended after {timeout_s:g} s; it goes on") from None
        if check and self.state is State.FAILED:
            raise StoryFailed(self.value)
        if check and self.state is State.CANCELLED:
            raise StoryCancelled(self.value)
        return self.value

    async def cancel(self, *, timeout_s: float | None = None) -> Story:
        """Stops it; finished frames stay. Cancelling a story that has ended changes nothing. Raises NotFound."""
        request = pb.CancelStoryRequest(story_id=self.story_id)
        answer = await self._connection.call(self._stub.CancelStory, request, timeout_s=timeout_s)
        self.value = story_from_pb(answer.story)
        return self.value

    async def edit_frame(
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
        """Draws a frame again, made of its own picture, and waits for it. The story must have ended.

        `strength` is how much of the picture is drawn anew, above 0 and at most 1 (0.5 if unset). A new `caption` is
        described anew by the service unless `description` says what to draw. The old version is kept in
        `earlier_versions`; frames that follow become stale. Raises NotFound, FailedPrecondition (STORY_NOT_ENDED,
        FEATURE_MISSING, STALE_PARENT when the frame was changed meanwhile), InvalidArgument, IdempotencyKeyReused,
        ResourceExhausted, Unavailable.
        """
        request = pb.EditFrameRequest(
            request_id=idempotency_key or str(uuid.uuid4()),
            story_id=self.story_id,
            frame_index=index,
            strength=strength,
            caption=caption,
            description=description,
            seed=seed,
        )
        answer = await self._connection.call(self._stub.EditFrame, request, timeout_s=timeout_s)
        self.value = story_from_pb(answer.story)
        return self.value

    async def insert_frame(
        self,
        after_index: int,
        *,
        caption: str,
        description: str | None = None,
        seed: int | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = DRAWING_TIMEOUT_S,
    ) -> Story:
        """Puts a new frame between `after_index` and the next one, and waits for it. The story must have ended.

        It agrees with both neighbours where the pack has the feature `insert` (see `Client.backends`). Frames that
        follow move up by one. Raises as `edit_frame`; STORY_TOO_LONG when there is no room.
        """
        request = pb.InsertFrameRequest(
            request_id=idempotency_key or str(uuid.uuid4()),
            story_id=self.story_id,
            after_frame_index=after_index,
            caption=caption,
            description=description,
            seed=seed,
        )
        answer = await self._connection.call(self._stub.InsertFrame, request, timeout_s=timeout_s)
        self.value = story_from_pb(answer.story)
        return self.value

    async def delete(self, *, timeout_s: float | None = None) -> None:
        """Deletes it, cancelling it first. Raises NotFound when there was nothing to delete."""
        await self._connection.call(
            self._stub.DeleteStory,
            pb.DeleteStoryRequest(story_id=self.story_id),
            timeout_s=timeout_s,
            forgive=lambda error: isinstance(error, NotFound),  # a try whose answer was lost had deleted it
        )

    async def read_image(self, frame: Frame | int | str, *, timeout_s: float | None = None) -> bytes:
        """The PNG of a frame, given as a Frame, its index or its SHA-256; checked against the SHA-256.

        Raises NotFound, ImageCorrupt, and IndexError for an index whose frame is not drawn.
        """
        sha256 = frame if isinstance(frame, str) else await self._sha256_of(frame)
        request = pb.ReadImageRequest(story_id=self.story_id, sha256=sha256)
        parts = await self._connection.collect(self._stub.ReadImage, request, timeout_s=timeout_s)
        image = b"".join(part.chunk for part in parts)
        if hashlib.sha256(image).hexdigest() != sha256:
            raise ImageCorrupt(f"the picture received for {sha256} has another SHA-256")
        return image

    async def _sha256_of(self, frame: Frame | int) -> str:
        if isinstance(frame, Frame):
            return frame.image_sha256
        for _ in range(2):
            for each in self.frames:
                if each.index == frame and each.image_sha256:
                    return each.image_sha256
            await self.refresh()
        raise IndexError(f"story {self.story_id} has no drawn frame {frame}")

    @property
    def _stub(self) -> StoryServiceStub:
        return StoryServiceStub(self._connection.channel)


def _read_picture(image: ImageSource) -> bytes:
    """The picture's bytes; a file that is too large is not read."""
    if isinstance(image, bytes):
        _check_size(len(image))
        return image
    with Path(image).open("rb") as file:
        _check_size(os.fstat(file.fileno()).st_size)
        picture = file.read(MOST_IMAGE_BYTES + 1)  # a pipe has no size beforehand
    _check_size(len(picture))
    return picture


def _check_size(size_bytes: int) -> None:
    if size_bytes > MOST_IMAGE_BYTES:
        message = f"the picture has {size_bytes} bytes; at most {MOST_IMAGE_BYTES} are taken"
        raise InvalidArgument(
            message,
            reason="IMAGE_TOO_LARGE",
            metadata={"field": "image", "limit_bytes": str(MOST_IMAGE_BYTES)},
            field_violations=(FieldViolation("image", message),),
        )


def _quality_to_pb(quality: Quality) -> Any:
    """The enum value. A word that has none is refused here, as the service would: the wire could not carry it."""
    known = get_args(Quality)
    if quality not in known:
        message = f"quality is {quality!r}; it must be {', '.join(known[:-1])} or {known[-1]}"
        raise InvalidArgument(
            message,
            reason="VALUE_OUT_OF_RANGE",
            metadata={"field": "quality", "value": str(quality), "known": ",".join(known)},
            field_violations=(FieldViolation("quality", message),),
        )
    return story_pb2.Quality.Value(f"QUALITY_{quality.upper()}")
