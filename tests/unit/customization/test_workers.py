"""A job of several workers: the command line that asks for them, what clusters are asked for, and the price."""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import pytest

from services.customization.backends import Run, arguments_of
from services.customization.config import CustomizationSettings
from services.customization.estimate import START_S, estimate
from services.customization.intake import JobRequest, TaughtPack, taught_pack, training_settings
from services.customization.kuberay import KubeRaySettings, ray_job
from services.customization.ray_jobs import RayJobsBackend
from services.customization.records import TrainingSettings
from services.runtime.config import Installation
from services.runtime.errors import ValueOutOfRange
from training.customize import command

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
ALONE = TrainingSettings(
    pack="toon",
    pack_digest="d",
    method="lora",
    learns="",
    steps=300,
    budget_s=None,
    rate=None,
    seed=7,
    threads=2,
    snapshots=5,
    save_every_s=30.0,
)
SEVERAL = replace(ALONE, workers=3)
RUN = Run(
    job_id="01931f6e-0000-7000-8000-000000000000",
    attempt=1,
    folder=Path("/jobs/one"),
    arguments=arguments_of(SEVERAL, pack_folder=Path("/packs/toon"), folder=Path("/jobs/one")),
    threads=2,
    workers=3,
)
CLUSTER = KubeRaySettings(
    namespace="fabula", image="fabula/ray:1", claim="jobs", mount=Path("/jobs"), cpus=4, memory_gib=16, gpus=0.5
)
# Fields of a RayJob's spec in KubeRay 1.7; its cluster has the schema that a RayService's has.
RAY_JOB_FIELDS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "deletionStrategy",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "preRunningDeadlineSeconds",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}


def test_training_understands_what_a_job_of_several_workers_is_told() -> None:
    words = arguments_of(
        SEVERAL, pack_folder=Path("/packs/toon"), folder=Path("/jobs/one"), worker_cpus=2.0, worker_gpus=0.5
    )
    told = command().parse_args(words)
    assert (told.workers, told.worker_cpus, told.worker_gpus) == (3, 2.0, 0.5)
    assert (told.threads, told.seed, told.accumulate) == (2, 7, 1)


def test_a_job_of_one_process_is_told_of_no_workers() -> None:
    words = arguments_of(ALONE, pack_folder=Path("/packs/toon"), folder=Path("/jobs/one"), worker_cpus=2.0)
    assert command().parse_args(words).workers is None
    assert not any(word.startswith("--worker") for word in words)


def test_a_job_of_before_there_were_workers_is_read_as_one_process() -> None:
    kept = {key: value for key, value in vars(ALONE).items() if key != "workers"}
    assert TrainingSettings(**kept) == ALONE


