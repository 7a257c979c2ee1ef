"""The customization service over real gRPC, with a trainer that only pretends: what a caller may rely on.

The trainer keeps checkpoints, hears signals and tells its progress like the real one, and every one of its steps counts
in what it leaves, so equal weights mean that each step was taken once and in order.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fabula.customization.v1 import customization_service_pb2 as pb
from fabula.customization.v1 import job_pb2
from google.protobuf.duration_pb2 import Duration

from services.runtime.store import ObjectStore
from tests.contract.customization.harness import (
    WAIT_S,
    Client,
    KillableService,
    Service,
    State,
    eventually,
    example,
    is_trained,
    kill_driver,
    refused,
    request,
    running,
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with running(tmp_path) as started:
        yield started


def states(events: list[job_pb2.CustomizationEvent]) -> list[str]:
    """The states that were told of, one behind the other."""
    told = [event.state_changed.state for event in events if event.WhichOneof("event") == "state_changed"]
    names = [State.State.Name(state).removeprefix("STATE_") for state in told]
    return [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]


def steps(events: list[job_pb2.CustomizationEvent]) -> list[int]:
    """The steps that were told of."""
    return [event.progress.step for event in events if event.WhichOneof("event") == "progress"]


def assert_gapless(events: list[job_pb2.CustomizationEvent]) -> None:
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a job that nothing happened to."""

    async def train() -> str:
        async with running(tmp_path_factory.mktemp("undisturbed")) as service:
            job = await service.create()
            await service.until(job.job_id, State.STATE_SUCCEEDED)
            return (await service.checkpoints(job.job_id))[-1].weights_sha256

    return asyncio.run(train())


async def weights_of(client: Client, job_id: str) -> str:
    checkpoints = await client.checkpoints(job_id)
    assert [one.step for one in checkpoints] == [6, 12, 18, 24, 30]
    return checkpoints[-1].weights_sha256


async def test_a_job_is_trained_watched_and_published(service: Service) -> None:
    job = await service.create()
    assert job.state == State.STATE_VALIDATING
    assert (job.character.name, job.character.noun) == ("Otto", "penguin")
    assert (job.settings.pack, job.settings.method, job.settings.steps, job.settings.seed) == ("toon", "epicevo", 30, 7)
    events = await service.durable(job.job_id)
    assert_gapless(events)
    assert states(events) == ["VALIDATING", "QUEUED", "PROVISIONING", "RUNNING", "SUCCEEDED"]
    told = steps(events)
    assert told == sorted(set(told))
    assert told[-1] == 30
    checkpoints = await service.checkpoints(job.job_id)
    assert [one.step for one in checkpoints] == [6, 12, 18, 24, 30]
    assert [one.is_suggested for one in checkpoints] == [False] * 4 + [True]
    probes = [event.probe_drawn for event in events if event.WhichOneof("event") == "probe_drawn"]
    assert [(one.step, one.probe) for one in probes] == [(6, "alone"), (12, "alone"), (18, "alone"), (24, "alone")]
    picture = await service.bytes_of("ReadImage", pb.ReadImageRequest(job_id=job.job_id, sha256=probes[0].image_sha256))
    assert picture.startswith(b"a picture of ")

    done = await service.job(job.job_id)
    assert (done.state, done.attempt, done.progress.step) == (State.STATE_SUCCEEDED, 1, 30)
    assert done.progress.losses["total"] == pytest.approx(1 / 30, abs=1e-5)
    assert done.start_time.ToNanoseconds() >= done.create_time.ToNanoseconds()
    assert done.end_time.ToNanoseconds() > done.start_time.ToNanoseconds()

    version = await service.publish(job.job_id)
    assert (version.step, version.weights_sha256) == (30, checkpoints[-1].weights_sha256)
    assert len(version.reference_sha256s) == 5
    assert await service.publish(job.job_id) == version, "publishing again changes nothing"
    earlier = await service.publish(job.job_id, step=12)
    assert earlier.version_id != version.version_id
    # Where frame replicas read: content-addressed, so the name proves the bytes.
    characters = ObjectStore.open("", service.home / "characters")
    assert hashlib.sha256(await characters.get(version.weights_sha256)).hexdigest() == version.weights_sha256
    manifest = json.loads(await characters.get(version.version_id))
    assert manifest["weights"]["sha256"] == version.weights_sha256
    weights = await service.bytes_of("ReadWeights", pb.ReadWeightsRequest(version_id=version.version_id))
    assert hashlib.sha256(weights).hexdigest() == version.weights_sha256
    found = (await service.call("ListCharacterVersions", pb.ListCharacterVersionsRequest(name="Otto"))).versions
    assert [one.version_id for one in found] == [earlier.version_id, version.version_id]
    assert [one.version_id for one in (await service.job(job.job_id)).versions] == [
        version.version_id,
        earlier.version_id,
    ]
    after = await service.durable(job.job_id, after=done.last_sequence)
    assert [event.WhichOneof("event") for event in after] == ["version_published"] * 2


