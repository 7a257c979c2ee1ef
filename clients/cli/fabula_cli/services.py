"""`fabula up`, `down`, `status`: the processes of this machine."""

from __future__ import annotations

import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from fabula.caption.v1 import caption_service_pb2 as caption_pb
from fabula.caption.v1.caption_service_pb2_grpc import CaptionServiceStub
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from fabula.frame.v1.frame_service_pb2_grpc import FrameServiceStub
from fabula_client import Client, FabulaError, RetryPolicy
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fabula_cli import exits
from fabula_cli.exposition import read_exposition, summarize
from fabula_cli.installation import Installation, ServicesMissing, Starting, SupervisorFailed, tail
from fabula_cli.options import AsJson, Home, PortBase
from fabula_cli.report import aside, duration, fail, people, say_json, size

_directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy of the environment

STORIES_COUNTED = 1000  # `status` looks at the newest so many


class CannotStart(Exception):
    """The services did not come up; the message says why and what to do."""


def phase_of(installation: Installation) -> str:
    """`stopped`, or what the supervisor says: `starting`, `ready`, `degraded`, `failed`, `stopping`."""
    if not installation.record():
        return "stopped"
    shown = installation.ask("show")
    return str(shown["record"].get("phase", "starting")) if shown["running"] else "stopped"


def bring_up(
    installation: Installation, *, timeout_s: float, quiet: bool, serve_config: Path | None = None
) -> dict[str, Any]:
    """Starts the services unless they are starting, and waits until they are ready; returns the record.

    Raises CannotStart, having stopped them again; those that somebody else had started are left alone.
    """
    stopped = phase_of(installation) == "stopped"
    starting = installation.start(serve_config) if stopped else installation.join()
    try:
        with _watching(quiet) as show:
            while True:
                record = starting.look()
                elapsed = time.monotonic() - starting.began
                show(record, elapsed)
                if record.get("phase") == "ready":
                    return {**record, "elapsed_s": round(elapsed, 2)}
                if record.get("phase") == "failed":
                    raise CannotStart(_why(record, starting))
                if elapsed > timeout_s:
                    raise CannotStart(f"not ready after {timeout_s:g} s. {_why(record, starting)}")
                time.sleep(0.2)
    except SupervisorFailed as error:
        raise CannotStart(str(error)) from None
    except CannotStart:
        if stopped:
            installation.ask("down")
        raise


def up(
    wait: bool,
    timeout_s: float,
    serve_config: Path | None,
    installation: Installation,
    as_json: bool,
) -> None:
    """See `main.up`."""
    try:
        phase = phase_of(installation)
        if phase == "ready" or (phase != "stopped" and not wait):
            _say_up(installation.record(), as_json, already=True)
            return
        if not wait:
            starting = installation.start(serve_config)
            while not (record := starting.look()):
                time.sleep(0.1)
            _say_up(record, as_json, already=False)
            return
        record = bring_up(installation, timeout_s=timeout_s, quiet=as_json, serve_config=serve_config)
        _say_up(record, as_json, already=False)
    except (CannotStart, SupervisorFailed, ServicesMissing) as error:
        fail(str(error), status=exits.CANNOT_START, as_json=as_json, reason="CANNOT_START")
    except KeyboardInterrupt:
        aside.print("Still starting in the background: `fabula status` looks, `fabula down` stops it.")
        raise


def down(home: Home = None, as_json: AsJson = False) -> None:
    """Stop the services; leave no process behind, also after a crash.

    Stories that were in progress go on at the next `fabula up`.
    """
    installation = Installation.find(home, None)
    try:
        found = installation.ask("down")
    except (SupervisorFailed, ServicesMissing) as error:
        fail(str(error), status=exits.FAILED, as_json=as_json)
    if as_json:
        say_json(found)
    elif not found["was_running"] and not found["left_over_count"]:
        people.print("Nothing was running.")
    else:
        rest = f" ({found['left_over_count']} processes were left over)" if found["left_over_count"] else ""
        people.print(f"[green]✓[/] Stopped{rest}. Stories in progress go on at the next [bold]fabula up[/].")


