"""An installation of its own in a fresh folder, started and stopped by the `fabula` command as a user would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.report import MemoryUse

FABULA = Path(sys.executable).with_name("fabula")


class CommandFailed(Exception):
    """A `fabula` command ended badly; the message is what it said."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A home folder and its ports."""

    home: Path
    port_base: int

    @classmethod
    def fresh(cls, port_base: int) -> Installation:
        """A new, empty one. Its path is short, because Ray makes sockets below it."""
        return cls(home=Path(tempfile.mkdtemp(prefix="fabula-bench-")), port_base=port_base)

    @property
    def grpc_target(self) -> str:
        """host:port of the edge's gRPC."""
        return f"127.0.0.1:{self.port_base + 1}"

    @property
    def http_url(self) -> str:
        """The edge's HTTP."""
        return f"http://127.0.0.1:{self.port_base}"

    def start(self, *, timeout_s: float) -> float:
        """Starts everything; returns the seconds from the command's start to its end. Raises CommandFailed."""
        began = time.monotonic()
        self._fabula("up", "--wait", "--json", "--timeout", str(timeout_s), timeout_s=timeout_s + 30.0)
        return time.monotonic() - began

    def memory(self, when: str) -> MemoryUse:
        """What all its processes take now. Raises CommandFailed."""
        status = self._fabula("status", "--json", timeout_s=60.0)
        return MemoryUse(when=when, total_bytes=status["memory_bytes"], process_count=len(status["processes"]))

    def stop(self) -> None:
        """Ends every process. Raises CommandFailed."""
        self._fabula("down", "--json", timeout_s=120.0)

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.home, ignore_errors=True)

    def _fabula(self, *arguments: str, timeout_s: float) -> dict[str, Any]:
        environment = {**os.environ, "FABULA_HOME": str(self.home), "FABULA_PORT_BASE": str(self.port_base)}
        try:
            done = subprocess.run(
                [str(FABULA), *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"`fabula {' '.join(arguments)}` did not end within {timeout_s:g} s") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise CommandFailed(f"`fabula {' '.join(arguments)}` ended with status {done.returncode}: {said}")
        answer = json.loads(done.stdout)
        return answer if isinstance(answer, dict) else {}
