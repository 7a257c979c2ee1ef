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

import structlog
from PIL import Image

from services.customization.checks import (
    Finding,
    GivenFrame,
    GivenStory,
    KnownCharacter,
    check_character,
    noun_of,
    read_picture,
)
from services.customization.config import CustomizationSettings
from services.customization.records import NewCharacter, StoredFrame, TrainingSettings
from services.customization.window import Window, window_of
from services.models.captions.cast import Cast
from services.models.errors import AdapterDamaged, ModelError, PackNotFound
from services.models.pack import Manifest, find_pack, read_manifest
from services.models.world import World
from services.runtime.errors import (
    CharacterWeightsUnusable,
    FailedPrecondition,
    FieldViolation,
    ImageUnreadable,
    InvalidArgument,
    MethodUnknown,
    PackUnknown,
    RequestIdInvalid,
    ValueOutOfRange,
)
from services.runtime.store import SHA256

METHODS = ("epicevo", "dreambooth", "custom-diffusion", "textual-inversion", "lora")
DEFAULT_METHOD = "epicevo"
TRAINED_ARCHITECTURES = ("arldm", "storygen")  # whose packs the methods of `training` can teach
# None of these was trained on the toon world, whose stories would make it forget its own.
OF_OTHER_WORLDS = ("arldm",)
MOST_UPLOAD_BYTES = 48 << 20  # of all pictures of a request; a message has room for them and their texts
MOST_STEPS = 100_000
SEED_LIMIT = 2**31  # training multiplies it, and torch takes 64 bits
MOST_WEIGHTS_BYTES = 40 << 20  # of an import; larger files go into the characters' store first
MOST_REFERENCES = 8  # pictures of an import
MOST_CONFIG_LETTERS = 64 << 10  # of an adapter_config.json
_IMPORT_FIELDS = {
    "NAME_INVALID": "character.name",
    "NAME_TAKEN": "character.name",
    "PHRASE_INVALID": "character.phrase",
    "NOUN_INVALID": "character.noun",
}
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,255}")
_STORY_FILE = "story.json"

log = structlog.get_logger("fabula.customization.intake")


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
    workers: int | None = None
    body_sha256: str = ""  # of all of it but the request id


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """Weights from elsewhere that somebody wants to have as a character."""

    name: str = ""
    phrase: str = ""
    noun: str = ""
    pack: str = ""
    weights: bytes = b""
    weights_sha256: str = ""  # instead of the bytes: of what the characters' store has already
    adapter_config: str = ""
    references: Sequence[bytes] = ()


@dataclass(frozen=True, kw_only=True)
class TaughtPack:
    """A pack that characters are of: what this service needs to know of it."""

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
    pack = known_pack(name, folders)
    if pack.manifest.architecture not in TRAINED_ARCHITECTURES:
        raise PackUnknown(
            f"{name} is a {pack.manifest.architecture} pack; {', '.join(TRAINED_ARCHITECTURES)} packs can be taught",
            field="pack",
        )
    return pack


def known_pack(name: str, folders: Sequence[Path]) -> TaughtPack:
    """Any pack of that name. Raises PackUnknown, and FailedPrecondition for one that is damaged or on a server."""
    try:
        folder = find_pack(name, folders)
        manifest = read_manifest(folder)
    except PackNotFound:
        raise PackUnknown(f"there is no pack {name[:80]!r} here", field="pack") from None
    except (ModelError, OSError) as error:
        raise FailedPrecondition(f"the pack {name[:80]!r} cannot be read: {error}") from error
    return TaughtPack(folder=folder, manifest=manifest, cast=_cast(folder))


def _cast(folder: Path) -> tuple[KnownCharacter, ...]:
    try:
        told: Mapping[str, str] = World.load(folder).characters
        names = Cast.load(folder).names
    except (ValueError, OSError) as error:
        raise FailedPrecondition(f"what the pack says of its cast cannot be read: {error}") from error
    looks = dict.fromkeys(names, "") | dict(told)
    return tuple(KnownCharacter(name=name, phrase=phrase) for name, phrase in sorted(looks.items()))


def known_cast(folder: Path) -> tuple[KnownCharacter, ...]:
    """Who is in the stories of a folder that a pack is taught beside: training takes nobody else of their names.

    A story that cannot be read is passed over: whether it is needed, and what is wrong with it, training says.
    """
    names: set[str] = set()
    for story in sorted(folder.glob(f"*/{_STORY_FILE}")):
        try:
            for frame in json.loads(story.read_bytes())["frames"]:
                names |= {name.strip() for name in frame["characters"]}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("known_story_unreadable", story=str(story), error=f"{type(error).__name__}: {error}")
    return tuple(KnownCharacter(name=name) for name in sorted(names))


def description_window(pack: TaughtPack, story: GivenStory, settings: TrainingSettings) -> Window:
    """What the descriptions of a job have to fit into. Raises FailedPrecondition for a pack that is damaged."""
    try:
        return window_of(
            pack.folder,
            pack.manifest.architecture,
            method=settings.method,
            learns=settings.learns,
            name=story.name,
            phrase=story.phrase,
        )
    except (ValueError, OSError) as error:
        raise FailedPrecondition(f"the tokenizer of the pack cannot be read: {error}") from error


