"""Looks at jobs and looks at files: neither keeps the other waiting, and trouble is told of in a line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from structlog.testing import capture_logs

from services.customization.config import CustomizationSettings
from services.customization.events import Broadcaster
from services.customization.runner import Runner
from services.customization.states import State
from services.runtime.errors import DataLoss, StorageFull
from tests.unit.customization.test_repository import job_id, made
from tests.unit.customization.test_shelf import LATER, Bench, bench

__all__ = ["bench"]  # a fixture

LOOKS = 1000  # of waiting for what is to come


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Runner]:
    runner = Runner(
        repository=bench.repository,
        objects=bench.objects,
        shelf=bench.shelf,
        backend=None,  # type: ignore[arg-type]  # no job comes so far
        broadcaster=Broadcaster(),
        settings=CustomizationSettings(poll_s=0.01),
        folder=bench.folder / "jobs",
        pack_folders=(),
    )
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        runner.stop()
        await task


async def seen(what: Callable[[], Awaitable[bool]]) -> bool:
    for _ in range(LOOKS):
        if await what():
            return True
        await asyncio.sleep(0.01)
    return False


async def test_jobs_are_looked_at_while_files_wait_for_their_turn(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    waiting = asyncio.Event()
    real = bench.shelf.settle

    async def settle(version_id: str) -> None:
        waiting.set()
        await real(version_id)

    bench.shelf.settle = settle  # type: ignore[method-assign]
    async with bench.another_process().putting():
        await bench.repository.delete_version(otto.version_id, purge_us=LATER)  # one that was killed then
        async with running(bench):
            await asyncio.wait_for(waiting.wait(), 30)
            await made(bench.repository, 1)

            async def failed() -> bool:
                return (await bench.repository.get(job_id(1))).state is State.FAILED  # its pictures are not there

            assert await seen(failed)
            assert otto.weights_sha256 in await bench.characters.all()
        # It could be stopped, though it waited still; the next one does what is left.

    async def settled() -> bool:
        return not await bench.repository.unsettled_versions()

    async with running(bench):
        assert await seen(settled)
    assert await bench.characters.all() == set()


async def test_files_are_brought_where_they_belong_and_removed_beside_the_looks(bench: Bench) -> None:
    otto, ada = await bench.publish("Otto", pictures=(b"1",)), await bench.publish("Ada")
    await bench.repository.delete_version(otto.version_id, purge_us=LATER)
    await bench.repository.delete_version(ada.version_id, purge_us=0)
    async with running(bench):

        async def tidy() -> bool:
            return await bench.is_right() and await bench.listed(show_deleted=True) == [otto.version_id]

        assert await seen(tidy)


async def test_a_full_disk_and_damaged_files_are_told_of_without_a_traceback(bench: Bench) -> None:
    otto = await bench.publish("Otto")
    await bench.repository.delete_version(otto.version_id, purge_us=LATER)

    def full() -> None:
        raise StorageFull()

    bench.objects.before_change = full
    with capture_logs() as told:
        async with running(bench) as runner:

            async def logged() -> bool:
                return any(one["event"] == "version_look_failed" for one in told)

            assert await seen(logged)

            async def damaged(_: str) -> Any:
                raise DataLoss("gone")

            async def broken(_: str) -> Any:
                raise ValueError

            await runner._guarded(damaged, "a", "version")
            await runner._guarded(broken, "b", "version")
    by_reason = {one.get("reason", ""): one for one in told if one["event"] == "version_look_failed"}
    for reason in ("OBJECT_STORE_FULL", "DATA_LOSS"):
        assert by_reason[reason]["log_level"] == "warning"
        assert "exc_info" not in by_reason[reason]
    assert "exc_info" in by_reason[""], "what nobody expected comes with all that is known of it"
