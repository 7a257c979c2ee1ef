"""Which processes belong to an installation, and how to end exactly those.

A process is ours if it carries our mark in its environment, or if it lives in a session that we opened and wrote
down. Both are needed: Ray's agents rewrite their environment, and a service may open a session of its own. A process
id alone proves nothing, since the kernel uses it again, so every id is kept together with the start of its process.
Knows neither Ray nor any service.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil

MARK = "FABULA_INSTANCE"  # the environment variable that names the installation a process belongs to


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """One process, never mistaken for a later one with the same id."""

    pid: int
    start: float  # in the unit of `start_of`; only compared, never shown

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The process that has this id now; None if there is none."""
        start = start_of(pid)
        return None if start is None else cls(pid=pid, start=start)

    @property
    def alive(self) -> bool:
        """Whether it still runs. A zombie does not."""
        return start_of(self.pid) == self.start

    def to_json(self) -> dict[str, Any]:
        """For the installation's record."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ProcessUse:
    """What a running process is and takes."""

    pid: int
    parent_pid: int
    name: str
    memory_bytes: int  # proportional set size where the kernel tells it, else resident size
    command: str


def start_of(pid: int) -> float | None:
    """When a process started: clock ticks since boot on Linux, which no clock change moves, else seconds since 1970.

    None for a process that is gone or a zombie.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        fields = stat[
            stat.rindex(")") + 2 :
        ].split()  # the name may hold spaces and parentheses; the state comes after it
        return None if fields[0] in "ZX" else float(fields[19])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def session_of(pid: int) -> int | None:
    """The session a process lives in; None if it is gone."""
    try:
        return os.getsid(pid)
    except OSError:
        return None


def mark_of(process: psutil.Process) -> str | None:
    """The installation named in a process's environment, if it can be read."""
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None


def find(mark: str | None, leaders: Iterable[ProcessIdentity] = ()) -> Iterator[psutil.Process]:
    """Every living process that carries `mark` (None: no mark counts) or lives in a session opened by one of
    `leaders`; never the caller.

    A session whose leader's id now belongs to another process is not ours, and neither is a process older than the
    leader.
    """
    opened = {leader.pid: leader.start for leader in leaders}
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        start = start_of(process.pid)
        if start is None:
            continue
        session = session_of(process.pid)
        leader_start = opened.get(session) if session is not None else None
        if leader_start is not None and session is not None:
            now = start_of(session)
            in_session = start >= leader_start and now in (None, leader_start)
        else:
            in_session = False
        if in_session or (mark is not None and mark_of(process) == mark):
            yield process


def measure(processes: Iterable[psutil.Process]) -> list[ProcessUse]:
    """Names and memory of the processes that are still there, largest first."""
    uses = []
    for process in processes:
        try:
            with process.oneshot():
                memory = process.memory_full_info()
                command = process.cmdline()
                uses.append(
                    ProcessUse(
                        pid=process.pid,
                        parent_pid=process.ppid(),
                        name=name_of(command) or process.name(),
                        memory_bytes=int(getattr(memory, "pss", 0) or memory.rss),
                        command=" ".join(command),
                    )
                )
        except psutil.Error:
            continue
    return sorted(uses, key=lambda use: -use.memory_bytes)


def name_of(command: list[str]) -> str:
    """What people call a process: its module, its Ray actor, or its program."""
    words = [word for word in command if word]
    if not words:
        return ""
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").strip()
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    scripts = [word for word in words if word.endswith(".py")]
    return Path(scripts[0] if scripts else words[0]).stem


def end(
    mark: str | None, leaders: Iterable[ProcessIdentity] = (), *, spare: Iterable[int] = (), within_s: float = 10.0
) -> int:
    """Kills every process of the installation until none is left, and says how many there were.

    `spare` are ids to leave alone. Raises TimeoutError naming what would not die.
    """
    opened, spared = tuple(leaders), set(spare)
    deadline = time.monotonic() + within_s
    killed: set[int] = set()
    while True:
        left = [process for process in find(mark, opened) if process.pid not in spared]
        if not left:
            return len(killed)
        if time.monotonic() > deadline:
            raise TimeoutError(f"still running after SIGKILL: {sorted(process.pid for process in left)}")
        for process in left:
            killed.add(process.pid)
            try:
                process.kill()
            except psutil.Error:
                continue
        time.sleep(0.05)


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies. Linux only; elsewhere `end` finds what is left.

    Meant for the moment between fork and exec, so it only calls the kernel.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
