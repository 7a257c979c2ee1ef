"""The overlay that the README tells an operator to write builds, and gives every pod the Secrets it names."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "deploy" / "README.md").read_text()


def block(first_line: str) -> str:
    """The fenced block of the README that begins with a line."""
    for found in re.findall(r"^ *```\w*\n(.*?)^ *```", README, flags=re.DOTALL | re.MULTILINE):
        text = textwrap.dedent(found)
        if text.startswith(first_line):
            return text
    raise AssertionError(f"deploy/README.md has no block that begins with {first_line!r}")


@pytest.fixture
def overlay(tmp_path, render):
    """The README's overlay with made-up secrets, rendered."""
    folder = tmp_path / "my-fabula"
    secrets = folder / "secrets"
    secrets.mkdir(parents=True)
    text = block("# my-fabula/kustomization.yaml")
    assert "../fabula/deploy/k8s/base" in text
    (tmp_path / "fabula").symlink_to(ROOT)
    (folder / "kustomization.yaml").write_text(text)
    commands = block("mkdir -p my-fabula/secrets")
    for name in re.findall(r"> (\S+)$", commands, flags=re.MULTILINE) + re.findall(r"^touch (\S+)$", commands, re.M):
        (secrets / name).touch()
    (secrets / "installation-token").write_text("a" * 64)
    (secrets / "ray-auth-token").write_text("b" * 64)
    urls = re.findall(r"^echo '(\w+=\S+)'", commands, flags=re.MULTILINE)
    (secrets / "stores.env").write_text("\n".join(urls))
    return render(folder)


def test_the_overlay_builds_and_holds_every_secret_that_the_pods_name(overlay):
    secrets = {secret["metadata"]["name"]: secret["data"].keys() for secret in overlay.of("Secret")}
    for pod in overlay.pods:
        for container in pod.containers:
            for variable in container["env"]:
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference is not None:
                    assert reference["key"] in secrets[reference["name"]]
        for volume in pod.spec["volumes"]:
            if "secret" in volume:
                keys = {item["key"] for item in volume["secret"]["items"]}
                assert keys <= secrets[volume["secret"]["secretName"]]
    auth = overlay.ray_service["spec"]["rayClusterConfig"]["authOptions"]
    assert "auth_token" in secrets[auth["secretName"]]


def test_the_overlay_replaces_images_and_settings(overlay):
    images = {container["image"] for pod in overlay.pods for container in pod.containers}
    assert images == {"registry.example/fabula/story:0.1.0", "registry.example/fabula/ray:0.1.0-gpu"}
    settings = overlay.one("ConfigMap", "story-settings")
    assert re.fullmatch(r"story-settings-\w+", settings["metadata"]["name"]), "a change of it must roll the pods"
    assert "stories.example.com" in settings["data"]["FABULA_STORY_ALLOWED_HOSTS"]
    assert "FABULA_STORY_CAPTION_TARGET" in settings["data"]
