"""`fabula story …`: continue, watch, show, list, edit, insert, cancel, delete."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from fabula_client import (
    Client,
    FabulaError,
    Quality,
    State,
    Story,
    StoryEvent,
    StoryHandle,
    Unavailable,
)
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fabula_cli import exits
from fabula_cli.installation import Installation
from fabula_cli.options import AsJson, Home, PortBase, StoryId, Target
from fabula_cli.progress import Telling, lines, picture
from fabula_cli.report import aside, clean, duration, fail, people, plain, say_json
from fabula_cli.storybook import Storybook, write_storybook

VERSION_BEGINNING = re.compile(r"[0-9a-f]{6,63}")
FrameSeed = Annotated[
    int | None,
    typer.Option("--seed", help="Same seed, same picture.", min=0, max=2**53 - 1, show_default="the story's"),
]
FrameKey = Annotated[
    str | None, typer.Option("--idempotency-key", help="Calling again with the same key changes nothing again.")
]

app = typer.Typer(no_args_is_help=True, help="Continue stories, follow them, keep them.")


@contextmanager
def connected(home: Path | None, port_base: int | None, target: str | None, as_json: bool) -> Iterator[Client]:
    """A client of the installation; what it raises becomes a message and an exit status."""
    address = target or Installation.find(home, port_base).target()
    with Client(address) as client:
        try:
            yield client
        except Unavailable as error:
            fail(
                f"nobody answers at {address} ({error.message}). `fabula up` starts the services.",
                status=exits.NOT_RUNNING,
                as_json=as_json,
                reason=error.reason,
            )
        except FabulaError as error:
            faults = [{"field": each.field, "description": each.description} for each in error.field_violations]
            named = "".join(f"\n  {each['field']}: {each['description']}" for each in faults)
            fail(
                f"{error}{named}",
                status=exits.REFUSED,
                as_json=as_json,
                reason=error.reason,
                metadata=error.metadata,
                field_violations=faults,
                request_id=error.request_id,
            )
        except UnicodeError as error:
            fail(f"a text holds bytes that are not UTF-8: {error}", status=exits.USAGE, as_json=as_json)


@app.command("continue")
def continue_(
    image: Annotated[
        Path, typer.Option(help="The first picture: PNG, JPEG, WebP, GIF or TIFF.", exists=True, dir_okay=False)
    ],
    caption: Annotated[str, typer.Option(help="The first picture's story caption.")],
    frames: Annotated[int | None, typer.Option(help="Frames to add, 1 to 20.", min=1, max=20, show_default="4")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same story.", min=0, max=2**53 - 1, show_default="random")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the finished story.", file_okay=False)] = None,
    pack: Annotated[
        str, typer.Option(help="The pack whose models write and draw.", show_default="the default pack")
    ] = "",
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps a frame, 1 to 100.", show_default="the pack's")
    ] = None,
    text_guidance: Annotated[float | None, typer.Option(help="0 to 30.", show_default="the pack's")] = None,
    image_guidance: Annotated[float | None, typer.Option(help="0 to 30.", show_default="the pack's")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the captions, 0 to 2.", show_default="0.2")] = None,
    quality: Annotated[
        Quality,
        typer.Option(
            help="How much time a frame is worth: draft is fastest, best takes longest; steps and guidance set "
            "explicitly count more."
        ),
    ] = "standard",
    character: Annotated[
        list[str] | None,
        typer.Option(
            help="Somebody who was taught and published: a name (its newest version on the pack), or a version's id "
            "or its beginning, of `fabula character versions`. Once for each, at most eight times.",
            show_default="nobody",
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--idempotency-key", help="Calling again with the same key gives the same story.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the story until it ends.")] = True,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Continue a story from one picture and one sentence.

    Examples:

      fabula story continue --image first.png --caption "Pip finds a kite." --frames 4 --seed 7 --out mystory/

      fabula story continue --image first.png --caption "Rosa finds a kite." --character Rosa --out mystory/

      fabula story continue --image first.png --caption "Pip finds a kite." --no-wait --json | jq -r .story.story_id
    """
    with connected(home, port_base, target, as_json) as client:
        story = client.stories.create(
            image=image,
            caption=caption,
            frame_count=frames,
            seed=seed,
            pack=pack,
            steps=steps,
            text_guidance=text_guidance,
            image_guidance=image_guidance,
            temperature=temperature,
            quality=quality,
            characters=[_whom(client, each) for each in character or ()],
            idempotency_key=key,
        )
        if not wait:
            _answer(story.value, None, as_json)
            return
        follow(story, quiet=as_json)
        _finish(story, out, as_json)


