"""The packs of an installation: add, list, verify, remove.

    packs/
      mine/                     a pack: visible, whole and checked
      .adding-other-1f0c…/      one that is being copied, or was when its process died
        .journal.json           what each file's source said of it, and the digest of those that are complete
        unet/.diffusion….part   half a file
      .removing-old-77ab…/      one that is being deleted

A pack becomes visible by one rename, after every file was checked; until then it has a hidden name. Adding it again
goes on where it ended, in the middle of a file too. Knows no command line and no network: a `Source` gives the bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from services.models.errors import (
    PackBusy,
    PackDiskFull,
    PackError,
    PackFileDamaged,
    PackFileMissing,
    PackFileUnsafe,
    PackInUse,
    PackManifestInvalid,
    PackNameTaken,
    PackNotFound,
    PackSourceInvalid,
    PackUnsupported,
)
from services.models.pack import (
    MANIFEST,
    AnyManifest,
    AnySettings,
    SealedPack,
    load_any_pack,
    may_hold,
    parse_manifest,
    read_any_manifest,
    seal_pack,
)
from services.models.source import BLOCK_BYTES, Source, SourceFile, is_hidden, read_start

ADDING = ".adding-"
REMOVING = ".removing-"
JOURNAL = ".journal.json"
MANIFEST_BYTES_MAX = 4 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")

Progress = Callable[[str, int, int], None]
"""(file, bytes of all files that are there, bytes of all files)"""


@dataclass(frozen=True, kw_only=True)
class WantedFile:
    """A file to copy: where it lies in the source and where it goes."""

    path: str  # in the pack
    source_path: str
    file: SourceFile


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """What adding will do, decided before anything is copied."""

    name: str
    architecture: str
    files: tuple[WantedFile, ...]
    sealed: AnyManifest | None = None  # the source is a pack: its manifest is kept as it is
    settings: AnySettings | None = None  # it is not: a manifest is written with these
    notes: tuple[str, ...] = ()  # what whoever adds it should know

    @property
    def size_bytes(self) -> int:
        """Of everything that will be copied."""
        return sum(each.file.size_bytes for each in self.files)


@dataclass(frozen=True, kw_only=True)
class Added:
    """A pack that is there now."""

    pack: SealedPack
    notes: tuple[str, ...]
    was_there: bool  # the very same pack had been added before; nothing was copied


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One pack folder as `fabula pack list` shows it. What a damaged manifest does not say is empty."""

    name: str
    folder: Path
    architecture: str = ""
    size_bytes: int = 0
    created: datetime | None = None
    licence: str = ""
    digest: str = ""
    hidden_by: Path | None = None  # another pack of the same name is found first
    unfinished: bool = False  # adding it ended before it was complete
    fault: str = ""  # why its manifest cannot be read
    reason: str = ""


def plan_sealed(source: Source, files: Mapping[str, SourceFile], architectures: Collection[str]) -> PackPlan:
    """How to add a source that is a pack already.

    Raises PackManifestInvalid, PackUnsupported, PackFileMissing, PackFileDamaged, PackFileUnsafe, PackSourceUnreadable.
    """
    data = read_start(source, MANIFEST, MANIFEST_BYTES_MAX + 1)
    if len(data) > MANIFEST_BYTES_MAX:
        raise PackManifestInvalid(f"{MANIFEST} of {source.name} has more than {MANIFEST_BYTES_MAX} bytes")
    try:
        manifest = parse_manifest(data)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'document'}: {e['msg']}" for e in error.errors())
        raise PackManifestInvalid(f"{MANIFEST} of {source.name}: {faults}") from None
    check_architecture(manifest.architecture, architectures)
    wanted = []
    for path, entry in manifest.files.items():
        if not may_hold(path) or is_hidden(path):
            raise PackFileUnsafe(f"{path}: a pack holds safetensors, JSON, Jinja, text and PNG files only")
        if path not in files:
            raise PackFileMissing(f"{path} is listed in {MANIFEST} of {source.name} but is not there")
        found = files[path]
        if found.size_bytes != entry.size_bytes:
            raise PackFileDamaged(
                f"{path} of {source.name} has {found.size_bytes} bytes; its manifest says {entry.size_bytes}"
            )
        known = SourceFile(size_bytes=entry.size_bytes, version=found.version, sha256=entry.sha256)
        wanted.append(WantedFile(path=path, source_path=path, file=known))
    return PackPlan(name=manifest.name, architecture=manifest.architecture, files=tuple(wanted), sealed=manifest)


