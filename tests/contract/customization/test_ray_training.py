"""Training in two workers under a real Ray: whatever is killed or told to stop on the way, the weights are the same.

Every run takes the same few steps of a tiny pack of random weights. One Ray node is shared by all, but for the run
whose driver has a Ray of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from services.customization.backends import STOPPED, Backend, Ended, Run, end_of
from services.customization.local import LocalBackend
from services.customization.ray_jobs import RayJobsBackend
from training.customize_ray import BEGUN_FILE
from training.storage import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
REPOSITORY = Path(__file__).resolve().parents[3]
NODE = Path(__file__).with_name("ray_process.py")
WAIT_S = 900.0
STEPS = 6
WORKERS = 2
WORKER = "ray::RayTrainWorker"


@dataclass
class RayNode:
    """Where a node is, and what a process that uses it finds in its environment."""

    process: subprocess.Popen[str]
    dashboard: str
    token: str
    environment: dict[str, str]

    def workers(self) -> list[psutil.Process]:
        """Those that train there now."""
        found = []
        for one in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if one.name().startswith(WORKER[:15]) and one.cmdline()[0].startswith(WORKER):
                    found.append(one)
            except (psutil.Error, IndexError):
                continue
        return found


def plain_environment() -> dict[str, str]:
    """What processes find without a Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join((str(Path(sys.executable).parent), kept.get("PATH", "")))
    return {**kept, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start_node(environment: dict[str, str], folder: Path) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """The process of a node, and where it is. A node gives itself 30 s to start, which a busy machine may not have."""
    for attempt in range(4):
        (folder / str(attempt)).mkdir()
        process = subprocess.Popen(
            (sys.executable, str(NODE), str(folder / str(attempt)), str(WORKERS + 1)),
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        assert process.stdout is not None
        if line := next((line for line in process.stdout if line.startswith("{")), ""):
            return process, json.loads(line)
        process.kill()
        process.wait()
    raise AssertionError("the node did not start")


@pytest.fixture(scope="module")
def node() -> Iterator[RayNode]:
    folder = Path(tempfile.mkdtemp(prefix="ft"))  # short: the names of sockets are
    token = secrets.token_hex(32)
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(token)
    environment = {
        **plain_environment(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_worker_register_timeout_seconds": "600",
    }
    try:
        process, told = start_node(environment, folder)
        try:
            yield RayNode(process, told["dashboard"], token, {**environment, "RAY_ADDRESS": told["address"]})
        finally:
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Its first true answer."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"{what} never happened")


@dataclass
class Training:
    """A run in a folder, and its drivers one after the other."""

    folder: Path
    pack: Path
    environment: dict[str, str] = field(default_factory=plain_environment)
    words: tuple[str, ...] = ("--workers", str(WORKERS))
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def arguments(self) -> tuple[str, ...]:
        given = {
            "pack": self.pack,
            "world-character": "otto",
            "method": "lora",
            "out": self.out,
            "folder": self.folder,
            "progress": self.folder / "progress.jsonl",
            "steps": STEPS,
            "seed": 3,
            "threads": 1,
            "snapshots": 2,
            "save-every-s": 0.0,  # a checkpoint after every step: what a kill costs is then at most one
        }
        return (*(word for name, value in given.items() for word in (f"--{name}", str(value))), *self.words)

    def start(self) -> subprocess.Popen[bytes]:
        """A driver."""
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            driver = subprocess.Popen(
                (sys.executable, "-m", "training.customize", *self.arguments),
                env=self.environment,
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.drivers.append(driver)
        return driver

    def end(self) -> None:
        """No driver is left."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()

    def finish(self, driver: subprocess.Popen[bytes] | None = None) -> None:
        """To the end of the run."""
        driver = driver or self.start()
        try:
            status = driver.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            status = None
        assert status == 0, (self.folder / "log").read_text()[-4000:]

    def told(self, event: str) -> list[dict[str, Any]]:
        """What was told of a kind, by all drivers' workers."""
        try:
            text = (self.folder / "progress.jsonl").read_text()
        except FileNotFoundError:
            return []
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["event"] == event]

    def until_step(self, step: int, after: int = 0) -> None:
        """Until so many steps are taken, after so many of the lines that told of any."""

        def taken() -> bool:
            ended = any(driver.poll() not in (None, 0) for driver in self.drivers[-1:])
            assert not ended, (self.folder / "log").read_text()[-4000:]
            return any(line["step"] >= step for line in self.told("step")[after:])

        eventually(taken, f"step {step} of {self.folder}")

    @property
    def saved_step(self) -> int:
        """Of the checkpoint."""
        found = load_checkpoint(self.folder / "checkpoint.safetensors")
        assert found is not None
        return int(found.facts["step"])

    @property
    def weights(self) -> list[bytes]:
        """All that was left to be published."""
        return [(self.folder / "snapshots" / f"{STEPS // 2:06d}.safetensors").read_bytes(), self.out.read_bytes()]


@pytest.fixture(scope="module")
def undisturbed(node: RayNode, tiny_packs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A run that nothing happened to."""
    training = Training(tmp_path_factory.mktemp("runs") / "undisturbed", tiny_packs / "tiny", node.environment)
    try:
        training.finish()
        yield training
    finally:
        training.end()


@pytest.fixture
def training(undisturbed: Training, tmp_path: Path) -> Iterator[Training]:
    """Another run of the same."""
    training = Training(tmp_path / "run", undisturbed.pack, undisturbed.environment)
    yield training
    training.end()


def test_two_workers_learn_what_one_process_learns_from_as_many_batches(
    undisturbed: Training, tiny_packs: Path, tmp_path: Path
) -> None:
    alone = Training(tmp_path / "run", tiny_packs / "tiny", words=("--accumulate", str(WORKERS)))
    alone.finish()
    learned, expected = load_file(undisturbed.out), load_file(alone.out)
    assert learned.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(learned[name], value, atol=5e-3, rtol=5e-2)
    cards = [json.loads(one.out.with_suffix(".json").read_text()) for one in (undisturbed, alone)]
    assert cards[0]["run"] == cards[1]["run"], "it is the same run, by whomever it is taken"
    assert cards[0]["losses"]["total"] == pytest.approx(cards[1]["losses"]["total"], rel=1e-3)
    assert [line["step"] for line in undisturbed.told("snapshot")] == [STEPS // 2, STEPS]
    assert len(undisturbed.told("began")) == 1, "one worker speaks for all"
    assert [line["outcome"] for line in undisturbed.told("ended")] == ["succeeded"]


def test_workers_that_are_killed_are_replaced_and_the_weights_are_the_same(
    node: RayNode, undisturbed: Training, training: Training
) -> None:
    driver = training.start()
    training.until_step(1)
    workers = node.workers()
    assert len(workers) == WORKERS
    first = training.told("began")[0]["pid"]
    (other,) = [one for one in workers if one.pid != first]
    other.kill()
    eventually(lambda: len(training.told("began")) == 2, "a new group of workers")
    lines = len(training.told("step"))
    training.until_step(1, lines)
    os.kill(training.told("began")[1]["pid"], signal.SIGKILL)
    training.finish(driver)
    assert len(training.told("began")) == 3
    assert training.weights == undisturbed.weights
    assert [line["outcome"] for line in training.told("ended")] == ["succeeded"]


def test_a_driver_that_is_stopped_saves_and_one_that_is_killed_costs_a_step_and_the_weights_are_the_same(
    node: RayNode, undisturbed: Training, training: Training
) -> None:
    driver = training.start()
    training.until_step(1)
    driver.terminate()
    assert driver.wait(WAIT_S) == STOPPED
    (ended,) = training.told("ended")
    assert (ended["outcome"], ended["reason"]) == ("stopped", "RUN_STOPPED")
    assert 1 <= training.saved_step < STEPS, "it was told to stop in the middle"
    assert training.saved_step >= max(line["step"] for line in training.told("step")), "every step taken is saved"
    eventually(lambda: not node.workers(), "the end of all workers")

    before = training.saved_step
    driver = training.start()
    training.until_step(before + 1, len(training.told("step")))
    driver.kill()
    driver.wait()
    eventually(lambda: not node.workers(), "the end of all workers")
    assert training.saved_step >= before
    training.finish()
    assert training.weights == undisturbed.weights


def test_a_run_that_waits_for_room_is_stopped_at_once(training: Training) -> None:
    training.words = ("--workers", "2", "--worker-cpus", "64")
    driver = training.start()
    # Ray Train's own folder is made when there is a controller, which then asks for room.
    eventually((training.folder / "ray").exists, "a run that waits")
    assert driver.poll() is None
    driver.terminate()
    assert driver.wait(WAIT_S) == STOPPED
    assert not (training.folder / BEGUN_FILE).exists()
    assert not training.told("began")
    assert training.told("ended")[-1]["reason"] == "RUN_STOPPED"


# -- the service's backends ------------------------------------------------------------------------------------------


def run_of(training: Training, attempt: int) -> Run:
    training.folder.mkdir(exist_ok=True)
    return Run(
        job_id="01931f6e-0000-7000-8000-000000000000",
        attempt=attempt,
        folder=training.folder,
        arguments=training.arguments,
        threads=1,
        workers=WORKERS,
    )


async def ended(backend: Backend, run: Run) -> Ended:
    """How an attempt ended."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if (found := await backend.look(run)) is not None:
            return found
        await asyncio.sleep(0.1)
    raise AssertionError("it never ended")


async def stopped_and_resumed(backend: Backend, training: Training) -> None:
    """An attempt that is told to stop, and one that goes on to the end."""
    first = run_of(training, 1)
    await backend.start(first)
    assert await backend.look(first) is None
    await asyncio.to_thread(training.until_step, 1)
    await backend.stop(first)
    found = await ended(backend, first)
    assert end_of(training.told("ended")[-1], found).outcome == "stopped", found
    assert 1 <= training.saved_step < STEPS
    second = run_of(training, 2)
    await backend.start(second)
    found = await ended(backend, second)
    assert end_of(training.told("ended")[-1], found).outcome == "succeeded", found


async def test_ray_runs_stops_and_resumes_a_job_of_two_workers(
    node: RayNode, undisturbed: Training, training: Training
) -> None:
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {node.token}"}
    backend = RayJobsBackend(
        lambda: JobSubmissionClient(node.dashboard, headers=headers), cpus=64.0, gpus=8.0, stop_grace_s=300.0
    )
    await stopped_and_resumed(backend, training)
    assert training.weights == undisturbed.weights
    unknown = await backend.look(run_of(training, 3))
    assert unknown is not None
    assert "knows no job" in unknown.detail


async def test_a_local_job_has_a_ray_of_its_own_that_ends_with_it(
    node: RayNode, undisturbed: Training, training: Training
) -> None:
    # The node's environment is that of a service which is itself part of a Ray: training must not end up there.
    backend = LocalBackend(niceness=0, environment=node.environment)
    await stopped_and_resumed(backend, training)
    assert training.weights == undisturbed.weights
    assert not node.workers()

    training.words = ("--workers", str(WORKERS), "--worker-gpus", "8")
    refused = run_of(training, 3)
    await backend.start(refused)
    found = await ended(backend, refused)
    end = end_of(training.told("ended")[-1], found)
    assert (end.outcome, end.reason) == ("failed", "WORKERS_UNFIT"), found
