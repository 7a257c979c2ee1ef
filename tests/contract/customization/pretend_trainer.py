"""Takes the arguments of `training.customize` and behaves like it, without a network: for tests of what is around it.

A step hashes the state, so what comes out depends on every step having been taken once and in order. Checkpoints,
snapshots, progress and signals are as the real one has them. `PRETEND_*` variables say how long a step takes, what
probes show by step, and what goes wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from training.customize_errors import RunStopped
from training.customize_progress import NO_ROOM, STOPPED, Progress, Stop

STEP_S = float(os.environ.get("PRETEND_STEP_S", "0.01"))
SAVE_EVERY = int(os.environ.get("PRETEND_SAVE_EVERY", "5"))
BUDGET_STEPS = 30
FIGURES = {int(step): figures for step, figures in json.loads(os.environ.get("PRETEND_FIGURES", "{}")).items()}


def write(path: Path, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(payload)
    part.replace(path)


def leave(folder: Path, path: Path, step: int, state: str, arguments: argparse.Namespace, count: int) -> None:
    payload = f"weights of {state}".encode()
    write(path, payload)
    story = json.loads((arguments.story / "story.json").read_text())
    card = {
        "format": 1,
        "character": {"id": "new", **{key: story[key] for key in ("name", "phrase", "noun")}},
        "recipe": {"method": {"name": arguments.method}, "steps": count, "save_every_s": arguments.save_every_s},
        "run": "r" * 64,
        "pack": {"name": "toon", "digest": "sha256:d", "base_digest": "b" * 64},
        "weights": {
            "file": path.name,
            "sha256": hashlib.sha256(payload).hexdigest(),
            "size_bytes": len(payload),
            "rank": 4,
        },
        "dataset": {"new": {}, "existing": {}},
        "steps": step,
        "losses": {"total": [1.0 / (1 + step)]},
        "figures": FIGURES.get(step, {}),
        "elapsed_s": time.time(),
    }
    write(path.with_suffix(".json"), json.dumps(card).encode())


def train(arguments: argparse.Namespace, progress: Progress, stop: Stop) -> int:
    count = arguments.steps or BUDGET_STEPS
    progress.tell("began", pid=os.getpid(), steps=count)
    if arguments.workers is not None:  # what the real one would give to Ray
        write(arguments.folder / "workers.json", json.dumps([arguments.workers, arguments.worker_cpus]).encode())
    if arguments.probes and 0 in FIGURES:
        progress.tell("probed", step=0, figures=FIGURES[0])
    saved = arguments.folder / "checkpoint.json"
    step, state = 0, f"seed {arguments.seed}"
    if saved.is_file():
        step, state = json.loads(saved.read_text())
    snapshots = {round(count * part / arguments.snapshots) for part in range(1, arguments.snapshots)} - {0, count}
    fail_at = int(os.environ.get("PRETEND_FAIL_AT", "-1"))
    mended = arguments.folder / "mended"  # what went wrong is put right by making this file
    while step < count:
        if stop():
            write(saved, json.dumps([step, state]).encode())
            raise RunStopped(f"stopped after step {step}")
        if step == fail_at and not mended.exists():
            if os.environ.get("PRETEND_FAILURE") == "crash":
                os.abort()
            if os.environ.get("PRETEND_FAILURE") == "disk":
                sys.exit(NO_ROOM)
            progress.tell("ended", outcome="failed", reason="LOSS_NOT_FINITE", message=f"mse is not finite at {step}")
            sys.exit(1)
        if step in snapshots:
            if arguments.probes:
                picture = arguments.folder / "probes" / f"{step:06d}-alone.png"
                write(picture, b"a picture of " + state.encode())
                progress.tell("probe", step=step, probe="alone", description="Otto runs.", file=str(picture))
            path = arguments.folder / "snapshots" / f"{step:06d}.safetensors"
            leave(arguments.folder, path, step, state, arguments, count)
            progress.tell("snapshot", step=step, file=str(path))
        time.sleep(STEP_S)
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        step += 1
        progress.step(step, {"total": 1.0 / step}, is_last=step == count)
        if step % SAVE_EVERY == 0:
            write(saved, json.dumps([step, state]).encode())
    write(saved, json.dumps([step, state]).encode())
    leave(arguments.folder, arguments.out, step, state, arguments, count)
    progress.tell("snapshot", step=step, file=str(arguments.out))
    progress.tell("ended", outcome="succeeded", step=step)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("pack", "story", "out", "folder", "progress", "stop-file"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("steps", "seed", "threads", "snapshots", "workers"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("minutes", "rate", "save-every-s", "worker-cpus", "worker-gpus"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--method")
    parser.add_argument("--learns")
    parser.add_argument("--probes", action="store_true")
    arguments = parser.parse_args()
    stop = Stop(arguments.stop_file)
    stop.listen()
    progress = Progress(arguments.progress)
    # Who runs at the same time as others is told here, where every process can.
    log = Path(os.environ["PRETEND_LOG"]) if "PRETEND_LOG" in os.environ else None
    if log is not None:
        with log.open("a") as file:
            print(json.dumps(["in", os.getpid(), os.getpriority(os.PRIO_PROCESS, 0), time.time()]), file=file)
    try:
        return train(arguments, progress, stop)
    except RunStopped as error:
        progress.tell("ended", outcome="stopped", reason=error.reason, message=str(error))
        return STOPPED
    finally:
        if log is not None:
            with log.open("a") as file:
                print(json.dumps(["out", os.getpid(), 0, time.time()]), file=file)


if __name__ == "__main__":
    sys.exit(main())
