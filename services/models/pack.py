"""Packs: a folder with everything one look needs, described and sealed by its `pack.json`.

    toon/
      pack.json            the manifest: what it is, how to sample it, and the SHA-256 of every other file
      MODEL_CARD.md
      tokenizer/           tokenizer.json, shared by all networks
      unet/ vae/ text_encoder/        config.json + weights, for the frame service
      llava/ adapters/     for the caption service
      captioner/           instead of all of these: a published captioner, which draws nothing (`CaptionerManifest`)
      eyes/                for the caption service, where its LLaVA needs help with looks
      clip/                for metrics
      cast.json world.json whom it names; what it knows, so that it can say what it does not

Nothing is loaded from a pack before its files were checked against the manifest, and weights are safetensors only:
a pickle can run code. Knows no network; `registry.py` turns a pack into models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.models.errors import (
    PackFileDamaged,
    PackFileMissing,
    PackFileUnsafe,
    PackManifestInvalid,
    PackNotFound,
)
from services.models.quality import Quality
from services.models.ranges import AnyScheduleConfig, LatentScaling, ReferenceRange

MANIFEST = "pack.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_PLAIN_SUFFIXES = frozenset({".json", ".txt", ".md", ".png", ".jinja"})
_WEIGHTS_SUFFIX = ".safetensors"
_READ_BYTES = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Strict):
    """One file of a pack."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class QualitySettings(_Strict):
    """How frames of one quality are drawn."""

    steps: int = Field(ge=1, le=1000)
    text_guidance: float = Field(ge=0.0, le=30.0)
    image_guidance: float = Field(ge=0.0, le=30.0)
    adapter: str = ""  # a file of the pack: a LoRA of its UNet that every such frame wears


class Sampling(_Strict):
    """How the pack's frames are drawn, unless a request says otherwise."""

    sampler: str  # a name of `samplers.SAMPLERS`
    default_steps: int = Field(ge=1, le=1000)
    default_text_guidance: float = Field(ge=0.0, le=30.0)
    default_image_guidance: float = Field(ge=0.0, le=30.0)
    # What other qualities than the standard one are; without a word here a draft takes half the steps, the best twice.
    qualities: dict[Literal["draft", "best"], QualitySettings] = Field(default_factory=dict)

    def at(self, quality: Quality, *, adapters: bool = True) -> QualitySettings:
        """How frames of a quality are drawn; without `adapters` as if the pack had none for it."""
        told = next((settings for name, settings in self.qualities.items() if name == quality.value), None)
        if told is not None and (adapters or not told.adapter):
            return told
        factor = {Quality.DRAFT: 0.5, Quality.STANDARD: 1.0, Quality.BEST: 2.0}[quality]
        return QualitySettings(
            steps=min(1000, math.ceil(self.default_steps * factor)),
            text_guidance=self.default_text_guidance,
            image_guidance=self.default_image_guidance,
        )


class PackSettings(_Strict):
    """What whoever makes a pack decides. The manifest adds the files and the date."""

    name: str
    architecture: str  # a name of `registry.ARCHITECTURES`
    base: str  # the checkpoint training started from; "nothing" when it started from random weights
    licence: str  # an SPDX expression
    made_by: str  # the command that makes this pack again
    width_px: int = Field(ge=8)
    height_px: int = Field(ge=8)
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # of the weights as stored
    max_references: int = Field(ge=0, le=8)
    reference_range: ReferenceRange
    # True: reference latents are drawn from the VAE's posterior with the job's seed, as StoryGen does. False: its mean.
    sample_latents: bool = True
    latents: LatentScaling
    schedule: AnyScheduleConfig
    sampling: Sampling

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        return _plain_name(name)

    @model_validator(mode="after")
    def _size_is_drawable(self) -> PackSettings:
        if self.width_px % 8 or self.height_px % 8:
            raise ValueError("width_px and height_px must be multiples of 8")
        return self


class Manifest(PackSettings):
    """`pack.json`."""

    format: Literal[1] = 1
    created: AwareDatetime
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _paths_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        return _plain_paths(files)

    @model_validator(mode="after")
    def _adapters_are_there(self) -> Manifest:
        for quality, settings in self.sampling.qualities.items():
            if settings.adapter and settings.adapter not in self.files:
                raise ValueError(f"sampling.qualities.{quality}: {settings.adapter!r} is no file of the pack")
        return self

    @property
    def digest(self) -> str:
        """Lower-case hex SHA-256 of the manifest in canonical form. Changes when any file or setting changes."""
        document = self.model_dump(mode="json")
        if not document["sampling"]["qualities"]:  # came later: packs that say nothing there keep their digest
            del document["sampling"]["qualities"]
        return _digest(document)


