"""Where an installation is and what its supervisor says. The command never imports a service: it starts them and asks
them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_PORT_BASE = 8470
SUPERVISOR = "services.runtime.cluster"


class ServicesMissing(Exception):
    """The services are not installed beside this command."""


class SupervisorFailed(Exception):
    """The supervisor ended instead of answering; the message is its last line."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """One home folder and its ports."""

    home: Path
    port_base: int | None  # None: as the record or the configuration says

    @classmethod
    def find(cls, home: Path | None, port_base: int | None) -> Installation:
        """The one that was named, or the user's own."""
        data = os.environ.get("XDG_DATA_HOME")
        default = (Path(data) if data else Path.home() / ".local" / "share") / "fabula"
        return cls(home=(home or default).expanduser().resolve(), port_base=port_base)

    @property
    def logs(self) -> Path:
        """Where its processes write."""
        return self.home / "logs"

    def environment(self) -> dict[str, str]:
        """The environment that points the services' own code at this installation."""
        ports = {} if self.port_base is None else {"FABULA_PORT_BASE": str(self.port_base)}
        return {**os.environ, "FABULA_HOME": str(self.home), **ports}

    def record(self) -> dict[str, Any]:
        """What the supervisor wrote last; empty when nothing was started. It may be out of date after a crash."""
        try:
            document = json.loads((self.home / "run" / "instance.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return document if isinstance(document, dict) else {}

    def target(self) -> str:
        """host:port of the story service's gRPC."""
        if address := self.record().get("grpc"):
            return str(address)
        return f"127.0.0.1:{(self.port_base or DEFAULT_PORT_BASE) + 1}"

    def ask(self, verb: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """Runs a verb of the supervisor's module and reads its JSON. Raises ServicesMissing, SupervisorFailed."""
        return self.ask_module(SUPERVISOR, verb, timeout_s=timeout_s)

    def ask_module(self, module: str, *arguments: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Runs a module of the services and reads its JSON. Raises ServicesMissing, SupervisorFailed."""
        need_services()
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != 0:
            raise SupervisorFailed(last_line(done.stderr) or f"{module} ended with status {done.returncode}")
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        return answer if isinstance(answer, dict) else {}

    def start(self, serve_config: Path | None = None) -> Starting:
        """Starts the supervisor in a session of its own, so that it outlives this terminal. Raises ServicesMissing."""
        config = () if serve_config is None else ("--serve-config", str(serve_config.resolve()))
        need_services()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.home.chmod(0o700)
        log = self.logs / "supervisor.log"
        with log.open("ab") as file:
            began = file.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", SUPERVISOR, "supervise", *config],
                env=self.environment(),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Starting(installation=self, process=process, log=log, log_from=began, began=time.monotonic())

    def join(self) -> Starting:
        """Waits along with whoever started the supervisor that runs already."""
        return Starting(
            installation=self, process=None, log=self.logs / "supervisor.log", log_from=0, began=time.monotonic()
        )


@dataclass(frozen=True, kw_only=True)
class Starting:
    """An installation that is on its way up."""

    installation: Installation
    process: subprocess.Popen[bytes] | None  # None: somebody else started it
    log: Path
    log_from: int
    began: float  # monotonic

    def look(self) -> dict[str, Any]:
        """The record as it stands; empty until the supervisor wrote its first. Raises SupervisorFailed when it has
        ended."""
        if self.process is None:
            record = self.installation.record()
            if not record:
                raise SupervisorFailed("the services were stopped while they were starting")
            return record
        status = self.process.poll()
        if status is not None:
            with self.log.open("rb") as file:
                file.seek(self.log_from)
                words = last_line(file.read().decode(errors="replace"))
            raise SupervisorFailed(words or f"the supervisor ended with status {status}; see {self.log}")
        record = self.installation.record()
        return record if record.get("supervisor", {}).get("pid") == self.process.pid else {}


def need_services() -> None:
    """Raises ServicesMissing when only the command and the client are installed."""
    if importlib.util.find_spec("services") is None:
        raise ServicesMissing("the services are not installed here: run `make setup` in the repository, use its .venv")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def tail(path: Path, count: int = 8) -> list[str]:
    """The last lines of a log."""
    try:
        return path.read_text(errors="replace").splitlines()[-count:]
    except OSError:
        return []
