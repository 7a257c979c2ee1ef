"""The Ray head's report of its applications. No node is started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.runtime import ray_head
from services.runtime.cluster import read_serve_status
from services.runtime.config import Installation


class Over(Exception):
    """The script is at its end."""


def test_a_full_disk_does_not_end_the_node_and_the_report_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this kernel has no /dev/full")
    installation = Installation(home=tmp_path / "home", port_base=18900)
    installation.make_home()
    draft = installation.home / "run" / f"serve.{ray_head.os.getpid()}.tmp"
    application = {"status": "RUNNING", "message": "", "replicas": {"RUNNING": 1}}
    told: list[dict[str, Any]] = []

    def looks() -> Iterator[None]:
        draft.symlink_to("/dev/full")
        yield
        told.append(read_serve_status(installation))
        draft.unlink()
        yield
        told.append(read_serve_status(installation))
        raise Over

    script = looks()

    def applications() -> dict[str, Any]:
        next(script)
        return {"frame": dict(application)}

    monkeypatch.setattr(ray_head.Installation, "load", lambda: installation)
    monkeypatch.setattr(ray_head, "start_node", lambda _: SimpleNamespace(address="", dead_processes=lambda: []))
    monkeypatch.setattr(ray_head.ray, "init", lambda **_: None)
    monkeypatch.setattr(ray_head, "deploy", lambda _: None)
    monkeypatch.setattr(ray_head, "read_serve_config", lambda *_: None)
    monkeypatch.setattr(ray_head, "applications", applications)
    monkeypatch.setattr(ray_head.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ray_head.time, "sleep", lambda _: None)
    with pytest.raises(Over):
        ray_head.main(tmp_path / "serve.yaml")
    assert told[0] == {}
    assert told[1]["applications"] == {"frame": application}