class Captioner(_Strict):
    """How a published captioner is asked, and what it sees; the question is put together by `captions.wording`."""

    opening: str = Field(max_length=8000)  # before the question; holds `image_token` once where it stands for a picture
    closing: str = Field(max_length=8000)  # after it: the answer comes next
    asks: bool = True  # False: it only looks, and is given `opening` as the beginning of what it says
    image_token: str = ""  # empty: no token stands for the picture
    image_px: int = Field(ge=0, le=4096)  # side of the square that pictures are squeezed to; 0: it sees none
    # True: pictures come as they are, no side longer than `image_px`, and its own preprocessor sizes and crops them.
    whole_pictures: bool = False
    context_tokens: int = Field(ge=16)  # picture, question and answer together
    stop_ids: tuple[int, ...] = Field(min_length=1)  # tokens that end what it says
    adapters: dict[Literal["story", "descriptive"], str] = Field(default_factory=dict)  # to PEFT folders of the pack

    @model_validator(mode="after")
    def _token_stands_once(self) -> Captioner:
        if self.image_token and self.opening.count(self.image_token) != 1:
            raise ValueError(f"opening must hold {self.image_token!r} exactly once")
        if self.image_token and not self.image_px:
            raise ValueError("image_px must say how large the pictures are that image_token stands for")
        return self


class CaptionerSettings(_Strict):
    """What whoever makes a pack of a published captioner decides. The manifest adds the files and the date."""

    name: str
    architecture: str  # a name of `captioner.ARCHITECTURES`
    base: str
    licence: str  # an SPDX expression
    made_by: str  # the command that makes this pack again
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # of the weights as stored
    captioner: Captioner

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        return _plain_name(name)


class CaptionerManifest(CaptionerSettings):
    """`pack.json` of a pack that writes and does not draw."""

    format: Literal[1] = 1
    created: AwareDatetime
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _paths_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        return _plain_paths(files)

    @model_validator(mode="after")
    def _adapters_are_there(self) -> CaptionerManifest:
        for name, folder in self.captioner.adapters.items():
            if f"{folder}/adapter_config.json" not in self.files:
                raise ValueError(f"captioner.adapters.{name}: no file of the pack lies in {folder!r}")
        return self

    @property
    def digest(self) -> str:
        """As `Manifest.digest`."""
        return _digest(self.model_dump(mode="json"))


class Endpoint(_Strict):
    """A model on a server of the Open Inference Protocol: Triton, KServe, or another installation of ours."""

    address: str = Field(pattern=r"^[A-Za-z0-9.\[\]:_-]+:[0-9]{1,5}$")  # host:port of its gRPC
    model: str = Field(min_length=1, max_length=200)
    tls: bool = False
    timeout_s: float = Field(default=60.0, gt=0.0, le=3600.0)  # of one answer


class RemoteSettings(_Strict):
    """What whoever makes a pack of somebody else's server decides."""

    name: str
    architecture: str  # a name of `remote.ARCHITECTURES`
    base: str
    licence: str  # an SPDX expression
    made_by: str  # the command that makes this pack again
    endpoint: Endpoint

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        return _plain_name(name)


class RemoteManifest(RemoteSettings):
    """`pack.json` of a pack without weights: a server has them."""

    format: Literal[1] = 1
    created: AwareDatetime
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _paths_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        return _plain_paths(files)

    @property
    def digest(self) -> str:
        """As `Manifest.digest`: of where the model is, for nobody here knows its weights."""
        return _digest(self.model_dump(mode="json"))


AnySettings = PackSettings | CaptionerSettings | RemoteSettings
AnyManifest = Manifest | CaptionerManifest | RemoteManifest
_SEALED: dict[type[BaseModel], type[AnyManifest]] = {
    PackSettings: Manifest,
    CaptionerSettings: CaptionerManifest,
    RemoteSettings: RemoteManifest,
}


def _plain_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a pack's name is 1 to 63 lower-case letters, digits and dashes")
    return name


