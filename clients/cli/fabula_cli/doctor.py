"""`fabula doctor`: what is wrong on this machine, and how to mend it.

Each check is a small function that gives findings; those from inside the services come from `services.checkup`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.table import Table

from fabula_cli import exits
from fabula_cli.installation import DEFAULT_PORT_BASE, Installation, ServicesMissing, SupervisorFailed
from fabula_cli.options import AsJson, Home, PortBase
from fabula_cli.report import aside, people, say_json, size

GIB = 1 << 30
MEMORY_NEEDED = int(2.5 * GIB)  # all processes of the toon pack together, with some air
DISK_NEEDED = 1 * GIB
SHARED_MEMORY_NEEDED = 128 << 20  # Ray's object store
FIRST_RELEASE = 1_767_225_600.0  # 2026-01-01: a clock before it is wrong


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    mend: str = ""


def doctor(
    home: Home = None,
    port_base: PortBase = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what takes seconds: packs and imports.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check versions, ports, memory, disk, packs, database, libraries and clock; say how to mend what is wrong.

    Exit status 7 when something is broken.

    Example: fabula doctor --json | jq '.findings[] | select(.ok | not)'
    """
    installation = Installation.find(home, port_base)
    if not as_json:
        aside.print("[dim]Looking …[/]")
    findings = list(examine(installation, quick=quick))
    broken = [finding for finding in findings if not finding.ok]
    if as_json:
        say_json({"ok": not broken, "findings": findings})
    else:
        table = Table(box=None, padding=(0, 1), show_header=False)
        for finding in findings:
            table.add_row("[green]✓[/]" if finding.ok else "[red]✗[/]", finding.name, _text(finding))
        people.print(table)
        people.print("Everything is well." if not broken else f"[red]{len(broken)} to mend.[/]")
    if broken:
        raise typer.Exit(exits.FAULTS_FOUND)


def examine(installation: Installation, *, quick: bool) -> Iterator[Finding]:
    """Every finding, cheapest checks first."""
    yield check_python(sys.version_info[:2])
    yield from check_services(installation, quick=quick)
    yield check_memory(psutil.virtual_memory().available, running=bool(installation.record()))
    yield check_disk(installation.home)
    yield check_shared_memory(Path("/dev/shm"))
    yield from check_privacy(installation.home)
    yield check_clock(time.time(), newest_file(installation.home))


def check_python(version: tuple[int, int]) -> Finding:
    """The services are built for one Python."""
    found = ".".join(map(str, version))
    mend = "" if version == (3, 11) else "Make the environment with Python 3.11: `make clean setup PYTHON=python3.11`."
    return Finding(name="python", ok=not mend, detail=found, mend=mend)


def check_versions(lock: Path) -> Finding:
    """Every installed package against the lock."""
    wrong = []
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock.read_text(), re.MULTILINE)
    for name, wanted in pins:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found.partition("+")[0] != wanted.partition("+")[0]:
            wrong.append(f"{name} {found} (lock: {wanted})")
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return Finding(
        name="versions",
        ok=not wrong,
        detail=", ".join(wrong[:5]) + more if wrong else f"{len(pins)} packages as in {lock.name}",
        mend="Run `make clean setup`." if wrong else "",
    )


def check_services(installation: Installation, *, quick: bool) -> Iterator[Finding]:
    """What only the services' own code can say; nothing but a finding when they are not installed."""
    try:
        shown = installation.ask("show")
    except ServicesMissing as error:
        yield Finding(name="services", ok=False, detail=str(error), mend="Run `make setup`.")
        return
    except (SupervisorFailed, subprocess.TimeoutExpired) as error:
        yield Finding(name="settings", ok=False, detail=str(error), mend="Correct the named setting.")
        return
    lock = lock_file()
    if lock is not None:
        yield check_versions(lock)
    if importlib.util.find_spec("fabula.story.v1.story_pb2") is None:
        yield Finding(name="protobufs", ok=False, detail="no generated code", mend="Run `make protos`.")
    yield from check_processes(shown)
    yield from check_ports(shown)
    if quick:
        return
    try:
        answer = installation.ask_module("services.checkup", timeout_s=180.0)
    except (SupervisorFailed, subprocess.TimeoutExpired) as error:
        mend = "Run `python -m services.checkup` and read its error."
        yield Finding(name="checkup", ok=False, detail=str(error), mend=mend)
        return
    for each in answer["findings"]:
        yield Finding(name=each["name"], ok=each["ok"], detail=each["detail"], mend=each["mend"])


