"""Weights in old formats (.bin, .ckpt, .pt, .pth) to safetensors, once and before they come near a pack.

Such files are pickles, which can run code when they are read. Each is read in a child process of its own that may do
nothing else (`converter.py`), and what that wrote is looked at before it is believed. Never used while serving: packs
hold safetensors only. Knows no pack and no network architecture.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from services.models.errors import (
    ConversionError,
    ConversionRefused,
    WeightsTooLarge,
    WeightsUnreadable,
    WeightsUnsafe,
)
from services.models.pack import may_hold

CONVERTER = Path(__file__).with_name("converter.py")
OLD_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth"})
NEW_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"
TIMEOUT_S = 600.0
BYTES_PER_S = 1 << 20  # a slow disk on a busy machine
# What trainers leave beside weights. None of it is weights, and reading it takes more than weights.
TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "lr_scheduler")
_KINDS: dict[str, type[ConversionError]] = {
    kind.reason: kind for kind in (WeightsUnsafe, WeightsUnreadable, WeightsTooLarge)
}


@dataclass(frozen=True, kw_only=True)
class ConvertedFile:
    """One file that became safetensors."""

    source: str
    out: str
    tensors_count: int
    size_bytes: int
    dropped: tuple[str, ...]  # entries that were no tensors
    network_closed: bool  # whether the kernel kept the child from the network


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What converting a file or a folder did."""

    files: tuple[ConvertedFile, ...]
    left_out: tuple[str, ...] = ()  # files of a folder that were neither converted nor copied


def convert_path(source: Path, out: Path) -> Conversion:
    """Convert a file to the file `out`, or a folder with all it holds to the folder `out`. `out` appears whole.

    Raises ConversionRefused, WeightsUnsafe, WeightsUnreadable, WeightsTooLarge; `out` is then not there.
    """
    if out.exists():
        raise ConversionRefused(f"{out} is there already; name another place")
    if not source.exists():
        raise ConversionRefused(f"{source} is not there")
    draft = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            done = _convert_folder(source, draft)
        else:
            if source.suffix not in OLD_SUFFIXES:
                raise ConversionRefused(f"{source.name} is none of {', '.join(sorted(OLD_SUFFIXES))}")
            if out.suffix != NEW_SUFFIX:
                raise ConversionRefused(f"{out.name} must end in {NEW_SUFFIX}")
            done = Conversion(files=(_convert_file(source, draft, source.name, out.name),))
        os.rename(draft, out)
    except OSError as error:
        raise ConversionRefused(f"cannot write {out}: {error.strerror}") from None
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
    return done


def _convert_folder(source: Path, draft: Path) -> Conversion:
    """Every file below `source`: old weights converted, what a pack may hold copied, all else left out."""
    files = {
        path.relative_to(source).as_posix(): path
        for path in sorted(source.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts)
    }
    renamed: dict[str, str] = {}
    left_out = []
    for name, path in files.items():
        if path.suffix in OLD_SUFFIXES:
            new = _new_name(name)
            if path.name.startswith(TRAINING_STATE):
                left_out.append(name)
            elif new in files:
                left_out.append(f"{name} ({new} is there)")
            elif new in renamed.values():
                raise ConversionRefused(f"{name} and another file would both become {new}; move one of them away")
            else:
                renamed[name] = new
        elif not may_hold(name):
            left_out.append(name)
    if not renamed:
        raise ConversionRefused(f"{source} holds no {', '.join(sorted(OLD_SUFFIXES))} to convert")
    converted = []
    for name, path in files.items():
        if name in renamed:
            target = draft / renamed[name]
            target.parent.mkdir(parents=True, exist_ok=True)
            converted.append(_convert_file(path, target, name, renamed[name]))
        elif may_hold(name):
            _copy(path, draft, name)
    return Conversion(files=tuple(converted), left_out=tuple(left_out))


def _copy(path: Path, draft: Path, name: str) -> None:
    """A file as it is; of an index of split weights with the new names in it."""
    is_index = name.endswith(INDEX_SUFFIX) and Path(name.removesuffix(INDEX_SUFFIX)).suffix in OLD_SUFFIXES
    target = draft / (_new_name(name.removesuffix(INDEX_SUFFIX)) + INDEX_SUFFIX if is_index else name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_index:
        shutil.copyfile(path, target)
        return
    try:
        document = json.loads(path.read_bytes())
        document["weight_map"] = {key: _new_name(str(file)) for key, file in document["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConversionRefused(f"{name} is no index of split weights") from None
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _new_name(name: str) -> str:
    """What the libraries that wrote such files call the same weights as safetensors."""
    folder, slash, last = name.rpartition("/")
    stem = last[: last.rindex(".")]
    if stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")
    return f"{folder}{slash}{stem}{NEW_SUFFIX}"


def _convert_file(source: Path, target: Path, source_name: str, target_name: str) -> ConvertedFile:
    """One file through the child. Raises WeightsUnsafe, WeightsUnreadable, WeightsTooLarge, OSError."""
    with source.open("rb") as reading, target.open("xb") as writing:
        size = os.fstat(reading.fileno()).st_size
        answer = _ask_child(reading.fileno(), writing.fileno(), size, source_name)
    if "reason" in answer:
        if answer["reason"] == "OS" and answer["errno"] != errno.EFBIG:
            raise OSError(answer["errno"], answer["message"])
        kind = _KINDS.get(str(answer["reason"]), WeightsTooLarge)
        raise kind(f"{source_name} was not converted: {answer['message']}")
    try:
        # The child had a stranger's file in its hands: its word counts where the result agrees with it.
        with safe_open(str(target), framework="np") as result:
            names = sorted(result.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsUnreadable(f"{source_name} was not converted: its result cannot be read ({error})") from None
    if names != answer.get("tensors"):
        raise WeightsUnreadable(f"{source_name} was not converted: its result holds other weights than it should")
    return ConvertedFile(
        source=source_name,
        out=target_name,
        tensors_count=len(names),
        size_bytes=target.stat().st_size,
        dropped=tuple(str(each) for each in answer["dropped"]),
        network_closed=bool(answer["network_closed"]),
    )


def _ask_child(source_fd: int, target_fd: int, size_bytes: int, name: str) -> dict[str, Any]:
    # Isolated mode, and an environment with nothing of ours in it.
    child = subprocess.Popen(
        [sys.executable, "-I", str(CONVERTER), str(source_fd), str(target_fd), str(size_bytes)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        cwd="/",
        pass_fds=(source_fd, target_fd),
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=TIMEOUT_S + size_bytes / BYTES_PER_S)
    except subprocess.TimeoutExpired:
        raise WeightsTooLarge(f"{name} was not converted: reading it took too long") from None
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    try:
        answer = json.loads(said)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return answer
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise WeightsTooLarge(f"{name} was not converted: reading it took more time than a file of its size may")
    raise WeightsUnreadable(f"{name} was not converted: reading it ended the process (status {child.returncode})")
