"""Where training runs: the command line, the progress file, and what clusters are asked for."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.customization.backends import (
    NO_ROOM,
    STOPPED,
    Ended,
    Run,
    arguments_of,
    end_of,
    read_lines,
)
from services.customization.kuberay import KubeRayBackend, KubeRaySettings, ray_job
from services.customization.local import LocalBackend
from services.customization.ray_jobs import RayJobsBackend
from services.customization.records import TrainingSettings
from services.customization.states import End
from services.runtime.errors import Unavailable
from training import customize_progress

SETTINGS = TrainingSettings(
    pack="toon",
    pack_digest="d",
    method="epicevo",
    learns="lora",
    steps=300,
    budget_s=None,
    rate=1e-4,
    seed=7,
    threads=2,
    snapshots=5,
    save_every_s=30.0,
    probes=True,
)
RUN = Run(
    job_id="01931f6e-0000-7000-8000-000000000000",
    attempt=2,
    folder=Path("/jobs/one"),
    arguments=("--pack", "/packs/a pack", "--steps", "3"),
    threads=2,
)


def options(words: tuple[str, ...]) -> dict[str, str]:
    flags = [word for word in words if word != "--probes"]
    return dict(zip(flags[::2], flags[1::2], strict=True))


def test_the_command_line_says_everything_that_decides_what_is_learned() -> None:
    words = arguments_of(SETTINGS, pack_folder=Path("/packs/toon"), folder=Path("/jobs/one"))
    assert "--probes" in words
    told = options(words)
    assert told["--pack"] == "/packs/toon"
    assert told["--story"] == "/jobs/one/story"
    assert (told["--method"], told["--learns"], told["--steps"], told["--seed"]) == ("epicevo", "lora", "300", "7")
    assert (told["--threads"], float(told["--rate"])) == ("2", 1e-4)
    assert "--minutes" not in told
    assert "--stop-file" not in told


def test_a_budget_is_told_in_minutes_and_nothing_is_told_that_was_left_open() -> None:
    settings = replace(SETTINGS, budget_s=90.0, steps=0, rate=None, learns="", probes=False)
    words = arguments_of(settings, pack_folder=Path("/p"), folder=Path("/j"), stop_file=True)
    told = options(words)
    assert float(told["--minutes"]) == 1.5
    assert told["--stop-file"] == "/j/stop"
    assert not {"--steps", "--rate", "--learns", "--probes"} & set(words)


def test_both_sides_mean_the_same_by_an_exit_status() -> None:
    assert (STOPPED, NO_ROOM) == (customize_progress.STOPPED, customize_progress.NO_ROOM)


def test_a_torn_line_is_read_when_it_is_whole_and_nonsense_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    assert read_lines(path, 0) == ([], 0)
    path.write_bytes(b'{"event": "began"}\nnonsense\n[1]\n{"event": "st')
    lines, offset = read_lines(path, 0)
    assert [line["event"] for line in lines] == ["began"]
    with path.open("ab") as file:
        file.write(b'ep"}\n')
    lines, offset = read_lines(path, offset)
    assert [line["event"] for line in lines] == ["step"]
    assert read_lines(path, offset) == ([], path.stat().st_size)


def test_progress_after_a_torn_line_begins_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_bytes(b'{"event": "step", "st')
    customize_progress.Progress(path).tell("began", steps=3)
    lines, _ = read_lines(path, 0)
    assert [(line["event"], line["steps"]) for line in lines] == [("began", 3)]


def test_steps_are_told_a_few_times_a_second_and_the_last_one_always(tmp_path: Path) -> None:
    now = [0.0]
    progress = customize_progress.Progress(tmp_path / "p", clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 0.1
        progress.step(step, {"total": 0.5}, is_last=step == 100)
    told = [line["step"] for line in read_lines(tmp_path / "p", 0)[0]]
    assert told[0] == 1
    assert told[-1] == 100
    assert 15 <= len(told) <= 25


@pytest.mark.parametrize(
    ("told", "status", "end"),
    [
        ({"outcome": "succeeded"}, 0, End(outcome="succeeded")),
        ({"outcome": "stopped", "reason": "RUN_STOPPED", "message": "m"}, 75,
         End(outcome="stopped", reason="RUN_STOPPED", message="m")),
        ({"outcome": "failed", "reason": "LOSS_NOT_FINITE", "message": "m"}, 1,
         End(outcome="failed", reason="LOSS_NOT_FINITE", message="m")),
        (None, 75, End(outcome="stopped")),
        (None, -9, End(outcome="lost", message="exit status -9")),
        (None, None, End(outcome="lost", message="exit status None")),
        ({"outcome": "nonsense"}, 1, End(outcome="lost", message="exit status 1")),
    ],
)  # fmt: skip
def test_how_an_attempt_ended(told: dict[str, str] | None, status: int | None, end: End) -> None:
    assert end_of(told, Ended(status=status)) == end


def test_a_full_disk_is_known_by_the_exit_status() -> None:
    end = end_of(None, Ended(status=NO_ROOM))
    assert (end.outcome, end.reason) == ("failed", "DISK_FULL")


async def end_seen(backend: LocalBackend, run: Run) -> Ended:
    for _ in range(6000):
        if (ended := await backend.look(run)) is not None:
            return ended
        await asyncio.sleep(0.01)
    raise AssertionError("it never ended")


async def test_how_a_process_of_this_machine_ended_is_known_until_the_next_one(tmp_path: Path) -> None:
    """Whoever asked may not have been able to record it: the database may be on the disk that was full."""
    backend = LocalBackend(niceness=0, program=("/bin/sh", "-c", f"exit {NO_ROOM}"))
    run = replace(RUN, folder=tmp_path, arguments=())
    await backend.start(run)
    ended = await end_seen(backend, run)
    assert ended.status == NO_ROOM
    assert await backend.look(run) == ended
    again = replace(run, attempt=run.attempt + 1)
    assert (await backend.look(again)) == Ended(status=None, detail="exit status None"), "of another attempt"
    await backend.start(again)
    assert (await end_seen(backend, again)).status == NO_ROOM


# -- Ray Jobs, against a client that records what it is asked --------------------------------------------------------


class RecordedRay:
    """What Ray's client does, as far as it is used."""

    def __init__(self) -> None:
        self.submitted: dict[str, dict[str, Any]] = {}
        self.stopped: list[str] = []
        self.info: dict[str, Any] = {}
        self.broken = False

    def submit_job(self, *, submission_id: str, **asked: Any) -> str:
        if self.broken:
            raise ConnectionError("no cluster")
        if submission_id in self.submitted:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.submitted[submission_id] = asked
        self.info[submission_id] = SimpleNamespace(
            status=SimpleNamespace(value="PENDING"), message="", driver_exit_code=None
        )
        return submission_id

    def get_job_info(self, job_id: str) -> Any:
        if self.broken:
            raise ConnectionError("no cluster")
        if job_id not in self.info:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return self.info[job_id]

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True


