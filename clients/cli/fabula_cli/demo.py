"""`fabula demo`: the shipped first frames, each continued, from nothing running to pages one can open."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

import typer
from fabula_client import FrameFinished, State, Story, StoryEvent
from rich.markup import escape

from fabula_cli import exits
from fabula_cli.installation import Installation, ServicesMissing, SupervisorFailed
from fabula_cli.options import AsJson, Home, PortBase
from fabula_cli.report import aside, duration, fail, people, say_json
from fabula_cli.services import CannotStart, bring_up, phase_of
from fabula_cli.stories import connected, follow, keep
from fabula_cli.storybook import index_page

SEED = 7  # of every demo story: the same pictures on the same machine


@dataclass(frozen=True, kw_only=True)
class FirstFrame:
    """A shipped beginning."""

    name: str
    image: bytes
    caption: str
    source: str  # where the picture comes from


def shipped_first_frames(folder: Traversable | None = None) -> tuple[FirstFrame, ...]:
    """The beginnings that come with this command."""
    place = folder if folder is not None else files("fabula_cli") / "first_frames"
    entries = json.loads((place / "first_frames.json").read_text())
    return tuple(
        FirstFrame(
            name=entry["name"],
            image=(place / entry["image"]).read_bytes(),
            caption=entry["caption"],
            source=entry["source"],
        )
        for entry in entries
    )


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the stories.", file_okay=False)] = Path("demo-stories"),
    frames: Annotated[int, typer.Option(help="Frames to add to each.", min=1, max=20)] = 4,
    keep_running: Annotated[bool, typer.Option("--keep-running", help="Leave the services running.")] = False,
    timeout_s: Annotated[float, typer.Option("--start-timeout", help="Longest wait for the services, s.")] = 300.0,
    home: Home = None,
    port_base: PortBase = None,
    as_json: AsJson = False,
) -> None:
    """Continue the shipped first frames and say where the stories are. Starts the services if they do not run.

    Example: fabula demo --out demo-stories --keep-running
    """
    installation = Installation.find(home, port_base)
    began = time.monotonic()
    started = False
    try:
        phase = phase_of(installation)
        if phase != "ready":
            if not as_json:
                aside.print("Starting the services (caption, frame, story) …")
            started = phase == "stopped"  # who finds them starting leaves the stopping to who started them
            bring_up(installation, timeout_s=timeout_s, quiet=as_json)
            if not as_json:
                aside.print(f"[green]✓[/] Ready after {duration(time.monotonic() - began)}.\n")
        told = tell_all(installation, out, frames, began, as_json)
    except (CannotStart, SupervisorFailed, ServicesMissing) as error:
        started = False  # what could not start was ended already
        fail(str(error), status=exits.CANNOT_START, as_json=as_json, reason="CANNOT_START")
    finally:
        if started and not keep_running:
            installation.ask("down")
    _say(told, out, as_json, running=keep_running or not started)
    if any(each["state"] != State.SUCCEEDED for each in told["stories"]):
        raise typer.Exit(exits.STORY_ENDED_BADLY)


def tell_all(installation: Installation, out: Path, frame_count: int, began: float, as_json: bool) -> dict[str, Any]:
    """Continues every shipped first frame, one after the other, and writes the folder."""
    beginnings = shipped_first_frames()
    stories: list[tuple[str, Story, Path]] = []
    summary: list[dict[str, Any]] = []
    first_frame_s: list[float] = []

    def noticed(event: StoryEvent) -> None:
        if isinstance(event, FrameFinished) and event.frame.index > 0 and not first_frame_s:
            first_frame_s.append(round(time.monotonic() - began, 2))

    with connected(installation.home, installation.port_base, None, as_json) as client:
        for number, first in enumerate(beginnings, start=1):
            story_began = time.monotonic()
            if not as_json:
                aside.print(f"[bold]{number}/{len(beginnings)}  {escape(first.name)}[/]  “{escape(first.caption)}”")
            story = client.stories.create(image=first.image, caption=first.caption, frame_count=frame_count, seed=SEED)
            follow(story, quiet=as_json, title=first.name, noticed=noticed)
            book = keep(story, out / first.name)
            stories.append((first.name, story.value, Path(first.name)))
            summary.append(
                {
                    "name": first.name,
                    "source": first.source,
                    "story_id": story.story_id,
                    "state": story.state,
                    "error": story.value.error,
                    "page": book.page,
                    "duration_s": round(time.monotonic() - story_began, 2),
                }
            )
    (out / "index.html").write_text(index_page(stories), encoding="utf-8")
    return {
        "stories": summary,
        "index": out / "index.html",
        "first_frame_s": first_frame_s[0] if first_frame_s else None,
        "duration_s": round(time.monotonic() - began, 2),
    }


def _say(told: dict[str, Any], out: Path, as_json: bool, *, running: bool) -> None:
    if as_json:
        say_json(told)
        return
    people.print()
    for each in told["stories"]:
        mark = "[green]✓[/]" if each["state"] == State.SUCCEEDED else f"[red]✗ {each['state']}[/]"
        people.print(f"{mark} {escape(str(each['page']))}  [dim]{duration(each['duration_s'])}[/]")
    people.print(f"\nAll together: [bold]{escape(str(Path(out).resolve() / 'index.html'))}[/]")
    fabula = escape(sys.argv[0])  # a newcomer's shell does not know the environment that `make demo` made
    start = "" if running else f"{fabula} up\n    "
    people.print("Make your own:")
    people.print(
        f'    {start}{fabula} story continue --image first.png --caption "Your first sentence." --out mystory/'
    )
