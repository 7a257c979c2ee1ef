"""What lies where frame replicas read: weights and manifests of published versions, and of deleted ones no more.

Weights of a deleted version wait in this service's own store, out of the replicas' reach, until it is undeleted or
purged. Everything is content-addressed: versions may share weights, and pictures also with jobs, and nothing goes that
somebody else has.

The database says what shall be, the stores follow. A version whose files are about to move is marked unsettled first,
and `settle` brings them where its row says, as often as it is asked. So whoever is killed in between leaves a version
that is as it was or as it was wished, and the runner's next look does the rest. Of several processes over one folder
one moves files at a time, the one that holds `shelf.lock`: else what one of them finds unused another one could just be
publishing. Knows no wire.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from services.customization.records import CharacterVersion
from services.customization.repository import Repository
from services.runtime.database import now_us
from services.runtime.errors import (
    CharacterVersionNotFound,
    CustomizationJobNotFound,
    DataLoss,
    FabulaError,
    ObjectCorrupt,
    ObjectNotFound,
)
from services.runtime.store import ObjectStore

LOCK_FILE = "shelf.lock"
_ASK_AGAIN_S = 0.02  # whether the lock is free

log = structlog.get_logger("fabula.customization.shelf")


class Shelf:
    """The characters of one folder. Every method but `alone` waits for its turn, and may raise Unavailable."""

    def __init__(self, repository: Repository, *, characters: ObjectStore, objects: ObjectStore, folder: Path) -> None:
        """`characters` is what frame replicas read, `objects` this service's own; the lock lies in `folder`."""
        self._repository, self._folder = repository, folder
        self._characters, self._objects = characters, objects

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """While it lasts nothing else is put, published or removed. The kernel lets go of it however a process dies."""
        handle = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_ASK_AGAIN_S)
            yield
        finally:
            os.close(handle)

    async def publish(
        self, version: CharacterVersion, manifest: str, weights: bytes, pictures: Sequence[bytes] = ()
    ) -> tuple[CharacterVersion, bool]:
        """Lays a version out and keeps it; says whether it is new. One of this content that is deleted is back.

        Raises CustomizationJobNotFound when its job was purged meanwhile, and StorageFull.
        """
        async with self.alone():
            await self._repository.unsettle_deleted(version.version_id)
            for picture in pictures:
                await self._objects.put(picture)
            await self._characters.put(weights)
            # Under its own digest, which is the version's name: whoever has the weights' store can say whose they are.
            await self._characters.put(manifest.encode())
            try:
                published, is_new = await self._repository.publish(version, manifest)
            except CustomizationJobNotFound:
                await self._take_out(version)
                raise
            await self._settle_or_leave(version.version_id)
        return published, is_new

    async def delete(self, version_id: str, *, purge_us: int) -> CharacterVersion:
        """Takes a version away until it is undeleted or purged. Raises CharacterVersionNotFound."""
        async with self.alone():
            version = await self._repository.delete_version(version_id, purge_us=purge_us)
            await self._settle_or_leave(version_id)
        return version

    async def undelete(self, version_id: str) -> CharacterVersion:
        """Has a deleted version back.

        Raises CharacterVersionNotFound, also once its time is over, and DataLoss when its weights are gone.
        """
        async with self.alone():
            version = await self._repository.version(version_id)
            if version.purge_us is not None and version.purge_us <= now_us():
                raise CharacterVersionNotFound(
                    "the time in which this version could be undeleted is over", metadata={"version_id": version_id}
                )
            await self._repository.unsettle_deleted(version_id)
            if (unsettled := await self._repository.unsettled(version_id)) is not None:
                await self._lay_out(*unsettled)  # before it is back: whoever finds it can draw it
                version = await self._repository.undelete_version(version_id)
                await self._settle_or_leave(version_id)
        return version

    async def settle(self, version_id: str) -> None:
        """Brings a version's files where its row says, if they may be elsewhere. Raises DataLoss."""
        async with self.alone():
            await self._settle(version_id)

    async def purge(self, version_id: str) -> None:
        """Removes a deleted version whose time is over, with all that nobody else has."""
        async with self.alone():
            try:
                version = await self._repository.version(version_id)
            except CharacterVersionNotFound:
                return
            if version.purge_us is None or version.purge_us > now_us():
                return  # it was undeleted since somebody looked
            await self._take_out(version)
            if not await self._repository.has_weights(version.weights_sha256, deleted=True, beside=version_id):
                await self._objects.delete(version.weights_sha256)
            for sha256 in await self._repository.own_pictures(version):
                await self._objects.delete(sha256)
            # Last: until then the next look finds it, and removes what is left.
            await self._repository.purge_version(version_id)
        log.info("version_purged", version_id=version_id)

    async def _settle_or_leave(self, version_id: str) -> None:
        """What a caller asked for is kept already; a store that is away must not take that back."""
        try:
            await self._settle(version_id)
        except FabulaError as error:
            log.warning("version_unsettled", version_id=version_id, reason=error.reason, message=error.message)

    async def _settle(self, version_id: str) -> None:
        if (unsettled := await self._repository.unsettled(version_id)) is None:
            return
        version, manifest = unsettled
        if version.delete_us is None:
            await self._lay_out(version, manifest)
            if not await self._repository.has_weights(version.weights_sha256, deleted=True):
                await self._objects.delete(version.weights_sha256)
        else:
            await self._put_aside(version)
            await self._take_out(version)
        await self._repository.settle(version_id)

    async def _lay_out(self, version: CharacterVersion, manifest: str) -> None:
        """From this service's own store to where frame replicas read."""
        if await self._characters.modified_time(version.weights_sha256) is None:
            try:
                weights = await self._objects.get(version.weights_sha256)
            except (ObjectNotFound, ObjectCorrupt):
                raise DataLoss(
                    "the weights of this version are gone or damaged; publish or import it again",
                    metadata={"version_id": version.version_id},
                ) from None
            await self._characters.put(weights)
        await self._characters.put(manifest.encode())

    async def _put_aside(self, version: CharacterVersion) -> None:
        """To this service's own store. Weights that are not where they were lie there already, or are lost."""
        if await self._objects.modified_time(version.weights_sha256) is not None:
            return
        try:
            await self._objects.put(await self._characters.get(version.weights_sha256))
        except (ObjectNotFound, ObjectCorrupt) as error:
            log.error("weights_lost", version_id=version.version_id, reason=error.reason)

    async def _take_out(self, version: CharacterVersion) -> None:
        """Out of the replicas' reach, but for weights that a version has which is not deleted."""
        if not await self._repository.has_weights(version.weights_sha256, deleted=False):
            await self._characters.delete(version.weights_sha256)
        await self._characters.delete(version.version_id)
