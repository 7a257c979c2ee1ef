"""Checks what a request asks for before a job is made of it, and lays the job's story out for training.

The story itself is looked over by `checks`; here is the rest: ids, sizes, the pack, the method and its numbers. Knows
no database and no wire.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from services.customization.checks import Finding, GivenFrame, GivenStory, KnownCharacter, noun_of, read_picture
from services.customization.config import CustomizationSettings
from services.customization.records import NewCharacter, StoredFrame, TrainingSettings
from services.models.cast import Cast
from services.models.errors import ModelError, PackNotFound
from services.models.pack import Manifest, find_pack, read_manifest
from services.models.world import World
from services.runtime.errors import (
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    MethodUnknown,
    PackUnknown,
    RequestIdInvalid,
    ValueOutOfRange,
)

METHODS = ("epicevo", "dreambooth", "custom-diffusion", "textual-inversion", "lora")
DEFAULT_METHOD = "epicevo"
TRAINED_ARCHITECTURES = ("arldm", "storygen")  # whose packs the methods of `training` can teach
MOST_UPLOAD_BYTES = 48 << 20  # of all pictures of a request; a message has room for them and their texts
MOST_STEPS = 100_000
SEED_LIMIT = 2**31  # training multiplies it, and torch takes 64 bits
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,255}")
_STORY_FILE = "story.json"


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What somebody asks for; None and empty mean the default."""

    request_id: str = ""
    validate_only: bool = False
    name: str = ""
    phrase: str = ""
    noun: str = ""
    frames: Sequence[GivenFrame] = ()
    accepted_findings: Sequence[str] = ()
    pack: str = ""
    method: str = ""
    learns: str = ""
    steps: int | None = None
    budget_s: float | None = None
    rate: float | None = None
    seed: int | None = None
    body_sha256: str = ""  # of all of it but the request id


@dataclass(frozen=True, kw_only=True)
class TaughtPack:
    """A pack that can be taught: what a job needs to know of it."""

    folder: Path
    manifest: Manifest
    cast: tuple[KnownCharacter, ...] = field(default_factory=tuple)


def check_request_id(request_id: str) -> None:
    """Raises RequestIdInvalid; an empty one is well."""
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        raise RequestIdInvalid(field="request_id")


def taught_pack(name: str, folders: Sequence[Path]) -> TaughtPack:
    """The pack of that name, as far as a job needs it.

    Raises PackUnknown, also for one that the methods cannot teach, and FailedPrecondition for one that is damaged.
    """
    try:
        folder = find_pack(name, folders)
        manifest = read_manifest(folder)
    except PackNotFound:
        raise PackUnknown(f"there is no pack {name[:80]!r} here", field="pack") from None
    except (ModelError, OSError) as error:
        raise FailedPrecondition(f"the pack {name[:80]!r} cannot be read: {error}") from error
    if manifest.architecture not in TRAINED_ARCHITECTURES:
        raise PackUnknown(
            f"{name} is a {manifest.architecture} pack; {', '.join(TRAINED_ARCHITECTURES)} packs can be taught",
            field="pack",
        )
    return TaughtPack(folder=folder, manifest=manifest, cast=_cast(folder))


def _cast(folder: Path) -> tuple[KnownCharacter, ...]:
    try:
        told: Mapping[str, str] = World.load(folder).characters
        names = Cast.load(folder).names
    except (ValueError, OSError) as error:
        raise FailedPrecondition(f"what the pack says of its cast cannot be read: {error}") from error
    looks = dict.fromkeys(names, "") | dict(told)
    return tuple(KnownCharacter(name=name, phrase=phrase) for name, phrase in sorted(looks.items()))


