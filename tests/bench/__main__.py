"""`make bench`: starts a Fabula in a fresh folder, measures it, prints a table, writes JSON, leaves nothing behind.

    python -m tests.bench                    three warm stories of 4 frames, four at once, 300 calls of each kind
    python -m tests.bench --quick            one, two at once, 50 calls: to see whether the bench works
    python -m tests.bench --check            exit status 1 when a target is missed

Run it on a machine that does nothing else. The figures go to bench-results/<date>.json beside the facts that make them
comparable; the exit status tells whether they could be taken, not whether they are good.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fabula_client import AsyncClient, FabulaError
from rich.console import Console

from tests.bench.installation import CommandFailed, Installation
from tests.bench.machine import ROOT, machine_facts, revision_facts
from tests.bench.measure import FirstFrame, StoryUnfinished, time_edge, time_stories_at_once, time_story
from tests.bench.report import Measurements, passed, report, table

FIRST_FRAMES = ROOT / "clients" / "cli" / "fabula_cli" / "first_frames"
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    frame_count: int = 4
    single_count: int = 3
    concurrent_count: int = 4
    call_count: int = 300


QUICK = Plan(single_count=1, concurrent_count=2, call_count=50)


def shipped_first_frames() -> list[FirstFrame]:
    """The first frames that come with the command."""
    entries = json.loads((FIRST_FRAMES / "first_frames.json").read_text(encoding="utf-8"))
    return [FirstFrame(image=FIRST_FRAMES / entry["image"], caption=entry["caption"]) for entry in entries]


async def measure(installation: Installation, plan: Plan, *, cold_start_s: float, console: Console) -> Measurements:
    """All there is to measure once the services are ready. Raises StoryUnfinished, FabulaError, CommandFailed."""
    firsts = shipped_first_frames()
    memory = [await asyncio.to_thread(installation.memory, "ready")]
    async with AsyncClient(installation.grpc_target) as client:
        console.print("first story …")
        first_story = await time_story(client, firsts[0], frame_count=plan.frame_count, seed=SEED)
        console.print(f"{plan.single_count} stories, one after the other …")
        single = [
            await time_story(client, firsts[i % len(firsts)], frame_count=plan.frame_count, seed=SEED + 1 + i)
            for i in range(plan.single_count)
        ]
        console.print(f"{plan.concurrent_count} stories at once …")
        several = [firsts[i % len(firsts)] for i in range(plan.concurrent_count)]
        concurrent, wall_s = await time_stories_at_once(client, several, frame_count=plan.frame_count, seed=SEED + 100)
        memory.append(await asyncio.to_thread(installation.memory, "after the stories"))
        console.print("calls of the edge …")
        newest = await anext(client.stories.list(page_size=1))
        calls = await time_edge(installation, newest, firsts[0], count=plan.call_count)
    return Measurements(
        cold_start_s=cold_start_s,
        first_story=first_story,
        single_stories=tuple(single),
        concurrent_stories=concurrent,
        concurrent_wall_s=wall_s,
        memory=tuple(memory),
        calls=tuple(calls),
    )


def run(plan: Plan, *, port_base: int, timeout_s: float, quick: bool, console: Console) -> dict[str, Any]:
    """One whole run. Whatever happens, the processes end; the folder stays when something went wrong, for its logs."""
    machine, revision = machine_facts(), revision_facts()
    if machine["load_before"] > 0.5 * machine["usable_core_count"]:
        console.print(
            f"[yellow]The machine is busy (load {machine['load_before']}): figures will be worse than they are.[/]"
        )
    installation = Installation.fresh(port_base)
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
    try:
        console.print(f"starting in {installation.home} …")
        cold_start_s = installation.start(timeout_s=timeout_s)
        measured = asyncio.run(measure(installation, plan, cold_start_s=cold_start_s, console=console))
    except BaseException:
        with contextlib.suppress(CommandFailed):
            installation.stop()
        console.print(f"logs: {installation.home / 'logs'}")
        raise
    installation.stop()
    installation.remove()
    return report(measured, machine=machine, revision=revision, date=date, quick=quick)


def main() -> int:
    """Exit status 0: measured; 1: could not be measured, or with --check a target was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--port-base", type=int, default=18700, help="first of the ports to use (130 of them)")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="longest wait for the start")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results", help="folder of the JSON")
    arguments = parser.parse_args()
    console = Console()
    try:
        document = run(
            QUICK if arguments.quick else Plan(),
            port_base=arguments.port_base,
            timeout_s=arguments.timeout_s,
            quick=arguments.quick,
            console=console,
        )
    except (CommandFailed, StoryUnfinished, FabulaError) as error:
        console.print(f"[red]{type(error).__name__}: {error}[/]")
        return 1
    console.print(table(document))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{document['date']}.json"
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"written to {path}")
    return int(arguments.check and not passed(document))


if __name__ == "__main__":
    raise SystemExit(main())
