"""Looks at jobs and looks at files: neither keeps the other waiting, trouble is told in a line, nothing is lost."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.customization.backends import NO_ROOM, PROGRESS_FILE, Ended
from services.customization.config import CustomizationSettings
from services.customization.events import Broadcaster
from services.customization.local import LocalBackend
from services.customization.records import Following, StoredFrame
from services.customization.runner import Runner
from services.customization.states import State
from services.runtime.database import now_us
from services.runtime.errors import CustomizationJobNotFound, DataLoss, StorageFull
from tests.unit.customization.test_repository import job_id, made
from tests.unit.customization.test_shelf import LATER, Bench, Killed, bench, sha

__all__ = ["bench"]  # a fixture

LOOKS = 1000  # of waiting for what is to come


def runner_of(bench: Bench, backend: Any = None) -> Runner:
    """Without a backend no job may come so far."""
    return Runner(
        repository=bench.repository,
        objects=bench.objects,
        shelf=bench.shelf,
        backend=backend,
        broadcaster=Broadcaster(),
        settings=CustomizationSettings(poll_s=0.01),
        folder=bench.folder / "jobs",
        pack_folders=(),
    )


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Runner]:
    runner = runner_of(bench)
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


# -- what a process told ---------------------------------------------------------------------------------------------


class Gone:
    """A backend whose processes have all ended, nobody knows how."""

    async def look(self, run: Any) -> Ended:
        return Ended()


async def provisioned(bench: Bench, number: int) -> Path:
    """A job in its first attempt. Returns its folder."""
    await made(bench.repository, number)
    await bench.repository.change_state(job_id(number), State.QUEUED, only_from={State.VALIDATING})
    await bench.repository.begin_attempt(job_id(number), in_state=State.QUEUED, following=Following())
    folder = bench.folder / "jobs" / job_id(number)
    folder.mkdir(parents=True)
    return folder


def told(folder: Path, *lines: dict[str, Any]) -> None:
    with (folder / PROGRESS_FILE).open("a") as file:
        file.writelines(json.dumps({"at": 1.0, **line}) + "\n" for line in lines)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_of_a_job_that_ended_while_the_service_was_away_everything_is_read(bench: Bench, cancelled: bool) -> None:
    """More than is read at once."""
    folder = await provisioned(bench, 1)
    weights = {"sha256": "a" * 64, "size_bytes": 9, "rank": 4}
    (folder / "w.json").write_text(json.dumps({"weights": weights}))
    told(folder, {"event": "began", "steps": 40_000})
    told(folder, *({"event": "step", "step": step, "losses": {"total": 0.5}} for step in range(1, 40_001)))
    assert (folder / PROGRESS_FILE).stat().st_size > 2 << 20
    told(folder, {"event": "snapshot", "step": 40_000, "file": str(folder / "w.safetensors")})
    told(folder, {"event": "ended", "outcome": "succeeded"})
    if cancelled:
        await bench.repository.change_state(job_id(1), State.CANCELLING, only_from={State.PROVISIONING})
    await runner_of(bench, Gone())._follow(job_id(1))
    job = await bench.repository.get(job_id(1))
    assert job.state is (State.CANCELLED if cancelled else State.SUCCEEDED)
    assert [one.step for one in await bench.repository.checkpoints(job_id(1))] == [40_000]
    assert job.progress is not None
    assert job.progress.step == 40_000
    assert job.attempt == 1


async def test_a_full_disk_is_told_once_there_is_room_to_record_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await provisioned(bench, 1)
    backend = LocalBackend(niceness=0, program=("/bin/sh", "-c", f"exit {NO_ROOM}"))
    runner = runner_of(bench, backend)
    run = runner._run(await bench.repository.get(job_id(1)))
    await backend.start(run)

    async def full(*_: Any, **__: Any) -> bool:
        raise StorageFull()

    async def ended() -> bool:
        return await backend.look(run) is not None

    assert await seen(ended)
    with monkeypatch.context() as away:
        away.setattr(bench.repository, "change_state", full)
        with pytest.raises(StorageFull):
            await runner._follow(job_id(1))
    await runner._follow(job_id(1))
    job = await bench.repository.get(job_id(1))
    assert (job.state, job.reason, job.attempt) == (State.FAILED, "DISK_FULL", 1)


# -- going for good --------------------------------------------------------------------------------------------------


async def deleted(bench: Bench, number: int, picture: bytes = b"", purge_us: int = 0) -> Path:
    """A job that is deleted, with a folder and a picture of its own. Returns the folder."""
    data = picture or f"picture of job {number}".encode()
    stored = StoredFrame(image_sha256=await bench.objects.put(data), caption="c", description="d")
    await made(bench.repository, number, frames=[stored])
    await bench.repository.change_state(job_id(number), State.CANCELLED, only_from={State.VALIDATING})
    await bench.repository.delete(job_id(number), purge_us=purge_us)
    folder = bench.folder / "jobs" / job_id(number)
    (folder / "story").mkdir(parents=True)
    return folder


async def test_a_job_that_came_back_while_its_purge_waited_stays_whole(bench: Bench) -> None:
    soon = now_us() + 10**12
    folder = await deleted(bench, 1, b"1", purge_us=soon)
    runner = runner_of(bench)
    assert await bench.repository.purgeable(at_us=soon) == [job_id(1)]  # as somebody saw it whose clock is ahead
    await runner._purge(job_id(1))
    await bench.repository.undelete(job_id(1))
    await runner._purge(job_id(1))
    assert (await bench.repository.get(job_id(1))).delete_us is None
    assert folder.is_dir()
    assert await bench.objects.all() == {sha(b"1")}


async def test_a_purge_that_is_killed_anywhere_is_done_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = await deleted(bench, 1)
    runner = runner_of(bench)

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    for of, name in ((shutil, "rmtree"), (bench.objects, "before_change"), (bench.repository, "purge")):
        with monkeypatch.context() as dying:
            dying.setattr(of, name, killed)
            with pytest.raises(Killed):
                await runner._purge(job_id(1))
        assert await bench.repository.purgeable(at_us=now_us()) == [job_id(1)], "until all is gone it is known"
    await runner._purge(job_id(1))
    assert not folder.exists()
    assert await bench.objects.all() == set()
    with pytest.raises(CustomizationJobNotFound):
        await bench.repository.get(job_id(1))


async def test_a_probe_that_is_told_of_while_the_same_picture_is_purged_is_kept(bench: Bench) -> None:
    await deleted(bench, 1, b"a probe")
    folder = await provisioned(bench, 2)
    (folder / "probe.png").write_bytes(b"a probe")
    facts = {"step": 5, "probe": "alone", "description": "d", "file": str(folder / "probe.png")}
    told(folder, {"event": "probe", **facts})
    runner = runner_of(bench, Gone())
    removing, go_on = asyncio.Event(), asyncio.Event()
    real = bench.objects.delete

    async def slowly(sha256: str) -> None:
        removing.set()
        await go_on.wait()
        await real(sha256)

    bench.objects.delete = slowly  # type: ignore[method-assign]
    purging = asyncio.create_task(runner._purge(job_id(1)))
    await asyncio.wait_for(removing.wait(), 30)
    reading = asyncio.create_task(runner._read(await bench.repository.get(job_id(2))))
    await asyncio.sleep(0.3)  # time to put it, if it did not wait
    go_on.set()
    await asyncio.gather(purging, reading)
    assert await bench.repository.has_image(job_id(2), sha(b"a probe"))
    assert await bench.objects.get(sha(b"a probe")) == b"a probe"
