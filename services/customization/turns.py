"""Who may move files now, of all the processes over one folder: any number who put, or one alone who removes.

Two files are locked, and the kernel lets go of them however a process dies. `shelf.lock` is shared by those who put and
held alone by one who removes. Whoever puts passes `shelf.gate` first, in no time; one who has waited long to be alone
shuts it until its turn comes, so that ever more who put cannot keep it waiting for ever. Knows not what is moved.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

LOCK_FILE = "shelf.lock"
GATE_FILE = "shelf.gate"
# Long enough for most that is put: shutting the gate has everybody wait for whoever is putting gigabytes now.
PATIENCE_S = 30.0
_ASK_AGAIN_S = 0.02  # whether a lock is free


class Turn:
    """A locked file. It ends with its block, when it is ended, or with the process."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    def end(self) -> None:
        """Lets others go on; ending again does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()


class Turns:
    """The turns of one folder."""

    def __init__(self, folder: Path, *, patience_s: float = PATIENCE_S) -> None:
        """`patience_s`: how long one waits to be alone before it shuts the gate."""
        self._folder, self._patience_s = folder, patience_s

    async def sharing(self) -> Turn:
        """A turn with others who put, and with nobody who removes."""
        while True:
            # Nothing is waited for between the two: the gate is free again before anybody else looks.
            if (gate := self._taken(GATE_FILE, fcntl.LOCK_SH)) is not None:
                with gate:
                    if (turn := self._taken(LOCK_FILE, fcntl.LOCK_SH)) is not None:
                        return turn
            await asyncio.sleep(_ASK_AGAIN_S)

    async def alone(self) -> Turn:
        """A turn with nobody else."""
        asked = time.monotonic()
        with ExitStack() as shut:
            is_shut = False
            while (turn := self.alone_now()) is None:
                if not is_shut and time.monotonic() - asked >= self._patience_s:
                    gate = self._taken(GATE_FILE, fcntl.LOCK_EX)
                    if gate is not None:  # else another one has shut it, or somebody is just passing
                        shut.enter_context(gate)
                        is_shut = True
                await asyncio.sleep(_ASK_AGAIN_S)
            return turn

    def alone_now(self) -> Turn | None:
        """A turn with nobody else if there is nobody else now."""
        return self._taken(LOCK_FILE, fcntl.LOCK_EX)

    def _taken(self, name: str, how: int) -> Turn | None:
        handle = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        return Turn(handle)