async def test_equal_jobs_make_equal_versions(service: Service) -> None:
    first, second = [await service.create() for _ in range(2)]
    await service.until(first.job_id, State.STATE_SUCCEEDED)
    await service.until(second.job_id, State.STATE_SUCCEEDED)
    versions = [await service.publish(job.job_id) for job in (first, second)]
    assert versions[0].version_id == versions[1].version_id
    other = await service.create(seed=8)
    await service.until(other.job_id, State.STATE_SUCCEEDED)
    assert (await service.publish(other.job_id)).weights_sha256 != versions[0].weights_sha256


async def test_a_watch_goes_on_where_it_was_cut_off(service: Service) -> None:
    job = await service.create()
    whole = await service.durable(job.job_id)
    for after in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        assert await service.durable(job.job_id, after) == whole[after:]
    assert await service.durable(job.job_id, after=10_000) == [], "a number from elsewhere holds nothing back"


async def test_watches_that_are_cut_off_while_it_happens_miss_nothing(service: Service) -> None:
    job = await service.create()
    seen: list[job_pb2.CustomizationEvent] = []
    while not seen or seen[-1].state_changed.state != State.STATE_SUCCEEDED:
        async for event in service.watch(job.job_id, seen[-1].sequence if seen else 0):
            if event.sequence:
                seen.append(event)
                if len(seen) % 3 == 0:
                    break
    assert_gapless(seen)
    assert seen == await service.durable(job.job_id)


async def test_the_same_request_makes_one_job(service: Service) -> None:
    jobs = await asyncio.gather(*(service.create(request_id="mine") for _ in range(4)))
    assert len({job.job_id for job in jobs}) == 1
    code, reason, _ = await service.refusal(service.create(request_id="mine", steps=31))
    assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED")
    assert (await service.create(request_id="other")).job_id != jobs[0].job_id
    assert (await service.create()).job_id != (await service.create()).job_id


async def test_validate_only_says_what_a_job_would_be_and_makes_none(service: Service) -> None:
    answer = await service.call("CreateCustomizationJob", request(validate_only=True, accepted_findings=[], steps=100))
    assert not answer.HasField("job")
    assert answer.is_acceptable == (not answer.findings)
    assert answer.estimate.compute_duration.ToSeconds() > 0
    assert 0 < answer.estimate.min_eta.ToSeconds() < answer.estimate.max_eta.ToSeconds()
    assert answer.estimate.measured_count == 0
    longer = await service.call("CreateCustomizationJob", request(validate_only=True, steps=1000))
    assert longer.estimate.compute_duration.ToSeconds() > answer.estimate.compute_duration.ToSeconds()
    budget = Duration(seconds=600)
    fitted = await service.call("CreateCustomizationJob", request(validate_only=True, budget=budget))
    assert fitted.estimate.compute_duration.ToSeconds() >= 600
    assert not (await service.call("ListCustomizationJobs", pb.ListCustomizationJobsRequest())).jobs
    assert not (service.home / "customization").glob("*-*-*-*-*") or not list(
        (service.home / "customization").glob("*-*-*-*-*")
    )


async def test_a_job_chooses_its_workers_and_is_told_their_price(service: Service) -> None:
    alone, several = [
        (await service.call("CreateCustomizationJob", request(validate_only=True, steps=1000, **asked))).estimate
        for asked in ({}, {"workers": 3})
    ]
    assert several.compute_duration.ToSeconds() == 3 * alone.compute_duration.ToSeconds()
    assert several.max_eta == alone.max_eta, "they share no cores here: each has one thread"
    job = await service.create(workers=3)
    assert (job.settings.workers, job.settings.threads) == (3, 1)
    assert job.estimate.compute_duration.ToSeconds() % 3 == 0
    await service.until(job.job_id, State.STATE_SUCCEEDED)
    assert json.loads((service.folder(job.job_id) / "workers.json").read_text()) == [3, 1.0]
    one = await service.create()
    assert one.settings.workers == 0
    await service.until(one.job_id, State.STATE_SUCCEEDED)
    assert not (service.folder(one.job_id) / "workers.json").exists()


