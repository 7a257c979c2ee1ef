"""What lies where frame replicas read, whoever is killed in between: deleting, undeleting, purging of versions."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from services.customization.database import async_url, database_url, upgrade
from services.customization.records import CharacterVersion, NewCharacter, StoredFrame
from services.customization.repository import Repository
from services.customization.shelf import Shelf
from services.customization.turns import Turns
from services.runtime.database import now_us, open_async
from services.runtime.errors import (
    CharacterVersionNotFound,
    CustomizationJobNotFound,
    DataLoss,
    FabulaError,
    StorageFull,
    Unavailable,
)
from services.runtime.store import ObjectStore
from tests.unit.customization.test_repository import job_id, made

WEIGHTS = b"weights of Otto"
Put = Callable[[bytes], Coroutine[Any, Any, str]]
LATER = 10**18  # microseconds: a time that does not come


class Killed(BaseException):
    """The process ends here."""


class Store(ObjectStore):
    """In memory. Can be away or slow, or have the process killed at its next change."""

    def __init__(self) -> None:
        self.inside = MemoryStore()
        super().__init__(self.inside)
        self.before_change: Callable[[], None] = lambda: None
        self.putting, self.go_on = asyncio.Event(), asyncio.Event()
        self.go_on.set()

    async def put(self, data: bytes) -> str:
        self.before_change()
        self.putting.set()
        await self.go_on.wait()
        return await super().put(data)

    def slow(self) -> None:
        """What is put from now on takes until it may `go_on`."""
        self.putting.clear()
        self.go_on.clear()

    async def damage(self, sha256: str) -> None:
        await obstore.put_async(self.inside, f"sha256/{sha256[:2]}/{sha256}", b"something else")

    async def delete(self, sha256: str) -> None:
        self.before_change()
        await super().delete(sha256)

    async def all(self) -> set[str]:
        return {one.sha256 async for one in self.every()}


class Bench:
    """A shelf with its stores."""

    def __init__(self, repository: Repository, folder: Path) -> None:
        self.repository, self.folder = repository, folder
        self.characters, self.objects = Store(), Store()
        self.shelf = self.another_process()

    def another_process(self) -> Shelf:
        turns = Turns(self.folder)
        return Shelf(self.repository, characters=self.characters, objects=self.objects, turns=turns)

    async def publish(self, name: str, weights: bytes = WEIGHTS, pictures: tuple[bytes, ...] = ()) -> CharacterVersion:
        manifest = f"{name} {sha(weights)} {[sha(one) for one in pictures]}"
        version = CharacterVersion(
            version_id=sha(manifest.encode()),
            weights_sha256=sha(weights),
            character=NewCharacter(name=name, phrase="a black penguin", noun="penguin"),
            pack="toon",
            pack_digest="d",
            base_digest="b",
            method="import",
            step=0,
            rank=4,
            size_bytes=len(weights),
            reference_sha256s=tuple(sha(one) for one in pictures),
            job_id="",
            publish_us=now_us(),
        )
        return (await self.shelf.publish(version, manifest, weights, pictures))[0]

    async def delete(self, version: CharacterVersion, purge_us: int = LATER) -> CharacterVersion:
        return await self.shelf.delete(version.version_id, purge_us=purge_us)

    async def look(self) -> None:
        """What the runner does at every look."""
        await self.shelf.sweep()
        for version_id in await self.repository.unsettled_versions():
            await self.shelf.settle(version_id)
        for version_id in await self.repository.purgeable_versions(at_us=now_us()):
            await self.shelf.purge(version_id)

    async def listed(self, show_deleted: bool = False) -> list[str]:
        return [one.version_id for one in await self.repository.versions(limit=9, show_deleted=show_deleted)]

    async def is_right(self) -> bool:
        """Whether replicas find what is listed and nothing else, and this service has what can come back."""
        live = await self.repository.versions(limit=9)
        both = await self.repository.versions(limit=9, show_deleted=True)
        gone = [one for one in both if one.delete_us is not None]
        return (
            await self.characters.all() == {each for one in live for each in (one.version_id, one.weights_sha256)}
            and await self.objects.all()
            == {one.weights_sha256 for one in gone} | {each for one in both for each in one.reference_sha256s}
            and not await self.repository.unsettled_versions()
        )


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    url = database_url("", tmp_path)
    upgrade(url)
    engine = open_async(async_url(url))
    yield Bench(Repository(engine), tmp_path)
    await engine.dispose()


async def test_a_deleted_version_is_out_of_reach_and_comes_back_whole(bench: Bench) -> None:
    otto, rosa = await bench.publish("Otto", pictures=(b"1", b"2")), await bench.publish("Rosa", b"of Rosa")
    deleted = await bench.delete(otto)
    assert deleted.delete_us is not None
    assert deleted == replace(otto, delete_us=deleted.delete_us, purge_us=LATER)
    assert await bench.listed() == [rosa.version_id]
    assert await bench.listed(show_deleted=True) == [rosa.version_id, otto.version_id]
    assert await bench.is_right()
    assert await bench.delete(otto, purge_us=5) == deleted, "deleting again changes nothing, its time neither"
    assert await bench.shelf.undelete(otto.version_id) == otto
    assert await bench.shelf.undelete(otto.version_id) == otto
    assert await bench.characters.get(otto.weights_sha256) == WEIGHTS
    assert await bench.is_right()


async def test_weights_that_another_version_has_stay_until_the_last_one_is_deleted(bench: Bench) -> None:
    otto, ada = await bench.publish("Otto"), await bench.publish("Ada")
    assert otto.weights_sha256 == ada.weights_sha256
    await bench.delete(otto)
    assert await bench.characters.all() == {ada.version_id, ada.weights_sha256}
    await bench.delete(ada)
    assert await bench.characters.all() == set()
    await bench.shelf.undelete(otto.version_id)
    assert await bench.characters.get(otto.weights_sha256) == WEIGHTS
    assert await bench.is_right()
    await bench.shelf.undelete(ada.version_id)
    assert await bench.is_right()


async def test_what_a_purged_version_shares_stays(bench: Bench) -> None:
    await made(bench.repository, 1)
    otto = await bench.publish("Otto", pictures=(b"own", b"of both"))
    ada = await bench.publish("Ada", pictures=(b"of both",))
    eve = await bench.publish("Eve")
    await bench.delete(eve)
    await bench.delete(otto, purge_us=now_us())
    await bench.look()
    assert await bench.listed(show_deleted=True) == [eve.version_id, ada.version_id]
    assert await bench.is_right(), "Ada's weights are read, Eve's can come back, and the picture is Ada's"
    assert await bench.objects.all() == {sha(WEIGHTS), sha(b"of both")}
    with pytest.raises(CharacterVersionNotFound):
        await bench.shelf.undelete(otto.version_id)
    await bench.delete(ada, purge_us=now_us())
    await bench.look()
    await bench.shelf.undelete(eve.version_id)
    assert await bench.characters.get(sha(WEIGHTS)) == WEIGHTS
    assert await bench.is_right()
    await bench.delete(eve, purge_us=now_us())
    await bench.look()
    assert await bench.listed(show_deleted=True) == []
    assert await bench.characters.all() == await bench.objects.all() == set()


async def test_pictures_of_a_job_stay_when_its_version_is_purged_and_the_other_way_round(bench: Bench) -> None:
    picture = b"a picture of the example"
    await bench.objects.put(picture)
    await made(bench.repository, 1, frames=[StoredFrame(image_sha256=sha(picture), caption="c", description="d")])
    otto = await bench.publish("Otto", pictures=(picture,))
    await bench.delete(otto, purge_us=now_us())
    await bench.look()
    assert await bench.objects.all() == {sha(picture)}
    again = await bench.publish("Otto", pictures=(picture,))
    await bench.delete(again)
    await bench.repository.delete(job_id(1), purge_us=0)
    assert await bench.repository.own_objects(job_id(1), at_us=now_us()) == [], (
        "the deleted version may come back and needs it"
    )


async def test_the_time_to_undelete_ends_before_the_files_go(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    await bench.delete(otto, purge_us=now_us())
    with pytest.raises(CharacterVersionNotFound, match="could be undeleted is over"):
        await bench.shelf.undelete(otto.version_id)


@pytest.mark.parametrize("purge_us", [0, LATER])
async def test_publishing_a_deleted_version_again_has_it_back(bench: Bench, purge_us: int) -> None:
    otto = await bench.publish("Otto", pictures=(b"1",))
    await bench.delete(otto, purge_us=purge_us)
    back = await bench.publish("Otto", pictures=(b"1",))
    assert back == otto, "it was published then, and is again"
    await bench.look()
    assert await bench.is_right()
    assert await bench.listed() == [otto.version_id]


async def test_what_is_not_there_is_not_found(bench: Bench) -> None:
    for wish in (bench.shelf.undelete("a" * 64), bench.shelf.delete("a" * 64, purge_us=LATER)):
        with pytest.raises(CharacterVersionNotFound):
            await wish
    await bench.shelf.settle("a" * 64)
    await bench.shelf.purge("a" * 64)


# -- killed in between -----------------------------------------------------------------------------------------------


def killing(at: int, stores: tuple[Store, ...], repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the process before its change number `at`, of a store or of the database."""
    left = [at]

    def change() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    for store in stores:
        store.before_change = change
    for name in ("publish", "delete_version", "undelete_version", "unsettle_deleted", "settle", "purge_version"):
        real: Callable[..., Awaitable[Any]] = getattr(Repository, name)

        async def changed(*args: Any, _real: Callable[..., Awaitable[Any]] = real, **named: Any) -> Any:
            change()
            return await _real(repository, *args, **named)

        monkeypatch.setattr(repository, name, changed)


