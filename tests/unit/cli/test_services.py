"""Waiting for the services: who started them may end them, and nobody else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fabula_cli.installation import Installation, Starting
from fabula_cli.services import CannotStart, bring_up


class Told(Installation):
    """An installation whose supervisor is a script: what it shows before the start, and its record from then on."""

    def script(self, before: str, phase: str) -> list[str]:
        asked: list[str] = []
        record = {"phase": phase, "supervisor": {"pid": 1}}

        def ask(verb: str, **_: Any) -> dict[str, Any]:
            asked.append(verb)
            return {"running": before != "stopped", "record": {"phase": before}}

        def starting(*_: Any) -> Starting:
            return Starting(installation=self, process=None, log=self.logs / "l", log_from=0, began=time.monotonic())

        said = {"ask": ask, "start": starting, "join": starting, "record": lambda: record}
        for name, function in said.items():
            object.__setattr__(self, name, function)  # a frozen value, and only here a scripted one
        return asked


@pytest.mark.parametrize(("phase", "timeout_s"), [("failed", 60.0), ("starting", 0.0)])
@pytest.mark.parametrize(("before", "ended"), [("stopped", True), ("starting", False)])
def test_only_who_started_the_services_ends_them_when_they_do_not_come_up(
    tmp_path: Path, before: str, ended: bool, phase: str, timeout_s: float
) -> None:
    installation = Told(home=tmp_path, port_base=None)
    asked = installation.script(before, phase)
    with pytest.raises(CannotStart):
        bring_up(installation, timeout_s=timeout_s, quiet=True)
    assert ("down" in asked) == ended