async def test_a_job_that_says_nothing_has_the_workers_of_the_service(tmp_path: Path) -> None:
    async with running(tmp_path, workers=2, max_workers=0) as service:
        assert (await service.create(request_id="mine")).settings.workers == 2
        assert (await service.create(workers=0)).settings.workers == 0
        assert (await service.refusal(service.create(workers=3)))[1] == "VALUE_OUT_OF_RANGE"
        code, reason, _ = await service.refusal(service.create(request_id="mine", workers=2))
        assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED"), "asked for otherwise"


async def test_an_estimate_learns_from_earlier_jobs(service: Service) -> None:
    job = await service.create(steps=60)
    await service.until(job.job_id, State.STATE_SUCCEEDED)
    answer = await service.call("CreateCustomizationJob", request(validate_only=True, steps=60))
    assert answer.estimate.measured_count == 1
    assert answer.estimate.max_eta.ToSeconds() < 240, "60 steps of 10 ms and a start, not a guess"


async def test_what_is_wrong_with_a_story_is_told_frame_by_frame(service: Service) -> None:
    _, frames = example()
    frames = [job_pb2.ExampleFrame.FromString(frame.SerializeToString()) for frame in frames]
    frames[1].image = b"no picture"
    frames[3].CopyFrom(frames[0])
    answer = await service.call("CreateCustomizationJob", request(frames=frames, validate_only=True))
    found = {(one.code, one.frame_number): one for one in answer.findings}
    assert found["FRAME_UNREADABLE", 2].severity == job_pb2.Finding.SEVERITY_ERROR
    assert found["FRAME_REPEATED", 4].mend
    assert not answer.is_acceptable, "no acceptance makes an error well"
    code, reason, violations = await service.refusal(service.create(frames=frames))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "EXAMPLE_STORY_REFUSED")
    assert {one.field for one in violations} == {"frames[1]", "frames[3]"}


async def test_a_warning_has_to_be_accepted(service: Service) -> None:
    _, frames = example()
    blank = [
        job_pb2.ExampleFrame(image=one.image, caption="They go on.", description=one.description) for one in frames
    ]
    answer = await service.call(
        "CreateCustomizationJob", request(frames=blank, validate_only=True, accepted_findings=[])
    )
    codes = {one.code for one in answer.findings}
    assert "CAPTIONS_WITHOUT_NAME" in codes
    assert {one.severity for one in answer.findings} == {job_pb2.Finding.SEVERITY_WARNING}
    code, reason, _ = await service.refusal(service.create(frames=blank, accepted_findings=[]))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "EXAMPLE_STORY_REFUSED")
    job = await service.create(frames=blank, accepted_findings=sorted(codes))
    assert {one.code for one in job.findings} == codes


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"pack": "oil-painting"}, "PACK_UNKNOWN", "pack"),
    ({"method": "magic"}, "METHOD_UNKNOWN", "method"),
    ({"method": "lora", "learns": job_pb2.LEARNS_UNET}, "INVALID_ARGUMENT", "learns"),
    ({"steps": 0}, "VALUE_OUT_OF_RANGE", "steps"),
    ({"steps": 10**6}, "VALUE_OUT_OF_RANGE", "steps"),
    ({"budget": Duration(seconds=0)}, "VALUE_OUT_OF_RANGE", "budget"),
    ({"rate": float("nan")}, "VALUE_OUT_OF_RANGE", "rate"),
    ({"rate": 0.0}, "VALUE_OUT_OF_RANGE", "rate"),
    ({"seed": 2**31}, "VALUE_OUT_OF_RANGE", "seed"),
    ({"workers": 5}, "VALUE_OUT_OF_RANGE", "workers"),
    ({"workers": 2**32 - 1}, "VALUE_OUT_OF_RANGE", "workers"),
    ({"request_id": "with a space"}, "REQUEST_ID_INVALID", "request_id"),
    ({"frames": []}, "EXAMPLE_STORY_REFUSED", "frames"),
    ({"frames": [job_pb2.ExampleFrame(image=b"x" * (9 << 20))] * 6}, "VALUE_OUT_OF_RANGE", "frames"),
]


