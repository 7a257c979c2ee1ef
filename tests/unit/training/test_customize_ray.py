"""How a driver starts a Ray of its own, and where that keeps its files."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from training import customize_ray
from training.customize_errors import RunStopped, WorkersUnfit


def failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[subprocess.Popen[bytes]]:
    """Ray leaves a process behind and fails, once for each error."""
    left, started = list(errors), []

    def init(**given: Any) -> None:
        if left:
            started.append(subprocess.Popen(("sleep", "600")))
            raise left.pop(0)

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    return started


def test_a_ray_that_does_not_start_in_time_is_tried_again_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started = failing(monkeypatch, Exception("timed out"), Exception("timed out"))
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [psutil.Process(p.pid) for p in started])
    customize_ray._start_own({})
    assert [one.wait(60) for one in started] == [-9, -9]


def test_a_ray_that_never_starts_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    started = failing(monkeypatch, *(OSError(f"no {number}") for number in range(9)))
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [psutil.Process(p.pid) for p in started])
    with pytest.raises(OSError, match="no 2"):
        customize_ray._start_own({})
    for one in started:
        one.kill()
        one.wait()


def test_a_stop_while_ray_starts_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started = failing(monkeypatch, RunStopped("now"))
    with pytest.raises(RunStopped):
        customize_ray._start_own({})
    assert len(started) == 1
    started[0].kill()
    started[0].wait()


def test_a_ray_of_a_drivers_own_is_open_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with customize_ray._own_folder(tmp_path / "run") as own:
        assert own.parent == tmp_path
        assert own.stat().st_mode & 0o777 == 0o700
        token = customize_ray._new_token(own)
        assert token.stat().st_mode & 0o777 == 0o600
        assert len(token.read_text()) == 64
        (own / "left").touch()
        first = own
    assert not first.exists()
    first.mkdir()
    (first / "left").touch()  # by a driver that was killed
    with customize_ray._own_folder(tmp_path / "run") as own:
        assert own == first
        assert not list(own.iterdir())
    longest = "session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
    assert len(f"/tmp/{own.name}/{longest}") <= 107, "the kernel takes no longer names of sockets"


def test_somebody_elses_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with customize_ray._own_folder(tmp_path / "run") as own:
        name = own.name
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    with customize_ray._own_folder(tmp_path / "run") as own:
        assert own.name != name
    assert (tmp_path / "elsewhere" / "kept").exists()


@pytest.mark.parametrize(("gpus", "here", "fits"), [(0.0, 0, True), (0.5, 1, True), (1.0, 1, False), (0.1, 0, False)])
def test_workers_for_which_this_machine_never_has_room_are_refused(
    gpus: float, here: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(customize_ray, "on_gpu", lambda: here > 0)
    monkeypatch.setattr(customize_ray.torch.cuda, "device_count", lambda: here)
    arguments = argparse.Namespace(workers=2, worker_cpus=0.75, worker_gpus=gpus)
    if fits:
        told = customize_ray._own_ray(arguments, tmp_path)
        assert (told["num_cpus"], told["num_gpus"], told["address"]) == (2, here, "local")
        assert told["_temp_dir"] == str(tmp_path)
    else:
        with pytest.raises(WorkersUnfit, match=f"more than the {here}"):
            customize_ray._own_ray(arguments, tmp_path)


def test_the_stop_file_is_not_the_services() -> None:
    from services.customization import backends

    assert customize_ray.STOP_FILE != backends.STOP_FILE, "that one is removed by the service, this one by the driver"
    assert os.path.basename(customize_ray.STOP_FILE) == customize_ray.STOP_FILE