def _plain_paths(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
    for path in files:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or str(pure) != path or path == MANIFEST:
            raise ValueError(f"{path!r} is not a plain path inside the pack")
    return files


def _digest(document: object) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class SealedPack:
    """A pack on this machine whose files were checked, whatever it is good for."""

    folder: Path
    manifest: AnyManifest

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.manifest.name

    @property
    def digest(self) -> str:
        """The manifest's digest."""
        return self.manifest.digest

    def path(self, relative: str) -> Path:
        """The checked file at `relative`. Raises PackFileMissing when the manifest does not list it."""
        if relative not in self.manifest.files:
            raise PackFileMissing(f"pack {self.name!r} has no file {relative!r}")
        return self.folder / relative


@dataclass(frozen=True)
class Pack(SealedPack):
    """One that draws."""

    manifest: Manifest


def may_hold(relative: str) -> bool:
    """Whether a pack may hold a file of this name."""
    suffix = PurePosixPath(relative).suffix
    return suffix in _PLAIN_SUFFIXES or suffix == _WEIGHTS_SUFFIX


def find_pack(name: str, search: Sequence[Path]) -> Path:
    """The first folder called `name` with a manifest on the search path.

    Raises PackNotFound, or PackManifestInvalid when the manifest there gives another name: two packs that call
    themselves alike would hide each other.
    """
    if _NAME.fullmatch(name):
        for folder in search:
            if (folder / name / MANIFEST).is_file():
                own = read_any_manifest(folder / name).name
                if own != name:
                    raise PackManifestInvalid(f"the pack in {folder / name} calls itself {own!r}: rename the folder")
                return folder / name
    places = os.pathsep.join(str(folder) for folder in search) or "nowhere"
    raise PackNotFound(f"no pack {name!r} in {places}; set FABULA_PACKS to the folder that holds it")


def load_pack(folder: Path) -> Pack:
    """Read the manifest of `folder` and check every file against it.

    Raises PackManifestInvalid, for a captioner's too, PackFileMissing, PackFileDamaged or PackFileUnsafe.
    """
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    return Pack(folder, manifest)


def load_any_pack(folder: Path) -> SealedPack:
    """The same for a pack of any kind."""
    manifest = read_any_manifest(folder)
    _check_files(folder, manifest)
    return Pack(folder, manifest) if isinstance(manifest, Manifest) else SealedPack(folder, manifest)


def _check_files(folder: Path, manifest: AnyManifest) -> None:
    for relative, entry in manifest.files.items():
        _check_file(folder, relative, entry)
    listed = set(manifest.files)
    for relative in _files_of(folder):
        # A library pointed at the folder may pick up a file by its name alone, so none may lie about unchecked.
        if relative not in listed:
            raise PackFileUnsafe(f"{relative} lies in the pack {manifest.name!r} but its manifest does not list it")


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone; no file is checked. Raises PackManifestInvalid, for a captioner's too."""
    manifest = read_any_manifest(folder)
    if not isinstance(manifest, Manifest):
        cannot = "has no weights here" if isinstance(manifest, RemoteManifest) else "writes and cannot draw"
        raise PackManifestInvalid(f"pack {manifest.name!r} is a {manifest.architecture}: it {cannot}")
    return manifest


def parse_manifest(data: bytes) -> AnyManifest:
    """What a `pack.json` says. Raises pydantic's ValidationError."""
    try:
        document = json.loads(data)
    except ValueError:
        document = None  # what is wrong with it, pydantic says better
    keys = document.keys() if isinstance(document, dict) else ()
    if "endpoint" in keys:
        return RemoteManifest.model_validate_json(data)
    return CaptionerManifest.model_validate_json(data) if "captioner" in keys else Manifest.model_validate_json(data)


def read_any_manifest(folder: Path) -> AnyManifest:
    """The same for a pack of any kind."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise PackManifestInvalid(f"cannot read {folder / MANIFEST}: {error.strerror}") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'document'}: {e['msg']}" for e in error.errors())
        raise PackManifestInvalid(f"{folder / MANIFEST}: {faults}") from None


def write_pack(folder: Path, settings: PackSettings, *, created: datetime | None = None) -> Pack:
    """Seal a folder whose files are all in place: write its manifest, then load it as a reader would.

    Raises PackFileUnsafe when a file may not be in a pack.
    """
    seal_pack(folder, settings, created=created)
    return load_pack(folder)


def seal_pack(folder: Path, settings: AnySettings, *, created: datetime | None = None) -> SealedPack:
    """The same for a pack of any kind."""
    files = {relative: _entry(folder / relative) for relative in _files_of(folder)}
    kind = next(each for each in _SEALED if isinstance(settings, each))
    manifest = _SEALED[kind](
        **{name: getattr(settings, name) for name in kind.model_fields},
        created=created or datetime.now(UTC).replace(microsecond=0),
        files=files,
    )
    temporary = folder / f".{MANIFEST}.new"
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)
    return load_any_pack(folder)


def _files_of(folder: Path) -> Iterator[str]:
    """Every file below `folder` but the manifest, as sorted POSIX paths. Hidden files are not part of a pack."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_dir() or str(relative) == MANIFEST or any(part.startswith(".") for part in relative.parts):
            continue
        yield relative.as_posix()


def _entry(path: Path) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return FileEntry(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)


def _check_file(folder: Path, relative: str, entry: FileEntry) -> None:
    path = folder / relative
    if not may_hold(relative):
        raise PackFileUnsafe(f"{relative}: a pack holds safetensors, JSON, Jinja, text and PNG files only")
    if not path.is_file():
        raise PackFileMissing(f"{relative} is listed in {folder / MANIFEST} but is not there")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise PackFileUnsafe(f"{relative} leads out of the pack's folder")
    if path.suffix == _WEIGHTS_SUFFIX and not _looks_like_safetensors(path):
        raise PackFileUnsafe(f"{relative} is not a safetensors file, whatever its name says")
    found = _entry(path)
    if found != entry:
        raise PackFileDamaged(
            f"{relative} has {found.size_bytes} bytes and SHA-256 {found.sha256}; "
            f"the manifest says {entry.size_bytes} and {entry.sha256}"
        )


def _looks_like_safetensors(path: Path) -> bool:
    """True when the file opens as safetensors does: the length of a JSON header, then the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) < 9:
        return False
    (header_bytes,) = struct.unpack("<Q", start[:8])
    return bool(header_bytes <= size - 8 and start[8:9] == b"{")
