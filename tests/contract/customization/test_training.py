"""The customization service with real training, over real gRPC: somebody new is learned, published and drawn.

A tiny pack of random weights draws noise, so nothing is said here of how well anybody is learned; what is, is that the
weights come out the same bit for bit whatever happened on the way, and that a running frame service wears them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
import pytest_asyncio
from fabula.customization.v1 import job_pb2
from fabula.frame.v1 import frame_service_pb2 as frame_pb
from fabula.frame.v1 import frame_service_pb2_grpc as frame_pb_grpc
from fabula.story.v1 import story_pb2

from tests.contract.customization.harness import TOKEN, Service, State, example, running
from tests.contract.story.pictures import plain
from tests.contract.story.scripted_services import ScriptedServices
from tests.contract.story.story_process import StoryProcess

# One loop for all of them: they share a service, whose start and first job take minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.asyncio(loop_scope="module")]
TRAINER = (sys.executable, "-m", "training.customize")
STEPS = 6
Stories = story_pb2.Story


def asked(**fields: Any) -> dict[str, Any]:
    """A job on the tiny pack."""
    character, frames = example("otto", 64)
    return {"pack": "tiny", "character": character, "frames": frames, "steps": STEPS, "seed": 3, **fields}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory, tiny_packs: Path) -> AsyncIterator[Service]:
    home = tmp_path_factory.mktemp("home")
    # A checkpoint after every step: what a kill costs is then at most one.
    settings: dict[str, Any] = {"snapshots": 2, "save_every_s": 0.001, "probes": False, "crashes_max": 5}
    async with running(home, TRAINER, packs=tiny_packs, **settings) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(service: Service) -> job_pb2.CustomizationJob:
    """A job that nothing happened to."""
    job = await service.create(**asked())
    done = await service.until(job.job_id, State.STATE_SUCCEEDED, State.STATE_FAILED, within_s=1800.0)
    assert done.state == State.STATE_SUCCEEDED, done.error
    return done


@asynccontextmanager
async def drawing(home: Path, packs: Path) -> AsyncIterator[str]:
    """Where a frame service with the tiny pack is reached, over the same installation."""
    import torch

    from services.frame.config import FrameSettings
    from services.frame.loading import load_engine
    from services.frame.server import start_server
    from services.frame.service import FrameServicer
    from services.runtime.config import Installation

    threads = torch.get_num_threads()
    installation = Installation(home=home, packs=str(packs))
    engine = load_engine(FrameSettings(packs="tiny", threads=1, check_memory=False, warm_up=False), installation)
    server, port = await start_server(FrameServicer(engine, TOKEN), "127.0.0.1:0")
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
        engine.stop()
        torch.set_num_threads(threads)


async def test_somebody_new_is_drawn_by_a_running_frame_service(
    service: Service, undisturbed: job_pb2.CustomizationJob, tiny_packs: Path
) -> None:
    async with drawing(service.home, tiny_packs) as target, grpc.aio.insecure_channel(target) as channel:
        stub = frame_pb_grpc.FrameServiceStub(channel)

        async def drawn(*digests: str) -> bytes:
            request = frame_pb.RenderFrameRequest(
                pack="tiny",
                description="Otto runs.",
                seed=1,
                characters=[frame_pb.CharacterWeights(digest=digest) for digest in digests],
            )
            call = stub.RenderFrame(request, metadata=[("fabula-token", TOKEN)], timeout=600)
            events = [event async for event in call]
            return events[-1].frame.image

        before = await drawn()
        checkpoints = await service.checkpoints(undisturbed.job_id)
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await drawn(checkpoints[-1].weights_sha256)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND, "nobody draws what is not published"
        version = await service.publish(undisturbed.job_id)
        worn = await drawn(version.weights_sha256)
        assert worn != before, "the same engine, not started again, wears what was learned"
        assert worn == await drawn(version.weights_sha256)
        assert before == await drawn()


async def test_a_story_is_told_with_somebody_new(
    service: Service, undisturbed: job_pb2.CustomizationJob, tiny_packs: Path, tmp_path: Path
) -> None:
    """The story process, the frame service and the customization service are real; captions are scripted, because the
    tiny pack's own name nobody."""
    version = await service.publish(undisturbed.job_id)
    writing = ScriptedServices(TOKEN)
    writing.start()
    writing.script.packs = ["tiny"]
    writing.script.named = {2: "Otto runs."}
    try:
        async with drawing(service.home, tiny_packs) as target:
            edge = StoryProcess(
                tmp_path / "story",
                writing.target,
                STORY_FRAME_TARGET=target,
                STORY_CUSTOMIZATION_TARGET=f"127.0.0.1:{service.port}",
            )
            (edge.home / "token").write_text(TOKEN)

            def told(*characters: str) -> story_pb2.Story:
                made = edge.create(plain(), pack="tiny", frame_count=2, seed=5, characters=characters)
                return edge.wait_state(made.story_id, Stories.STATE_SUCCEEDED, Stories.STATE_FAILED, timeout_s=900)

            await asyncio.to_thread(edge.start)  # the services it asks answer on this loop
            try:
                alone = await asyncio.to_thread(told)
                named = await asyncio.to_thread(told, "Otto")
                again = await asyncio.to_thread(told, version.version_id)
            finally:
                assert await asyncio.to_thread(edge.terminate) == 0
    finally:
        writing.close()
    assert [story.state for story in (alone, named, again)] == [Stories.STATE_SUCCEEDED] * 3, (alone, named, again)
    assert [(one.name, one.version_id) for one in named.characters] == [("Otto", version.version_id)]
    assert [frame.description for frame in named.frames] == [frame.description for frame in alone.frames]
    pictures = [[frame.image_sha256 for frame in story.frames] for story in (alone, named, again)]
    assert pictures[0][:2] == pictures[1][:2], "a frame that does not name them is drawn as without them"
    assert pictures[0][2] != pictures[1][2], "the frame that names them is drawn with what was learned"
    assert pictures[1] == pictures[2]


