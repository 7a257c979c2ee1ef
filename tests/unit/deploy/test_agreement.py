"""The manifests say the same as the code: ports, names, settings, limits."""

from __future__ import annotations

import ast
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.caption.config import CaptionSettings
from services.customization.config import CustomizationSettings
from services.frame.config import FrameSettings
from services.runtime.cluster import ports_of
from services.runtime.config import Installation
from services.story.config import StorySettings

ROOT = Path(__file__).resolve().parents[3]
SERVE_CONFIGS = sorted((ROOT / "deploy" / "serve").glob("*.yaml"))
# Flags of `ray start`, and what the local supervisor calls the same listeners.
RAY_PORTS = {
    "node-manager-port": "Ray node manager",
    "metrics-export-port": "Ray metrics",
    "object-manager-port": "Ray object manager",
    "dashboard-agent-grpc-port": "Ray metrics agent",
    "dashboard-agent-listen-port": "Ray dashboard agent",
    "runtime-env-agent-port": "Ray runtime environment agent",
}
SETTINGS = {"caption": CaptionSettings, "frame": FrameSettings, "customization": CustomizationSettings}


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Installation:
    """The default installation, whatever this machine's variables say."""
    for name in [name for name in os.environ if name.startswith("FABULA_")]:
        monkeypatch.delenv(name)
    return Installation.load(home=tmp_path)


def named_ports(ports: list[dict[str, Any]], key: str) -> dict[str, int]:
    return {port["name"]: port[key] for port in ports}


