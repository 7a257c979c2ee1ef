"""Where a pack comes from: named files, each readable from any byte on.

`FolderSource` reads this machine. Others, which know a network, live with whoever may know one; the library needs
nothing but these three answers. Knows no pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.models.errors import PackSourceInvalid, PackSourceUnreadable

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file as its source tells of it before anything is read."""

    size_bytes: int
    version: str  # another one means another content: an entity tag, a commit, a time of change
    sha256: str = ""  # where the source knows it


class Source(Protocol):
    """Files below one place, by POSIX paths. Every method may raise PackSourceUnreadable."""

    @property
    def name(self) -> str:
        """What messages and manifests call the place."""

    def files(self) -> Mapping[str, SourceFile]:
        """Every file; hidden ones are left out."""

    def blocks(self, path: str, start: int) -> Iterator[bytes]:
        """The bytes of a file from `start` to its end, piece by piece. `start` lies before the end."""


class FolderSource:
    """A folder of this machine. Links are followed: download caches are made of them."""

    def __init__(self, folder: Path) -> None:
        """Raises PackSourceInvalid when it is no folder."""
        if not folder.is_dir():
            raise PackSourceInvalid(f"{folder} is no folder")
        self._folder = folder

    @property
    def name(self) -> str:
        """The folder's own name: where it lies on this machine is nobody else's business."""
        return self._folder.resolve().name

    def files(self) -> Mapping[str, SourceFile]:
        """See `Source`."""
        found = {}
        try:
            for path in sorted(self._folder.rglob("*")):
                relative = path.relative_to(self._folder)
                if path.is_file() and not is_hidden(relative.as_posix()):
                    status = path.stat()
                    version = f"{status.st_ino}-{status.st_mtime_ns}"
                    found[relative.as_posix()] = SourceFile(size_bytes=status.st_size, version=version)
        except OSError as error:
            raise PackSourceUnreadable(f"cannot read {self._folder}: {error.strerror}") from None
        return found

    def blocks(self, path: str, start: int) -> Iterator[bytes]:
        """See `Source`."""
        try:
            with (self._folder / path).open("rb") as file:
                file.seek(start)
                while block := file.read(BLOCK_BYTES):
                    yield block
        except OSError as error:
            raise PackSourceUnreadable(f"cannot read {path} in {self._folder}: {error.strerror}") from None


def is_hidden(path: str) -> bool:
    """Whether a path, or a folder on its way, begins with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def read_start(source: Source, path: str, count: int, *, start: int = 0) -> bytes:
    """Up to `count` bytes of a file from `start` on."""
    data = b""
    blocks = source.blocks(path, start)
    for block in blocks:
        data += block
        if len(data) >= count:
            break
    return data[:count]