def training_settings(request: JobRequest, pack: TaughtPack, settings: CustomizationSettings) -> TrainingSettings:
    """How a request is trained, defaults filled in. Raises MethodUnknown, ValueOutOfRange or InvalidArgument."""
    method = request.method or DEFAULT_METHOD
    if method not in METHODS:
        raise MethodUnknown(f"there is no method {method[:80]!r}; there are {', '.join(METHODS)}", field="method")
    if request.learns and method != DEFAULT_METHOD:
        raise InvalidArgument(f"{method} leaves no choice of what is learned", field="learns")
    if request.steps is not None and request.budget_s is not None:
        raise InvalidArgument("give steps or a budget, and not both", field="budget")
    if request.steps is not None and not 1 <= request.steps <= MOST_STEPS:
        raise ValueOutOfRange(f"steps is 1 to {MOST_STEPS}", field="steps")
    budget_s = None
    if request.steps is None:
        budget_s = settings.default_budget_s if request.budget_s is None else request.budget_s
        if not 0.0 < budget_s <= settings.most_budget_s:
            raise ValueOutOfRange(f"budget is above 0 and at most {settings.most_budget_s:g} s", field="budget")
    if request.rate is not None and not (math.isfinite(request.rate) and 0.0 < request.rate <= 1.0):
        raise ValueOutOfRange("rate is above 0 and at most 1", field="rate")
    if request.seed is not None and not 0 <= request.seed < SEED_LIMIT:
        raise ValueOutOfRange("seed is below 2^31", field="seed")
    return TrainingSettings(
        pack=pack.manifest.name,
        pack_digest=pack.manifest.digest,
        method=method,
        learns=request.learns,
        steps=request.steps or 0,
        budget_s=budget_s,
        rate=request.rate,
        seed=secrets.randbelow(SEED_LIMIT) if request.seed is None else request.seed,
        threads=settings.thread_count,
        snapshots=settings.snapshots,
        save_every_s=settings.save_every_s,
        probes=settings.probes,
    )


def check_upload(frames: Sequence[GivenFrame]) -> None:
    """Raises ValueOutOfRange for more bytes than a request may bring."""
    if sum(len(frame.image) for frame in frames) > MOST_UPLOAD_BYTES:
        raise ValueOutOfRange(f"the pictures have more than {MOST_UPLOAD_BYTES >> 20} MiB in all", field="frames")


def given_story(request: JobRequest, pack: TaughtPack) -> GivenStory:
    """What `checks` looks over."""
    return GivenStory(
        name=request.name.strip(),
        phrase=request.phrase.strip(),
        noun=request.noun.strip(),
        frames=request.frames,
        width_px=pack.manifest.width_px,
        height_px=pack.manifest.height_px,
    )


def violations(findings: Sequence[Finding]) -> list[FieldViolation]:
    """Findings as what is wrong with a request's fields."""
    return [
        FieldViolation(
            "frames" if one.frame_number is None else f"frames[{one.frame_number - 1}]",
            f"{one.code}: {one.message} {one.mend}",
        )
        for one in findings
    ]


def new_character(story: GivenStory) -> NewCharacter:
    """Who is learned, the noun filled in."""
    return NewCharacter(name=story.name, phrase=story.phrase, noun=noun_of(story))


def clean_pictures(frames: Sequence[GivenFrame]) -> list[bytes]:
    """Each picture as a plain RGB PNG. Raises ValueError for one that cannot be read."""
    made = []
    for frame in frames:
        out = io.BytesIO()
        Image.fromarray(read_picture(frame.image)).save(out, "PNG")
        made.append(out.getvalue())
    return made


def lay_out(folder: Path, character: NewCharacter, frames: Sequence[StoredFrame], pictures: Sequence[bytes]) -> None:
    """Writes a story as training reads it; it is there whole or not at all. Raises OSError."""
    if (folder / _STORY_FILE).is_file():
        return
    draft = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.draft")
    draft.mkdir(parents=True)
    try:
        told = []
        for number, (frame, picture) in enumerate(zip(frames, pictures, strict=True), 1):
            name = f"{number}.png"
            _write(draft / name, picture)
            description = frame.description or frame.caption
            told.append({"image": name, "caption": frame.caption, "description": description})
        document = {
            "name": character.name,
            "phrase": character.phrase,
            "noun": character.noun,
            "frames": told,
        }
        _write(draft / _STORY_FILE, json.dumps(document, ensure_ascii=False, indent=1).encode())
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
