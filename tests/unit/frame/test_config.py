"""Settings of the frame service: one default each, and a bad one is named before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.frame.config import FrameSettings
from services.frame.job import FrameJob, ReferenceImage, RenderedFrame
from services.frame.loading import load_engine
from services.frame.service import FrameDeployment, app
from services.models.errors import PackNotFound
from services.models.tiny import build_tiny_pack
from services.models.world import World
from services.runtime.config import ConfigInvalid, Installation

from .conftest import picture


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FABULA_HOME", str(tmp_path))
    return tmp_path


def test_the_first_pack_is_the_default() -> None:
    assert FrameSettings.load().pack_names == ("toon",)
    assert FrameSettings.load(packs="a, b,").pack_names == ("a", "b")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"max_running": 0}, "MAX_RUNNING"),
        ({"colour": "red"}, "COLOUR"),
        ({"packs": " ,"}, "PACKS"),
        ({"dtype": "float8"}, "DTYPE"),
    ],
)
def test_a_bad_setting_is_named(given: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"FABULA_FRAME_{name}"):
        FrameSettings.load(**given)
    with pytest.raises(ConfigInvalid, match=f"FABULA_FRAME_{name}"):
        app(dict(given))


def test_threads_default_to_the_cores_there_are() -> None:
    assert FrameSettings.load().thread_count >= 1
    assert FrameSettings.load(threads=3).thread_count == 3


def test_an_engine_is_warmed_with_the_packs_it_is_given(home: Path) -> None:
    build_tiny_pack(home / "packs" / "one", name="one", captions=False)
    build_tiny_pack(home / "packs" / "two", name="two", captions=False, seed=1)
    engine = load_engine(FrameSettings.load(packs="two,one", threads=1, max_running=2), Installation.load())
    try:
        assert engine.is_healthy
        assert (engine.default_pack, sorted(engine.models)) == ("two", ["one", "two"])
        assert engine.models["one"].manifest.digest != engine.models["two"].manifest.digest
    finally:
        engine.stop()
    with pytest.raises(PackNotFound):
        load_engine(FrameSettings.load(packs="absent", threads=1), Installation.load())


def test_a_replica_that_cannot_start_says_why_in_a_plain_exception() -> None:
    """Anything else would make Ray's other processes import torch to read it."""
    with pytest.raises(RuntimeError, match="PackNotFound") as raised:
        FrameDeployment(FrameSettings.load(packs="absent", threads=1).model_dump())
    assert type(raised.value) is RuntimeError
    assert raised.value.__cause__ is None


def test_building_the_application_does_not_import_torch() -> None:
    """Ray does it in a process of its own, which should stay small."""
    code = "import sys; from services.frame.service import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_application_lets_the_engine_refuse() -> None:
    deployment = app({"max_running": 4, "max_queued": 10})._bound_deployment
    assert deployment.max_ongoing_requests > 4 + 10
    assert deployment.init_args[0]["max_running"] == 4


async def test_what_a_pack_says_of_itself_is_loaded_with_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_PACKS", str(home / "packs"))
    build_tiny_pack(home / "packs" / "tiny", captions=False, world=World(familiar_gain_db=1.0))
    settings = FrameSettings.load(packs="tiny", threads=1, warm_up=False)
    engine = load_engine(settings, Installation.load())
    strange = ReferenceImage(image=picture(), description="noise", given=True)
    events = [event async for event in engine.render(FrameJob(description="a fox", seed=1, references=(strange,)))]
    engine.stop()
    assert isinstance(events[-1], RenderedFrame)
    assert [told.reason for told in events[-1].warnings] == ["PICTURE_UNFAMILIAR"]