async def test_what_is_told_of_real_training(service: Service, undisturbed: job_pb2.CustomizationJob) -> None:
    events = await service.durable(undisturbed.job_id)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    last = [event.progress for event in events if event.WhichOneof("event") == "progress"][-1]
    assert (last.step, last.step_count) == (STEPS, STEPS)
    assert {"mse_new", "mse_existing", "adversarial", "distillation", "total"} <= set(last.losses)
    checkpoints = await service.checkpoints(undisturbed.job_id)
    assert [one.step for one in checkpoints] == [STEPS // 2, STEPS]
    version = await service.publish(undisturbed.job_id)
    assert version.rank == checkpoints[-1].rank > 0
    assert len(version.base_digest) == 64
    assert "mse_new" in version.figures


@pytest.mark.parametrize("chance", range(2))
async def test_whatever_happens_on_the_way_the_weights_are_the_same(
    service: Service, undisturbed: job_pb2.CustomizationJob, chance: int
) -> None:
    dice = random.Random(chance)
    job = await service.create(**asked())
    for at in sorted(dice.sample(range(1, STEPS), 2)):
        await service.until_step(job.job_id, at)
        if dice.random() < 0.5:
            service.kill_driver(job.job_id)
        else:
            await service.wish("Pause", job.job_id)
            paused = await service.until(job.job_id, State.STATE_PAUSED, State.STATE_SUCCEEDED, within_s=900.0)
            if paused.state == State.STATE_PAUSED:
                await service.wish("Resume", job.job_id)
    done = await service.until(job.job_id, State.STATE_SUCCEEDED, State.STATE_FAILED, within_s=1800.0)
    assert done.state == State.STATE_SUCCEEDED, done.error
    assert done.attempt > 1
    assert await weights(service, job.job_id) == await weights(service, undisturbed.job_id)
    first, second = [await service.publish(job_id) for job_id in (undisturbed.job_id, job.job_id)]
    assert first.version_id == second.version_id, "the manifest, too, says the same"


async def weights(service: Service, job_id: str) -> list[str]:
    return [one.weights_sha256 for one in await service.checkpoints(job_id)]


async def test_a_full_disk_fails_the_job_and_room_lets_it_go_on(
    service: Service, undisturbed: job_pb2.CustomizationJob
) -> None:
    job = await service.create(**asked())
    await service.until_step(job.job_id, 1)
    folder = service.folder(job.job_id)
    driver = psutil.Process(int((folder / "driver.lock").read_text()))
    # The kernel refuses to let any file of this process grow: the same errors as on a disk without room.
    driver.rlimit(psutil.RLIMIT_FSIZE, (1024, 1024))
    failed = await service.until(job.job_id, State.STATE_FAILED, within_s=900.0)
    assert failed.error.reason == "DISK_FULL"
    await service.wish("Resume", job.job_id)
    await service.until(job.job_id, State.STATE_SUCCEEDED, within_s=1800.0)
    assert await weights(service, job.job_id) == await weights(service, undisturbed.job_id)


async def test_a_job_that_is_cancelled_in_training_leaves_no_process(service: Service) -> None:
    job = await service.create(**asked(steps=500))
    await service.until_step(job.job_id, 2)
    await service.wish("Cancel", job.job_id)
    done = await service.until(job.job_id, State.STATE_CANCELLED, within_s=600.0)
    assert 2 <= done.progress.step < 500
    assert not service.kill_driver(job.job_id)


async def test_the_weights_are_the_files_that_training_wrote(
    service: Service, undisturbed: job_pb2.CustomizationJob
) -> None:
    folder = service.folder(undisturbed.job_id)
    payload = await asyncio.to_thread((folder / "weights.safetensors").read_bytes)
    assert hashlib.sha256(payload).hexdigest() == (await weights(service, undisturbed.job_id))[-1]
    card = json.loads((folder / "weights.json").read_text())
    assert card["steps"] == STEPS
