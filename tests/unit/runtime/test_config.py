"""Settings are strict: a typo or a bad value stops the process and is named."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from services.runtime.config import ConfigInvalid, Installation, Settings, make_token


class StorySettings(Settings):
    model_config = SettingsConfigDict(env_prefix="FABULA_STORY_")
    section: ClassVar[str] = "story"

    max_running: int = Field(default=4, ge=1)
    host: str = "127.0.0.1"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FABULA_HOME", str(tmp_path))
    monkeypatch.delenv("FABULA_PACKS", raising=False)
    return tmp_path


def test_arguments_win_over_environment_over_file_over_defaults(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert StorySettings.load().max_running == 4
    (home / "config.toml").write_text("port_base = 9000\n[story]\nmax_running = 5\n")
    assert Installation.load().port_base == 9000
    assert StorySettings.load().max_running == 5
    monkeypatch.setenv("FABULA_STORY_MAX_RUNNING", "6")
    assert StorySettings.load().max_running == 6
    assert StorySettings.load(max_running=7).max_running == 7


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FABULA_HOEM", "x"),
        ("FABULA_PORT_BASE", "80"),
        ("FABULA_PORT_BASE", "many"),
        ("FABULA_LOG_LEVEL", "loud"),
        ("FABULA_STROY_MAX_RUNNING", "4"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigInvalid, match=variable):
        Installation.load()


def test_a_section_answers_for_its_own_variables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_CAPTION_ANYTHING", "1")
    monkeypatch.setenv("FABULA_STORY_MAX_RUNING", "1")
    Installation.load()
    with pytest.raises(ConfigInvalid, match="FABULA_STORY_MAX_RUNING"):
        StorySettings.load()


def test_the_file_is_as_strict(home: Path) -> None:
    (home / "config.toml").write_text("port_bass = 1\n")
    with pytest.raises(ConfigInvalid, match=r"(?i)port_bass"):
        Installation.load()
    (home / "config.toml").write_text("[story]\nmax_running = 0\n")
    with pytest.raises(ConfigInvalid, match="FABULA_STORY_MAX_RUNNING"):
        StorySettings.load()
    (home / "config.toml").write_text("= broken")
    with pytest.raises(ConfigInvalid, match=r"config\.toml"):
        Installation.load()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Installation.load().port_base = 1  # type: ignore[misc]


def test_home_and_token_are_for_their_owner_only(home: Path) -> None:
    installation = Installation.load()
    installation.make_home()
    token = installation.read_token()
    assert len(token) == 64
    assert installation.read_token() == token
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "token").stat().st_mode) == 0o600
    make_token(home / "token")  # whoever comes second keeps the first one's
    assert installation.read_token() == token
    assert [path.name for path in home.iterdir() if "token" in path.name] == ["token"]


def test_a_short_token_is_refused(home: Path) -> None:
    (home / "token").write_text("123")
    with pytest.raises(ConfigInvalid, match="TOKEN_FILE"):
        Installation.load().read_token()


def test_packs_are_looked_for_where_they_are_said_to_be(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Installation.load().pack_folders[-1] == home / "packs"
    monkeypatch.setenv("FABULA_PACKS", "/a:/b")
    assert Installation.load().pack_folders == (Path("/a"), Path("/b"))
