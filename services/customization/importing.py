"""Reads weights from elsewhere against the pack they are for, in a process of its own.

    python -m services.customization.importing --rank-max 16 PACK_FOLDER WEIGHTS OUT      {"result": …} or {"error": …}

The networks of a pack may be as large as the machine, and a file from outside may be anything: both stay out of the
process that answers calls, and go when the other one does. `Importer` starts it and waits; one at a time. What comes
out is the file that frame replicas read: whole in itself, with the network's digest in it, and the same bytes for the
same weights in whichever layout they came. Knows no database and no wire.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from services.customization.backends import REPOSITORY
from services.runtime.errors import CharacterWeightsUnusable, FailedPrecondition, QueueFull

MOST_S = 300.0  # that reading may take: a large pack is read from its disk, too
_STALE_S = 4 * MOST_S
MOST_WAITING = 4  # imports behind the one that is read
_CONFIG = "adapter_config.json"  # PEFT's name, and where `read_adapter_file` looks for it

log = structlog.get_logger("fabula.customization.importing")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Weights that fit, as frame replicas read them."""

    payload: bytes
    sha256: str
    rank: int  # 0: no low-rank addition
    base_digest: str  # of the network that they are a change of


class Importer:
    """Has weights read, one file after the other."""

    def __init__(self, folder: Path, *, rank_max: int) -> None:
        """`folder` is where files lie for as long as they are read."""
        self._folder, self._rank_max = folder, rank_max
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def fit(self, weights: bytes, adapter_config: str, pack_folder: Path) -> Fitted:
        """The weights, checked. Raises CharacterWeightsUnusable, FailedPrecondition for the pack, QueueFull."""
        if self._waiting > MOST_WAITING:
            raise QueueFull("other imports are read already; try again when they are done", retry_after_s=10.0)
        self._waiting += 1
        try:
            async with self._turn:
                await asyncio.to_thread(self._sweep)
                with tempfile.TemporaryDirectory(dir=self._folder, prefix="import-") as folder:
                    return await self._fit(Path(folder), weights, adapter_config, pack_folder)
        finally:
            self._waiting -= 1

    def _sweep(self) -> None:
        """Removes what services that were killed left; another one may be reading over the same folder now."""
        for each in self._folder.glob("import-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - each.stat().st_mtime > _STALE_S:
                    shutil.rmtree(each, ignore_errors=True)

    async def _fit(self, folder: Path, weights: bytes, adapter_config: str, pack_folder: Path) -> Fitted:
        given, out = folder / "weights.safetensors", folder / "fitted.safetensors"
        await asyncio.to_thread(given.write_bytes, weights)
        if adapter_config:
            await asyncio.to_thread((folder / _CONFIG).write_text, adapter_config, encoding="utf-8")
        told = await self._told(pack_folder, given, out)
        if (error := told.get("error")) is not None:
            if error["of"] == "weights":
                raise CharacterWeightsUnusable(error["message"], metadata={"cause": error["reason"]}, field="weights")
            raise FailedPrecondition(f"the pack cannot be read: {error['message']}")
        payload = await asyncio.to_thread(out.read_bytes)
        return Fitted(
            payload=payload,
            sha256=hashlib.sha256(payload).hexdigest(),
            rank=int(told["result"]["rank"]),
            base_digest=str(told["result"]["base_digest"]),
        )

    async def _told(self, pack_folder: Path, given: Path, out: Path) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *self._command(pack_folder, given, out),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
        )
        try:
            async with asyncio.timeout(MOST_S):
                said, _ = await process.communicate()
        except TimeoutError:
            raise FailedPrecondition(
                f"the weights were not read within {MOST_S:g} s; the pack is too large for this machine"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        try:
            told: dict[str, Any] = json.loads(said.splitlines()[-1])
        except (ValueError, IndexError):
            log.error("import_process_died", status=process.returncode)
            raise FailedPrecondition(
                f"the process that read the weights ended without an answer (status {process.returncode}); most likely "
                "it had too little memory for the pack"
            ) from None
        return told

    def _command(self, pack_folder: Path, given: Path, out: Path) -> tuple[str, ...]:
        paths = (str(each.resolve()) for each in (pack_folder, given, out))  # the process has a folder of its own
        return (
            sys.executable,
            "-m",
            "services.customization.importing",
            "--rank-max",
            str(self._rank_max),
            "--",
            *paths,
        )


def adapter_for(path: Path, pack_folder: Path, *, rank_max: int = 256) -> tuple[Any, str]:
    """The adapter in a file, checked against a pack's networks, and the digest of the network that it belongs to.

    Raises AdapterError for the file, other ModelErrors for the pack.
    """
    from services.models.lora import read_adapter_file
    from services.models.pack import load_pack
    from services.models.registry import load_frame_model

    model = load_frame_model(load_pack(pack_folder))
    adapter = read_adapter_file(
        path,
        model.denoiser.unet,
        base_digest=model.base_digest,
        rank_max=rank_max,
        text_width=model.text.width,
        texts=model.text.networks,
    )
    return adapter, model.base_digest


def stored_form(adapter: Any, path: Path, base_digest: str) -> bytes:
    """What is kept of an adapter that was read from `path`. Raises AdapterNotWritable."""
    from services.models.lora import write_adapter

    if adapter.unet is not None:
        return path.read_bytes()  # a whole network has one layout
    # Whole in itself: of PEFT's layout strengths may lie beside the file. Only kohya's has a place for words.
    payload: bytes = write_adapter(adapter, "kohya" if adapter.words else "peft", base_digest=base_digest)
    return payload


def answer(pack_folder: Path, weights: Path, out: Path, rank_max: int) -> dict[str, Any]:
    """Reads weights and writes what is kept of them. Says what came of it, or whose fault it was that nothing did."""
    from services.models.errors import AdapterError, ModelError

    try:
        adapter, base_digest = adapter_for(weights, pack_folder, rank_max=rank_max)
        out.write_bytes(stored_form(adapter, weights, base_digest))
    except AdapterError as error:
        return {"error": {"of": "weights", "reason": error.reason, "message": str(error)}}
    except ModelError as error:
        return {"error": {"of": "pack", "reason": error.reason, "message": str(error)}}
    return {"result": {"rank": adapter.rank, "base_digest": base_digest}}


def main() -> int:
    """Prints the answer as the last line; 0 whatever it is."""
    said = os.dup(1)
    os.dup2(2, 1)  # libraries may print on import; the answer alone goes to standard output
    parser = argparse.ArgumentParser(prog="python -m services.customization.importing")
    parser.add_argument("--rank-max", type=int, required=True)
    for name in ("pack_folder", "weights", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    told = answer(given.pack_folder, given.weights, given.out, given.rank_max)
    os.write(said, (json.dumps(told) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
