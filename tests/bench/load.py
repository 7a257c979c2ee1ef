"""`make bench-load`: reads full-size packs of random weights; how long that takes, and how much memory at the most.

    python -m tests.bench.load                     StoryGen and SD 1.5, as they are published and in half precision
    python -m tests.bench.load --kinds storygen    one of them
    python -m tests.bench.load --check             exit status 1 when a target is missed

A pack is made in a scratch folder (up to 9 GB at a time) the way `fabula pack add` makes it, then read by a process of
its own as the frame service reads it, and every weight used once: a safetensors file is mapped, and comes into memory
as it is used. Memory is the most that process held, file pages included, beyond what it held before it began. Weights
are random: they take the room of real ones. The report goes to `tests/bench/results/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.console import Console
from rich.table import Table

from services.models.pack import load_pack
from services.models.registry import load_frame_model
from tests.bench.full_size import Kind, write_full_size
from tests.bench.machine import ROOT, machine_facts, revision_facts
from tests.stable_diffusion_checkpoints import sealed

RESULTS = Path(__file__).resolve().parent / "results"
PEAK_TO_FILE = 1.3  # the most that reading may take, as a share of the weights' files
KINDS: tuple[Kind, ...] = ("storygen", "sd15")
Stored = Literal["float32", "float16"]


def read_once(folder: Path, dtype: str) -> dict[str, float]:
    """Read a pack in this process, as a frame service does. For a process that has done nothing else."""
    process = psutil.Process()
    before = process.memory_info().rss
    start = time.monotonic()
    pack = load_pack(folder)
    checked = time.monotonic()
    model = load_frame_model(pack, dtype=getattr(torch, dtype))
    done = time.monotonic()
    text: Any = model.text
    networks: tuple[Any, ...] = (model.denoiser.unet, model.codec.vae, text.model)
    for network in networks:  # weights that only lie in the file so far come into memory, as by the first frame
        for one in network.parameters():
            one.sum()
    first_use = time.monotonic()
    peak = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    held = sum(one.numel() * one.element_size() for network in networks for one in network.parameters())
    return {
        "check_s": checked - start,
        "read_s": done - checked,
        "first_use_s": first_use - done,
        "peak_bytes": peak - before,
        "weights_bytes": held,
    }


def measured(kind: Kind, stored: Stored, served: str, scratch: Path) -> dict[str, Any]:
    """One pack's figures."""
    checkpoint, packs = scratch / "checkpoint", scratch / "packs"
    write_full_size(checkpoint, kind, getattr(torch, stored))
    pack = sealed(checkpoint, packs / f"{kind}-{stored}", "storygen" if kind == "storygen" else "sd15")
    size = sum(file.stat().st_size for file in pack.folder.rglob("*.safetensors"))
    told = subprocess.run(
        [sys.executable, "-m", "tests.bench.load", "--read", str(pack.folder), "--served", served],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    figures: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    ratio = figures["peak_bytes"] / size
    return {
        "kind": kind,
        "stored": stored,
        "served": served,
        "file_bytes": size,
        **figures,
        "peak_to_file": ratio,
        "target": PEAK_TO_FILE,
        "passed": ratio <= PEAK_TO_FILE,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    told = Table(title="Reading full-size packs of random weights")
    for column in (
        "pack",
        "stored",
        "served",
        "files",
        "digests checked",
        "read",
        "every weight used",
        "at most",
        "of the files",
        "",
    ):
        told.add_column(column)
    for row in rows:
        told.add_row(
            row["kind"],
            row["stored"],
            row["served"],
            f"{row['file_bytes'] / 1e9:.2f} GB",
            f"{row['check_s']:.1f} s",
            f"{row['read_s']:.1f} s",
            f"{row['first_use_s']:.1f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{row['peak_to_file']:.2f} (≤ {row['target']})",
            "✓" if row["passed"] else "✗",
        )
    return told


def main() -> int:
    """Measure all, or read one pack (what the measured process is)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--served", default="float32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        print(json.dumps(read_once(arguments.read, arguments.served)))
        return 0
    facts = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **machine_facts(), **revision_facts()}
    rows = []
    for kind in arguments.kinds:
        settings: tuple[tuple[Stored, str], ...] = (("float32", "float32"), ("float16", "float16"))
        for stored, served in settings:
            with tempfile.TemporaryDirectory(prefix="fabula-bench-load-") as scratch:
                rows.append(measured(kind, stored, served, Path(scratch)))
    Console(stderr=True, width=140).print(table(rows))
    document = {"facts": facts, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "load.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return 1 if arguments.check and not all(row["passed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
