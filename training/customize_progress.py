"""Tells whoever started a customization how far it is, and hears from them when to stop.

`Progress` appends one JSON object a line to a file that outlives the process; each line is one write, so a reader sees
it whole or not at all. `Stop` turns SIGTERM, SIGINT and a file into a question that the loop asks between steps: a run
that was told to stop ends after the step in progress and its save. Knows no network and no service.

    {"event": "began", "pid": 4711, "steps": 300}                        once an attempt
    {"event": "step", "step": 20, "losses": {"total": 0.11, …}}              every so often; 20 steps are taken
    {"event": "snapshot", "step": 100, "file": "snapshots/000100.safetensors"}    it is complete, its card beside it
    {"event": "probe", "step": 100, "probe": "alone", "description": "…", "file": "probes/000100-alone.png"}
    {"event": "probed", "step": 0, "figures": {"recognised": 0.0, …}}        before the first step
    {"event": "ended", "outcome": "succeeded" | "stopped" | "failed", "step": 300, "reason": "", "message": ""}

Every line also says `at`: seconds since 1970.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from training.customize_errors import RunStopped

STOPPED = 75  # exit status: it was told to stop, and a later run goes on from here
NO_ROOM = 74  # exit status: the disk is full; told by the status, too, for there may be no room to write it down
_REPORT_EVERY_S = 0.5


class Progress:
    """Lines of a file; without one nothing is told. Raises OSError when it cannot be written."""

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told = -_REPORT_EVERY_S
        self._file: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":  # a full disk cut the line before
                os.write(self._file, b"\n")

    def tell(self, event: str, **facts: Any) -> None:
        """One line."""
        if self._file is not None:
            line = json.dumps({"event": event, "at": round(time.time(), 3), **facts}, ensure_ascii=False) + "\n"
            os.write(self._file, line.encode())

    def step(self, step: int, losses: Mapping[str, float], *, is_last: bool = False) -> None:
        """So many steps are taken, the last one with these losses. Told a few times a second at most."""
        now = self._clock()
        if is_last or now - self._told >= _REPORT_EVERY_S:
            self._told = now
            self.tell("step", step=step, losses={name: round(value, 6) for name, value in losses.items()})


class Stop:
    """Whether somebody asked for an end. Call it between steps."""

    def __init__(self, path: Path | None = None) -> None:
        """A file at `path` asks, too: for runs that signals do not reach."""
        self._path = path
        self._asked = False
        self._between_steps = False

    def __call__(self) -> bool:
        """True once a signal came, or while the file is there."""
        self._between_steps = True
        return self._asked or (self._path is not None and self._path.exists())

    def listen(self) -> None:
        """From now on signals ask for an end. One before the first step ends the run at once: nothing is lost."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        if not self._between_steps:
            raise RunStopped("the run was told to stop before its first step")