def applications(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {application["name"]: application for application in config["applications"]}


def test_story_listens_where_its_service_and_probes_say(rendered, installation):
    story = next(pod for pod in rendered.pods if pod.component == "story")
    assert named_ports(story.container["ports"], "containerPort") == {
        "http": installation.story_http_port,
        "grpc": installation.story_grpc_port,
    }
    assert named_ports(rendered.one("Service", "story")["spec"]["ports"], "targetPort") == {
        "http": "http",
        "grpc": "grpc",
    }
    for probe in ("startupProbe", "readinessProbe"):
        assert story.container[probe]["grpc"]["port"] == installation.story_grpc_port
    assert story.template["metadata"]["annotations"]["prometheus.io/port"] == str(installation.story_http_port)


def test_probed_paths_are_served(rendered):
    served = (ROOT / "services" / "story" / "api_http.py").read_text()
    story = next(pod for pod in rendered.pods if pod.component == "story")
    assert f'@app.get("{story.container["livenessProbe"]["httpGet"]["path"]}"' in served
    assert f'@app.get("{story.template["metadata"]["annotations"]["prometheus.io/path"]}"' in served


def test_ray_and_serve_listen_where_the_installation_says(rendered, installation):
    config = rendered.serve_config
    assert config["grpc_options"]["port"] == installation.ingress_grpc_port
    assert config["http_options"] == {"host": "127.0.0.1", "port": installation.ingress_http_port}
    cluster = rendered.ray_service["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["rayStartParams"]
    assert head["port"] == str(installation.gcs_port)
    assert head["dashboard-port"] == str(installation.dashboard_port)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["rayStartParams"]["metrics-export-port"] == str(installation.metrics_port)
    for pod in rendered.pods:
        if pod.is_ray:
            ports = named_ports(pod.container["ports"], "containerPort")
            assert ports["serve-grpc"] == installation.ingress_grpc_port
            assert ports["metrics"] == installation.metrics_port
    head_ports = named_ports(
        next(pod for pod in rendered.pods if pod.component == "ray-head").container["ports"], "containerPort"
    )
    assert head_ports["gcs-server"] == installation.gcs_port
    assert head_ports["dashboard"] == installation.dashboard_port


def test_ray_listens_on_the_same_ports_in_a_cluster_and_on_one_machine(rendered, installation):
    local = ports_of(installation)
    cluster = rendered.ray_service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        params = group["rayStartParams"]
        assert {flag: int(params[flag]) for flag in RAY_PORTS} == {flag: local[RAY_PORTS[flag]] for flag in RAY_PORTS}
        assert int(params["min-worker-port"]) == installation.port_base + 30
        assert int(params["max-worker-port"]) == installation.port_base + 129


def test_no_two_listeners_of_a_pod_share_a_port(rendered):
    cluster = rendered.ray_service["spec"]["rayClusterConfig"]
    config = rendered.serve_config
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        params = group["rayStartParams"]
        single = [int(value) for key, value in params.items() if key.endswith("port") and "worker" not in key]
        single += [config["grpc_options"]["port"], config["http_options"]["port"]]
        workers = range(int(params["min-worker-port"]), int(params["max-worker-port"]) + 1)
        assert len(set(single)) == len(single)
        assert not set(single) & set(workers)


def test_the_serve_service_is_the_one_that_story_calls(rendered):
    service = rendered.ray_service
    (port,) = service["spec"]["serveService"]["spec"]["ports"]
    # KubeRay makes a Service of this name, and takes ports called `serve` or `serve-…` that the head's container has.
    assert port["name"].startswith("serve-")
    assert port["appProtocol"] == "kubernetes.io/h2c"
    target = f"{service['metadata']['name']}-serve-svc:{port['port']}"
    data = rendered.one("ConfigMap", "story-settings")["data"]
    assert {data[f"FABULA_STORY_{name}_TARGET"] for name in ("CAPTION", "FRAME", "CUSTOMIZATION")} == {target}


def test_the_story_pods_settings_are_taken_and_safe(rendered, monkeypatch, tmp_path, installation):
    story = next(pod for pod in rendered.pods if pod.component == "story")
    for name, value in rendered.one("ConfigMap", "story-settings")["data"].items():
        monkeypatch.setenv(name, value)
    given = {
        "FABULA_DATABASE_URL": "postgresql://fabula@postgres/fabula",
        "FABULA_OBJECT_STORE_URL": "s3://fabula/objects",
    }
    assert given.keys() <= {variable["name"] for variable in story.container["env"]}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings, loaded = StorySettings.load(), Installation.load()
    settings.check()
    assert loaded.database_url == given["FABULA_DATABASE_URL"]
    mounts = {mount["name"]: mount["mountPath"] for mount in story.container["volumeMounts"]}
    assert loaded.token_file is not None
    assert str(loaded.token_file.parent) == mounts["installation"]
    # Below the mount, which belongs to root: the process makes the folder and may then set its mode.
    assert str(loaded.home.parent) == mounts["home"]


SECRETS = {  # what an operator keeps, as the README's overlay has it
    "FABULA_DATABASE_URL": "postgresql://fabula@postgres/fabula",
    "FABULA_CHARACTERS_URL": "s3://fabula/characters",
}


def environment(rendered: Any, pod: Any) -> dict[str, str]:
    """The settings that a Ray pod's process finds, those of ConfigMaps and Secrets included."""
    found: dict[str, str] = {}
    for source in pod.container["envFrom"]:
        if "configMapRef" in source:
            found |= rendered.one("ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in pod.container["env"]:
        if variable["name"].startswith("FABULA_"):
            found[variable["name"]] = variable.get("value") or SECRETS[variable["valueFrom"]["secretKeyRef"]["key"]]
    return found


def test_the_ray_pods_settings_are_taken(rendered, monkeypatch, installation):
    for pod in rendered.pods:
        if not pod.is_ray:
            continue
        with monkeypatch.context() as patch:
            for name, value in environment(rendered, pod).items():
                patch.setenv(name, value)
            loaded = Installation.load()
            mounts = {mount["name"]: mount["mountPath"] for mount in pod.container["volumeMounts"]}
            assert str(loaded.token_file.parent) == mounts["installation"]
            assert str(loaded.home.parent) == mounts["home"]
            for settings in SETTINGS.values():
                settings.load()


def test_the_applications_arguments_are_taken(rendered, installation):
    for name, application in applications(rendered.serve_config).items():
        SETTINGS[name].load(**application.get("args", {}))


def test_an_import_is_let_in_with_the_ranks_that_frame_replicas_wear(rendered, monkeypatch, installation):
    (frame,) = [pod for pod in rendered.pods if pod.is_ray and pod.owner.split("/")[1] in ("frame", "shared")]
    for name, value in environment(rendered, frame).items():
        monkeypatch.setenv(name, value)
    application = applications(rendered.serve_config)["frame"]
    assert CustomizationSettings.load().import_rank_max == FrameSettings.load(**application["args"]).adapter_rank_max


def test_serve_lets_through_all_that_the_engines_take(rendered, installation):
    for name, application in applications(rendered.serve_config).items():
        settings = SETTINGS[name].load(**application.get("args", {}))
        (deployment,) = application["deployments"]
        # The engine is who refuses: at once, with advice. Serve would only make callers wait.
        assert deployment["max_ongoing_requests"] > settings.max_running + settings.max_queued


def test_applications_are_importable_by_the_names_given(rendered):
    for name, application in applications(rendered.serve_config).items():
        module, attribute = application["import_path"].split(":")
        assert module == f"services.{name}.service"
        tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert attribute in functions
        named = {
            keyword.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            for keyword in node.keywords
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant)
        }
        assert {deployment["name"] for deployment in application["deployments"]} <= named


def test_the_servicer_functions_exist(rendered):
    for path in rendered.serve_config["grpc_options"]["grpc_servicer_functions"]:
        module, function = path.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda path: path.stem)
def test_the_customization_application_is_importable_and_takes_its_arguments(path, installation):
    application = applications(yaml.safe_load(path.read_text()))["customization"]
    assert application["import_path"] == "services.customization.service:app"
    CustomizationSettings.load(**application.get("args", {}))


@pytest.mark.parametrize("path", SERVE_CONFIGS, ids=lambda path: path.stem)
def test_kubernetes_and_serve_configs_name_the_same_applications(rendered, path):
    local, cluster = yaml.safe_load(path.read_text()), rendered.serve_config
    assert local["grpc_options"] == cluster["grpc_options"]
    assert local["http_options"] == cluster["http_options"]
    here, there = applications(local), applications(cluster)
    assert here.keys() == there.keys()
    for name in there:
        assert here[name]["import_path"] == there[name]["import_path"]
        assert here[name]["route_prefix"] == there[name]["route_prefix"]


def test_every_replica_finds_room_in_a_worker_pod(rendered):
    groups = rendered.ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    demand: dict[str, dict[str, float]] = {}
    for name, application in applications(rendered.serve_config).items():
        options = application["deployments"][0]["ray_actor_options"]
        demand[name] = {"cpu": options["num_cpus"], "gpu": options["num_gpus"], **options["resources"]}
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        custom = json.loads(json.loads(f"{group['rayStartParams']['resources']}"))
        room = {"cpu": float(limits["cpu"]), "gpu": float(limits.get("nvidia.com/gpu", 0)), **custom}
        here = [demand[name] for name in demand if name in custom]
        assert here, group["groupName"]
        for resource in {key for one in here for key in one}:
            assert sum(one.get(resource, 0) for one in here) <= room.get(resource, 0), (group["groupName"], resource)
    assert {name for group in groups for name in json.loads(json.loads(group["rayStartParams"]["resources"]))} == {
        *demand
    }


def test_pods_can_be_had_for_as_many_replicas_as_serve_may_ask_for(rendered):
    groups = rendered.ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for name, application in applications(rendered.serve_config).items():
        (deployment,) = application["deployments"]
        fixed = deployment.get("num_replicas")
        scaling = deployment.get("autoscaling_config", {"min_replicas": fixed, "max_replicas": fixed})
        (group,) = [group for group in groups if name in json.loads(json.loads(group["rayStartParams"]["resources"]))]
        assert scaling["max_replicas"] <= group["maxReplicas"]
        assert 1 <= scaling["min_replicas"] <= group["minReplicas"]


def test_the_cluster_runs_the_locked_ray(rendered):
    pins = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    assert f"ray=={rendered.ray_service['spec']['rayClusterConfig']['rayVersion']}" in pins
