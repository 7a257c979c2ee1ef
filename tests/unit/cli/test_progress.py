"""What a story's events add up to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fabula_cli.progress import Telling, lines, picture
from fabula_cli.stories import _answer
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
from rich.console import Console

from tests.unit.cli.beginnings import made_story, warning


def at(kind: type[StoryEvent], **fields: Any) -> StoryEvent:
    return kind(sequence=0, story_id="s", time=None, **fields)


def test_a_frame_goes_from_writing_to_drawn() -> None:
    telling = Telling(frame_count=2, began_s=0.0)
    story, _ = made_story(["One.", "Two.", "Three."])
    telling.take(at(StateChanged, state=State.RUNNING, error=None), 1.0)
    assert telling.eta_s(1.0) is None
    telling.take(at(CaptionWritten, frame_index=1, caption="Two."), 2.0)
    assert telling.frames[1].doing == "describing"
    telling.take(at(DescriptionWritten, frame_index=1, description="d"), 3.0)
    telling.take(at(FrameQueued, frame_index=1, ahead_count=2), 3.0)
    assert telling.frames[1].doing == "waiting behind 2"
    telling.take(at(FrameProgress, frame_index=1, step=5, step_count=10, eta_s=4.0), 6.0)
    assert telling.frames[1].doing == "drawing"
    # Four seconds for this frame, and the next as long as this one will have taken: from 2 to 10.
    assert telling.eta_s(6.0) == 4.0 + 8.0
    assert telling.eta_s(7.0) == 3.0 + 8.0
    telling.take(at(FrameFinished, frame=story.frames[1]), 10.0)
    assert telling.finished_count == 1
    assert telling.eta_s(10.0) == 8.0
    telling.take(at(StateChanged, state=State.SUCCEEDED, error=None), 20.0)
    assert telling.eta_s(20.0) == 0.0


def test_an_event_told_twice_counts_once() -> None:
    telling = Telling(frame_count=2, began_s=0.0)
    story, _ = made_story(["One.", "Two."])
    for now in (1.0, 2.0):
        telling.take(at(FrameFinished, frame=story.frames[1]), now)
    telling.take(at(FrameFinished, frame=story.frames[0]), 3.0)  # the given frame is not one of the added ones
    assert telling.finished_count == 1


def test_a_caption_cannot_steer_the_terminal() -> None:
    telling = Telling(frame_count=1, began_s=0.0)
    event = at(CaptionWritten, frame_index=1, caption="\x1b]0;pwned\x07[red]hello[/red]")
    telling.take(event, 1.0)
    console = Console(width=100, force_terminal=True, color_system=None, record=True)
    with console.capture() as shown:
        console.print(picture(telling, 2.0, "title"))
        for line in lines(event, telling, 2.0):
            console.print(line)
    assert "\x1b]0;" not in shown.get()
    assert shown.get().count("[red]hello[/red]") == 2


def test_a_warning_is_one_yellow_line_and_said_once() -> None:
    telling = Telling(frame_count=1, began_s=0.0)
    event = at(WarningGiven, warning=warning("It never drew: [red]robot[/red]\x1b[2J."))
    for now in (1.0, 2.0):
        telling.take(event, now)
    console = Console(width=100, force_terminal=True, color_system="standard", highlight=False)
    with console.capture() as shown:
        console.print(picture(telling, 2.0))
    assert shown.get().count("[red]robot[/red]") == 1
    assert "\x1b[2J" not in shown.get()
    (line,) = lines(event, telling, 2.0)
    with console.capture() as shown:
        console.print(line)
    assert shown.get().startswith("\x1b[33m")
    assert "! It never drew: [red]robot[/red]" in shown.get()
    assert "\x1b[2J" not in shown.get()


def test_a_shown_story_tells_its_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    story, _ = made_story(["One.", "Two."], warnings=(warning("It never drew: [red]robot[/red]."),))
    _answer(story, None, as_json=False)
    assert "! It never drew: [red]robot[/red]. (WORDS_UNFAMILIAR)" in capsys.readouterr().out
    _answer(story, None, as_json=True)
    assert json.loads(capsys.readouterr().out)["story"]["warnings"][0]["reason"] == "WORDS_UNFAMILIAR"
