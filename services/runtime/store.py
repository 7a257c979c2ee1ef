"""The object store: bytes under their own SHA-256, in a local folder or in S3, GCS or Azure.

Writing is atomic (an object is whole or absent, also after a power cut) and idempotent; reading checks the hash. Knows
nothing of what the bytes are.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, MemoryStore, from_url

from services.runtime.errors import ObjectCorrupt, ObjectNotFound, StorageFull, Unavailable

SHA256 = re.compile(r"[0-9a-f]{64}")
PREFIX = "sha256"
PIECE_BYTES = 8 << 20  # of a large object that are read at once
# No space left, file too large (a limit on the process), quota exceeded; then how object stores say it.
FULL = re.compile(r"(os error|Errno) (28|27|122)\b|No space left|QuotaExceeded|InsufficientStorage|507 ", re.IGNORECASE)


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing."""

    sha256: str
    size_bytes: int
    modified_time: datetime


class ObjectStore:
    """Content-addressed bytes. Every method may raise Unavailable when the store does not answer."""

    def __init__(self, backend: Any) -> None:
        """`backend` is an obstore store."""
        self._backend = backend
        # Only a local folder has to be told to reach the disk; the others answer when they have the object.
        self._folder = Path(backend.prefix) if isinstance(backend, LocalStore) and backend.prefix else None

    @classmethod
    def open(cls, url: str, default_folder: Path) -> ObjectStore:
        """The store at `url` (file, s3, gs, az, memory); with an empty URL a folder, which is made if it is missing."""
        if not url:
            return cls(LocalStore(prefix=default_folder, mkdir=True))
        if url.startswith("file://"):
            return cls(LocalStore(prefix=Path(url.removeprefix("file://")), mkdir=True))
        if url.startswith("memory://"):
            return cls(MemoryStore())
        return cls(from_url(url))

    async def put(self, data: bytes) -> str:
        """Keeps `data` and returns its SHA-256 in lower-case hex. Raises StorageFull.

        An object that is there already is written again: that heals a damaged one, and its new time keeps the sweep of
        unreferenced objects away until whoever put it has committed the reference.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        path = _path(sha256)
        # Beside its place until it has reached the disk: there may be a whole object there that somebody counts on.
        draft = path if self._folder is None else f"{path}.{secrets.token_hex(4)}"
        try:
            await obstore.put_async(self._backend, draft, data, use_multipart=False)  # one put is all or nothing
            if self._folder is not None:
                await asyncio.to_thread(_settle, self._folder, draft, path)
        except (BaseError, OSError) as error:
            raise _failure(error) from error
        return sha256

    async def get(self, sha256: str) -> bytes:
        """The bytes. Raises ObjectNotFound, or ObjectCorrupt when they no longer match."""
        if not SHA256.fullmatch(sha256):
            raise ObjectNotFound(metadata={"sha256": sha256[:64]})
        try:
            result = await obstore.get_async(self._backend, _path(sha256))
            data = bytes(await result.bytes_async())
        except (NotFoundError, FileNotFoundError):
            raise ObjectNotFound(metadata={"sha256": sha256}) from None
        except (BaseError, OSError) as error:
            raise _failure(error) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ObjectCorrupt(metadata={"sha256": sha256})
        return data

    async def chunks(self, sha256: str, chunk_bytes: int) -> AsyncGenerator[bytes, None]:
        """The bytes of a large object, at most `chunk_bytes` at a time, without holding it whole.

        Raises what `get` raises. What no longer matches never arrives whole: the last chunk comes after the check.
        """
        seen, held = hashlib.sha256(), b""
        async for piece in self._pieces(sha256):
            seen.update(piece)
            for start in range(0, len(piece), chunk_bytes):
                if held:
                    yield held
                held = piece[start : start + chunk_bytes]
        if seen.hexdigest() != sha256:
            raise ObjectCorrupt(metadata={"sha256": sha256})
        if held:
            yield held

    async def _pieces(self, sha256: str) -> AsyncIterator[bytes]:
        """An object by ranges. One request for all of it would end with the store's patience, however slow a reader."""
        if not SHA256.fullmatch(sha256):
            raise ObjectNotFound(metadata={"sha256": sha256[:64]})
        path = _path(sha256)
        try:
            size = (await obstore.head_async(self._backend, path))["size"]
            for start in range(0, size, PIECE_BYTES):
                end = min(size, start + PIECE_BYTES)
                yield bytes(await obstore.get_range_async(self._backend, path, start=start, end=end))
        except (NotFoundError, FileNotFoundError):
            raise ObjectNotFound(metadata={"sha256": sha256}) from None
        except (BaseError, OSError) as error:
            raise _failure(error) from error

    async def modified_time(self, sha256: str) -> datetime | None:
        """When an object was put last; None if it is not there."""
        try:
            meta = await obstore.head_async(self._backend, _path(sha256))
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise _failure(error) from error
        modified_time: datetime = meta["last_modified"]
        return modified_time

    async def delete(self, sha256: str) -> None:
        """Removes an object; one that is not there is no error."""
        try:
            await obstore.delete_async(self._backend, _path(sha256))
        except (NotFoundError, FileNotFoundError):
            return
        except (BaseError, OSError) as error:
            raise _failure(error) from error

    async def every(self) -> AsyncIterator[StoredObject]:
        """Every object. What else lies in the store is not ours and is not shown."""
        try:
            async for batch in obstore.list(self._backend, prefix=PREFIX):
                for meta in batch:
                    name = str(meta["path"]).rsplit("/", 1)[-1]
                    if SHA256.fullmatch(name):
                        yield StoredObject(name, int(meta["size"]), meta["last_modified"])
        except (BaseError, OSError) as error:
            raise _failure(error) from error


def _path(sha256: str) -> str:
    # Two levels, so that no folder grows beyond what file systems and people like.
    return f"{PREFIX}/{sha256[:2]}/{sha256}"


def _settle(folder: Path, draft: str, path: str) -> None:
    """Has the disk keep a draft, moves it into place, and has the disk keep that too, new folders included."""
    try:
        _sync(folder / draft)
        os.replace(folder / draft, folder / path)
    except OSError:
        (folder / draft).unlink(missing_ok=True)
        raise
    place = (folder / path).parent
    while place != folder.parent:
        _sync(place)
        place = place.parent


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failure(error: Exception) -> StorageFull | Unavailable:
    if FULL.search(str(error)):
        return StorageFull()
    return Unavailable(
        f"the object store does not answer ({type(error).__name__})", metadata={"service": "object_store"}
    )