@pytest.fixture
def ray() -> RecordedRay:
    return RecordedRay()


def on_ray(ray: RecordedRay, connect: Callable[[], RecordedRay] | None = None) -> RayJobsBackend:
    return RayJobsBackend(connect or (lambda: ray), cpus=0.0, gpus=1.0, stop_grace_s=300.0)


async def test_a_ray_job_is_told_how_to_end_and_how_long_that_may_take(ray: RecordedRay) -> None:
    backend = on_ray(ray)
    await backend.start(RUN)
    ((name, asked),) = ray.submitted.items()
    assert name == f"job-{RUN.job_id}-2"
    assert shlex.split(asked["entrypoint"]) == ["python", "-m", "training.customize", *RUN.arguments]
    variables = asked["runtime_env"]["env_vars"]
    assert (variables["RAY_JOB_STOP_SIGNAL"], variables["RAY_JOB_STOP_WAIT_TIME_S"]) == ("SIGTERM", "300")
    assert variables["OMP_NUM_THREADS"] == "2"
    assert (asked["entrypoint_num_cpus"], asked["entrypoint_num_gpus"]) == (0.0, 1.0)
    assert asked["metadata"] == {"fabula_job": RUN.job_id, "fabula_attempt": "2"}
    await backend.start(RUN)
    assert len(ray.submitted) == 1, "a start that is tried again is the same start"
    await backend.stop(RUN)
    assert ray.stopped == [name]


