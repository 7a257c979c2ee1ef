"""Stories made by hand for the tests of the command."""

from __future__ import annotations

import hashlib
import io
from datetime import UTC, datetime

from fabula_client import Frame, FrameTimings, Reason, State, Story, StorySettings, StoryWarning
from PIL import Image

NASTY = "<script>alert(1)</script> & \"quotes\" 'single' <image> \x1b[31mred \u202eabc {{ 7*7 }} ]]>"


def png(colour: str, size: tuple[int, int] = (64, 64)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def warning(message: str) -> StoryWarning:
    return StoryWarning(reason="WORDS_UNFAMILIAR", message=message, field="caption", metadata={"words": "robot"})


def made_story(
    captions: list[str],
    *,
    description: str = "A fox on a hill.",
    state: State = State.SUCCEEDED,
    error: Reason | None = None,
    undrawn: frozenset[int] = frozenset(),
    size: tuple[int, int] = (64, 64),
    warnings: tuple[StoryWarning, ...] = (),
) -> tuple[Story, dict[str, bytes]]:
    images: dict[str, bytes] = {}
    frames = []
    for index, caption in enumerate(captions):
        data = png(f"#{(index * 40) % 256:02x}8040", size)
        sha256 = "" if index in undrawn else hashlib.sha256(data).hexdigest()
        if sha256:
            images[sha256] = data
        frames.append(
            Frame(
                index=index,
                caption=caption,
                description=description,
                image_sha256=sha256,
                width_px=size[0],
                height_px=size[1],
                image_seed=1000 + index,
                caption_seed=2000 + index,
                description_seed=3000 + index,
                timings=FrameTimings(caption_s=0.4, description_s=0.3, queue_s=0.1, render_s=5.2) if index else None,
                pack_digest="sha256:feed" if index else "",
                created=datetime(2026, 11, 20, tzinfo=UTC),
            )
        )
    settings = StorySettings(
        frame_count=len(captions) - 1,
        seed=7,
        pack="toon",
        steps=25,
        text_guidance=7.5,
        image_guidance=0.0,
        temperature=0.2,
    )
    story = Story(
        story_id="story-1",
        state=state,
        settings=settings,
        frames=tuple(frames),
        created=datetime(2026, 11, 20, 9, 30, tzinfo=UTC),
        updated=None,
        error=error,
        last_sequence=3,
        warnings=warnings,
    )
    return story, images