@app.command()
def watch(
    story_id: StoryId,
    out: Annotated[Path | None, typer.Option(help="Folder for the finished story.", file_okay=False)] = None,
    after: Annotated[int, typer.Option(help="Only events above this sequence number.", min=0)] = 0,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Follow a story until it ends. With --json: one event per line, as it happens.

    Example: fabula story watch 01a1f96a-… --out mystory/
    """
    with connected(home, port_base, target, as_json) as client:
        story = client.stories.get(story_id)
        if as_json:
            for event in story.watch(after_sequence=after):
                say_json({"event": type(event).__name__, **plain(event)}, indent=None)
            story.refresh()
            if out is not None:
                keep(story, out)
        else:
            follow(story, quiet=False, after_sequence=after)
            _finish(story, out, as_json=False)


@app.command()
def show(
    story_id: StoryId,
    out: Annotated[
        Path | None, typer.Option(help="Also write the story as far as it is to this folder.", file_okay=False)
    ] = None,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Show a story: its captions, descriptions and state.

    Example: fabula story show 01a1f96a-… --out mystory/
    """
    with connected(home, port_base, target, as_json) as client:
        story = client.stories.get(story_id)
        book = keep(story, out) if out is not None else None
        _answer(story.value, book, as_json)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="Most stories to list.", min=1)] = 20,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """List stories, newest first.

    Example: fabula story list --limit 5
    """
    found: list[Story] = []
    with connected(home, port_base, target, as_json) as client:
        for story in client.stories.list(page_size=min(limit, 200)):
            found.append(story.value)
            if len(found) == limit:
                break
    if as_json:
        say_json({"stories": found})
        return
    table = Table("story", "state", "frames", "seed", "created", box=None, padding=(0, 2))
    for each in found:
        created = each.created.strftime("%Y-%m-%d %H:%M:%S") if each.created else ""
        table.add_row(each.story_id, str(each.state), str(each.settings.frame_count), str(each.settings.seed), created)
    people.print(table if found else "No stories yet.")


