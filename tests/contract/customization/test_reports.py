"""The page on a job: made while it goes on, kept when it ends, gone when it is purged. Over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from fabula.customization.v1 import customization_service_pb2 as pb

from services.customization import reporting
from services.runtime.errors import ObjectNotFound
from services.runtime.store import ObjectStore
from tests.contract.customization.harness import WAIT_S, Service, State, example, running

pytestmark = pytest.mark.timeout(600)
NOWHERE = "00000000-0000-7000-8000-000000000000"


async def page(service: Service, job_id: str) -> str:
    return (await service.bytes_of("ReadReport", pb.ReadReportRequest(job_id=job_id))).decode()


async def kept(service: Service) -> list[str]:
    """Every page in the object store."""
    store = ObjectStore.open("", service.home / "customization" / "objects")
    found = []
    async for one in store.every():
        with contextlib.suppress(ObjectNotFound):  # gone since it was listed
            found.append(await store.get(one.sha256))
    return [each.decode() for each in found if each.startswith(b"<!doctype html>")]


async def until_kept(service: Service, count: int, containing: str = "") -> list[str]:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if len(pages := [one for one in await kept(service) if containing in one]) == count:
            return pages
        await asyncio.sleep(0.05)
    raise AssertionError(f"there are {len(pages)} pages")


async def until_known(service: Service, job_id: str) -> str:
    """The digest of a job's page, once its row has it: the page itself is there a moment before."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if sha256 := await service.process.api._repository.kept_report(job_id):
            return sha256
        await asyncio.sleep(0.05)
    raise AssertionError(f"no page of {job_id} is known")


async def test_the_page_is_made_while_the_job_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path, PRETEND_STEP_S=0.2) as service:
        job = await service.create()
        await service.until_step(job.job_id, 2)
        told = await page(service, job.job_id)
        assert job.job_id in told
        assert "running" in told
        assert not await kept(service)


async def test_a_page_shows_the_example_the_probes_the_losses_and_what_to_publish(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        (told,) = await until_kept(service, 1)
    _, frames = example()
    assert frames[0].caption in told
    assert told.count("data:image/png;base64,") >= len(frames)
    assert "Publish step 30" in told
    assert "<b>total</b>" in told
    assert "Otto runs." in told, "what the probe was drawn from"


def figures(recognised: float, kept: float) -> dict[str, float]:
    return {"recognised": recognised, "look_alike": 0.0, "kept": kept}


async def test_what_is_forgotten_is_forgotten_since_before_the_first_step(tmp_path: Path) -> None:
    """Though the first checkpoint that could tell is the last one, and has forgotten all of it already."""
    told = {0: figures(0.1, 0.95), 30: figures(0.9, 0.7)}
    async with running(tmp_path, snapshots=1, PRETEND_FIGURES=json.dumps(told)) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        (page_,) = await until_kept(service, 1)
    assert "the old cast has lost 25% of theirs" in page_
    assert "−25 points since step 0" in page_
    assert '<th scope="row">before</th><td>10%</td><td>0%</td><td>95%</td>' in page_


async def test_the_checkpoint_that_is_suggested_has_forgotten_least_since_before(tmp_path: Path) -> None:
    """Beside the first checkpoint alone the second one would have forgotten nothing, and be no better."""
    told = {0: figures(0.1, 0.95), 15: figures(0.81, 0.7), 30: figures(0.82, 0.8)}
    async with running(tmp_path, snapshots=2, PRETEND_FIGURES=json.dumps(told)) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        found = [(one.step, one.is_suggested) for one in await service.checkpoints(job.job_id)]
        assert found == [(15, False), (30, True)]
        assert (await service.publish(job.job_id)).step == 30


async def test_what_was_kept_is_read_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        (told,) = await until_kept(service, 1)

        def never(_report: Any) -> str:
            raise AssertionError("the page is made again")

        monkeypatch.setattr(reporting, "report_page", never)
        assert await page(service, job.job_id) == told
        await service.publish(job.job_id)
        assert await page(service, job.job_id) == told


async def test_a_page_that_is_lost_is_made_again(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        (told,) = await until_kept(service, 1)
        for path in (tmp_path / "customization" / "objects").rglob("*"):
            if path.is_file() and path.read_bytes().startswith(b"<!doctype"):
                path.unlink()
        assert await page(service, job.job_id) == told


async def test_a_job_that_ends_again_has_a_new_page_and_the_old_one_goes(tmp_path: Path) -> None:
    async with running(tmp_path, PRETEND_FAIL_AT=12) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_FAILED)
        (failed,) = await until_kept(service, 1)
        assert "LOSS_NOT_FINITE" in failed
        (service.folder(job.job_id) / "mended").touch()
        await service.wish("Resume", job.job_id)
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        await until_kept(service, 0, "LOSS_NOT_FINITE")
        (done,) = await until_kept(service, 1)
        assert "succeeded" in done
        assert await page(service, job.job_id) == done


async def test_a_service_that_was_away_when_the_job_ended_keeps_the_page_later(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        await until_kept(service, 1)
        objects = ObjectStore.open("", tmp_path / "customization" / "objects")
        repository = service.process.api._repository
        await objects.delete(await until_known(service, job.job_id))
        await repository.keep_report(job.job_id, "0" * 64, at_us=0)  # as one of before the end
    async with running(tmp_path) as again:
        await until_kept(again, 1, job.job_id)


async def test_deleting_a_job_for_good_removes_its_page(tmp_path: Path) -> None:
    async with running(tmp_path, keep_deleted_s=0.5) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        await until_kept(service, 1)
        await service.wish("Delete", job.job_id)
        await until_kept(service, 0)
        assert (await service.refusal(page(service, job.job_id)))[1] == "CUSTOMIZATION_JOB_NOT_FOUND"


async def test_nobody_has_a_page_of_no_job(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        for job_id in (NOWHERE, "../etc", ""):
            assert (await service.refusal(page(service, job_id)))[1] == "CUSTOMIZATION_JOB_NOT_FOUND"