async def test_how_a_ray_job_ends(ray: RecordedRay) -> None:
    backend = on_ray(ray)
    gone = await backend.look(RUN)
    assert gone is not None, "what Ray does not know has no process"
    assert gone.status is None
    await backend.start(RUN)
    assert await backend.look(RUN) is None
    info = ray.info[RUN.name]
    info.status.value = "RUNNING"
    assert await backend.look(RUN) is None
    info.status.value, info.driver_exit_code, info.message = "FAILED", 74, "exit code 74"
    assert await backend.look(RUN) == Ended(status=74, detail="FAILED: exit code 74")


async def test_a_ray_cluster_that_is_away_is_asked_again_with_a_new_connection(ray: RecordedRay) -> None:
    connections: list[RecordedRay] = []

    def connect() -> RecordedRay:
        connections.append(ray)
        return ray

    backend = on_ray(ray, connect)
    ray.broken = True
    for _ in range(2):
        with pytest.raises(Unavailable):
            await backend.look(RUN)
    ray.broken = False
    await backend.start(RUN)
    assert len(connections) == 3


def test_rays_own_client_takes_what_it_is_given() -> None:
    """The names of the arguments, against the installed Ray."""
    import inspect

    submission = pytest.importorskip("ray.job_submission")
    parameters = inspect.signature(submission.JobSubmissionClient.submit_job).parameters
    wanted = {"entrypoint", "submission_id", "runtime_env", "metadata", "entrypoint_num_cpus", "entrypoint_num_gpus"}
    assert wanted <= set(parameters)
    assert {"PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"} == {one.value for one in submission.JobStatus}


# -- KubeRay, against an API that records what it is asked -----------------------------------------------------------

CLUSTER = KubeRaySettings(
    namespace="fabula", image="fabula/ray:1", claim="jobs", mount=Path("/jobs"), cpus=4, memory_gib=16, gpus=1.0
)


class RecordedCluster:
    """What the cluster's API keeps."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.deleted: list[str] = []

    async def create(self, path: str, document: dict[str, Any]) -> bool:
        place = f"{path}/{document['metadata']['name']}"
        if place in self.kept:
            return False
        self.kept[place] = json.loads(json.dumps(document))  # what is no JSON cannot be sent
        return True

    async def get(self, path: str) -> dict[str, Any] | None:
        return self.kept.get(path)

    async def delete(self, path: str) -> None:
        self.deleted.append(path)
        self.kept.pop(path, None)


def test_the_manifest_of_a_ray_job() -> None:
    manifest = ray_job(RUN, CLUSTER)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert manifest["metadata"]["name"] == RUN.name
    assert len(RUN.name) <= 47, "KubeRay refuses longer names"
    spec = manifest["spec"]
    assert shlex.split(spec["entrypoint"]) == ["python", "-m", "training.customize", *RUN.arguments]
    assert spec["backoffLimit"] == 0, "attempts are the service's business"
    assert spec["shutdownAfterJobFinishes"] is True
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert container["volumeMounts"] == [{"name": "jobs", "mountPath": "/jobs"}]
    assert pod["volumes"] == [{"name": "jobs", "persistentVolumeClaim": {"claimName": "jobs"}}]
    assert pod["automountServiceAccountToken"] is False
    assert {"name": "OMP_NUM_THREADS", "value": "2"} in container["env"]


def test_a_ray_job_without_gpus_asks_for_none() -> None:
    pod = ray_job(RUN, replace(CLUSTER, gpus=0.0))["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert set(pod["containers"][0]["resources"]["limits"]) == {"cpu", "memory"}


async def test_the_life_of_a_ray_job_in_a_cluster(tmp_path: Path) -> None:
    api = RecordedCluster()
    backend = KubeRayBackend(api, CLUSTER)
    run = replace(RUN, folder=tmp_path)
    place = f"/apis/ray.io/v1/namespaces/fabula/rayjobs/{run.name}"
    assert isinstance(await backend.look(run), Ended)
    (tmp_path / "stop").touch()
    await backend.start(run)
    assert not (tmp_path / "stop").exists(), "what told the attempt before to stop is not for this one"
    await backend.start(run)
    assert list(api.kept) == [place]
    assert await backend.look(run) is None
    api.kept[place]["status"] = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    assert await backend.look(run) is None
    await backend.stop(run)
    assert (tmp_path / "stop").exists()
    api.kept[place]["status"] = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "node lost"}
    ended = await backend.look(run)
    assert ended is not None
    assert "node lost" in ended.detail
    await backend.kill(run)
    assert api.deleted == [place]
