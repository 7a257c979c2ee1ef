"""What a story's events add up to, and how that looks while it happens. `Telling` is pure: the clock is passed in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fabula_client import (
    CaptionWritten,
    DescriptionWritten,
    FrameFinished,
    FrameProgress,
    FrameQueued,
    State,
    StateChanged,
    StoryEvent,
    WarningGiven,
)
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fabula_cli.report import clean, duration


@dataclass(kw_only=True)
class FrameTelling:
    """How far one frame is."""

    index: int
    started_s: float
    caption: str = ""
    described: bool = False
    ahead_count: int = 0
    step: int = 0
    step_count: int = 0
    eta_s: float | None = None
    eta_at_s: float = 0.0
    finished_s: float | None = None

    @property
    def doing(self) -> str:
        """In a word."""
        if self.finished_s is not None:
            return "done"
        if self.step:
            return "drawing"
        if self.ahead_count:
            return f"waiting behind {self.ahead_count}"
        if self.described:
            return "starting to draw"
        return "describing" if self.caption else "writing"


@dataclass(kw_only=True)
class Telling:
    """A story as its events told it so far. Times are seconds on the caller's clock."""

    frame_count: int
    began_s: float
    state: State = State.QUEUED
    trouble: str = ""
    notes: list[str] = field(default_factory=list)  # what the pack does not know of what it was given
    frames: dict[int, FrameTelling] = field(default_factory=dict)
    finished_count: int = 0

    def take(self, event: StoryEvent, now_s: float) -> None:
        """Adds one event."""
        match event:
            case StateChanged():
                self.state = event.state
                self.trouble = clean(event.error.message) if event.error else ""
            case WarningGiven() if clean(event.warning.message) not in self.notes:
                self.notes.append(clean(event.warning.message))
            case CaptionWritten():
                self._frame(event.frame_index, now_s).caption = clean(event.caption)
            case DescriptionWritten():
                self._frame(event.frame_index, now_s).described = True
            case FrameQueued():
                self._frame(event.frame_index, now_s).ahead_count = event.ahead_count
            case FrameProgress():
                frame = self._frame(event.frame_index, now_s)
                frame.step, frame.step_count, frame.ahead_count = event.step, event.step_count, 0
                frame.eta_s, frame.eta_at_s = event.eta_s, now_s
            case FrameFinished() if event.frame.index > 0:
                frame = self._frame(event.frame.index, now_s)
                frame.caption, frame.described, frame.step = clean(event.frame.caption), True, frame.step_count
                if frame.finished_s is None:
                    frame.finished_s = now_s
                    self.finished_count += 1
            case _:
                pass

    def eta_s(self, now_s: float) -> float | None:
        """Seconds until the whole story is there; None while nothing is known."""
        if self.state.ended:
            return 0.0
        done = [frame for frame in self.frames.values() if frame.finished_s is not None]
        current = next((frame for frame in self.frames.values() if frame.finished_s is None), None)
        lengths = [frame.finished_s - frame.started_s for frame in done if frame.finished_s is not None]
        drawing_left = None
        if current is not None and current.eta_s is not None:
            drawing_left = max(0.0, current.eta_s - (now_s - current.eta_at_s))
            lengths = lengths or [now_s - current.started_s + drawing_left]
        if not lengths:
            return None
        usual = sum(lengths) / len(lengths)
        if current is None:
            return usual * max(0, self.frame_count - self.finished_count)
        left = drawing_left if drawing_left is not None else max(0.0, usual - (now_s - current.started_s))
        return left + usual * max(0, self.frame_count - self.finished_count - 1)

    def _frame(self, index: int, now_s: float) -> FrameTelling:
        return self.frames.setdefault(index, FrameTelling(index=index, started_s=now_s))


def picture(telling: Telling, now_s: float, title: str = "") -> RenderableType:
    """The live view: a line of state and time, then a line per frame with its caption and its step bar."""
    eta = telling.eta_s(now_s)
    head = Text.assemble(
        (f"{title}  " if title else "", "bold"),
        (str(telling.state), "bold cyan"),
        f"  {telling.finished_count}/{telling.frame_count} frames  {duration(now_s - telling.began_s)}",
        f"  about {duration(eta)} left" if eta else "",
    )
    rows = Table.grid(padding=(0, 1), expand=True)
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(width=18, no_wrap=True)
    rows.add_column(justify="right", no_wrap=True, width=7)
    rows.add_column(ratio=1)
    for frame in sorted(telling.frames.values(), key=lambda each: each.index):
        if frame.finished_s is not None:
            bar: RenderableType = Text("✓ drawn", style="green")
            time = duration(frame.finished_s - frame.started_s)
        elif frame.step:
            bar = ProgressBar(total=max(1, frame.step_count), completed=frame.step, width=18)
            time = f"{frame.step}/{frame.step_count}"
        else:
            bar, time = Text(f"{frame.doing} …", style="yellow"), ""
        rows.add_row(f"{frame.index}", bar, time, Text(frame.caption or "…", style="" if frame.caption else "dim"))
    parts: list[RenderableType] = [head, rows, *(Text(f"! {note}", style="yellow") for note in telling.notes)]
    if telling.trouble:
        parts.append(Text(telling.trouble, style="red"))
    return Group(*parts)


def lines(event: StoryEvent, telling: Telling, now_s: float) -> Iterable[str]:
    """The same for a log or a pipe: one line for what matters, in rich markup with the story's own text escaped."""
    elapsed = duration(now_s - telling.began_s)
    match event:
        case StateChanged():
            why = f": {event.error.message}" if event.error else ""
            yield escape(clean(f"{elapsed:>8}  {event.state}{why}"))
        case CaptionWritten():
            yield escape(clean(f"{elapsed:>8}  frame {event.frame_index}/{telling.frame_count}  {event.caption}"))
        case WarningGiven():
            yield f"[yellow]{escape(clean(f'{elapsed:>8}  ! {event.warning.message}'))}[/]"
        case FrameFinished() if event.frame.index > 0:
            eta = telling.eta_s(now_s)
            left = f", about {duration(eta)} left" if eta else ""
            yield escape(f"{elapsed:>8}  frame {event.frame.index}/{telling.frame_count}  drawn{left}")
        case _:
            return