WISHES: dict[str, Callable[[Bench, CharacterVersion], Awaitable[Any]]] = {
    "delete": lambda bench, version: bench.delete(version),
    "undelete": lambda bench, version: bench.shelf.undelete(version.version_id),
    "publish again": lambda bench, version: bench.publish("Otto", pictures=(b"1",)),
    "purge": lambda bench, version: bench.shelf.purge(version.version_id),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wish", WISHES)
async def test_killed_anywhere_a_version_is_as_it_was_or_as_it_was_wished(
    bench: Bench, wish: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for at in range(20):
        otto = await bench.publish("Otto", pictures=(b"1",))
        ada = await bench.publish("Ada") if shared else None
        if wish != "delete":
            await bench.delete(otto, purge_us=0 if wish == "purge" else LATER)
        assert await bench.is_right()
        before = await bench.listed(), await bench.listed(show_deleted=True)
        with monkeypatch.context() as patch:
            killing(at, (bench.characters, bench.objects), bench.repository, patch)
            try:
                await WISHES[wish](bench, otto)
                was_killed = False
            except Killed:
                was_killed = True
        for store in (bench.characters, bench.objects):
            store.before_change = lambda: None
        bench.shelf = bench.another_process()
        if wish == "purge" and was_killed:
            with pytest.raises(CharacterVersionNotFound):
                await bench.shelf.undelete(otto.version_id)
        await bench.look()
        assert await bench.is_right(), at
        outcomes.append((await bench.listed(), await bench.listed(show_deleted=True)) != before)
        for each in (otto, ada):
            if each is not None and each.version_id in await bench.listed(show_deleted=True):
                if each.version_id not in await bench.listed():
                    await bench.shelf.undelete(each.version_id)
                assert await bench.characters.get(each.weights_sha256) == WEIGHTS
                assert await bench.objects.all() >= set(each.reference_sha256s)
        for each in await bench.listed():
            await bench.shelf.delete(each, purge_us=0)
        await bench.look()
        assert await bench.characters.all() == await bench.objects.all() == set()
        if not was_killed:
            break
    assert not was_killed, "there are changes that were not tried"
    assert outcomes == sorted(outcomes), "the old state first, then the new one"
    assert outcomes[-1]
    assert len(outcomes) > 3


# -- stores that are away --------------------------------------------------------------------------------------------


def away() -> None:
    raise Unavailable("the object store does not answer")


def full() -> None:
    raise StorageFull()


async def test_a_deletion_is_kept_while_a_store_is_away_and_done_when_it_is_back(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    bench.characters.before_change = away
    for _ in range(2):
        with pytest.raises(Unavailable, match="is deleted, but its files are not yet out of reach"):
            await bench.delete(otto)
        assert await bench.listed() == []
    with pytest.raises(Unavailable):
        await bench.look()
    bench.characters.before_change = lambda: None
    await bench.look()
    assert await bench.is_right()
    bench.characters.before_change = away
    with pytest.raises(Unavailable):
        await bench.shelf.undelete(otto.version_id)
    assert await bench.listed() == [], "nobody is told of one that cannot be drawn"
    bench.characters.before_change = lambda: None
    assert await bench.shelf.undelete(otto.version_id) == otto
    assert await bench.is_right()


async def test_deleting_again_says_when_the_files_are_out_of_reach(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    bench.objects.before_change = full
    with pytest.raises(Unavailable) as unsettled:
        await bench.delete(otto)
    assert unsettled.value.metadata == {"version_id": otto.version_id, "cause": "OBJECT_STORE_FULL"}
    assert await bench.characters.get(otto.weights_sha256) == WEIGHTS, "the only copy there is"
    bench.objects.before_change = lambda: None
    assert (await bench.delete(otto)).delete_us is not None
    assert await bench.is_right()


async def test_weights_are_moved_by_what_can_be_read_and_not_by_what_is_there(bench: Bench) -> None:
    """A damaged copy is put anew before the good file goes, from either store to the other."""
    otto, ada = await bench.publish("Otto"), await bench.publish("Ada")
    await bench.delete(ada)
    await bench.objects.damage(ada.weights_sha256)
    await bench.delete(otto)
    assert await bench.objects.get(otto.weights_sha256) == WEIGHTS
    assert await bench.is_right()
    await bench.shelf.undelete(ada.version_id)
    await bench.characters.damage(ada.weights_sha256)
    await bench.shelf.undelete(otto.version_id)
    assert await bench.characters.get(otto.weights_sha256) == WEIGHTS
    assert await bench.is_right()


async def test_weights_that_are_lost_are_told_of_and_the_version_stays_deleted(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    await bench.delete(otto)
    await bench.objects.delete(otto.weights_sha256)
    with pytest.raises(DataLoss, match="gone or damaged"):
        await bench.shelf.undelete(otto.version_id)
    await bench.look()
    assert await bench.listed() == []
    assert not await bench.repository.unsettled_versions()
    await bench.publish("Otto")
    assert await bench.is_right()


async def test_a_version_whose_job_went_meanwhile_leaves_nothing(bench: Bench) -> None:
    version = replace(
        await bench.publish("Otto"), version_id=sha(b"manifest"), job_id=job_id(9), weights_sha256=sha(b"w")
    )
    before = await bench.characters.all()
    with pytest.raises(CustomizationJobNotFound):
        await bench.shelf.publish(version, "manifest", b"w")
    assert await bench.characters.all() == before


# -- versions that could not be published ----------------------------------------------------------------------------


def failing_after(count: int, fail: Callable[[], None]) -> Callable[[], None]:
    left = [count]

    def change() -> None:
        left[0] -= 1
        if left[0] < 0:
            fail()

    return change


async def publish_in_vain(bench: Bench, name: str, weights: bytes, error: type[FabulaError], changes: int = 1) -> None:
    """The characters' store takes so many changes, the weights first, and then no more until this is over."""
    allowed = failing_after(changes, full if error is StorageFull else away)
    real, bench.characters.put = bench.characters.put, counted(bench.characters.put, allowed)  # type: ignore[assignment, method-assign]
    try:
        with pytest.raises(error):
            await bench.publish(name, weights, pictures=(b"1", b"2"))
    finally:
        bench.characters.put = real  # type: ignore[assignment, method-assign]


def counted(put: Put, before: Callable[[], None]) -> Put:
    async def counting(data: bytes) -> str:
        before()
        return await put(data)

    return counting


@pytest.mark.parametrize("error", [StorageFull, Unavailable])
async def test_a_version_that_could_not_be_published_leaves_nothing(bench: Bench, error: type[FabulaError]) -> None:
    otto = await bench.publish("Otto", pictures=(b"1",))
    await publish_in_vain(bench, "Rosa", b"of Rosa", error)
    await publish_in_vain(bench, "Ada", WEIGHTS, error)
    assert await bench.characters.all() == {otto.version_id, otto.weights_sha256}
    assert await bench.objects.all() == {sha(b"1")}
    assert await bench.is_right()


async def test_what_somebody_laid_there_for_an_import_stays_when_that_fails(bench: Bench) -> None:
    await bench.characters.put(b"of Rosa")
    await publish_in_vain(bench, "Rosa", b"of Rosa", StorageFull)
    assert await bench.characters.all() == {sha(b"of Rosa")}
    assert await bench.objects.all() == set()


async def test_what_is_left_while_the_database_is_away_goes_when_it_is_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: Any, **__: Any) -> Any:
        away()

    with monkeypatch.context() as patch:
        for name in ("publish", "version"):
            patch.setattr(bench.repository, name, gone)
        for _ in range(2):  # the second finds the weights of the first there, and they are not somebody else's
            with pytest.raises(Unavailable):
                await bench.publish("Rosa", b"of Rosa", pictures=(b"1",))
        with pytest.raises(Unavailable):
            await bench.look()
    assert sha(b"of Rosa") in await bench.characters.all(), "nobody can say yet whether the version is there"
    await bench.look()
    assert await bench.characters.all() == await bench.objects.all() == set()


async def test_what_was_published_after_all_is_left_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.repository.publish

    async def unheard(*args: Any, **named: Any) -> Any:
        await real(*args, **named)
        away()

    with monkeypatch.context() as patch:
        patch.setattr(bench.repository, "publish", unheard)
        with pytest.raises(Unavailable):
            await bench.publish("Rosa", b"of Rosa", pictures=(b"1",))
    await bench.look()
    assert len(await bench.listed()) == 1
    assert await bench.is_right()


async def test_nothing_is_swept_while_somebody_else_puts(bench: Bench) -> None:
    """Who puts the same weights now has said so to nobody yet."""
    async with bench.another_process().putting():
        await publish_in_vain(bench, "Rosa", b"of Rosa", StorageFull)
        assert await bench.characters.all() == {sha(b"of Rosa")}
    await bench.look()
    assert await bench.characters.all() == await bench.objects.all() == set()


# -- callers who hang up ---------------------------------------------------------------------------------------------


async def hang_up(store: Store, task: asyncio.Task[Any]) -> None:
    """The caller's deadline passes while files are being put, which then goes on."""
    await store.putting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    store.go_on.set()


async def test_what_a_caller_began_is_finished_though_the_caller_hung_up(bench: Bench) -> None:
    bench.characters.slow()
    await hang_up(bench.characters, asyncio.create_task(bench.publish("Otto", pictures=(b"1",))))
    async with bench.shelf.alone():
        (otto,) = await bench.repository.versions(limit=9)
    assert await bench.is_right()
    bench.objects.slow()
    await hang_up(bench.objects, asyncio.create_task(bench.delete(otto)))
    async with bench.shelf.alone():
        assert await bench.listed() == []
    assert await bench.is_right()
    bench.characters.slow()
    await hang_up(bench.characters, asyncio.create_task(bench.shelf.undelete(otto.version_id)))
    async with bench.shelf.alone():
        assert await bench.listed() == [otto.version_id]
    await bench.look()
    assert await bench.is_right()


async def test_a_caller_who_hangs_up_while_waiting_began_nothing(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    async with bench.another_process().alone():
        waiting = [asyncio.create_task(bench.publish("Ada")), asyncio.create_task(bench.delete(otto))]
        await asyncio.wait(waiting, timeout=0.1)
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
    async with bench.shelf.alone():
        assert await bench.listed() == [otto.version_id]
    assert await bench.is_right()


# -- taking turns ----------------------------------------------------------------------------------------------------


async def test_nobody_publishes_what_another_process_is_removing(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    other = bench.another_process()
    async with other.alone():
        waiting = [asyncio.create_task(bench.publish("Ada")), asyncio.create_task(bench.delete(otto))]
        done, _ = await asyncio.wait(waiting, timeout=0.2)
        assert not done
        assert await bench.listed() == [otto.version_id]
    await asyncio.gather(*waiting)
    assert await bench.is_right()


async def test_one_publishes_while_another_puts_and_nobody_deletes_meanwhile(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    async with bench.another_process().putting():
        ada = await bench.publish("Ada", b"of Ada")
        deleting = asyncio.create_task(bench.delete(otto))
        done, _ = await asyncio.wait((deleting,), timeout=0.2)
        assert not done
        assert await bench.listed() == [ada.version_id, otto.version_id]
    await deleting
    assert await bench.is_right()


async def test_a_version_is_back_at_once_while_another_puts_and_settled_later(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    await bench.delete(otto)
    async with bench.another_process().putting():
        assert await bench.shelf.undelete(otto.version_id) == otto
        assert await bench.characters.get(otto.weights_sha256) == WEIGHTS
        assert await bench.objects.all() == {otto.weights_sha256}, "removing it is for one who is alone"
    await bench.look()
    assert await bench.is_right()


async def test_the_shelf_is_free_again_after_whoever_failed(bench: Bench) -> None:
    with pytest.raises(Unavailable):
        async with bench.shelf.alone():
            away()
    await bench.publish("Otto")
    assert await bench.is_right()
