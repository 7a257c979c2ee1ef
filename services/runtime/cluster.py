"""One installation on one machine: starts the Ray side and the story service, keeps them running, ends them without a
trace.

    python -m services.runtime.cluster supervise [--serve-config FILE]   runs until it is told to stop (`fabula up`
    starts it) python -m services.runtime.cluster down                              ends every process of the
    installation python -m services.runtime.cluster show                              prints the record and the
    processes as JSON

The installation is the one of FABULA_HOME and FABULA_PORT_BASE. The supervisor is small on purpose (no Ray, no gRPC):
what it starts dies with it, what dies it starts again, and everything it knows is in `run/instance.json`, from which
`down` can end what a crash left. It knows how the services are started and asked whether they are ready; nothing else
about them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from services.runtime import processes
from services.runtime.config import ConfigInvalid, Installation, make_token
from services.runtime.processes import ProcessIdentity

REPOSITORY = Path(__file__).resolve().parents[2]
LAPTOP = REPOSITORY / "deploy" / "serve" / "laptop.yaml"
TICK_S = 0.2
READY_AGAIN_S = 1.0
STOP_S = 6.0  # the story service gets this long to end the calls in flight
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0  # between restarts of something that keeps dying
STEADY_S = 30.0  # a process that lived this long is taken to have been well

DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy of the environment

ALREADY_RUNNING, PORT_TAKEN, CANNOT_START = 75, 76, 78  # exit statuses of `supervise`


class PortTaken(Exception):
    """Another program listens on a port of this installation."""


# --- the record ---------------------------------------------------------------------------------------------------


def instance_of(installation: Installation) -> str:
    """The mark of this installation's processes: a digest of its home, so that two homes never meet."""
    return hashlib.sha256(str(installation.home.resolve()).encode()).hexdigest()[:16]


def record_path(installation: Installation) -> Path:
    """Where the supervisor writes down what it runs."""
    return installation.home / "run" / "instance.json"


