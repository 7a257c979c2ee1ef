"""Training processes of this machine: each a session of its own, at low priority, and found again after a restart.

A process with workers is their driver, and has a Ray of its own in its session: a stop is for the driver alone, which
has the workers save, and a kill is for all.

A process holds the lock of its job's folder for as long as it lives, and the file says its id. So whether an attempt
runs needs no memory of having started it: a service that was killed finds the process of the one before, a job never
has two, and an id that the kernel has given to somebody else is never signalled.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.customization.backends import LOG_FILE, NO_ROOM, REPOSITORY, Ended, Run, last_lines
from services.runtime.errors import FailedPrecondition, StorageFull
from services.runtime.store import FULL

LOCK_FILE = "driver.lock"
# Says the process's id in the lock file and becomes the program: the id stays. A shell does it, because Python between
# fork and exec runs what libraries registered for forks, and gRPC's crashes there now and then.
_LAUNCH = ("/bin/sh", "-c", f'printf %s "$$" > "$1" || exit {NO_ROOM}; shift; exec nice -n "$@"', "sh")
_LEAVE_S = 5.0  # that a process of the attempt before may take to be gone


class LocalBackend:
    """Child processes."""

    def __init__(
        self,
        *,
        niceness: int,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = (sys.executable, "-m", "training.customize"),
    ) -> None:
        """`environment` is what processes find beside what a run gives them; None: this process's own.

        Ray's settings in it are dropped: this process may be part of the Ray that serves, and training is not.
        """
        self._niceness, self._program = niceness, tuple(program)
        found = os.environ if environment is None else environment
        self._environment = {name: value for name, value in found.items() if not name.startswith("RAY_")}
        # By job, with the attempt. One that ended is kept until the job's next: how it ended may be asked again, when
        # what followed from it could not be recorded.
        self._processes: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
        self._folders: dict[str, Path] = {}

    async def start(self, run: Run) -> None:
        """Raises StorageFull, and FailedPrecondition when the process cannot be started or an earlier one lives on."""
        run.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(int(_LEAVE_S / 0.05)):
            if _holder(run.folder) is None:
                break
            await asyncio.sleep(0.05)
        for left in run.folder.glob("**/*.part"):  # what a killed process was writing
            left.unlink(missing_ok=True)
        try:
            process = await asyncio.to_thread(self._spawn, run)
        except BlockingIOError:
            raise FailedPrecondition(f"an earlier process of job {run.job_id} still runs") from None
        except OSError as error:
            if FULL.search(str(error)):
                raise StorageFull("there is no room to start a training process") from error
            raise FailedPrecondition(f"the training process cannot be started: {error}") from error
        self._processes[run.job_id] = (run.attempt, process)
        self._folders[run.job_id] = run.folder

    def _spawn(self, run: Run) -> subprocess.Popen[bytes]:
        lock = os.open(run.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)  # until the new one says its id, nobody is signalled in place of the old one
            with (run.folder / LOG_FILE).open("ab") as log:
                return subprocess.Popen(
                    (*_LAUNCH, str(run.folder / LOCK_FILE), str(self._niceness), *self._program, *run.arguments),
                    env={**self._environment, **run.environment},
                    cwd=REPOSITORY,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
        finally:
            os.close(lock)  # the child has it still

    async def look(self, run: Run) -> Ended | None:
        attempt, process = self._processes.get(run.job_id, (0, None))
        status = None if process is None or attempt != run.attempt else process.poll()
        if _holder(run.folder) is not None:
            self._folders[run.job_id] = run.folder  # also of a process that a service before this one started
            return None
        if process is not None and attempt == run.attempt and status is None:
            status = await asyncio.to_thread(process.wait)  # it let go of the lock, so it is all but gone
        self._folders.pop(run.job_id, None)
        detail = " | ".join(last_lines(run.folder / LOG_FILE))[-500:]
        return Ended(status=status, detail=f"exit status {status}" + (f": {detail}" if detail else ""))

    async def stop(self, run: Run) -> None:
        _ask_to_stop(run.folder)

    async def kill(self, run: Run) -> None:
        if process_id := _holder(run.folder):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process_id, signal.SIGKILL)

    async def close(self) -> None:
        """Asks every process to stop: they save, and the next service goes on with them."""
        for folder in self._folders.values():
            _ask_to_stop(folder)


def _holder(folder: Path) -> int | None:
    """The process that trains in a folder; None when there is none. 0 is one that has not said its id yet."""
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        told = os.pread(handle, 32, 0)
        return int(told) if told.isdigit() else 0
    finally:
        os.close(handle)


def _ask_to_stop(folder: Path) -> None:
    """To the process that trains in a folder, if there is one."""
    if process_id := _holder(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGTERM)