def check_architecture(architecture: str, known: Collection[str]) -> None:
    """Raises PackUnsupported for one that no loader here knows."""
    if architecture not in known:
        raise PackUnsupported(
            f"this version cannot draw with the architecture {architecture!r}; it knows {', '.join(sorted(known))}. "
            "Nothing was copied"
        )


class Library:
    """The folder that packs are added to, and those that are searched besides."""

    def __init__(self, folder: Path, search: Sequence[Path]) -> None:
        """`search` is in the order in which packs are found; `folder` is one of them."""
        self.folder = folder
        self._search = tuple(search)

    def add(self, plan: PackPlan, source: Source, progress: Progress | None = None) -> Added:
        """Copy what `plan` says, check it, make it visible.

        Raises PackNameTaken, PackBusy, PackDiskFull, PackFileDamaged, PackFileUnsafe, PackManifestInvalid,
        PackSourceUnreadable. Whatever is raised, nothing is visible that was not before.
        """
        present = self._present(plan)
        if present is not None:
            return Added(pack=present, notes=plan.notes, was_there=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            with self._staging(plan, source) as staging:
                self._check_room(plan, staging)
                _copy(plan, source, staging, progress or (lambda path, done, total: None))
                _seal(plan, staging)
                target = self.folder / plan.name
                if target.exists():
                    raise PackNameTaken(f"a pack {plan.name!r} appeared in {self.folder} meanwhile")
                os.rename(staging, target)
                _sync(self.folder)
        except OSError as error:
            if error.errno in _FULL:
                raise PackDiskFull(
                    f"no room for pack {plan.name!r} in {self.folder}: {error.strerror}. What was copied is kept "
                    f"hidden: make room and add it again to go on, or free it with `fabula pack remove {plan.name}`"
                ) from None
            raise PackError(f"cannot write pack {plan.name!r} to {self.folder}: {error.strerror}") from None
        return Added(pack=SealedPack(target, read_any_manifest(target)), notes=plan.notes, was_there=False)

    def packs(self) -> list[Listed]:
        """Every pack on the search path, in its order, then those whose adding did not end."""
        seen: dict[str, Path] = {}
        listed = []
        for folder in self._search:
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file():
                    listed.append(_listed(path, seen.get(path.name)))
                    seen.setdefault(path.name, path)
        return listed + [
            Listed(name=name, folder=path, unfinished=True, size_bytes=_size(path)) for name, path in self._unfinished()
        ]

    def names(self) -> list[str]:
        """Of the packs that can be found, in the order of the search path."""
        return [each.name for each in self.packs() if not each.unfinished and each.hidden_by is None]

    def remove(self, name: str, *, wanted: Collection[str] = (), force: bool = False) -> int:
        """Delete a pack of the library's own folder, and what adding it left unfinished. The bytes that became free.

        `wanted` are the packs that the settings name. Raises PackInUse, PackNotFound.
        """
        if not _NAME.fullmatch(name):
            raise PackNotFound(f"{name!r} is no pack's name")
        found = self.folder / name
        doomed = [path for unfinished, path in self._unfinished() if unfinished == name]
        if (found / MANIFEST).is_file():
            if name in wanted and not force:
                raise PackInUse(
                    f"the settings name pack {name!r}: the services would not start without it. Change "
                    "FABULA_FRAME_PACKS, FABULA_CAPTION_PACK and FABULA_STORY_DEFAULT_PACK first, or say --force"
                )
            doomed.append(found)
        if not doomed:
            elsewhere = next((folder / name for folder in self._search if (folder / name / MANIFEST).is_file()), None)
            if elsewhere is not None:
                raise PackNotFound(f"pack {name!r} lies in {elsewhere}; only packs in {self.folder} can be removed")
            raise PackNotFound(f"no pack {name!r} in {self.folder}")
        freed = 0
        for path in doomed:
            freed += _size(path)
            hidden = self.folder / f"{REMOVING}{name}-{secrets.token_hex(4)}"
            with suppress(FileNotFoundError), _locked(path):
                os.rename(path, hidden)
                _sync(self.folder)
                shutil.rmtree(hidden, ignore_errors=True)
        return freed

    def _present(self, plan: PackPlan) -> SealedPack | None:
        """The very same pack where it was added before. Raises PackNameTaken when another one has its name."""
        for folder in self._search:
            path = folder / plan.name
            if not (path / MANIFEST).is_file():
                continue
            if plan.sealed is not None:
                with suppress(PackManifestInvalid):
                    manifest = read_any_manifest(path)
                    if manifest.digest == plan.sealed.digest:
                        return load_any_pack(path)
            own = folder == self.folder
            how = f"`fabula pack remove {plan.name}` first" if own else "it would be found first"
            raise PackNameTaken(
                f"another pack {plan.name!r} lies in {path}: {how}, or add this one under another --name"
            )
        if (self.folder / plan.name).exists():
            raise PackNameTaken(f"{self.folder / plan.name} is there and is no pack; move it away")
        return None

    def _check_room(self, plan: PackPlan, staging: Path) -> None:
        missing = plan.size_bytes - _size(staging)
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise PackDiskFull(f"pack {plan.name!r} needs {missing} more bytes in {self.folder} and {free} are free")

    @contextmanager
    def _staging(self, plan: PackPlan, source: Source) -> Iterator[Path]:
        """The hidden folder of one pack from one source, for one process at a time."""
        mark = hashlib.sha256(f"{source.name}\n{plan.sealed is not None}".encode()).hexdigest()[:8]
        staging = self.folder / f"{ADDING}{plan.name}-{mark}"
        staging.mkdir(exist_ok=True)
        with _locked(staging):
            yield staging

    def _unfinished(self) -> list[tuple[str, Path]]:
        if not self.folder.is_dir():
            return []
        paths = sorted(self.folder.glob(f"{ADDING}*"))
        return [(path.name.removeprefix(ADDING).rpartition("-")[0], path) for path in paths if path.is_dir()]

    def _sweep(self) -> None:
        """Deletes what a killed `remove` left."""
        for path in self.folder.glob(f"{REMOVING}*"):
            shutil.rmtree(path, ignore_errors=True)


def _copy(plan: PackPlan, source: Source, staging: Path, progress: Progress) -> None:
    """All files of the plan into the hidden folder, and nothing else there."""
    kept = {wanted.path for wanted in plan.files} | {_part(wanted.path) for wanted in plan.files} | {JOURNAL}
    for path in sorted(staging.rglob("*"), reverse=True):
        relative = path.relative_to(staging).as_posix()
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()  # only if it is empty
        elif relative not in kept:
            path.unlink()
    journal = _Journal(staging / JOURNAL)
    done = 0
    for wanted in plan.files:
        for arrived in _fetch(source, wanted, staging, journal):
            progress(wanted.path, done + arrived, plan.size_bytes)
        done += wanted.file.size_bytes


def _fetch(source: Source, wanted: WantedFile, staging: Path, journal: _Journal) -> Iterator[int]:
    """Has one file of the source whole and checked in the hidden folder; gives how many of its bytes are there."""
    target = staging / wanted.path
    part = staging / _part(wanted.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    same = journal.knows(wanted)
    if target.is_file():
        expected = wanted.file.sha256 or (journal.digest(wanted) if same else "")
        if target.stat().st_size == wanted.file.size_bytes and expected and _digest(target).hexdigest() == expected:
            yield wanted.file.size_bytes
            return
        target.unlink()
    if not same:
        part.unlink(missing_ok=True)
        journal.begin(wanted)
    resumed = part.is_file() and 0 < part.stat().st_size < wanted.file.size_bytes
    while True:
        if not resumed:
            part.unlink(missing_ok=True)
        digest = yield from _stream(source, wanted, part)
        right = part.stat().st_size == wanted.file.size_bytes and wanted.file.sha256 in ("", digest)
        if right:
            break
        size = part.stat().st_size
        part.unlink()
        if not resumed:
            raise PackFileDamaged(
                f"{wanted.source_path} of {source.name} came with {size} bytes and SHA-256 {digest}; expected were "
                f"{wanted.file.size_bytes} bytes" + (f" and {wanted.file.sha256}" if wanted.file.sha256 else "")
            )
        resumed = False  # its first half may have been another file's: once more, from the beginning
    os.replace(part, target)
    _sync(target.parent)
    journal.complete(wanted, digest)


def _stream(source: Source, wanted: WantedFile, part: Path) -> Generator[int, None, str]:
    """Adds the rest of a file to its half; gives how many bytes are there, returns the digest of all."""
    digest = hashlib.sha256()
    if part.is_file():
        digest = _digest(part)
    with part.open("ab") as file:
        arrived = file.tell()
        if arrived < wanted.file.size_bytes:
            for block in source.blocks(wanted.source_path, arrived):
                file.write(block)
                digest.update(block)
                arrived += len(block)
                yield min(arrived, wanted.file.size_bytes)
                if arrived > wanted.file.size_bytes:  # longer than it was said to be: enough of it
                    break
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


class _Journal:
    """What is known of files in a hidden folder: of which version each is, and the digest once it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, dict[str, str | int]] = {}
        with suppress(OSError, ValueError, TypeError, AttributeError):  # without it copying begins again
            document = json.loads(path.read_bytes())["files"]
            self._files = {str(name): dict(values) for name, values in document.items()}

    def knows(self, wanted: WantedFile) -> bool:
        """Whether what lies there of a file is of the version that its source has now."""
        noted = self._files.get(wanted.path, {})
        told = (wanted.source_path, wanted.file.version, wanted.file.size_bytes)
        return (noted.get("source_path"), noted.get("version"), noted.get("size_bytes")) == told

    def digest(self, wanted: WantedFile) -> str:
        """Of a file that was complete; empty for others."""
        return str(self._files.get(wanted.path, {}).get("sha256", ""))

    def begin(self, wanted: WantedFile) -> None:
        """Notes the version that is about to be copied."""
        self._note(wanted, "")

    def complete(self, wanted: WantedFile, sha256: str) -> None:
        """Notes that a file is whole."""
        self._note(wanted, sha256)

    def _note(self, wanted: WantedFile, sha256: str) -> None:
        self._files[wanted.path] = {
            "source_path": wanted.source_path,
            "version": wanted.file.version,
            "size_bytes": wanted.file.size_bytes,
            "sha256": sha256,
        }
        draft = self._path.with_name(f"{self._path.name}.new")
        draft.write_text(json.dumps({"files": self._files}), encoding="utf-8")
        os.replace(draft, self._path)


def _seal(plan: PackPlan, staging: Path) -> None:
    """Puts the manifest in and checks the whole as a reader would. Raises what `load_any_pack` raises."""
    journal = _Journal(staging / JOURNAL)
    if plan.sealed is not None:
        (staging / MANIFEST).write_text(plan.sealed.model_dump_json(indent=2) + "\n", encoding="utf-8")
        load_any_pack(staging)
    elif plan.settings is not None:
        files = seal_pack(staging, plan.settings).manifest.files
        for wanted in plan.files:
            # The manifest was made from the disk; what came over the wire must be what lies there.
            if files[wanted.path].sha256 != journal.digest(wanted):
                raise PackFileDamaged(f"{wanted.path} changed between being copied and being sealed")
    else:
        raise PackSourceInvalid("a plan needs a manifest or settings")
    (staging / JOURNAL).unlink(missing_ok=True)
    for path in (staging / MANIFEST, staging):
        _sync(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which its process loses when it dies. Raises PackBusy when somebody has it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(handle), folder.stat())  # not renamed between the two calls
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise PackBusy(f"another process works on {folder.name} right now; wait for it")
        yield
    finally:
        os.close(handle)


def _listed(folder: Path, hidden_by: Path | None) -> Listed:
    try:
        manifest = read_any_manifest(folder)
    except PackManifestInvalid as error:
        return Listed(
            name=folder.name,
            folder=folder,
            hidden_by=hidden_by,
            fault=str(error),
            reason=error.reason,
            size_bytes=_size(folder),
        )
    return Listed(
        name=folder.name,
        folder=folder,
        architecture=manifest.architecture,
        size_bytes=sum(entry.size_bytes for entry in manifest.files.values()),
        created=manifest.created,
        licence=manifest.licence,
        digest=manifest.digest,
        hidden_by=hidden_by,
    )


def _part(path: str) -> str:
    """What half of a file is called: hidden, and of no kind that anything would load."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.part" if folder else f".{name}.part"


def _size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
