"""`fabula story continue`: what it asks the client for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Self

import pytest
from fabula_cli import stories
from typer.testing import CliRunner

from tests.unit.cli.beginnings import made_story, png


class Telephone:
    """A client that notes what it is asked for."""

    asked: dict[str, Any]

    def __init__(self, _target: str) -> None:
        self.stories = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def create(self, **asked: Any) -> Any:
        type(self).asked = asked
        self.value = made_story(["One."])[0]
        return self


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command that needs no service."""
    monkeypatch.setattr(stories, "Client", Telephone)
    path = tmp_path / "first.png"
    path.write_bytes(png("red"))
    return ["continue", "--image", str(path), "--caption", "One.", "--no-wait", "--json", "--target", "127.0.0.1:1"]


@pytest.mark.parametrize("quality", ["draft", "standard", "best"])
def test_the_quality_is_asked_for(first: list[str], quality: str) -> None:
    done = CliRunner().invoke(stories.app, [*first, "--quality", quality])
    assert done.exit_code == 0, done.output
    assert Telephone.asked["quality"] == quality
    assert json.loads(done.stdout)["story"]["settings"]["quality"] == "standard"


def test_without_a_word_it_is_standard(first: list[str]) -> None:
    assert CliRunner().invoke(stories.app, first).exit_code == 0
    assert Telephone.asked["quality"] == "standard"


def test_another_word_is_a_wrong_command_line(first: list[str]) -> None:
    assert CliRunner().invoke(stories.app, [*first, "--quality", "ultra"]).exit_code == 2


def test_the_help_says_what_it_costs() -> None:
    shown = CliRunner().invoke(stories.app, ["continue", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    words = " ".join(re.sub(r"[^\w:;,.-]+", " ", shown).split())
    assert "--quality" in words
    assert "draft is fastest, best takes longest; steps and guidance set explicitly count more" in words
