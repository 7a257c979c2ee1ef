"""Keeps what training makes between runs: checkpoints and caches, outside the repository.

A checkpoint is one safetensors file: named tensors, and one JSON object in the header. It, and any file that others
read while a run goes on, is written beside its final place and renamed, so it is complete or absent. Knows no network;
nothing here is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FOLDER_VARIABLE = "FABULA_TRAINING_DIR"
_HEADER_KEY = "checkpoint"  # safetensors headers hold strings only, so the JSON object is one of them


def training_dir() -> Path:
    """The folder for checkpoints and caches, made if missing: `$FABULA_TRAINING_DIR`, or `~/.cache/fabula/training`."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "fabula" / "training"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and what is not a tensor (`facts`, JSON)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix.`, without it."""
        start = prefix + "."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, named `prefix.name`; `Checkpoint.part` undoes it."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, replacing what is there only once the new one is complete on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Tied or viewed tensors would be refused; a checkpoint is small enough to copy.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in checkpoint.tensors.items()}
    with _complete(path) as part:
        save_file(tensors, part, metadata={_HEADER_KEY: json.dumps(checkpoint.facts, sort_keys=True)})


def save_bytes(path: Path, payload: bytes) -> None:
    """Write a file of any kind to `path`, replacing what is there only once the new one is complete on disk."""
    with _complete(path) as part:
        part.write_bytes(payload)


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when the block has written it.

    When that fails it goes: on a full disk half a file would hold the room that others need to say what happened.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None when there is none.

    Raises ValueError when the file is not a checkpoint of ours.
    """
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if _HEADER_KEY not in header:
            raise ValueError(f"{path} is not a checkpoint")
        return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, json.loads(header[_HEADER_KEY]))  # noqa: SIM118


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: `<parameter number>.<what>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{what}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, values in state.items()
        for what, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. The groups' settings stay those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, what = name.partition(".")
        state.setdefault(int(number), {})[what] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
