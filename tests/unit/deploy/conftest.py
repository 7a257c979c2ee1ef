"""Renders every kustomization once, and gives the tests what it makes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
# A component builds with an overlay only, and is tested in those that use it.
KUSTOMIZATIONS = sorted(
    path.parent
    for path in (ROOT / "deploy" / "k8s").rglob("kustomization.yaml")
    if yaml.safe_load(path.read_text())["kind"] == "Kustomization"
)


@dataclass(frozen=True)
class Pod:
    """A pod template and what owns it: `story`, `fabula/head`, `fabula/<group>`."""

    owner: str
    component: str
    labels: dict[str, str]
    spec: dict[str, Any]
    template: dict[str, Any]

    @property
    def container(self) -> dict[str, Any]:
        """Its one container that stays."""
        (container,) = self.spec["containers"]
        return dict(container)

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Its containers, those that run before the others included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def is_ray(self) -> bool:
        """Whether KubeRay runs it."""
        return self.component.startswith("ray-")


@dataclass(frozen=True)
class Rendered:
    """What one kustomization makes."""

    name: str
    objects: tuple[dict[str, Any], ...]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The objects of a kind."""
        return [one for one in self.objects if one["kind"] == kind]

    def one(self, kind: str, name: str) -> dict[str, Any]:
        """The object of that kind and name; a hashed name is found by its stem."""
        (found,) = [one for one in self.of(kind) if one["metadata"]["name"].startswith(name)]
        return found

    @property
    def ray_service(self) -> dict[str, Any]:
        """Its RayService."""
        (found,) = self.of("RayService")
        return found

    @property
    def serve_config(self) -> dict[str, Any]:
        """The Serve configuration in its RayService."""
        return dict(yaml.safe_load(self.ray_service["spec"]["serveConfigV2"]))

    @property
    def pods(self) -> list[Pod]:
        """Every pod template."""
        return list(self._pods())

    def _pods(self) -> Iterator[Pod]:
        for one in self.objects:
            name = one["metadata"]["name"]
            if one["kind"] == "Deployment":
                yield _pod(name, one["spec"]["template"])
            if one["kind"] == "RayService":
                cluster = one["spec"]["rayClusterConfig"]
                yield _pod(f"{name}/head", cluster["headGroupSpec"]["template"])
                for group in cluster["workerGroupSpecs"]:
                    yield _pod(f"{name}/{group['groupName']}", group["template"])


def _pod(owner: str, template: dict[str, Any]) -> Pod:
    labels = template["metadata"]["labels"]
    component = labels["app.kubernetes.io/component"]
    return Pod(owner=owner, component=component, labels=labels, spec=template["spec"], template=template)


def build(folder: Path) -> Rendered:
    """Builds one kustomization. Skips the test, saying why, where kubectl is not installed."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, so the manifests cannot be built; it carries kustomize")
    built = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 0, built.stderr
    return Rendered(folder.name, tuple(one for one in yaml.safe_load_all(built.stdout) if one))


@pytest.fixture(scope="session")
def renderings() -> dict[str, Rendered]:
    """Every kustomization of deploy/k8s, by its folder's name."""
    return {folder.name: build(folder) for folder in KUSTOMIZATIONS}


@pytest.fixture(params=[folder.name for folder in KUSTOMIZATIONS])
def rendered(request: pytest.FixtureRequest, renderings: dict[str, Rendered]) -> Rendered:
    """Each kustomization in turn."""
    return renderings[request.param]


@pytest.fixture
def render() -> Callable[[Path], Rendered]:
    """Builds any kustomization."""
    return build