def status(home: Home = None, port_base: PortBase = None, as_json: AsJson = False) -> None:
    """Show processes, memory, applications, packs, stories and metrics. Exit status 3 when the services are not ready.

    Example: fabula status --json | jq .memory_bytes
    """
    installation = Installation.find(home, port_base)
    try:
        found = inspect(installation)
    except (SupervisorFailed, ServicesMissing) as error:
        fail(str(error), status=exits.FAILED, as_json=as_json)
    if as_json:
        say_json(found)
    else:
        people.print(_status_view(found))
    if found["phase"] != "ready":
        raise SystemExit(exits.NOT_RUNNING)


def inspect(installation: Installation) -> dict[str, Any]:
    """All that `status` says. Raises SupervisorFailed, ServicesMissing."""
    shown = installation.ask("show")
    record = shown["record"]
    phase = str(record.get("phase", "stopped")) if shown["running"] else "stopped"
    found: dict[str, Any] = {
        "phase": phase,
        "crashed": not shown["running"] and bool(shown["processes"]),
        "home": shown["home"],
        "http": record.get("http"),
        "grpc": record.get("grpc"),
        "ready_s": record.get("ready_s"),
        "ports": shown["ports"],
        "programs": record.get("programs", {}),
        "applications": record.get("applications", {}),
        "processes": shown["processes"],
        "memory_bytes": shown["memory_bytes"],
        "stories": {},
        "packs": [],
        "metrics": {},
    }
    if phase in ("ready", "degraded"):
        found["stories"] = stories_by_state(str(record["grpc"]))
        story = scrape(f"{record['http']}/metrics")
        replicas = scrape(f"http://127.0.0.1:{shown['ports']['Ray metrics']}/metrics")
        found["metrics"] = {
            **summarize(read_exposition(story), ("story_",)),
            **summarize(
                read_exposition(replicas), ("ray_caption_", "ray_frame_", "ray_serve_deployment_replica_healthy")
            ),
        }
        found["packs"] = packs_loaded(installation, f"127.0.0.1:{shown['ports']['Serve gRPC ingress']}")
    return found


def stories_by_state(target: str) -> dict[str, int]:
    """How many of the newest stories stand where; empty when the service does not answer."""
    counted: Counter[str] = Counter()
    try:
        with Client(target, timeout_s=5.0, retry=RetryPolicy(attempts=1)) as client:
            for number, story in enumerate(client.stories.list(page_size=200), start=1):
                counted[str(story.state)] += 1
                if number == STORIES_COUNTED:
                    break
    except FabulaError:
        return {}
    return dict(sorted(counted.items()))


def scrape(url: str) -> str:
    """A metrics page; empty when nobody answers."""
    try:
        with _directly.open(url, timeout=5.0) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def packs_loaded(installation: Installation, ingress: str) -> list[dict[str, str]]:
    """The packs that the replicas answer for, asked with the installation's token; empty for a service that is away."""
    try:
        token = (installation.home / "token").read_text().strip()
    except OSError:
        return []
    packs = []
    with grpc.insecure_channel(ingress, options=(("grpc.enable_http_proxy", 0),)) as channel:
        asked = (
            ("caption", CaptionServiceStub(channel).ListPacks, caption_pb.ListPacksRequest()),
            ("frame", FrameServiceStub(channel).ListPacks, frame_pb.ListPacksRequest()),
        )
        for service, list_packs, request in asked:
            try:
                answer = list_packs(request, timeout=5.0, metadata=(("application", service), ("fabula-token", token)))
            except grpc.RpcError:
                continue
            packs += [
                {"service": service, "pack": each.name, "architecture": each.architecture, "digest": each.digest}
                for each in answer.packs
            ]
    return packs


@contextmanager
def _watching(quiet: bool) -> Iterator[Any]:
    """Gives a function that shows a record: live on a terminal, a line per change elsewhere, nothing when quiet."""
    if quiet:
        yield lambda record, elapsed: None
    elif aside.is_terminal:
        with Live(console=aside, refresh_per_second=8, transient=True) as live:
            yield lambda record, elapsed: live.update(_start_view(record, elapsed))
    else:
        said: set[str] = set()

        def say(record: dict[str, Any], elapsed: float) -> None:
            for name, ready, _ in _parts(record):
                if ready and name not in said:
                    said.add(name)
                    aside.print(f"{duration(elapsed):>8}  {name} ready")

        yield say


