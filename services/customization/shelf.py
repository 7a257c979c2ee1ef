"""What lies where frame replicas read: weights and manifests of published versions, and of deleted ones no more.

Weights of a deleted version wait in this service's own store, out of the replicas' reach, until it is undeleted or
purged. Everything is content-addressed: versions may share weights, and pictures also with jobs, and nothing goes that
somebody else has.

The database says what shall be, the stores follow. A version whose files are about to move is marked unsettled first,
and `settle` brings them where its row says, as often as it is asked. So whoever is killed in between leaves a version
that is as it was or as it was wished, and the runner's next look does the rest. Of all processes over one folder any
number put files at a time, and one alone removes some (`turns.py`): else what one of them finds unused another one
could just be publishing. What a caller has begun goes on when the caller hangs up, for files can be gigabytes and the
next try would begin with nothing. Knows no wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from services.customization.records import CharacterVersion
from services.customization.repository import Repository
from services.customization.turns import Turn, Turns
from services.runtime.database import now_us
from services.runtime.errors import (
    CharacterVersionNotFound,
    DataLoss,
    FabulaError,
    ObjectCorrupt,
    ObjectNotFound,
    Unavailable,
)
from services.runtime.store import ObjectStore

T = TypeVar("T")

log = structlog.get_logger("fabula.customization.shelf")


@dataclass(frozen=True, kw_only=True)
class _Leftover:
    """What may lie there of a version that was not published."""

    version: CharacterVersion
    with_weights: bool  # not where somebody had laid the weights before, as for an import


class Shelf:
    """The characters of one folder. Every method waits for its turn, and may raise Unavailable."""

    def __init__(self, repository: Repository, *, characters: ObjectStore, objects: ObjectStore, turns: Turns) -> None:
        """`characters` is what frame replicas read, `objects` this service's own."""
        self._repository, self._turns = repository, turns
        self._characters, self._objects = characters, objects
        self._leftovers: dict[str, _Leftover] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio itself holds on to none

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """While it lasts nothing else is put, published or removed."""
        with await self._turns.alone():
            yield

    @asynccontextmanager
    async def putting(self) -> AsyncIterator[None]:
        """While it lasts nothing is removed: what is put is there still when the database says whose it is."""
        with await self._turns.sharing():
            yield

    async def publish(
        self, version: CharacterVersion, manifest: str, weights: bytes, pictures: Sequence[bytes] = ()
    ) -> tuple[CharacterVersion, bool]:
        """Lays a version out and keeps it; says whether it is new. One of this content that is deleted is back.

        Raises CustomizationJobNotFound when its job was purged meanwhile, and StorageFull; it leaves nothing then.
        """
        turn = await self._turns.sharing()
        return await self._to_its_end(turn, self._publish(turn, version, manifest, weights, pictures))

    async def _publish(
        self, turn: Turn, version: CharacterVersion, manifest: str, weights: bytes, pictures: Sequence[bytes]
    ) -> tuple[CharacterVersion, bool]:
        with turn:
            with_weights = await self._characters.modified_time(version.weights_sha256) is None
            try:
                await self._repository.unsettle_deleted(version.version_id)
                for picture in pictures:
                    await self._objects.put(picture)
                await self._characters.put(weights)
                # Under its own digest, which is the version's name: whoever has the weights' store can say whose they
                # are.
                await self._characters.put(manifest.encode())
                published, is_new = await self._repository.publish(version, manifest)
            except (Exception, asyncio.CancelledError):
                self._note_leftover(version, with_weights=with_weights)
                turn.end()  # others who put now may need the same files: they are removed by one who is alone
                await self._sweep_if_free()
                raise
        await self._settle_if_free(version.version_id)
        return published, is_new

    async def delete(self, version_id: str, *, purge_us: int) -> CharacterVersion:
        """Takes a version away until it is undeleted or purged.

        Raises CharacterVersionNotFound. Raises Unavailable also when it is deleted but its files are in the replicas'
        reach still: the runner removes them when it can, and asking again says whether it has.
        """
        turn = await self._turns.alone()
        return await self._to_its_end(turn, self._delete(turn, version_id, purge_us))

    async def _delete(self, turn: Turn, version_id: str, purge_us: int) -> CharacterVersion:
        with turn:
            version = await self._repository.delete_version(version_id, purge_us=purge_us)
            try:
                await self._settle(version_id)
            except FabulaError as error:
                # A replica that forgets the weights before they are gone reads them again. Whoever has it forget them
                # must not be told to do that now.
                _log_unsettled(version_id, error)
                raise Unavailable(
                    f"the version is deleted, but its files are not yet out of reach ({error.message}); ask again",
                    metadata={"version_id": version_id, "cause": error.reason},
                ) from error
        return version

    async def undelete(self, version_id: str) -> CharacterVersion:
        """Has a deleted version back.

        Raises CharacterVersionNotFound, also once its time is over, and DataLoss when its weights are gone.
        """
        turn = await self._turns.sharing()
        return await self._to_its_end(turn, self._undelete(turn, version_id))

    async def _undelete(self, turn: Turn, version_id: str) -> CharacterVersion:
        with turn:
            version = await self._repository.version(version_id)
            if version.purge_us is not None and version.purge_us <= now_us():
                raise CharacterVersionNotFound(
                    "the time in which this version could be undeleted is over", metadata={"version_id": version_id}
                )
            await self._repository.unsettle_deleted(version_id)
            if (unsettled := await self._repository.unsettled(version_id)) is not None:
                await self._lay_out(*unsettled)  # before it is back: whoever finds it can draw it
                version = await self._repository.undelete_version(version_id)
        await self._settle_if_free(version_id)
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

    async def sweep(self) -> None:
        """Removes what versions left that this process could not publish, of what nobody else has."""
        if self._leftovers:
            async with self.alone():
                await self._sweep()

    async def _to_its_end(self, turn: Turn, work: Coroutine[Any, Any, T]) -> T:
        """Does what a turn was taken for, also if the caller hangs up meanwhile."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: turn.end())  # also if it is cancelled before it began
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_unheard)
            raise

    async def _settle_if_free(self, version_id: str) -> None:
        """What a caller asked for is kept already. What keeps this from being done now, the runner's next look does."""
        try:
            if await self._repository.unsettled(version_id) is None:
                return
            if (turn := self._turns.alone_now()) is not None:
                with turn:
                    await self._settle(version_id)
        except FabulaError as error:
            _log_unsettled(version_id, error)

    def _note_leftover(self, version: CharacterVersion, *, with_weights: bool) -> None:
        # Weights that an earlier try left are this process's to remove, though the next try found them there.
        known = self._leftovers.get(version.version_id)
        ours = with_weights or (known is not None and known.with_weights)
        self._leftovers[version.version_id] = _Leftover(version=version, with_weights=ours)

    async def _sweep_if_free(self) -> None:
        """At once if that can be; else `sweep` has it."""
        if (turn := self._turns.alone_now()) is None:
            return
        with turn:
            try:
                await self._sweep()
            except FabulaError as error:  # whoever could not publish is told why, and not of this
                log.warning("leftovers_wait", reason=error.reason, message=error.message)

    async def _sweep(self) -> None:
        for version_id, left in list(self._leftovers.items()):
            try:
                await self._repository.version(version_id)  # it may be there: by another one, or by a later try
            except CharacterVersionNotFound:
                await self._take_out(left.version, with_weights=left.with_weights)
                for sha256 in await self._repository.own_pictures(left.version):
                    await self._objects.delete(sha256)
            del self._leftovers[version_id]

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
        if not await _is_whole(self._characters, version.weights_sha256):
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
        if await _is_whole(self._objects, version.weights_sha256):
            return
        try:
            await self._objects.put(await self._characters.get(version.weights_sha256))
        except (ObjectNotFound, ObjectCorrupt) as error:
            log.error("weights_lost", version_id=version.version_id, reason=error.reason)

    async def _take_out(self, version: CharacterVersion, *, with_weights: bool = True) -> None:
        """Out of the replicas' reach, but for weights that a version has which is not deleted."""
        if with_weights and not await self._repository.has_weights(version.weights_sha256, deleted=False):
            await self._characters.delete(version.weights_sha256)
        await self._characters.delete(version.version_id)


async def _is_whole(store: ObjectStore, sha256: str) -> bool:
    """Whether an object can be read. To see it there is not enough: what it is a copy of is removed next."""
    try:
        await store.get(sha256)
    except (ObjectNotFound, ObjectCorrupt):
        return False
    return True


def _log_unsettled(version_id: str, error: FabulaError) -> None:
    log.warning("version_unsettled", version_id=version_id, reason=error.reason, message=error.message)


def _log_unheard(task: asyncio.Task[Any]) -> None:
    """Whoever asked for it is gone and hears no error."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("failed_unheard", error=f"{type(error).__name__}: {error}")