def test_what_a_worker_may_have() -> None:
    local = CustomizationSettings(threads=3)
    assert (local.threads_of(2), local.cpus_of_a_worker(3)) == (3, 3.0)
    assert CustomizationSettings(worker_cpus=0.5).cpus_of_a_worker(3) == 0.5
    assert CustomizationSettings(backend="kuberay", kuberay_cpus=8).cpus_of_a_worker(3) == 8.0
    cores = CustomizationSettings().threads_of(0)
    assert CustomizationSettings().threads_of(64) == max(1, cores // 64), "workers of a machine share its cores"
    assert CustomizationSettings(backend="ray").threads_of(64) == cores


@pytest.fixture(scope="module")
def toon(tmp_path_factory: pytest.TempPathFactory) -> TaughtPack:
    return taught_pack("toon", Installation(home=tmp_path_factory.mktemp("home")).pack_folders)


@pytest.mark.parametrize(
    ("asked", "fields", "workers"),
    [
        (None, {}, 0),
        (None, {"workers": 3}, 3),
        (2, {}, 2),
        (0, {"workers": 3}, 0),
        (4, {"max_workers": 4}, 4),
        (6, {"workers": 6, "max_workers": 4}, 6),
    ],
)
def test_a_job_has_the_workers_that_it_asks_for_or_those_of_the_service(
    toon: TaughtPack, asked: int | None, fields: dict[str, Any], workers: int
) -> None:
    settings = CustomizationSettings(backend="ray", threads=2, **fields)
    assert training_settings(JobRequest(steps=3, workers=asked), toon, settings).workers == workers


@pytest.mark.parametrize(("asked", "fields"), [(5, {}), (1, {"max_workers": 0}), (7, {"workers": 6})])
def test_more_workers_than_a_job_may_have_are_refused_by_name(
    toon: TaughtPack, asked: int, fields: dict[str, Any]
) -> None:
    settings = CustomizationSettings(**fields)
    with pytest.raises(ValueOutOfRange, match=f"{asked} workers are asked for; a job has at most") as refused:
        training_settings(JobRequest(steps=3, workers=asked), toon, settings)
    assert refused.value.field_violations[0].field == "workers"
    assert refused.value.metadata["most"] == str(settings.most_workers)


def test_workers_that_a_job_asks_for_share_the_cores_of_this_machine(toon: TaughtPack) -> None:
    alone, several = (
        training_settings(JobRequest(steps=3, workers=count), toon, CustomizationSettings()) for count in (0, 4)
    )
    assert several.threads == max(1, alone.threads // 4)


@pytest.mark.parametrize("fields", [{"workers": -1}, {"workers": 65}, {"max_workers": 65}, {"worker_cpus": -0.5}])
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        CustomizationSettings(**fields)


def test_the_price_is_that_of_all_workers() -> None:
    one, three = (estimate(settings, measured=[1.0], ahead=[]) for settings in (ALONE, SEVERAL))
    assert three.compute_s == 3 * one.compute_s
    assert three.max_eta_s == one.max_eta_s, "a step takes as long, and sees more"


def test_a_guess_knows_that_a_worker_with_fewer_cores_takes_longer() -> None:
    halved = replace(ALONE, workers=2, threads=1)
    whole, shared = (estimate(settings, measured=[], ahead=[]) for settings in (ALONE, halved))
    assert shared.max_eta_s > whole.max_eta_s
    assert shared.compute_s == pytest.approx((2 * (whole.compute_s / 2 - START_S) + START_S) * 2)
    on_gpus = estimate(halved, measured=[], ahead=[], gpus=1.0)
    assert on_gpus.max_eta_s == whole.max_eta_s
    assert on_gpus.compute_s == whole.compute_s, "two GPUs, as two cores"


# -- Ray Jobs --------------------------------------------------------------------------------------------------------


class RecordedRay:
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def submit_job(self, **asked: Any) -> str:
        self.asked.append(asked)
        return str(asked["submission_id"])

    def get_job_info(self, job_id: str) -> Any:
        raise AssertionError

    def stop_job(self, job_id: str) -> bool:
        raise AssertionError


@pytest.mark.parametrize(("workers", "asked_for"), [(0, (4.0, 1.0)), (3, (0.0, 0.0))])
async def test_a_driver_asks_ray_for_nothing_that_its_workers_ask_for(
    workers: int, asked_for: tuple[float, float]
) -> None:
    ray = RecordedRay()
    await RayJobsBackend(lambda: ray, cpus=4.0, gpus=1.0, stop_grace_s=60.0).start(replace(RUN, workers=workers))
    (asked,) = ray.asked
    assert (asked["entrypoint_num_cpus"], asked["entrypoint_num_gpus"]) == asked_for


# -- KubeRay ---------------------------------------------------------------------------------------------------------


def check(manifest: dict[str, Any]) -> None:
    """Raises ValidationError for what KubeRay, or Kubernetes of its pods, would refuse."""
    schema = json.loads((DEPLOY / "rayservice.schema.json").read_text())
    cluster = {**schema["properties"]["spec"]["properties"]["rayClusterConfig"], "definitions": schema["definitions"]}
    assert set(manifest["spec"]) <= RAY_JOB_FIELDS
    spec = copy.deepcopy(manifest["spec"]["rayClusterSpec"])
    spec["headGroupSpec"].setdefault("serviceType", "ClusterIP")  # the schema is of a RayService, where it is ours
    jsonschema.validate(spec, {key: value for key, value in cluster.items() if key != "required"})
    groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
    for template in (group["template"] for group in groups):
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "x", **template["metadata"]}}
        kubernetes_validate.validate(pod, "1.32", strict=True)


def test_the_manifest_of_several_workers_is_a_head_and_one_group_of_as_many() -> None:
    manifest = ray_job(RUN, CLUSTER)
    check(manifest)
    spec = manifest["spec"]
    assert command().parse_args(shlex.split(spec["entrypoint"])[3:]).workers == 3
    head, (group,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0", "no worker trains where the driver is"
    (driver,), (worker,) = (one["template"]["spec"]["containers"] for one in (head, group))
    assert "nvidia.com/gpu" not in driver["resources"]["limits"], "a driver computes nothing"
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    for one in (head, group):
        pod = one["template"]["spec"]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "jobs", "mountPath": "/jobs"}], "all see the folder"
        assert pod["automountServiceAccountToken"] is False
        assert one["template"]["metadata"]["labels"] == manifest["metadata"]["labels"]


def test_a_job_of_one_process_has_no_group() -> None:
    manifest = ray_job(replace(RUN, workers=0), CLUSTER)
    check(manifest)
    cluster = manifest["spec"]["rayClusterSpec"]
    assert "workerGroupSpecs" not in cluster
    assert "num-cpus" not in cluster["headGroupSpec"]["rayStartParams"], "the process trains on the head"


def test_the_check_of_manifests_finds_a_misspelt_field() -> None:
    manifest = ray_job(RUN, CLUSTER)
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 3
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)
    manifest = ray_job(RUN, CLUSTER)
    manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check(manifest)