@pytest.mark.parametrize(("fields", "reason", "field"), BAD)
async def test_what_cannot_be_asked_for(service: Service, fields: dict[str, Any], reason: str, field: str) -> None:
    code, told, violations = await service.refusal(service.create(**fields))
    assert (code, told) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert field in {one.field for one in violations}


async def test_steps_and_a_budget_together_are_refused(service: Service) -> None:
    both = request(budget=Duration(seconds=60))
    both.steps = 5
    code, reason, _ = await service.refusal(service.call("CreateCustomizationJob", both))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")


async def test_nobody_is_let_in_without_the_token(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await service.stub.ListCustomizationJobs(pb.ListCustomizationJobsRequest(), timeout=30)
    assert refused(raised.value)[:2] == (grpc.StatusCode.UNAUTHENTICATED, "INSTALLATION_TOKEN_INVALID")


async def test_what_is_not_there_is_not_found(service: Service) -> None:
    nobody = "00000000-0000-7000-8000-000000000000"
    for job_id in (nobody, "../../etc", ""):
        assert (await service.refusal(service.job(job_id)))[1] == "CUSTOMIZATION_JOB_NOT_FOUND"
        assert (await service.refusal(service.wish("Delete", job_id)))[1] == "CUSTOMIZATION_JOB_NOT_FOUND"
    job = await service.create(steps=200)
    assert (await service.refusal(service.publish(job.job_id, step=17)))[1] == "CHECKPOINT_NOT_FOUND"
    image = pb.ReadImageRequest(job_id=job.job_id, sha256="a" * 64)
    assert (await service.refusal(service.bytes_of("ReadImage", image)))[1] == "IMAGE_NOT_FOUND"
    weights = pb.ReadWeightsRequest(version_id="a" * 64)
    assert (await service.refusal(service.bytes_of("ReadWeights", weights)))[1] == "CHARACTER_VERSION_NOT_FOUND"


async def test_pages(service: Service) -> None:
    jobs = [(await service.create(steps=1)).job_id for _ in range(5)]
    found: list[str] = []
    token = ""
    while True:
        page = await service.call(
            "ListCustomizationJobs", pb.ListCustomizationJobsRequest(page_size=2, page_token=token)
        )
        found += [job.job_id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert found == jobs[::-1]
    bad = service.call("ListCustomizationJobs", pb.ListCustomizationJobsRequest(page_token="!!"))
    assert (await service.refusal(bad))[1] == "PAGE_TOKEN_INVALID"


# -- pausing, cancelling, being killed -------------------------------------------------------------------------------


@pytest.mark.parametrize("chance", range(3))
async def test_pausing_and_resuming_anywhere_changes_nothing(tmp_path: Path, undisturbed: str, chance: int) -> None:
    dice = random.Random(chance)
    async with running(tmp_path, PRETEND_STEP_S=0.15, PRETEND_SAVE_EVERY=1000) as service:
        job = await service.create()
        for _ in range(2):
            await service.until_step(job.job_id, dice.randrange(1, 25))
            paused = await service.wish("Pause", job.job_id)
            assert paused.state in (State.STATE_PAUSING, State.STATE_PAUSED, State.STATE_SUCCEEDED)
            paused = await service.until(job.job_id, State.STATE_PAUSED, State.STATE_SUCCEEDED)
            assert not service.kill_driver(job.job_id), "a paused job takes no compute"
            if paused.state == State.STATE_PAUSED:
                assert (await service.wish("Pause", job.job_id)).state == State.STATE_PAUSED
                await service.wish("Resume", job.job_id)
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        assert await weights_of(service, job.job_id) == undisturbed
        assert_gapless(events := await service.durable(job.job_id))
        assert len(steps(events)) == len(set(steps(events)))


@pytest.mark.parametrize("chance", range(3))
async def test_a_driver_that_is_killed_anywhere_goes_on_from_its_last_checkpoint(
    tmp_path: Path, undisturbed: str, chance: int
) -> None:
    dice = random.Random(100 + chance)
    async with running(tmp_path, PRETEND_STEP_S=0.15) as service:
        job = await service.create()
        kills = 0
        for at in sorted(dice.sample(range(1, 25), 3)):
            await service.until_step(job.job_id, at)
            await asyncio.sleep(dice.random() * 0.1)
            kills += service.kill_driver(job.job_id)
        done = await service.until(job.job_id, State.STATE_SUCCEEDED, State.STATE_FAILED)
        assert done.state == State.STATE_SUCCEEDED
        assert 1 <= done.attempt - 1 <= kills, "one that had said that it was done is not started again"
        assert await weights_of(service, job.job_id) == undisturbed
        events = await service.durable(job.job_id)
        assert_gapless(events)
        assert states(events) == ["VALIDATING", "QUEUED", "PROVISIONING", "RUNNING", "SUCCEEDED"], (
            "attempts count apart"
        )
        assert len(steps(events)) == len(set(steps(events))), "a step that is taken again is not told again"


async def test_cancelling_is_for_good_and_keeps_what_was_learned(tmp_path: Path) -> None:
    async with running(tmp_path, PRETEND_STEP_S=0.25) as service:
        job = await service.create()
        await service.until_step(job.job_id, 14)
        assert (await service.wish("Cancel", job.job_id)).state in (State.STATE_CANCELLING, State.STATE_CANCELLED)
        done = await service.until(job.job_id, State.STATE_CANCELLED)
        assert 14 <= done.progress.step < 30
        assert not service.kill_driver(job.job_id)
        assert (await service.wish("Cancel", job.job_id)).state == State.STATE_CANCELLED
        assert (await service.refusal(service.wish("Resume", job.job_id)))[1] == "JOB_STATE_UNSUITABLE"
        assert (await service.refusal(service.wish("Pause", job.job_id)))[1] == "JOB_STATE_UNSUITABLE"
        kept = [one.step for one in await service.checkpoints(job.job_id)]
        assert kept[:2] == [6, 12]
        assert kept[-1] <= done.progress.step + 1
        assert (await service.publish(job.job_id)).step == kept[-1]
        assert states(await service.durable(job.job_id))[-2:] == ["CANCELLING", "CANCELLED"]


async def test_a_job_that_waits_is_cancelled_and_paused_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, PRETEND_STEP_S=0.5) as service:
        first, second, third = [await service.create() for _ in range(3)]
        await service.until(first.job_id, State.STATE_RUNNING)
        await service.until(second.job_id, State.STATE_QUEUED)
        assert (await service.wish("Cancel", second.job_id)).state == State.STATE_CANCELLED
        await service.until(third.job_id, State.STATE_QUEUED)
        assert (await service.wish("Pause", third.job_id)).state == State.STATE_PAUSED
        assert (await service.wish("Resume", third.job_id)).state == State.STATE_QUEUED
        assert (await service.job(second.job_id)).attempt == 0


@pytest.mark.parametrize("chance", range(2))
async def test_a_service_that_is_killed_anywhere_loses_nothing(tmp_path: Path, undisturbed: str, chance: int) -> None:
    dice = random.Random(200 + chance)
    service = KillableService(tmp_path, PRETEND_STEP_S="0.15")
    (tmp_path / "token").write_text("t" * 64)
    try:
        job = await service.create(request_id="once")
        for _ in range(2):
            await asyncio.sleep(dice.random() * 2.0)
            driver_dies = dice.random() < 0.5
            service.kill()
            if driver_dies:
                kill_driver(service.folder(job.job_id))
            await service.channel.close()
            service.restart()
            assert (await service.create(request_id="once")).job_id == job.job_id
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        assert await weights_of(service, job.job_id) == undisturbed
        events = await service.durable(job.job_id)
        assert_gapless(events)
        assert len(steps(events)) == len(set(steps(events)))
        assert states(events) == ["VALIDATING", "QUEUED", "PROVISIONING", "RUNNING", "SUCCEEDED"]
    finally:
        service.kill()
        for folder in (tmp_path / "customization").glob("*-*-*-*-*"):
            kill_driver(folder)


async def test_a_service_that_ends_well_leaves_no_process_and_the_next_goes_on(
    tmp_path: Path, undisturbed: str
) -> None:
    async with running(tmp_path, PRETEND_STEP_S=0.15, PRETEND_SAVE_EVERY=1000) as service:
        job = await service.create()
        await service.until_step(job.job_id, 7)
        await service.process.stop()
        await eventually(lambda: not is_trained(service.folder(job.job_id)))
    async with running(tmp_path, PRETEND_STEP_S=0.05) as service:
        done = await service.until(job.job_id, State.STATE_SUCCEEDED)
        assert done.attempt == 2
        assert await weights_of(service, job.job_id) == undisturbed


# -- failing ---------------------------------------------------------------------------------------------------------


async def test_a_loss_that_is_not_finite_fails_the_job_and_its_last_good_checkpoint_stays(
    tmp_path: Path, undisturbed: str
) -> None:
    async with running(tmp_path, PRETEND_FAIL_AT=15, PRETEND_FAILURE="nan") as service:
        job = await service.create()
        failed = await service.until(job.job_id, State.STATE_FAILED)
        assert (failed.error.reason, failed.error.message) == ("LOSS_NOT_FINITE", "mse is not finite at 15")
        assert [one.step for one in await service.checkpoints(job.job_id)] == [6, 12]
        assert (await service.publish(job.job_id)).step == 12
        (service.folder(job.job_id) / "mended").touch()
        assert (await service.wish("Resume", job.job_id)).error.reason == ""
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        assert await weights_of(service, job.job_id) == undisturbed


async def test_a_full_disk_is_told_even_where_there_is_no_room_to_say_so(tmp_path: Path) -> None:
    async with running(tmp_path, PRETEND_FAIL_AT=15, PRETEND_FAILURE="disk") as service:
        job = await service.create()
        failed = await service.until(job.job_id, State.STATE_FAILED)
        assert failed.error.reason == "DISK_FULL"
        (service.folder(job.job_id) / "mended").touch()
        await service.wish("Resume", job.job_id)
        await service.until(job.job_id, State.STATE_SUCCEEDED)


async def test_a_process_that_crashes_at_the_same_step_again_and_again_fails_the_job(tmp_path: Path) -> None:
    async with running(tmp_path, PRETEND_FAIL_AT=15, PRETEND_FAILURE="crash", crashes_max=2) as service:
        job = await service.create()
        failed = await service.until(job.job_id, State.STATE_FAILED)
        assert failed.error.reason == "TRAINING_CRASHED"
        assert failed.attempt == 3
        assert "exit status -6" in failed.error.message


# -- taking turns ----------------------------------------------------------------------------------------------------


async def test_jobs_of_one_machine_take_turns_at_low_priority(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with running(tmp_path / "home", niceness=3, PRETEND_LOG=str(log), PRETEND_STEP_S=0.02) as service:
        jobs = [await service.create() for _ in range(3)]
        waiting = await service.until(jobs[2].job_id, State.STATE_QUEUED)
        assert 1 <= waiting.ahead_count <= 2
        moved = [
            event.queue_moved.ahead_count
            async for event in service.watch(jobs[2].job_id)
            if event.WhichOneof("event") == "queue_moved"
        ]
        assert moved == sorted(moved, reverse=True)
        assert moved
        ended = [(await service.job(job.job_id)).end_time.ToNanoseconds() for job in jobs]
        assert ended == sorted(ended), "who came first is trained first"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [what for what, *_ in lines] == ["in", "out"] * 3, "never two at a time"
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert {priority for what, _, priority, _ in lines if what == "in"} == {min(19, own + 3)}


async def test_more_jobs_than_may_wait_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path, PRETEND_STEP_S=1.0, max_queued=1) as service:
        first = await service.create()
        await service.until(first.job_id, State.STATE_RUNNING)
        second = await service.create()
        code, reason, _ = await service.refusal(service.create())
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        await service.wish("Cancel", second.job_id)
        await service.create()


# -- deleting --------------------------------------------------------------------------------------------------------


async def test_a_deleted_job_can_come_back(tmp_path: Path) -> None:
    async with running(tmp_path, PRETEND_STEP_S=0.2) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_RUNNING)
        deleted = await service.wish("Delete", job.job_id)
        assert deleted.purge_time.ToSeconds() > deleted.delete_time.ToSeconds()
        await service.until(job.job_id, State.STATE_CANCELLED)
        listed = pb.ListCustomizationJobsRequest()
        assert not (await service.call("ListCustomizationJobs", listed)).jobs
        listed.show_deleted = True
        assert [one.job_id for one in (await service.call("ListCustomizationJobs", listed)).jobs] == [job.job_id]
        back = await service.wish("Undelete", job.job_id)
        assert not back.HasField("delete_time")