def read_record(installation: Installation) -> dict[str, Any]:
    """What the supervisor wrote last; empty when nothing was ever started, or the last `down` was clean."""
    try:
        document = json.loads(record_path(installation).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return document if isinstance(document, dict) else {}


def leaders_in(record: Mapping[str, Any]) -> tuple[ProcessIdentity, ...]:
    """Every session that was opened since the record was begun, the supervisor's own included."""
    return tuple(ProcessIdentity(pid=each["pid"], start=each["start"]) for each in record.get("sessions", ()))


def supervisor_in(record: Mapping[str, Any]) -> ProcessIdentity | None:
    """The supervisor, if it lives."""
    named = record.get("supervisor")
    identity = ProcessIdentity(pid=named["pid"], start=named["start"]) if named else None
    return identity if identity is not None and identity.alive else None


@contextlib.contextmanager
def sole_supervisor(installation: Installation) -> Any:
    """Holds the installation's lock; yields False if another supervisor has it. The kernel releases it however we
    end."""
    with (installation.home / "run" / "supervisor.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


# --- what is started ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Program:
    """Something the supervisor keeps running."""

    name: str
    command: tuple[str, ...]
    stop_s: float  # how long it may take to end by itself; 0: it is killed at once, for nothing in it needs an end


@dataclass(kw_only=True)
class Running:
    """A program and its present process."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    identity: ProcessIdentity | None = None
    started: float = 0.0  # monotonic
    restarts: int = 0
    failures: int = 0  # deaths in a row without a steady life between them
    start_at: float = 0.0  # monotonic; not before
    ready_s: float | None = None  # from the supervisor's start to its first readiness
    ready: bool = False
    look_at: float = 0.0  # monotonic; when a ready program is asked again
    message: str = ""


def pause_after(failures: int) -> float:
    """Seconds to wait before the next start after so many deaths in a row."""
    return 0.0 if failures <= 0 else float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures - 1, 16)))


def programs(serve_config: Path) -> tuple[Program, ...]:
    """The Ray side and the story service. They start together: each waits for the other by itself."""
    return (
        Program(name="ray", command=(sys.executable, "-m", "services.runtime.ray_head", str(serve_config)), stop_s=0.0),
        Program(name="story", command=(sys.executable, "-m", "services.story", "serve"), stop_s=STOP_S),
    )


def child_environment(installation: Installation, inherited: Mapping[str, str]) -> dict[str, str]:
    """What every process of the installation finds in its environment.

    Ray settings of the surrounding shell are dropped: they would point ours at somebody else's cluster.
    """
    environment = {key: value for key, value in inherited.items() if not key.startswith("RAY_")}
    environment.update(
        {
            "FABULA_HOME": str(installation.home),
            "FABULA_PORT_BASE": str(installation.port_base),
            processes.MARK: instance_of(installation),
            "PYTHONUNBUFFERED": "1",
            # Nothing is fetched and nothing is reported.
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            # vLLM on a CPU: in the replica's own process, on cores it does not pin, as fast with one thread as with
            # two.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", "1"),
            # A thread that waits for the others sleeps instead of spinning: two engines share these cores.
            "OMP_WAIT_POLICY": inherited.get("OMP_WAIT_POLICY", "PASSIVE"),
            "TOKENIZERS_PARALLELISM": "false",
            # glibc keeps an arena per thread and core; two are enough here and save memory in every process.
            "MALLOC_ARENA_MAX": inherited.get("MALLOC_ARENA_MAX", "2"),
        }
    )
    return environment


def ray_variables(installation: Installation) -> dict[str, str]:
    """Variables of the Ray side. They must be in the environment before Ray is imported, so they are set here."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(installation.home / "ray_auth_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own switch for machines where it must not open ports to the network: every node address is loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # A killed proxy is back after 4 s with these; the defaults mean an outage of 40 s.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
        # A proxy that is slow to start on a busy machine is waited for; by default it is killed every 5 s.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
        # What a `worker_process_setup_hook` becomes, for every worker and without a runtime environment's cost.
        "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "services.runtime.loopback.install",
        "RAY_worker_niceness": "0",  # 15 by default: any other program would starve the engines and their health checks
        "DASHBOARD_METRIC_PORT": str(installation.port_base + 13),  # one for all clusters of a machine by default
        "RAY_ROTATION_MAX_BYTES": str(8 << 20),
        "RAY_ROTATION_BACKUP_COUNT": "1",
    }


def ports_of(installation: Installation) -> dict[str, int]:
    """Every port that is fixed, by what listens on it. Ray's workers also take ports from base + 30 to base + 129."""
    base = installation.port_base
    return {
        "story HTTP": installation.story_http_port,
        "story gRPC": installation.story_grpc_port,
        "Serve gRPC ingress": installation.ingress_grpc_port,
        "Serve HTTP proxy": installation.ingress_http_port,
        "Ray control store": installation.gcs_port,
        "Ray node manager": base + 6,
        "Ray metrics": installation.metrics_port,
        "Ray object manager": base + 8,
        "Ray metrics agent": base + 9,
        "Ray dashboard agent": base + 11,
        "Ray runtime environment agent": base + 12,
        "Ray head metrics": base + 13,
    }


def taken(ports: Mapping[str, int]) -> dict[str, int]:
    """The ports that somebody listens on."""
    busy = {}
    for name, port in ports.items():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                busy[name] = port
    return busy


# --- the supervisor -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Supervisor:
    """Keeps the programs of one installation running and its record true."""

    installation: Installation
    wanted: Sequence[Program]
    environment: Mapping[str, str]
    clock: Callable[[], float] = time.monotonic
    began: float = field(init=False)
    running: list[Running] = field(init=False)
    sessions: list[ProcessIdentity] = field(init=False)
    written: str = field(init=False, default="")
    unwritable: bool = field(init=False, default=False)  # the record on the disk is out of date
    ready_s: float | None = field(init=False, default=None)
    stopping: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.running = [Running(program=program) for program in self.wanted]
        self.sessions = [ProcessIdentity(pid=os.getpid(), start=processes.start_of(os.getpid()) or 0.0)]

    def run(self) -> None:
        """Runs until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            self._write()
            if self.unwritable:
                raise SystemExit(CANNOT_START)  # without a first record `down` could not find this process
            while not self.stopping:
                for each in self.running:
                    self._keep(each)
                self._write()
                time.sleep(TICK_S)
        finally:
            self._end_all()

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping = True

    def _keep(self, each: Running) -> None:
        """One look at one program: start it, notice that it died, notice that it is ready."""
        now = self.clock()
        if each.process is None:
            if now >= each.start_at:
                try:
                    self._start(each)
                except OSError as error:  # no room for a log, no memory for a process: the others need not end for it
                    each.failures += 1
                    each.message = f"cannot be started: {error}"
                    each.start_at = now + pause_after(each.failures)
            return
        status = each.process.poll()
        if status is None:
            if each.ready and now < each.look_at:
                return
            each.look_at = now + READY_AGAIN_S
            if each.program.name == "story":
                each.ready = story_ready(self.installation)
                each.message = "" if each.ready else each.message
            else:
                each.ready, each.message = serve_ready(self.installation, each.process.pid)
            if each.ready and each.ready_s is None:
                each.ready_s = round(now - self.began, 2)
            return
        each.failures = 1 if now - each.started > STEADY_S else each.failures + 1
        each.message = f"ended with status {status}; see {self._log_path(each.program)}"
        each.restarts += 1
        each.ready = False
        each.start_at = now + pause_after(each.failures)
        self._sweep(each)
        each.process = None

    def _start(self, each: Running) -> None:
        environment = {**self.environment, **(ray_variables(self.installation) if each.program.name == "ray" else {})}
        if each.program.name == "ray":
            shutil.rmtree(self.installation.ray_folder, ignore_errors=True)
            self.installation.ray_folder.mkdir(parents=True)
            (self.installation.home / "run" / "serve.json").unlink(missing_ok=True)
        with self._log(each.program) as log:
            each.process = subprocess.Popen(
                each.program.command,
                env=environment,
                cwd=self.installation.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=processes.die_with_parent,
            )
        each.started = self.clock()
        each.identity = ProcessIdentity.of(each.process.pid)
        if each.identity is not None:
            self.sessions.append(each.identity)
        self._write()

    def _sweep(self, each: Running) -> None:
        """Ends what a dead program left: its session, and nobody else's."""
        if each.identity is not None:
            processes.end(None, (each.identity,))
            self.sessions.remove(each.identity)

    def _end_all(self) -> None:
        """Asks each program to end, then ends what is left of everything."""
        self.stopping = True
        self._write()
        patient = [each for each in self.running if each.program.stop_s > 0 and each.process is not None]
        for each in patient:
            if each.process is not None:
                each.process.terminate()
        deadline = self.clock() + max((each.program.stop_s for each in patient), default=0.0)
        for each in patient:
            if each.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    each.process.wait(max(0.0, deadline - self.clock()))
        mine = (os.getpid(), os.getppid())
        processes.end(instance_of(self.installation), self.sessions, spare=mine)
        for each in self.running:
            if each.process is not None:
                each.process.wait()
        clear(self.installation)

    def _log_path(self, program: Program) -> Path:
        return self.installation.home / "logs" / f"{program.name}.log"

    def _log(self, program: Program) -> IO[bytes]:
        """Opens a program's log for appending; the one before is kept once it has grown."""
        path = self._log_path(program)
        if path.exists() and path.stat().st_size > 16 << 20:
            path.replace(path.with_suffix(".1.log"))
        return path.open("ab")

    def _phase(self) -> str:
        if self.stopping:
            return "stopping"
        if any(each.message.startswith("DEPLOY_FAILED") for each in self.running):
            return "failed"
        if all(each.ready for each in self.running):
            return "ready"
        if self.ready_s is not None:
            return "degraded"
        return "failed" if any(each.failures >= 3 for each in self.running) else "starting"

    def _write(self) -> None:
        phase = self._phase()
        if phase == "ready" and self.ready_s is None:
            self.ready_s = round(self.clock() - self.began, 2)
        base = self.installation.port_base
        document = {
            "instance": instance_of(self.installation),
            "home": str(self.installation.home),
            "port_base": base,
            "http": f"http://127.0.0.1:{self.installation.story_http_port}",
            "grpc": f"127.0.0.1:{self.installation.story_grpc_port}",
            "phase": phase,
            "ready_s": self.ready_s,
            "supervisor": self.sessions[0].to_json(),
            "sessions": [session.to_json() for session in self.sessions],
            "programs": {
                each.program.name: {
                    "pid": each.process.pid if each.process is not None else None,
                    "ready": each.ready,
                    "ready_s": each.ready_s,
                    "restarts": each.restarts,
                    "message": each.message,
                }
                for each in self.running
            },
            "applications": read_serve_status(self.installation).get("applications", {}),
        }
        text = json.dumps(document, indent=1)
        if text == self.written:
            return
        path = record_path(self.installation)
        draft = path.with_suffix(".tmp")
        try:
            draft.write_text(text)
            draft.replace(path)
        except OSError as error:
            # A full disk must not end what runs, and what runs can be found and ended without the record, by its mark.
            # The next tick tries again.
            if not self.unwritable:
                with contextlib.suppress(OSError):  # the log may be on the same disk
                    print(f"the record cannot be written: {error}", file=sys.stderr, flush=True)
            self.unwritable = True
        else:
            self.written, self.unwritable = text, False


def read_serve_status(installation: Installation) -> dict[str, Any]:
    """What the Ray head wrote last about its applications."""
    try:
        document = json.loads((installation.home / "run" / "serve.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return document if isinstance(document, dict) else {}


def serve_ready(installation: Installation, head_pid: int) -> tuple[bool, str]:
    """Whether every application runs, and what stands in the way."""
    status = read_serve_status(installation)
    if status.get("pid") != head_pid:
        return False, "Ray is starting"
    applications: dict[str, dict[str, Any]] = status["applications"]
    faults = [
        f"{each['status']} {name}: {each['message']}".strip()
        for name, each in sorted(applications.items(), key=lambda item: item[1]["status"] != "DEPLOY_FAILED")
        if each["status"] != "RUNNING"
    ]
    return bool(applications) and not faults, "; ".join(faults)


def story_ready(installation: Installation) -> bool:
    """Whether the story service says so itself."""
    try:
        with DIRECTLY.open(f"http://127.0.0.1:{installation.story_http_port}/readyz", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


# --- the three verbs ----------------------------------------------------------------------------------------------


def supervise(installation: Installation, serve_config: Path) -> int:
    """Runs the installation until told to stop. See the exit statuses at the top."""
    installation.make_home()
    with sole_supervisor(installation) as alone:
        if not alone:
            print("this installation has a supervisor already", file=sys.stderr)
            return ALREADY_RUNNING
        sweep(installation)
        if busy := taken(ports_of(installation)):
            named = ", ".join(f"{port} ({name})" for name, port in busy.items())
            print(
                f"ports in use by another program: {named}. Free them or choose others with --port-base.",
                file=sys.stderr,
            )
            return PORT_TAKEN
        installation.read_token()
        if not (installation.home / "ray_auth_token").exists():
            make_token(installation.home / "ray_auth_token")
        # The parent of every Ray session folder: Ray makes its own files readable for all, so nobody else may come
        # this far.
        installation.ray_folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        installation.ray_folder.parent.chmod(0o700)
        environment = child_environment(installation, os.environ)
        Supervisor(installation=installation, wanted=programs(serve_config), environment=environment).run()
    return 0


def sweep(installation: Installation, spare: Sequence[int] = ()) -> int:
    """Ends what an earlier run left behind, however it ended, and says how many processes that were."""
    mine = (os.getpid(), os.getppid(), *spare)
    count = processes.end(instance_of(installation), leaders_in(read_record(installation)), spare=mine)
    clear(installation)
    return count


def clear(installation: Installation) -> None:
    """Removes the files of a run that is over: the record and Ray's session folder. Logs, stories and tokens stay."""
    record_path(installation).unlink(missing_ok=True)
    (installation.home / "run" / "serve.json").unlink(missing_ok=True)
    shutil.rmtree(installation.ray_folder, ignore_errors=True)


def down(installation: Installation) -> dict[str, Any]:
    """Ends every process of the installation and says what it found."""
    record = read_record(installation)
    supervisor = supervisor_in(record)
    if supervisor is not None:
        os.kill(supervisor.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S + 12.0
        while supervisor.alive and time.monotonic() < deadline:
            time.sleep(0.05)
    leaders = leaders_in(record)
    killed = processes.end(instance_of(installation), leaders, spare=(os.getpid(), os.getppid()))
    clear(installation)
    return {"was_running": supervisor is not None, "left_over_count": killed}


def show(installation: Installation) -> dict[str, Any]:
    """The record, whether it is still true, and every process with its memory."""
    record = read_record(installation)
    mine = {os.getpid(), os.getppid()}
    found = [
        process for process in processes.find(instance_of(installation), leaders_in(record)) if process.pid not in mine
    ]
    uses = processes.measure(found)
    return {
        "running": supervisor_in(record) is not None,
        "instance": instance_of(installation),
        "home": str(installation.home),
        "port_base": installation.port_base,
        "ports": ports_of(installation),
        "ports_in_use": sorted(taken(ports_of(installation)).values()),
        "record": {key: value for key, value in record.items() if key not in ("sessions",)},
        "processes": [
            {"pid": use.pid, "parent_pid": use.parent_pid, "name": use.name, "memory_bytes": use.memory_bytes}
            for use in uses
        ],
        "memory_bytes": sum(use.memory_bytes for use in uses),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        prog="python -m services.runtime.cluster", description=(__doc__ or "").partition("\n")[0]
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("supervise").add_argument("--serve-config", type=Path, default=LAPTOP)
    verbs.add_parser("down")
    verbs.add_parser("show")
    chosen = parser.parse_args(arguments)
    try:
        installation = Installation.load()
    except ConfigInvalid as error:
        print(error, file=sys.stderr)
        return CANNOT_START
    if chosen.verb == "supervise":
        return supervise(installation, chosen.serve_config.resolve())
    print(json.dumps(down(installation) if chosen.verb == "down" else show(installation)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
