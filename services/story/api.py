"""What the story service can do, once. gRPC and HTTP only translate to and from these methods.

Every method raises FabulaError and nothing else that a client should see.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass, replace

import structlog
import uuid_utils

from services.runtime import paging
from services.runtime.call import current_call
from services.runtime.errors import (
    FabulaError,
    ImageNotFound,
    ShuttingDown,
    StoryNotFound,
    Unavailable,
)
from services.runtime.store import ObjectStore
from services.story.backends import Backend, Backends, CaptionBackend, Drawing, FrameBackend, LoadedPack
from services.story.characters import CharacterLookup
from services.story.config import StorySettings
from services.story.editing import Editor, EditRequest, InsertRequest
from services.story.events import Broadcaster, watch
from services.story.intake import (
    MOST_STEPS,
    PACK_CHECK_TIMEOUT_S,
    PackCheck,
    StoryRequest,
    check_caption,
    check_characters,
    check_image,
    check_options,
    check_request_id,
)
from services.story.metrics import CREATED, ENDED
from services.story.records import ACTIVE, Event, Frame, State, Story
from services.story.repository import Repository
from services.story.sandbox import Sandbox
from services.story.workflow import StoryWorkflows

MOST_CALLS = 1000  # in flight at each of the two edges; most are watches, which last as long as a story
STORY_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

log = structlog.get_logger("fabula.story.api")


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page of stories; an empty token is the end."""

    stories: tuple[Story, ...]
    next_page_token: str


