"""What a processor's memory allocator does with what a network has freed.

A forward over a batch frees hundreds of megabytes and asks for them again in the next step. By default glibc hands
large pieces back to the kernel at once, which then clears and maps every page anew: with eight frames in flight that is
a tenth to a fifth of a step.
"""

from __future__ import annotations

import ctypes

KEPT_BYTES = 512 << 20  # freed memory beyond it goes back
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_INT_MAX = 2**31 - 1


def keep_freed_memory(kept_bytes: int = KEPT_BYTES) -> bool:
    """Let this process keep up to `kept_bytes` that it has freed, for its next step. False where there is no glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  other C libraries may have a mallopt that does nothing
        return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, min(kept_bytes, _INT_MAX)))
    except (AttributeError, OSError, TypeError):
        return False
