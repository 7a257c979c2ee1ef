"""Makes a checkpoint, or weights from elsewhere, a character version.

A manifest lies under its own SHA-256, and the weights where frame replicas read.

The manifest says all that decides what was learned and nothing of when or how fast, so equal training gives equal
versions. Knows no database and no wire.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.customization.importing import Fitted
from services.customization.records import CharacterVersion, Checkpoint, Job, NewCharacter
from services.models.pack import Manifest
from services.runtime.errors import DataLoss

MANIFEST_FORMAT = 1
IMPORTED = "import"  # in the place of a method
_CLOCK = ("save_every_s", "measure_every_s")  # how often a run was saved and looked at changes nothing of it


def manifest_of(job: Job, card: Mapping[str, Any], references: Sequence[str]) -> str:
    """The manifest of a checkpoint, as canonical JSON."""
    weights = card["weights"]
    recipe = {name: value for name, value in card["recipe"].items() if name not in _CLOCK}
    document = {
        "format": MANIFEST_FORMAT,
        "character": {"name": job.character.name, "phrase": job.character.phrase, "noun": job.character.noun},
        "weights": {name: weights[name] for name in ("sha256", "size_bytes", "rank")},
        "base": {name: card["pack"][name] for name in ("name", "digest", "base_digest")},
        "recipe": recipe,
        "steps": card["steps"],
        "dataset": card["dataset"],
        "references": list(references),
        "losses": card["losses"],
        "figures": card.get("figures", {}),
    }
    return _canonical(document)


def imported_manifest(character: NewCharacter, fitted: Fitted, pack: str, references: Sequence[str]) -> str:
    """The manifest of weights from elsewhere, as canonical JSON: of their pack it names the network alone."""
    document = {
        "format": MANIFEST_FORMAT,
        "origin": IMPORTED,
        "character": {"name": character.name, "phrase": character.phrase, "noun": character.noun},
        "weights": {"sha256": fitted.sha256, "size_bytes": len(fitted.payload), "rank": fitted.rank},
        "base": {"name": pack, "base_digest": fitted.base_digest},
        "references": list(references),
    }
    return _canonical(document)


def imported_version(
    character: NewCharacter,
    fitted: Fitted,
    pack: Manifest,
    references: Sequence[str],
    manifest: str,
    at_us: int,
) -> CharacterVersion:
    """The version that a manifest of `imported_manifest` names."""
    return CharacterVersion(
        version_id=hashlib.sha256(manifest.encode()).hexdigest(),
        weights_sha256=fitted.sha256,
        character=character,
        pack=pack.name,
        pack_digest=pack.digest,
        base_digest=fitted.base_digest,
        method=IMPORTED,
        step=0,
        rank=fitted.rank,
        size_bytes=len(fitted.payload),
        reference_sha256s=tuple(references),
        job_id="",
        publish_us=at_us,
    )


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def version_of(
    job: Job, checkpoint: Checkpoint, card: Mapping[str, Any], manifest: str, at_us: int
) -> CharacterVersion:
    """The version that a manifest names."""
    return CharacterVersion(
        version_id=hashlib.sha256(manifest.encode()).hexdigest(),
        weights_sha256=checkpoint.weights_sha256,
        character=NewCharacter(name=job.character.name, phrase=job.character.phrase, noun=job.character.noun),
        pack=card["pack"]["name"],
        pack_digest=card["pack"]["digest"],
        base_digest=card["pack"]["base_digest"],
        method=job.settings.method,
        step=checkpoint.step,
        rank=checkpoint.rank,
        size_bytes=checkpoint.size_bytes,
        reference_sha256s=tuple(frame.image_sha256 for frame in job.frames),
        job_id=job.job_id,
        publish_us=at_us,
        figures=dict(card.get("figures", {})),
    )


async def weights_of(checkpoint: Checkpoint, path: Path) -> bytes:
    """The file of a checkpoint's weights. Raises DataLoss when it is not what was written."""
    try:
        payload = await asyncio.to_thread(path.read_bytes)
    except FileNotFoundError:
        raise DataLoss(f"the weights of step {checkpoint.step} are gone; train the job again") from None
    if hashlib.sha256(payload).hexdigest() != checkpoint.weights_sha256:
        raise DataLoss(f"the weights of step {checkpoint.step} are damaged; publish another checkpoint")
    return payload
