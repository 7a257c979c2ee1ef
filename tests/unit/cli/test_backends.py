"""`fabula backends`: what it shows of what an installation can do."""

from __future__ import annotations

import json
from typing import Any, Self

import pytest
from fabula_cli import backends as verb
from fabula_cli import exits, main, report, stories
from fabula_client import Backend, Backends, Drawing, QualitySettings, Unavailable
from rich.console import Console
from typer.testing import CliRunner

DRAWING = Drawing(
    width_px=128,
    height_px=96,
    min_side_px=32,
    side_multiple_px=8,
    max_area_px=49152,
    default_steps=6,
    max_steps=100,
    default_text_guidance=2.0,
    default_image_guidance=1.5,
    max_references=3,
    features=("references", "characters"),
    samplers=("ddim", "euler"),
    qualities=(
        QualitySettings(quality="draft", steps=4, text_guidance=1.0, image_guidance=1.0),
        QualitySettings(quality="best", steps=12, text_guidance=2.0, image_guidance=1.5),
    ),
)


def backend(name: str, *, drawing: Drawing | None = DRAWING, writes: bool = True, is_default: bool = False) -> Backend:
    return Backend(
        pack=name,
        digest="ab" * 32,
        architecture="storygen" if drawing else "llava",
        is_default=is_default,
        drawing=drawing,
        writes=writes,
        tells_stories=drawing is not None and writes,
    )


class Telephone:
    """A client that answers what it was told to."""

    answer: Backends | Unavailable

    def __init__(self, _target: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def backends(self) -> Backends:
        if isinstance(self.answer, Unavailable):
            raise self.answer
        return self.answer


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command where the service gives an answer."""
    monkeypatch.setattr(stories, "Client", Telephone)
    wide = Console(highlight=False, width=200)
    monkeypatch.setattr(verb, "people", wide)
    monkeypatch.setattr(report, "people", wide)

    def run(answer: Backends | Unavailable, *words: str) -> Any:
        monkeypatch.setattr(Telephone, "answer", answer, raising=False)
        return CliRunner().invoke(main.app, ["backends", "--target", "127.0.0.1:1", *words])

    return run


def test_a_line_for_each_pack(say: Any) -> None:
    found = Backends(
        backends=(
            backend("toon", is_default=True),
            backend("pen", drawing=None),
            backend("brush", writes=False),
        ),
        unavailable_services=(),
    )
    done = say(found)
    assert done.exit_code == 0, done.output
    header, toon, pen, brush = (line.split() for line in done.stdout.splitlines())
    assert header == ["pack", "architecture", "draws", "writes", "size", "steps", "qualities", "references", "features"]
    assert toon == [
        "toon",
        "(default)",
        "storygen",
        "yes",
        "yes",
        "128×96",
        "6",
        "(up",
        "to",
        "100)",
        "draft",
        "4,",
        "best",
        "12",
        "3",
        "references,",
        "characters",
    ]
    assert pen == ["pen", "llava", "no", "yes"]
    assert brush[:4] == ["brush", "storygen", "yes", "no"]


def test_json_holds_everything(say: Any) -> None:
    done = say(Backends(backends=(backend("toon"), backend("pen", drawing=None)), unavailable_services=()), "--json")
    document = json.loads(done.stdout)
    assert document["unavailable_services"] == []
    toon, pen = document["backends"]
    assert (toon["tells_stories"], pen["tells_stories"], pen["drawing"]) == (True, False, None)
    assert toon["drawing"]["qualities"][0] == {
        "quality": "draft",
        "steps": 4,
        "text_guidance": 1.0,
        "image_guidance": 1.0,
    }
    assert set(toon["drawing"]) == set(DRAWING.__dataclass_fields__)


def test_what_a_silent_service_knows_is_no_no(say: Any) -> None:
    done = say(Backends(backends=(backend("toon", writes=False),), unavailable_services=("caption",)))
    assert done.exit_code == 0
    assert " ".join(done.stdout.splitlines()[1].split()).startswith("toon storygen yes ? 128×96")
    assert "The caption service does not answer" in done.stdout


def test_no_packs_are_told_in_words(say: Any) -> None:
    assert say(Backends(backends=(), unavailable_services=())).stdout == "No packs are loaded.\n"


def test_a_name_cannot_steer_the_terminal(say: Any) -> None:
    done = say(Backends(backends=(backend("[red]x\x1b[31m"),), unavailable_services=("\x1b[2J",)))
    assert "[red]x" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_nobody_to_ask_is_not_running(say: Any, words: tuple[str, ...]) -> None:
    done = say(Unavailable("away"), *words)
    assert done.exit_code == exits.NOT_RUNNING
    if words:
        assert json.loads(done.stdout)["error"]["reason"] == "UNAVAILABLE"
