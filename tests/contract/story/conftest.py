"""One story process and scripted services for the tests of a module; a process of its own where a test changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.story.scripted_services import Script, ScriptedServices
from tests.contract.story.story_process import StoryProcess


@pytest.fixture(scope="module")
def services() -> Iterator[ScriptedServices]:
    running = ScriptedServices()
    running.start()
    yield running
    running.close()


@pytest.fixture(scope="module")
def shared_story(services: ScriptedServices, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoryProcess]:
    story = StoryProcess(tmp_path_factory.mktemp("story"), services.target, STORY_HEARTBEAT_S="0.2").start()
    yield story
    assert story.terminate() == 0


@pytest.fixture
def script(services: ScriptedServices) -> Script:
    """A fresh script for one test."""
    services.script.__init__()  # type: ignore[misc]  # the servicers hold on to this very object
    return services.script


@pytest.fixture
def story(shared_story: StoryProcess, script: Script) -> StoryProcess:
    """The module's process, with a fresh script."""
    return shared_story


@pytest.fixture
def new_story(services: ScriptedServices, script: Script, tmp_path: Path) -> Iterator[Callable[..., StoryProcess]]:
    """Starts processes of this test alone; all of them share the test's home unless told otherwise."""
    started: list[StoryProcess] = []

    def start(home: Path | None = None, **environment: str) -> StoryProcess:
        process = StoryProcess(home or tmp_path / "home", services.target, **environment).start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
