"""What the manifests promise an operator: nothing privileged, nothing open, nothing lost when pods go."""

from __future__ import annotations

import re
from typing import Any

import pytest

VOLUMES = {"emptyDir", "secret", "configMap", "persistentVolumeClaim"}
ROLES = {"story", "ray-head", "ray-worker"}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector matches. Handles what the manifests use: matchLabels and `In`."""
    wanted = selector.get("matchLabels", {}).items()
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return all(labels.get(key) == value for key, value in wanted) and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def open_ports(rule: dict[str, Any]) -> set[int]:
    ports = rule["ports"]
    return {port for one in ports for port in range(one["port"], one.get("endPort", one["port"]) + 1)}


def test_every_role_has_a_pod(rendered):
    assert {pod.component for pod in rendered.pods} == ROLES


def test_no_pod_has_privileges(rendered):
    for pod in rendered.pods:
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, pod.owner
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] >= 10000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(volume.keys() & VOLUMES for volume in pod.spec["volumes"]), pod.owner


def test_no_container_can_gain_privileges_or_write_its_image(rendered):
    cluster = rendered.ray_service["spec"]["rayClusterConfig"]
    contexts = [container["securityContext"] for pod in rendered.pods for container in pod.containers]
    for context in [*contexts, cluster["autoscalerOptions"]["securityContext"]]:
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_the_namespace_refuses_unconfined_pods(rendered):
    (namespace,) = rendered.of("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_what_may_be_written_is_bounded(rendered):
    for pod in rendered.pods:
        for container in pod.containers:
            assert {"/tmp", "/var/lib/fabula"} <= {mount["mountPath"] for mount in container["volumeMounts"]}, pod.owner
        for volume in pod.spec["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], pod.owner


def test_every_container_states_what_it_takes(rendered):
    for pod in rendered.pods:
        for container in pod.containers:
            for side in ("requests", "limits"):
                assert container["resources"][side].keys() >= {"cpu", "memory"}, pod.owner


def test_every_server_has_probes(rendered):
    for pod in rendered.pods:
        assert pod.container.keys() >= {"readinessProbe", "livenessProbe"}, pod.owner
    story = next(pod for pod in rendered.pods if pod.component == "story").container
    assert "startupProbe" in story
    # A probe that asks for more than life would restart every pod when the database is down.
    assert story["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert story["readinessProbe"] != story["livenessProbe"]


def makes_ray_jobs(rendered: Any) -> bool:
    return rendered.one("ConfigMap", "customization-settings")["data"]["FABULA_CUSTOMIZATION_BACKEND"] == "kuberay"


def test_only_the_head_and_who_makes_ray_jobs_have_a_kubernetes_token(rendered):
    for pod in rendered.pods:
        needs = pod.component == "ray-head" or (pod.owner.endswith("/customization") and makes_ray_jobs(rendered))
        assert pod.spec["automountServiceAccountToken"] is needs, pod.owner
    for account in rendered.of("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_kubernetes_injects_no_variables_that_strict_settings_would_refuse(rendered):
    for pod in rendered.pods:
        assert pod.spec["enableServiceLinks"] is False, pod.owner


def test_every_image_is_pinned(rendered):
    for pod in rendered.pods:
        for container in pod.containers:
            image = container["image"]
            assert re.fullmatch(r"[a-z/.-]+(:\d+\.\d+\.\d+[a-z0-9.-]*|@sha256:[0-9a-f]{64})", image), image


def test_secrets_are_named_and_never_contained(rendered):
    assert not rendered.of("Secret")
    for pod in rendered.pods:
        for variable in (variable for container in pod.containers for variable in container["env"]):
            if re.search(r"TOKEN$|DATABASE_URL|OBJECT_STORE_URL|CHARACTERS_URL|PASSWORD|SECRET", variable["name"]):
                assert "secretKeyRef" in variable.get("valueFrom", {}), variable["name"]
    for settings in rendered.of("ConfigMap"):
        assert not re.search(r"://[^/\s]*:[^/\s]*@|BEGIN [A-Z ]*PRIVATE KEY", str(settings["data"]))


def test_the_installation_token_is_a_file_that_others_cannot_read(rendered):
    for pod in rendered.pods:
        (volume,) = [volume for volume in pod.spec["volumes"] if "secret" in volume]
        assert volume["secret"]["secretName"] == "fabula-installation"
        assert volume["secret"]["defaultMode"] == 0o440


def test_ray_runs_with_token_authentication(rendered):
    cluster = rendered.ray_service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "fabula-ray-auth"}
    for pod in rendered.pods:
        if pod.is_ray:
            environment = {variable["name"]: variable for variable in pod.container["env"]}
            assert environment["RAY_AUTH_MODE"]["value"] == "token"
            assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
                "name": "fabula-ray-auth",
                "key": "auth_token",
            }


def test_nothing_is_scheduled_on_the_head(rendered):
    spec = rendered.ray_service["spec"]
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["excludeHeadPodFromServeSvc"] is True


# -- Network ----------------------------------------------------------------------------------------------------------


def test_all_traffic_is_denied_unless_it_is_listed(rendered):
    deny = rendered.one("NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_every_pod_has_rules_of_its_own(rendered):
    own = [policy for policy in rendered.of("NetworkPolicy") if policy["spec"]["podSelector"]]
    for pod in rendered.pods:
        assert any(selects(policy["spec"]["podSelector"], pod.labels) for policy in own), pod.owner


def test_every_network_rule_names_its_ports(rendered):
    for policy in rendered.of("NetworkPolicy"):
        spec = policy["spec"]
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            assert rule["ports"], policy["metadata"]["name"]


def ingress_to(rendered, component: str) -> list[dict[str, Any]]:
    """Rules that let traffic in to the pods of a component."""
    (labels,) = {tuple(sorted(pod.labels.items())) for pod in rendered.pods if pod.component == component} or [()]
    return [
        rule
        for policy in rendered.of("NetworkPolicy")
        if policy["spec"]["podSelector"] and selects(policy["spec"]["podSelector"], dict(labels))
        for rule in policy["spec"].get("ingress", [])
    ]


def test_only_namespaces_named_as_edge_reach_story(rendered):
    callers = [(peer, open_ports(rule)) for rule in ingress_to(rendered, "story") for peer in rule["from"]]
    assert callers == [
        ({"namespaceSelector": {"matchLabels": {"fabula.io/edge": "true"}}}, {8470, 8471}),
        ({"namespaceSelector": {"matchLabels": {"fabula.io/monitoring": "true"}}}, {8470}),
    ]


def test_story_reaches_one_port_of_the_ray_pods_and_no_port_of_the_head(rendered):
    for policy in rendered.of("NetworkPolicy"):
        component = policy["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/component", "")
        for rule in policy["spec"].get("ingress", []):
            for peer in rule["from"]:
                if peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/name") == "story":
                    assert (component, open_ports(rule)) == ("ray-worker", {8472})


def test_the_serve_port_is_open_to_story_alone(rendered):
    for policy in rendered.of("NetworkPolicy"):
        if not any(pod.is_ray and selects(policy["spec"]["podSelector"], pod.labels) for pod in rendered.pods):
            continue  # of pods that serve nothing
        for rule in policy["spec"].get("ingress", []):
            if 8472 in open_ports(rule):
                assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "story"}}}]


def test_ray_pods_reach_each_other_on_every_port_ray_was_told_to_use(rendered):
    cluster = rendered.ray_service["spec"]["rayClusterConfig"]
    told: set[int] = set()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        params = group["rayStartParams"]
        told |= {int(value) for key, value in params.items() if key.endswith("port") and "worker" not in key}
        told |= set(range(int(params["min-worker-port"]), int(params["max-worker-port"]) + 1))
    for component in ("ray-head", "ray-worker"):
        policy = rendered.one("NetworkPolicy", component)["spec"]
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            among = [rule for rule in policy[direction] if "ray-worker" in str(rule.get(peers))]
            assert told <= set().union(*(open_ports(rule) for rule in among)), (component, direction)


def test_ray_pods_as_such_leave_for_nothing_outside(rendered):
    for policy in ("ray-worker", *(["customization-jobs"] if makes_ray_jobs(rendered) else [])):
        rules = rendered.one("NetworkPolicy", policy)["spec"]["egress"]
        assert all("podSelector" in peer for rule in rules for peer in rule["to"])


def test_the_database_is_migrated_before_the_process_that_needs_it(rendered):
    needing = {
        pod.owner
        for pod in rendered.pods
        if any(variable["name"] == "FABULA_DATABASE_URL" for variable in pod.container["env"])
    }
    assert needing == {"story", "fabula/customization"}
    for pod in rendered.pods:
        if pod.owner not in needing:
            assert "initContainers" not in pod.spec
            continue
        (migration,) = pod.spec["initContainers"]
        told = migration.get("command", []) + migration.get("args", [])
        assert told == ["migrate"] if pod.owner == "story" else ["python", "-m", "services.customization", "migrate"]
        assert migration["image"] == pod.container["image"]


def egress_of(rendered: Any, pod: Any) -> set[int]:
    """Ports that a pod may reach outside the namespace."""
    return {
        port
        for policy in rendered.of("NetworkPolicy")
        if policy["spec"]["podSelector"] and selects(policy["spec"]["podSelector"], pod.labels)
        for rule in policy["spec"].get("egress", [])
        if "to" not in rule
        for port in open_ports(rule)
    }


def test_pods_reach_the_stores_they_use_and_no_others(rendered):
    for pod in rendered.pods:
        kinds = {variable["name"] for variable in pod.container["env"]}
        credentials = any("secretRef" in source for source in pod.container.get("envFrom", []))
        outside = egress_of(rendered, pod)
        assert (5432 in outside) == ("FABULA_DATABASE_URL" in kinds), pod.owner
        assert (pod.labels.get("fabula.io/object-store") == "true") == credentials, pod.owner
        asks_kubernetes = pod.spec["automountServiceAccountToken"]
        assert (443 in outside) == (credentials or asks_kubernetes), pod.owner
        assert (6443 in outside) == asks_kubernetes, pod.owner


def test_whoever_draws_or_teaches_reaches_the_characters(rendered):
    for group in rendered.ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        resources = group["rayStartParams"]["resources"]
        labels = group["template"]["metadata"]["labels"]
        needs = "frame" in resources or "customization" in resources
        assert (labels.get("fabula.io/object-store") == "true") == needs, group["groupName"]


# -- Going and coming -------------------------------------------------------------------------------------------------


def test_story_rolls_without_a_gap(rendered):
    story = rendered.one("Deployment", "story")["spec"]
    assert story["replicas"] >= 2
    assert story["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert story["template"]["spec"]["topologySpreadConstraints"]


def test_every_pod_that_serves_has_a_disruption_budget(rendered):
    budgets = [budget["spec"] for budget in rendered.of("PodDisruptionBudget")]
    for pod in rendered.pods:
        if pod.component in ("story", "ray-worker"):
            (budget,) = [one for one in budgets if selects(one["selector"], pod.labels)]
            assert budget["maxUnavailable"] == 1


def test_story_has_time_to_drain(rendered):
    pod = next(pod for pod in rendered.pods if pod.component == "story")
    pause_s = pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = float(rendered.one("ConfigMap", "story-settings")["data"]["FABULA_STORY_DRAIN_S"])
    assert pod.spec["terminationGracePeriodSeconds"] >= pause_s + drain_s + 10


def test_ray_is_told_to_stop_because_the_shell_above_it_does_not_pass_signals_on(rendered):
    for pod in rendered.pods:
        if pod.is_ray:
            command = pod.container["lifecycle"]["preStop"]["exec"]["command"]
            assert command[:3] == ["ray", "stop", "--grace-period"]
            assert pod.spec["terminationGracePeriodSeconds"] > int(command[3])


def test_the_story_pods_can_ask_for_enough_to_make_every_service_grow(rendered):
    (story,) = (one for one in rendered.of("Deployment") if one["metadata"]["name"] == "story")
    running = int(rendered.one("ConfigMap", "story-settings")["data"]["FABULA_STORY_MAX_RUNNING"])
    asked = story["spec"]["replicas"] * running  # a story in progress has one call open at a time
    for application in rendered.serve_config["applications"]:
        for deployment in application["deployments"]:
            if "autoscaling_config" not in deployment:
                continue  # it does not grow
            scaling = deployment["autoscaling_config"]
            assert asked >= scaling["max_replicas"] * scaling["target_ongoing_requests"], deployment["name"]


def test_a_replica_that_scales_down_has_time_to_drain(rendered):
    """Serve's own drain; an eviction ends Ray after the preStop hook's 30 s and does not wait for it."""
    longest_s = max(
        deployment["graceful_shutdown_timeout_s"]
        for application in rendered.serve_config["applications"]
        for deployment in application["deployments"]
    )
    for pod in rendered.pods:
        if pod.component == "ray-worker":
            assert pod.spec["terminationGracePeriodSeconds"] > longest_s
    assert rendered.ray_service["spec"]["rayClusterDeletionDelaySeconds"] > longest_s


@pytest.mark.parametrize("kind", ["Deployment", "Service", "PodDisruptionBudget"])
def test_selectors_find_the_story_pods(rendered, kind):
    pod = next(pod for pod in rendered.pods if pod.component == "story")
    selector = rendered.one(kind, "story")["spec"]["selector"]
    assert selects(selector if "matchLabels" in selector else {"matchLabels": selector}, pod.labels)
