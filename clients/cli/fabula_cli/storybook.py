"""Turns a story into a folder to keep: frame PNGs, a contact sheet, a GIF, a page that needs nothing else, its data.

Knows values and files, no connection.
"""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabula_client import Frame, Story
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from fabula_cli.report import clean, duration, plain

SHEET_FRAME_PX = 256
SHEET_MARGIN_PX = 16
SHEET_COLUMNS = 5
GIF_SHORTEST_MS, GIF_WORD_MS = 1200, 120

_pages = Environment(
    loader=PackageLoader("fabula_cli", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


@dataclass(frozen=True, kw_only=True)
class Storybook:
    """What was written, and where."""

    folder: Path
    page: Path
    data: Path
    contact_sheet: Path
    animation: Path | None  # None while no frame is there
    frames: tuple[Path, ...]


def write_storybook(folder: Path, story: Story, images: Mapping[str, bytes], title: str = "") -> Storybook:
    """Writes the folder, replacing an earlier one's files. `images` holds the PNG of every drawn frame by SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [frame for frame in story.frames if frame.image_sha256 in images]
    names = {frame.index: f"frame-{frame.index}.png" for frame in drawn}
    for stale in folder.glob("frame-*.png"):
        stale.unlink()
    for frame in drawn:
        (folder / names[frame.index]).write_bytes(images[frame.image_sha256])
    book = Storybook(
        folder=folder,
        page=folder / "story.html",
        data=folder / "story.json",
        contact_sheet=folder / "contact_sheet.png",
        animation=folder / "story.gif" if drawn else None,
        frames=tuple(folder / name for name in names.values()),
    )
    shown = [(frame, images[frame.image_sha256]) for frame in drawn]
    contact_sheet(shown).save(book.contact_sheet)
    if book.animation is not None:
        save_animation(shown, book.animation)
    book.data.write_text(json.dumps(story_document(story, names), indent=1, ensure_ascii=False) + "\n")
    book.page.write_text(story_page(story, images, title), encoding="utf-8")
    return book


def story_document(story: Story, names: Mapping[int, str]) -> dict[str, Any]:
    """The story as data: everything that is needed to make it again, and which file holds which frame."""
    document: dict[str, Any] = plain(story)
    for frame in document["frames"]:
        frame["image"] = names.get(frame["index"])
    return document


def story_page(story: Story, images: Mapping[str, bytes], title: str = "") -> str:
    """A page with everything inside it. Every text of the story is escaped, and the page forbids itself scripts."""
    frames = [
        {
            "index": frame.index,
            "given": frame.given,
            "caption": clean(frame.caption),
            "description": clean(frame.description),
            "alt": clean(frame.description or frame.caption),
            "source": data_url(images[frame.image_sha256]) if frame.image_sha256 in images else "",
            "width": frame.width_px,
            "height": frame.height_px,
            "facts": frame_facts(frame),
        }
        for frame in story.frames
    ]
    return _pages.get_template("story.html").render(
        title=title or story_title(story),
        story_id=story.story_id,
        state=str(story.state),
        error=story.error and {"reason": story.error.reason, "message": clean(story.error.message)},
        notes=[clean(warning.message) for warning in story.warnings],
        created=story.created.strftime("%d %B %Y, %H:%M UTC") if story.created else "",
        settings=story_facts(story),
        frames=frames,
    )


def index_page(stories: Sequence[tuple[str, Story, Path]]) -> str:
    """A page that leads to several storybooks. Each story comes with its name and its folder, relative to the page."""
    entries = [
        {
            "name": name,
            "title": story_title(story),
            "state": str(story.state),
            "page": f"{folder.as_posix()}/story.html",
            "sheet": f"{folder.as_posix()}/contact_sheet.png",
            "captions": [clean(frame.caption) for frame in story.frames],
        }
        for name, story, folder in stories
    ]
    return _pages.get_template("index.html").render(stories=entries)


def story_title(story: Story) -> str:
    """The first caption, shortened."""
    caption = clean(story.frames[0].caption) if story.frames else "A story"
    return textwrap.shorten(caption, 80, placeholder=" …") or "A story"


def frame_facts(frame: Frame) -> list[tuple[str, str]]:
    """How a frame was made, for people who want to know."""
    facts = [("SHA-256", frame.image_sha256)] if frame.image_sha256 else []
    if frame.given:
        return facts
    facts = [
        ("Picture seed", str(frame.image_seed)),
        ("Caption seed", str(frame.caption_seed)),
        ("Description seed", str(frame.description_seed)),
        *facts,
    ]
    if frame.timings is not None:
        facts += [
            ("Caption written in", duration(frame.timings.caption_s)),
            ("Described in", duration(frame.timings.description_s)),
            ("Waited", duration(frame.timings.queue_s)),
            ("Drawn in", duration(frame.timings.render_s)),
        ]
    more = (("Pack", frame.pack_digest), ("Engine", frame.engine_fingerprint))
    return [*facts, *((name, value) for name, value in more if value)]


def story_facts(story: Story) -> list[tuple[str, str]]:
    """What the story was asked for; what is zero was left to the pack, and what is standard needs no word."""
    settings = story.settings
    facts = [
        ("Story", story.story_id),
        ("Seed", str(settings.seed)),
        ("Pack", settings.pack),
        ("Quality", settings.quality if settings.quality != "standard" else ""),
        ("Learned characters", ", ".join(f"{one.name} ({one.version_id[:12]})" for one in story.characters)),
        ("Steps a frame", str(settings.steps) if settings.steps else ""),
        ("Text guidance", f"{settings.text_guidance:g}" if settings.text_guidance else ""),
        ("Image guidance", f"{settings.image_guidance:g}" if settings.image_guidance else ""),
        ("Caption temperature", f"{settings.temperature:g}"),
    ]
    return [(name, value) for name, value in facts if value]


def contact_sheet(frames: Sequence[tuple[Frame, bytes]]) -> Image.Image:
    """The frames in reading order with their captions below, at most five a row."""
    font = ImageFont.load_default(size=15)
    columns = max(1, min(SHEET_COLUMNS, len(frames)))
    texts = [_wrapped(clean(frame.caption), font, SHEET_FRAME_PX) for frame, _ in frames]
    line_px = 19
    text_px = max((len(lines) for lines in texts), default=1) * line_px
    cell_w, cell_h = SHEET_FRAME_PX + SHEET_MARGIN_PX, SHEET_FRAME_PX + text_px + 2 * SHEET_MARGIN_PX
    rows = max(1, -(-len(frames) // columns))
    sheet = Image.new("RGB", (columns * cell_w + SHEET_MARGIN_PX, rows * cell_h + SHEET_MARGIN_PX), "#faf7f1")
    draw = ImageDraw.Draw(sheet)
    for place, ((_, data), lines) in enumerate(zip(frames, texts, strict=True)):
        x = SHEET_MARGIN_PX + place % columns * cell_w
        y = SHEET_MARGIN_PX + place // columns * cell_h
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
        scale = SHEET_FRAME_PX / max(image.size)
        fitting = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(fitting, Image.Resampling.LANCZOS)
        sheet.paste(image, (x + (SHEET_FRAME_PX - image.width) // 2, y + (SHEET_FRAME_PX - image.height) // 2))
        for number, line in enumerate(lines):
            draw.text((x, y + SHEET_FRAME_PX + 8 + number * line_px), line, fill="#2b2622", font=font)
    return sheet


def save_animation(frames: Sequence[tuple[Frame, bytes]], path: Path) -> None:
    """Write a GIF that shows one frame with its caption after the other, long enough to read it, for ever."""
    cells = [contact_sheet([frame]) for frame in frames]
    size = (max(cell.width for cell in cells), max(cell.height for cell in cells))
    pages = []
    for cell in cells:
        page = Image.new("RGB", size, cell.getpixel((0, 0)))
        page.paste(cell, (0, 0))
        # One palette a page: the pictures of a story differ more than 256 colours allow for together.
        pages.append(page.quantize(dither=Image.Dither.NONE))
    durations = [GIF_SHORTEST_MS + GIF_WORD_MS * len(clean(frame.caption).split()) for frame, _ in frames]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=durations, loop=0)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """Lines that fit, at most six; a word longer than a line is broken."""
    lines, line = [], ""
    for word in text.split():
        for piece in textwrap.wrap(word, 24) or [word]:
            longer = f"{line} {piece}".strip()
            if line and font.getlength(longer) > width_px:
                lines.append(line)
                line = piece
            else:
                line = longer
    lines = [*lines, line] if line else lines
    return lines if len(lines) <= 6 else [*lines[:5], lines[5] + " …"]


def data_url(image: bytes) -> str:
    """A PNG inside an attribute."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
