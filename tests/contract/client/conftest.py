"""A real story process with scripted caption and frame services, at an address that survives its restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.story import story_process
from tests.contract.story.pictures import plain
from tests.contract.story.scripted_services import Script, ScriptedServices
from tests.contract.story.story_process import StoryProcess


@pytest.fixture(scope="module")
def services() -> Iterator[ScriptedServices]:
    running = ScriptedServices()
    running.start()
    yield running
    running.close()


@pytest.fixture(scope="module")
def process(services: ScriptedServices, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoryProcess]:
    running = StoryProcess(tmp_path_factory.mktemp("story"), services.target).start()
    yield running
    running.kill()


@pytest.fixture
def script(services: ScriptedServices) -> Script:
    """A fresh script for one test."""
    services.script.__init__()  # type: ignore[misc]  # the servicers hold on to this very object
    return services.script


@pytest.fixture
def restartable(
    services: ScriptedServices, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], StoryProcess]]:
    """Starts a story process of this test alone, always with the same home and the same ports."""
    base = story_process.free_port_base()
    monkeypatch.setattr(story_process, "free_port_base", lambda: base)
    started: list[StoryProcess] = []

    def start() -> StoryProcess:
        process = StoryProcess(tmp_path / "home", services.target).start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def first_picture() -> bytes:
    return plain()
