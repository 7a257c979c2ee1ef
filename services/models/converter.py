"""Makes safetensors of one file of weights in an old format, in a child process with hard limits. Run by `convert.py`,
never imported.

    converter.py IN_FD OUT_FD SIZE_BYTES

Such files are pickles. This one is read by torch's unpickler for weights only, and should that ever let something
through, it finds no network (where the kernel allows it), no environment, no file but the two it was given, and
bounds on memory, CPU time and what it may write. Answers with one line of JSON.
"""

import ctypes
import json
import math
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Any

EXTRA_MEMORY_BYTES = 512 << 20  # beyond what importing torch took and two times the file
CPU_S = 60
BYTES_PER_CPU_S = 10 << 20
MOST_NESTED = 16
WRITTEN_RATIO = 4  # of the file's size: weights that share memory are written once each
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # unshare(2)
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38  # prctl(2)

# Where those who wrap a state dict put it, outermost first: Lightning, trainers, data-parallel wrappers.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


class Refused(Exception):
    """A file that is not converted: reason and message for the caller."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def shut_off() -> bool:
    """Ends with the parent, gains no rights; True if the kernel gave a network namespace of its own, which is empty.

    Must run while the process has one thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return bool(libc.unshare(_NEW_USER | _NEW_NETWORK) == 0)


def limit(size_bytes: int) -> None:
    """Bounds on memory by the file's size; called once everything is imported."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    memory = used + 2 * size_bytes + EXTRA_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    spent = resource.getrusage(resource.RUSAGE_SELF)
    cpu = math.ceil(spent.ru_utime + spent.ru_stime) + CPU_S + size_bytes // BYTES_PER_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    written = WRITTEN_RATIO * size_bytes + (1 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def convert(source: Any, target: Any, torch: Any) -> dict[str, Any]:
    """Reads `source`, writes safetensors to `target`; what was written and what was dropped. Raises Refused."""
    try:
        document = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Refused("WEIGHTS_UNSAFE", f"it asks for more than weights{_wish(str(error))}") from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file can make a parser raise anything
        if "allocate" in str(error):
            raise MemoryError from None
        raise Refused("WEIGHTS_UNREADABLE", f"it is cut off, or no file of weights ({type(error).__name__})") from None
    if isinstance(document, torch.Tensor):
        raise Refused("WEIGHTS_UNREADABLE", "it holds one tensor without a name")
    if not isinstance(document, Mapping):
        raise Refused("WEIGHTS_UNREADABLE", f"it holds a {type(document).__name__} instead of named weights")
    dropped: list[str] = []
    tensors: dict[str, Any] = {}
    for name, value in unwrapped(document, dropped, torch):
        if name in tensors:
            raise Refused("WEIGHTS_UNREADABLE", f"two weights would be called {name!r}")
        tensors[name] = value
    if not tensors:
        raise Refused("WEIGHTS_UNREADABLE", "it holds no weights")
    count = write(tensors, target, torch)
    return {"tensors": sorted(tensors), "dropped": sorted(dropped), "size_bytes": count}


def unwrapped(document: Mapping[Any, Any], dropped: list[str], torch: Any) -> Iterator[tuple[str, Any]]:
    """The tensors by name, out of what wraps them; names of all else go to `dropped`."""
    around = ""
    for _ in range(MOST_NESTED):
        wrapper = next((key for key in WRAPPERS if isinstance(document.get(key), Mapping) and document[key]), None)
        if wrapper is None:
            break
        dropped += [f"{around}{key}" for key in document if key != wrapper]
        around, document = f"{around}{wrapper}.", document[wrapper]
    yield from _flat(document, "", around, dropped, torch, MOST_NESTED)


def _flat(
    document: Mapping[Any, Any], before: str, around: str, dropped: list[str], torch: Any, depth: int
) -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            yield before + key, value
        elif isinstance(key, str) and isinstance(value, Mapping) and value and depth:
            yield from _flat(value, f"{before}{key}.", around, dropped, torch, depth - 1)
        else:
            dropped.append(f"{around}{before}{key}")


def write(tensors: Mapping[str, Any], target: Any, torch: Any) -> int:
    """Writes safetensors, one tensor in memory twice at most; the bytes written. Raises Refused."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    # Widest numbers first, so that each lies at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        value = tensors[name]
        if value.layout != torch.strided or value.is_quantized or value.is_meta or str(value.dtype) not in DTYPES:
            kind = "quantized" if value.is_quantized else f"{value.layout} {value.dtype}"
            raise Refused("WEIGHTS_UNREADABLE", f"{name} is a {kind} tensor, which safetensors cannot hold")
        end = begin + value.numel() * value.element_size()
        header[name] = {"dtype": DTYPES[str(value.dtype)], "shape": list(value.shape), "data_offsets": [begin, end]}
        begin = end
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    target.write(struct.pack("<Q", len(head)) + head)
    for name in order:
        # A copy of its own where it was a view, or shared its memory with another.
        flat = tensors[name].detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            target.write(memoryview(flat.view(torch.uint8).numpy()))
    target.flush()
    os.fsync(target.fileno())
    return 8 + len(head) + begin


def _wish(message: str) -> str:
    """What the unpickler said the file wanted, if it did."""
    for mark in ("GLOBAL ", "Unsupported class ", "Unsupported operand "):
        _, found, rest = message.partition(mark)
        if found and rest.split():
            return f": {'operand ' if 'operand' in mark else ''}{rest.split()[0]}"
    return ""


def main() -> None:
    """Converts and answers."""
    source_fd, target_fd, size_bytes = (int(word) for word in sys.argv[1:4])
    answer: dict[str, Any] = {"network_closed": shut_off()}
    import numpy as np
    import torch

    del np  # torch imports it when it first meets an array, which is too late below
    torch.set_num_threads(1)
    torch.zeros(1).numpy()
    limit(size_bytes)
    try:
        with open(source_fd, "rb") as source, open(target_fd, "wb", buffering=0) as raw:
            answer |= convert(source, _Whole(raw), torch)
    except Refused as refused:
        answer |= {"reason": refused.reason, "message": refused.message}
    except MemoryError:
        answer |= {"reason": "WEIGHTS_TOO_LARGE", "message": "reading it took more memory than a file of its size may"}
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            answer |= {"reason": "OS", "message": os.strerror(error.errno), "errno": error.errno}
        else:
            too_large = "allocate" in str(error)
            reason = "WEIGHTS_TOO_LARGE" if too_large else "WEIGHTS_UNREADABLE"
            answer |= {"reason": reason, "message": str(error).splitlines()[0] if str(error) else type(error).__name__}
    sys.stdout.write(json.dumps(answer) + "\n")


class _Whole:
    """A raw file whose `write` writes all it is given: the system may take less at once."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.flush = raw.flush
        self.fileno = raw.fileno

    def write(self, data: Any) -> None:
        left = memoryview(data)
        while left:
            left = left[self._raw.write(left) :]


if __name__ == "__main__":
    main()
