"""The manifests build, and every object in them is one that Kubernetes and KubeRay take."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ray.serve.schema import ServeDeploySchema

SCHEMA = json.loads(Path(__file__).with_name("rayservice.schema.json").read_text())
# The oldest version that drains with a `sleep` before SIGTERM by default, and the newest one known.
KUBERNETES = ("1.30", kubernetes_validate.latest_version())


def check_core(thing: dict[str, Any]) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(thing, version, strict=True)


def test_every_core_object_fits_the_kubernetes_schema(rendered):
    core = [one for one in rendered.objects if one["kind"] != "RayService"]
    assert {one["kind"] for one in core} >= {
        "Namespace",
        "Deployment",
        "Service",
        "ConfigMap",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "ServiceAccount",
        "PersistentVolumeClaim",
    }
    for one in core:
        check_core(one)


def test_the_kubernetes_schema_refuses_a_misspelt_field(rendered):
    story = copy.deepcopy(rendered.one("Deployment", "story"))
    story["spec"]["template"]["spec"]["terminationGracePeriod"] = 5
    with pytest.raises(kubernetes_validate.ValidationError):
        check_core(story)


def test_the_ray_service_fits_kuberays_schema(rendered):
    jsonschema.validate(rendered.ray_service, SCHEMA)


def test_kuberays_schema_refuses_a_misspelt_field(rendered):
    service = copy.deepcopy(rendered.ray_service)
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(service, SCHEMA)


def test_every_pod_template_fits_the_kubernetes_schema(rendered):
    for pod in rendered.pods:
        check_core(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "checked"}, "template": pod.template}
        )


def test_the_serve_service_fits_the_kubernetes_schema(rendered):
    service = rendered.ray_service["spec"]["serveService"]
    check_core({"apiVersion": "v1", "kind": "Service", **service})


def test_the_autoscalers_overrides_fit_the_kubernetes_schema(rendered):
    options = rendered.ray_service["spec"]["rayClusterConfig"]["autoscalerOptions"]
    overrides = {key: options[key] for key in ("resources", "securityContext", "volumeMounts")}
    pod = {"containers": [{"name": "autoscaler", "image": "checked", **overrides}]}
    check_core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "checked"}, "spec": pod})


def test_serve_takes_the_configuration(rendered):
    config = ServeDeploySchema.model_validate(rendered.serve_config)
    assert sorted(application.name for application in config.applications) == ["caption", "customization", "frame"]


def test_everything_lies_in_one_namespace(rendered):
    named = [one for one in rendered.objects if one["kind"] != "Namespace"]
    assert {one["metadata"]["namespace"] for one in named} == {"fabula"}
    assert all(one["metadata"]["labels"]["app.kubernetes.io/part-of"] == "fabula" for one in rendered.objects)
