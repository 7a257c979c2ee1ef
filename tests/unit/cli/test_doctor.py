"""Each check of `fabula doctor`: what it finds, and that what is broken comes with its mending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabula_cli import doctor


def shown(**changes: Any) -> dict[str, Any]:
    base = {
        "running": False,
        "home": "/h",
        "port_base": 8470,
        "ports": {"story HTTP": 8470, "story gRPC": 8471},
        "ports_in_use": [],
        "record": {},
        "processes": [],
        "memory_bytes": 0,
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    "finding",
    [
        doctor.check_python((3, 12)),
        doctor.check_memory(1 << 30, running=False),
        doctor.check_shared_memory(Path("/proc")),
        doctor.check_clock(0.0, 0.0),
        doctor.check_clock(2e9, 2e9 + 4000),
        *doctor.check_ports(shown(ports_in_use=[8471])),
        *doctor.check_processes(shown(processes=[{"pid": 1}])),
        *doctor.check_processes(shown(running=True, record={"phase": "degraded", "programs": {}})),
    ],
    ids=lambda finding: finding.name,
)
def test_what_is_broken_says_how_to_mend_it(finding: doctor.Finding) -> None:
    assert not finding.ok
    assert finding.mend


@pytest.mark.parametrize(
    "finding",
    [
        doctor.check_python((3, 11)),
        doctor.check_memory(8 << 30, running=False),
        doctor.check_memory(1 << 30, running=True),
        doctor.check_clock(1.8e9, 1.7e9),
        *doctor.check_ports(shown()),
        *doctor.check_ports(shown(running=True, ports_in_use=[8470, 8471])),
        *doctor.check_processes(shown()),
    ],
    ids=lambda finding: finding.name,
)
def test_what_is_well_needs_no_mending(finding: doctor.Finding) -> None:
    assert finding.ok
    assert not finding.mend


def test_a_taken_port_is_named_with_who_should_have_it() -> None:
    (finding,) = doctor.check_ports(shown(ports_in_use=[8471]))
    assert "8471 (story gRPC)" in finding.detail


def test_versions_are_held_against_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.lock"
    lock.write_text("# pins\ntyper==0.0.1\nno-such-package==1.0\n")
    finding = doctor.check_versions(lock)
    assert not finding.ok
    assert "no-such-package missing (lock: 1.0)" in finding.detail
    assert "(lock: 0.0.1)" in finding.detail


def test_a_home_that_others_may_read_is_a_fault(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o644)
    (finding,) = doctor.check_privacy(tmp_path)
    assert not finding.ok
    assert str(tmp_path / "token") in finding.mend
    (tmp_path / "token").chmod(0o600)
    (finding,) = doctor.check_privacy(tmp_path)
    assert finding.ok


def test_disk_is_looked_at_where_the_home_will_be(tmp_path: Path) -> None:
    finding = doctor.check_disk(tmp_path / "not" / "yet")
    assert str(tmp_path) in finding.detail