def check_processes(shown: dict[str, Any]) -> Iterator[Finding]:
    """Whether the services run as they should, or a crash left something behind."""
    record = shown["record"]
    if shown["running"]:
        phase = str(record.get("phase"))
        faults = "; ".join(each["message"] for each in record.get("programs", {}).values() if each.get("message"))
        ok = phase in ("ready", "starting")
        mend = "" if ok else f"Read {shown['home']}/logs, then `fabula down` and `fabula up`."
        detail = f"{phase}, {len(shown['processes'])} processes, {size(shown['memory_bytes'])}"
        yield Finding(name="processes", ok=ok, detail=f"{detail}; {faults}" if faults else detail, mend=mend)
    elif shown["processes"]:
        detail = f"{len(shown['processes'])} processes of a crashed run are left"
        yield Finding(name="processes", ok=False, detail=detail, mend="Run `fabula down`.")
    else:
        yield Finding(name="processes", ok=True, detail="not running")


def check_ports(shown: dict[str, Any]) -> Iterator[Finding]:
    """Fixed ports: free, or ours."""
    taken = set(shown["ports_in_use"])
    base = int(shown.get("port_base", DEFAULT_PORT_BASE))
    if shown["running"]:
        yield Finding(name="ports", ok=True, detail=f"{len(taken)} of ours in use from {base}")
    elif taken:
        named = ", ".join(f"{port} ({name})" for name, port in shown["ports"].items() if port in taken)
        mend = "End the program that listens there, or choose others: `fabula up --port-base 9470`."
        yield Finding(name="ports", ok=False, detail=f"in use by another program: {named}", mend=mend)
    else:
        yield Finding(name="ports", ok=True, detail=f"free from {base}")


def check_memory(available: int, *, running: bool) -> Finding:
    """Room for all processes, unless they run already."""
    needed = 256 << 20 if running else MEMORY_NEEDED
    ok = available >= needed
    mend = "" if ok else f"Free some memory: the services need about {size(MEMORY_NEEDED)}."
    return Finding(name="memory", ok=ok, detail=f"{size(available)} available", mend=mend)


def check_disk(home: Path) -> Finding:
    """Room for stories where the home is, or will be."""
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    ok = free >= DISK_NEEDED and os.access(place, os.W_OK)
    mend = "" if ok else f"Free at least {size(DISK_NEEDED)} there, or choose another folder with --home."
    return Finding(name="disk", ok=ok, detail=f"{size(free)} free at {place}", mend=mend)


def check_shared_memory(folder: Path) -> Finding:
    """Ray keeps its object store in shared memory and is slow without."""
    if not folder.exists():
        return Finding(name="shared memory", ok=True, detail="this system has no /dev/shm; Ray uses /tmp")
    free = shutil.disk_usage(folder).free
    ok = free >= SHARED_MEMORY_NEEDED
    mend = "" if ok else "Give /dev/shm at least 128 MiB (containers: --shm-size=256m)."
    return Finding(name="shared memory", ok=ok, detail=f"{size(free)} free at {folder}", mend=mend)


def check_privacy(home: Path) -> Iterator[Finding]:
    """The home and the tokens are for their owner only."""
    if not home.exists():
        yield Finding(name="home", ok=True, detail=f"{home} is made at the first `fabula up`")
        return
    open_to_others = [
        path
        for path in (home, home / "token", home / "ray_auth_token")
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077
    ]
    mend = f"chmod go-rwx {' '.join(map(str, open_to_others))}" if open_to_others else ""
    detail = f"{home} is yours alone" if not mend else f"others may read {', '.join(map(str, open_to_others))}"
    yield Finding(name="home", ok=not mend, detail=detail, mend=mend)


def check_clock(now: float, newest: float) -> Finding:
    """A clock that runs behind breaks leases, certificates and the order of stories."""
    ok = now >= FIRST_RELEASE and newest <= now + 300
    detail = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    mend = "" if ok else "Set the system clock (`timedatectl set-ntp true`): it is behind files that exist already."
    return Finding(name="clock", ok=ok, detail=f"{detail} on {socket.gethostname()}", mend=mend)


def newest_file(home: Path) -> float:
    """When something in the home last changed; 0 when there is none."""
    names = ("fabula.db", "dbos.db", "token", "logs")
    return max(((home / name).stat().st_mtime for name in names if (home / name).exists()), default=0.0)


def lock_file() -> Path | None:
    """The lock that this environment was made from; None outside a checkout."""
    found = importlib.util.find_spec("services")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder).parent / "requirements" / "cpu.lock"
        if path.exists():
            return path
    return None


def _text(finding: Finding) -> str:
    detail = finding.detail.replace("[", r"\[")
    return detail if finding.ok else f"{detail}\n[yellow]→ {finding.mend.replace('[', chr(92) + '[')}[/]"
