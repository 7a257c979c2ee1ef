"""Changes stories that have ended: a frame drawn again from its picture, a new frame between two.

Nothing here runs by itself. While a call waits its picture is drawn; then one transaction makes it part of the story,
with the version before kept. A call that breaks off has changed nothing, and the same call again draws the same again:
seeds derive from the story's.

Which frames a new one is shown is decided by `shown_for_edit` and `shown_between`, from what the pack can do.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.runtime.errors import (
    FeatureMissing,
    FrameNotFound,
    PackUnknown,
    StoryNotEnded,
    StoryTooLong,
    ValueOutOfRange,
)
from services.runtime.store import ObjectStore
from services.story import characters
from services.story.backends import CaptionBackend, Drawing, DrawnFrame, FrameBackend
from services.story.events import Broadcaster
from services.story.intake import (
    MOST_FRAMES,
    PACK_CHECK_TIMEOUT_S,
    check_caption,
    check_request_id,
    check_seed,
)
from services.story.plan import MAX_REFERENCES, derive_seed
from services.story.records import Frame, Passing, Story
from services.story.repository import Repository

DEFAULT_STRENGTH = 0.5  # the report's


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """EditFrame as it came, over either protocol. None means that the client did not say."""

    story_id: str
    frame_index: int
    strength: float | None = None
    caption: str | None = None
    description: str | None = None
    seed: int | None = None
    request_id: str = ""


@dataclass(frozen=True, kw_only=True)
class InsertRequest:
    """InsertFrame as it came, over either protocol. None means that the client did not say."""

    story_id: str
    after_frame_index: int
    caption: str
    description: str | None = None
    seed: int | None = None
    request_id: str = ""


@dataclass(frozen=True)
class Shown:
    """A frame that a new one is shown, and how far away it is; 0 stands for the frames just before, in their order."""

    frame: Frame
    distance: int = 0


def shown_for_edit(frames: Sequence[Frame], index: int, drawing: Drawing) -> tuple[Shown, ...]:
    """The frames before the one that is drawn again: what it was shown at first, as far as the pack looks back."""
    return _before(frames[:index], drawing)


def shown_between(frames: Sequence[Frame], after_index: int, drawing: Drawing) -> tuple[Shown, ...]:
    """Both neighbours as equals, and what else there is room for before them; only what was before where that is all
    that the pack can do; nothing where it draws each frame for itself."""
    room = min(drawing.max_references, MAX_REFERENCES)
    if "insert" not in drawing.features or room < 2:
        return _before(frames[: after_index + 1], drawing)
    before = frames[max(0, after_index + 2 - room) : after_index + 1]
    return (
        *(Shown(frame, len(before) - place) for place, frame in enumerate(before)),
        Shown(frames[after_index + 1], 1),
    )


def _before(frames: Sequence[Frame], drawing: Drawing) -> tuple[Shown, ...]:
    room = min(drawing.max_references, MAX_REFERENCES)
    return tuple(Shown(frame) for frame in (frames[-room:] if room else ()))


class Editor:
    """Draws what changes a story. Every method raises FabulaError and nothing else that a client should see."""

    def __init__(
        self,
        *,
        repository: Repository,
        store: ObjectStore,
        caption: CaptionBackend,
        frame: FrameBackend,
        broadcaster: Broadcaster,
    ) -> None:
        self._repository = repository
        self._store = store
        self._caption = caption
        self._frame = frame
        self._broadcaster = broadcaster

    async def edit(self, request: EditRequest) -> Story:
        """The story with a frame drawn again.

        Raises FrameNotFound, StoryNotEnded, StaleParent, FeatureMissing, IdempotencyKeyReused, ValueOutOfRange,
        Caption… errors, and what the services raise.
        """
        check_request_id(request.request_id)
        body_sha256 = _body_sha256("EditFrame", request)
        if (known := await self._repository.find_by_request(request.request_id, body_sha256)) is not None:
            return known
        strength = _strength(request.strength)
        caption = None if request.caption is None else check_caption(request.caption)
        told = None if request.description is None else check_caption(request.description, field="description")
        check_seed(request.seed)
        story, index = await self._ended(request.story_id), request.frame_index
        old = _drawn(story, index, "frame_index")
        drawing = await self._drawing(story.options.pack)
        if "edit" not in drawing.features:
            raise FeatureMissing(
                f"the pack {story.options.pack!r} does not make frames of pictures here",
                metadata={"pack": story.options.pack, "feature": "edit"},
            )
        version = old.version + 1
        new = replace(
            old,
            caption=old.caption if caption is None else caption,
            version=version,
            stale=False,
            edit_strength=strength,
            image_seed=_seed(request.seed, story, index, f"edit/{version}/image"),
            description_s=None,
        )
        if told is not None:
            new = replace(new, description=told, description_seed=0)
        elif caption is not None and caption != old.caption:
            new = await self._described(story, story.frames[:index], new, f"edit/{version}/description")
        return await self._repository.replace_frame(
            story.story_id,
            old,
            await self._redrawn(
                story,
                new,
                shown_for_edit(story.frames, index, drawing),
                edit=(await self._store.get(str(old.image_sha256)), strength),
            ),
            request_id=request.request_id,
            body_sha256=body_sha256,
        )

    async def insert(self, request: InsertRequest) -> Story:
        """The story with a new frame between two.

        Raises as `edit`, and StoryTooLong.
        """
        check_request_id(request.request_id)
        body_sha256 = _body_sha256("InsertFrame", request)
        if (known := await self._repository.find_by_request(request.request_id, body_sha256)) is not None:
            return known
        caption = check_caption(request.caption)
        told = None if request.description is None else check_caption(request.description, field="description")
        check_seed(request.seed)
        story, after = await self._ended(request.story_id), request.after_frame_index
        for index in (after, after + 1):
            _drawn(story, index, "after_frame_index")
        if len(story.frames) > MOST_FRAMES:
            raise StoryTooLong(
                f"the story has {len(story.frames)} frames; at most {MOST_FRAMES} follow the first",
                metadata={"limit": str(MOST_FRAMES)},
            )
        drawing = await self._drawing(story.options.pack)
        # A place can be filled more than once; what the story has been through tells the times apart.
        purpose = f"insert/{story.last_sequence}"
        new = Frame(
            index=after + 1,
            caption=caption,
            description=told,
            image_seed=_seed(request.seed, story, after + 1, f"{purpose}/image"),
        )
        if told is None:
            new = await self._described(story, story.frames[: after + 1], new, f"{purpose}/description")
        return await self._repository.insert_frame(
            story.story_id,
            await self._redrawn(story, new, shown_between(story.frames, after, drawing)),
            last_sequence=story.last_sequence,
            request_id=request.request_id,
            body_sha256=body_sha256,
        )

    async def _ended(self, story_id: str) -> Story:
        story = await self._repository.get(story_id)
        if not story.state.ended:
            raise StoryNotEnded(metadata={"story_id": story_id, "state": story.state.value})
        return story

    async def _drawing(self, pack: str) -> Drawing:
        """What the pack can do. Raises PackUnknown, or what the frame service raises."""
        loaded = {each.name: each.drawing for each in await self._frame.loaded(timeout_s=PACK_CHECK_TIMEOUT_S)}
        drawing = loaded.get(pack)
        if drawing is None:
            raise PackUnknown(
                f"the frame service no longer has the story's pack {pack!r}; it has {', '.join(loaded)}",
                metadata={"pack": pack, "known": ",".join(loaded)},
            )
        return drawing

    async def _described(self, story: Story, before: Sequence[Frame], new: Frame, purpose: str) -> Frame:
        """The frame with what the caption service makes of its caption; the first one has its caption there."""
        if not before:
            return replace(new, description=new.caption, description_seed=0)
        started, seed = time.monotonic(), derive_seed(story.options.seed, new.index, purpose)
        written = await self._caption.describe(
            pack=story.options.pack,
            image=await self._store.get(str(before[-1].image_sha256)),
            previous_caption=before[-1].caption,
            caption=new.caption,
            earlier_captions=tuple(frame.caption for frame in before[:-1]),
            earlier_descriptions=tuple(frame.description for frame in before if frame.description),
            characters=story.options.characters,
            seed=seed,
            temperature=story.options.temperature,
        )
        return replace(new, description=written.text, description_seed=seed, description_s=time.monotonic() - started)

    async def _redrawn(
        self, story: Story, new: Frame, shown: Sequence[Shown], *, edit: tuple[bytes, float] | None = None
    ) -> Frame:
        """The frame with its picture, which is in the store."""

        def pass_on(what: Passing) -> None:
            self._broadcaster.passing(story.story_id, what)

        options = story.options
        description = new.description or new.caption
        # Once edited, the first picture is one that a pack drew.
        users = [each.frame.index == 0 and each.frame.version == 1 for each in shown]
        drawn = await self._frame.render(
            frame_index=new.index,
            pack=options.pack,
            description=description,
            references=[
                (await self._store.get(str(each.frame.image_sha256)), each.frame.description or each.frame.caption)
                for each in shown
            ],
            distances=[each.distance for each in shown],
            given=users.index(True) if True in users else None,
            seed=new.image_seed,
            steps=options.steps,
            text_guidance=options.text_guidance,
            image_guidance=options.image_guidance,
            quality=options.quality,
            characters=[one.weights_sha256 for one in characters.drawn_in(options.characters, description)],
            edit=edit,
            on_passing=pass_on,
        )
        return _with_picture(new, drawn, await self._store.put(drawn.image))


def _with_picture(new: Frame, drawn: DrawnFrame, sha256: str) -> Frame:
    return replace(
        new,
        image_sha256=sha256,
        width_px=drawn.width_px,
        height_px=drawn.height_px,
        queue_s=drawn.queue_s,
        render_s=drawn.render_s,
        pack_digest=drawn.pack_digest,
        engine_fingerprint=drawn.engine_fingerprint,
    )


def _drawn(story: Story, index: int, field: str) -> Frame:
    if index < len(story.frames) and story.frames[index].image_sha256:
        return story.frames[index]
    raise FrameNotFound(
        f"the story has no drawn frame {index}; its last one is {len(story.frames) - 1}",
        metadata={"story_id": story.story_id, "field": field, "frame_index": str(index)},
    )


def _strength(given: float | None) -> float:
    strength = DEFAULT_STRENGTH if given is None else given
    if not 0.0 < strength <= 1.0:  # not a number is neither
        raise ValueOutOfRange(
            f"strength is {strength}; it must be above 0 and at most 1",
            field="strength",
            metadata={"value": str(strength), "most": "1"},
        )
    return strength


def _seed(given: int | None, story: Story, index: int, purpose: str) -> int:
    return derive_seed(story.options.seed, index, purpose) if given is None else given


def _body_sha256(method: str, request: EditRequest | InsertRequest) -> str:
    """The same for the same request, however it came: what a request id is compared by."""
    body: dict[str, Any] = {name: getattr(request, name) for name in request.__dataclass_fields__}
    del body["request_id"]
    return hashlib.sha256(json.dumps({"method": method, **body}, sort_keys=True).encode()).hexdigest()
