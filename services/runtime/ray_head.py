"""Keeps one Ray node of this installation and the Serve applications on it, and writes down how they are.

A process of its own (`python -m services.runtime.ray_head`), started and watched by `services.runtime.cluster`. Ray's
processes share its fate: when it ends, in whatever way, the kernel ends them. It builds the node itself because `ray
start` cannot be told to leave out Ray's client server, and because every port of this node has to be known and bound
to loopback. Knows no service: which applications run is in the Serve config.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.serve._private import api as serve_api
from ray.serve.config import gRPCOptions
from ray.serve.schema import ServeDeploySchema

from services.runtime.config import Installation

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80_000_000  # Ray's least is 75 MB; requests are far smaller than its threshold for using it
PROXY_START_S = 600.0  # Serve gives up after 60 s, and a busy machine may need longer; the supervisor watches anyway
POLL_S = 0.25
WORKER_PORTS = range(30, 130)  # above the port base


def start_node(installation: Installation) -> Node:
    """Starts the control store, the node manager and their agents, on loopback and on fixed ports."""
    base = installation.port_base
    return Node(
        RayParams(
            node_ip_address=LOOPBACK,
            gcs_server_port=installation.gcs_port,
            dashboard_host=LOOPBACK,
            dashboard_port=installation.dashboard_port,
            include_dashboard=False,
            node_manager_port=base + 6,
            metrics_export_port=installation.metrics_port,
            object_manager_port=base + 8,
            metrics_agent_port=base + 9,
            dashboard_agent_listen_port=base + 11,
            runtime_env_agent_port=base + 12,
            min_worker_port=base + WORKER_PORTS.start,
            max_worker_port=base + WORKER_PORTS.stop - 1,
            num_cpus=1,  # only bounds how many idle workers Ray keeps ready: our replicas ask for no CPU
            object_store_memory=OBJECT_STORE_BYTES,
            temp_dir=str(installation.ray_folder),
            no_monitor=True,
            include_log_monitor=False,
        ),
        head=True,
        shutdown_at_exit=True,
        spawn_reaper=True,  # Ray's processes die with this one
    )


def read_serve_config(path: Path, installation: Installation) -> ServeDeploySchema:
    """Reads a Serve config and moves it to this installation's ports, logs and loopback."""
    document = yaml.safe_load(path.read_text())
    document.setdefault("http_options", {}).update(host=LOOPBACK, port=installation.ingress_http_port)
    document.setdefault("grpc_options", {}).update(port=installation.ingress_grpc_port)
    document.setdefault("logging_config", {}).update(logs_dir=str(installation.home / "logs" / "serve"))
    return ServeDeploySchema(**document)


def deploy(config: ServeDeploySchema) -> None:
    """Starts Serve and submits the applications; returns before they run."""
    serve_api.HTTP_PROXY_TIMEOUT = PROXY_START_S
    client = serve_api.serve_start(
        http_options=config.http_options.model_dump(),
        proxy_location=config.proxy_location,
        grpc_options=gRPCOptions(**config.grpc_options.model_dump()),
        controller_options=config.controller_options,
        global_logging_config=config.logging_config,
    )
    client.deploy_apps(config, _blocking=False)


def last_words(message: str) -> str:
    """The line of a traceback that says what is wrong, without terminal colours: Serve passes whole tracebacks on."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def applications() -> dict[str, dict[str, Any]]:
    """Each application's status, what is wrong with it, and how many replicas it has in each state."""
    seen = {}
    for name, application in serve.status().applications.items():
        replicas: dict[str, int] = {}
        faults = [application.message]
        for deployment in application.deployments.values():
            faults.append(deployment.message)
            for state, count in deployment.replica_states.items():
                replicas[str(getattr(state, "value", state))] = (
                    replicas.get(str(getattr(state, "value", state)), 0) + count
                )
        seen[name] = {
            "status": str(getattr(application.status, "value", application.status)),
            "message": "\n".join(dict.fromkeys(fault for fault in faults if fault)),
            "replicas": replicas,
        }
    return seen


def write_json(path: Path, document: Mapping[str, Any]) -> bool:
    """Replaces a file in one step, so that a reader sees the old one or the new one.

    False when that cannot be done now: a full disk must not end the node and every replica on it.
    """
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(document, indent=1))
        draft.replace(path)
    except OSError:
        return False
    return True


def say(line: str) -> None:
    """Writes a line to the log, unless its disk is full."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def main(config_path: Path) -> int:
    """Runs until it is told to stop or the node dies; 1 when the node died."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    installation = Installation.load()
    installation.make_home()
    status_path = installation.home / "run" / "serve.json"
    began = time.monotonic()

    node = start_node(installation)
    ray.init(address=node.address, namespace="serve", log_to_driver=False, configure_logging=False)
    node_s = time.monotonic() - began
    deploy(read_serve_config(config_path, installation))

    last: dict[str, Any] | None = None
    reported: set[str] = set()
    while True:
        if dead := node.dead_processes():
            say(f"Ray lost {sorted(kind for kind, _ in dead)}")
            os._exit(1)  # no clean-up that waits for what is dead; the kernel and the supervisor see to the rest
        now = applications()
        for name, each in now.items():
            if each["message"] and each["message"] not in reported:
                reported.add(each["message"])
                say(f"{name}: {each['status']}: {each['message']}")
            each["message"] = last_words(each["message"])
        document = {"pid": os.getpid(), "node_s": round(node_s, 2), "applications": now}
        if now != last and write_json(status_path, document):
            last = now  # else the next look tries again
        time.sleep(POLL_S if any(each["status"] != "RUNNING" for each in now.values()) or not now else 1.0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