class StoryApi:
    """The operations of the public API."""

    def __init__(
        self,
        *,
        repository: Repository,
        store: ObjectStore,
        workflows: StoryWorkflows,
        broadcaster: Broadcaster,
        sandbox: Sandbox,
        packs: PackCheck,
        characters: CharacterLookup,
        caption: CaptionBackend,
        frame: FrameBackend,
        settings: StorySettings,
    ) -> None:
        self._repository = repository
        self._store = store
        self._workflows = workflows
        self._broadcaster = broadcaster
        self._sandbox = sandbox
        self._packs = packs
        self._characters = characters
        self._caption = caption
        self._frame = frame
        self._settings = settings
        self._editor = Editor(repository=repository, store=store, caption=caption, frame=frame, broadcaster=broadcaster)
        self.accepting = True  # false once the process is stopping

    async def create(self, request: StoryRequest) -> tuple[Story, bool]:
        """Accepts a story; says whether it is new. Once this returns, the story is never lost."""
        if not self.accepting:
            raise ShuttingDown()
        check_request_id(request.request_id)
        body_sha256 = request.body_sha256()
        known = await self._repository.find_by_request(request.request_id, body_sha256)
        if known is not None:
            return known, False
        options = check_options(request, default_pack=self._settings.default_pack)
        wanted = check_characters(request.characters)
        caption = check_caption(request.caption)
        check_image(request.image)
        # Asked again when the story is written; here, so that a full queue costs no decoding.
        await self._repository.check_room(max_queued=self._settings.max_queued)
        await self._packs.check(options.pack, now_s=time.monotonic())
        options = replace(options, characters=await self._characters.find(wanted, pack=options.pack))
        image = await self._sandbox.decode(request.image)
        given = Frame(
            index=0,
            caption=caption,
            description=caption,
            image_sha256=await self._store.put(image.png),
            width_px=image.width_px,
            height_px=image.height_px,
        )
        call = current_call()
        story, is_new = await self._repository.create(
            story_id=str(uuid_utils.uuid7()),
            options=options,
            given=given,
            request_id=request.request_id,
            body_sha256=body_sha256,
            max_queued=self._settings.max_queued,
            traceparent=call.traceparent if call else "",
            call_id=call.request_id if call else "",
        )
        if is_new:
            CREATED.inc()
            try:
                await self._workflows.enqueue(story.story_id)
            except Exception as error:
                log.warning("enqueue_failed", story_id=story.story_id, exc_info=error)
        return story, is_new

    async def get(self, story_id: str) -> Story:
        """A story as it stands."""
        return await self._repository.get(_checked(story_id))

    async def list(self, *, page_size: int, page_token: str) -> Page:
        """Stories, newest first, without frames."""
        size = paging.page_size(page_size)
        last = paging.place_after(page_token, STORY_ID)
        found = await self._repository.page(limit=size + 1, before=last[0] if last else "")
        stories, token = paging.cut(found, size, lambda story: story.story_id)
        return Page(stories=stories, next_page_token=token)

    async def watch(self, story_id: str, *, after: int) -> AsyncGenerator[Event, None]:
        """Durable events above `after`, then what happens, until the story has ended."""
        events = watch(
            self._repository, self._broadcaster, _checked(story_id), after=after, poll_s=self._settings.poll_s
        )
        async for event in events:
            yield event

    async def cancel(self, story_id: str) -> Story:
        """Stops a story. Finished frames stay; a story that has ended stays as it is."""
        _checked(story_id)
        cancelled = await self._repository.change_state(story_id, State.CANCELLED, only_from=ACTIVE)
        if cancelled:
            ENDED.labels(state=State.CANCELLED.value).inc()
            self._workflows.cancel(story_id)
            self._broadcaster.durable(story_id)
        return await self._repository.get(story_id)

    async def edit_frame(self, request: EditRequest) -> Story:
        """Draws a frame of a story that has ended again, made of its own picture."""
        return await self._changed(self._editor.edit(replace(request, story_id=self._open(request.story_id))))

    async def insert_frame(self, request: InsertRequest) -> Story:
        """Puts a new frame between two of a story that has ended."""
        return await self._changed(self._editor.insert(replace(request, story_id=self._open(request.story_id))))

    def _open(self, story_id: str) -> str:
        """The id of a story that may be changed. Raises ShuttingDown, StoryNotFound."""
        if not self.accepting:
            raise ShuttingDown()
        return _checked(story_id)

    async def _changed(self, work: Awaitable[Story]) -> Story:
        story = await work
        self._broadcaster.durable(story.story_id)
        return story

    async def delete(self, story_id: str) -> None:
        """Deletes a story, after cancelling it. Its pictures go when no story has them any more."""
        await self.cancel(story_id)
        await self._repository.delete(story_id)
        self._broadcaster.durable(story_id)
        try:
            await self._workflows.forget(story_id)
        except Exception as error:
            log.warning("forget_failed", story_id=story_id, exc_info=error)

    async def read_image(self, story_id: str, sha256: str) -> bytes:
        """A picture of a story, as PNG."""
        if not await self._repository.has_image(_checked(story_id), sha256):
            raise ImageNotFound(metadata={"story_id": story_id, "sha256": sha256[:64]})
        return await self._store.get(sha256)

    async def backends(self) -> Backends:
        """What this installation can do now. Raises Unavailable when neither service answers."""
        caption, frame = await asyncio.gather(_asked("caption", self._caption), _asked("frame", self._frame))
        silent = tuple(name for name, packs in (("caption", caption), ("frame", frame)) if packs is None)
        if caption is None and frame is None:
            raise Unavailable(
                "neither the caption service nor the frame service answers, so nobody can say what there is",
                metadata={"services": ",".join(silent)},
            )
        writers = {pack.name: pack for pack in caption or ()}
        drawers = {pack.name: pack for pack in frame or ()}
        default = self._settings.default_pack
        names = sorted({*writers, *drawers}, key=lambda name: (name != default, name))
        return Backends(
            backends=tuple(_backend(drawers.get(name), writers.get(name), default) for name in names),
            unavailable_services=silent,
        )

    async def check_database(self) -> None:
        """Raises FabulaError when the database does not answer."""
        await self._repository.page(limit=1)


async def _asked(name: str, service: CaptionBackend | FrameBackend) -> tuple[LoadedPack, ...] | None:
    """Its packs; None when it does not answer."""
    try:
        return await service.loaded(timeout_s=PACK_CHECK_TIMEOUT_S)
    except FabulaError as error:
        log.warning("backend_silent", service=name, reason=error.reason)
        return None


def _backend(drawer: LoadedPack | None, writer: LoadedPack | None, default_pack: str) -> Backend:
    pack = drawer or writer
    assert pack is not None, "one of the two services named it"
    return Backend(
        pack=pack.name,
        digest=pack.digest,
        architecture=pack.architecture,
        is_default=pack.name == default_pack,
        drawing=_for_stories(drawer.drawing) if drawer and drawer.drawing else None,
        writes=writer is not None,
        base_digest=drawer.base_digest if drawer else "",
    )


def _for_stories(drawing: Drawing) -> Drawing:
    """What the frame service takes, as far as the edge lets it through."""
    return replace(drawing, max_steps=min(drawing.max_steps, MOST_STEPS))


def _checked(story_id: str) -> str:
    # What cannot be an id is not looked up; the answer is the same as for an id that does not exist.
    if not STORY_ID.fullmatch(story_id):
        raise StoryNotFound(metadata={"story_id": story_id[:64]})
    return story_id
