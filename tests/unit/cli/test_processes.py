"""Which processes are ours, and that exactly those end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from services.runtime import processes
from services.runtime.processes import MARK, ProcessIdentity

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


@contextmanager
def sleeping(mark: str = "", *, session: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, MARK: mark} if mark else {k: v for k, v in os.environ.items() if k != MARK}
    process = subprocess.Popen(SLEEP, env=environment, start_new_session=session)
    try:
        while mark and processes.mark_of(processes.psutil.Process(process.pid)) != mark:
            time.sleep(0.01)  # between fork and exec it still shows our own environment
        yield process
    finally:
        process.kill()
        process.wait()


def found(mark: str, leaders: tuple[ProcessIdentity, ...] = ()) -> set[int]:
    return {process.pid for process in processes.find(mark, leaders)}


def identity(process: subprocess.Popen[bytes]) -> ProcessIdentity:
    named = ProcessIdentity.of(process.pid)
    assert named is not None
    return named


def test_an_identity_is_not_fooled_by_an_id_that_is_used_again() -> None:
    with sleeping() as process:
        named = identity(process)
        assert named.alive
        assert not ProcessIdentity(pid=named.pid, start=named.start - 1).alive
        process.kill()
        process.wait()
        assert not named.alive
    assert ProcessIdentity.of(process.pid) is None


def test_a_zombie_does_not_live() -> None:
    with sleeping() as process:
        named = identity(process)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not named.alive


def test_marked_processes_are_found_and_others_are_not() -> None:
    with sleeping("mark-a") as ours, sleeping("mark-b") as theirs, sleeping() as nobodys:
        assert found("mark-a") == {ours.pid}
        assert not {theirs.pid, nobodys.pid} & found("mark-a")


def test_a_session_that_we_opened_is_ours_without_a_mark() -> None:
    with sleeping(session=True) as leader, sleeping() as other:
        named = identity(leader)
        assert leader.pid in found("no-such-mark", (named,))
        assert other.pid not in found("no-such-mark", (named,))
        reused = ProcessIdentity(pid=named.pid, start=named.start - 5)  # the id of a leader that is long gone
        assert leader.pid not in found("no-such-mark", (reused,))


def test_ending_an_installation_leaves_its_neighbour_alone() -> None:
    with sleeping("mark-a") as ours, sleeping("mark-a") as spared, sleeping("mark-b") as theirs:
        assert processes.end("mark-a", spare=(spared.pid,)) == 1
        assert ours.wait(5) != 0
        assert spared.poll() is None
        assert theirs.poll() is None


def test_a_child_dies_with_its_parent() -> None:
    if sys.platform != "linux":
        pytest.skip("the kernel does this on Linux only")
    parent_code = (
        "import subprocess,sys,time\n"
        "from services.runtime.processes import die_with_parent\n"
        f"p = subprocess.Popen({SLEEP!r}, preexec_fn=die_with_parent)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = ProcessIdentity.of(int(parent.stdout.readline()))
    assert child is not None
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while child.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.alive


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["ray::ServeReplica:frame:FrameDeployment", "", ""], "ServeReplica:frame:FrameDeployment"),
        (["/usr/bin/python", "-m", "services.story", "serve"], "services.story"),
        (["/usr/bin/python", "/x/ray/dashboard/dashboard.py", "--host=h"], "dashboard"),
        (["/x/gcs/gcs_server", "--log_dir=/t"], "gcs_server"),
        ([], ""),
    ],
)
def test_a_process_is_called_what_people_call_it(command: list[str], name: str) -> None:
    assert processes.name_of(command) == name
