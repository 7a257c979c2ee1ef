"""What the database keeps of jobs: migrations against tables, and the order of what waits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine

from services.customization.checks import Finding
from services.customization.database import VERSION_TABLE, async_url, database_url, is_current, upgrade
from services.customization.estimate import estimate, left_s
from services.customization.records import (
    CharacterVersion,
    Checkpoint,
    CheckpointSaved,
    Estimate,
    Following,
    NewCharacter,
    ProbeDrawn,
    Progress,
    StateChanged,
    StoredFrame,
    TrainingSettings,
    VersionPublished,
    to_json,
    version_from_json,
)
from services.customization.repository import Repository
from services.customization.schema import metadata
from services.customization.states import State
from services.runtime.config import ConfigInvalid
from services.runtime.database import now_us, open_async
from services.runtime.errors import CustomizationJobNotFound, IdempotencyKeyReused, QueueFull

SETTINGS = TrainingSettings(
    pack="toon",
    pack_digest="d",
    method="lora",
    learns="",
    steps=100,
    budget_s=None,
    rate=None,
    seed=1,
    threads=2,
    snapshots=5,
    save_every_s=30.0,
)
ESTIMATE = Estimate(compute_s=100.0, is_gpu=False, min_eta_s=1.0, max_eta_s=2.0, measured_count=0)
FRAMES = [StoredFrame(image_sha256=str(number) * 64, caption="c", description="d") for number in range(5)]


def job_id(number: int) -> str:
    return f"00000000-0000-7000-8000-{number:012d}"


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[Repository]:
    url = database_url("", tmp_path)
    upgrade(url)
    engine = open_async(async_url(url))
    yield Repository(engine)
    await engine.dispose()


async def made(
    repository: Repository,
    number: int,
    request_id: str = "",
    body: str = "b",
    room: int = 10,
    settings: TrainingSettings = SETTINGS,
    frames: Sequence[StoredFrame] = FRAMES,
) -> bool:
    _, is_new = await repository.create(
        job_id=job_id(number),
        character=NewCharacter(name="Otto", phrase="a black penguin", noun="penguin"),
        frames=frames,
        settings=settings,
        findings=[Finding(code="FRAMES_FEW", severity="warning", message="m", mend="n")],
        estimate=ESTIMATE,
        request_id=request_id,
        body_sha256=body,
        max_queued=room,
    )
    return is_new


def test_the_migrations_make_the_tables(tmp_path: Path) -> None:
    url = database_url("", tmp_path)
    upgrade(url)
    upgrade(url)
    assert is_current(url)
    with create_engine(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_where_the_database_is(tmp_path: Path) -> None:
    assert database_url("", tmp_path) == f"sqlite:///{tmp_path}/customization.db"
    assert database_url(f"sqlite:///{tmp_path}/fabula.db", tmp_path) == f"sqlite:///{tmp_path}/customization.db"
    assert database_url("postgresql://me:secret@db/fabula", tmp_path).startswith("postgresql+psycopg://me:secret@db/")
    for bad in ("sqlite://", "mysql://db/x"):
        with pytest.raises(ConfigInvalid):
            database_url(bad, tmp_path)


async def test_a_job_is_kept_whole(repository: Repository) -> None:
    assert await made(repository, 1)
    job = await repository.get(job_id(1))
    assert (job.state, job.settings, job.estimate, job.frames) == (State.VALIDATING, SETTINGS, ESTIMATE, tuple(FRAMES))
    assert job.findings[0].code == "FRAMES_FEW"
    assert job.progress is None
    (event,) = await repository.events(job_id(1), after=0)
    assert (event.sequence, event.what) == (1, StateChanged(state=State.VALIDATING, attempt=0))
    with pytest.raises(CustomizationJobNotFound):
        await repository.get(job_id(2))


async def test_a_request_id_names_one_job(repository: Repository) -> None:
    assert await made(repository, 1, "r")
    assert not await made(repository, 2, "r")
    with pytest.raises(IdempotencyKeyReused):
        await made(repository, 3, "r", body="other")
    with pytest.raises(QueueFull):
        await made(repository, 4, room=1)
    assert [job.job_id for job in await repository.page(limit=9)] == [job_id(1)]


async def test_who_was_put_into_the_queue_first_is_first(repository: Repository) -> None:
    for number in (1, 2, 3):
        await made(repository, number)
    for number in (3, 1, 2):
        assert await repository.change_state(job_id(number), State.QUEUED, only_from={State.VALIDATING})
    assert await repository.in_states({State.QUEUED}) == [job_id(3), job_id(1), job_id(2)]
    assert [(await repository.position(job_id(number)))[2] for number in (3, 1, 2)] == [0, 1, 2]
    assert await repository.begin_attempt(job_id(3), in_state=State.QUEUED, following=Following()) == 1
    assert (await repository.position(job_id(2)))[2] == 2, "who is being trained is before who waits"
    assert await repository.begin_attempt(job_id(3), in_state=State.QUEUED, following=Following()) is None


async def test_what_is_told_twice_is_recorded_once(repository: Repository) -> None:
    await made(repository, 1)
    checkpoint = Checkpoint(step=5, weights_sha256="a" * 64, size_bytes=9, rank=4, create_us=1)
    probe = ProbeDrawn(step=5, probe="alone", description="d", image_sha256="e" * 64)
    for offset in (10, 20):
        await repository.record(
            job_id(1),
            following=Following(offset_bytes=offset),
            happened=[CheckpointSaved(checkpoint=checkpoint), probe],
            progress=Progress(step=5, step_count=9, losses={"total": 1.0}, eta_s=3.0),
            cards={5: ("w.safetensors", {"weights": {}})},
        )
    assert [type(event.what).__name__ for event in await repository.events(job_id(1), after=1)] == [
        "CheckpointSaved",
        "ProbeDrawn",
    ]
    assert (await repository.following(job_id(1))).offset_bytes == 20
    assert (await repository.checkpoint(job_id(1), 5))[0] == checkpoint
    assert await repository.has_image(job_id(1), "e" * 64)


async def test_purging_says_which_pictures_nobody_has_any_more(repository: Repository) -> None:
    await made(repository, 1)
    await made(repository, 2)
    probe = ProbeDrawn(step=0, probe="alone", description="d", image_sha256="e" * 64)
    await repository.record(job_id(1), following=Following(), happened=[probe])
    await repository.delete(job_id(1), purge_us=5)
    assert await repository.purgeable(at_us=4) == []
    assert await repository.purgeable(at_us=5) == [job_id(1)]
    own = await repository.own_objects(job_id(1), at_us=5)
    assert own == ["e" * 64], "the example's pictures are the other job's, too"
    assert not await repository.purge(job_id(1), at_us=5, removed=()), "what is not removed yet is not forgotten"
    assert await repository.purge(job_id(1), at_us=5, removed=own)
    with pytest.raises(CustomizationJobNotFound):
        await repository.get(job_id(1))


async def test_only_a_deleted_job_whose_time_is_over_is_purged_and_then_it_cannot_come_back(
    repository: Repository,
) -> None:
    for number in (1, 2, 3):
        await made(repository, number)
        await repository.change_state(job_id(number), State.QUEUED, only_from={State.VALIDATING})
    assert await repository.begin_attempt(job_id(1), in_state=State.QUEUED, following=Following()) == 1
    await repository.delete(job_id(1), purge_us=5)  # its process lives on
    await repository.delete(job_id(2), purge_us=now_us() + 10**12)
    for number in (1, 2, 3, 4):
        assert await repository.own_objects(job_id(number), at_us=now_us()) is None
        assert not await repository.purge(job_id(number), at_us=now_us(), removed=["e" * 64])
    assert (await repository.undelete(job_id(2))).purge_us is None
    assert (await repository.undelete(job_id(3))).delete_us is None
    await repository.delete(job_id(2), purge_us=5)
    with pytest.raises(CustomizationJobNotFound, match="could be undeleted is over"):
        await repository.undelete(job_id(2))
    assert await repository.begin_attempt(job_id(2), in_state=State.QUEUED, following=Following()) is None
    assert (await repository.get(job_id(2))).state is State.QUEUED
    assert await repository.purgeable(at_us=now_us()) == [job_id(2)]


async def test_what_was_measured_before_the_first_step_stays_with_the_job(repository: Repository) -> None:
    await made(repository, 1)
    assert (await repository.get(job_id(1))).baseline == {}
    await repository.record(job_id(1), following=Following(), happened=(), baseline={"kept": 0.9})
    await repository.record(job_id(1), following=Following(offset_bytes=9), happened=())
    assert (await repository.get(job_id(1))).baseline == {"kept": 0.9}


def test_what_is_kept_of_a_version_the_release_before_can_read() -> None:
    version = CharacterVersion(
        version_id="v",
        weights_sha256="w",
        character=NewCharacter(name="Otto", phrase="a black penguin", noun="penguin"),
        pack="toon",
        pack_digest="d",
        base_digest="b",
        method="lora",
        step=5,
        rank=4,
        size_bytes=9,
        reference_sha256s=("r",),
        job_id=job_id(1),
        publish_us=1,
        delete_us=2,
        purge_us=3,
    )
    assert not to_json(version).keys() & {"delete_us", "purge_us"}, "it knows no such fields, and they have columns"
    assert not to_json(VersionPublished(version=version))["version"].keys() & {"delete_us", "purge_us"}
    assert version_from_json(to_json(version)) == replace(version, delete_us=None, purge_us=None)


# -- what a job costs and takes --------------------------------------------------------------------------------------


def test_an_estimate_is_as_wide_as_it_is_unsure() -> None:
    guessed = estimate(SETTINGS, measured=[], ahead=[])
    measured = estimate(SETTINGS, measured=[1.0, 2.0, 3.0], ahead=[])
    assert (guessed.measured_count, measured.measured_count) == (0, 3)
    assert measured.compute_s == pytest.approx((100 * 2.0 + 30.0) * 2)  # steps of the median, a start, two cores
    assert guessed.max_eta_s / guessed.min_eta_s > measured.max_eta_s / measured.min_eta_s > 1.0
    on_gpu = estimate(SETTINGS, measured=[2.0], ahead=[], gpus=1.0)
    assert on_gpu.is_gpu
    assert on_gpu.compute_s == pytest.approx(230.0)
    budgeted = estimate(replace(SETTINGS, budget_s=600.0, steps=0), measured=[5.0], ahead=[])
    assert budgeted.compute_s == pytest.approx(1260.0)


async def test_a_job_is_measured_on_jobs_of_as_many_workers(repository: Repository) -> None:
    for number, workers, speed in ((1, 0, 1.0), (2, 2, 3.0), (3, 2, 4.0)):
        await made(repository, number, settings=replace(SETTINGS, workers=workers))
        await repository.set_following(job_id(number), Following(seconds_a_step=speed))
    like = {"pack_digest": "d", "method": "lora", "learns": ""}
    assert await repository.measured(**like, workers=0) == [1.0]
    assert await repository.measured(**like, workers=2) == [4.0, 3.0]
    assert await repository.measured(**like, workers=3) == []


async def test_who_waits_waits_for_those_before(repository: Repository) -> None:
    await made(repository, 1)
    job = await repository.get(job_id(1))
    alone = estimate(SETTINGS, measured=[1.0], ahead=[])
    behind = estimate(SETTINGS, measured=[1.0], ahead=[job, job])
    assert behind.compute_s == alone.compute_s, "waiting costs nothing"
    assert behind.min_eta_s == pytest.approx(alone.min_eta_s + 2 * left_s(job)[0])
    nearly_done = replace(job, state=State.RUNNING, progress=Progress(step=99, step_count=100, losses={}, eta_s=2.0))
    assert left_s(nearly_done)[1] < left_s(job)[0]