@app.command()
def edit(
    story_id: StoryId,
    frame: Annotated[int, typer.Argument(help="Which frame; 0 is the first picture.", min=0)],
    strength: Annotated[
        float | None,
        typer.Option(help="How much of the picture is drawn anew, above 0, at most 1.", show_default="0.5"),
    ] = None,
    caption: Annotated[str | None, typer.Option(help="A new caption.", show_default="the old one")] = None,
    description: Annotated[
        str | None, typer.Option(help="What to draw.", show_default="what the new caption asks for, else as before")
    ] = None,
    seed: FrameSeed = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the story as it is then.", file_okay=False)] = None,
    key: FrameKey = None,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Draw a frame of a finished story again, made of its own picture. The old version is kept.

    Example: fabula story edit 01a1f96a-… 2 --caption "Pip loses the kite." --strength 0.7
    """
    with connected(home, port_base, target, as_json) as client:
        story = client.stories.get(story_id)
        story.edit_frame(
            frame, strength=strength, caption=caption, description=description, seed=seed, idempotency_key=key
        )
        _answer(story.value, keep(story, out) if out is not None else None, as_json)


@app.command()
def insert(
    story_id: StoryId,
    after: Annotated[int, typer.Argument(help="The frame before the new one.", min=0)],
    caption: Annotated[str, typer.Option(help="The new frame's caption.")],
    description: Annotated[
        str | None, typer.Option(help="What to draw.", show_default="what the caption asks for")
    ] = None,
    seed: FrameSeed = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the story as it is then.", file_okay=False)] = None,
    key: FrameKey = None,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Put a new frame between two of a finished story. `fabula backends` says which packs look at both neighbours.

    Example: fabula story insert 01a1f96a-… 1 --caption "Pip climbs a tree."
    """
    with connected(home, port_base, target, as_json) as client:
        story = client.stories.get(story_id)
        story.insert_frame(after, caption=caption, description=description, seed=seed, idempotency_key=key)
        _answer(story.value, keep(story, out) if out is not None else None, as_json)


@app.command()
def cancel(
    story_id: StoryId,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Stop a story; its finished frames stay.

    Example: fabula story cancel 01a1f96a-…
    """
    with connected(home, port_base, target, as_json) as client:
        story = client.stories.get(story_id)
        story.cancel()
        _answer(story.value, None, as_json)


@app.command()
def delete(
    story_id: StoryId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: Home = None,
    port_base: PortBase = None,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Delete a story and its pictures. This cannot be undone.

    Example: fabula story delete 01a1f96a-… --yes
    """
    with connected(home, port_base, target, as_json) as client:
        story = client.stories.get(story_id)
        if not yes and not as_json:
            typer.confirm(f"Delete story {story_id} and its {len(story.frames)} frames?", abort=True, err=True)
        story.delete()
    if as_json:
        say_json({"deleted": story_id})
    else:
        people.print(f"[green]✓[/] Deleted {escape(story_id)}.")


def follow(
    story: StoryHandle,
    *,
    quiet: bool,
    after_sequence: int = 0,
    title: str = "",
    noticed: Callable[[StoryEvent], None] = lambda event: None,
) -> Telling:
    """Shows a story's events until it ends: live on a terminal, line by line elsewhere, not at all when quiet."""
    telling = Telling(frame_count=story.value.settings.frame_count, began_s=time.monotonic())
    try:
        if quiet or not aside.is_terminal:
            for event in story.watch(after_sequence=after_sequence):
                telling.take(event, time.monotonic())
                noticed(event)
                if not quiet:
                    for line in lines(event, telling, time.monotonic()):
                        aside.print(line, soft_wrap=True)
        else:
            with Live(
                get_renderable=lambda: picture(telling, time.monotonic(), title), console=aside, refresh_per_second=8
            ):
                for event in story.watch(after_sequence=after_sequence):
                    telling.take(event, time.monotonic())
                    noticed(event)
    except KeyboardInterrupt:
        name = story.story_id
        aside.print(f"The story goes on. Look again: fabula story watch {name}   Stop it: fabula story cancel {name}")
        raise
    story.refresh()
    return telling


def keep(story: StoryHandle, folder: Path, title: str = "") -> Storybook:
    """Fetches every drawn frame and writes the folder."""
    images = {frame.image_sha256: story.read_image(frame) for frame in story.frames if frame.image_sha256}
    return write_storybook(folder, story.value, images, title)


def _whom(client: Client, character: str) -> str:
    """A version's whole id where its beginning is clear, as `fabula character versions` prints it; else as it is."""
    if not VERSION_BEGINNING.fullmatch(character):
        return character
    like = [
        each.version_id for each in client.characters.versions(page_size=200) if each.version_id.startswith(character)
    ]
    return like[0] if len(like) == 1 else character


def _finish(story: StoryHandle, out: Path | None, as_json: bool) -> None:
    book = keep(story, out) if out is not None else None
    _answer(story.value, book, as_json)
    if story.state is not State.SUCCEEDED:
        sys.exit(exits.STORY_ENDED_BADLY)


def _answer(story: Story, book: Storybook | None, as_json: bool) -> None:
    if as_json:
        say_json({"story": story, "storybook": book})
        return
    people.print(f"[bold]{escape(story.story_id)}[/]  {story.state}  seed {story.settings.seed}")
    for one in story.characters:
        people.print(
            f"  with {escape(clean(one.name))}, {escape(clean(one.phrase))}  [dim]{one.version_id[:12]}[/]",
            soft_wrap=True,
        )
    if story.error is not None:
        people.print(f"[red]{escape(clean(story.error.message))}[/] ({escape(story.error.reason)})")
    for warning in story.warnings:
        people.print(f"[yellow]! {escape(clean(warning.message))}[/] ({escape(clean(warning.reason))})", soft_wrap=True)
    for frame in story.frames:
        took = f"  [dim]{duration(frame.timings.total_s)}[/]" if frame.timings else ""
        stale = "  [yellow]stale[/]" if frame.stale else ""
        edited = f"  [dim]version {frame.version}[/]" if frame.version > 1 else ""
        people.print(f"  {frame.index}  {escape(clean(frame.caption))}{took}{edited}{stale}")
        if frame.index and frame.description:
            people.print(f"     [dim]{escape(clean(frame.description))}[/]")
    if book is not None:
        people.print(f"[green]✓[/] {escape(str(book.page))}  {book.contact_sheet.name}  {book.data.name}")
