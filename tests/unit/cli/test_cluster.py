"""The supervisor: what it starts, how often, what its record says. The programs here are small ones of our own."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.runtime import cluster, processes
from services.runtime.config import Installation
from services.runtime.processes import MARK, ProcessIdentity


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    made = Installation(home=tmp_path / "home", port_base=18900)
    made.make_home()
    return made


def until(happened: Callable[[], Any], within_s: float = 60.0) -> Any:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if answer := happened():
            return answer
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def test_pauses_between_restarts_grow_to_a_limit() -> None:
    pauses = [cluster.pause_after(failures) for failures in range(10)]
    assert pauses[:4] == [0.0, 0.25, 0.5, 1.0]
    assert pauses[-1] == cluster.LONGEST_PAUSE_S
    assert cluster.pause_after(10_000) == cluster.LONGEST_PAUSE_S


def test_no_ray_setting_of_the_shell_reaches_ours(installation: Installation) -> None:
    inherited = {"RAY_ADDRESS": "elsewhere:6379", "PATH": "/bin", "FABULA_FRAME_PACKS": "tiny"}
    environment = cluster.child_environment(installation, inherited)
    assert "RAY_ADDRESS" not in environment
    assert environment["FABULA_FRAME_PACKS"] == "tiny"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment[MARK] == cluster.instance_of(installation)


def test_two_homes_have_two_marks(installation: Installation, tmp_path: Path) -> None:
    other = Installation(home=tmp_path / "other", port_base=18900)
    assert cluster.instance_of(installation) != cluster.instance_of(other)


def test_no_two_things_share_a_port(installation: Installation) -> None:
    ports = list(cluster.ports_of(installation).values())
    assert len(set(ports)) == len(ports)
    assert all(18900 <= port < 18930 for port in ports)


def test_a_taken_port_is_seen() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        assert cluster.taken({"ours": port}) == {"ours": port}
    assert cluster.taken({"ours": port}) == {}


def test_a_torn_record_reads_as_none(installation: Installation) -> None:
    cluster.record_path(installation).write_text('{"instance": "x')
    assert cluster.read_record(installation) == {}
    assert cluster.down(installation) == {"was_running": False, "left_over_count": 0}


def test_one_installation_has_one_supervisor(installation: Installation) -> None:
    with cluster.sole_supervisor(installation) as first, cluster.sole_supervisor(installation) as second:
        assert first
        assert not second
    with cluster.sole_supervisor(installation) as third:
        assert third


def supervise(installation: Installation, command: str) -> subprocess.Popen[bytes]:
    """A real supervisor that keeps one program running: a Python one-liner instead of the services."""
    code = (
        "import os, sys\n"
        "from services.runtime import cluster\n"
        "from services.runtime.config import Installation\n"
        "here = Installation.load()\n"
        f"program = cluster.Program(name='echo', command=(sys.executable, '-c', {command!r}), stop_s=2.0)\n"
        "cluster.serve_ready = lambda *_: (True, '')\n"
        "with cluster.sole_supervisor(here):\n"
        "    cluster.Supervisor(installation=here, wanted=(program,),\n"
        "                       environment=cluster.child_environment(here, os.environ)).run()\n"
    )
    environment = {**os.environ, "FABULA_HOME": str(installation.home), "FABULA_PORT_BASE": str(installation.port_base)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)


def program_of(installation: Installation) -> ProcessIdentity | None:
    pid = cluster.read_record(installation).get("programs", {}).get("echo", {}).get("pid")
    return ProcessIdentity.of(pid) if pid else None


SLEEP = "import time; time.sleep(600)"


def test_what_dies_is_started_again_and_a_stop_leaves_nothing(installation: Installation) -> None:
    supervisor = supervise(installation, SLEEP)
    try:
        first = until(lambda: program_of(installation))
        os.kill(first.pid, signal.SIGKILL)
        second = until(lambda: (now := program_of(installation)) and now.pid != first.pid and now)
        record = cluster.read_record(installation)
        assert record["programs"]["echo"]["restarts"] == 1
        assert "status -9" in record["programs"]["echo"]["message"] or record["programs"]["echo"]["ready"]
        assert cluster.down(installation) == {"was_running": True, "left_over_count": 0}
        assert supervisor.wait(10) == 0
        assert not second.alive
        assert cluster.read_record(installation) == {}
    finally:
        supervisor.kill()
        supervisor.wait()


@pytest.fixture
def full_disk(installation: Installation) -> Callable[[bool], None]:
    """Makes the disk that the record is on full, or gives it room again: to the kernel, /dev/full is full."""
    if not Path("/dev/full").exists():
        pytest.skip("this kernel has no /dev/full")
    draft = cluster.record_path(installation).with_suffix(".tmp")

    def fill(full: bool) -> None:
        if full:
            draft.symlink_to("/dev/full")
        else:
            draft.unlink()

    return fill


def running(installation: Installation) -> set[int]:
    """The programs that run, asked of the kernel and not of the record."""
    return {process.pid for process in processes.find(cluster.instance_of(installation))}


def test_a_full_disk_ends_nothing_and_a_stop_works_on_it(
    installation: Installation, full_disk: Callable[[bool], None]
) -> None:
    supervisor = supervise(installation, SLEEP)
    try:
        first = until(lambda: program_of(installation))
        until(lambda: cluster.read_record(installation)["phase"] == "ready")
        full_disk(True)
        os.kill(first.pid, signal.SIGKILL)
        until(lambda: (now := running(installation)) and first.pid not in now)
        assert program_of(installation) is None  # the record tells what was
        assert supervisor.poll() is None
        full_disk(False)
        second = until(lambda: program_of(installation))
        assert cluster.read_record(installation)["programs"]["echo"]["restarts"] == 1
        full_disk(True)
        assert cluster.down(installation) == {"was_running": True, "left_over_count": 0}
        assert supervisor.wait(60) == 0
        assert not second.alive
        assert running(installation) == set()
    finally:
        supervisor.kill()
        supervisor.wait()
        cluster.down(installation)


def test_nothing_is_started_that_no_record_leads_to(
    installation: Installation, full_disk: Callable[[bool], None]
) -> None:
    full_disk(True)
    supervisor = supervise(installation, SLEEP)
    try:
        assert supervisor.wait(120) == cluster.CANNOT_START
        assert running(installation) == set()
    finally:
        supervisor.kill()
        supervisor.wait()
        cluster.down(installation)


def test_a_program_that_cannot_be_started_does_not_end_the_others(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    program = cluster.Program(name="echo", command=(sys.executable, "-c", SLEEP), stop_s=0.0)
    now_s = [0.0]
    supervisor = cluster.Supervisor(
        installation=installation, wanted=(program,), environment=dict(os.environ), clock=lambda: now_s[0]
    )
    monkeypatch.setattr(cluster.subprocess, "Popen", no_memory)
    each = supervisor.running[0]
    for failures in (1, 2, 3):
        supervisor._keep(each)
        supervisor._keep(each)  # not before the pause is over
        assert each.failures == failures
        now_s[0] = each.start_at
    assert "Cannot allocate memory" in each.message


def test_down_ends_what_a_killed_supervisor_left(installation: Installation) -> None:
    # The program's own child leaves its session and its parent: nothing but the mark leads to it.
    stray = installation.home / "stray"
    command = (
        "import subprocess, sys, time, pathlib\n"
        f"p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)\n"
        f"pathlib.Path({str(stray)!r}).write_text(str(p.pid))\n"
        "time.sleep(600)\n"
    )
    supervisor = supervise(installation, command)
    try:
        program = until(lambda: program_of(installation))
        left = ProcessIdentity.of(until(lambda: stray.exists() and int(stray.read_text() or 0)))
        assert left is not None
        supervisor.kill()
        supervisor.wait()
        until(lambda: not program.alive)
        assert left.alive
        assert cluster.down(installation)["left_over_count"] == 1
        assert not left.alive
        assert json.loads(json.dumps(cluster.show(installation)))["processes"] == []
    finally:
        supervisor.kill()
        supervisor.wait()
        cluster.down(installation)