def _parts(record: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """What has to come up: name, whether it has, what it does meanwhile."""
    applications = record.get("applications", {})
    programs = record.get("programs", {})
    named = [
        (
            name,
            applications.get(name, {}).get("status") == "RUNNING",
            applications.get(name, {}).get("status", "").lower(),
        )
        for name in ("caption", "frame")
    ]
    story = programs.get("story", {})
    return [("story", bool(story.get("ready")), str(story.get("message", ""))), *named]


def _start_view(record: dict[str, Any], elapsed: float) -> RenderableType:
    rows: list[RenderableType] = [Text(f"Starting Fabula  {duration(elapsed)}", style="bold")]
    for name, ready, doing in _parts(record):
        rows.append(Text(f"✓ {name}", style="green") if ready else Spinner("dots", text=f"{name} {doing}".rstrip()))
    return Group(*rows)


def _why(record: dict[str, Any], starting: Starting) -> str:
    """The faults of a start that failed, and where to read on."""
    faults = [
        f"{name}: {program['message']}"
        for name, program in record.get("programs", {}).items()
        if program.get("message")
    ]
    log = starting.installation.logs
    ends = tail(log / "story.log", 3) if any(fault.startswith("story") for fault in faults) else []
    return "\n".join([*faults, *ends, f"Logs: {log}. `fabula doctor` looks for the cause."])


def _say_up(record: dict[str, Any], as_json: bool, *, already: bool) -> None:
    if as_json:
        say_json({key: value for key, value in record.items() if key != "sessions"} | {"already_running": already})
        return
    if record.get("phase") != "ready":
        people.print("Starting in the background; [bold]fabula status[/] says how far it is.")
        return
    how = "already runs" if already else f"is ready after {duration(record['elapsed_s'])}"
    people.print(f"[green]✓[/] Fabula {how}.  HTTP {record['http']}  gRPC {record['grpc']}")
    people.print('  Continue a story:  fabula story continue --image first.png --caption "…" --out mystory/')


def _status_view(found: dict[str, Any]) -> RenderableType:
    where = f"{found['http'] or ''}  {found['grpc'] or ''}"
    colour = {"ready": "green", "starting": "yellow", "degraded": "yellow"}.get(found["phase"], "red")
    parts: list[RenderableType] = [
        Text.assemble("Fabula is ", (found["phase"], f"bold {colour}"), f"  {where}"),
        Text(f"home {found['home']}", style="dim"),
    ]
    if found["crashed"]:
        parts.append(Text("processes of a crashed run are left: `fabula down` ends them", style="red"))
    if found["applications"]:
        table = Table("application", "status", "replicas", "message", box=None, padding=(0, 2))
        for name, each in found["applications"].items():
            replicas = ", ".join(f"{count} {state.lower()}" for state, count in each["replicas"].items())
            table.add_row(name, each["status"].lower(), replicas, escape(each["message"]))
        parts += [Text(), table]
    if found["processes"]:
        table = Table("process", "pid", "memory", box=None, padding=(0, 2))
        for each in found["processes"]:
            table.add_row(escape(each["name"]), str(each["pid"]), size(each["memory_bytes"]))
        table.add_row("[bold]together[/]", "", f"[bold]{size(found['memory_bytes'])}[/]")
        parts += [Text(), table]
    if found["packs"]:
        parts += [
            Text(),
            Text(
                "packs  "
                + "  ".join(f"{each['service']}: {each['pack']} {each['digest'][:19]}" for each in found["packs"])
            ),
        ]
    if found["stories"]:
        parts += [
            Text(),
            Text("stories  " + "  ".join(f"{count} {state}" for state, count in found["stories"].items())),
        ]
    if found["metrics"]:
        table = Table("metric", "value", box=None, padding=(0, 2))
        for name, value in found["metrics"].items():
            table.add_row(name, f"{value:g}")
        parts += [Text(), table]
    return Group(*parts)
