"""How much memory a process may still take. Knows no model."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own


def free_memory_bytes(groups: Path = CGROUP) -> int:
    """Memory that this process may still take: the machine's, or what is left of its container's limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (groups / "memory.max").read_text().strip()
        if limit == "max":
            return free
        used = int((groups / "memory.current").read_text())
        counts = dict(line.split() for line in (groups / "memory.stat").read_text().splitlines())
        # Cached file pages count as used, but the kernel gives them back first.
        left = int(limit) - used + int(counts.get("inactive_file", 0))
    except (OSError, ValueError):
        return free
    return max(0, min(free, left))
