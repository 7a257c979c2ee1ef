"""Customization jobs in a cluster: what the service would make fits the namespace that the manifests lay out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from services.customization.backends import Run
from services.customization.config import CustomizationSettings
from services.customization.kuberay import KubeRaySettings, ray_job
from services.customization.loading import BACKENDS
from services.runtime.config import Installation
from tests.unit.deploy.test_policies import open_ports, selects

RUN = Run(
    job_id="01931f6e-0000-7000-8000-000000000000",
    attempt=1,
    folder=Path("/var/lib/fabula-jobs/one"),
    arguments=("--steps", "5"),
    threads=8,
    workers=2,
)


def settings_of(rendered: Any, monkeypatch: pytest.MonkeyPatch) -> CustomizationSettings:
    """As the service reads them in a Ray pod."""
    for name, value in rendered.one("ConfigMap", "customization-settings")["data"].items():
        monkeypatch.setenv(name, value)
    return CustomizationSettings.load()


@pytest.fixture
def settings(rendered, monkeypatch: pytest.MonkeyPatch) -> CustomizationSettings:
    return settings_of(rendered, monkeypatch)


@pytest.fixture
def base(renderings) -> Any:
    """The one whose jobs are RayJobs; in the overlays they train in the customization pod."""
    return renderings["base"]


@pytest.fixture
def cluster(base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> KubeRaySettings:
    backend: Any = BACKENDS["kuberay"](settings_of(base, monkeypatch), Installation(home=tmp_path))
    found: KubeRaySettings = backend._settings
    return found


def customization_pod(rendered) -> Any:
    (pod,) = [pod for pod in rendered.pods if pod.owner == "fabula/customization"]
    return pod


def pods_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a RayJob."""
    spec = job["spec"]["rayClusterSpec"]
    return [group["template"] for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", []))]


def test_the_service_keeps_jobs_on_the_volume(rendered, settings):
    pod = customization_pod(rendered)
    (volume,) = [volume for volume in pod.spec["volumes"] if "persistentVolumeClaim" in volume]
    (mount,) = [mount for mount in pod.container["volumeMounts"] if mount["name"] == volume["name"]]
    assert str(settings.folder) == mount["mountPath"]
    assert not mount.get("readOnly")
    claim = rendered.one("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
    assert settings.kuberay_claim == claim["metadata"]["name"]
    (mode,) = claim["spec"]["accessModes"]
    assert mode == ("ReadWriteMany" if settings.backend == "kuberay" else "ReadWriteOnce")


def test_stories_of_those_whom_packs_know_lie_where_jobs_see_them_and_jobs_of_no_pod_have_workers(rendered, settings):
    assert settings.known_folder is not None
    assert settings.known_folder.parent == settings.folder, "a job's pods mount this volume and no other"
    in_pods_of_their_own = settings.backend == "kuberay"
    assert (settings.most_workers > 0) == in_pods_of_their_own


def test_every_ray_pod_has_the_settings_because_serve_builds_applications_anywhere(rendered):
    name = rendered.one("ConfigMap", "customization-settings")["metadata"]["name"]
    assert name == "customization-settings", "the RayService names it literally"
    for pod in rendered.pods:
        if pod.is_ray:
            assert {"configMapRef": {"name": name}} in pod.container["envFrom"], pod.owner


def test_a_job_runs_where_the_service_looks_and_in_its_image(base, cluster):
    pod = customization_pod(base)
    job = ray_job(RUN, cluster)
    assert job["metadata"]["namespace"] == pod_namespace(base)
    for template in pods_of(job):
        (container,) = template["spec"]["containers"]
        assert container["image"] == pod.container["image"]
        (mount,) = container["volumeMounts"]
        assert mount["mountPath"] in {own["mountPath"] for own in pod.container["volumeMounts"]}
        (volume,) = template["spec"]["volumes"]
        assert (
            volume["persistentVolumeClaim"]["claimName"]
            == base.one("PersistentVolumeClaim", "fabula")["metadata"]["name"]
        )


def pod_namespace(rendered) -> str:
    return str(rendered.ray_service["metadata"]["namespace"])


def test_the_namespace_takes_the_pods_of_a_job(base, cluster):
    """What `pod-security.kubernetes.io/enforce: restricted` asks for, and what Kubernetes' schema does."""
    for template in pods_of(ray_job(RUN, cluster)):
        spec = template["spec"]
        security = spec["securityContext"]
        assert (security["runAsNonRoot"], security["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
        service = customization_pod(base).spec["securityContext"]
        assert {key: security[key] for key in ("runAsUser", "fsGroup")} == {
            key: service[key] for key in ("runAsUser", "fsGroup")
        }, "both write the volume"
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert spec["automountServiceAccountToken"] is False
        document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "checked"}, "template": template}
        kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_clusters_of_jobs_ask_for_rays_token(base, cluster):
    job = ray_job(RUN, cluster)
    assert job["spec"]["rayClusterSpec"]["authOptions"] == base.ray_service["spec"]["rayClusterConfig"]["authOptions"]
    for template in pods_of(job):
        (container,) = template["spec"]["containers"]
        told = {variable["name"]: variable for variable in container["env"]}
        assert told["RAY_AUTH_MODE"]["value"] == "token"
        assert told["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "fabula-ray-auth", "key": "auth_token"}


def test_the_pods_of_a_job_reach_each_other_and_the_operator_reaches_the_dashboard(base, cluster):
    labels = [template["metadata"]["labels"] for template in pods_of(ray_job(RUN, cluster))]
    policies = [
        policy["spec"]
        for policy in base.of("NetworkPolicy")
        if policy["spec"]["podSelector"] and all(selects(policy["spec"]["podSelector"], own) for own in labels)
    ]
    (policy,) = policies
    among = [
        rule
        for rule in policy["ingress"]
        if any(selects(peer["podSelector"], labels[0]) and "namespaceSelector" not in peer for peer in rule["from"])
    ]
    ports = set().union(*(open_ports(rule) for rule in among))
    assert {6379, 8265, 10001, 19999, 44217} <= ports, "GCS, dashboard, and what Ray's workers and gloo choose"
    back = [rule for rule in policy["egress"] if all("podSelector" in peer for peer in rule["to"])]
    assert ports == set().union(*(open_ports(rule) for rule in back))
    operator = [rule for rule in policy["ingress"] if "kuberay-operator" in str(rule["from"])]
    assert [open_ports(rule) for rule in operator] == [{8265}]
    assert ray_job(RUN, cluster)["spec"]["submissionMode"] == "HTTPMode", (
        "the operator submits, and no pod that has no rules"
    )


def test_the_service_may_do_what_its_backend_does_and_nothing_else(rendered, settings):
    roles, bindings = rendered.of("Role"), rendered.of("RoleBinding")
    if settings.backend != "kuberay":
        assert not roles
        assert not bindings
        return
    (role,), (binding,) = roles, bindings
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "delete"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    pod = customization_pod(rendered)
    assert (subject["kind"], subject["name"]) == ("ServiceAccount", pod.spec["serviceAccountName"])
    others = [one.spec.get("serviceAccountName") for one in rendered.pods if one.owner != pod.owner]
    assert subject["name"] not in others
