"""The object store: bytes under their own SHA-256, in a local folder or in S3, GCS or Azure.

Writing is atomic (an object is whole or absent) and idempotent; reading checks the hash. Knows nothing of what the
bytes are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
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
# No space left, file too large (a limit on the process), quota exceeded; then how object stores say it.
FULL = re.compile(r"os error (28|27|122)\b|No space left|QuotaExceeded|InsufficientStorage|507 ", re.IGNORECASE)


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
        try:
            # One put, never multipart: a local put then is one file written beside and renamed into place.
            await obstore.put_async(self._backend, _path(sha256), data, use_multipart=False)
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


def _failure(error: Exception) -> StorageFull | Unavailable:
    if FULL.search(str(error)):
        return StorageFull()
    return Unavailable(
        f"the object store does not answer ({type(error).__name__})", metadata={"service": "object_store"}
    )