def training_settings(request: JobRequest, pack: TaughtPack, settings: CustomizationSettings) -> TrainingSettings:
    """How a request is trained, defaults filled in.

    Raises PackUnknown for a pack that nothing is known to be taught beside, MethodUnknown, ValueOutOfRange or
    InvalidArgument.
    """
    name, architecture = pack.manifest.name, pack.manifest.architecture
    if architecture in OF_OTHER_WORLDS and settings.known_of(name) is None:
        raise PackUnknown(
            f"{name} is a {architecture} pack, which is taught beside stories of those whom it knows; "
            f"put them where the service's known_folder has {name}/",
            field="pack",
        )
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
    workers = settings.workers if request.workers is None else request.workers
    if not 0 <= workers <= settings.most_workers:
        raise ValueOutOfRange(
            f"{workers} workers are asked for; a job has at most {settings.most_workers} here",
            field="workers",
            metadata={"most": str(settings.most_workers)},
        )
    return TrainingSettings(
        pack=pack.manifest.name,
        pack_digest=pack.manifest.digest,
        method=method,
        learns=request.learns,
        steps=request.steps or 0,
        budget_s=budget_s,
        rate=request.rate,
        seed=secrets.randbelow(SEED_LIMIT) if request.seed is None else request.seed,
        threads=settings.threads_of(workers),
        snapshots=settings.snapshots,
        save_every_s=settings.save_every_s,
        probes=settings.probes,
        workers=workers,
    )


def check_upload(frames: Sequence[GivenFrame]) -> None:
    """Raises ValueOutOfRange for more bytes than a request may bring."""
    if sum(len(frame.image) for frame in frames) > MOST_UPLOAD_BYTES:
        raise ValueOutOfRange(f"the pictures have more than {MOST_UPLOAD_BYTES >> 20} MiB in all", field="frames")


def check_import(request: ImportRequest, pack: TaughtPack) -> NewCharacter:
    """Who it is that an import brings.

    Raises InvalidArgument, CharacterWeightsUnusable for what is no safetensors file, ValueOutOfRange for too much of
    anything, for a name or look that cannot be and for a name that is taken.
    """
    if bool(request.weights) == bool(request.weights_sha256):
        raise InvalidArgument("give the weights, or the SHA-256 of what the store has already", field="weights")
    if request.weights_sha256 and not SHA256.fullmatch(request.weights_sha256):
        raise ValueOutOfRange("a SHA-256 is 64 lower-case hex digits", field="weights_sha256")
    if len(request.weights) > MOST_WEIGHTS_BYTES:
        raise ValueOutOfRange(f"the weights have more than {MOST_WEIGHTS_BYTES >> 20} MiB", field="weights")
    if len(request.adapter_config) > MOST_CONFIG_LETTERS:
        raise ValueOutOfRange(f"the configuration has more than {MOST_CONFIG_LETTERS} letters", field="adapter_config")
    if len(request.references) > MOST_REFERENCES:
        raise ValueOutOfRange(f"there are more than {MOST_REFERENCES} pictures", field="references")
    if len(request.weights) + sum(map(len, request.references)) > MOST_UPLOAD_BYTES:
        raise ValueOutOfRange(f"weights and pictures have more than {MOST_UPLOAD_BYTES >> 20} MiB", field="references")
    if request.weights:
        check_header(request.weights)
    story = GivenStory(
        name=request.name.strip(),
        phrase=request.phrase.strip(),
        noun=request.noun.strip(),
        frames=(),
        width_px=pack.manifest.width_px,
        height_px=pack.manifest.height_px,
    )
    faults = [one for one in check_character(story, pack.cast) if one.severity == "error"]
    if faults:
        raise ValueOutOfRange(
            f"{faults[0].message} {faults[0].mend}",
            metadata={"codes": ",".join(one.code for one in faults)},
            field_violations=[
                FieldViolation(_IMPORT_FIELDS[one.code], f"{one.code}: {one.message} {one.mend}") for one in faults
            ],
        )
    return new_character(story)


def check_header(payload: bytes) -> None:
    """Raises CharacterWeightsUnusable for what does not even begin as a safetensors file: a pickle, an archive."""
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 10 or not 2 <= length <= len(payload) - 8 or payload[8:9] != b"{":
        raise CharacterWeightsUnusable(
            "the weights are no safetensors file; other formats can run code when they are read, so none is read",
            metadata={"cause": AdapterDamaged.reason},
            field="weights",
        )


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


def clean_pictures(pictures: Sequence[bytes], field: str) -> list[bytes]:
    """Each picture of a field as a plain RGB PNG. Raises ImageUnreadable."""
    made = []
    for number, picture in enumerate(pictures):
        out = io.BytesIO()
        try:
            Image.fromarray(read_picture(picture)).save(out, "PNG")
        except ValueError as error:
            raise ImageUnreadable(f"{field}[{number}]: {error}", field=f"{field}[{number}]") from None
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
