"""Packs from elsewhere: below a prefix of an object store, or in a repository of the hub.

Both are `services.models.source.Source`s for the pack library, which knows no network itself. Nothing here is used
while stories are told: only `fabula pack add` opens a source, and the hub only when it was told that it may fetch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from services.models.errors import PackFetchNotAllowed, PackSourceInvalid, PackSourceUnreadable
from services.models.source import BLOCK_BYTES, FolderSource, Source, SourceFile, is_hidden

HUB = "hub:"
STORES = ("s3", "gs", "az")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,127}")
_HUB_BLOCK_BYTES = 8 << 20  # of one request to the hub


def open_source(place: str, *, fetch: bool = False) -> Source:
    """The source that `place` names: a folder, a file://, s3://, gs:// or az:// prefix, or hub:owner/name[@revision].

    Raises PackSourceInvalid, PackSourceUnreadable, PackFetchNotAllowed.
    """
    if place.startswith(HUB):
        repository, _, revision = place.removeprefix(HUB).partition("@")
        if not _REPOSITORY.fullmatch(repository) or (revision and not _REVISION.fullmatch(revision)):
            raise PackSourceInvalid(f"{place!r} is no id of the hub: write hub:owner/name or hub:owner/name@revision")
        if not fetch:
            raise PackFetchNotAllowed(
                f"{place} lies on the hub, and Fabula fetches nothing unless it is told to. Say --fetch to download it "
                "now, or download it yourself and add the folder"
            )
        return HubSource.open(repository, revision)
    scheme, separator, _ = place.partition("://")
    if not separator:
        return FolderSource(Path(place).expanduser())
    if scheme == "file":
        return FolderSource(Path(unquote(urlsplit(place).path)))
    if scheme not in STORES:
        raise PackSourceInvalid(
            f"{place!r}: packs come from a folder, from file://, s3://, gs:// or az://, or from hub:owner/name"
        )
    try:
        # Keys, regions and endpoints come from the environment, by the names that each provider gives them.
        return PrefixSource(from_url(place), place.rstrip("/"))
    except BaseError as error:
        raise PackSourceInvalid(f"{place!r} cannot be opened: {_first_line(error)}") from None


class PrefixSource:
    """What lies below a prefix of an object store."""

    def __init__(self, backend: Any, name: str) -> None:
        """`backend` is an obstore store that begins at the prefix."""
        self._backend = backend
        self._name = name

    @property
    def name(self) -> str:
        """Its URL. Credentials are never part of one."""
        return self._name

    def files(self) -> Mapping[str, SourceFile]:
        """See `Source`. Raises PackSourceInvalid where nothing lies."""
        found = {}
        try:
            for batch in obstore.list(self._backend):
                for meta in batch:
                    path = str(meta["path"])
                    if not is_hidden(path):
                        version = str(meta["e_tag"] or meta["last_modified"])
                        found[path] = SourceFile(size_bytes=int(meta["size"]), version=version)
        except (BaseError, OSError) as error:
            raise PackSourceUnreadable(f"{self._name} cannot be listed: {_first_line(error)}") from None
        if not found:
            raise PackSourceInvalid(f"nothing lies below {self._name}")
        return found

    def blocks(self, path: str, start: int) -> Iterator[bytes]:
        """See `Source`."""
        options = {"range": {"offset": start}} if start else {}
        try:
            for block in obstore.get(self._backend, path, options=options).stream(min_chunk_size=BLOCK_BYTES):
                yield bytes(block)
        except (BaseError, OSError) as error:
            raise PackSourceUnreadable(f"{path} of {self._name} cannot be read: {_first_line(error)}") from None


class HubSource:
    """One commit of a repository of the hub."""

    def __init__(self, repository: str, commit: str, files: Mapping[str, SourceFile], system: Any) -> None:
        """`system` is a file system of the hub's library."""
        self._repository = repository
        self._commit = commit
        self._files = files
        self._system = system

    @classmethod
    def open(cls, repository: str, revision: str) -> HubSource:
        """Asks the hub which commit the revision is and what it holds. Raises PackSourceUnreadable."""
        from huggingface_hub import HfApi, HfFileSystem

        try:
            told = HfApi().model_info(repository, revision=revision or None, files_metadata=True)
            files = {
                str(each.rfilename): SourceFile(
                    size_bytes=int(each.size or 0),
                    version=str(each.blob_id or told.sha),
                    sha256=str(each.lfs.sha256) if each.lfs else "",
                )
                for each in told.siblings or ()
                if not is_hidden(str(each.rfilename))
            }
            return cls(repository, str(told.sha), files, HfFileSystem())
        except Exception as error:  # noqa: BLE001 - the library passes on whatever its transport raises
            raise PackSourceUnreadable(f"{HUB}{repository}: {_of_hub(error)}") from None

    @property
    def name(self) -> str:
        """The repository at the commit, so that a manifest says what exactly it was made of."""
        return f"{HUB}{self._repository}@{self._commit}"

    def files(self) -> Mapping[str, SourceFile]:
        """See `Source`."""
        return self._files

    def blocks(self, path: str, start: int) -> Iterator[bytes]:
        """See `Source`."""
        where = f"{self._repository}@{self._commit}/{path}"
        try:
            with self._system.open(where, "rb", block_size=_HUB_BLOCK_BYTES) as file:
                file.seek(start)
                while block := file.read(BLOCK_BYTES):
                    yield bytes(block)
        except Exception as error:  # noqa: BLE001 - as above
            raise PackSourceUnreadable(f"{path} of {self.name}: {_of_hub(error)}") from None


def _of_hub(error: Exception) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set, which forbids fetching: unset it for this command"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
