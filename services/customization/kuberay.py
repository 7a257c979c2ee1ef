"""Training processes as KubeRay RayJobs: a cluster of its own for each attempt, gone when the attempt is.

An attempt is a RayJob of its own name, so a service that was killed finds it again. Pods get signals long before they
can save, so a stop is a file in the job's folder, which training looks for between steps; the volume with that folder
is mounted at the same path everywhere. Speaks to the cluster's API with what every pod finds in its file system.
"""

from __future__ import annotations

import asyncio
import json
import math
import shlex
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from services.customization.backends import STOP_FILE, Ended, Run
from services.runtime.errors import Unavailable

GROUP = "ray.io/v1"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_S = 15.0
_USER = 10001  # of our images
_DRIVER: Mapping[str, str] = {"cpu": "1", "memory": "4Gi"}  # Ray's own processes and a driver with torch in it
_ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})  # of jobDeploymentStatus


@dataclass(frozen=True, kw_only=True)
class KubeRaySettings:
    """What a RayJob asks its cluster for: `cpus`, `memory_gib` and `gpus` for the pod that trains, or for each."""

    namespace: str
    image: str
    claim: str
    mount: Path  # where the claim is mounted: the folder of all jobs
    cpus: int
    memory_gib: int
    gpus: float
    auth_secret: str = ""  # Secret with Ray's token under `auth_token`; empty: the clusters of jobs ask for none


class ClusterApi(Protocol):
    """Four verbs of the cluster's API. Raise Unavailable when it does not answer."""

    async def create(self, path: str, document: dict[str, Any]) -> bool:
        """False when something of that name is there already."""
        ...

    async def get(self, path: str) -> dict[str, Any] | None:
        """None when there is nothing of that name."""
        ...

    async def delete(self, path: str) -> None:
        """Nothing of that name is no error."""
        ...


def ray_job(run: Run, settings: KubeRaySettings) -> dict[str, Any]:
    """The manifest of an attempt: one node, which is the head and trains; or a head with the driver, and a group of as
    many nodes as there are workers.
    """
    asked: dict[str, Any] = {"cpu": str(settings.cpus), "memory": f"{settings.memory_gib}Gi"}
    if settings.gpus:
        asked["nvidia.com/gpu"] = str(max(1, math.ceil(settings.gpus)))
    labels = {
        "app.kubernetes.io/part-of": "fabula",
        "app.kubernetes.io/component": "customization",
        "fabula/job": run.job_id,
        "fabula/attempt": str(run.attempt),
    }
    cluster: dict[str, Any] = {
        "headGroupSpec": {
            # A driver computes nothing: no worker is to be placed beside it, where its pod has no room for one.
            "rayStartParams": {"dashboard-host": "0.0.0.0"} | ({"num-cpus": "0"} if run.workers else {}),
            "template": _pod(run, settings, "ray-head", _DRIVER if run.workers else asked, labels),
        },
    }
    if run.workers:
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": run.workers,
                "minReplicas": run.workers,
                "maxReplicas": run.workers,
                "rayStartParams": {},
                "template": _pod(run, settings, "ray-worker", asked, labels),
            }
        ]
    if settings.auth_secret:
        cluster["authOptions"] = {"mode": "token", "secretName": settings.auth_secret}
    return {
        "apiVersion": GROUP,
        "kind": "RayJob",
        "metadata": {"name": run.name, "namespace": settings.namespace, "labels": labels},
        "spec": {
            "entrypoint": shlex.join(("python", "-m", "training.customize", *run.arguments)),
            # By the operator itself. A pod that submits would be one more to let through and to confine.
            "submissionMode": "HTTPMode",
            # The service decides about attempts; a retry behind its back would train beside it.
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 300,
            "rayClusterSpec": cluster,
        },
    }


def _pod(
    run: Run, settings: KubeRaySettings, name: str, asked: Mapping[str, str], labels: Mapping[str, str]
) -> dict[str, Any]:
    """A pod that sees the folder of all jobs, where the service sees it."""
    env: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in sorted(run.environment.items())]
    if settings.auth_secret:
        token = {"secretKeyRef": {"name": settings.auth_secret, "key": "auth_token"}}
        env += [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": token}]
    container = {
        "name": name,
        "image": settings.image,
        "env": env,
        "resources": {"requests": dict(asked), "limits": dict(asked)},
        "volumeMounts": [{"name": "jobs", "mountPath": str(settings.mount)}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
        },
    }
    return {
        "metadata": {"labels": dict(labels)},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,  # its variables are no settings of ours
            # What namespaces that confine every pod ask for; the group is the one that may write the volume.
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "jobs", "persistentVolumeClaim": {"claimName": settings.claim}}],
        },
    }


class KubeRayBackend:
    """RayJobs of a namespace."""

    def __init__(self, api: ClusterApi, settings: KubeRaySettings) -> None:
        self._api, self._settings = api, settings
        self._all = f"/apis/{GROUP}/namespaces/{settings.namespace}/rayjobs"

    async def start(self, run: Run) -> None:
        await asyncio.to_thread((run.folder / STOP_FILE).unlink, missing_ok=True)
        await self._api.create(self._all, ray_job(run, self._settings))  # one that is there is an earlier try of ours

    async def look(self, run: Run) -> Ended | None:
        found = await self._api.get(f"{self._all}/{run.name}")
        if found is None:
            return Ended(detail=f"there is no RayJob {run.name}")
        status = found.get("status") or {}
        if status.get("jobDeploymentStatus") not in _ENDED:
            return None
        told = f"{status.get('jobStatus', '')} {status.get('reason', '')} {status.get('message', '')}"
        return Ended(detail=" ".join(told.split())[:500])

    async def stop(self, run: Run) -> None:
        await asyncio.to_thread((run.folder / STOP_FILE).touch)

    async def kill(self, run: Run) -> None:
        await self._api.delete(f"{self._all}/{run.name}")

    async def close(self) -> None:
        """Nothing: jobs of a cluster outlive the service."""


class InClusterApi:
    """The API of the cluster that this pod runs in."""

    def __init__(self, server: str, account: Path = ACCOUNT) -> None:
        self._server, self._account = server.rstrip("/"), account

    async def create(self, path: str, document: dict[str, Any]) -> bool:
        status, _ = await asyncio.to_thread(self._call, "POST", path, document)
        return status != 409

    async def get(self, path: str) -> dict[str, Any] | None:
        status, told = await asyncio.to_thread(self._call, "GET", path, None)
        return None if status == 404 else told

    async def delete(self, path: str) -> None:
        await asyncio.to_thread(self._call, "DELETE", path, None)

    def _call(self, verb: str, path: str, document: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """The status and the answer; 404 and 409 are answers, too."""
        try:
            token = (self._account / "token").read_text().strip()  # it changes while a pod lives
            trust = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
            request = urllib.request.Request(
                self._server + path,
                method=verb,
                data=None if document is None else json.dumps(document).encode(),
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            opener = urllib.request.build_opener(
                urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
            )
            with opener.open(request, timeout=_TIMEOUT_S) as answer:
                told: dict[str, Any] = json.loads(answer.read() or b"{}")
                return int(answer.status), told
        except urllib.error.HTTPError as error:
            if error.code in (404, 409):
                return error.code, {}
            raise Unavailable(
                f"the cluster refuses a {verb} ({error.code})", metadata={"service": "kubernetes"}
            ) from error
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"the cluster does not answer ({type(error).__name__})", metadata={"service": "kubernetes"}
            ) from error
