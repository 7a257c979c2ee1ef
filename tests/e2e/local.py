"""An installation of a test's own, driven through the `fabula` command as a user drives it."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from services.models.tiny import build_tiny_pack
from services.runtime.config import SHIPPED_PACKS

FABULA = Path(sys.executable).with_name("fabula")
FIRST_FRAMES = Path(__file__).resolve().parents[2] / "clients" / "cli" / "fabula_cli" / "first_frames"
START_S = 1200.0  # a limit against hanging, not a claim: a busy machine takes minutes


def free_port_base() -> int:
    """A number from which the fixed ports are free."""
    for _ in range(200):
        base = random.randrange(20_000, 32_000, 200)
        try:
            for offset in range(14):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", base + offset))
        except OSError:
            continue
        return base
    raise RuntimeError("no free ports")


def until(happened: Callable[[], Any], within_s: float = 300.0) -> Any:
    """Waits for something true and returns it."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if answer := happened():
            return answer
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A process as it was seen: its id and its start, so that a later one with the same id is not mistaken for it."""

    pid: int
    name: str
    created: float

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def kill(self) -> None:
        assert self.alive
        psutil.Process(self.pid).kill()


class LocalInstallation:
    """A home, its ports and the pack: the shipped one, or a tiny one with the same parts where none is shipped yet."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.port_base = free_port_base()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("FABULA_", "RAY_"))}
        self.environment = {**kept, "FABULA_HOME": str(self.home), "FABULA_PORT_BASE": str(self.port_base)}
        if not (SHIPPED_PACKS / "toon" / "pack.json").exists():
            build_tiny_pack(folder / "packs" / "tiny", seed=0)
            self.environment |= {
                "FABULA_PACKS": str(folder / "packs"),
                "FABULA_FRAME_PACKS": "tiny",
                "FABULA_CAPTION_PACK": "tiny",
                "FABULA_STORY_DEFAULT_PACK": "tiny",
            }

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.port_base + 1}"

    def run(self, *arguments: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
        """One `fabula` command."""
        return subprocess.run(
            [str(FABULA), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def answer(self, *arguments: str, status: int = 0, timeout_s: float = 600.0) -> dict[str, Any]:
        """What one `fabula … --json` says."""
        done = self.run(*arguments, "--json", timeout_s=timeout_s)
        assert done.returncode == status, (
            f"{arguments}: status {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        )
        document = json.loads(done.stdout)
        assert isinstance(document, dict)
        return document

    def up(self) -> dict[str, Any]:
        return self.answer("up", "--timeout", str(START_S), timeout_s=START_S + 60)

    def down(self) -> dict[str, Any]:
        return self.answer("down")

    def sightings(self, name: str = "") -> list[Sighting]:
        """The processes that `status` shows, those with a name that starts so."""
        shown = json.loads(self.run("status", "--json").stdout)
        seen = []
        for each in shown["processes"]:
            if each["name"].startswith(name):
                try:
                    created = psutil.Process(each["pid"]).create_time()
                except psutil.NoSuchProcess:
                    continue
                seen.append(Sighting(pid=each["pid"], name=each["name"], created=created))
        return seen

    def one(self, name: str) -> Sighting:
        """The one process of this name, once it is there."""
        return until(lambda: seen[0] if len(seen := self.sightings(name)) == 1 else None)

    def strangers(self) -> list[str]:
        """Processes that still have this home in their environment, however they came to be."""
        left = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("FABULA_HOME") == str(self.home):
                    left.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
            except psutil.Error:
                continue
        return left

    def logs(self) -> str:
        """The ends of the logs, for a test that failed."""
        logs = sorted((self.home / "logs").glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)


def first_frame() -> tuple[Path, str]:
    """A shipped picture and its caption."""
    entry = json.loads((FIRST_FRAMES / "first_frames.json").read_text())[0]
    return FIRST_FRAMES / entry["image"], entry["caption"]