async def until_gone(client: Client, job_id: str) -> None:
    """Returns when nobody finds the job any more."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            await client.job(job_id)
        except grpc.aio.AioRpcError as error:
            if refused(error)[1] == "CUSTOMIZATION_JOB_NOT_FOUND":
                return
            raise
        assert (await client.refusal(client.wish("Undelete", job_id)))[1] == "CUSTOMIZATION_JOB_NOT_FOUND"
        await asyncio.sleep(0.05)
    raise AssertionError("it stays")


async def test_a_deleted_job_goes_for_good_and_its_versions_stay(tmp_path: Path) -> None:
    async with running(tmp_path, keep_deleted_s=0.0) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        version = await service.publish(job.job_id)
        await service.wish("Delete", job.job_id)
        await until_gone(service, job.job_id)
        assert not service.folder(job.job_id).exists(), "its row goes last"
        found = (await service.call("ListCharacterVersions", pb.ListCharacterVersionsRequest())).versions
        assert [one.version_id for one in found] == [version.version_id]
        weights = await service.bytes_of("ReadWeights", pb.ReadWeightsRequest(version_id=version.version_id))
        assert hashlib.sha256(weights).hexdigest() == version.weights_sha256


# -- deleting versions -----------------------------------------------------------------------------------------------


async def versions(client: Client, **asked: Any) -> list[job_pb2.CharacterVersion]:
    answer = await client.call("ListCharacterVersions", pb.ListCharacterVersionsRequest(**asked))
    return list(answer.versions)


async def wish(client: Client, verb: str, version_id: str) -> job_pb2.CharacterVersion:
    """Delete or Undelete."""
    message = getattr(pb, f"{verb}CharacterVersionRequest")(version_id=version_id)
    return (await client.call(f"{verb}CharacterVersion", message)).version


async def laid_out(characters: ObjectStore) -> set[str]:
    """What frame replicas can read."""
    return {one.sha256 async for one in characters.every()}


async def until_equal(found: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while (last := await found()) != wanted:
        assert time.monotonic() < deadline, last
        await asyncio.sleep(0.02)


async def read_weights(client: Client, version_id: str) -> bytes:
    return await client.bytes_of("ReadWeights", pb.ReadWeightsRequest(version_id=version_id))


async def test_a_deleted_version_is_drawn_no_more_and_can_come_back(service: Service) -> None:
    job = await service.create()
    await service.until(job.job_id, State.STATE_SUCCEEDED)
    first, second = [await service.publish(job.job_id, step=step) for step in (12, 30)]
    characters = ObjectStore.open("", service.home / "characters")
    deleted = await wish(service, "Delete", second.version_id)
    assert deleted.purge_time.ToSeconds() - deleted.delete_time.ToSeconds() == 7 * 86_400
    assert await wish(service, "Delete", second.version_id) == deleted, "deleting again changes nothing"
    assert await versions(service, name="Otto") == [first], "the newest of the name is the one before"
    assert await versions(service, name="Otto", show_deleted=True) == [deleted, first]
    assert list((await service.job(job.job_id)).versions) == [first]
    assert await laid_out(characters) == {first.version_id, first.weights_sha256}
    picture = pb.ReadImageRequest(version_id=second.version_id, sha256=second.reference_sha256s[0])
    for call in (read_weights(service, second.version_id), service.bytes_of("ReadImage", picture)):
        code, reason, _ = await service.refusal(call)
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CHARACTER_VERSION_DELETED")

    assert await wish(service, "Undelete", second.version_id) == second
    assert await wish(service, "Undelete", second.version_id) == second, "as it was"
    assert await versions(service) == [second, first]
    assert hashlib.sha256(await read_weights(service, second.version_id)).hexdigest() == second.weights_sha256
    for one in (first, second):
        await wish(service, "Delete", one.version_id)
    assert await versions(service) == await versions(service, name="Otto") == []
    assert await laid_out(characters) == set()
    assert list((await service.job(job.job_id)).versions) == []
    # What a job has learned is its own: publishing has the version back, and tells its watchers nothing new.
    last = (await service.job(job.job_id)).last_sequence
    assert await service.publish(job.job_id, step=30) == second
    assert await versions(service) == [second]
    assert (await service.job(job.job_id)).last_sequence == last
    assert hashlib.sha256(await read_weights(service, second.version_id)).hexdigest() == second.weights_sha256


async def test_deleted_versions_are_listed_page_by_page_too(service: Service) -> None:
    job = await service.create()
    await service.until(job.job_id, State.STATE_SUCCEEDED)
    made = [await service.publish(job.job_id, step=step) for step in (6, 12, 18, 24, 30)]
    for one in made[::2]:
        await wish(service, "Delete", one.version_id)
    found: dict[bool, list[str]] = {False: [], True: []}
    for show_deleted, listed in found.items():
        token = ""
        while True:
            page = pb.ListCharacterVersionsRequest(page_size=2, page_token=token, show_deleted=show_deleted)
            answer = await service.call("ListCharacterVersions", page)
            listed += [one.version_id for one in answer.versions]
            if not (token := answer.next_page_token):
                break
    assert found[True] == [one.version_id for one in made[::-1]]
    assert found[False] == [one.version_id for one in made[1::2][::-1]]


async def test_a_deleted_version_goes_for_good_and_what_others_have_stays(tmp_path: Path) -> None:
    async with running(tmp_path, keep_deleted_s=0.0) as service:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        version = await service.publish(job.job_id)
        await wish(service, "Delete", version.version_id)
        await until_equal(lambda: versions(service, show_deleted=True), [])
        for verb in ("Delete", "Undelete"):
            code, reason, _ = await service.refusal(wish(service, verb, version.version_id))
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "CHARACTER_VERSION_NOT_FOUND")
        assert (await service.refusal(read_weights(service, version.version_id)))[1] == "CHARACTER_VERSION_NOT_FOUND"
        for sha256 in version.reference_sha256s:  # they are the job's pictures, too
            picture = await service.bytes_of("ReadImage", pb.ReadImageRequest(job_id=job.job_id, sha256=sha256))
            assert hashlib.sha256(picture).hexdigest() == sha256
        assert (await service.publish(job.job_id)).publish_time != version.publish_time, "it is a new one"
        assert [one.version_id for one in await versions(service)] == [version.version_id]


async def test_a_version_that_is_not_there_is_not_deleted(service: Service) -> None:
    for version_id in ("a" * 64, "../../etc", ""):
        for verb in ("Delete", "Undelete"):
            code, reason, _ = await service.refusal(wish(service, verb, version_id))
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "CHARACTER_VERSION_NOT_FOUND")


@pytest.mark.parametrize("chance", range(2))
async def test_a_service_that_is_killed_while_versions_are_deleted_loses_none(tmp_path: Path, chance: int) -> None:
    dice = random.Random(300 + chance)
    service = KillableService(tmp_path)
    (tmp_path / "token").write_text("t" * 64)
    said: dict[str, str] = {}  # what was acknowledged last, of each version

    async def go_on() -> None:
        while True:
            one, verb = dice.choice(made).version_id, dice.choice(("Delete", "Undelete"))
            in_flight.append(one)
            await wish(service, verb, one)
            in_flight.remove(one)
            said[one] = verb

    try:
        job = await service.create()
        await service.until(job.job_id, State.STATE_SUCCEEDED)
        made = [await service.publish(job.job_id, step=step) for step in (6, 12, 18, 24, 30)]
        for _ in range(2):
            in_flight: list[str] = []
            going = asyncio.create_task(go_on())
            await asyncio.sleep(0.2 + dice.random())
            service.kill()
            with pytest.raises(grpc.aio.AioRpcError):
                await going
            await service.channel.close()
            service.restart()
            both = {one.version_id: one.HasField("delete_time") for one in await versions(service, show_deleted=True)}
            assert both.keys() == {one.version_id for one in made}
            for one, verb in said.items():
                # The call in flight was heard of by nobody, so either is right; the next wish is said on top of it.
                assert one in in_flight or both[one] == (verb == "Delete")
                said[one] = "Delete" if both[one] else "Undelete"
            live = [one for one in made if not both[one.version_id]]
            wanted = {each for one in live for each in (one.version_id, one.weights_sha256)}
            characters = ObjectStore.open("", tmp_path / "characters")
            await until_equal(lambda store=characters: laid_out(store), wanted)  # the runner does what was begun
        assert said
        for one in made:
            await wish(service, "Undelete", one.version_id)
            assert hashlib.sha256(await read_weights(service, one.version_id)).hexdigest() == one.weights_sha256
    finally:
        service.kill()
        for folder in (tmp_path / "customization").glob("*-*-*-*-*"):
            kill_driver(folder)
